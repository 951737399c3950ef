"""The autoencoder of latent diffusion: diffusers' AutoencoderKL (Rombach et al. 2022)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from flax import linen as nn

from dfkd_jax.diffusion.fields import DEPTH, field, neutral, whole, wholes
from dfkd_jax.diffusion.layers import (
    Downsample,
    ResnetBlock,
    SpatialAttention,
    Upsample,
    conv,
    group_norm,
)
from dfkd_jax.diffusion.unet import divisible
from dfkd_jax.errors import DiffusionError
from dfkd_jax.models.layers import Array, Dtype

EPSILON = 1e-6  # of every normalisation


@dataclasses.dataclass(frozen=True)
class VAEConfig:
    """An architecture.

    Attributes:
      widths: the channels of every level, from the finest map to the coarsest.
      scaling: latents times this have about unit variance; these are diffused.
      quant: whether a 1x1 convolution follows the encoder.
      post_quant: whether a 1x1 convolution precedes the decoder.
    """

    in_channels: int
    out_channels: int
    latent_channels: int
    widths: tuple[int, ...]
    blocks: int
    groups: int
    scaling: float
    attention: bool
    quant: bool
    post_quant: bool

    @property
    def factor(self) -> int:
        """The side of an image divided by that of its latent."""
        return 2 ** (len(self.widths) - 1)


class AutoencoderKL(nn.Module):
    """From images in [-1, 1] to the moments of their latents, and from unscaled latents to images.

    dtype: of the arithmetic.  remat: recompute blocks in the backward pass.
    """

    config: VAEConfig
    dtype: Dtype = jnp.float32
    remat: bool = False

    def setup(self) -> None:
        config, options = self.config, (self.config, self.dtype, self.remat)
        self.encoder, self.decoder = Encoder(*options), Decoder(*options)
        latent = config.latent_channels
        if config.quant:
            self.quant_conv = nn.Conv(2 * latent, (1, 1), dtype=self.dtype)
        if config.post_quant:
            self.post_quant_conv = nn.Conv(latent, (1, 1), dtype=self.dtype)

    def encode(self, images: Array) -> tuple[Array, Array]:
        """[B, H, W, 3] -> the mean and the log variance [B, H/f, W/f, latent] float32."""
        y = self.encoder(images.astype(self.dtype))
        y = self.quant_conv(y) if self.config.quant else y
        mean, log_variance = jnp.split(y.astype(jnp.float32), 2, axis=-1)
        return mean, jnp.clip(log_variance, -30.0, 20.0)

    def decode(self, z: Array) -> Array:
        """[B, h, w, latent] -> [B, h f, w f, 3] float32, roughly in [-1, 1]."""
        z = z.astype(self.dtype)
        z = self.post_quant_conv(z) if self.config.post_quant else z
        return self.decoder(z).astype(jnp.float32)

    def __call__(self, images: Array) -> Array:
        """Encodes images and decodes the mean: [B, H, W, 3] -> the same."""
        return self.decode(self.encode(images)[0])


class Encoder(nn.Module):
    """Levels of residual blocks, all but the last halving the map; then the middle block."""

    config: VAEConfig
    dtype: Dtype
    remat: bool

    @nn.compact
    def __call__(self, x: Array) -> Array:
        config, at = self.config, {'dtype': self.dtype}
        x = conv(x, config.widths[0], 3, name='conv_in', **at)
        for level, width in enumerate(config.widths):
            change = 'down' if level + 1 < len(config.widths) else ''
            name = f'down_blocks_{level}'
            x = Level(config, width, config.blocks, change, self.dtype, self.remat, name=name)(x)
        x = Middle(config, self.dtype, self.remat, name='mid_block')(x)
        x = nn.silu(group_norm(x, config.groups, EPSILON, name='conv_norm_out', **at))
        return conv(x, 2 * config.latent_channels, 3, name='conv_out', **at)


class Decoder(nn.Module):
    """The middle block; then levels of residual blocks, all but the last doubling the map."""

    config: VAEConfig
    dtype: Dtype
    remat: bool

    @nn.compact
    def __call__(self, z: Array) -> Array:
        config, at = self.config, {'dtype': self.dtype}
        x = conv(z, config.widths[-1], 3, name='conv_in', **at)
        x = Middle(config, self.dtype, self.remat, name='mid_block')(x)
        for i, width in enumerate(reversed(config.widths)):
            change = 'up' if i + 1 < len(config.widths) else ''
            blocks, name = config.blocks + 1, f'up_blocks_{i}'
            x = Level(config, width, blocks, change, self.dtype, self.remat, name=name)(x)
        x = nn.silu(group_norm(x, config.groups, EPSILON, name='conv_norm_out', **at))
        return conv(x, config.out_channels, 3, name='conv_out', **at)


class Level(nn.Module):
    """Residual blocks of one width, then a `change` of resolution: 'up', 'down' or '' (none)."""

    config: VAEConfig
    features: int
    blocks: int
    change: str
    dtype: Dtype
    remat: bool

    @nn.compact
    def __call__(self, x: Array) -> Array:
        make = nn.remat(ResnetBlock) if self.remat else ResnetBlock
        for i in range(self.blocks):
            name = f'resnets_{i}'
            x = make(self.features, self.config.groups, EPSILON, self.dtype, name=name)(x)
        if self.change == 'down':
            x = Downsample(0, self.dtype, name='downsamplers_0')(x)
        if self.change == 'up':
            # The last maps are the largest of all, so upsampling is worth recomputing too.
            up = nn.remat(Upsample) if self.remat else Upsample
            x = up(self.dtype, name='upsamplers_0')(x)
        return x


class Middle(nn.Module):
    """Two residual blocks with single-headed attention between them."""

    config: VAEConfig
    dtype: Dtype
    remat: bool

    @nn.compact
    def __call__(self, x: Array) -> Array:
        resnet = nn.remat(ResnetBlock) if self.remat else ResnetBlock
        attend = nn.remat(SpatialAttention) if self.remat else SpatialAttention
        options = (self.config.groups, EPSILON, self.dtype)
        x = resnet(x.shape[-1], *options, name='resnets_0')(x)
        if self.config.attention:
            x = attend(1, *options, name='attentions_0')(x)
        return resnet(x.shape[-1], *options, name='resnets_1')(x)


# Options of diffusers, at the values that the network above implements.
NEUTRAL: dict[str, Any] = {
    'act_fn': ('silu', 'swish'),
    'force_upcast': None,  # the caller chooses the dtype
    'latents_mean': (None,),
    'latents_std': (None,),
    'sample_size': None,
    'shift_factor': (None, 0),
}
READ = {'in_channels', 'out_channels', 'latent_channels', 'block_out_channels', 'layers_per_block',
        'norm_num_groups', 'scaling_factor', 'mid_block_add_attention', 'use_quant_conv',
        'use_post_quant_conv', 'down_block_types', 'up_block_types'}  # fmt: skip
TYPES = {'down_block_types': 'DownEncoderBlock2D', 'up_block_types': 'UpDecoderBlock2D'}


def from_config(config: Mapping[str, Any], where: str = 'config.json') -> VAEConfig:
    """The architecture of a diffusers configuration, as in vae/config.json.

    Raises:
      DiffusionError: for a class, a kind of block or an option that is not supported, or a field
        that is missing or makes no sense.
    """
    if config.get('_class_name') != 'AutoencoderKL':
        raise DiffusionError(
            f'{where} is of a {config.get("_class_name")!r}: expected AutoencoderKL.'
        )
    neutral(config, READ, NEUTRAL, where)
    widths = wholes(config, 'block_out_channels', where)
    for name, kind in TYPES.items():
        given = field(config, name, where)
        if list(given) != [kind] * len(widths):
            raise DiffusionError(
                f'{where} has {name}={given}: expected {len(widths)} (as many as '
                f'block_out_channels) times {kind}.'
            )
    groups = whole({'norm_num_groups': 32} | dict(config), 'norm_num_groups', where)
    return VAEConfig(
        in_channels=whole(config, 'in_channels', where),
        out_channels=whole(config, 'out_channels', where),
        latent_channels=whole(config, 'latent_channels', where),
        widths=divisible(widths, groups, where),
        blocks=whole(config, 'layers_per_block', where, DEPTH),
        groups=groups,
        scaling=float(config.get('scaling_factor', 0.18215)),
        attention=bool(config.get('mid_block_add_attention', True)),
        quant=bool(config.get('use_quant_conv', True)),
        post_quant=bool(config.get('use_post_quant_conv', True)),
    )
