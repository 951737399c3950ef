"""Measures maps by semantic segmentation: a small FCN head, trained alone or with the network."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dfkd_jax import augment, contract, data, losses
from dfkd_jax.contract import Array, Key, Params
from dfkd_jax.data.image_folder import open_image
from dfkd_jax.distributed import sharding
from dfkd_jax.errors import ConfigError, DataError
from dfkd_jax.loops import supervised
from dfkd_jax.reporting import classes
from dfkd_jax.storage import files
from dfkd_jax.transfer import measurement
from dfkd_jax.transfer import network as networks
from dfkd_jax.transfer.measurement import Recipe
from dfkd_jax.transfer.network import Network

UNKNOWN = 255  # in a mask
BATCH = 100  # scenes at a time, where nothing is trained
RECIPE = Recipe(epochs=30)

Head = list[dict[str, Array]]  # a kernel [C, num_classes] and a bias for each map


class Scenes(NamedTuple):
    """Images and the class of each of their pixels."""

    images: np.ndarray  # [N, H, W, channels] uint8
    masks: np.ndarray  # [N, H, W] uint8; UNKNOWN where no class is known


def run(
    student: str | Path,
    scenes: str | Path,
    *,
    size: int = 64,
    stages: int = 3,
    frozen: bool = False,
    seed: int = 0,
    untrained: bool = False,
    recipe: Recipe = RECIPE,
    source_dataset: str | None = None,
    image_size: int | None = None,
    data_dir: str | None = None,
    output: str | Path | None = None,
) -> dict[str, Any]:
    """Trains a head, and the network unless `frozen`; returns the result, and writes it.

    size: the side that scenes are resized to, in pixels.
    stages: how many maps the head sees, the last ones.
    Raises ConfigError, DataError or CheckpointError, before anything is compiled.
    """
    measurement.check_output(output)
    measurement.check_recipe(recipe)
    if min(stages, size) < 1:
        raise ConfigError(f'stages={stages}, size={size}: expected 1 or more of each.')
    network = networks.load(student, source_dataset, image_size, data_dir)
    module = networks.make_module(network, network.card['num_classes'])
    train, test = (
        read(files.expanded(scenes) / part, size, network.card['channels'])
        for part in ('train', 'test')
    )
    measurement.check_batch(recipe, len(train.images), 'training scenes')
    num_classes = 1 + max(int(x[x != UNKNOWN].max(initial=0)) for x in (train.masks, test.masks))
    if num_classes < 2:
        raise DataError(f'the masks of {scenes} have no class but the background')

    plan = sharding.make('jit')
    key_init, key_steps = jax.random.split(jax.random.key(seed))
    head = start_head(module, network.variables, train.images[:1], stages, num_classes)
    variables = networks.renew_head(plan, module, network, key_init, untrained)
    started = time.monotonic()
    measured = segment(
        plan, module, variables, head, network, train, test, recipe, key_steps, seed, frozen
    )
    return measurement.write(
        output,
        network,
        student,
        protocol='segment',
        scenes=str(scenes),
        **measured,
        seconds=round(time.monotonic() - started, 2),
        seed=seed,
        untrained=untrained,
        frozen=frozen,
        stages=len(head),
        num_classes=num_classes,
        train_size=len(train.images),
        test_size=len(test.images),
        size=size,
    )


# --- Scenes --------------------------------------------------------------------------------


def read(folder: Path, size: int, channels: int) -> Scenes:
    """One split: images in the network's channels, both resized (masks to the nearest class).

    Raises DataError for a folder that is missing, empty, or lacks a mask.
    """
    from PIL import Image

    files = sorted(path for path in (folder / 'images').glob('*.*') if path.name[0] != '.')
    masks = [folder / 'masks' / f'{path.stem}.png' for path in files]
    missing = [path.name for path in masks if not path.is_file()]
    if not files or missing:
        what = f'lacks masks/{missing[0]}' if missing else 'has no images/'
        raise DataError(
            f'{folder} {what}: expected images/NAME.* and masks/NAME.png, in train/ and in test/'
        )

    def pixels(path: Path, mode: str, nearest: bool) -> np.ndarray:
        with open_image(path) as image:
            # A palette's numbers are the classes: its colours are for the eye.
            picture = image if nearest and image.mode == 'P' else image.convert(mode)
            how = Image.Resampling.NEAREST if nearest else Image.Resampling.BILINEAR
            return np.asarray(picture.resize((size, size), how))

    mode = 'L' if channels == 1 else 'RGB'
    images = np.stack([pixels(path, mode, nearest=False) for path in files])
    known = np.stack([pixels(path, 'L', nearest=True) for path in masks])
    return Scenes(images.reshape(*images.shape[:3], channels), known)


def shuffled(scenes: Scenes, batch_size: int, seed: int) -> Iterator[Scenes]:
    """Endless batches; every epoch has its own order and leaves out what fills no batch."""
    for epoch in itertools.count():
        order = np.random.default_rng((seed, epoch)).permutation(len(scenes.images))
        for i in range(0, len(order) - batch_size + 1, batch_size):
            chosen = order[i : i + batch_size]
            yield Scenes(scenes.images[chosen], scenes.masks[chosen])


def batches(scenes: Scenes) -> Iterator[Scenes]:
    """One pass in batches of one shape; the last is filled up with images without masks."""
    for i in range(0, len(scenes.images), BATCH):
        images = scenes.images[i : i + BATCH]
        missing = BATCH - len(images)
        images = np.pad(images, ((0, missing), (0, 0), (0, 0), (0, 0)))
        yield Scenes(images, scenes.masks[i : i + BATCH])


# --- The head ------------------------------------------------------------------------------


def start_head(
    module: Any, variables: Any, image: np.ndarray, stages: int, num_classes: int
) -> Head:
    """A head of zeros, for the last `stages` maps of a network.

    Raises ConfigError where the network takes no image of that size.
    """
    try:
        found = jax.eval_shape(
            lambda x: networks.maps(module, variables, x)[1],
            jax.ShapeDtypeStruct(image.shape, jnp.float32),
        )
    except ValueError as error:  # LeNet-5, say, takes one size alone
        raise ConfigError(f'{error}: give another --size, or another network.') from error
    widths = [stage.shape[-1] for stage in found[-stages:]]
    return [
        {'kernel': jnp.zeros((width, num_classes)), 'bias': jnp.zeros(num_classes)}
        for width in widths
    ]


def scores(head: Head, stages: list[jax.Array], size: tuple) -> Array:
    """Class scores of pixels, [B, *size, num_classes]: of each stage, enlarged, summed."""
    total: Any = 0.0
    for layer, stage in zip(head, stages[-len(head) :], strict=True):
        # The scale of maps differs by network and stage, and one learning rate serves them all.
        norm = jax.lax.rsqrt(jnp.mean(jnp.square(stage), (1, 2, 3), keepdims=True) + 1e-6)
        y = (stage * norm) @ layer['kernel'] + layer['bias'].reshape(1, 1, 1, -1)
        total += jax.image.resize(y, (y.shape[0], *size, y.shape[-1]), 'bilinear')
    return total


# --- Training and measuring ----------------------------------------------------------------


def segment(
    plan: sharding.Plan,
    module: Any,
    variables: dict[str, Any],
    head: Head,
    network: Network,
    train: Scenes,
    test: Scenes,
    recipe: Recipe,
    key: Key,
    seed: int,
    frozen: bool = False,
) -> dict[str, Any]:
    """Trains on scenes and their mirror images; returns `measure`, the recipe and the ``losses``.

    key: of mirroring; it is consumed.  seed: of the batches.
    frozen: train the head alone, on maps as evaluation sees them.
    Raises NonFiniteError where the loss is not finite.
    """
    epoch_steps = len(train.images) // recipe.batch_size
    tx = supervised.optimiser(recipe, epoch_steps)
    step = plan.compile(make_step(module, tx, network, frozen))
    params = {'head': head} if frozen else {'head': head, 'network': variables['params']}
    state = measurement.start(plan, params, variables.get('batch_stats', {}), tx)
    inputs = ((*scenes, key) for scenes in shuffled(train, recipe.batch_size, seed))

    state, history = measurement.train(step, variables, state, inputs, recipe, epoch_steps)
    weights = state.net.params.get('network', variables['params'])
    whole = {'params': weights, 'batch_stats': state.net.batch_stats}
    found = measure(plan, module, network, whole, state.net.params['head'], test)
    return found | {'recipe': recipe._asdict(), 'losses': [row['loss'] for row in history]}


def make_step(module: Any, tx: Any, network: Network, frozen: bool) -> Callable:
    """One update: ``(variables, state, (images [B, H, W, C], masks [B, H, W], key))``.

    The loss is the cross entropy of the pixels whose class is known.
    """

    def step(variables: Any, state: supervised.State, inputs: Any) -> tuple[supervised.State, dict]:
        images, masks, key = inputs
        mirrored = augment.draw_flip(jax.random.fold_in(key, state.step), images.shape[0])
        x = augment.flip(data.normalise(images, network.mean, network.std), mirrored)
        target = augment.flip(masks[..., None], mirrored)[..., 0]
        known = target != UNKNOWN

        def loss_fn(params: Params) -> tuple[Array, Any]:
            if frozen:
                _, stages = networks.maps(module, variables, x)
                batch_stats = state.net.batch_stats
            else:
                whole = {'params': params['network'], 'batch_stats': state.net.batch_stats}
                (_, mutated), stages = networks.maps(
                    module, whole, x, train=True, mutable=['batch_stats']
                )
                batch_stats = mutated.get('batch_stats', {})
            logits = scores(params['head'], stages, target.shape[1:])
            label = jnp.where(known, target, 0).astype(jnp.int32)
            each = jnp.where(known, losses.cross_entropy(logits, label), 0.0)
            pixels = jnp.maximum(jnp.sum(known), 1).astype(jnp.float32)
            return jnp.sum(each) / pixels, batch_stats

        grads_of = jax.value_and_grad(loss_fn, has_aux=True)
        (loss, batch_stats), grads = grads_of(state.net.params)
        net = contract.update(state.net, grads, tx, batch_stats)
        return supervised.State(state.step + 1, net), {'loss': loss}

    return step


def measure(
    plan: sharding.Plan, module: Any, network: Network, variables: Any, head: Head, test: Scenes
) -> dict[str, Any]:
    """``miou``, ``iou`` of each class and ``pixel_accuracy`` on scenes, all in per cent."""
    num_classes, size = head[0]['bias'].size, test.images.shape[1:3]

    def predict(weights: Any, images: Array) -> Array:
        x = data.normalise(images, network.mean, network.std)
        _, stages = networks.maps(module, weights['network'], x)
        return jnp.argmax(scores(weights['head'], stages, size), -1).astype(jnp.uint8)

    compiled, weights = plan.predict(predict), {'head': head, 'network': variables}
    counts = np.zeros((num_classes, num_classes), np.int64)
    for images, masks in batches(test):
        predicted = np.asarray(compiled(weights, images))[: len(masks)]
        counts += confusion(predicted, masks, num_classes)
    each = iou(counts)
    return {
        'miou': float(np.nanmean(each)),
        'iou': each.tolist(),
        'pixel_accuracy': 100 * float(np.trace(counts) / counts.sum()),
    }


def confusion(predicted: np.ndarray, masks: np.ndarray, num_classes: int) -> np.ndarray:
    """Counts of pixels, [true class, predicted class], where the true class is known."""
    known = masks != UNKNOWN
    return classes.confusion(predicted[known], masks[known], num_classes)


def iou(counts: np.ndarray) -> np.ndarray:
    """Intersection over union of each class, per cent; nan for a class without any pixel."""
    both = np.diag(counts)
    either = counts.sum(0) + counts.sum(1) - both
    return np.where(either > 0, 100 * both / np.maximum(either, 1), np.nan)
