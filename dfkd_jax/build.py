"""Builds what a config names, checked: networks, method, weights.  Nothing here compiles.

A mistake in a config raises a ConfigError from here or from `data.check`, before anything is
compiled.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from ml_collections import ConfigDict

from dfkd_jax import data, diffusion, labels, losses, models, port
from dfkd_jax.contract import Frozen, Method, Models
from dfkd_jax.distributed import sharding
from dfkd_jax.errors import (
    BankError,
    CheckpointError,
    CollapseError,
    ConfigError,
    DataError,
    DiffusionError,
    LabelError,
    NonFiniteError,
    PortError,
)
from dfkd_jax.methods import METHODS
from dfkd_jax.storage import files, model_folder

# Errors that a user can correct: printed as one line, without a traceback.
EXPECTED_ERRORS = (
    ConfigError,
    NonFiniteError,
    CollapseError,
    DataError,
    DiffusionError,
    BankError,
    LabelError,
    PortError,
    CheckpointError,
)
DTYPES = ('float32', 'bfloat16')
EXPORTED = 'exported'  # the model that is whatever network such a file holds:
EXPORTED_ENDINGS = ('.pt2', '.onnx')


class Run(NamedTuple):
    """The parts of a distillation.

    method: works on one shard of a batch.
    whole: the same method for the whole batch, for what runs once (`init`, `sample`).
    models: modules without an axis name, for evaluation.
    """

    plan: sharding.Plan
    method: Method
    whole: Method
    models: Models
    facts: Any  # of the data set: mean, std, class_names
    # The table of label embeddings [C, E] or the diffusion model, if the method has one.
    extra: Any = ()
    # What is told of the run, at its start and in its report: a sentence for each name.
    warnings: dict[str, str] = {}


def build(config: Any) -> Run:
    """Checks the config and builds what it names.  Raises ConfigError or DataError."""
    if config.method not in METHODS:
        raise ConfigError(
            f'unknown method {config.method!r}; expected one of {", ".join(METHODS)}.'
        )
    check_numbers(config)
    if config.loss.get('bn_form', 'sum') not in losses.BN_FORMS:
        raise ConfigError(
            f'config.loss.bn_form={config.loss.bn_form!r}; expected one of {losses.BN_FORMS}.'
        )
    about = data.check(config.data)
    plan = make_plan(config.parallel)
    table = load_table(config.labels, config.data, about) if 'labels' in config else None
    prior = load_prior(config.prior, config.synthesis) if 'prior' in config else None
    nets, shared = (
        make_models(config, about, axis, table)._replace(prior=prior and prior._replace(frozen={}))
        for axis in (None, plan.shards.axis)
    )
    make = METHODS[config.method]
    try:
        whole = make(config, nets, sharding.Shards())
        method = make(config, shared, plan.shards)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    extra = prior if table is None else table
    warnings = without_statistics(config, nets)
    return Run(plan, method, whole, nets, about, () if extra is None else extra, warnings)


def check_numbers(config: Any) -> None:
    """Raises ConfigError for a cadence, batch size, phase or seed that is too small."""

    def check(name: str, value: int, least: int) -> None:
        if value < least:
            raise ConfigError(f'config.{name}={value}: expected {least} or more.')

    for name, value in config.items():
        if name.endswith('_every_rounds') or name in ('eval_batch_size', 'keep_checkpoints'):
            check(name, value, 1)
        elif isinstance(value, ConfigDict):
            for field in ('batch_size', 'student_batch_size'):
                if field in value:
                    check(f'{name}.{field}', value[field], 1)
    check('seed', config.seed, 0)
    for i, phase in enumerate(config.phases if 'phases' in config else ()):
        for name, value in phase.items():
            check(f'phases[{i}].{name}', value, 1 if name == 'rounds' else 0)


class _Silent:
    """A network that counts the images it is given and answers in zeros of the right shapes.

    Its layers are traced for shapes once, and not for gradients, which takes most of the time.
    """

    def __init__(self, module: Any):
        self.module, self.images = module, 0

    def apply(self, variables: Any, images: Any, *args: Any, **kwargs: Any) -> Any:
        self.images += len(images)
        call = functools.partial(self.module.apply, **kwargs)
        shapes = jax.eval_shape(lambda v, x: call(v, x, *args), variables, images)
        return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.module, name)


def queries(config: Any, nets: Models, frozen: Frozen, phases: Any) -> list[int]:
    """Images through the teacher, forward, in one round of each phase.

    Counted by tracing the method's steps for shapes, on whole batches, since only the method knows
    what it asks the teacher.  Test images do not count.
    """
    teacher, student = _Silent(nets.teacher), _Silent(nets.student)
    generator = nets.generator and _Silent(nets.generator)
    silent = nets._replace(teacher=teacher, student=student, generator=generator)
    method = METHODS[config.method](config, silent, sharding.Shards())
    key = jax.eval_shape(lambda: jax.random.key(0))
    state = jax.eval_shape(method.init, frozen, key)

    def asked(step: Any) -> int:
        before = teacher.images
        jax.eval_shape(step, frozen, state, key)
        return teacher.images - before

    once = asked(method.begin) + asked(method.finish)
    # A method without generator steps or without student steps has no such step to trace.
    each, learning = (
        asked(step) if any(phase[steps] for phase in phases) else 0
        for step, steps in ((method.generator_step, 'g_steps'), (method.student_step, 's_steps'))
    )
    return [p.loops * (once + p.g_steps * each) + p.s_steps * learning for p in phases]


def without_statistics(config: Any, nets: Models) -> dict[str, str]:
    """A warning, by its name, where a loss compares batch statistics and the teacher has none."""
    weight, prior = config.loss.get('bn'), config.image_prior
    if not weight or _shapes(nets.teacher, nets.image_shape).get('batch_stats'):
        return {}
    place = 'nothing takes its place (--config.image_prior.tv and .l2 are a prior of smooth images)'
    if prior.tv or prior.l2:
        place = (
            'a prior of smooth images takes its place, '
            f'--config.image_prior.tv={prior.tv:g} and .l2={prior.l2:g}'
        )
    return {
        'no_batch_statistics': (
            f'{config.teacher.model} has no batch norms, so there are no statistics for synthetic '
            f'images to match: config.loss.bn={weight:g} drops out, and {place}. Expect a less '
            'accurate student than from a teacher with batch norms.'
        )
    }


def make_plan(mode: str) -> sharding.Plan:
    """`sharding.make` for `config.parallel`."""
    try:
        return sharding.make(mode)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def load_table(settings: labels.Settings, images: data.Settings, about: data.Facts) -> np.ndarray:
    """The label embeddings that `config.labels` names, [C, E]; of numbers if names are unknown."""
    known = images.name, about.class_names, images.num_classes
    settled = labels.settled(settings, *known)
    if settled is not settings:
        print(
            f'no class names are known: label embeddings are those of {unnamed(settled)}; '
            'set config.labels for others',
            flush=True,
        )
    return labels.load(settled, *known)


def unnamed(settled: labels.Settings) -> str:
    """What label embeddings are of where no class names are known."""
    return 'orthogonal codes' if settled.source == 'onehot' else '"class 0", "class 1", ...'


def load_prior(settings: Any, synthesis: Any) -> diffusion.Prior | None:
    """The diffusion model that `config.prior` names; None if the run samples from none."""
    if synthesis.bank or synthesis.source == 'noise':
        return None
    if settings.path is None:
        raise ConfigError(
            'no diffusion model: set --config.prior.path to a folder of diffusers format (Stable '
            'Diffusion 1.x or 2.x, or a DDPM of pixels).'
        )
    if settings.dtype not in DTYPES:
        raise ConfigError(
            f'config.prior.dtype={settings.dtype!r}; expected one of {", ".join(DTYPES)}.'
        )
    return diffusion.load(settings.path, jnp.dtype(settings.dtype), settings.remat)


def make_models(
    config: Any, about: data.Facts, axis_name: str | None = None, table: np.ndarray | None = None
) -> Models:
    """The networks of a config, checked against its images; with a generator if it has one.

    table: label embeddings, whose width sets the generator's input.
    """
    images = config.data
    given = config.teacher.checkpoint
    teacher = make_classifier(config.teacher.model, images, config.dtype, axis_name, given)
    student = make_classifier(config.student.model, images, config.dtype, axis_name)
    generator = None
    if 'generator' in config:
        generator = make_generator(
            config.generator, images, config.synthesis.batch_size, config.dtype, axis_name, table
        )
    return Models(
        teacher=teacher,
        student=student,
        generator=generator,
        num_classes=images.num_classes,
        image_shape=(images.image_size, images.image_size, images.channels),
        mean=tuple(about.mean),
        std=tuple(about.std),
        hold_out=not about.test_size,
    )


def make_generator(
    settings: Any,
    images: data.Settings,
    batch_size: int,
    dtype: str,
    axis_name: str | None = None,
    table: np.ndarray | None = None,
) -> Any:
    """The generator of `config.generator`.

    The group has the module's fields and its optimiser's; only the former are used here.
    """
    try:
        fields = models.fields(settings.model)
    except ValueError as error:
        raise ConfigError(f'config.generator.model: {error}') from error
    sizes = dict(settings.items())
    sizes |= {'image_size': images.image_size, 'channels': images.channels}
    if table is not None:
        repeats = -(-batch_size // images.num_classes)
        sizes |= {'embedding': table.shape[1], 'latent': table.shape[1], 'repeats': repeats}
    sizes = {name: value for name, value in sizes.items() if name in fields}
    return make_model(settings.model, images.num_classes, dtype, axis_name, **sizes)


def make_classifier(
    name: str,
    images: data.Settings,
    dtype: str = 'float32',
    axis_name: str | None = None,
    checkpoint: str | None = None,
) -> Any:
    """A classifier for the images' classes.  Raises ConfigError if it cannot take the images.

    checkpoint: the teacher's file, which holds the network if the name is 'exported'.
    """
    if name == EXPORTED:
        module = load_exported(checkpoint, images)[0]
        module = module.clone(axis_name=axis_name, dtype=_dtype(dtype))
    else:
        module = make_model(name, images.num_classes, dtype, axis_name)
    shape = (images.image_size, images.image_size, images.channels)
    try:
        _shapes(module.clone(axis_name=None), shape)
    except Exception as error:  # layers raise anything at an impossible shape
        raise ConfigError(
            f'{name} cannot take images of shape {shape}: {error}. Change '
            'config.data.image_size or the model.'
        ) from error
    return module


@functools.lru_cache(maxsize=16)
def _shapes(module: Any, image_shape: tuple[int, int, int]) -> Any:
    """The shapes of a classifier's variables; cached, since several checks need them."""
    image = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    # The key is made inside: outside, it would compile a program.
    return jax.eval_shape(lambda x: module.init(jax.random.key(0), x), image)


