"""Measures features on the images of a data set: by a linear probe, or by fine-tuning."""

from __future__ import annotations

import importlib.metadata
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dfkd_jax import data, evaluate
from dfkd_jax.contract import Array, Key
from dfkd_jax.distributed import sharding
from dfkd_jax.errors import ConfigError, DataError
from dfkd_jax.loops import supervised
from dfkd_jax.transfer import measurement
from dfkd_jax.transfer import network as networks
from dfkd_jax.transfer.measurement import Recipe
from dfkd_jax.transfer.network import Network

PROTOCOLS = ('probe', 'finetune')
STRENGTHS = tuple(10.0**power for power in range(-3, 3))  # C of the probe, the strictest first
VALIDATION = 0.1  # of the training images, to choose C on
BATCH = 500  # images at a time, where nothing is trained
RECIPE = Recipe()


class Images(NamedTuple):
    """A data set as a network sees it."""

    facts: data.Facts
    train: data.Dataset
    test: data.Dataset


def run(
    student: str | Path,
    dataset: str,
    protocol: str,
    *,
    data_dir: str | None = None,
    resize: str = 'resize',
    seed: int = 0,
    untrained: bool = False,
    pooled: bool = False,
    recipe: Recipe = RECIPE,
    source_dataset: str | None = None,
    image_size: int | None = None,
    output: str | Path | None = None,
) -> dict[str, Any]:
    """Measures one network on one data set by one protocol; returns the result, and writes it.

    pooled: with `probe`, the pooled maps of all stages beside the penultimate features.
    recipe: of `finetune`.
    source_dataset, image_size: of a ported network, whose folder does not tell them.
    Raises ConfigError, DataError or CheckpointError, before anything is compiled.
    """
    if protocol not in PROTOCOLS:
        raise ConfigError(f'unknown protocol {protocol!r}; expected one of {", ".join(PROTOCOLS)}.')
    measurement.check_output(output)
    network = networks.load(student, source_dataset, image_size, data_dir)
    settings = settings_of(dataset, network, data_dir, resize)
    facts = data.check(settings, ('train', 'test'))
    module = networks.make_module(network, settings.num_classes)
    if protocol == 'finetune':
        measurement.check_recipe(recipe)
        measurement.check_batch(recipe, facts.train_size, f'training images of {dataset}')

    plan = sharding.make('jit')
    key_init, key_steps = jax.random.split(jax.random.key(seed))
    variables = networks.renew_head(plan, module, network, key_init, untrained)
    images = read(settings, network, facts)
    started = time.monotonic()
    if protocol == 'probe':
        measured = _probe_features(plan, module, variables, images, pooled, seed)
    else:
        measured = finetune(plan, module, variables, images, recipe, key_steps, seed)
    return measurement.write(
        output,
        network,
        student,
        protocol=protocol,
        dataset=dataset,
        **measured,
        seconds=round(time.monotonic() - started, 2),
        seed=seed,
        untrained=untrained,
        num_classes=facts.num_classes,
        train_size=images.train.size,
        test_size=images.test.size,
        image_shape=images.facts.image_shape,
        resize=resize,
        colours_to_luma=network.card['channels'] < settings.channels,
        versions={'scikit-learn': importlib.metadata.version('scikit-learn')},
    )


# --- The images ----------------------------------------------------------------------------


def settings_of(
    dataset: str, network: Network, data_dir: str | None = None, resize: str = 'resize'
) -> SimpleNamespace:
    """A config's group `data` for images as a network takes them, with the network's constants.

    Images in colour stay so, even for a grey network: `read` turns them to luma.
    Raises ConfigError for a network that sees neither grey nor colour, and DataError for an unknown
    data set.
    """
    channels = network.card['channels']
    if channels not in (1, 3):
        raise ConfigError(
            f'the images of {dataset} cannot be brought to the {channels} channels of this '
            'network: expected 1 (grey) or 3 (colour).'
        )
    settings = networks.data_settings(dataset, network.card, data_dir, resize)
    settings.mean, settings.std = network.mean, network.std
    return settings


