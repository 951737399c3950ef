"""The loop that trains a small diffusion model of pixels (``python -m dfkd_jax.diffusion.train``).

The loss is that of Ho et al. 2020 (the mean squared error of the noise, the same at every timestep)
or, with `v_prediction`, of Salimans & Ho 2022.  The result is an exponential moving average of the
weights.  A prior for data-free distillation must not see the teacher's training data.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from ml_collections import ConfigDict

from dfkd_jax import augment, build, data
from dfkd_jax.contract import Array, Params
from dfkd_jax.data.image_folder import read_folder
from dfkd_jax.diffusion import folder as formats
from dfkd_jax.diffusion import recipe as recipes
from dfkd_jax.diffusion import schedule as schedules
from dfkd_jax.diffusion.schedule import Schedule
from dfkd_jax.diffusion.unet import UNet
from dfkd_jax.distributed.sharding import Plan, Shards
from dfkd_jax.errors import ConfigError, DataError
from dfkd_jax.loops import session
from dfkd_jax.reporting import metrics, pictures
from dfkd_jax.storage import files
from dfkd_jax.storage import workdir as folders

PRIOR, RECEIPT, SAMPLES = 'prior', 'receipt.json', 'samples.png'
SAMPLER_STEPS = 50
MEASURED = 8  # timesteps of each held-out image


class State(struct.PyTreeNode):
    """A prior in training."""

    step: Array  # [] int32
    params: Params
    ema: Params  # the average of `params`, which the prior keeps
    opt_state: Any


def run(
    config: Any,
    workdir: str | Path,
    interrupted: Callable[[], bool] = lambda: False,
    command: str = '',
) -> dict[str, Any]:
    """Trains for `config.train.steps` and leaves WORKDIR/prior; returns its receipt.

    A finished folder is returned as it is.  An unfinished one is continued, to the same weights as
    if it had never stopped.

    command: for the receipt.

    Raises:
      ConfigError: for fields that make no sense.
      DataError: for missing or too few images.
      NonFiniteError: for a number that is not finite, which is not saved.
      Stopped: after saving.
    """
    workdir, recipe = Path(workdir), config.train
    if (workdir / PRIOR / RECEIPT).exists():
        return formats.read_json(workdir / PRIOR / RECEIPT)
    module, schedule, plan = check(config)
    images, held_out = load_images(config.data)
    folders.keep_inputs(workdir, images=folders.digest([images, held_out]))
    tx, frozen = optimiser(recipe), plan.replicate(images)
    step = plan.compile(make_step(module, schedule, tx, recipe, plan.shards))
    measure = make_measure(module, schedule, plan, held_out, recipe.batch_size)
    key_init, key_steps = jax.random.split(jax.random.key(config.seed))

    init = partial(first_state, module, tx, images.shape[1:])
    weights = sum(x.size for x in jax.tree.leaves(jax.eval_shape(init, key_init).params))
    print(f'training a prior of {weights:,} weights on {len(images):,} images', flush=True)
    work = session.Work(
        plan=plan,
        total=recipe.steps,
        init=init,
        inputs=(key_init,),
        advance=lambda state, done: step(frozen, state, key_steps),
        every=session.Every(
            config.log_every_steps, config.save_every_steps, config.save_every_steps
        ),
        measure=lambda state: measure(state.ema),
        unit='step',
        subject='prior',
        advice=f'{session.kept(workdir)} Lower config.train.lr, in a new --workdir.',
    )
    state, record = session.run(work, workdir, interrupted)
    receipt = {
        'images': len(images), 'held_out': len(held_out), 'source': source(config.data),
        'weights': weights, 'steps': recipe.steps, 'seconds': round(record.seconds, 1),
        'loss': float(metrics.read(workdir)['loss'][-1]), **record.measured,
        'command': command, 'device': folders.device(), 'versions': folders.versions(),
        'config': files.plain(config),
    }  # fmt: skip
    samples = sample(module, schedule, plan, state.ema, images.shape[1:], config.seed)
    write(workdir / PRIOR, config, jax.device_get(state.ema), samples, receipt)
    return receipt


def check(config: Any) -> tuple[UNet, Schedule, Plan]:
    """The network, the noise schedule and the plan.

    Raises ConfigError for fields that make no sense or do not fit each other.
    """
    plan = build.make_plan(config.parallel)
    try:
        module, schedule = recipes.check(config)
        plan.shards.check('config.train.batch_size', config.train.batch_size)
    except ValueError as error:  # DiffusionError is one
        raise ConfigError(str(error)) from error
    return module, schedule, plan


# Images


def load_images(config: Any) -> tuple[np.ndarray, np.ndarray]:
    """The images of `config.data` for training and held out, both [N, S, S, C] uint8.

    Raises ConfigError unless exactly one of `folder` and `name` is given, and DataError for images
    that are missing or cannot be read.
    """
    if (config.folder is None) == (config.name is None):
        raise ConfigError(
            'set one of --config.data.folder (of images) and --config.data.name (of a data set in '
            f'TFDS format); they are {config.folder!r} and {config.name!r}.'
        )
    if config.folder is not None:
        images = read_folder(files.expanded(config.folder), config.image_size, config.channels)
    else:
        fields = ('name', 'data_dir', 'num_classes', 'image_size', 'channels', 'resize')
        found = {field: config[field] for field in fields} | {'mean': (0.0,), 'std': (1.0,)}
        stored = data.load(ConfigDict(found), 'train').images
        if stored is None:
            raise DataError(f'{config.name} does not fit into memory: give a smaller set.')
        images = stored
    if len(images) <= config.held_out:
        raise DataError(
            f'there are {len(images)} images, of which config.data.held_out={config.held_out} are '
            'not to be trained on: give more images, or hold out fewer.'
        )
    if config.invert:
        images = 255 - images
    order = np.random.default_rng(0).permutation(len(images))
    return images[order[config.held_out :]], images[order[: config.held_out]]


def source(config: Any) -> Any:
    """The source of the images, for the receipt: images.json of their folder, or a name."""
    about = files.expanded(config.folder or '') / 'images.json'
    if config.folder is not None and about.is_file():
        return formats.read_json(about)
    return config.name or Path(config.folder).name


# Computation


def first_state(module: UNet, tx: Any, shape: tuple[int, ...], key: Array) -> State:
    """The state before the first step, for images of [H, W, C]."""
    params = module.init(key, jnp.zeros((1, *shape)), jnp.zeros((1,)))['params']
    # A copy, since a step donates the memory of its state and no array may be there twice.
    ema = jax.tree.map(jnp.copy, params)
    return State(jnp.zeros((), jnp.int32), params, ema, tx.init(params))


def optimiser(recipe: Any) -> optax.GradientTransformation:
    """Adam on clipped gradients; a linear warm-up, then one cosine to zero."""
    rate = optax.schedules.warmup_cosine_decay_schedule(
        0.0 if recipe.warmup_steps else recipe.lr, recipe.lr, recipe.warmup_steps, recipe.steps
    )
    return optax.chain(optax.clip_by_global_norm(recipe.clip_norm), optax.adam(rate))


def losses(
    module: UNet, schedule: Schedule, params: Params, x0: Array, t: Array, noise: Array
) -> Array:
    """The mean squared error of the network's prediction for each image, [B].

    x0: images [B, H, W, C] in [-1, 1]; t: timesteps [B]; noise: standard normal, of x0's shape.
    """
    x = schedules.add_noise(schedule, x0, noise, t)
    target = noise
    if schedule.prediction == 'v_prediction':
        target = schedules.velocity(schedule, x0, noise, t)
    return jnp.mean(jnp.square(predict(module, params, x, t) - target), (1, 2, 3))


def predict(module: UNet, params: Params, x: Array, t: Array) -> Array:
    """The network's prediction for x [B, H, W, C] at timesteps t [B]."""
    output: Any = module.apply({'params': params}, x, t)
    return output


