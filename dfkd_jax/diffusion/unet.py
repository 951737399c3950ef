"""The U-Nets of latent and of pixel diffusion: diffusers' UNet2DConditionModel and UNet2DModel.

Both are one network: levels of residual blocks with or without attention, skip connections from the
way down to the way up, and the time embedding in every block.  The attention of a level is over
its own pixels (UNet2DModel), or a transformer that also attends to a text (UNet2DConditionModel;
Rombach et al. 2022).
"""

from __future__ import annotations

import dataclasses
import math
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
    attention,
    conv,
    group_norm,
    layer_norm,
)
from dfkd_jax.errors import DiffusionError
from dfkd_jax.models import layers
from dfkd_jax.models.layers import Array, Dtype

# The kind of attention in a level's blocks, by diffusers' name of the blocks.
CROSS = {'CrossAttnDownBlock2D': 'cross', 'DownBlock2D': '',
         'CrossAttnUpBlock2D': 'cross', 'UpBlock2D': ''}  # fmt: skip
SELF = {'AttnDownBlock2D': 'self', 'DownBlock2D': '', 'AttnUpBlock2D': 'self', 'UpBlock2D': ''}


@dataclasses.dataclass(frozen=True)
class UNetConfig:
    """An architecture.  Tuples have an entry for every level, from the finest map to the coarsest.

    Attributes:
      blocks: residual blocks of a level on the way down; one more on the way up.
      down, up: the attention of a level: 'self', 'cross' or '' (none); both from the finest map.
      heads: the heads of a level's attention.
      context: the width of the text states; None in a network that sees no text.
      padding: of the downsampling convolutions.
      flip_sin_to_cos, frequency_shift: of the sinusoids of the time; see `sinusoids`.
    """

    in_channels: int
    out_channels: int
    widths: tuple[int, ...]
    blocks: int
    down: tuple[str, ...]
    up: tuple[str, ...]
    heads: tuple[int, ...]
    context: int | None
    transformers: int
    linear_projection: bool
    groups: int
    epsilon: float
    padding: int
    flip_sin_to_cos: bool
    frequency_shift: float

    @property
    def middle(self) -> str:
        """The attention of the coarsest map's middle block."""
        return 'self' if self.context is None else 'cross'

    @property
    def divisor(self) -> int:
        """The number that the sides of an image must be multiples of."""
        return 2 ** (len(self.widths) - 1)


class UNet(nn.Module):
    """Predicts the noise in noisy images, or what else it was trained to predict.

    dtype: of the arithmetic.
    remat: recompute every block in the backward pass, instead of storing its activations.
    """

    config: UNetConfig
    dtype: Dtype = jnp.float32
    remat: bool = False

    @nn.compact
    def __call__(self, x: Array, t: Array, context: Array | None = None) -> Array:
        """Images [B, H, W, C], timesteps [B], text states [B, L, D] -> [B, H, W, out] float32."""
        config, at = self.config, {'dtype': self.dtype}
        options = {'config': config, 'dtype': self.dtype, 'remat': self.remat}
        levels = range(len(config.widths))

        width = config.widths[0]
        time = sinusoids(t, width, config.flip_sin_to_cos, config.frequency_shift)
        time = TimeEmbedding(4 * width, **at, name='time_embedding')(time.astype(self.dtype))
        if context is not None:
            context = context.astype(self.dtype)

        x = conv(x.astype(self.dtype), width, 3, name='conv_in', **at)
        skips = [x]
        for level in levels:
            block = Level(**options, level=level, down=True, name=f'down_blocks_{level}')
            x, new = block(x, time, context, [])
            skips += new
        x = Middle(**options, name='mid_block')(x, time, context)
        for i, level in enumerate(reversed(levels)):
            block = Level(**options, level=level, down=False, name=f'up_blocks_{i}')
            taken = config.blocks + 1
            x, _ = block(x, time, context, skips[-taken:][::-1])
            del skips[-taken:]
        x = nn.silu(group_norm(x, config.groups, config.epsilon, name='conv_norm_out', **at))
        return conv(x, config.out_channels, 3, name='conv_out', **at).astype(jnp.float32)


