"""The layers of the U-Nets, the autoencoder and the text encoder.

Module names are those of diffusers and transformers, with `_N` for `.N`, so the path of a weight
here gives its name there (`folder.torch_name`).  Maps are channels-last and parameters float32.
`dtype` is that of the arithmetic; norms and softmax reduce in float32 whatever it is.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import linen as nn

from dfkd_jax.models import layers
from dfkd_jax.models.layers import Array, Dtype

SELF = ('to_q', 'to_k', 'to_v', 'to_out_0')  # diffusers' names of the projections of attention


def conv(x: Array, features: int, size: int, *, name: str, dtype: Dtype) -> Array:
    """A convolution with a bias that keeps the map's size."""
    return layers.conv(x, features, size, bias=True, name=name, dtype=dtype)


def group_norm(x: Array, groups: int, epsilon: float, *, name: str, dtype: Dtype) -> Array:
    """Group normalisation over neighbouring channels, as torch.nn.GroupNorm."""
    return GroupNorm(groups, epsilon, dtype, name=name)(x)


class GroupNorm(nn.Module):
    """`nn.GroupNorm`, ten times as fast on CPUs: it sums over pixels first, then over channels."""

    groups: int
    epsilon: float
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """[B, H, W, C] -> the same."""
        channels = x.shape[-1]
        scale = self.param('scale', nn.initializers.ones, (channels,), jnp.float32)
        bias = self.param('bias', nn.initializers.zeros, (channels,), jnp.float32)

        def group_mean(x: Array) -> Array:
            """[B, H, W, C] -> [B, 1, 1, C]: the mean of each group, for each of its channels."""
            means = jnp.mean(x, (1, 2)).reshape(len(x), self.groups, -1)
            means = jnp.broadcast_to(jnp.mean(means, -1, keepdims=True), means.shape)
            return means.reshape(len(x), 1, 1, channels)

        # Not E[x^2] - E[x]^2, which loses three digits where the mean is large.
        y = x.astype(jnp.float32)
        y = y - group_mean(y)
        factor = jax.lax.rsqrt(group_mean(jnp.square(y)) + self.epsilon)
        return (y * (factor * row(scale)) + row(bias)).astype(self.dtype)


def row(x: Array) -> Array:
    """[C] -> [1, 1, 1, C], to broadcast with a map [B, H, W, C]."""
    return x[None, None, None, :]


def layer_norm(x: Array, epsilon: float, *, name: str, dtype: Dtype) -> Array:
    """Layer normalisation over the channels, as torch.nn.LayerNorm."""
    return nn.LayerNorm(epsilon=epsilon, use_fast_variance=False, dtype=dtype, name=name)(x)


def attention(
    x: Array,
    context: Array,
    heads: int,
    *,
    dtype: Dtype,
    bias: bool = True,
    names: tuple[str, str, str, str] = SELF,
    causal: bool = False,
) -> Array:
    """Scaled dot-product attention of x [B, L, C] to a context [B, M, D]; returns [B, L, C].

    bias: whether the projections to queries, keys and values have one (that of the output has).
    """
    batch, length, channels = x.shape

    def project(x: Array, name: str) -> Array:
        y = nn.Dense(
            channels, bias, dtype=dtype, name=name, kernel_init=layers.torch_uniform(x.shape[-1])
        )(x)
        return y.reshape(batch, -1, heads, channels // heads)

    query, key, value = project(x, names[0]), project(context, names[1]), project(context, names[2])
    mixed = jax.nn.dot_product_attention(query, key, value, is_causal=causal)
    return layers.linear(
        mixed.reshape(batch, length, channels), channels, name=names[3], dtype=dtype
    )


class ResnetBlock(nn.Module):
    """GroupNorm-SiLU-conv twice, with the time embedding in between, plus the shortcut."""

    features: int
    groups: int
    epsilon: float
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array, time: Array | None = None) -> Array:
        """[B, H, W, C] and, in a U-Net, the time embedding [B, E] -> [B, H, W, features]."""
        at = {'dtype': self.dtype}
        y = nn.silu(group_norm(x, self.groups, self.epsilon, name='norm1', **at))
        y = conv(y, self.features, 3, name='conv1', **at)
        if time is not None:
            shift = layers.linear(nn.silu(time), self.features, name='time_emb_proj', **at)
            y = y + shift[:, None, None, :]
        y = nn.silu(group_norm(y, self.groups, self.epsilon, name='norm2', **at))
        y = conv(y, self.features, 3, name='conv2', **at)
        if x.shape[-1] != self.features:
            x = conv(x, self.features, 1, name='conv_shortcut', **at)
        return x + y


class SpatialAttention(nn.Module):
    """Self-attention over the pixels of a normalised map, plus the map."""

    heads: int
    groups: int
    epsilon: float
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """[B, H, W, C] -> the same."""
        y = group_norm(x, self.groups, self.epsilon, name='group_norm', dtype=self.dtype)
        y = y.reshape(x.shape[0], -1, x.shape[-1])
        return x + attention(y, y, self.heads, dtype=self.dtype).reshape(x.shape)


class Downsample(nn.Module):
    """A convolution with stride two; padding 0 pads below and to the right, 1 on every side."""

    padding: int
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """[B, H, W, C] -> [B, H/2, W/2, C]."""
        if self.padding == 0:
            x = jnp.pad(x, ((0, 0), (0, 1), (0, 1), (0, 0)))
        return layers.conv(x, x.shape[-1], 3, stride=2, padding=self.padding, bias=True,
                           name='conv', dtype=self.dtype)  # fmt: skip


class Upsample(nn.Module):
    """Nearest-neighbour upsampling by two, then a convolution."""

    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """[B, H, W, C] -> [B, 2H, 2W, C]."""
        return conv(layers.upsample2(x), x.shape[-1], 3, name='conv', dtype=self.dtype)