def make_step(
    module: UNet, schedule: Schedule, tx: Any, recipe: Any, shards: Shards
) -> Callable[[Any, State, Array], tuple[State, dict[str, Array]]]:
    """One update: ``(images [N, H, W, C] uint8, state, key) -> (state, metrics)``.

    The batch is drawn from the images with replacement; it depends only on the key and the state's
    step.
    """
    size, number = recipe.batch_size, len(schedule.alphas_cumprod)

    def step(images: Array, state: State, key: Array) -> tuple[State, dict[str, Array]]:
        key = jax.random.fold_in(key, state.step)
        key_image, key_flip, key_t, key_noise = jax.random.split(key, 4)
        rows = shards.share(jax.random.randint(key_image, (size,), 0, len(images)))
        x0 = to_signed(images[rows])
        if recipe.flip:
            x0 = augment.flip(x0, shards.share(augment.draw_flip(key_flip, size)))
        t = shards.share(jax.random.randint(key_t, (size,), 0, number))
        noise = shards.share(jax.random.normal(key_noise, (size, *images.shape[1:])))

        def loss_fn(params: Params) -> tuple[Array, None]:
            return jnp.mean(losses(module, schedule, params, x0, t, noise)), None

        (loss, _), grads = shards.value_and_grad(loss_fn)(state.params)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        # A short average at first, so that the random start is soon forgotten.
        decay = jnp.minimum(recipe.ema_decay, (1 + state.step) / (10 + state.step))
        ema = optax.incremental_update(params, state.ema, 1 - decay)
        return State(state.step + 1, params, ema, opt_state), {'loss': loss}

    return step


