"""ShuffleNetV2 (Ma et al. 2018), the ImageNet network, named as in torchvision.

``stage2.0.branch1.2`` is ``stage2_0/branch1_2`` here.
"""

from __future__ import annotations

import jax.numpy as jnp
from flax import linen as nn

from dfkd_jax.models import layers
from dfkd_jax.models.layers import Array, BatchNorm, Dtype, Output

DEPTHS = (4, 8, 4)  # units of stages 2, 3 and 4


def shuffle(x: Array) -> Array:
    """Takes channels from the first and the second half in turn; [B, H, W, C] with even C."""
    n, h, w, c = x.shape
    return x.reshape(n, h, w, 2, c // 2).swapaxes(3, 4).reshape(x.shape)


class Unit(nn.Module):
    """Half of the channels pass by, the others through 1x1, depthwise 3x3 and 1x1; then a shuffle.

    With stride 2, all channels go both ways, through a depthwise 3x3 and a 1x1 on the first one.
    """

    features: int
    stride: int
    axis_name: str | None = None
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array, train: bool) -> tuple[Array, dict]:
        """[B, H, W, C] -> [B, H / stride, W / stride, features]."""
        half = self.features // 2

        def norm(x: Array, name: str) -> Array:
            batch_norm = BatchNorm(axis_name=self.axis_name, dtype=self.dtype, name=name)
            x, taps[name] = batch_norm(x, train)
            return x

        def pointwise(x: Array, branch: str, n: int) -> Array:
            x = layers.conv(x, half, 1, name=f'{branch}_{n}', dtype=self.dtype)
            return nn.relu(norm(x, f'{branch}_{n + 1}'))

        def depthwise(x: Array, branch: str, n: int) -> Array:
            x = layers.conv(x, x.shape[-1], 3, stride=self.stride, groups=x.shape[-1],
                            name=f'{branch}_{n}', dtype=self.dtype)  # fmt: skip
            return norm(x, f'{branch}_{n + 1}')

        taps: dict = {}
        if self.stride == 1:
            first, second = jnp.split(x, 2, axis=-1)
        else:
            first, second = pointwise(depthwise(x, 'branch1', 0), 'branch1', 2), x
        second = depthwise(pointwise(second, 'branch2', 0), 'branch2', 3)
        second = pointwise(second, 'branch2', 5)
        return shuffle(jnp.concatenate((first, second), axis=-1)), taps


class ShuffleNetV2(nn.Module):
    """ShuffleNetV2, for images of 32 px and more (224 as published).

    widths: channels of stages 2, 3 and 4.
    """

    widths: tuple[int, int, int]
    num_classes: int = 10
    axis_name: str | None = None
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, images: Array, train: bool = False) -> Output:
        """Classifies images [B, H, W, channels]."""

        def conv_norm(x: Array, features: int, size: int, stride: int, name: str) -> Array:
            conv, norm = f'{name}_0', f'{name}_1'
            x = layers.conv(x, features, size, stride=stride, name=conv, dtype=self.dtype)
            batch_norm = BatchNorm(axis_name=self.axis_name, dtype=self.dtype, name=norm)
            x, taps[norm] = batch_norm(x, train)
            return nn.relu(x)

        taps: dict = {}
        maps: dict = {}
        x = conv_norm(images.astype(self.dtype), 24, 3, 2, 'conv1')
        x = layers.max_pool(x, 3, 2, padding=1)
        for stage, (depth, width) in enumerate(zip(DEPTHS, self.widths, strict=True), start=2):
            for i in range(depth):
                name = f'stage{stage}_{i}'
                unit = Unit(width, 1 if i else 2, self.axis_name, self.dtype, name=name)
                x, taps[name] = unit(x, train)
            maps[x.shape[1:3]] = x
        x = conv_norm(x, 1024, 1, 1, 'conv5')

        features = jnp.mean(layers.wide(x), (1, 2))
        logits = layers.linear(features, self.num_classes, name='fc')
        return Output(logits, features, taps, tuple(maps.values()), x)
