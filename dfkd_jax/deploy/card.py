"""The card of a classifier: what its file must say so that it alone is enough to classify with."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from dfkd_jax import data, labels
from dfkd_jax.errors import DeployError
from dfkd_jax.storage import files


class Card(NamedTuple):
    """What a classifier is and how its images are prepared.

    model: its name in `dfkd_jax.models`.
    channels: of its images, 1 (grey) or 3.
    image_size: the side of its images, in pixels.
    resize: how an image comes to that size, as `data.Settings` has it.
    mean, std: of images in [0, 1], one value per channel.
    class_names: one for each class, by label.
    source: where it comes from: data set, method, teacher, accuracies in per cent.
    """

    model: str
    num_classes: int
    channels: int
    image_size: int
    resize: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    class_names: tuple[str, ...]
    source: dict[str, Any] = {}

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(H, W, channels)."""
        return (self.image_size, self.image_size, self.channels)


def metadata(card: Card, **more: Any) -> dict[str, str]:
    """The card, and more, as texts by name: each value is JSON."""
    entries = {**card._asdict(), **more}
    return {name: json.dumps(files.plain(value), ensure_ascii=False) for name, value in
            entries.items()}  # fmt: skip


def of_metadata(entries: Mapping[str, str], where: Any) -> Card:
    """The card in a file's metadata.  Raises DeployError where there is none, or a wrong one."""
    found = {}
    for name in Card._fields:
        try:
            found[name] = json.loads(entries.get(name, 'null'))
        except (ValueError, RecursionError) as error:
            raise DeployError(f'{where}: its metadata {name!r} is not JSON ({error}).') from error
    return of_entries(found, where)


def of_entries(entries: Mapping[str, Any], where: Any) -> Card:
    """The card in names and values, checked.  Raises DeployError, naming what is wrong."""
    required = [name for name in Card._fields if name not in ('class_names', 'source')]
    absent = [name for name in required if entries.get(name) is None]
    if absent:
        raise DeployError(
            f'{where} does not say its {", ".join(absent)}: expected a file or folder that a run '
            'or `python -m dfkd_jax.export` wrote.'
        )
    try:
        card = Card(
            model=str(entries['model']),
            num_classes=int(entries['num_classes']),
            channels=int(entries['channels']),
            image_size=int(entries['image_size']),
            resize=str(entries['resize']),
            mean=tuple(map(float, entries['mean'])),
            std=tuple(map(float, entries['std'])),
            class_names=tuple(map(str, entries.get('class_names') or ())),
            source=dict(entries.get('source') or {}),
        )
    except (TypeError, ValueError) as error:
        raise DeployError(f'{where} has a wrong entry ({error}).') from error
    wrong = _mistakes(card)
    if wrong:
        raise DeployError(f'{where} says {"; ".join(wrong)}.')
    return card._replace(class_names=_names(card))


def _mistakes(card: Card) -> list[str]:
    """What is impossible in a card."""
    checks = (
        (card.num_classes >= 2, f'num_classes {card.num_classes}: expected 2 or more'),
        (card.channels in (1, 3), f'channels {card.channels}: expected 1 or 3'),
        (1 <= card.image_size <= 2**14, f'image_size {card.image_size}: expected 1 to 16384'),
        (card.resize in data.RESIZE, f'resize {card.resize!r}: expected one of {data.RESIZE}'),
        (
            len(card.mean) == len(card.std) == card.channels,
            f'{len(card.mean)} means and {len(card.std)} stds: expected {card.channels} of each',
        ),
        (
            all(map(math.isfinite, card.mean)) and all(0 < x < math.inf for x in card.std),
            f'mean {card.mean} and std {card.std}: expected finite, positive std',
        ),
        (
            len(card.class_names) in (0, card.num_classes),
            f'{len(card.class_names)} class names for {card.num_classes} classes',
        ),
    )
    return [text for right, text in checks if not right]


def _names(card: Card) -> tuple[str, ...]:
    """The names of the classes: WordNet's words for its ids, and a number for what has no name."""
    names = card.class_names or tuple(f'class {label}' for label in range(card.num_classes))
    words = labels.class_names(str(card.source.get('dataset')))
    ids = all(len(name) == 9 and name[0] == 'n' and name[1:].isdigit() for name in names)
    return words if len(words) == len(names) and (ids or not card.class_names) else names
