"""Noise schedules, and the steps of two samplers as functions of their tables.

DDPM (Ho et al. 2020) draws noise at every step; DDIM (Song et al. 2021) need not.  Both take the
noise that a network predicts, eps, and timesteps from 0 (least noise) to N - 1.  All arithmetic is
float32.  A timestep t is one for all images, [], or one per image, [B].
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from dfkd_jax.diffusion.fields import neutral, whole
from dfkd_jax.errors import DiffusionError
from dfkd_jax.models.layers import Array

# Stable Diffusion's folders name PNDMScheduler; its tables are those of the other two.
TYPES = ('DDPMScheduler', 'DDIMScheduler', 'PNDMScheduler')
SPACINGS = ('leading', 'trailing', 'linspace')
PREDICTIONS = ('epsilon', 'v_prediction')
VARIANCES = ('fixed_small', 'fixed_large')


class Schedule(NamedTuple):
    """The tables of a diffusion, and how a sampler goes through them.

    Attributes:
      alphas_cumprod: [N] float32, the image's share of the variance at each timestep.
      prediction: what the network predicts, one of PREDICTIONS.
      spacing, offset: of a shorter sampler's timesteps; the spacing is one of SPACINGS.
      clip: the predicted image is clipped to [-clip, clip]; None: it is not.
      variance: of DDPM's steps, one of VARIANCES.
      alpha_after_last: the image's share after DDIM's last step.
    """

    alphas_cumprod: np.ndarray
    prediction: str = 'epsilon'
    spacing: str = 'leading'
    offset: int = 0
    clip: float | None = None
    variance: str = 'fixed_small'
    alpha_after_last: float = 1.0


def from_config(config: Mapping[str, Any], where: str = 'scheduler_config.json') -> Schedule:
    """The schedule of a diffusers configuration.

    Raises:
      DiffusionError: for a class or an option that is not supported.
    """
    kind = config.get('_class_name')
    if kind not in TYPES:
        raise DiffusionError(
            f'{where} is of a {kind!r}: expected {", ".join(TYPES)}. Only the betas of a scheduler '
            'matter here: write the file of a DDPMScheduler with those of the training.'
        )
    neutral(config, READ, NEUTRAL, where)

    def chosen(name: str, default: str, known: tuple[str, ...]) -> str:
        value = config.get(name, default)
        if value not in known:
            raise DiffusionError(f'{where} has {name}={value!r}: expected {" or ".join(known)}.')
        return value

    # The defaults are those of diffusers' classes: files of old versions omit fields.
    clips = config.get('clip_sample', kind != 'PNDMScheduler')
    alphas_cumprod = np.cumprod(1.0 - betas(config, where))
    to_one = config.get('set_alpha_to_one', kind != 'PNDMScheduler')
    return Schedule(
        alphas_cumprod=alphas_cumprod.astype(np.float32),
        prediction=chosen('prediction_type', 'epsilon', PREDICTIONS),
        spacing=chosen('timestep_spacing', 'leading', SPACINGS),
        offset=whole(config, 'steps_offset', where) if config.get('steps_offset') else 0,
        clip=float(config.get('clip_sample_range', 1.0)) if clips else None,
        variance=chosen('variance_type', 'fixed_small', VARIANCES),
        alpha_after_last=1.0 if to_one else float(alphas_cumprod[0]),
    )


READ = {'num_train_timesteps', 'beta_start', 'beta_end', 'beta_schedule', 'trained_betas',
        'clip_sample', 'clip_sample_range', 'prediction_type', 'timestep_spacing', 'steps_offset',
        'variance_type', 'set_alpha_to_one'}  # fmt: skip
NEUTRAL: dict[str, Any] = {
    'dynamic_thresholding_ratio': None,  # of `thresholding`
    'predict_epsilon': (True,),  # in files of old versions, as is 'tensor_format'
    'sample_max_value': None,  # of `thresholding`
    'skip_prk_steps': None,  # of a PNDM sampler
    'tensor_format': None,
}


def betas(config: Mapping[str, Any], where: str) -> np.ndarray:
    """The variance that each step adds, float64 [N].  Raises DiffusionError as `from_config`."""
    number = whole({'num_train_timesteps': 1000} | dict(config), 'num_train_timesteps', where)
    first, last = float(config.get('beta_start', 1e-4)), float(config.get('beta_end', 0.02))
    kind = config.get('beta_schedule', 'linear')
    if config.get('trained_betas') is not None:
        table = np.asarray(config['trained_betas'], np.float64)
    elif kind == 'linear':
        table = np.linspace(first, last, number)
    elif kind == 'scaled_linear':
        table = np.linspace(first**0.5, last**0.5, number) ** 2
    elif kind == 'squaredcos_cap_v2':
        # Nichol & Dhariwal 2021, Eq 17, capped near the end as there.
        time = np.arange(number + 1) / number
        share = np.cos((time + 0.008) / 1.008 * math.pi / 2) ** 2
        table = np.minimum(1 - share[1:] / share[:-1], 0.999)
    else:
        raise DiffusionError(
            f'{where} has beta_schedule={kind!r}: expected linear, scaled_linear or '
            'squaredcos_cap_v2.'
        )
    if table.ndim != 1 or not ((table > 0) & (table < 1)).all():
        raise DiffusionError(f'{where} gives betas that are not all between 0 and 1.')
    return table


def timesteps(schedule: Schedule, steps: int) -> np.ndarray:
    """The timesteps of a sampler of `steps` steps, int32 [steps], from the most noise down.

    Raises DiffusionError unless the schedule has that many.
    """
    number = len(schedule.alphas_cumprod)
    if isinstance(steps, bool) or not isinstance(steps, int) or not 1 <= steps <= number:
        raise DiffusionError(f'a sampler of {steps!r} steps: expected a number from 1 to {number}.')
    if schedule.spacing == 'linspace':
        ascending = np.linspace(0, number - 1, steps).round()
    elif schedule.spacing == 'leading':
        ascending = np.arange(steps, dtype=float) * (number // steps) + schedule.offset
    else:
        ascending = np.round(np.arange(number, 0, -number / steps))[:steps][::-1] - 1
    if ascending[-1] >= number:
        raise DiffusionError(
            f'{steps} steps with steps_offset={schedule.offset} begin at timestep '
            f'{int(ascending[-1])} of {number}: take fewer steps.'
        )
    return ascending[::-1].astype(np.int32)


def previous(schedule: Schedule, steps: int, sampler: str = 'ddpm') -> np.ndarray:
    """The timestep that each of `timesteps` leads to, int32 [steps]; a negative one is the image.

    DDPM goes to the next one.  DDIM goes down by N // steps whatever the spacing, as in diffusers.
    """
    t = timesteps(schedule, steps)
    if sampler == 'ddim':
        return t - np.int32(len(schedule.alphas_cumprod) // steps)
    return np.append(t[1:], np.int32(-1))


def add_noise(schedule: Schedule, x0: Array, noise: Array, t: Array) -> Array:
    """Images x0 [B, H, W, C] with the noise of timestep t (Ho et al., Eq 4)."""
    share = _share(schedule, t, x0)
    return jnp.sqrt(share) * x0 + jnp.sqrt(1 - share) * noise


def velocity(schedule: Schedule, x0: Array, noise: Array, t: Array) -> Array:
    """The target of v_prediction (Salimans & Ho 2022): sqrt(share) noise - sqrt(1 - share) x0."""
    share = _share(schedule, t, x0)
    return jnp.sqrt(share) * noise - jnp.sqrt(1 - share) * x0


def to_eps(schedule: Schedule, output: Array, x: Array, t: Array) -> Array:
    """The noise in x at timestep t, from a network's output: eps, or v as in `velocity`."""
    if schedule.prediction == 'epsilon':
        return output
    share = _share(schedule, t, x)
    return jnp.sqrt(share) * output + jnp.sqrt(1 - share) * x


