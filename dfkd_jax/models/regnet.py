"""RegNet-Y (Radosavovic et al. 2020): residual bottlenecks with groups and squeeze-and-excitation.

Named as in torchvision: ``trunk_output.block2.block2-1.f.a.0`` is ``block2_1/a_0`` here.
"""

from __future__ import annotations

import jax.numpy as jnp
from flax import linen as nn

from dfkd_jax.models import layers
from dfkd_jax.models.layers import Array, BatchNorm, Dtype, Output


class YBlock(nn.Module):
    """1x1, 3x3 in groups, squeeze-and-excitation, 1x1, all of one width; plus the shortcut."""

    features: int
    stride: int
    group_width: int
    axis_name: str | None = None
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array, train: bool) -> tuple[Array, dict]:
        def conv_norm(x: Array, size: int, stride: int, groups: int, name: str) -> Array:
            conv, norm = f'{name}_0', f'{name}_1'
            x = layers.conv(x, self.features, size, stride=stride, groups=groups, name=conv,
                            kernel_init=layers.he_normal, dtype=self.dtype)  # fmt: skip
            batch_norm = BatchNorm(axis_name=self.axis_name, dtype=self.dtype, name=norm)
            x, taps[norm] = batch_norm(x, train)
            return x

        taps: dict = {}
        y = nn.relu(conv_norm(x, 1, 1, 1, 'a'))
        y = nn.relu(conv_norm(y, 3, self.stride, self.features // self.group_width, 'b'))
        # A quarter of the channels that enter the block, not of its own.
        y = layers.SqueezeExcite(round(x.shape[-1] / 4), kernel_init=layers.he_normal,
                                 dtype=self.dtype, name='se')(y)  # fmt: skip
        y = conv_norm(y, 1, 1, 1, 'c')
        if self.stride != 1 or x.shape[-1] != self.features:
            x = conv_norm(x, 1, self.stride, 1, 'proj')
        return nn.relu(x + y), taps


class RegNetY(nn.Module):
    """A 3x3 stem and four stages, each halving the map, for images of 32 px and more.

    depths, widths: blocks and channels of each stage.
    group_width: channels of each group of the 3x3 convolutions.
    """

    depths: tuple[int, ...]
    widths: tuple[int, ...]
    group_width: int
    num_classes: int = 10
    axis_name: str | None = None
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, images: Array, train: bool = False) -> Output:
        """Classifies images [B, H, W, channels]."""
        taps: dict = {}
        maps: dict = {}
        x = layers.conv(images.astype(self.dtype), 32, 3, stride=2, name='stem_0',
                        kernel_init=layers.he_normal, dtype=self.dtype)  # fmt: skip
        batch_norm = BatchNorm(axis_name=self.axis_name, dtype=self.dtype, name='stem_1')
        x, taps['stem_1'] = batch_norm(x, train)
        x = nn.relu(x)
        for stage, (depth, width) in enumerate(zip(self.depths, self.widths, strict=True), start=1):
            for i in range(depth):
                name = f'block{stage}_{i}'
                block = YBlock(width, 1 if i else 2, self.group_width, self.axis_name, self.dtype,
                               name=name)  # fmt: skip
                x, taps[name] = block(x, train)
            maps[x.shape[1:3]] = x

        features = jnp.mean(layers.wide(x), (1, 2))
        logits = layers.linear(features, self.num_classes, name='fc',
                               kernel_init=nn.initializers.normal(0.01),
                               bias_init=nn.initializers.zeros)  # fmt: skip
        return Output(logits, features, taps, tuple(maps.values()), x)
