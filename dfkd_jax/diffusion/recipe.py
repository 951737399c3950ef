"""The network and the noise schedule that a config of a prior describes, and whether they fit."""

from __future__ import annotations

from typing import Any

from dfkd_jax.diffusion import schedule as schedules
from dfkd_jax.diffusion import unet
from dfkd_jax.diffusion.schedule import Schedule
from dfkd_jax.diffusion.unet import UNet
from dfkd_jax.errors import DiffusionError

KEPT = ('float16', 'float32')


def check(config: Any) -> tuple[UNet, Schedule]:
    """The network and the noise schedule of a config.

    Raises DiffusionError for fields that make no sense or do not fit each other.
    """
    recipe, size, levels = config.train, config.data.image_size, range(len(config.unet.widths))
    positive = {
        'config.data.image_size': size,
        'config.log_every_steps': config.log_every_steps,
        'config.save_every_steps': config.save_every_steps,
        'config.train.batch_size': recipe.batch_size,
        'config.train.steps': recipe.steps,
        'config.train.lr': recipe.lr,
        'config.train.clip_norm': recipe.clip_norm,
    }
    for name, value in positive.items():
        if value <= 0:
            raise DiffusionError(f'{name} is {value}: expected a positive number.')
    if not 0 <= recipe.warmup_steps < recipe.steps:
        raise DiffusionError(
            f'config.train.warmup_steps is {recipe.warmup_steps}: expected 0 to less than '
            f'config.train.steps={recipe.steps}.'
        )
    if not 0 <= recipe.ema_decay < 1:
        raise DiffusionError(
            f'config.train.ema_decay is {recipe.ema_decay}: expected 0 to less than 1.'
        )
    if config.weights not in KEPT:
        raise DiffusionError(f'config.weights is {config.weights!r}: expected {" or ".join(KEPT)}.')
    if config.data.channels not in (1, 3):
        raise DiffusionError(
            f'config.data.channels is {config.data.channels}: expected 1 (grey) or 3.'
        )
    if any(level not in levels for level in config.unet.attention):
        raise DiffusionError(
            f'config.unet.attention is {tuple(config.unet.attention)}: expected numbers of levels, '
            f'0 to {levels[-1]}.'
        )
    module = UNet(unet.from_config(network(config.unet, config.data), 'config.unet'))
    schedule = schedules.from_config(scheduler(config.schedule), 'config.schedule')
    if size % module.config.divisor:
        raise DiffusionError(
            f'config.data.image_size is {size}: expected a multiple of {module.config.divisor}, '
            f'since {len(levels)} levels (config.unet.widths) halve it {len(levels) - 1} times.'
        )
    return module, schedule


def network(net: Any, images: Any) -> dict[str, Any]:
    """diffusers' configuration of the network, for config.json.

    net, images: the groups `unet` and `data` of a config.
    """
    kinds = ['Attn' if level in net.attention else '' for level in range(len(net.widths))]
    return {
        '_class_name': 'UNet2DModel',
        'sample_size': images.image_size,
        'in_channels': images.channels,
        'out_channels': images.channels,
        'block_out_channels': list(net.widths),
        'layers_per_block': net.blocks,
        'down_block_types': [f'{kind}DownBlock2D' for kind in kinds],
        'up_block_types': [f'{kind}UpBlock2D' for kind in reversed(kinds)],
        'attention_head_dim': net.head_width,
        'norm_num_groups': net.groups,
        # diffusers' defaults, written for readers that have others.
        'act_fn': 'silu',
        'downsample_padding': 1,
        'flip_sin_to_cos': True,
        'freq_shift': 0,
        'norm_eps': 1e-5,
    }


def scheduler(schedule: Any) -> dict[str, Any]:
    """diffusers' configuration of the noise schedule, for scheduler_config.json.

    schedule: the group `schedule` of a config.
    """
    return {
        '_class_name': 'DDPMScheduler',
        'beta_schedule': schedule.betas,
        'beta_start': 1e-4,
        'beta_end': 0.02,
        'num_train_timesteps': schedule.timesteps,
        'prediction_type': schedule.prediction,
        'timestep_spacing': 'trailing',  # samplers begin at pure noise, as training does
        'clip_sample': True,
        'clip_sample_range': 1.0,
    }
