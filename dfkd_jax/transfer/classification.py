"""What a network's features are worth on other images: a linear probe, or fine-tuning.

    python -m dfkd_jax.transfer --student=FOLDER --dataset=NAME --protocol=probe|finetune
        [--untrained] [--seed=0] [--output=FILE.json] [--data_dir=DIR] ...

FOLDER is a run's workdir, whose student is taken, or any model folder: a teacher, or a student that
`dfkd_jax.teach` trained.  NAME is a data set that `dfkd_jax.data` reads.  --untrained keeps the
architecture and draws new weights, the control of every table.

Images come at the network's size and in its channels (colours become luma for a grey network), and
are normalised with the constants of the images that the network was trained on: those of the other
set would shift the scale of everything behind the frozen first layer.
"""

from __future__ import annotations

# Arguments, not flags: as in `data` and `port`, there is no config here.
import json
import time
import warnings
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from dfkd_jax import build, contract, data, evaluate
from dfkd_jax.contract import Array, Key
from dfkd_jax.distributed import sharding
from dfkd_jax.errors import ConfigError, DataError, NonFiniteError
from dfkd_jax.loops import supervised
from dfkd_jax.storage import files, model_folder
from dfkd_jax.storage import workdir as folders

PROTOCOLS = ('probe', 'finetune')
STRENGTHS = tuple(10.0**power for power in range(-3, 3))  # C of the probe, the strictest first
VALIDATION = 0.1  # of the training images, to choose C on
BATCH = 500  # images at a time, where nothing is trained


class Network(NamedTuple):
    """A trained classifier, and how images are brought to it."""

    facts: dict[str, Any]  # of its model.json; image_size and dataset are there
    variables: dict[str, Any]
    mean: tuple[float, ...]  # [channels], of images in [0, 1]
    std: tuple[float, ...]


class Images(NamedTuple):
    """A data set as a network sees it."""

    facts: data.Facts
    train: data.Dataset
    test: data.Dataset


class Recipe(NamedTuple):
    """Fine-tuning: SGD and one cosine to zero, with the names of a config's `teach` group.

    crop_padding, flip: None for what suits the data set.
    """

    epochs: int = 20
    batch_size: int = 64
    lr: float = 0.02
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 5e-4
    warmup_epochs: float = 0.0
    final_lr: float = 0.0
    milestones: tuple[int, ...] = ()
    random_resized_crop: bool = False
    shade: float = 0.0
    cutmix: float = 0.0
    crop_padding: int | None = None
    flip: bool | None = None


