"""EfficientNet-Lite0 (Liu 2020, after Tan & Le 2019): ReLU6 and no squeeze-and-excitation.

As in TensorFlow's original and its PyTorch port: 'SAME' padding, batch norms of epsilon 1e-3 and
momentum 0.99.  ``_blocks.3._bn1`` is ``blocks_3/bn1`` here.  Dropout and stochastic depth are left
out: every classifier of this zoo is a function of its weights and images alone.
"""

from __future__ import annotations

from functools import partial

import jax.numpy as jnp
from flax import linen as nn

from dfkd_jax.models import layers
from dfkd_jax.models.layers import Array, BatchNorm, Dtype, Output

# Expansion, kernel size, output channels, blocks, stride of the first block.
STAGES = (
    (1, 3, 16, 1, 1),
    (6, 3, 24, 2, 2),
    (6, 5, 40, 2, 2),
    (6, 3, 80, 3, 2),
    (6, 5, 112, 3, 1),
    (6, 5, 192, 4, 2),
    (6, 3, 320, 1, 1),
)

LiteNorm = partial(BatchNorm, momentum=0.99, epsilon=1e-3)


class MBConv(nn.Module):
    """1x1 to `expand` times the channels, depthwise, 1x1 to `features`; a sum if that fits."""

    features: int
    stride: int
    expand: int
    size: int
    axis_name: str | None = None
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array, train: bool) -> tuple[Array, dict]:
        def norm(x: Array, name: str) -> Array:
            batch_norm = LiteNorm(axis_name=self.axis_name, dtype=self.dtype, name=name)
            y, taps[name] = batch_norm(x, train)
            return y

        taps: dict = {}
        hidden = self.expand * x.shape[-1]
        y = x
        if self.expand != 1:
            y = layers.conv(y, hidden, 1, name='expand_conv', dtype=self.dtype)
            y = nn.relu6(norm(y, 'bn0'))
        y = layers.conv(y, hidden, self.size, stride=self.stride, padding='SAME', groups=hidden,
                        name='depthwise_conv', dtype=self.dtype)  # fmt: skip
        y = nn.relu6(norm(y, 'bn1'))
        y = norm(layers.conv(y, self.features, 1, name='project_conv', dtype=self.dtype), 'bn2')
        if self.stride == 1 and x.shape[-1] == self.features:
            y = x + y
        return y, taps


class EfficientNetLite0(nn.Module):
    """EfficientNet-Lite0, for images of 32 px and more (224 as published)."""

    num_classes: int = 10
    axis_name: str | None = None
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, images: Array, train: bool = False) -> Output:
        """Classifies images [B, H, W, channels], published for (pixel - 127) / 128."""

        def norm(x: Array, name: str) -> Array:
            batch_norm = LiteNorm(axis_name=self.axis_name, dtype=self.dtype, name=name)
            y, taps[name] = batch_norm(x, train)
            return nn.relu6(y)

        taps: dict = {}
        maps: dict = {}
        x = layers.conv(images.astype(self.dtype), 32, 3, stride=2, padding='SAME',
                        name='conv_stem', dtype=self.dtype)  # fmt: skip
        x = norm(x, 'bn0')
        blocks = [
            (width, stride if i == 0 else 1, expand, size)
            for expand, size, width, depth, stride in STAGES
            for i in range(depth)
        ]
        for n, sizes in enumerate(blocks):
            name = f'blocks_{n}'
            x, taps[name] = MBConv(*sizes, self.axis_name, self.dtype, name=name)(x, train)
            maps[x.shape[1:3]] = x
        x = norm(layers.conv(x, 1280, 1, name='conv_head', dtype=self.dtype), 'bn1')

        features = jnp.mean(layers.wide(x), (1, 2))
        logits = layers.linear(features, self.num_classes, name='fc')
        return Output(logits, features, taps, tuple(maps.values()))
