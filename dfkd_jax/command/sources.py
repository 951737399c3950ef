"""What a teacher's file and a folder of images say of themselves, for flags that are left out."""

from __future__ import annotations

from typing import Any, NamedTuple

from dfkd_jax import data, port
from dfkd_jax.build import EXPORTED, EXPORTED_ENDINGS
from dfkd_jax.errors import ConfigError, DataError
from dfkd_jax.storage import files, model_folder

INFO = 'dataset_info.json'  # in the folder of a version of a prepared data set


class Known(NamedTuple):
    """What is known of a classifier or of a data set; None: it does not say.

    mean, std: per channel, of images in [0, 1].
    """

    model: str | None = None
    num_classes: int | None = None
    channels: int | None = None
    image_size: int | None = None  # pixels
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    resize: str | None = None


def of_teacher(source: str, model: str | None) -> Known:
    """What a model folder, an exported network or a file of weights says.

    source: ``PATH`` or ``PATH#KEY``.  model: its architecture, if it is known.
    Raises PortError or CheckpointError for a file that cannot be read, and ConfigError where it
    does not tell one architecture.
    """
    path = files.expanded(source)
    if (path / model_folder.CARD).is_file():
        card, _ = model_folder.load_model(path)
        return _of_card(card)
    if path.suffix.lower() in EXPORTED_ENDINGS and model in (None, EXPORTED):
        network, _ = port.load_exported(path)
        height, _, channels = network.image_shape
        return Known(EXPORTED, network.num_classes, channels, height)
    found = port.recognise(path, model or '')
    if model is None:
        if len(found) != 1:
            fits = f'it fits {" and ".join(found)}' if found else 'nothing known fits it exactly'
            raise ConfigError(
                f'--teacher_model is missing: {source} does not tell its architecture ({fits}). '
                'Give --teacher_model=NAME, of docs/teachers.md, or export the network whole to a '
                '.pt2 file (docs/exported.md).'
            )
        (model,) = found
    classes, channels = found.get(model, (None, None))
    if classes is None or channels is None:
        return Known(model, classes, channels)
    ported = port.read(model, path, num_classes=classes, channels=channels)
    return Known(model, classes, channels, None, ported.mean or None, ported.std or None)


def _of_card(card: dict[str, Any]) -> Known:
    """The entries of a ``model.json``."""
    known = {name: card.get(name) for name in Known._fields}
    for name in ('mean', 'std'):
        known[name] = tuple(card[name]) if card.get(name) else None
    return Known(**known)


def of_data(name: str, data_dir: str | None) -> Known:
    """What is known of a data set: what is published, else what its files say.

    Raises DataError for one that is not there and not known.
    """
    spec = data.spec_of(name)
    if spec is not None:
        # An image size is published where all stored images have one.
        return Known(None, spec.num_classes, spec.channels, spec.image_size, spec.mean, spec.std)
    info = data.find(name, data_dir).info
    height, width, channels = info.features['image'].shape
    mean, std = (
        tuple(float(x) for x in (info.metadata or {}).get(each, ())) or None
        for each in ('mean', 'std')
    )
    size = height if height == width else None
    return Known(None, info.features['label'].num_classes, channels, size, mean, std)


def find_data(given: str) -> tuple[str, str | None]:
    """The name of a data set and the folder that it lies in; None: where data sets are kept.

    given: a name, or the folder of a prepared data set or of one of its versions.
    Raises DataError for any other folder, with the command that prepares it.
    """
    path = files.expanded(given)
    if not path.is_dir():
        if '/' in given:
            raise DataError(
                f'there is no folder {path}: expected one that `dfkd data prepare` made.'
            )
        return given, None
    path = path.absolute()
    if (path / INFO).is_file():
        path = path.parent
    if any(path.glob(f'*/{INFO}')):
        return path.name, str(path.parent)
    several = sorted({each.parts[-3] for each in path.glob(f'*/*/{INFO}')})
    if several:
        raise DataError(
            f'{path} holds the data sets {", ".join(several)}: name one, such as '
            f'--data={path / several[0]}.'
        )
    raise DataError(
        f'{path} is no prepared data set. Prepare it once: `dfkd data prepare {path.name} '
        f'--data_dir=DIR --source={path}`, then give --data=DIR/{path.name}.'
    )