def read(settings: Any, network: Network, facts: data.Facts) -> Images:
    """Both splits of a data set, in the network's channels and with its constants."""
    size, channels = network.card['image_size'], network.card['channels']
    seen = facts._replace(image_shape=(size, size, channels), mean=network.mean, std=network.std)

    def split(name: str) -> data.Dataset:
        whole = data.load(settings, name)
        if channels == settings.channels:
            return whole._replace(facts=seen)

        def fetch(indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            images, labels = whole.fetch(indices)
            return luma(images), labels

        return data.Dataset(seen, whole.size, fetch, None, None)

    return Images(seen, split('train'), split('test'))


def luma(images: np.ndarray) -> np.ndarray:
    """Colours to grey, uint8 [..., 3] to [..., 1], as Pillow's mode 'L' (ITU-R BT.601)."""
    red, green, blue = (images[..., i].astype(np.uint32) for i in range(3))
    grey = (19595 * red + 38470 * green + 7471 * blue + 2**15) >> 16
    return grey.astype(np.uint8)[..., None]


# --- A linear probe ------------------------------------------------------------------------


def _probe_features(
    plan: sharding.Plan, module: Any, variables: Any, images: Images, pooled: bool, seed: int
) -> dict[str, Any]:
    """`probe` of the network's features on the images."""
    train, test = (
        features_of(plan, module, variables, split, pooled) for split in (images.train, images.test)
    )
    names = 'penultimate and pooled' if pooled else 'penultimate'
    return probe(train, test, seed) | {'features': names}


def features_of(
    plan: sharding.Plan, module: Any, variables: Any, dataset: data.Dataset, pooled: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """`features` and labels of a whole split, in stored order: [N, F] float32 and [N] int32."""

    def extract(variables: Any, images: Array) -> Array:
        return features(module, variables, images, pooled)

    return evaluate.over(plan, extract, dataset.facts)(variables, dataset, BATCH)


def features(module: Any, variables: Any, images: Array, pooled: bool = False) -> Array:
    """The penultimate features of normalised images [B, H, W, channels]: [B, F] float32.

    pooled: followed by the spatial means of the maps of all stages.
    """
    out, stages = networks.maps(module, variables, images)
    if not pooled:
        return out.features
    means = [jnp.mean(stage.astype(jnp.float32), (1, 2)) for stage in stages]
    return jnp.concatenate([out.features, *means], axis=-1)


def probe(
    train: tuple[np.ndarray, np.ndarray],
    test: tuple[np.ndarray, np.ndarray],
    seed: int,
    strengths: Sequence[float] = STRENGTHS,
) -> dict[str, Any]:
    """Logistic regression on standardised features [N, F] with labels [N].

    C is chosen on a tenth of the training images, stratified; then the regression is fitted to all
    of them.  Returns ``accuracy`` (per cent of the test images), ``validation_accuracy``, ``C`` and
    ``feature_size``.  Raises DataError where a class has too few training images.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import train_test_split
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    from threadpoolctl import threadpool_limits

    (x, y), (x_test, y_test) = train, test
    classes, counts = np.unique(y, return_counts=True)
    if len(classes) < 2 or counts.min() < 2:
        raise DataError(
            f'a probe needs two classes and two training images of each; the fewest are '
            f'{counts.min()}, of {len(classes)} classes'
        )
    held_out = max(len(classes), round(VALIDATION * len(y)))
    x_fit, x_held, y_fit, y_held = train_test_split(
        x, y, test_size=held_out, stratify=y, random_state=seed
    )

    def fit(strength: float, x: np.ndarray, y: np.ndarray) -> Any:
        regression = LogisticRegression(C=strength, max_iter=1000)
        # One thread: on busy cores, products this small take much longer with two.
        with threadpool_limits(1), warnings.catch_warnings():
            # Stopping early regularises too, and validation judges it.
            warnings.simplefilter('ignore', ConvergenceWarning)
            return make_pipeline(StandardScaler(), regression).fit(x, y)

    scores = [100 * fit(c, x_fit, y_fit).score(x_held, y_held) for c in strengths]
    best = int(np.argmax(scores))  # the strictest of equals
    return {
        'accuracy': 100 * float(fit(strengths[best], x, y).score(x_test, y_test)),
        'validation_accuracy': float(scores[best]),
        'C': strengths[best],
        'feature_size': x.shape[1],
    }


# --- Fine-tuning ---------------------------------------------------------------------------


def finetune(
    plan: sharding.Plan,
    module: Any,
    variables: dict[str, Any],
    images: Images,
    recipe: Recipe,
    key: Key,
    seed: int,
) -> dict[str, Any]:
    """Trains all weights on the training images, as `dfkd_jax.teach` does.

    key: of crops and flips; it is consumed.  seed: of the batches.
    Returns ``accuracy`` and ``best_accuracy`` (per cent of the test images, after the last and the
    best epoch), the recipe and ``history`` (training loss and test accuracy of each epoch).
    Raises NonFiniteError where the loss is not finite.
    """
    facts, train, test = images
    flip = facts.flip if recipe.flip is None else recipe.flip
    padding = facts.padding if recipe.crop_padding is None else recipe.crop_padding
    recipe = recipe._replace(flip=flip, crop_padding=padding)
    epoch_steps = train.size // recipe.batch_size
    tx = supervised.optimiser(recipe, epoch_steps)
    step = plan.compile_rows(supervised.make_step(module, None, tx, recipe, facts, plan.shards))
    classify = evaluate.classifier(plan, module, facts)
    state = measurement.start(plan, variables['params'], variables.get('batch_stats', {}), tx)
    batches = train.shuffled(recipe.batch_size, seed, rows=plan.rows(recipe.batch_size))
    inputs = (((batch.image, batch.label), key) for batch in batches)

    def measure(state: supervised.State) -> dict[str, float]:
        predicted, label = classify(state.net.variables, test, BATCH)
        return {'test_accuracy': evaluate.accuracy(predicted, label)}

    _, history = measurement.train(step, {}, state, inputs, recipe, epoch_steps, measure)
    return {
        'accuracy': history[-1]['test_accuracy'],
        'best_accuracy': max(row['test_accuracy'] for row in history),
        'recipe': recipe._asdict(),
        'history': history,
    }