class Level(nn.Module):
    """The blocks of one level, on the way down or up, then the change of resolution."""

    config: UNetConfig
    level: int
    down: bool
    dtype: Dtype = jnp.float32
    remat: bool = False

    @nn.compact
    def __call__(
        self, x: Array, time: Array, context: Array | None, skips: list[Array]
    ) -> tuple[Array, list[Array]]:
        """[B, H, W, C] -> [B, H', W', C'], and the outputs of the blocks, for the way up.

        time: [B, E]; context: [B, L, D] or None.
        skips: on the way up, the map that each block is joined with.
        """
        config = self.config
        kind = (config.down if self.down else config.up)[self.level]
        new = []
        for i in range(config.blocks if self.down else config.blocks + 1):
            if not self.down:
                x = jnp.concatenate([x, skips[i]], axis=-1)
            x = _resnet(self, config.widths[self.level], f'resnets_{i}')(x, time)
            x = _attend(self, kind, self.level, f'attentions_{i}', x, context)
            new.append(x)
        if self.down and self.level + 1 < len(config.widths):
            x = Downsample(config.padding, self.dtype, name='downsamplers_0')(x)
            new.append(x)
        if not self.down and self.level > 0:
            x = Upsample(self.dtype, name='upsamplers_0')(x)
        return x, new


class Middle(nn.Module):
    """Two residual blocks with attention between them, on the coarsest map."""

    config: UNetConfig
    dtype: Dtype = jnp.float32
    remat: bool = False

    @nn.compact
    def __call__(self, x: Array, time: Array, context: Array | None) -> Array:
        """[B, H, W, C] -> the same."""
        x = _resnet(self, x.shape[-1], 'resnets_0')(x, time)
        x = _attend(self, self.config.middle, -1, 'attentions_0', x, context)
        return _resnet(self, x.shape[-1], 'resnets_1')(x, time)


def _resnet(owner: Level | Middle, features: int, name: str) -> nn.Module:
    """A residual block."""
    make = nn.remat(ResnetBlock) if owner.remat else ResnetBlock
    return make(features, owner.config.groups, owner.config.epsilon, owner.dtype, name=name)


def _attend(
    owner: Level | Middle, kind: str, level: int, name: str, x: Array, context: Array | None
) -> Array:
    """Applies the attention of a block, where it has one."""
    config = owner.config
    if kind == 'self':
        attend = nn.remat(SpatialAttention) if owner.remat else SpatialAttention
        return attend(config.heads[level], config.groups, config.epsilon, owner.dtype, name=name)(x)
    if kind == 'cross':
        assert context is not None, 'this network needs text states'
        transform = nn.remat(Transformer) if owner.remat else Transformer
        return transform(config, config.heads[level], owner.dtype, name=name)(x, context)
    return x


class Transformer(nn.Module):
    """Transformer blocks over the pixels of a normalised map, plus the map itself."""

    config: UNetConfig
    heads: int
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array, context: Array) -> Array:
        """[B, H, W, C] and text states [B, L, D] -> [B, H, W, C]."""
        config, at = self.config, {'dtype': self.dtype}
        channels = x.shape[-1]

        def project(x: Array, name: str) -> Array:
            if config.linear_projection:  # the same numbers, but weights of two axes
                return layers.linear(x, channels, name=name, **at)
            return conv(x, channels, 1, name=name, **at)

        # 1e-6, whatever the epsilon of the residual blocks is.
        y = project(group_norm(x, config.groups, 1e-6, name='norm', **at), 'proj_in')
        y = y.reshape(x.shape[0], -1, channels)
        for i in range(config.transformers):
            y = TransformerBlock(self.heads, **at, name=f'transformer_blocks_{i}')(y, context)
        return x + project(y.reshape(x.shape), 'proj_out')


class TransformerBlock(nn.Module):
    """Self-attention, attention to the text and a gated two-layer network, all residual."""

    heads: int
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array, context: Array) -> Array:
        """[B, L, C] and text states [B, M, D] -> [B, L, C]."""
        at = {'dtype': self.dtype}
        y = layer_norm(x, 1e-5, name='norm1', **at)
        x = x + Attention(self.heads, **at, name='attn1')(y, y)
        y = layer_norm(x, 1e-5, name='norm2', **at)
        x = x + Attention(self.heads, **at, name='attn2')(y, context)
        return x + FeedForward(**at, name='ff')(layer_norm(x, 1e-5, name='norm3', **at))