# --- Protocols -----------------------------------------------------------------------------


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
    recipe: Recipe | None = None,
    source_dataset: str | None = None,
    image_size: int | None = None,
    output: str | Path | None = None,
) -> dict[str, Any]:
    """Measures one network on one data set by one protocol; returns, and writes, the result.

    pooled: with `probe`, the pooled maps of all stages beside the penultimate features.
    source_dataset, image_size: of a ported network, whose folder does not tell them.
    Raises ConfigError, DataError or CheckpointError, before anything is compiled.
    """
    recipe = recipe or Recipe()
    if protocol not in PROTOCOLS:
        raise ConfigError(f'unknown protocol {protocol!r}; expected one of {", ".join(PROTOCOLS)}.')
    if output and Path(output).exists():
        raise ConfigError(f'{output} is there already: remove it, or give another --output.')
    network = load(student, source_dataset, image_size, data_dir)
    settings = settings_of(dataset, network, data_dir, resize)
    facts = data.check(settings)
    module = module_of(network, settings.num_classes)
    if protocol == 'finetune' and min(recipe.epochs, recipe.batch_size) < 1:
        raise ConfigError(
            f'{recipe.epochs} epochs of batches of {recipe.batch_size}: expected 1 or more.'
        )
    if protocol == 'finetune' and facts.train_size < recipe.batch_size:
        raise ConfigError(
            f'a batch of {recipe.batch_size} images is larger than the {facts.train_size} training '
            f'images of {dataset}: lower --batch_size.'
        )

    plan = sharding.make('jit')
    key_init, key_steps = jax.random.split(jax.random.key(seed))
    variables = renew_head(plan, module, network, key_init, untrained)
    images = read(settings, network, facts)
    started = time.monotonic()
    if protocol == 'probe':
        measured = probe(
            features_of(plan, module, variables, images.train, pooled),
            features_of(plan, module, variables, images.test, pooled),
            seed,
        )
        measured |= {'features': 'penultimate and pooled' if pooled else 'penultimate'}
    else:
        measured = finetune(plan, module, variables, images, recipe, key_steps, seed)
    result = {
        'protocol': protocol,
        'dataset': dataset,
        'accuracy': measured.pop('accuracy'),
        **measured,
        'seconds': round(time.monotonic() - started, 2),
        'seed': seed,
        'untrained': untrained,
        'source': str(student),
        'source_dataset': network.facts['dataset'],
        **{name: network.facts.get(name) for name in ('model', 'role', 'variables_sha256')},
        'source_accuracy': network.facts.get('accuracy'),
        'num_classes': facts.num_classes,
        'train_size': images.train.size,
        'test_size': images.test.size,
        'image_shape': images.facts.image_shape,
        'resize': resize,
        'colours_to_luma': network.facts['channels'] < settings.channels,
        'versions': folders.versions() | {'scikit-learn': metadata.version('scikit-learn')},
        'device': folders.device(),
    }
    if output:
        files.write_json(output, result)
    return result


def probe(
    train: tuple[np.ndarray, np.ndarray],
    test: tuple[np.ndarray, np.ndarray],
    seed: int,
    strengths: Sequence[float] = STRENGTHS,
) -> dict[str, Any]:
    """Logistic regression on standardised features [N, F] with labels [N].

    C is chosen on a tenth of the training images, stratified, and the regression then fitted to all
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
            # Stopped early is one more regularisation, and validated as such.
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


def finetune(
    plan: sharding.Plan,
    module: Any,
    variables: dict[str, Any],
    images: Images,
    recipe: Recipe,
    key: Key,
    seed: int,
) -> dict[str, Any]:
    """Trains all weights on the training images, as `teach` does.

    seed: of the batches; the key is that of crops and flips, and is consumed.
    Returns ``accuracy`` and ``best_accuracy`` (per cent of the test images, after the last and the
    best epoch), the recipe and ``history`` (training loss and test accuracy of each epoch).
    Raises NonFiniteError where the loss is.
    """
    facts, train, test = images
    flip = facts.flip if recipe.flip is None else recipe.flip
    padding = facts.padding if recipe.crop_padding is None else recipe.crop_padding
    recipe = recipe._replace(flip=flip, crop_padding=padding)
    epoch_steps = train.size // recipe.batch_size
    tx = supervised.optimiser(recipe, epoch_steps)
    step = plan.compile_rows(supervised.make_step(module, None, tx, recipe, facts, plan.shards))
    classify = evaluate.classifier(plan, module, facts)

    # Copies: a step donates its state, and the caller keeps the weights it gave.
    params, batch_stats = jax.tree.map(
        jnp.array, (variables['params'], variables.get('batch_stats', {}))
    )
    net = contract.start(params, batch_stats, tx)
    state = plan.replicate(supervised.State(jnp.zeros((), jnp.int32), net))
    batches = train.shuffled(recipe.batch_size, seed, rows=plan.rows(recipe.batch_size))
    history = []
    for epoch in range(1, recipe.epochs + 1):
        rows = []
        # The range first: zip must not draw the batch after the last.
        for _, batch in zip(range(epoch_steps), batches, strict=False):
            state, row = step({}, state, ((batch.image, batch.label), key))
            rows.append(row['loss'])
        loss = float(np.mean(jax.device_get(rows)))
        if not np.isfinite(loss):
            raise NonFiniteError(f'loss is {loss} in epoch {epoch}: lower --lr.')
        predicted, label = classify(state.net.variables, test, BATCH)
        history.append({'loss': loss, 'test_accuracy': evaluate.accuracy(predicted, label)})
    return {
        'accuracy': history[-1]['test_accuracy'],
        'best_accuracy': max(row['test_accuracy'] for row in history),
        'recipe': recipe._asdict(),
        'history': history,
    }


# --- Features ------------------------------------------------------------------------------


def features(module: Any, variables: Any, images: Array, pooled: bool = False) -> Array:
    """The penultimate features of normalised images [B, H, W, channels]: [B, F] float32.

    pooled: followed by the spatial means of `maps`, which lets a probe read earlier stages.
    """
    out, stages = maps(module, variables, images)
    if not pooled:
        return out.features
    means = [jnp.mean(stage.astype(jnp.float32), (1, 2)) for stage in stages]
    return jnp.concatenate([out.features, *means], axis=-1)


def maps(module: Any, variables: Any, images: Array, **options: Any) -> tuple[Any, list[jax.Array]]:
    """What `module.apply` returns, and the last map of each resolution, [B, h, w, C], finest first.

    Networks do not return their maps: they are taken from the layers that a network calls itself,
    its residual blocks for instance.  A map is what a layer returned: where the network applies the
    activation, before it.
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


