"""Wide residual networks (Zagoruyko & Komodakis 2016) as data-free distillation uses them.

Pre-activation blocks; where the number of channels changes, the first BN-ReLU feeds both branches
and the shortcut is a bare 1x1 convolution.  Names follow the common PyTorch file, so that
``block1.layer.0.bn1`` is ``block1_0/bn1`` here.
"""

from __future__ import annotations

from functools import partial

import jax.numpy as jnp
from flax import linen as nn

from dfkd_jax.models import layers
from dfkd_jax.models.layers import Array, BatchNorm, Dtype, Output


class Block(nn.Module):
    """BN-ReLU-conv, BN-ReLU-conv, plus the shortcut."""

    features: int
    stride: int
    axis_name: str | None = None
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array, train: bool) -> tuple[Array, dict]:
        def norm(x: Array, name: str) -> Array:
            y, taps[name] = BatchNorm(axis_name=self.axis_name, dtype=self.dtype, name=name)(
                x, train
            )
            return nn.relu(y)

        def conv(x: Array, size: int, name: str, stride: int = 1) -> Array:
            return layers.conv(x, self.features, size, stride=stride, name=name,
                               kernel_init=layers.he_normal, dtype=self.dtype)  # fmt: skip

        taps: dict = {}
        y = norm(x, 'bn1')
        if x.shape[-1] != self.features:
            x = conv(y, 1, 'convShortcut', self.stride)
        y = conv(y, 3, 'conv1', self.stride)
        y = conv(norm(y, 'bn2'), 3, 'conv2')
        return x + y, taps


class WideResNet(nn.Module):
    """WRN-depth-widen: three groups of (depth - 4) / 6 blocks, for images of 8 px and more."""

    depth: int
    widen: int
    num_classes: int = 10
    axis_name: str | None = None
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, images: Array, train: bool = False) -> Output:
        """Classifies images [B, H, W, channels]."""
        taps: dict = {}
        maps: dict = {}
        x = layers.conv(images.astype(self.dtype), 16, 3, name='conv1',
                        kernel_init=layers.he_normal, dtype=self.dtype)  # fmt: skip
        for group, width in enumerate((16, 32, 64), start=1):
            for i in range((self.depth - 4) // 6):
                name = f'block{group}_{i}'
                stride = 2 if group > 1 and i == 0 else 1
                block = Block(width * self.widen, stride, self.axis_name, self.dtype, name=name)
                x, taps[name] = block(x, train)
            maps[x.shape[1:3]] = x
        x, taps['bn1'] = BatchNorm(axis_name=self.axis_name, dtype=self.dtype, name='bn1')(x, train)
        x = nn.relu(x)
        features = jnp.mean(layers.wide(x), (1, 2))
        logits = layers.linear(features, self.num_classes, name='fc',
                               bias_init=nn.initializers.zeros)  # fmt: skip
        return Output(logits, features, taps, tuple(maps.values()), x)


def wrn(depth: int, widen: int) -> partial:
    """WRN-depth-widen.  Raises ValueError for a depth that is not 6n + 4."""
    if depth < 10 or (depth - 4) % 6:
        raise ValueError(f'a wide ResNet has 6n + 4 layers: 10, 16, 22, 28, ..., not {depth}')
    return partial(WideResNet, depth, widen)
