"""A model folder: one network's weights, a teacher's for instance.

``variables.safetensors`` has names like ``params/conv1/kernel``, and ``model.json`` says what the
weights are.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import traverse_util

from dfkd_jax.errors import CheckpointError
from dfkd_jax.storage import files

VARIABLES = 'variables.safetensors'
FACTS = 'model.json'


# Model folders


def flatten(variables: Mapping[str, Any]) -> dict[str, Any]:
    """``{'params': {'conv1': {'kernel': x}}}`` as ``{'params/conv1/kernel': x}``."""
    return traverse_util.flatten_dict(variables, sep='/')


def unflatten(arrays: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `flatten`."""
    return traverse_util.unflatten_dict(arrays, sep='/')


def save_model(
    directory: str | os.PathLike[str], name: str, variables: Mapping[str, Any], **facts: Any
) -> None:
    """Writes a model folder.

    name: the model's name in `dfkd_jax.models`.
    variables: ``{'params': ..., 'batch_stats': ...}``.
    facts: what else to tell of the weights in ``model.json`` (num_classes, channels, source, ...).
    """
    directory = Path(directory)
    arrays = flatten(variables)
    digest = files.save_arrays(directory / VARIABLES, arrays)
    # Last: a folder with its facts is a whole one, and the digest ties the two files together.
    files.write_json(
        directory / FACTS,
        {'model': name, **facts, 'keys': len(arrays), 'variables_sha256': digest},
    )


def load_model(directory: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Reads a model folder: ``(facts, variables)``.

    facts: the contents of ``model.json``, with at least ``model``.
    variables: nested dicts of numpy arrays under ``params`` and ``batch_stats``.
    Raises CheckpointError for a folder that is missing, incomplete or damaged.
    """
    directory = Path(directory)
    for name in (FACTS, VARIABLES):
        if not (directory / name).is_file():
            raise CheckpointError(
                f'{directory} is not a model folder: it has no {name}. A folder that '
                '`python -m dfkd_jax.port` or `python -m dfkd_jax.teach` wrote is expected.'
            )
    facts = files.read_json(directory / FACTS, 'Make the folder again.')
    absent = [name for name in ('model', 'variables_sha256') if name not in facts]
    if absent:
        raise CheckpointError(f'{directory / FACTS} lacks {" and ".join(absent)}.')
    data = files.read_bytes(directory / VARIABLES)
    arrays = files.parse_arrays(directory / VARIABLES, data)
    if hashlib.sha256(data).hexdigest() != facts['variables_sha256']:
        raise CheckpointError(
            f'{directory / VARIABLES} is not the file that {FACTS} beside it describes '
            '(sha256 differs). Make the folder again.'
        )
    try:
        return facts, {'params': {}, 'batch_stats': {}, **unflatten(arrays)}
    except (TypeError, ValueError) as error:  # 'a' and 'a/b': an array where others are to be
        raise CheckpointError(f'the names in {directory / VARIABLES} are no tree.') from error


def save_classifier(
    directory: str | os.PathLike[str], name: str, variables: Any, data: Any, **about: Any
) -> None:
    """Writes a model folder with what `build.load_network` checks.

    data: the config's group, whose classes and images the network is for.
    """
    save_model(
        directory,
        name,
        jax.tree.map(np.asarray, variables),
        num_classes=data.num_classes,
        channels=data.channels,
        image_size=data.image_size,
        dataset=data.name,
        **about,
    )
