"""A model folder: the weights of one network, for example a teacher.

``variables.safetensors`` holds the arrays, under names like ``params/conv1/kernel``.
``model.json`` is the card: it says which model they belong to and where they come from.
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
CARD = 'model.json'


def flatten(variables: Mapping[str, Any]) -> dict[str, Any]:
    """``{'params': {'conv1': {'kernel': x}}}`` as ``{'params/conv1/kernel': x}``."""
    return traverse_util.flatten_dict(variables, sep='/')


def unflatten(arrays: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `flatten`."""
    return traverse_util.unflatten_dict(arrays, sep='/')


def save_model(
    directory: str | os.PathLike[str], name: str, variables: Mapping[str, Any], **card: Any
) -> None:
    """Writes a model folder.

    name: the name of the model in `dfkd_jax.models`.
    variables: ``{'params': ..., 'batch_stats': ...}``.
    card: further entries of ``model.json`` (num_classes, channels, source, ...).
    """
    directory = Path(directory)
    arrays = flatten(variables)
    digest = files.save_arrays(directory / VARIABLES, arrays)
    # Last: a folder with a card is complete, and the digest ties the two files together.
    files.write_json(
        directory / CARD,
        {'model': name, **card, 'keys': len(arrays), 'variables_sha256': digest},
    )


def load_model(directory: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Reads a model folder; returns ``(card, variables)``.

    card: the content of ``model.json``, with ``model`` at least.
    variables: nested dicts of NumPy arrays under ``params`` and ``batch_stats``.

    Raises CheckpointError for a folder that is missing, incomplete or damaged.
    """
    directory = Path(directory)
    for name in (CARD, VARIABLES):
        if not (directory / name).is_file():
            raise CheckpointError(
                f'{directory} is not a model folder: it has no {name}. A folder that '
                '`python -m dfkd_jax.port` or `python -m dfkd_jax.teach` wrote is expected.'
            )
    card = files.read_json(directory / CARD, 'Make the folder again.')
    absent = [name for name in ('model', 'variables_sha256') if name not in card]
    if absent:
        raise CheckpointError(
            f'{directory / CARD} lacks {" and ".join(absent)}. Make the folder again.'
        )
    data = files.read_bytes(directory / VARIABLES)
    arrays = files.parse_arrays(directory / VARIABLES, data)
    if hashlib.sha256(data).hexdigest() != card['variables_sha256']:
        raise CheckpointError(
            f'{directory / VARIABLES} is not the file that {CARD} beside it describes '
            '(sha256 differs). Make the folder again.'
        )
    try:
        return card, {'params': {}, 'batch_stats': {}, **unflatten(arrays)}
    except (TypeError, ValueError) as error:  # 'a' and 'a/b': an array and a group of one name
        raise CheckpointError(
            f'{directory / VARIABLES} has a name that is both an array and a group of arrays. Make '
            'the folder again.'
        ) from error


def preparation(data: Any, about: Any) -> dict[str, Any]:
    """Entries of a classifier's card: how its images are prepared, and the names of its classes.

    data: the group `config.data`.
    about: the facts of that data, `data.Facts`.
    """
    names = ('mean', 'std', 'class_names')
    return {'resize': data.resize} | {name: getattr(about, name) for name in names}


def save_classifier(
    directory: str | os.PathLike[str], name: str, variables: Any, data: Any, **card: Any
) -> None:
    """Writes the model folder of a classifier, with the entries that `build.load_network` checks.

    data: the group `config.data`, whose classes and images the network is for.
    card: further entries of ``model.json``.
    """
    save_model(
        directory,
        name,
        jax.tree.map(np.asarray, variables),
        num_classes=data.num_classes,
        channels=data.channels,
        image_size=data.image_size,
        dataset=data.name,
        **card,
    )
