"""MobileNetV3 (Howard et al. 2019), large and small, named as in torchvision.

``features.4.block.1.0`` is ``features_4/block_1_0`` here.  Dropout is left out: every classifier
of this zoo is a function of its weights and images alone.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax.numpy as jnp
from flax import linen as nn

from dfkd_jax.models import layers
from dfkd_jax.models.layers import Array, BatchNorm, Dtype, Output

Norm = partial(BatchNorm, momentum=0.99, epsilon=1e-3)


class Sizes(NamedTuple):
    """A block: a row of the paper's tables 1 and 2."""

    size: int  # of the depthwise kernel
    hidden: int  # channels of the depthwise convolution
    features: int  # channels that leave the block
    squeeze: bool  # with squeeze-and-excitation
    swish: bool  # h-swish, or ReLU
    stride: int


LARGE = (
    Sizes(3, 16, 16, False, False, 1),
    Sizes(3, 64, 24, False, False, 2),
    Sizes(3, 72, 24, False, False, 1),
    Sizes(5, 72, 40, True, False, 2),
    Sizes(5, 120, 40, True, False, 1),
    Sizes(5, 120, 40, True, False, 1),
    Sizes(3, 240, 80, False, True, 2),
    Sizes(3, 200, 80, False, True, 1),
    Sizes(3, 184, 80, False, True, 1),
    Sizes(3, 184, 80, False, True, 1),
    Sizes(3, 480, 112, True, True, 1),
    Sizes(3, 672, 112, True, True, 1),
    Sizes(5, 672, 160, True, True, 2),
    Sizes(5, 960, 160, True, True, 1),
    Sizes(5, 960, 160, True, True, 1),
)
SMALL = (
    Sizes(3, 16, 16, True, False, 2),
    Sizes(3, 72, 24, False, False, 2),
    Sizes(3, 88, 24, False, False, 1),
    Sizes(5, 96, 40, True, True, 2),
    Sizes(5, 240, 40, True, True, 1),
    Sizes(5, 240, 40, True, True, 1),
    Sizes(5, 120, 48, True, True, 1),
    Sizes(5, 144, 48, True, True, 1),
    Sizes(5, 288, 96, True, True, 2),
    Sizes(5, 576, 96, True, True, 1),
    Sizes(5, 576, 96, True, True, 1),
)


def multiple_of_8(channels: float) -> int:
    """The nearest multiple of 8, 8 at least, and the next one where that loses over a tenth."""
    nearest = max(8, int(channels + 4) // 8 * 8)
    return nearest if nearest >= 0.9 * channels else nearest + 8


class Bottleneck(nn.Module):
    """1x1 to the hidden width if it differs, depthwise, 1x1 to `features`; a sum if that fits."""

    sizes: Sizes
    axis_name: str | None = None
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array, train: bool) -> tuple[Array, dict]:
        def norm(x: Array, name: str) -> Array:
            batch_norm = Norm(axis_name=self.axis_name, dtype=self.dtype, name=name)
            x, taps[name] = batch_norm(x, train)
            return x

        taps: dict = {}
        hidden = self.sizes.hidden
        activation = nn.hard_swish if self.sizes.swish else nn.relu
        conv = partial(layers.conv, kernel_init=layers.he_normal, dtype=self.dtype)
        y, n = x, 0  # n: torchvision numbers the parts that are there
        if hidden != x.shape[-1]:
            y = activation(norm(conv(y, hidden, 1, name='block_0_0'), 'block_0_1'))
            n = 1
        y = conv(y, hidden, self.sizes.size, stride=self.sizes.stride, groups=hidden,
                 name=f'block_{n}_0')  # fmt: skip
        y = activation(norm(y, f'block_{n}_1'))
        if self.sizes.squeeze:
            n += 1
            y = layers.SqueezeExcite(multiple_of_8(hidden / 4), gate=nn.hard_sigmoid,
                                     kernel_init=layers.he_normal,
                                     bias_init=nn.initializers.zeros, dtype=self.dtype,
                                     name=f'block_{n}')(y)  # fmt: skip
        y = conv(y, self.sizes.features, 1, name=f'block_{n + 1}_0')
        y = norm(y, f'block_{n + 1}_1')
        if self.sizes.stride == 1 and x.shape[-1] == self.sizes.features:
            y = x + y
        return y, taps


class MobileNetV3(nn.Module):
    """MobileNetV3 of width 1, for images of 32 px and more (224 as published).

    blocks: the table of the paper.
    width: channels of the layer before the last one.
    """

    blocks: tuple[Sizes, ...]
    width: int
    num_classes: int = 10
    axis_name: str | None = None
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, images: Array, train: bool = False) -> Output:
        """Classifies images [B, H, W, channels]."""

        def conv_norm(x: Array, features: int, size: int, stride: int, name: str) -> Array:
            conv, norm = f'{name}_0', f'{name}_1'
            x = layers.conv(x, features, size, stride=stride, name=conv,
                            kernel_init=layers.he_normal, dtype=self.dtype)  # fmt: skip
            batch_norm = Norm(axis_name=self.axis_name, dtype=self.dtype, name=norm)
            x, taps[norm] = batch_norm(x, train)
            return nn.hard_swish(x)

        taps: dict = {}
        maps: dict = {}
        x = conv_norm(images.astype(self.dtype), 16, 3, 2, 'features_0')
        for n, sizes in enumerate(self.blocks, start=1):
            name = f'features_{n}'
            x, taps[name] = Bottleneck(sizes, self.axis_name, self.dtype, name=name)(x, train)
            maps[x.shape[1:3]] = x
        x = conv_norm(x, 6 * x.shape[-1], 1, 1, f'features_{len(self.blocks) + 1}')

        linear = partial(layers.linear, kernel_init=nn.initializers.normal(0.01),
                         bias_init=nn.initializers.zeros)  # fmt: skip
        pooled = jnp.mean(layers.wide(x), (1, 2))
        features = nn.hard_swish(linear(pooled, self.width, name='classifier_0'))
        logits = linear(features, self.num_classes, name='classifier_3')
        return Output(logits, features, taps, tuple(maps.values()))
