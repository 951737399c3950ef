"""Ordinary training: a classifier learns from images and labels, or from a teacher.

It trains teachers and upper bounds on real images (`python -m dfkd_jax.teach`), and the students of
methods that store their synthetic images on disk.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import optax
from flax import struct
from ml_collections import ConfigDict

from dfkd_jax import augment, build, contract, data, evaluate, losses
from dfkd_jax.contract import Array, Net, Params
from dfkd_jax.distributed import processes, sharding
from dfkd_jax.distributed.sharding import Shards
from dfkd_jax.errors import ConfigError
from dfkd_jax.loops import session
from dfkd_jax.methods.shared import msarc as imitation
from dfkd_jax.reporting import metrics
from dfkd_jax.reporting.progress import say
from dfkd_jax.storage import files, model_folder
from dfkd_jax.storage import workdir as folder

ROLES = ('teacher', 'student', 'kd')


class State(struct.PyTreeNode):
    """A classifier in training."""

    step: Array  # [] int32
    net: Net


def settings(config: Any, role: str) -> ConfigDict:
    """The settings that training on real data depends on; the method is not one of them."""
    names = ('data', 'teach', 'dtype', 'parallel', 'seed', 'eval_batch_size')
    model = config.teacher.model if role == 'teacher' else config.student.model
    chosen = {name: config[name] for name in names} | {'role': role, 'model': model}
    return ConfigDict(chosen | ({'teacher': config.teacher} if role == 'kd' else {}))


def run(
    config: Any,
    workdir: str | Path,
    role: str = 'teacher',
    interrupted: Callable[[], bool] = lambda: False,
) -> dict[str, Any]:
    """Trains for `config.teach.epochs` and leaves a model folder; returns its ``model.json``.

    A finished folder is returned as it is.  An unfinished one is continued, to the same weights as
    if it had never stopped.
    Raises ConfigError and DataError as `build.build` does, and Stopped after saving.
    """
    workdir = Path(workdir)
    if processes.broadcast_from_first((workdir / model_folder.CARD).exists()):
        return model_folder.load_model(workdir)[0]
    name = config.teacher.model if role == 'teacher' else config.student.model
    build.check_numbers(config)
    facts = data.check(config.data, ('train', 'test'))
    teacher: dict[str, Any] = {}
    if role == 'kd':
        if config.teacher.checkpoint is None:
            raise ConfigError('--role=kd needs --config.teacher.checkpoint.')
        teacher = build.load_network(config.teacher.checkpoint, config.teacher.model, config.data)
    train, test = (data.load(config.data, split) for split in ('train', 'test'))
    epoch_steps = train.size // config.teach.batch_size
    training = prepare(config, 'teach', name, epoch_steps, distil=role == 'kd')
    given = {'teacher': folder.digest(teacher)} if role == 'kd' else {}
    folder.keep_inputs(workdir, data=data.identity(facts), **given)
    return fit(training, workdir, train, test, role, config.seed, interrupted, teacher)


class Recipe(Protocol):
    """How a classifier is trained: the fields of `config.teach`, and of groups like it."""

    epochs: int
    batch_size: int
    lr: float
    final_lr: float
    warmup_epochs: float
    milestones: tuple[int, ...]  # epochs after which the rate is a tenth, in place of the cosine
    momentum: float
    nesterov: bool
    weight_decay: float
    crop_padding: int  # pixels
    random_resized_crop: bool  # in place of crops
    flip: bool
    shade: float  # how deeply an image may be shaded by another
    cutmix: float  # the probability that a box of it shows another
    kd_temperature: float
    kd_weight: float  # w of w KD + (1 - w) CE
    save_every_epochs: int
    eval_every_epochs: int


class Training(NamedTuple):
    """The parts that train a network on images, compiled once for any number of trainings.

    recipe: a group of the config with the fields of `teach`.
    data: the group `config.data`, for the sizes of images.
    whole: the network without an axis name.
    step: the result of `make_step`, compiled.
    """

    plan: sharding.Plan
    recipe: Recipe
    data: data.Settings
    eval_batch_size: int
    name: str
    whole: Any
    tx: optax.GradientTransformation
    step: Callable
    epoch_steps: int


def prepare(config: Any, group: str, name: str, epoch_steps: int, distil: bool = False) -> Training:
    """The training of a network by ``config[group]``; with `distil`, from the config's teacher.

    Raises ConfigError and DataError if config and network do not fit.
    """
    plan, recipe = build.make_plan(config.parallel), config[group]
    about = data.check(config.data)
    module, whole = (
        build.make_classifier(name, config.data, config.dtype, axis)
        for axis in (plan.shards.axis, None)
    )
    teacher = None
    if distil:
        teacher = build.make_classifier(
            config.teacher.model, config.data, config.dtype, checkpoint=config.teacher.checkpoint
        )
    _check_recipe(recipe, f'config.{group}', epoch_steps, distil)
    try:
        plan.shards.check(f'config.{group}.batch_size', recipe.batch_size)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    tx = optimiser(recipe, epoch_steps)
    msarc = None
    if teacher is not None and group != 'teach':  # which is ordinary distillation
        shape = config.data.image_size, config.data.image_size, config.data.channels
        try:
            msarc = imitation.make(config, teacher, module, shape, plan.shards)
        except ValueError as error:
            raise ConfigError(str(error)) from error
    step = plan.compile_rows(make_step(module, teacher, tx, recipe, about, plan.shards, msarc))
    return Training(
        plan, recipe, config.data, config.eval_batch_size, name, whole, tx, step, epoch_steps
    )


def _check_recipe(recipe: Recipe, group: str, epoch_steps: int, distil: bool) -> None:
    """Raises ConfigError for numbers with which no training is possible."""
    if (recipe.shade or recipe.cutmix) and not (distil and recipe.kd_weight == 1):
        raise ConfigError(
            f'{group}.shade and cutmix mix images of several classes, which only a teacher '
            'can tell: set them to 0, or distil with kd_weight=1.'
        )
    for field in ('epochs', 'save_every_epochs', 'eval_every_epochs'):
        if (number := getattr(recipe, field)) < 1:
            raise ConfigError(f'{group}.{field}={number}: expected 1 or more.')
    if epoch_steps < 1:
        raise ConfigError(
            f'{group}.batch_size={recipe.batch_size} is more than there are images, or '
            f'{group}.steps is not positive.'
        )


def fit(
    training: Training,
    workdir: Path,
    train: data.Dataset,
    test: data.Dataset | None,
    role: str,
    seed: int,
    interrupted: Callable[[], bool] = lambda: False,
    teacher: Any = None,
    start: Any = None,
    score: str = 'accuracy',
) -> dict[str, Any]:
    """Trains on the images of `train` and leaves a model folder, as `run` does.

    test: images to measure on after every `recipe.eval_every_epochs`; None: no measurement.
    seed: of weights, batches and augmentation.
    teacher: its variables, on the host or the devices, if `training` distils.
    start: the variables to begin with; None: random ones.
    score: the name of the share of labels predicted; 'agreement' where they are a teacher's.
    """
    if processes.broadcast_from_first((workdir / model_folder.CARD).exists()):
        return model_folder.load_model(workdir)[0]
    plan, recipe, frozen = training.plan, training.recipe, training.plan.replicate(teacher)
    key_init, key_steps = jax.random.split(jax.random.key(seed))
    classify = evaluate.classifier(plan, training.whole, train.facts)
    read = _reader(training, train, seed)
    say(f'training {training.name} on {train.size} images of {train.facts.name} ({role})')

    def advance(state: State, epoch: int) -> tuple[State, session.Row]:
        rows = []
        for batch in read(epoch):
            state, row = training.step(frozen, state, ((batch.image, batch.label), key_steps))
            rows.append(row)
        return state, session.mean(jax.device_get(rows))

    def measure(state: State) -> session.Row:
        assert test is not None
        found = classify(state.net.variables, test, training.eval_batch_size)
        return {f'test_{score}': evaluate.accuracy(*found)}

    work = session.Work(
        plan=plan,
        total=recipe.epochs,
        init=partial(_first_state, training),
        inputs=(key_init, start),
        advance=advance,
        every=session.Every(1, recipe.eval_every_epochs, recipe.save_every_epochs),
        measure=measure if test else session.nothing,
        score=f'test_{score}',
        unit='epoch',
        subject=role,
        advice=f'({role}.) {session.kept(workdir)} Lower its lr, in a new --workdir.',
    )
    state, record = session.run(work, workdir, interrupted)
    scores = {score: record.last, f'best_{score}': record.best}
    processes.by_first(lambda: _save(
        training, workdir, state, train.facts, role=role, **scores,
        best_epoch=record.best_at, seed=seed, seconds=round(record.seconds, 2),
    ))  # fmt: skip
    return model_folder.load_model(workdir)[0]


def _save(training: Training, workdir: Path, state: State, facts: data.Facts, **told: Any) -> None:
    """The model folder of a training that is over; `told` is what its card says of it."""
    model_folder.save_classifier(
        workdir, training.name, jax.device_get(state.net.variables), training.data,
        **told, epochs=training.recipe.epochs, device=folder.device(), versions=folder.versions(),
        recipe=files.plain(training.recipe), **model_folder.preparation(training.data, facts),
    )  # fmt: skip


def _first_state(training: Training, key: Array, start: Any) -> State:
    """The state before the first step, with random weights or those of `start`."""
    size, channels = training.data.image_size, training.data.channels
    if start is None:
        start = training.whole.init(key, jnp.zeros((1, size, size, channels)))
    net = contract.start(start['params'], start.get('batch_stats', {}), training.tx)
    return State(jnp.zeros((), jnp.int32), net)


def _reader(
    training: Training, train: data.Dataset, seed: int
) -> Callable[[int], Iterator[data.Batch]]:
    """``epoch -> its batches``, from one stream that begins at the first epoch read."""
    batch_size, steps = training.recipe.batch_size, training.epoch_steps
    stream: Iterator[data.Batch] | None = None

    def read(epoch: int) -> Iterator[data.Batch]:
        nonlocal stream
        if stream is None:
            rows = training.plan.rows(batch_size)
            stream = train.shuffled(batch_size, seed, epoch * steps, rows)
        # Not zip, which would draw one batch too many.
        return itertools.islice(stream, steps)

    return read


def curves(workdir: Path) -> dict[str, Any]:
    """The curves of a training for the report page: accuracy or agreement, and loss, by epoch."""
    measured = metrics.read(workdir)
    names = {'test_accuracy': 'student_accuracy', 'test_agreement': 'agreement_with_teacher'}
    shown = {names[name]: measured[name] for name in names if name in measured}
    return {'round': measured['round'], **shown, 's/kd': measured['loss']}


def optimiser(recipe: Any, epoch_steps: int) -> optax.GradientTransformation:
    """SGD with momentum and weight decay; a linear warm-up, then a cosine to `final_lr`.

    With `milestones`, in epochs, each of them divides the rate by ten instead.
    """
    schedule = optax.schedules.warmup_cosine_decay_schedule(
        0.0 if recipe.warmup_epochs else recipe.lr,
        recipe.lr,
        round(recipe.warmup_epochs * epoch_steps),
        recipe.epochs * epoch_steps,
        recipe.final_lr,
    )
    if recipe.milestones:
        schedule = optax.schedules.piecewise_constant_schedule(
            recipe.lr, {round(epoch * epoch_steps): 0.1 for epoch in recipe.milestones}
        )
    return optax.chain(
        optax.add_decayed_weights(recipe.weight_decay),
        optax.sgd(schedule, momentum=recipe.momentum, nesterov=recipe.nesterov),
    )


def _augmented(recipe: Any, about: data.Facts, shards: Shards, images: Array, key: Array) -> Array:
    """Images [B, H, W, C] of 0 to 255, normalised, as a step of `recipe` sees them."""
    key_crop, key_flip = jax.random.split(key)
    total, pixel = shards.size * images.shape[0], images
    if recipe.shade or recipe.cutmix:
        key_crop, key_mix = jax.random.split(key_crop)
        whole = augment.draw_mixture(
            key_mix, (total, *images.shape[1:]), recipe.shade, recipe.cutmix
        )
        other = shards.before(images).astype(jnp.float32) / 255
        mixture = jax.tree.map(shards.share, whole)
        pixel = 255 * augment.mix(pixel.astype(jnp.float32) / 255, other, mixture)
    x = data.normalise(pixel, about.mean, about.std)
    if recipe.random_resized_crop:
        areas = augment.draw_areas(key_crop, total)
        x = augment.resized_crop(x, shards.share(areas), about.image_shape[0])
    elif recipe.crop_padding:
        black = -jnp.asarray(about.mean) / jnp.asarray(about.std)
        offsets = augment.draw_crop(key_crop, total, recipe.crop_padding)
        x = augment.crop(x, shards.share(offsets), recipe.crop_padding, black)
    if recipe.flip:
        x = augment.flip(x, shards.share(augment.draw_flip(key_flip, total)))
    return x


def make_step(
    module: Any,
    teacher_module: Any,
    tx: Any,
    recipe: Any,
    about: data.Facts,
    shards: Shards,
    msarc: imitation.Msarc | None = None,
) -> Callable:
    """One update on a batch of images, which may have any size if `random_resized_crop` is set.

    The step takes ``(teacher variables, state, ((images [B, H, W, C] uint8, labels [B]), key))``,
    with the rows of this shard (`Plan.compile_rows`).  The loss is cross entropy or, with a
    teacher, ``w KD + (1 - w) CE``, w = `recipe.kd_weight`; KD is that of `msarc` if it is given.
    """

    def step(frozen: Any, state: State, inputs: Any) -> tuple[State, dict[str, Array]]:
        (images, label), key = inputs
        x = _augmented(recipe, about, shards, images, jax.random.fold_in(key, state.step))
        target = None if teacher_module is None else teacher_module.apply(frozen, x)
        aim = msarc and msarc.aim(frozen, state.net.variables, x, target)

        def loss_fn(params: Params) -> tuple[Array, tuple]:
            variables = {'params': params, 'batch_stats': state.net.batch_stats}
            out, mutated = module.apply(variables, x, train=True, mutable=['batch_stats'])
            loss = jnp.mean(losses.cross_entropy(out.logits, label))
            if target is not None:
                if aim is None:
                    kd = jnp.mean(losses.kd(out.logits, target.logits, recipe.kd_temperature))
                else:
                    kd, _ = aim(out)
                loss = recipe.kd_weight * kd + (1 - recipe.kd_weight) * loss
            hit = jnp.mean(jnp.argmax(out.logits, -1) == label)
            return loss, (mutated.get('batch_stats', {}), hit)

        (loss, (batch_stats, hit)), grads = shards.value_and_grad(loss_fn)(state.net.params)
        net = contract.update(state.net, grads, tx, batch_stats)
        measured = {'loss': loss, 'train_accuracy': 100 * shards.mean(hit)}
        return State(state.step + 1, net), measured

    return step
