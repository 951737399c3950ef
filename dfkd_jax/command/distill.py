"""`dfkd distill`: a run from a few flags, which become the flags of a config.

What the flags leave out is found in the teacher's file and in the data; what is nowhere is asked
for, by its flag.  The run itself writes the config it used, WORKDIR/config.json, which
``--config=`` takes.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from typing import Any

from dfkd_jax import cli, loops
from dfkd_jax.command import arguments, sources
from dfkd_jax.command.arguments import FIELDS
from dfkd_jax.command.sources import Known
from dfkd_jax.distributed import processes
from dfkd_jax.errors import ConfigError
from dfkd_jax.storage import files
from dfkd_jax.storage import workdir as folder

SIZES = ('num_classes', 'channels', 'image_size')
USUAL = (
    'the usual ones are 0.485,0.456,0.406 and 0.229,0.224,0.225 (ImageNet), 0.4914,0.4822,0.4465 '
    'and 0.2023,0.1994,0.2010 (CIFAR-10), 0.5 and 0.5 (images in [-1, 1]), 0 and 1 (in [0, 1])'
)


def main(argv: Sequence[str], prog: str) -> None:
    """Distils; ends with `STOPPED` where the run was asked to stop and saved."""
    args, more = arguments.make('distill', prog).split(argv)
    flags = [*of_config(args), *more] if args.config else [*without_config(args), *more]
    print(f'as python -m dfkd_jax.main {" ".join(map(_quoted, flags))}', flush=True)
    cli.launch(told, [prog, *flags], arguments.STOPPED)


def told(config: Any, workdir: str | None) -> dict[str, Any]:
    """`loops.run`, in a folder that is known before."""
    place = files.expanded(workdir or folder.default(config))
    if processes.first():
        print(f'config {place / folder.CONFIG}', flush=True)
    return loops.run(config, place)


def of_config(args: argparse.Namespace) -> Iterator[str]:
    """The flags for absl where a config is named: the given ones, as fields of it."""
    if args.method or args.like:
        method = args.method or 'METHOD'
        raise ConfigError(f'--config names its method itself: --config={args.config}:{method}.')
    yield f'--config={args.config}'
    given = {name: getattr(args, name) for name in (*SIZES, 'resize')}
    given |= {name: numbers(name, getattr(args, name)) for name in ('mean', 'std')}
    place: dict[str, Any] = {}
    if args.data:
        name, data_dir = sources.find_data(args.data)
        place = {'name': name, 'data_dir': data_dir}
    yield from fields('data', {**place, **given})
    yield from of_run(args, args.teacher_model)


def without_config(args: argparse.Namespace) -> Iterator[str]:
    """The flags for absl, with what is left out found.  Raises ConfigError where it is nowhere."""
    for name, what in (('teacher', 'a file or folder of weights, or a whole network (.pt2, .onnx)'),
                       ('student', 'an architecture, such as wrn16_1')):  # fmt: skip
        if not getattr(args, name):
            raise ConfigError(f'--{name} is missing: {what}; or --config=NAME.')
    teacher = sources.of_teacher(args.teacher, args.teacher_model)
    name, data_dir = sources.find_data(args.data) if args.data else ('', None)
    images = sources.of_data(name, data_dir) if name else Known()
    if name in cli.config_names():  # networks see the images of this size, whatever is stored
        images = images._replace(image_size=cli.load_config(name).data.image_size)
    known = settle(args, teacher, images)
    base = args.like or like(name, known)
    yield f'--config={base}:{args.method}' if args.method else f'--config={base}'
    place = {'name': name, 'data_dir': data_dir}
    # A config has the constants and the way of its own data set.
    yield from fields('data', {**place, **{x: known[x] for x in known if x != 'model'}})
    yield from of_run(args, known['model'])


def settle(args: argparse.Namespace, teacher: Known, images: Known) -> dict[str, Any]:
    """What networks and images are: as flags say, else the teacher's file, else the data.

    Raises ConfigError, by its flag, for what none of them says.
    """
    found: dict[str, Any] = {'model': args.teacher_model or teacher.model}
    for name in SIZES:
        found[name] = _first(getattr(args, name), getattr(teacher, name), getattr(images, name))
    for name in ('mean', 'std'):
        given = numbers(name, getattr(args, name))
        found[name] = _first(given, getattr(teacher, name), getattr(images, name))
    found['resize'] = _first(args.resize, teacher.resize)
    missing = [name for name in (*SIZES, 'mean', 'std') if found[name] is None]
    if missing:
        how = {
            'num_classes': 'how many the teacher tells apart',
            'channels': '1 for grey images, 3 for colour',
            'image_size': 'the side in pixels of the images that the teacher was trained on, 32 '
            'for CIFAR',
            'mean': f'of the images in [0, 1] that the teacher was trained on; {USUAL}',
            'std': 'as --mean',
        }
        asked = '; '.join(f'--{name} ({how[name]})' for name in missing)
        raise ConfigError(f'{args.teacher} does not say these, so give {asked}.')
    return found


def like(name: str, known: dict[str, Any]) -> str:
    """The config whose settings suit: that of the data set, else one of such images."""
    if name in cli.config_names():
        return name
    if known['image_size'] > 96:
        return 'imagenet'
    if known['image_size'] > 48:
        return 'tiny_imagenet'
    return 'cifar10' if known['num_classes'] <= 20 else 'cifar100'


def of_run(args: argparse.Namespace, model: str | None) -> Iterator[str]:
    """The flags of the teacher, the student and the run."""
    yield from fields('teacher', {'model': model, 'checkpoint': _absolute(args.teacher)})
    yield from fields('student', {'model': args.student})
    if args.seed is not None:
        yield f'{FIELDS}seed={args.seed}'
    if args.workdir:
        yield f'--workdir={args.workdir}'


def fields(group: str, values: dict[str, Any]) -> Iterator[str]:
    """Fields of a group of the config as flags; what is None stays as it is there."""
    for name, value in values.items():
        if value is not None:
            yield f'{FIELDS}{group}.{name}={value}'


def numbers(name: str, text: str | None) -> tuple[float, ...] | None:
    """``0.5,0.5,0.5`` or ``(0.5,)`` as numbers.  Raises ConfigError for another text."""
    if text is None:
        return None
    try:
        return tuple(float(each) for each in text.strip('()[] ').split(',') if each.strip())
    except ValueError:
        raise ConfigError(
            f'--{name}={text}: expected one number, or one for each channel, such as '
            '0.485,0.456,0.406.'
        ) from None


def _absolute(path: str | None) -> str | None:
    """A path that a config keeps, so that it is found from any folder."""
    return str(files.expanded(path).absolute()) if path else None


def _first(*values: Any) -> Any:
    return next((value for value in values if value is not None), None)


def _quoted(flag: str) -> str:
    """A flag as a shell takes it."""
    name, equals, value = flag.partition('=')
    return f"{name}{equals}'{value}'" if not value or set(value) & set(' ()#*$') else flag