def to_x0(schedule: Schedule, eps: Array, x: Array, t: Array) -> Array:
    """The image x at timestep t without its noise eps, clipped as the schedule says."""
    share = _share(schedule, t, x)
    x0 = (x - jnp.sqrt(1 - share) * eps) / jnp.sqrt(share)
    return x0 if schedule.clip is None else jnp.clip(x0, -schedule.clip, schedule.clip)


def ddpm_step(
    schedule: Schedule, x: Array, eps: Array, t: Array, t_next: Array, noise: Array
) -> Array:
    """One ancestral step, from x [B, H, W, C] at timestep t to t_next < t (Ho et al., Eq 7).

    noise: standard normal, of x's shape; it is not used at t = 0.
    """
    share = _share(schedule, t, x)
    share_next = _share(schedule, t_next, x, 1.0)
    alpha = share / share_next  # of all the steps between the two
    beta = 1 - alpha
    mean = jnp.sqrt(share_next) * beta / (1 - share) * to_x0(schedule, eps, x, t)
    mean += jnp.sqrt(alpha) * (1 - share_next) / (1 - share) * x
    variance = beta
    if schedule.variance == 'fixed_small':
        variance = jnp.maximum(beta * (1 - share_next) / (1 - share), 1e-20)
    return mean + jnp.where(_rows(t, x) > 0, jnp.sqrt(variance), 0.0) * noise


def ddim_step(
    schedule: Schedule,
    x: Array,
    eps: Array,
    t: Array,
    t_next: Array,
    noise: Array | None = None,
    eta: float = 0.0,
) -> Array:
    """One step of DDIM, from x [B, H, W, C] at timestep t to t_next < t (Song et al., Eq 12).

    eta: 0 needs no `noise`; 1 has the variance of DDPM.
    """
    share = _share(schedule, t, x)
    share_next = _share(schedule, t_next, x, schedule.alpha_after_last)
    variance = (1 - share_next) / (1 - share) * (1 - share / share_next)
    sigma = eta * jnp.sqrt(variance)
    y = jnp.sqrt(share_next) * to_x0(schedule, eps, x, t)
    y += jnp.sqrt(1 - share_next - jnp.square(sigma)) * eps
    return y if noise is None else y + sigma * noise


def _share(schedule: Schedule, t: Array, x: Array, after_last: float | None = None) -> Array:
    """The image's share of the variance at timestep t, to broadcast with x.

    after_last: the share where t is negative.
    """
    table = jnp.asarray(schedule.alphas_cumprod)
    t = _rows(t, x)
    share = table[jnp.maximum(t, 0)]
    return share if after_last is None else jnp.where(t < 0, jnp.float32(after_last), share)


def _rows(t: Array, x: Array) -> Array:
    """Timesteps [] or [B] with as many axes as x."""
    t = jnp.asarray(t)
    return t.reshape(t.shape + (1,) * (x.ndim - t.ndim)) if t.ndim else t.reshape((1,) * x.ndim)
