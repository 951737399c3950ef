"""Writes a student in each format: one function each, and what they share.

Every file has its card beside it, ``FILE.json``; ONNX and safetensors hold it inside too.  ONNX,
StableHLO and LiteRT take pixels, [B, H, W, channels] uint8 of the card's size, and give logits and
probabilities, [B, classes]: the normalisation and the softmax are part of them.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from dfkd_jax import port
from dfkd_jax.deploy import card as cards
from dfkd_jax.deploy import onnx_writer
from dfkd_jax.deploy.card import Card
from dfkd_jax.deploy.student import Student, function
from dfkd_jax.distributed import sharding
from dfkd_jax.errors import DeployError
from dfkd_jax.storage import files, model_folder

SUFFIXES = {
    'onnx': '.onnx', 'stablehlo': '.stablehlo', 'safetensors': '.safetensors',
    'torch': '_torch.safetensors', 'litert': '.tflite',
}  # fmt: skip
INPUT, OUTPUTS = 'pixels', ('logits', 'probabilities')
INSTALL = "pip install 'dfkd_jax[deploy]'"

BATCHES = (1, 4, 7)  # at which a file is compared with JAX
TOLERANCE = 1e-5  # of logits, relative to the largest, and of probabilities

Arrays = tuple[np.ndarray, np.ndarray]  # logits and probabilities


def target(student: Student, format: str, int8: bool, output: Path | None, overwrite: bool) -> Path:
    """Where the file goes: `output`, or ``export/`` in the run or the model folder.

    Raises DeployError where something is there already.
    """
    suffix = ('_int8' if int8 else '') + SUFFIXES[format]
    path = output or (student.run or student.folder) / 'export' / f'student{suffix}'
    if path.is_dir():
        raise DeployError(f'{path} is a folder: --output is the file to make.')
    there = [each for each in (path, card_path(path)) if each.exists()]
    if there and not overwrite:
        raise DeployError(
            f'{there[0]} is there already: give another --output, or --overwrite to replace it.'
        )
    return path


def card_path(path: Path) -> Path:
    """The card beside a file."""
    return path.with_name(f'{path.name}.json')


def write(path: Path, content: bytes, card: Card, **more: Any) -> None:
    """Writes a file and its card, with more entries."""
    files.write_bytes(path, content)
    files.write_json(card_path(path), {**card._asdict(), **more})


# 1. Formats.


def onnx(card: Card, variables: Any, **more: Any) -> bytes:
    """The student as ONNX, with its card and more entries as metadata, checked by onnx.checker.

    Raises DeployError where `onnx` is not installed, or an operation has no translation.
    """
    try:
        import onnx  # noqa: F401
    except ImportError as error:
        raise DeployError(f'writing ONNX needs the package onnx: {INSTALL}.') from error
    entries = cards.metadata(card, **more)
    model = onnx_writer.write(function(card), variables, card.image_shape, OUTPUTS, entries)
    return model.SerializeToString()


def stablehlo(card: Card, variables: Any) -> bytes:
    """The student as `jax.export` serialises it, for any batch on CPUs, CUDA and TPUs."""
    fn = function(card)
    # As constants of the program, so that the file needs nothing else.
    fixed: Any = sharding.make('jit').call(lambda pixels: fn(variables, pixels))
    batch = jax.export.symbolic_shape('batch')[0]
    pixels = jax.ShapeDtypeStruct((batch, *card.image_shape), jnp.uint8)
    exported = jax.export.export(fixed, platforms=('cpu', 'cuda', 'tpu'))(pixels)
    try:
        return bytes(exported.serialize())
    except ImportError as error:
        raise DeployError(f'StableHLO needs the package flatbuffers: {INSTALL}.') from error


def flax(card: Card, variables: Any) -> bytes:
    """The variables as safetensors, under the names of a model folder."""
    return _safetensors(model_folder.flatten(variables), cards.metadata(card, layout='flax'))


def torch(card: Card, variables: Any, pickled: bool) -> bytes:
    """PyTorch's state dict, as safetensors or (`pickled`) as torch.save writes it."""
    arrays = port.to_torch(card.model, variables)
    if not pickled:
        return _safetensors(arrays, cards.metadata(card, layout='torch'))
    try:
        import torch
    except ImportError as error:
        raise DeployError(
            "writing .pth needs PyTorch (pip install 'dfkd_jax[torch]'): give --output a name "
            'that ends with .safetensors, which PyTorch users load as well.'
        ) from error
    content = io.BytesIO()
    # Copies: some are views that cannot be written to.
    torch.save({name: torch.tensor(np.array(x)) for name, x in arrays.items()}, content)
    return content.getvalue()


def _safetensors(arrays: Mapping[str, Any], metadata: dict[str, str]) -> bytes:
    host = {name: np.asarray(x, order='C') for name, x in arrays.items()}
    return safetensors.numpy.save(host, metadata=metadata)


# 2. Comparison with JAX.


def difference(card: Card, variables: Any, call: Callable[[np.ndarray], Arrays]) -> float:
    """The largest difference of a file from JAX at batches of several sizes, relative to logits.

    call: of pixels, what the file computes.
    Raises DeployError where it is more than `TOLERANCE`.
    """
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (max(BATCHES), *card.image_shape), np.uint8)
    plan, fn = sharding.make('jit'), function(card)
    with jax.default_matmul_precision('highest'):
        wanted = jax.device_get(plan.predict(fn)(plan.replicate(variables), pixels))
    scale = max(1.0, float(np.abs(wanted[0]).max()))
    worst = 0.0
    for batch in BATCHES:
        logits, probabilities = call(pixels[:batch])
        if logits.shape != (batch, card.num_classes):
            raise DeployError(f'the file gives {logits.shape} logits for {batch} images.')
        worst = max(
            worst,
            float(np.abs(logits - wanted[0][:batch]).max()) / scale,
            float(np.abs(probabilities - wanted[1][:batch]).max()),
        )
    if not worst <= TOLERANCE:
        raise DeployError(
            f'the file differs from JAX by {worst:.1e}, more than {TOLERANCE:.0e}: it was not '
            'written. Please report it.'
        )
    return worst
