"""Vision transformers (Dosovitskiy et al. 2021) of the sizes of DeiT (Touvron et al. 2021).

``blocks.3.attn.qkv`` of timm's file is ``blocks_3/attn/qkv`` here.  Dropout and stochastic depth
are left out: every classifier of this zoo is a function of its weights and images alone.  There is
no batch norm, so there are no statistics.
"""

from __future__ import annotations

import math
from functools import partial

import jax
import jax.numpy as jnp
from flax import linen as nn

from dfkd_jax.models import layers
from dfkd_jax.models.layers import Array, Dtype, LayerNorm, Output

linear = partial(layers.linear, kernel_init=layers.normal_002,
                 bias_init=nn.initializers.zeros)  # fmt: skip


class Attention(nn.Module):
    """Self-attention between all tokens of an image."""

    heads: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """[B, N, D] -> [B, N, D]; D is a multiple of `heads`."""
        batch, tokens, width = x.shape
        size = width // self.heads
        qkv = linear(x, 3 * width, name='qkv').reshape(batch, tokens, 3, self.heads, size)
        query, key, value = (qkv[:, :, i] for i in range(3))
        weight = jnp.einsum('bqhd,bkhd->bhqk', query * size**-0.5, key)
        weight = nn.softmax(layers.wide(weight)).astype(x.dtype)
        y = jnp.einsum('bhqk,bkhd->bqhd', weight, value)
        return linear(y.reshape(x.shape), width, name='proj')


class Block(nn.Module):
    """Attention and two linear layers with a GELU, each behind a layer norm and added to `x`."""

    heads: int
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """[B, N, D] -> [B, N, D]."""
        width = x.shape[-1]
        x = x + Attention(self.heads, name='attn')(LayerNorm(dtype=self.dtype, name='norm1')(x))
        y = linear(LayerNorm(dtype=self.dtype, name='norm2')(x), 4 * width, name='fc1')
        return x + linear(nn.gelu(y, approximate=False), width, name='fc2')


def positions(table: Array, height: int, width: int) -> Array:
    """The positions of the class token and of `height` rows of `width` tokens, [1, N, D].

    table: those that were learned, of the class token and of a square, [1, 1 + side * side, D].
    """
    side, features = math.isqrt(table.shape[1] - 1), table.shape[-1]
    if (height, width) == (side, side):
        return table
    grid = table[:, 1:].reshape(1, side, side, features)
    grid = jax.image.resize(grid, (1, height, width, features), 'cubic', antialias=True)
    return jnp.concatenate((table[:, :1], grid.reshape(1, -1, features)), axis=1)


class ViT(nn.Module):
    """Patches to tokens, a class token before them, learned positions, blocks, a linear layer.

    width, depth, heads: of the blocks.
    patch: side of the patches, in px; images are a multiple of it.
    image_size: side of the images, in px, for which there are positions.
    axis_name: unused, for there is no batch norm.
    """

    width: int
    depth: int
    heads: int
    patch: int = 16
    image_size: int = 224
    num_classes: int = 10
    axis_name: str | None = None
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, images: Array, train: bool = False) -> Output:
        """Classifies images [B, H, W, channels], of any size that divides into patches.

        Where it is not `image_size`, the positions are interpolated, as timm's `dynamic_img_size`
        does it: bicubically, and smoothed where they become fewer.  Raises ValueError where images
        do not divide into patches.
        """
        del train  # nothing here differs in training
        batch, height, width = images.shape[:3]
        if height % self.patch or width % self.patch:
            raise ValueError(
                f'images of {height}x{width} px do not divide into patches of {self.patch}: resize '
                f'or pad them to a multiple of {self.patch}'
            )
        x = layers.conv(images.astype(self.dtype), self.width, self.patch, stride=self.patch,
                        padding=0, bias=True, name='patch_embed', dtype=self.dtype)  # fmt: skip
        grid = x.shape[1:3]
        token = self.param('cls_token', nn.initializers.normal(1e-6), (1, 1, self.width),
                           jnp.float32)  # fmt: skip
        token = jnp.broadcast_to(token.astype(self.dtype), (batch, 1, self.width))
        x = jnp.concatenate((token, x.reshape(batch, -1, self.width)), axis=1)
        table = self.param('pos_embed', layers.normal_002,
                           (1, 1 + (self.image_size // self.patch) ** 2, self.width),
                           jnp.float32)  # fmt: skip
        x = x + positions(table, *grid).astype(self.dtype)
        for i in range(self.depth):
            x = Block(self.heads, self.dtype, name=f'blocks_{i}')(x)
        x = LayerNorm(dtype=self.dtype, name='norm')(x)

        features = layers.wide(x[:, 0])
        logits = linear(features, self.num_classes, name='head')
        return Output(logits, features, {}, (x[:, 1:].reshape(batch, *grid, -1),))
