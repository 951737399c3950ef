"""What the commands `export` and `predict` do."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dfkd_jax.deploy import classify, formats, litert, quantise
from dfkd_jax.deploy import student as students
from dfkd_jax.deploy.student import Student
from dfkd_jax.errors import DataError, DeployError

BATCH = 32  # images that are classified at once


def export(
    source: Path, format: str, int8: bool, output: Path | None, overwrite: bool
) -> Iterator[str]:
    """Writes the student of `source` as `format`; yields lines for the user.

    Raises a UserError for a student that is not there or cannot be written so.
    """
    if int8 and format != 'onnx':
        raise DeployError(f'--int8 writes ONNX: leave --format={format} out, or --int8.')
    student = students.load(source)
    path = formats.target(student, format, int8, output, overwrite)
    card = student.card
    yield f'{card.model}, {card.num_classes} classes, {card.image_size} px, from {student.folder}'
    content, more = _content(student, format, int8, path)
    formats.write(path, content, card, format=format, **more)
    yield from _told(more)
    yield f'wrote {path} ({len(content):,} bytes) and {formats.card_path(path).name}'


def _content(student: Student, format: str, int8: bool, path: Path) -> tuple[bytes, dict[str, Any]]:
    """The file, checked where it can be run, and what was measured."""
    card, variables = student.card, student.variables
    if int8:
        return quantise.int8(student)
    if format == 'onnx':
        content = formats.onnx(card, variables)
        try:
            session = classify.onnx_session(content, path)
        except DeployError as error:
            if isinstance(error.__cause__, ImportError):
                return content, {'difference_from_jax': None}
            raise
        call = classify.onnx_call(session, path)
        return content, {'difference_from_jax': formats.difference(card, variables, call)}
    if format == 'stablehlo':
        content = formats.stablehlo(card, variables)
        call = classify.stablehlo_call(content, path)
        return content, {'difference_from_jax': formats.difference(card, variables, call)}
    if format == 'litert':
        return litert.convert(card, variables, [formats.INPUT], [*formats.OUTPUTS]), {}
    if format == 'torch':
        return formats.torch(card, variables, pickled=path.suffix in ('.pth', '.pt')), {}
    return formats.flax(card, variables), {}


def _told(measured: dict[str, Any]) -> Iterator[str]:
    """The measurements as lines."""
    if 'difference_from_jax' in measured:
        worst = measured['difference_from_jax']
        if worst is None:
            yield f'not compared with JAX, for want of onnxruntime: {formats.INSTALL}'
        else:
            yield f'differs from JAX by {worst:.1e}, at batches of {formats.BATCHES}'
    if 'agreement_with_float32' not in measured:
        return
    yield (
        f'int8, calibrated on {measured["calibration_images"]} synthetic images: predicts what '
        f'float32 does on {measured["agreement_with_float32"]:.2f} % of '
        f'{measured["synthetic_images_held_out"]} others'
    )
    for name, what in (('agreement_with_teacher', 'agreement with the teacher on these'),
                       ('accuracy', 'accuracy on the test images')):  # fmt: skip
        if name in measured:
            found = measured[name]
            yield f'{what}: float32 {found["float32"]:.2f} %, int8 {found["int8"]:.2f} %'
    if 'accuracy' not in measured:
        yield 'no test images, so no accuracy'


class Result(NamedTuple):
    """What was found for an image.  error: why nothing was; '' otherwise."""

    image: str
    top: list[dict[str, Any]]
    error: str = ''


def predict(model: Path, images: Sequence[Path], number: int) -> list[Result]:
    """The `number` most probable classes of each image, in order.

    Raises a UserError for a model that cannot be read; an image that cannot be is a `Result`.
    """
    if number < 1:
        raise DeployError(f'--top={number}: expected 1 or more.')
    card, call = classify.load(model)
    results: list[Result] = []
    for start in range(0, len(images), BATCH):
        chunk = images[start : start + BATCH]
        read: dict[Path, np.ndarray] = {}
        errors: dict[Path, str] = {}
        for path in chunk:
            try:
                read[path] = classify.read_image(path, card)
            except (DataError, OSError) as error:
                errors[path] = str(error)
        found: dict[Path, np.ndarray] = {}
        if read:
            found = dict(zip(read, call(np.stack([*read.values()]))[1]))
        for path in chunk:
            if path in errors:
                results.append(Result(str(path), [], errors[path]))
            else:
                answers = classify.top(found[path], card.class_names, number)
                results.append(Result(str(path), [answer._asdict() for answer in answers]))
    return results
