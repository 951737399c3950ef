"""From a config to what it names, checked: modules, method, weights.  Nothing here compiles.

Every mistake a user can make in a config is raised from here (or from `data.check`) as a
ConfigError before the first compilation.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from dfkd_jax import data, diffusion, labels, models, port
from dfkd_jax.contract import Frozen, Method, Models
from dfkd_jax.distributed import sharding
from dfkd_jax.errors import (
    BankError,
    CheckpointError,
    ConfigError,
    DataError,
    DiffusionError,
    LabelError,
    NonFiniteError,
    PortError,
)
from dfkd_jax.methods import METHODS
from dfkd_jax.storage import model_folder

# What a user can put right: shown as one line, without a traceback.
EXPECTED_ERRORS = (
    ConfigError,
    NonFiniteError,
    DataError,
    DiffusionError,
    BankError,
    LabelError,
    PortError,
    CheckpointError,
)
DTYPES = ('float32', 'bfloat16')


class Run(NamedTuple):
    """What a distillation runs.

    method sees a share of the batch; whole is the same method seeing all of it, for what runs once
    (its `init`, its `sample`).  Modules of `models` have no axis name: they are for evaluation.
    """

    plan: sharding.Plan
    method: Method
    whole: Method
    models: Models
    facts: Any  # of the data set: mean, std, class_names
    # The table of label embeddings [C, E] or the diffusion model, where a method has one.
    extra: Any = ()


def build(config: Any) -> Run:
    """Checks the config and makes what it names.  Raises ConfigError or DataError."""
    if config.method not in METHODS:
        raise ConfigError(
            f'unknown method {config.method!r}; expected one of {", ".join(METHODS)}.'
        )
    check_numbers(config)
    facts = data.check(config.data)
    plan = make_plan(config)
    make = METHODS[config.method]
    table = load_table(config, facts)
    prior = load_prior(config)
    nets, shared = (
        make_models(config, facts, axis, table)._replace(prior=prior and prior._replace(frozen={}))
        for axis in (None, plan.shards.axis)
    )
    try:
        whole = make(config, nets, sharding.Shards())
        method = make(config, shared, plan.shards)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    _check_statistics(config, nets)
    extra = prior if table is None else table
    return Run(plan, method, whole, nets, facts, () if extra is None else extra)


def check_numbers(config: Any) -> None:
    """Raises ConfigError for a count that is too small to run with: cadences, batches, phases."""

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


class _Counting:
    """A teacher that notes how many images it is shown."""

    def __init__(self, module: Any):
        self.module, self.images = module, 0

    def apply(self, variables: Any, images: Any, *args: Any, **kwargs: Any) -> Any:
        self.images += len(images)
        return self.module.apply(variables, images, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.module, name)


def queries(config: Any, nets: Models, frozen: Frozen, phases: Any) -> list[int]:
    """Images through the teacher, forward, in one round of each of the phases.

    Read off the method's steps by tracing them for shapes, whole batches at once: what a method
    asks its teacher is its own business.  Test images are not counted.
    """
    teacher = _Counting(nets.teacher)
    method = METHODS[config.method](config, nets._replace(teacher=teacher), sharding.Shards())
    key = jax.eval_shape(lambda: jax.random.key(0))
    state = jax.eval_shape(method.init, frozen, key)

    def asked(step: Any) -> int:
        before = teacher.images
        jax.eval_shape(step, frozen, state, key)
        return teacher.images - before

    once = asked(method.begin) + asked(method.finish)
    # A phase of a method without the one or the other step has none of it.
    each, learning = (
        asked(step) if any(phase[steps] for phase in phases) else 0
        for step, steps in ((method.generator_step, 'g_steps'), (method.student_step, 's_steps'))
    )
    return [p.loops * (once + p.g_steps * each) + p.s_steps * learning for p in phases]


def _check_statistics(config: Any, nets: Models) -> None:
    """Raises ConfigError where a loss compares batch statistics that the teacher has none of."""
    weight = config.loss.get('bn')
    if not weight:
        return
    if not _shapes(nets.teacher, nets.image_shape).get('batch_stats'):
        raise ConfigError(
            f'config.loss.bn={weight:g}, and {config.teacher.model} has no batch norms: set '
            '--config.loss.bn=0, or choose a teacher that has.'
        )


def make_plan(config: Any) -> sharding.Plan:
    """`parallel.make` for `config.parallel`."""
    try:
        return sharding.make(config.parallel)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def load_table(config: Any, facts: Any) -> np.ndarray | None:
    """The label embeddings that `config.labels` names, [C, E]; None for a method without."""
    if 'labels' not in config:
        return None
    return labels.load(config.labels, config.data.name, facts.class_names, config.data.num_classes)


def load_prior(config: Any) -> diffusion.Prior | None:
    """The diffusion model that `config.prior` names; None where none is sampled from."""
    if 'prior' not in config or config.synthesis.bank or config.synthesis.source == 'noise':
        return None
    if config.prior.path is None:
        raise ConfigError(
            'no diffusion model: set --config.prior.path to a folder of diffusers format (Stable '
            'Diffusion 1.x or 2.x, or a DDPM of pixels).'
        )
    if config.prior.dtype not in DTYPES:
        raise ConfigError(
            f'config.prior.dtype={config.prior.dtype!r}; expected one of {", ".join(DTYPES)}.'
        )
    return diffusion.load(config.prior.path, jnp.dtype(config.prior.dtype), config.prior.remat)


def make_models(
    config: Any, facts: Any, axis_name: str | None = None, table: np.ndarray | None = None
) -> Models:
    """The networks of a config, checked against its images; the generator where it has one.

    table: label embeddings, whose width the generator takes.
    """
    size, channels = config.data.image_size, config.data.channels
    generator = None
    if 'generator' in config:
        try:
            fields = models.fields(config.generator.model)
        except ValueError as error:
            raise ConfigError(f'config.generator.model: {error}') from error
        # The module's fields among the group's; the others are its optimiser's.
        sizes = dict(config.generator.items()) | {'image_size': size, 'channels': channels}
        if table is not None:
            repeats = -(-config.synthesis.batch_size // config.data.num_classes)
            width = table.shape[1]
            sizes |= {'embedding': width, 'latent': width, 'repeats': repeats}
        sizes = {name: value for name, value in sizes.items() if name in fields}
        generator = make_model(config, config.generator.model, axis_name, **sizes)
    return Models(
        teacher=make_classifier(config, config.teacher.model, axis_name),
        student=make_classifier(config, config.student.model, axis_name),
        generator=generator,
        num_classes=config.data.num_classes,
        image_shape=(size, size, channels),
        mean=tuple(facts.mean),
        std=tuple(facts.std),
    )


def make_classifier(config: Any, name: str, axis_name: str | None = None) -> Any:
    """A classifier of the config's classes, which takes its images."""
    module = make_model(config, name, axis_name)
    shape = (config.data.image_size, config.data.image_size, config.data.channels)
    try:
        _shapes(module.clone(axis_name=None), shape)
    except Exception as error:  # whatever the layers make of an impossible shape
        raise ConfigError(
            f'{name} cannot take images of shape {shape}: {error}. Change '
            'config.data.image_size or the model.'
        ) from error
    return module


