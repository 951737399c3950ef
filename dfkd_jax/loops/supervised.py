"""Trains a classifier on real data: teachers, and the upper bounds of every table.

    python -m dfkd_jax.teach --config=configs/fashion_mnist.py --workdir=DIR [--role=ROLE]

--role=teacher trains config.teacher.model; --role=student trains config.student.model, what a
student reaches with the real images and labels; --role=kd distils the teacher to the student on
the real images, what data-free distillation is measured against.  DIR is a model folder then:
``--config.teacher.checkpoint=DIR`` takes it.  The same command continues an interrupted run.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from ml_collections import ConfigDict

from dfkd_jax import augment, build, contract, data, evaluate, losses
from dfkd_jax.contract import Array, Net, Params
from dfkd_jax.distributed import processes, sharding
from dfkd_jax.distributed.sharding import Shards
from dfkd_jax.errors import ConfigError, NonFiniteError
from dfkd_jax.reporting import artifacts, metrics
from dfkd_jax.reporting.progress import Progress
from dfkd_jax.storage import files, model_folder
from dfkd_jax.storage import workdir as folder
from dfkd_jax.storage.checkpoints import Checkpoints

ROLES = ('teacher', 'student', 'kd')


class State(struct.PyTreeNode):
    """A classifier in training."""

    step: Array  # [] int32
    net: Net


def settings(config: Any, role: str) -> ConfigDict:
    """What a training on real data depends on: its folder is the same for every method."""
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
    """Trains for `config.teach.epochs` and leaves a model folder; returns its facts.

    A finished folder is returned as it is; an unfinished one is continued, to the same weights as
    if it had never stopped.  Returns ``{}`` when asked to stop, after saving.
    Raises ConfigError and DataError as `build.build` does.
    """
    if processes.broadcast_from_first((Path(workdir) / model_folder.FACTS).exists()):
        return model_folder.load_model(workdir)[0]
    name = config.teacher.model if role == 'teacher' else config.student.model
    build.check_numbers(config)
    data.check(config.data)
    teacher: dict[str, Any] = {}
    if role == 'kd':
        if config.teacher.checkpoint is None:
            raise ConfigError('--role=kd needs --config.teacher.checkpoint.')
        teacher = build.load_network(config.teacher.checkpoint, config.teacher.model, config)
    train, test = (data.load(config.data, split) for split in ('train', 'test'))
    epoch_steps = train.size // config.teach.batch_size
    training = prepare(config, 'teach', name, epoch_steps, distil=role == 'kd')
    return fit(training, config, workdir, train, test, role, interrupted, teacher)


class Training(NamedTuple):
    """What trains a network on images, compiled once for any number of trainings.

    recipe: a group of the config with the fields of `teach`.
    whole: the network without the name of an axis.
    step: what `make_step` returns, compiled.
    """

    plan: sharding.Plan
    recipe: Any
    name: str
    whole: Any
    tx: optax.GradientTransformation
    step: Callable
    epoch_steps: int


def prepare(config: Any, group: str, name: str, epoch_steps: int, distil: bool = False) -> Training:
    """The training of a network by ``config[group]``; `distil`: towards the config's teacher.

    Raises ConfigError and DataError where config and network do not fit.
    """
    plan, recipe, facts = build.make_plan(config), config[group], data.check(config.data)
    module, whole = (build.make_classifier(config, name, axis) for axis in (plan.shards.axis, None))
    teacher = build.make_classifier(config, config.teacher.model) if distil else None
    try:
        plan.shards.check(f'config.{group}.batch_size', recipe.batch_size)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if (recipe.shade or recipe.cutmix) and not (distil and recipe.kd_weight == 1):
        raise ConfigError(
            f'config.{group}.shade and cutmix mix images of several classes, which only a teacher '
            'can tell: set them to 0, or distil with kd_weight=1.'
        )
    for field in ('epochs', 'save_every_epochs', 'eval_every_epochs'):
        if recipe[field] < 1:
            raise ConfigError(f'config.{group}.{field}={recipe[field]}: expected 1 or more.')
    if epoch_steps < 1:
        raise ConfigError(
            f'config.{group}.batch_size={recipe.batch_size} is more than there are images, or '
            f'config.{group}.steps is not positive.'
        )
    tx = optimiser(recipe, epoch_steps)
    step = plan.compile_rows(make_step(module, teacher, tx, recipe, facts, plan.shards))
    return Training(plan, recipe, name, whole, tx, step, epoch_steps)


def fit(
    training: Training,
    config: Any,
    workdir: str | Path,
    train: data.Dataset,
    test: data.Dataset | None,
    role: str,
    interrupted: Callable[[], bool] = lambda: False,
    teacher: Any = None,
    start: Any = None,
    seed: int | None = None,
) -> dict[str, Any]:
    """Trains on the images of `train` and leaves a model folder, as `run` does.

    test: what is measured after every `recipe.eval_every_epochs`; None: nothing is.
    teacher: its variables, on the host or the devices, where `training` distils.
    start: the variables to begin with; None: newly drawn ones.
    seed: of weights, batches and augmentation; None: the config's.
    """
    if processes.broadcast_from_first((Path(workdir) / model_folder.FACTS).exists()):
        return model_folder.load_model(workdir)[0]
    seed = config.seed if seed is None else seed
    workdir, (plan, recipe, name, whole, tx, step, epoch_steps) = Path(workdir), training
    key_init, key_steps = jax.random.split(jax.random.key(seed))
    size, channels = config.data.image_size, config.data.channels

    def init(key: Array) -> State:
        variables = whole.init(key, jnp.zeros((1, size, size, channels)))
        net = contract.start(variables['params'], variables.get('batch_stats', {}), tx)
        return State(jnp.zeros((), jnp.int32), net)

    classify = evaluate.classifier(plan, whole, test.facts) if test else None
    frozen, progress = plan.replicate(teacher), {'best': 0.0, 'last': 0.0, 'seconds': 0.0}
    epoch, stop = 0, False
    with Checkpoints(workdir / 'checkpoints') as checkpoints:
        restored = checkpoints.restore(jax.eval_shape(init, key_init))
        if restored is not None:
            epoch, state, progress = restored
        elif start is None:
            state = plan.call(init)(key_init)
        else:
            net = contract.start(start['params'], start.get('batch_stats', {}), tx)
            state = State(jnp.zeros((), jnp.int32), net)
        state = plan.replicate(state)
        started = time.monotonic() - progress['seconds']
        mine = plan.rows(recipe.batch_size)
        batches = train.shuffled(recipe.batch_size, seed, epoch * epoch_steps, mine)
        print(f'training {name} on {train.size} images of {train.facts.name} ({role})', flush=True)
        if epoch:
            print(f'continuing after epoch {epoch} of {recipe.epochs}', flush=True)
        line = Progress(recipe.epochs, epoch, unit='epoch', subject=role)
        with metrics.Writer(workdir, epoch) as writer, contextlib.closing(line):
            while epoch < recipe.epochs and not stop:
                rows = []
                # The range first: zip must not draw the batch after the last.
                for _, batch in zip(range(epoch_steps), batches, strict=False):
                    inputs = ((batch.image, batch.label), key_steps)
                    state, row = step(frozen, state, inputs)
                    rows.append(row)
                epoch += 1
                stop = interrupted()
                rows = jax.device_get(rows)
                row = {key: float(np.mean([r[key] for r in rows])) for key in rows[0]}
                advice = (
                    f'({role}.) The last good checkpoint is kept in {workdir / "checkpoints"}. '
                    'Lower its lr, in a new --workdir.'
                )
                if not np.isfinite(row['loss']):
                    raise NonFiniteError(f'loss is {row["loss"]} in epoch {epoch}. {advice}')
                due = epoch == recipe.epochs or epoch % recipe.eval_every_epochs == 0
                if classify is not None and test is not None and due:
                    predicted, label = classify(state.net.variables, test, config.eval_batch_size)
                    progress['last'] = evaluate.accuracy(predicted, label)
                    progress['best'] = max(progress['best'], progress['last'])
                    row['test_accuracy'] = progress['last']
                progress['seconds'] = time.monotonic() - started
                writer.write(epoch, {'seconds': progress['seconds'], **row})
                line.update(epoch, row, progress)
                if stop or epoch == recipe.epochs or epoch % recipe.save_every_epochs == 0:
                    artifacts.check_weights(state, epoch, advice, 'epoch')
                    checkpoints.save(epoch, state, progress)
    if epoch < recipe.epochs:
        print(f'stopped and saved after epoch {epoch} of {recipe.epochs}', flush=True)
        return {}
    processes.by_first(lambda: build.save_network(
        workdir, name, jax.device_get(state.net.variables), config,
        role=role, accuracy=progress['last'], best_accuracy=progress['best'],
        epochs=epoch, seed=seed, seconds=round(progress['seconds'], 2),
        device=folder.device(), versions=folder.versions(), recipe=files.plain(recipe),
    ))  # fmt: skip
    return model_folder.load_model(workdir)[0]


def optimiser(recipe: Any, epoch_steps: int) -> optax.GradientTransformation:
    """SGD with momentum and weight decay; a linear warm-up, then a cosine to `final_lr`.

    With `milestones`, in epochs, the rate is a tenth after each of them instead.
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