class Attention(nn.Module):
    """`layers.attention` under a name of its own, without biases of queries, keys and values."""

    heads: int
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array, context: Array) -> Array:
        return attention(x, context, self.heads, bias=False, dtype=self.dtype)


class FeedForward(nn.Module):
    """A linear layer to four times the width, gated by a second one, and a linear layer back."""

    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        wide = Gate(4 * x.shape[-1], self.dtype, name='net_0')(x)
        return layers.linear(wide, x.shape[-1], name='net_2', dtype=self.dtype)


class Gate(nn.Module):
    """GEGLU (Shazeer 2020), with the exact GELU."""

    features: int
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        y = layers.linear(x, 2 * self.features, name='proj', dtype=self.dtype)
        value, gate = jnp.split(y, 2, axis=-1)
        return value * nn.gelu(gate, approximate=False)


class TimeEmbedding(nn.Module):
    """Two linear layers on the sinusoids of the time."""

    features: int
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, time: Array) -> Array:
        y = nn.silu(layers.linear(time, self.features, name='linear_1', dtype=self.dtype))
        return layers.linear(y, self.features, name='linear_2', dtype=self.dtype)


def sinusoids(t: Array, width: int, flip_sin_to_cos: bool, shift: float) -> Array:
    """Sines and cosines [B, width] of timesteps [B], at wavelengths from 2 pi to 20000 pi; float32.

    flip_sin_to_cos: the cosines come first.
    shift: 1 makes the longest wavelength exactly 20000 pi.
    """
    half = width // 2
    frequency = jnp.exp(-math.log(10000) / (half - shift) * jnp.arange(half, dtype=jnp.float32))
    angle = t.astype(jnp.float32)[:, None] * frequency[None, :]
    parts = [jnp.sin(angle), jnp.cos(angle)]
    return jnp.concatenate(parts[::-1] if flip_sin_to_cos else parts, axis=-1)


# --- Configurations ------------------------------------------------------------------------

# Options of diffusers, at the values that the network above implements.
COMMON: dict[str, Any] = {
    'act_fn': ('silu', 'swish'),
    'center_input_sample': (False,),
    'class_embed_type': (None,),
    'dropout': None,  # only in training
    'mid_block_scale_factor': (1,),
    'num_class_embeds': (None,),
    'resnet_time_scale_shift': ('default',),
    'sample_size': None,
    'time_embedding_dim': (None,),
    'time_embedding_type': ('positional',),
}
CONDITIONAL = COMMON | {
    'addition_embed_type_num_heads': None,
    'attention_type': ('default',),
    'conv_in_kernel': (3,),
    'conv_out_kernel': (3,),
    'mid_block_type': ('UNetMidBlock2DCrossAttn',),
    'num_attention_heads': (None,),
    'resnet_out_scale_factor': (1,),
    'upcast_attention': None,  # softmax is always in float32
}
UNCONDITIONAL = COMMON | {
    'add_attention': (True,),
    'downsample_type': ('conv',),
    'mid_block_type': ('UNetMidBlock2D',),
    'num_train_timesteps': None,
    'upsample_type': ('conv',),
}
READ = {'in_channels', 'out_channels', 'block_out_channels', 'layers_per_block', 'norm_eps',
        'down_block_types', 'up_block_types', 'attention_head_dim', 'norm_num_groups',
        'downsample_padding', 'flip_sin_to_cos', 'freq_shift'}  # fmt: skip


def from_config(config: Mapping[str, Any], where: str = 'config.json') -> UNetConfig:
    """The architecture of a diffusers configuration, as in unet/config.json.

    Raises:
      DiffusionError: for a class, a kind of block or an option that is not supported, or a field
        that is missing or makes no sense.
    """
    name = config.get('_class_name')
    if name == 'UNet2DConditionModel':
        read = READ | {
            'cross_attention_dim',
            'use_linear_projection',
            'transformer_layers_per_block',
        }
        neutral(config, read, CONDITIONAL, where)
        return _architecture(config, CROSS, whole(config, 'cross_attention_dim', where), where)
    if name == 'UNet2DModel':
        groups = (None, config.get('norm_num_groups', 32))
        neutral(config, READ, UNCONDITIONAL | {'attn_norm_num_groups': groups}, where)
        return _architecture(config, SELF, None, where)
    raise DiffusionError(
        f'{where} is of a {name!r}: expected UNet2DConditionModel (Stable Diffusion 1.x, 2.x) or '
        'UNet2DModel (pixels).'
    )


