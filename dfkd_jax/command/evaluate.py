"""`dfkd evaluate`: the accuracy of a run's student, of a model folder or of an exported file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from dfkd_jax import data
from dfkd_jax.command import arguments, sources
from dfkd_jax.deploy import classify
from dfkd_jax.deploy import student as students
from dfkd_jax.deploy.card import Card
from dfkd_jax.errors import DataError
from dfkd_jax.evaluate import accuracy
from dfkd_jax.reporting import classes
from dfkd_jax.storage import files


def main(argv: Sequence[str], prog: str) -> None:
    """Prints the accuracy, and that of each class."""
    args = arguments.make('evaluate', prog).parse_args(argv)
    model = files.expanded(args.model)
    teacher = files.expanded(args.teacher) if args.teacher else None
    found = measure(model, args.data, teacher, args.batch_size)
    if args.json:
        print(json.dumps(files.plain(found), indent=2, ensure_ascii=False))
        return
    print(f'{found["model"]}: {found["accuracy"]:.2f} % of the {found["images"]} test images of '
          f'{found["dataset"]}')  # fmt: skip
    if teacher:
        print(f'agreement with {teacher}: {found["agreement"]:.2f} %')
    width = max(map(len, found['per_class']))
    for name, share in found['per_class'].items():
        print(f'  {name:{width}}  {"–" if share is None else f"{share:6.2f} %"}')


def measure(
    model: Path, images: str | None = None, teacher: Path | None = None, batch_size: int = 100
) -> dict[str, Any]:
    """What a classifier makes of test images; accuracies and agreement in per cent.

    model, teacher: what `classify.load` reads.
    images: a name or a folder of `sources.find_data`; None: the data set that the model names.
    Raises a UserError for a model or images that are not there or do not fit.
    """
    if batch_size < 1:
        raise DataError(f'--batch_size={batch_size}: expected 1 or more.')
    card, call = classify.load(model)
    name, data_dir = _images(model, card) if images is None else sources.find_data(images)
    test = data.load(settings(card, name, data_dir), 'test')
    predicted, label = _predicted(call, test, batch_size)
    shares = classes.shares(classes.confusion(predicted, label, card.num_classes))
    found = {
        'model': card.model,
        'dataset': name,
        'images': test.size,
        'accuracy': accuracy(predicted, label),
        'per_class': dict(zip(_distinct(card.class_names), files.plain(shares))),
    }
    if teacher is not None:
        other, of_teacher = classify.load(teacher)
        if other.num_classes != card.num_classes:
            raise DataError(
                f'{teacher} has {other.num_classes} classes, and {model} {card.num_classes}.'
            )
        theirs = data.load(settings(other, name, data_dir), 'test')
        found['agreement'] = accuracy(predicted, _predicted(of_teacher, theirs, batch_size)[0])
    return found


def settings(card: Card, name: str, data_dir: str | None) -> Any:
    """The group `data` of a config, for the images of a card."""
    names = ('num_classes', 'channels', 'image_size', 'mean', 'std', 'resize')
    known = {each: getattr(card, each) for each in names}
    return ConfigDict({'name': name, 'data_dir': data_dir, **known})


def _images(model: Path, card: Card) -> tuple[str, str | None]:
    """The data set that a model was made for, and where its run found it."""
    name = card.source.get('dataset')
    if not name:
        raise DataError(
            f'{model} names no data set: give --data=NAME or --data=FOLDER, of test images that '
            '`dfkd data prepare` made.'
        )
    config = students.load(model).config if model.is_dir() else None
    return str(name), config.data.data_dir if config else None


def _predicted(call: Any, test: data.Dataset, batch_size: int) -> tuple[np.ndarray, np.ndarray]:
    """The classes that a classifier predicts, and those of the images, both [N]."""
    found, label = [], []
    for batch in test.batches(batch_size):
        found.append(np.argmax(call(batch.image)[0], axis=-1)[batch.valid])
        label.append(batch.label[batch.valid])
    return np.concatenate(found), np.concatenate(label)


def _distinct(names: Sequence[str]) -> list[str]:
    """The names, with the label where two classes share one."""
    return [name if names.count(name) == 1 else f'{name} ({i})' for i, name in enumerate(names)]