def make_model(name: str, num_classes: int, dtype: str, axis_name: str | None, **sizes: Any) -> Any:
    """`models.make` with the sizes that every module shares."""
    sizes |= {'axis_name': axis_name, 'dtype': _dtype(dtype)}
    try:
        if 'num_classes' in models.fields(name):  # some generators have no classes
            sizes['num_classes'] = num_classes
        return models.make(name, **sizes)
    except (TypeError, ValueError) as error:
        raise ConfigError(str(error)) from error


def _dtype(name: str) -> Any:
    if name not in DTYPES:
        raise ConfigError(f'config.dtype={name!r}; expected one of {", ".join(DTYPES)}.')
    return jnp.dtype(name)


def load_exported(path: str | Path | None, images: data.Settings) -> tuple[Any, dict[str, Any]]:
    """The network in a `.pt2` or `.onnx` file and its variables, checked against `images`.

    Raises PortError for a file that is not read, and ConfigError for one that does not fit or that
    no teacher has.
    """
    if path is None or Path(path).suffix.lower() not in EXPORTED_ENDINGS:
        raise ConfigError(
            f'{EXPORTED!r} is the network in a file, and only a teacher may be one: set '
            f'--config.teacher.model={EXPORTED} --config.teacher.checkpoint=FILE.pt2 (or .onnx), '
            'and choose a student from the model zoo.'
        )
    path = files.expanded(path)
    about = path.stat() if path.exists() else None
    module, variables = _read_exported(path, about and (about.st_mtime_ns, about.st_size))
    size = images.image_size
    wanted = (size, size, images.channels)
    if any(has not in (None, want) for has, want in zip(module.image_shape, wanted)):
        found = tuple('any' if has is None else has for has in module.image_shape)
        raise ConfigError(
            f'{path} takes images of height, width and channels {found}, and the config says '
            f'{wanted}: set --config.data.image_size and --config.data.channels, or export the '
            'network for such images.'
        )
    classes = module.num_classes or _classes(module, wanted)
    if classes != images.num_classes:
        raise ConfigError(
            f'{path} has {classes} classes, and the config says {images.num_classes}: set '
            f'--config.data.num_classes={classes}, or give the teacher of these images.'
        )
    return module, variables