def _architecture(
    config: Mapping[str, Any], kinds: Mapping[str, str], context: int | None, where: str
) -> UNetConfig:
    widths = wholes(config, 'block_out_channels', where)
    groups = whole({'norm_num_groups': 32} | dict(config), 'norm_num_groups', where)
    padding = config.get('downsample_padding', 1)
    if padding not in (0, 1):
        raise DiffusionError(f'{where} has downsample_padding={padding!r}: expected 0 or 1.')
    return UNetConfig(
        in_channels=whole(config, 'in_channels', where),
        out_channels=whole(config, 'out_channels', where),
        widths=divisible(widths, groups, where),
        blocks=whole(config, 'layers_per_block', where, DEPTH),
        down=_kinds(config, 'down_block_types', kinds, len(widths), where),
        up=_kinds(config, 'up_block_types', kinds, len(widths), where)[::-1],
        heads=_heads(config, widths, context, where),
        context=context,
        transformers=whole({'n': 1} | {'n': config.get('transformer_layers_per_block', 1)}, 'n',
                           f'{where}, in transformer_layers_per_block,', DEPTH),
        linear_projection=bool(config.get('use_linear_projection', False)),
        groups=groups,
        epsilon=float(config.get('norm_eps', 1e-5)),
        padding=padding,
        flip_sin_to_cos=bool(config.get('flip_sin_to_cos', True)),
        frequency_shift=config.get('freq_shift', 0),
    )  # fmt: skip


def divisible(widths: tuple[int, ...], groups: int, where: str) -> tuple[int, ...]:
    """Returns `widths`.  Raises DiffusionError unless the normalisation's groups divide them."""
    if any(width % groups for width in widths):
        raise DiffusionError(
            f'{where} has block_out_channels={list(widths)} and norm_num_groups={groups}: expected '
            'channels that divide into the groups.'
        )
    return widths


def _kinds(
    config: Mapping[str, Any], name: str, kinds: Mapping[str, str], levels: int, where: str
) -> tuple[str, ...]:
    """The attention of each level, from a list of block types."""
    given, side = field(config, name, where), 'Down' if name.startswith('down') else 'Up'
    known = [kind for kind in kinds if side in kind]
    unknown = sorted({str(kind) for kind in given if kind not in known})
    if unknown or len(given) != levels:
        raise DiffusionError(
            f'{where} has {name}={list(given)}: expected {levels} (as many as block_out_channels) '
            f'of {", ".join(known)}' + (f', not {", ".join(unknown)}.' if unknown else '.')
        )
    return tuple(kinds[kind] for kind in given)


def _heads(
    config: Mapping[str, Any], widths: tuple[int, ...], context: int | None, where: str
) -> tuple[int, ...]:
    """The number of heads of every level, from `attention_head_dim`.

    In a UNet2DConditionModel that is the number itself, by a mistake that became diffusers' format.
    In a UNet2DModel it is the width of a head, and null means a single head.
    """
    given = config.get('attention_head_dim', 8)
    if context is None:
        if given is None:
            return (1,) * len(widths)
        size = whole({'attention_head_dim': given}, 'attention_head_dim', where)
        heads, whole_heads = tuple(w // size for w in widths), not any(w % size for w in widths)
    else:
        many = given if isinstance(given, list | tuple) else [given] * len(widths)
        heads = wholes({'attention_head_dim': many}, 'attention_head_dim', where)
        whole_heads = len(heads) == len(widths) and not any(w % h for w, h in zip(widths, heads))
    if not whole_heads:
        raise DiffusionError(
            f'{where} has attention_head_dim={given!r}, which does not divide '
            f'block_out_channels={list(widths)}: expected a number, or one per level, that does.'
        )
    return heads