def make_step(
    module: Any, teacher_module: Any, tx: Any, recipe: Any, facts: data.Facts, shards: Shards
) -> Callable:
    """One update on a batch of images, of any size if `random_resized_crop` cuts them.

    The step is ``(teacher variables, state, ((images [B, H, W, C] uint8, labels [B]), key))``, of
    the rows of this shard (`Plan.compile_rows`).  The loss is cross entropy or, with a teacher,
    ``w KD + (1 - w) CE``, w = `recipe.kd_weight`.
    """
    black = -jnp.asarray(facts.mean) / jnp.asarray(facts.std)

    def step(frozen: Any, state: State, inputs: Any) -> tuple[State, dict[str, Array]]:
        (images, label), key = inputs
        key_crop, key_flip = jax.random.split(jax.random.fold_in(key, state.step))
        total, pixel = shards.size * images.shape[0], images
        if recipe.shade or recipe.cutmix:
            key_crop, key_mix = jax.random.split(key_crop)
            whole = augment.draw_mixture(
                key_mix, (total, *images.shape[1:]), recipe.shade, recipe.cutmix
            )
            other = shards.before(images).astype(jnp.float32) / 255
            mixture = jax.tree.map(shards.share, whole)
            pixel = 255 * augment.mix(pixel.astype(jnp.float32) / 255, other, mixture)
        x = data.normalise(pixel, facts.mean, facts.std)
        if recipe.random_resized_crop:
            areas = augment.draw_areas(key_crop, total)
            x = augment.resized_crop(x, shards.share(areas), facts.image_shape[0])
        elif recipe.crop_padding:
            offsets = augment.draw_crop(key_crop, total, recipe.crop_padding)
            x = augment.crop(x, shards.share(offsets), recipe.crop_padding, black)
        if recipe.flip:
            x = augment.flip(x, shards.share(augment.draw_flip(key_flip, total)))

        def loss_fn(params: Params) -> tuple[Array, tuple]:
            variables = {'params': params, 'batch_stats': state.net.batch_stats}
            out, mutated = module.apply(variables, x, train=True, mutable=['batch_stats'])
            loss = jnp.mean(losses.cross_entropy(out.logits, label))
            if teacher_module is not None:
                target = teacher_module.apply(frozen, x).logits
                kd = jnp.mean(losses.kd(out.logits, target, recipe.kd_temperature))
                loss = recipe.kd_weight * kd + (1 - recipe.kd_weight) * loss
            hit = jnp.mean(jnp.argmax(out.logits, -1) == label)
            return loss, (mutated.get('batch_stats', {}), hit)

        (loss, (batch_stats, hit)), grads = shards.value_and_grad(loss_fn)(state.net.params)
        net = contract.update(state.net, grads, tx, batch_stats)
        measured = {'loss': loss, 'train_accuracy': 100 * shards.mean(hit)}
        return State(state.step + 1, net), measured

    return step