@functools.lru_cache(maxsize=1)
def _read_exported(path: Path, version: Any) -> tuple[Any, dict[str, Any]]:
    """Read once for all that ask for it; version: tells one file of this path from another."""
    del version
    return port.load_exported(path)


def _classes(module: Any, image_shape: tuple[int, int, int]) -> int:
    images = jax.ShapeDtypeStruct((2, *image_shape), jnp.float32)
    return jax.eval_shape(module.apply, module.shapes, images).logits.shape[1]


def load_network(path: str | Path, name: str, images: data.Settings) -> dict[str, Any]:
    """A classifier's variables from a model folder or from weights, checked against `images`.

    path: a model folder, or what `port.read` reads.
    `batch_stats` is empty for a network without batch norms.  Raises PortError, CheckpointError or
    ConfigError.
    """
    if name == EXPORTED:
        return load_exported(path, images)[1]
    if Path(path).suffix.lower() in EXPORTED_ENDINGS:
        raise ConfigError(
            f'{path} holds a whole network, not the weights of a {name}: set '
            f'--config.teacher.model={EXPORTED}.'
        )
    classes, channels = images.num_classes, images.channels
    path = files.expanded(path)
    if not (path / model_folder.CARD).is_file():
        ported = port.read(name, path, num_classes=classes, channels=channels)
        _check_normalisation(path, ported, images)
        for note in ported.notes:
            logging.warning(note)
        return {'batch_stats': {}} | ported.variables
    about, variables = model_folder.load_model(path)
    for what, found, wanted in (
        ('a', about['model'], name),
        ('the number of classes', about.get('num_classes', classes), classes),
        ('the number of channels', about.get('channels', channels), channels),
    ):
        if found != wanted:
            raise ConfigError(
                f'{path} holds {what} {found}, and the config says {wanted}: set '
                '--config.teacher.model and --config.data to what the checkpoint was trained as.'
            )
    _check_variables(path, name, images, variables)
    return {'batch_stats': {}} | variables


