"""What a network's maps are worth for semantic segmentation: a small FCN head, trained with it.

    python -m dfkd_jax.transfer_dense --student=FOLDER --scenes=FOLDER [--untrained] [--frozen]
        [--seed=0] [--output=FILE.json] ...

--student is as in `dfkd_jax.transfer`.  --scenes holds ``train`` and ``test``, each with
``images/NAME.*`` and ``masks/NAME.png`` of the same size: a class for each pixel, 0 the background,
255 where none is known.  ADE20K's and NYUv2's folders have this form, renamed.

The head is that of Long et al. (2015): class scores by a 1x1 convolution of the last map, enlarged
to the image; with --stages, of the maps before it too, summed.  Networks are convolutional, so
scenes may be larger than the images they were trained on.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dfkd_jax import augment, contract, data, losses
from dfkd_jax.contract import Array, Key, Params
from dfkd_jax.distributed import sharding
from dfkd_jax.errors import ConfigError, DataError, NonFiniteError
from dfkd_jax.loops import supervised
from dfkd_jax.storage import files
from dfkd_jax.storage import workdir as folders
from dfkd_jax.transfer import classification

UNKNOWN = 255  # in a mask
BATCH = 100  # scenes at a time, where nothing is trained


class Scenes(NamedTuple):
    """Images and the class of each of their pixels."""

    images: np.ndarray  # [N, H, W, channels] uint8
    masks: np.ndarray  # [N, H, W] uint8


def run(
    student: str | Path,
    scenes: str | Path,
    *,
    size: int = 64,
    stages: int = 3,
    frozen: bool = False,
    seed: int = 0,
    untrained: bool = False,
    recipe: classification.Recipe | None = None,
    source_dataset: str | None = None,
    image_size: int | None = None,
    data_dir: str | None = None,
    output: str | Path | None = None,
) -> dict[str, Any]:
    """Trains a head, and the network unless `frozen`; returns, and writes, the result.

    size: pixels that scenes are brought to.
    stages: how many maps the head sees, the last ones.
    Raises ConfigError, DataError or CheckpointError, before anything is compiled.
    """
    recipe = recipe or classification.Recipe(epochs=30)
    if output and Path(output).exists():
        raise ConfigError(f'{output} is there already: remove it, or give another --output.')
    if min(stages, size, recipe.epochs, recipe.batch_size) < 1:
        raise ConfigError(
            f'stages={stages}, size={size}, epochs={recipe.epochs}, '
            f'batch_size={recipe.batch_size}: expected 1 or more of each.'
        )
    network = classification.load(student, source_dataset, image_size, data_dir)
    module = classification.module_of(network, network.facts['num_classes'])
    channels = network.facts['channels']
    train, test = (read(Path(scenes) / part, size, channels) for part in ('train', 'test'))
    if len(train.images) < recipe.batch_size:
        raise ConfigError(
            f'a batch of {recipe.batch_size} is larger than the {len(train.images)} training '
            f'scenes: lower --batch_size.'
        )
    num_classes = 1 + max(
        int(part.masks[part.masks != UNKNOWN].max(initial=0)) for part in (train, test)
    )
    if num_classes < 2:
        raise DataError(f'the masks of {scenes} know no class but the background')

    plan = sharding.make('jit')
    key_init, key_steps = jax.random.split(jax.random.key(seed))
    head = start_head(module, network.variables, train.images[:1], stages, num_classes)
    variables = classification.renew_head(plan, module, network, key_init, untrained)
    started = time.monotonic()
    measured = segment(
        plan, module, variables, head, network, train, test, recipe, key_steps, seed, frozen
    )
    result = {
        'protocol': 'segment',
        'scenes': str(scenes),
        'miou': measured.pop('miou'),
        **measured,
        'seconds': round(time.monotonic() - started, 2),
        'seed': seed,
        'untrained': untrained,
        'frozen': frozen,
        'stages': len(head),
        'source': str(student),
        'source_dataset': network.facts['dataset'],
        'source_accuracy': network.facts.get('accuracy'),
        **{name: network.facts.get(name) for name in ('model', 'role', 'variables_sha256')},
        'num_classes': num_classes,
        'train_size': len(train.images),
        'test_size': len(test.images),
        'size': size,
        'versions': folders.versions(),
        'device': folders.device(),
    }
    if output:
        files.write_json(output, result)
    return result


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
        try:
            with Image.open(path) as image:
                # A palette's numbers are the classes: its colours are for the eye.
                picture = image if nearest and image.mode == 'P' else image.convert(mode)
                how = Image.Resampling.NEAREST if nearest else Image.Resampling.BILINEAR
                return np.asarray(picture.resize((size, size), how))
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise DataError(f'{path} is not an image that Pillow reads ({error})') from error

    mode = 'L' if channels == 1 else 'RGB'
    images = np.stack([pixels(path, mode, nearest=False) for path in files])
    classes = np.stack([pixels(path, 'L', nearest=True) for path in masks])
    return Scenes(images.reshape(*images.shape[:3], channels), classes)


def start_head(
    module: Any, variables: Any, image: np.ndarray, stages: int, num_classes: int
) -> list[dict[str, Array]]:
    """Zero scores: a kernel [C, num_classes] and a bias for each of the last `stages` maps.

    Raises ConfigError where the network takes no image of that size.
    """
    try:
        found = jax.eval_shape(
            lambda x: classification.maps(module, variables, x)[1],
            jax.ShapeDtypeStruct(image.shape, jnp.float32),
        )
    except ValueError as error:  # LeNet-5, say, takes one size alone
        raise ConfigError(f'{error}: give another --size, or another network.') from error
    widths = [stage.shape[-1] for stage in found[-stages:]]
    return [
        {'kernel': jnp.zeros((width, num_classes)), 'bias': jnp.zeros(num_classes)}
        for width in widths
    ]


def scores(head: list[dict[str, Array]], stages: list[jax.Array], size: tuple) -> Array:
    """Class scores of pixels, [B, *size, num_classes]: of each stage, enlarged, summed."""
    total: Any = 0.0
    for layer, stage in zip(head, stages[-len(head) :], strict=True):
        # The scale of maps differs by network and stage, and one learning rate serves them all.
        norm = jax.lax.rsqrt(jnp.mean(jnp.square(stage), (1, 2, 3), keepdims=True) + 1e-6)
        y = (stage * norm) @ layer['kernel'] + layer['bias'].reshape(1, 1, 1, -1)
        total += jax.image.resize(y, (y.shape[0], *size, y.shape[-1]), 'bilinear')
    return total


def segment(
    plan: sharding.Plan,
    module: Any,
    variables: dict[str, Any],
    head: list[dict[str, Array]],
    network: classification.Network,
    train: Scenes,
    test: Scenes,
    recipe: classification.Recipe,
    key: Key,
    seed: int,
    frozen: bool = False,
) -> dict[str, Any]:
    """Trains on mirrored scenes; returns ``miou``, ``iou`` of each class, ``pixel_accuracy``, ...

    frozen: the head alone, on maps as evaluation sees them.  The key is consumed.
    """
    epoch_steps = len(train.images) // recipe.batch_size
    tx = supervised.optimiser(recipe, epoch_steps)
    size = train.images.shape[1:3]
    step = plan.compile(make_step(module, tx, network, frozen))
    num_classes = head[0]['bias'].size

    def predict(state_params: Any, images: Array) -> Array:
        x = data.normalise(images, network.mean, network.std)
        _, stages = classification.maps(module, state_params['network'], x)
        return jnp.argmax(scores(state_params['head'], stages, size), -1).astype(jnp.uint8)

    compiled = plan.predict(predict)
    batch_stats = variables.get('batch_stats', {})
    params = {'head': head} if frozen else {'head': head, 'network': variables['params']}
    # Copies: a step donates its state, and the caller keeps the weights it gave.
    params, batch_stats = jax.tree.map(jnp.array, (params, batch_stats))
    net = contract.start(params, batch_stats, tx)
    state = plan.replicate(supervised.State(jnp.zeros((), jnp.int32), net))
    history = []
    for epoch in range(recipe.epochs):
        order = np.random.default_rng((seed, epoch)).permutation(len(train.images))
        rows = []
        for i in range(epoch_steps):
            chosen = order[i * recipe.batch_size : (i + 1) * recipe.batch_size]
            batch = (train.images[chosen], train.masks[chosen], key)
            state, row = step(variables, state, batch)
            rows.append(row['loss'])
        loss = float(np.mean(jax.device_get(rows)))
        if not np.isfinite(loss):
            raise NonFiniteError(f'loss is {loss} in epoch {epoch + 1}: lower --lr.')
        history.append(loss)
    trained = state.net.params.get('network', variables['params'])
    whole = {'params': trained, 'batch_stats': state.net.batch_stats}
    answer = {'head': state.net.params['head'], 'network': whole}
    counts = np.zeros((num_classes, num_classes), np.int64)
    for images, masks in _batches(test):
        predicted = np.asarray(compiled(answer, images))[: len(masks)]
        counts += confusion(predicted, masks, num_classes)
    each = iou(counts)
    return {
        'miou': float(np.nanmean(each)),
        'iou': each.tolist(),
        'pixel_accuracy': 100 * float(np.trace(counts) / counts.sum()),
        'recipe': recipe._asdict(),
        'losses': history,
    }


def make_step(module: Any, tx: Any, network: classification.Network, frozen: bool) -> Callable:
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
                _, stages = classification.maps(module, variables, x)
                batch_stats = state.net.batch_stats
            else:
                whole = {'params': params['network'], 'batch_stats': state.net.batch_stats}
                (_, mutated), stages = classification.maps(
                    module, whole, x, train=True, mutable=['batch_stats']
                )
                batch_stats = mutated.get('batch_stats', {})
            logits = scores(params['head'], stages, target.shape[1:])
            label = jnp.where(known, target, 0).astype(jnp.int32)
            each = jnp.where(known, losses.cross_entropy(logits, label), 0.0)
            return jnp.sum(each) / jnp.maximum(jnp.sum(known), 1), batch_stats

        grads_of = jax.value_and_grad(loss_fn, has_aux=True)
        (loss, batch_stats), grads = grads_of(state.net.params)
        net = contract.update(state.net, grads, tx, batch_stats)
        return supervised.State(state.step + 1, net), {'loss': loss}

    return step


def _batches(scenes: Scenes) -> Any:
    """Batches of one shape; the last is filled up with images whose masks are not there."""
    for i in range(0, len(scenes.images), BATCH):
        images = scenes.images[i : i + BATCH]
        missing = BATCH - len(images)
        yield np.pad(images, ((0, missing), (0, 0), (0, 0), (0, 0))), scenes.masks[i : i + BATCH]


def confusion(predicted: np.ndarray, masks: np.ndarray, num_classes: int) -> np.ndarray:
    """Pixels of each class (row) that were given each class (column), where one is known."""
    known = masks != UNKNOWN
    pairs = masks[known].astype(np.int64) * num_classes + predicted[known]
    return np.bincount(pairs, minlength=num_classes**2).reshape(num_classes, num_classes)


def iou(counts: np.ndarray) -> np.ndarray:
    """Intersection over union of each class, per cent; nan for a class that nobody named."""
    both = np.diag(counts)
    either = counts.sum(0) + counts.sum(1) - both
    return np.where(either > 0, 100 * both / np.maximum(either, 1), np.nan)
