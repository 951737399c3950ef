"""What a student makes of each class of the test images: shares, confusions, a collapsed class."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dfkd_jax.storage import files

CONFUSION, BY_CLASS = 'confusion.csv', 'per_class.csv'


class Tested(NamedTuple):
    """Classes of test images, [N] integers each: the true ones, the student's, the teacher's."""

    label: np.ndarray
    student: np.ndarray
    teacher: np.ndarray


class ByClass(NamedTuple):
    """What a finished run's files say of each class.

    names: [C].  images: how many of each class, [C].
    student, teacher: per cent of them that are right, [C]; NaN for a class without images.
    confusion: images of a class that the student takes for each class, [class, predicted], [C, C].
    """

    names: tuple[str, ...]
    images: np.ndarray
    student: np.ndarray
    teacher: np.ndarray
    confusion: np.ndarray


def confusion(predicted: np.ndarray, label: np.ndarray, num_classes: int) -> np.ndarray:
    """How many images of each class are predicted as each: [class, predicted class] int64.

    predicted, label: [N] integers in [0, num_classes).
    """
    pairs = np.asarray(label, np.int64) * num_classes + predicted
    return np.bincount(pairs, minlength=num_classes**2).reshape(num_classes, num_classes)


def shares(matrix: np.ndarray) -> np.ndarray:
    """The per cent of each class that are right, of a confusion [C, C]; NaN without images."""
    number = matrix.sum(1)
    return 100 * np.divide(np.diag(matrix), number, np.full(len(matrix), np.nan), where=number > 0)


def by_class(tested: Tested, num_classes: int, class_names: Sequence[str]) -> ByClass:
    """The tables of predictions.  class_names: (): the numbers."""
    of_student, of_teacher = (
        confusion(each, tested.label, num_classes) for each in (tested.student, tested.teacher)
    )
    names = tuple(map(str, class_names or range(num_classes)))
    return ByClass(names, of_student.sum(1), shares(of_student), shares(of_teacher), of_student)


def collapsed(found: ByClass) -> list[str]:
    """The classes that the teacher knows and the student does not: under a tenth of its share."""
    known = (found.teacher >= 50) & (found.student < 0.1 * found.teacher)
    return [name for name, lost in zip(found.names, known) if lost]


def write(workdir: Path, found: ByClass) -> None:
    """Writes ``per_class.csv`` and ``confusion.csv``: a row for each true class."""
    rows = zip(found.names, found.images, _cells(found.student), _cells(found.teacher))
    _write(workdir / BY_CLASS, ['class', 'images', 'student', 'teacher'], rows)
    counts = ([name, *row] for name, row in zip(found.names, found.confusion))
    _write(workdir / CONFUSION, ['class', *found.names], counts)


def read(workdir: Path) -> ByClass | None:
    """What `write` wrote; None where it did not, or where it is damaged."""
    try:
        (_, *rows), (_, *matrix) = (
            list(csv.reader((workdir / name).read_text().splitlines()))
            for name in (BY_CLASS, CONFUSION)
        )
        names, images, student, teacher = zip(*rows)
        return ByClass(
            names,
            np.array(images, np.int64),
            np.array([float(cell or 'nan') for cell in student]),
            np.array([float(cell or 'nan') for cell in teacher]),
            np.array([row[1:] for row in matrix], np.int64).reshape(len(names), len(names)),
        )
    except (OSError, ValueError):
        return None


def _cells(values: np.ndarray) -> list[str]:
    return [f'{value:.4f}' if np.isfinite(value) else '' for value in values]


def _write(path: Path, head: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator='\n')
    writer.writerow(head)
    writer.writerows(rows)
    files.write_bytes(path, text.getvalue().encode())
