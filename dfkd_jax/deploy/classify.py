"""Reads what `export` wrote, or a model folder, and classifies images with it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from safetensors import safe_open

from dfkd_jax import data, port
from dfkd_jax.data import image_folder
from dfkd_jax.deploy import card as cards
from dfkd_jax.deploy import formats
from dfkd_jax.deploy import student as students
from dfkd_jax.deploy.card import Card
from dfkd_jax.deploy.formats import Arrays
from dfkd_jax.distributed import sharding
from dfkd_jax.errors import DataError, DeployError
from dfkd_jax.storage import files, model_folder


class Classifier(NamedTuple):
    """call: pixels [B, H, W, channels] uint8 to logits and probabilities, [B, classes]."""

    card: Card
    call: Callable[[np.ndarray], Arrays]


def load(path: Path) -> Classifier:
    """The classifier in a file that `export` wrote, told by its ending, in a run or a model folder.

    Raises DeployError, CheckpointError, PortError or ConfigError for one that cannot be read.
    """
    if path.is_dir():
        student = students.load(path)
        return _of_variables(student.card, student.variables)
    if not path.is_file():
        raise DeployError(
            f'there is no {path}: expected a file that `python -m dfkd_jax.export` wrote, a run or '
            'a model folder.'
        )
    readers = {
        '.onnx': read_onnx,
        '.stablehlo': read_stablehlo,
        '.safetensors': read_safetensors,
    }
    if path.suffix.lower() not in readers:
        raise DeployError(
            f'{path} ends with {path.suffix!r}: expected {", ".join(readers)}, a run or a model '
            'folder.'
        )
    return readers[path.suffix.lower()](path)


# 1. Readers.


def read_onnx(path: Path) -> Classifier:
    """An ONNX file, by onnxruntime on the CPU."""
    session = onnx_session(files.read_bytes(path), path)
    card = cards.of_metadata(session.get_modelmeta().custom_metadata_map, path)
    return Classifier(card, onnx_call(session, path))


def onnx_session(content: bytes, where: Any) -> Any:
    """An onnxruntime session of a file.  Raises DeployError where it is none."""
    try:
        import onnxruntime
    except ImportError as error:
        raise DeployError(
            f'running ONNX needs the package onnxruntime: {formats.INSTALL}.'
        ) from error
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    try:
        return onnxruntime.InferenceSession(content, options, providers=['CPUExecutionProvider'])
    except Exception as error:  # onnxruntime raises a type of its own for each mistake
        raise DeployError(f'{where} is no ONNX model that runs here ({_first(error)}).') from error


def onnx_call(session: Any, where: Any) -> Callable[[np.ndarray], Arrays]:
    """What a session computes of pixels."""
    inputs = [(each.name, each.type) for each in session.get_inputs()]
    outputs = [each.name for each in session.get_outputs()]
    if inputs != [(formats.INPUT, 'tensor(uint8)')] or not {*formats.OUTPUTS} <= {*outputs}:
        raise DeployError(
            f'{where} has the inputs {inputs} and outputs {outputs}: expected pixels (uint8), '
            'logits and probabilities, as `python -m dfkd_jax.export` writes them.'
        )
    return lambda pixels: tuple(session.run(list(formats.OUTPUTS), {formats.INPUT: pixels}))


def read_stablehlo(path: Path) -> Classifier:
    """A file of `jax.export`, without any code of the network, and the card beside it."""
    beside = formats.card_path(path)
    if not beside.is_file():
        raise DeployError(
            f'{beside} is missing, the card of {path.name}: copy it along, or export again.'
        )
    card = cards.of_entries(files.read_json(beside), beside)
    return Classifier(card, stablehlo_call(files.read_bytes(path), path))


def stablehlo_call(content: bytes, where: Any) -> Callable[[np.ndarray], Arrays]:
    """What a serialised program computes of pixels.  Raises DeployError where it is none."""
    try:
        exported = jax.export.deserialize(bytearray(content))
        inputs = [(aval.dtype.name, len(aval.shape)) for aval in exported.in_avals]
    except ImportError as error:
        raise DeployError(
            f'reading StableHLO needs the package flatbuffers: {formats.INSTALL}.'
        ) from error
    except Exception as error:  # flatbuffers raise anything at damaged bytes
        raise DeployError(
            f'{where} cannot be read by jax {jax.__version__} ({_first(error)}): it is damaged, or '
            'a newer jax wrote it.'
        ) from error
    if inputs != [('uint8', 4)] or len(exported.out_avals) != 2:
        raise DeployError(f'{where} has the inputs {inputs}: expected pixels, uint8 of rank 4.')

    def call(pixels: np.ndarray) -> Arrays:
        logits, probabilities = exported.call(pixels)
        return np.asarray(logits), np.asarray(probabilities)

    return call


def read_safetensors(path: Path) -> Classifier:
    """Variables with their card in the header, under Flax's or PyTorch's names."""
    arrays = files.load_arrays(path)
    with safe_open(path, framework='numpy') as file:
        entries = file.metadata() or {}
    card = cards.of_metadata(entries, path)
    if entries.get('layout') == '"torch"':
        variables = port.from_torch(card.model, arrays, card.num_classes, channels=card.channels)
    else:
        variables = {'params': {}, 'batch_stats': {}, **model_folder.unflatten(arrays)}
    return _of_variables(card, variables)


def _of_variables(card: Card, variables: Any) -> Classifier:
    """A network of this package with its variables.  Raises DeployError where they do not fit."""
    fn, plan = students.function(card), sharding.make('jit')
    one = jax.ShapeDtypeStruct((1, *card.image_shape), np.uint8)
    try:
        jax.eval_shape(fn, variables, one)
    except Exception as error:  # flax raises a type of its own for each mistake
        raise DeployError(
            f'the arrays do not fit the network {card.model} ({_first(error)}).'
        ) from error
    predict, placed = plan.predict(fn), plan.replicate(variables)
    return Classifier(card, lambda pixels: jax.device_get(predict(placed, pixels)))


def _first(error: Exception) -> str:
    """The first line of an error."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]


# 2. Images.


def read_image(path: Path, card: Card) -> np.ndarray:
    """The pixels of an image file as the card says, [H, W, channels] uint8.

    They are prepared as `data.load` prepares those of a data set: grey or colour, then padded,
    resized or cropped.  Raises DataError for a file that is no image, or does not fit.
    """
    if not path.exists():
        raise DataError(f'{path} is not there')
    if path.is_dir():
        raise DataError(f'{path} is a folder: give the images in it, {path}/*')
    pixels = np.zeros(card.image_shape, np.uint8)
    with image_folder.open_image(path) as file:
        image = image_folder.eight_bits(file).convert('L' if card.channels == 1 else 'RGB')
    try:
        data.fit_image(image, card.resize, pixels)
    except DataError as error:
        raise DataError(
            f'{path}: {error}, and this network pads small images and takes no larger ones: make '
            'it smaller'
        ) from error
    return pixels


class Answer(NamedTuple):
    """A class that an image may show.  probability: 0 to 1."""

    label: int
    name: str
    probability: float


def top(probabilities: np.ndarray, names: tuple[str, ...], number: int) -> list[Answer]:
    """The most probable classes of one image, [classes], the first first."""
    order = np.argsort(-probabilities, kind='stable')[:number]
    return [Answer(int(i), names[i], float(probabilities[i])) for i in order]