def features_of(
    plan: sharding.Plan, module: Any, variables: Any, dataset: data.Dataset, pooled: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """`features` and labels of a whole split, in stored order: [N, F] float32 and [N] int32."""

    def extract(variables: Any, images: Array) -> Array:
        return features(module, variables, images, pooled)

    return evaluate.over(plan, extract, dataset.facts)(variables, dataset, BATCH)


# --- The network ---------------------------------------------------------------------------


def load(
    student: str | Path,
    dataset: str | None = None,
    image_size: int | None = None,
    data_dir: str | None = None,
) -> Network:
    """The network in a model folder or, of a run's workdir, its student.

    dataset, image_size: what it was trained on, where the folder does not tell.
    Raises ConfigError, CheckpointError, and DataError for the constants of a set that is not there.
    """
    folder = Path(student)
    if not (folder / model_folder.CARD).exists() and (folder / 'student').is_dir():
        folder /= 'student'
    if not (folder / model_folder.CARD).exists():
        raise ConfigError(
            f'{student} is neither a model folder, which has a {model_folder.CARD}, nor the '
            'workdir of a finished run, which has one in student/.'
        )
    facts, variables = model_folder.load_model(folder)
    given = {'dataset': dataset, 'image_size': image_size}
    facts |= {name: value for name, value in given.items() if value is not None}
    for name, flag in (('dataset', '--source_dataset=NAME'), ('image_size', '--image_size=PIXELS')):
        if name not in facts:
            raise ConfigError(f"{folder} does not tell its network's {name}: give {flag}.")
    absent = [name for name in ('num_classes', 'channels') if name not in facts]
    if absent:
        raise ConfigError(f'{folder / model_folder.CARD} lacks {" and ".join(absent)}.')
    return Network(facts, variables, *_constants(folder, facts, data_dir))


def _constants(
    folder: Path, facts: dict[str, Any], data_dir: str | None
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and std of the images that a network was trained on, one value for each channel."""
    spec, channels = data.spec_of(facts['dataset']), facts['channels']
    constants = (spec.mean, spec.std) if spec else None
    # A run may have had constants of its own: its config is here, or where this folder is.
    for path in (folder / 'config.json', folder.parent / 'config.json'):
        run = json.loads(path.read_text()).get('data', {}) if path.is_file() else {}
        if run.get('name') == facts['dataset'] and run.get('mean') and run.get('std'):
            constants = run['mean'], run['std']
            break
    if constants is None:  # a set of the user's own: they are stored with its images
        source = data.check(_settings(facts['dataset'], facts, data_dir))
        constants = source.mean, source.std
    mean, std = (tuple(values) * (channels // len(values)) for values in constants)
    return mean, std


def module_of(network: Network, num_classes: int) -> Any:
    """The network's module, for images as it was trained on, with another number of classes.

    Raises ConfigError for a name that is no model, and where it cannot take such images.
    """
    facts = network.facts
    image = {'image_size': facts['image_size'], 'channels': facts['channels']}
    config = SimpleNamespace(
        dtype='float32', data=SimpleNamespace(num_classes=num_classes, **image)
    )
    return build.make_classifier(facts['model'], config.data, config.dtype)


def renew_head(
    plan: sharding.Plan, module: Any, network: Network, key: Key, untrained: bool = False
) -> dict[str, Any]:
    """The network's weights in `module`, which may know other classes, with a new last layer.

    untrained: new weights everywhere.  The key is consumed.
    Raises ConfigError where the weights are not those of this architecture.
    """
    facts = network.facts
    image = jnp.zeros((1, facts['image_size'], facts['image_size'], facts['channels']))

    def shapes(num_classes: int) -> dict[str, Any]:
        wide = module.clone(num_classes=num_classes)
        return model_folder.flatten(jax.eval_shape(wide.init, key, image))

    mine, more = shapes(module.num_classes), shapes(module.num_classes + 1)
    head = {name for name in mine if mine[name].shape != more[name].shape}
    old = model_folder.flatten(network.variables)
    if any(name not in old or old[name].shape != mine[name].shape for name in mine.keys() - head):
        raise ConfigError(f'the weights of {facts["model"]} are those of another architecture.')
    fresh = model_folder.flatten(plan.call(module.init)(key, image))
    kept = {} if untrained else {name: old[name] for name in mine.keys() - head}
    variables = model_folder.unflatten({name: kept.get(name, fresh[name]) for name in mine})
    return plan.replicate({'batch_stats': {}} | variables)


# --- The images ----------------------------------------------------------------------------


def settings_of(
    dataset: str, network: Network, data_dir: str | None = None, resize: str = 'resize'
) -> SimpleNamespace:
    """A config's `data` group for images as a network takes them.

    Colours are asked for where there are any, even for a grey network: `read` turns them to luma.
    Raises ConfigError for a network that sees neither grey nor colours, and DataError for an
    unknown data set.
    """
    channels = network.facts['channels']
    if channels not in (1, 3):
        raise ConfigError(
            f'the images of {dataset} cannot be brought to the {channels} channels of this '
            'network: 1 (grey) or 3 (colours) are expected.'
        )
    settings = _settings(dataset, network.facts, data_dir, resize)
    settings.mean, settings.std = network.mean, network.std
    return settings


def _settings(
    dataset: str, facts: dict[str, Any], data_dir: str | None, resize: str = 'resize'
) -> SimpleNamespace:
    """A `data` group with the published constants; `facts` are those of the network."""
    spec = data.spec_of(dataset)
    settings = SimpleNamespace(name=dataset, data_dir=data_dir, resize=resize, mean=None, std=None)
    if spec:
        classes, channels = spec.num_classes, spec.channels
    else:  # a set of the user's own: its files tell
        known = dict(data.find(settings).info.features.items())
        classes = getattr(known.get('label'), 'num_classes', 0)
        channels = known['image'].shape[-1] if 'image' in known else 1
    settings.num_classes, settings.image_size = classes, facts['image_size']
    settings.channels = max(channels, facts['channels'])
    return settings


def read(settings: Any, network: Network, facts: data.Facts) -> Images:
    """Both splits of a data set, in the network's channels and with its constants."""
    size, channels = network.facts['image_size'], network.facts['channels']
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
