"""ConvNeXt (Liu et al. 2022): depthwise 7x7 convolutions, layer norms, GELU and layer scale.

``stages.1.0.dwconv`` of the authors' file is ``stages_1_0/dwconv`` here.  Stochastic depth is left
out: every classifier of this zoo is a function of its weights and images alone.  There is no batch
norm, so there are no statistics.
"""

from __future__ import annotations

from functools import partial

import jax.numpy as jnp
from flax import linen as nn

from dfkd_jax.models import layers
from dfkd_jax.models.layers import Array, Dtype, LayerNorm, Output

conv = partial(layers.conv, kernel_init=layers.normal_002, bias_init=nn.initializers.zeros)
linear = partial(layers.linear, kernel_init=layers.normal_002, bias_init=nn.initializers.zeros)


class Block(nn.Module):
    """Depthwise 7x7, layer norm, a linear layer to four times the width, GELU, and one back."""

    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """[B, H, W, C] -> [B, H, W, C]; a learned scale, gamma, opens the residual."""
        channels = x.shape[-1]
        y = conv(x, channels, 7, groups=channels, bias=True, name='dwconv', dtype=self.dtype)
        y = LayerNorm(dtype=self.dtype, name='norm')(y)
        y = linear(y, 4 * channels, name='pwconv1')
        y = linear(nn.gelu(y, approximate=False), channels, name='pwconv2')
        gamma = self.param('gamma', nn.initializers.constant(1e-6), (channels,), jnp.float32)
        return x + y * gamma.reshape(1, 1, 1, -1).astype(self.dtype)


class ConvNeXt(nn.Module):
    """A stem of 4x4 patches and four stages, for images of 32 px and more (224 as published).

    depths, widths: blocks and channels of each stage.
    axis_name: unused, for there is no batch norm.
    """

    depths: tuple[int, ...]
    widths: tuple[int, ...]
    num_classes: int = 10
    axis_name: str | None = None
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, images: Array, train: bool = False) -> Output:
        """Classifies images [B, H, W, channels].  Raises ValueError where they pool to nothing."""
        del train  # nothing here differs in training
        height, width = images.shape[1:3]
        if min(height, width) < 32:
            raise ValueError(
                f'ConvNeXt needs images of 32 px and more, not {height}x{width}: resize them'
            )
        norm = partial(LayerNorm, dtype=self.dtype)
        patches = partial(conv, padding=0, bias=True, dtype=self.dtype)
        maps = []
        x = images.astype(self.dtype)
        for stage, (depth, channels) in enumerate(zip(self.depths, self.widths, strict=True)):
            if stage == 0:
                x = patches(x, channels, 4, stride=4, name='stem_conv')
                x = norm(name='stem_norm')(x)
            else:
                x = norm(name=f'downsample_{stage}_norm')(x)
                x = patches(x, channels, 2, stride=2, name=f'downsample_{stage}_conv')
            for i in range(depth):
                x = Block(self.dtype, name=f'stages_{stage}_{i}')(x)
            maps.append(x)

        features = LayerNorm(name='norm')(jnp.mean(layers.wide(x), (1, 2)))
        logits = linear(features, self.num_classes, name='head')
        return Output(logits, features, {}, tuple(maps))
