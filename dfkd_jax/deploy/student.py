"""Finds the network to export: the student of a run, or any model folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
from ml_collections import ConfigDict

from dfkd_jax import build, data
from dfkd_jax.deploy import card as cards
from dfkd_jax.deploy.card import Card
from dfkd_jax.errors import ConfigError, DataError, DeployError
from dfkd_jax.storage import model_folder
from dfkd_jax.storage import workdir as folder

# Entries of a model's card that tell where it comes from.
SOURCES = (
    'dataset', 'method', 'seed', 'teacher', 'teacher_file', 'teacher_sha256', 'teacher_accuracy',
    'saw', 'role', 'accuracy', 'agreement_with_teacher', 'measured_on',
    'source', 'sha256', 'variables_sha256',
)  # fmt: skip


class Student(NamedTuple):
    """A network to export.

    variables: ``{'params': ..., 'batch_stats': ...}``, NumPy arrays.
    folder: its model folder.
    run: the folder of the run that made it, with its config; None if there is none.
    """

    card: Card
    variables: dict[str, Any]
    folder: Path
    run: Path | None
    config: ConfigDict | None


def load(path: Path) -> Student:
    """The student of the run in `path`, or the network of the model folder `path`.

    Raises DeployError, CheckpointError or ConfigError, saying what is missing or wrong.
    """
    place = path / 'student' if (path / 'student' / model_folder.CARD).is_file() else path
    if not (place / model_folder.CARD).is_file():
        if (path / folder.CONFIG).is_file():
            raise DeployError(
                f'the run in {path} has not left its student yet: the command that began it '
                'continues it to its end.'
            )
        what = 'is no run and no model folder' if path.is_dir() else 'is not there'
        raise DeployError(
            f'{path} {what}: expected the --workdir of a finished run, its folder student/, or a '
            'folder that `python -m dfkd_jax.teach` wrote.'
        )
    run, config = _run(place)
    entries, _ = model_folder.load_model(place)
    card = _card(place, entries, config)
    variables = build.load_network(place, card.model, _images(card))
    return Student(card, variables, place, run, config)


def _images(card: Card) -> Any:
    """The group `config.data` as far as networks depend on it."""
    return ConfigDict({name: getattr(card, name) for name in
                       ('num_classes', 'channels', 'image_size')})  # fmt: skip


def _run(place: Path) -> tuple[Path | None, ConfigDict | None]:
    """The run that a model folder lies in or is, and its config."""
    for run in (place, place.absolute().parent):
        if (run / folder.CONFIG).is_file():
            return run, folder.read_config(run / folder.CONFIG)
    return None, None


def _card(place: Path, entries: dict[str, Any], config: ConfigDict | None) -> Card:
    """The card of a model folder; what an older one lacks is taken from its run's config."""
    found = dict(entries)
    if any(found.get(name) is None for name in ('mean', 'std', 'resize')):
        if config is None or 'data' not in config:
            raise DeployError(
                f'{place / model_folder.CARD} does not say how images are prepared (mean, std, '
                'resize), and there is no config.json of a run beside it. Add "mean": [...], '
                '"std": [...] of images in [0, 1], "image_size": PIXELS and "resize": '
                '"pad", "resize" or "crop".'
            )
        found = {**_preparation(config.data), **found}
    source = {name: found[name] for name in SOURCES if found.get(name) is not None}
    return cards.of_entries({**found, 'source': source}, place / model_folder.CARD)


def _preparation(settings: Any) -> dict[str, Any]:
    """How the images of a config are prepared, and the names of their classes."""
    try:
        facts = data.check(settings)
        names, mean, std = facts.class_names, facts.mean, facts.std
    except DataError:  # it is elsewhere: what is published of it may be enough
        spec = data.spec_of(settings.name)
        if spec is None and (settings.mean is None or settings.std is None):
            raise
        names = spec.class_names if spec else ()
        mean, std = (
            tuple(values or ())
            for values in (
                settings.mean or (spec and spec.mean),
                settings.std or (spec and spec.std),
            )
        )
        mean, std = (
            values * (settings.channels if len(values) == 1 else 1) for values in (mean, std)
        )
    return {
        'mean': mean, 'std': std, 'resize': settings.resize, 'class_names': names,
        'image_size': settings.image_size, 'channels': settings.channels,
    }  # fmt: skip


def function(card: Card) -> Callable[[Any, Any], tuple[jax.Array, jax.Array]]:
    """``(variables, pixels [B, H, W, channels] uint8) -> logits, probabilities``, [B, classes].

    Raises DeployError for a model that this version does not have.
    """
    try:
        module = build.make_model(card.model, card.num_classes, 'float32', None)
    except ConfigError as error:
        raise DeployError(str(error)) from error

    def classify(variables: Any, pixels: Any) -> tuple[jax.Array, jax.Array]:
        images = data.normalise(pixels, card.mean, card.std)
        logits = module.apply(variables, images).logits
        return logits, jax.nn.softmax(logits)

    return classify