@functools.lru_cache(maxsize=16)
def _shapes(module: Any, image_shape: tuple[int, int, int]) -> Any:
    """The shapes of a classifier's variables, kept: several checks of a build ask for them."""
    image = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    # The key within: made outside, it would be a first program to compile.
    return jax.eval_shape(lambda x: module.init(jax.random.key(0), x), image)


def make_model(config: Any, name: str, axis_name: str | None, **sizes: Any) -> Any:
    """`models.make` with the sizes that every module shares."""
    if config.dtype not in DTYPES:
        raise ConfigError(f'config.dtype={config.dtype!r}; expected one of {", ".join(DTYPES)}.')
    sizes |= {'axis_name': axis_name, 'dtype': jnp.dtype(config.dtype)}
    try:
        if 'num_classes' in models.fields(name):  # a generator may know none
            sizes['num_classes'] = config.data.num_classes
        return models.make(name, **sizes)
    except (TypeError, ValueError) as error:
        raise ConfigError(str(error)) from error


def load_network(path: str | Path, name: str, config: Any) -> dict[str, Any]:
    """A classifier's variables from a model folder or a PyTorch file, checked against the config.

    One without batch norms has empty `batch_stats`.  Raises PortError, CheckpointError or
    ConfigError.
    """
    classes, channels = config.data.num_classes, config.data.channels
    if not Path(path).is_dir():
        ported = port.from_torch(name, path, num_classes=classes, channels=channels)
        return {'batch_stats': {}} | ported
    facts, variables = model_folder.load_model(path)
    for what, found, wanted in (
        ('a', facts['model'], name),
        ('the number of classes', facts.get('num_classes', classes), classes),
        ('the number of channels', facts.get('channels', channels), channels),
    ):
        if found != wanted:
            raise ConfigError(
                f'{path} holds {what} {found}, and the config says {wanted}: set '
                '--config.teacher.model and --config.data to what the checkpoint was trained as.'
            )
    _check_variables(path, name, config, variables)
    return {'batch_stats': {}} | variables


def _check_variables(path: str | Path, name: str, config: Any, variables: Any) -> None:
    """Raises CheckpointError unless a network has just these arrays, of finite numbers."""
    module = make_model(config, name, None)
    size, channels = config.data.image_size, config.data.channels
    expected = model_folder.flatten(_shapes(module, (size, size, channels)))
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


def save_network(folder: Path, name: str, variables: Any, config: Any, **facts: Any) -> None:
    """Writes a model folder with what `load_network` checks."""
    model_folder.save_model(
        folder,
        name,
        jax.tree.map(np.asarray, variables),
        num_classes=config.data.num_classes,
        channels=config.data.channels,
        image_size=config.data.image_size,
        dataset=config.data.name,
        **facts,
    )
