"""DenseNet (Huang et al. 2017), the ImageNet network, named as in torchvision.

``features.denseblock1.denselayer2.norm1`` is ``denseblock1_2/norm1`` here.  Dropout, which
torchvision has none of by default, is left out: every classifier of this zoo is a function of its
weights and images alone.
"""

from __future__ import annotations

from functools import partial

import jax.numpy as jnp
from flax import linen as nn

from dfkd_jax.models import layers
from dfkd_jax.models.layers import Array, BatchNorm, Dtype, Output

SMALLEST = 29  # px: smaller images pool to nothing
he_normal_in = nn.initializers.variance_scaling(2.0, 'fan_in', 'normal')


class DenseLayer(nn.Module):
    """BN-ReLU-1x1 to four times the growth, BN-ReLU-3x3 to `growth` new channels."""

    growth: int
    axis_name: str | None = None
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array, train: bool) -> tuple[Array, dict]:
        """[B, H, W, C] -> [B, H, W, C + growth]: the new channels behind the old ones."""

        def norm(x: Array, name: str) -> Array:
            batch_norm = BatchNorm(axis_name=self.axis_name, dtype=self.dtype, name=name)
            x, taps[name] = batch_norm(x, train)
            return nn.relu(x)

        taps: dict = {}
        conv = partial(layers.conv, kernel_init=he_normal_in, dtype=self.dtype)
        y = conv(norm(x, 'norm1'), 4 * self.growth, 1, name='conv1')
        y = conv(norm(y, 'norm2'), self.growth, 3, name='conv2')
        return jnp.concatenate((x, y), axis=-1), taps


class DenseNet(nn.Module):
    """A 7x7 stem, dense blocks with halving transitions between, for images of 29 px and more.

    depths: dense layers of each block.
    growth: channels that each dense layer adds.
    """

    depths: tuple[int, ...]
    growth: int = 32
    num_classes: int = 10
    axis_name: str | None = None
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, images: Array, train: bool = False) -> Output:
        """Classifies images [B, H, W, channels].  Raises ValueError where they pool to nothing."""

        def norm(x: Array, name: str) -> Array:
            batch_norm = BatchNorm(axis_name=self.axis_name, dtype=self.dtype, name=name)
            x, taps[name] = batch_norm(x, train)
            return nn.relu(x)

        height, width = images.shape[1:3]
        if min(height, width) < SMALLEST:
            raise ValueError(
                f'DenseNet needs images of {SMALLEST} px and more, not {height}x{width}: resize '
                'them'
            )
        taps: dict = {}
        maps: dict = {}
        conv = partial(layers.conv, kernel_init=he_normal_in, dtype=self.dtype)
        x = conv(images.astype(self.dtype), 2 * self.growth, 7, stride=2, name='conv0')
        x = layers.max_pool(norm(x, 'norm0'), 3, 2, padding=1)
        for block, depth in enumerate(self.depths, start=1):
            if block > 1:
                x = norm(x, f'transition{block - 1}_norm')
                x = conv(x, x.shape[-1] // 2, 1, name=f'transition{block - 1}_conv')
                x = layers.average_pool(x, 2)
            for i in range(1, depth + 1):
                name = f'denseblock{block}_{i}'
                layer = DenseLayer(self.growth, self.axis_name, self.dtype, name=name)
                x, taps[name] = layer(x, train)
            maps[x.shape[1:3]] = x
        x = norm(x, 'norm5')

        features = jnp.mean(layers.wide(x), (1, 2))
        logits = layers.linear(features, self.num_classes, name='classifier',
                               bias_init=nn.initializers.zeros)  # fmt: skip
        return Output(logits, features, taps, tuple(maps.values()), x)
