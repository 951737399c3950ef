"""The network whose features are measured: read from its folder, given a new head, looked into."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from dfkd_jax import build, data
from dfkd_jax.contract import Array, Key
from dfkd_jax.distributed import sharding
from dfkd_jax.errors import ConfigError
from dfkd_jax.storage import files, model_folder


class Network(NamedTuple):
    """A trained classifier, and how images are brought to it."""

    card: dict[str, Any]  # from its model.json, which has `dataset` and `image_size`
    variables: dict[str, Any]
    mean: tuple[float, ...]  # [channels], of images in [0, 1]
    std: tuple[float, ...]  # [channels]


# --- From its folder -----------------------------------------------------------------------


def load(
    student: str | Path,
    dataset: str | None = None,
    image_size: int | None = None,
    data_dir: str | None = None,
) -> Network:
    """The network in a model folder or, given a run's workdir, its student.

    dataset, image_size: what it was trained on, where the folder does not say.
    Raises ConfigError, CheckpointError, and DataError where the constants of its data set are
    stored with images that are missing.
    """
    folder = files.expanded(student)
    if not (folder / model_folder.CARD).exists() and (folder / 'student').is_dir():
        folder /= 'student'
    if not (folder / model_folder.CARD).exists():
        raise ConfigError(
            f'{student} is neither a model folder, which has a {model_folder.CARD}, nor the '
            'workdir of a finished run, which has one in student/.'
        )
    card, variables = model_folder.load_model(folder)
    given = {'dataset': dataset, 'image_size': image_size}
    card |= {name: value for name, value in given.items() if value is not None}
    for name, flag in (('dataset', '--source_dataset=NAME'), ('image_size', '--image_size=PIXELS')):
        if name not in card:
            raise ConfigError(f"{folder} does not tell its network's {name}: give {flag}.")
    absent = [name for name in ('num_classes', 'channels') if name not in card]
    if absent:
        raise ConfigError(f'{folder / model_folder.CARD} lacks {" and ".join(absent)}.')
    return Network(card, variables, *_constants(folder, card, data_dir))


def _constants(
    folder: Path, card: dict[str, Any], data_dir: str | None
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and std of the images that a network was trained on, one value per channel."""
    spec, channels = data.spec_of(card['dataset']), card['channels']
    constants = (spec.mean, spec.std) if spec else None
    if 'mean' in card and 'std' in card:  # a student's folder tells
        return tuple(card['mean']), tuple(card['std'])
    # A run may have constants of its own: its config is here, or in the folder above.
    for path in (folder / 'config.json', folder.parent / 'config.json'):
        run = json.loads(path.read_text()).get('data', {}) if path.is_file() else {}
        if run.get('name') == card['dataset'] and run.get('mean') and run.get('std'):
            constants = run['mean'], run['std']
            break
    if constants is None:  # your own data set: they are stored with its images
        facts = data.check(data_settings(card['dataset'], card, data_dir))
        constants = facts.mean, facts.std
    mean, std = (tuple(values) * (channels // len(values)) for values in constants)
    return mean, std


def data_settings(
    dataset: str, card: dict[str, Any], data_dir: str | None, resize: str = 'resize'
) -> SimpleNamespace:
    """A config's group `data`: this data set at a network's size, in colour where it has colours.

    Its constants are the published ones.
    """
    spec = data.spec_of(dataset)
    if spec:
        classes, channels = spec.num_classes, spec.channels
    else:  # your own data set: its files tell
        known = dict(data.find(dataset, data_dir).info.features.items())
        classes = getattr(known.get('label'), 'num_classes', 0)
        channels = known['image'].shape[-1] if 'image' in known else 1
    return SimpleNamespace(
        name=dataset,
        data_dir=data_dir,
        num_classes=classes,
        image_size=card['image_size'],
        channels=max(channels, card['channels']),
        mean=None,
        std=None,
        resize=resize,
    )


# --- Its module and weights ----------------------------------------------------------------


def make_module(network: Network, num_classes: int) -> Any:
    """The network's module, with this number of classes, for images as it was trained on.

    Raises ConfigError for a name that is not a model, and where it cannot take such images.
    """
    card = network.card
    images: Any = SimpleNamespace(
        num_classes=num_classes,
        image_size=card['image_size'],
        channels=card['channels'],
    )
    return build.make_classifier(card['model'], images)


def renew_head(
    plan: sharding.Plan, module: Any, network: Network, key: Key, untrained: bool = False
) -> dict[str, Any]:
    """The network's weights in `module`, which may have other classes, with a new last layer.

    untrained: draw new weights everywhere.  The key is consumed.
    Raises ConfigError where the weights are not those of this architecture.
    """
    card = network.card
    image = jnp.zeros((1, card['image_size'], card['image_size'], card['channels']))

    def shapes(num_classes: int) -> dict[str, Any]:
        wide = module.clone(num_classes=num_classes)
        return model_folder.flatten(jax.eval_shape(wide.init, key, image))

    # The head is what changes its shape with the number of classes.
    mine, more = shapes(module.num_classes), shapes(module.num_classes + 1)
    head = {name for name in mine if mine[name].shape != more[name].shape}
    old = model_folder.flatten(network.variables)
    if any(name not in old or old[name].shape != mine[name].shape for name in mine.keys() - head):
        raise ConfigError(f'the weights of {card["model"]} are those of another architecture.')
    fresh = model_folder.flatten(plan.call(module.init)(key, image))
    kept = {} if untrained else {name: old[name] for name in mine.keys() - head}
    variables = model_folder.unflatten({name: kept.get(name, fresh[name]) for name in mine})
    return plan.replicate({'batch_stats': {}} | variables)


def maps(module: Any, variables: Any, images: Array, **options: Any) -> tuple[Any, list[jax.Array]]:
    """What `module.apply` returns, and the last map of each resolution, [B, h, w, C], finest first.

    Networks do not return their maps: they are taken from the layers that a network calls itself,
    its residual blocks for instance.  A map is the output of such a layer; where the network
    applies the activation afterwards, it is the map before the activation.
    """
    found: dict[tuple[int, ...], Array] = {}

    def tap(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        out = call(*args, **kwargs)
        first = out[0] if isinstance(out, tuple) else out  # blocks return their statistics too
        if len(context.module.path) == 1 and getattr(first, 'ndim', 0) == 4:
            found[first.shape[1:3]] = first
        return out

    with nn.intercept_methods(tap):
        out = module.apply(variables, images, **options)
    return out, [found[size] for size in sorted(found, reverse=True)]