def make_measure(
    module: UNet, schedule: Schedule, plan: Plan, images: np.ndarray, batch_size: int
) -> Callable[[Params], dict[str, float]]:
    """The losses of held-out images, at fixed timesteps and with fixed noise.

    `held_out_loss` is the training loss; `held_out_eps` is the error of the noise in either
    parameterisation.
    """
    rng, number = np.random.default_rng(0), len(schedule.alphas_cumprod)
    # Each image at several timesteps, which cover all evenly.
    count = len(images) * MEASURED // batch_size * batch_size
    chosen = np.resize(images, (count, *images.shape[1:]))
    t = rng.permutation(np.arange(count) * number // max(count, 1)).astype(np.int32)
    noise: Any = rng.standard_normal(chosen.shape, np.float32)

    def batch_losses(params: Params, batch: Any) -> tuple[Array, Array]:
        images, t, noise = batch
        loss = losses(module, schedule, params, to_signed(images), t, noise)
        if schedule.prediction != 'v_prediction':
            return loss, loss
        return loss, loss * jnp.asarray(schedule.alphas_cumprod)[t]

    compiled = plan.predict(batch_losses)

    def measure(params: Params) -> dict[str, float]:
        if not count:
            return {}
        starts = [slice(i, i + batch_size) for i in range(0, count, batch_size)]
        found = [jax.device_get(compiled(params, (chosen[i], t[i], noise[i]))) for i in starts]
        return {
            'held_out_loss': float(np.mean([loss for loss, _ in found])),
            'held_out_eps': float(np.mean([eps for _, eps in found])),
        }

    return measure


def sample(
    module: UNet,
    schedule: Schedule,
    plan: Plan,
    params: Params,
    shape: tuple[int, ...],
    seed: int,
) -> np.ndarray:
    """About 80 images [B, H, W, C] in [0, 1], sampled by 50 steps of DDIM."""
    count = max(80 // plan.shards.size, 1) * plan.shards.size

    def denoise(params: Params, batch: Any) -> Array:
        x, t, t_next = batch
        eps = schedules.to_eps(schedule, predict(module, params, x, t), x, t)
        return schedules.ddim_step(schedule, x, eps, t, t_next)

    compiled = plan.predict(denoise)
    steps = min(SAMPLER_STEPS, len(schedule.alphas_cumprod))
    pairs = zip(schedules.timesteps(schedule, steps), schedules.previous(schedule, steps, 'ddim'))
    x: Any = np.random.default_rng(seed).standard_normal((count, *shape), np.float32)
    for t, t_next in pairs:
        x = compiled(params, (x, np.full(count, t), np.full(count, t_next)))
    return np.asarray(x) / 2 + 0.5


def to_signed(images: Array) -> Array:
    """Pixels uint8 to [-1, 1]."""
    return images.astype(jnp.float32) / 127.5 - 1


# Output


def write(
    folder: Path, config: Any, params: Params, samples: np.ndarray, receipt: dict[str, Any]
) -> None:
    """Writes the folder of a prior; the receipt comes last and marks it as complete."""
    kept = jax.tree.map(lambda x: np.asarray(x, config.weights), params)
    network = recipes.network(config.unet, config.data)
    scheduler = recipes.scheduler(config.schedule)
    formats.save_unet(folder, network, kept, scheduler)
    rows = np.arange(len(samples)) // pictures.MAX_COLUMNS
    title = f'Samples, {SAMPLER_STEPS} steps of DDIM'
    pictures.image_grid(samples, rows, [''] * (rows[-1] + 1), folder / SAMPLES, title)
    files.write_json(folder / RECEIPT, receipt)