def stated_accuracy(config: Any) -> float | None:
    """The teacher's accuracy in per cent by its file or model folder; None where that says none."""
    given = config.teacher.checkpoint
    if given is None or Path(given).suffix.lower() in EXPORTED_ENDINGS:
        return None
    return port.accuracy_in(files.expanded(given))


def _check_normalisation(path: Path, ported: port.Ported, images: data.Settings) -> None:
    """Raises ConfigError where a file brings a normalisation and the config has another."""
    for name, found in (('mean', ported.mean), ('std', ported.std)):
        wanted = getattr(images, name)
        if found and (wanted is None or not np.allclose(wanted, found, atol=1e-3)):
            raise ConfigError(
                f'{path} normalises its images by mean {ported.mean} and std {ported.std}, and '
                f'config.data.{name} is {wanted}: set --config.data.mean="{ported.mean}" '
                f'--config.data.std="{ported.std}".'
            )


def _check_variables(path: str | Path, name: str, images: data.Settings, variables: Any) -> None:
    """Raises CheckpointError unless `variables` are exactly the network's arrays and finite."""
    module = make_model(name, images.num_classes, 'float32', None)
    shape = (images.image_size, images.image_size, images.channels)
    expected = model_folder.flatten(_shapes(module, shape))
    shapes = {key: leaf.shape for key, leaf in expected.items()}
    found = model_folder.flatten({key: tree for key, tree in variables.items() if tree})
    wrong = [f'{key} is missing' for key in shapes.keys() - found.keys()]
    wrong += [f'{key} is not part of it' for key in found.keys() - shapes.keys()]
    for key in shapes.keys() & found.keys():
        if found[key].shape != shapes[key]:
            wrong.append(f'{key} is {list(found[key].shape)}, expected {list(shapes[key])}')
        elif found[key].dtype != np.float32 or not np.isfinite(found[key]).all():
            wrong.append(f'{key} is not of finite float32')
    if wrong:
        more = f', and {len(wrong) - 8} more' if len(wrong) > 8 else ''
        raise CheckpointError(
            f'{path} does not hold a {name}: {"; ".join(sorted(wrong)[:8])}{more}. Make the folder '
            'again from its source.'
        )
