"""Thin residual networks for CIFAR (He et al. 2016) with group norm (Wu & He 2018) for batch norm.

Ours: teachers without batch statistics, otherwise equal to the zoo's ``resnet20``.  A PyTorch file
has the names of that network, as those who put a GroupNorm in the place of its norms leave them:
``layer2.0.bn1`` is ``layer2_0/norm1`` here.
"""

from __future__ import annotations

import jax.numpy as jnp
from flax import linen as nn

from dfkd_jax.models import layers
from dfkd_jax.models.layers import Array, Dtype, GroupNorm, Output


class Block(nn.Module):
    """Two 3x3 convolutions, each with its norm, plus the shortcut."""

    features: int
    stride: int
    groups: int
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        def conv_norm(x: Array, size: int, stride: int, conv: str, norm: str) -> Array:
            x = layers.conv(x, self.features, size, stride=stride, name=conv,
                            kernel_init=layers.he_normal, dtype=self.dtype)  # fmt: skip
            return GroupNorm(self.groups, dtype=self.dtype, name=norm)(x)

        y = nn.relu(conv_norm(x, 3, self.stride, 'conv1', 'norm1'))
        y = conv_norm(y, 3, 1, 'conv2', 'norm2')
        if self.stride != 1 or x.shape[-1] != self.features:
            x = conv_norm(x, 1, self.stride, 'downsample_0', 'downsample_1')
        return nn.relu(x + y)


class GroupNormResNet(nn.Module):
    """A 3x3 stem, three stages of `depth` blocks (stride 1, then 2), average pool, linear layer.

    widths: channels of each stage.
    groups: of every norm.
    axis_name: unused, for there is no batch norm.
    """

    depth: int
    widths: tuple[int, ...] = (16, 32, 64)
    groups: int = 8
    num_classes: int = 10
    axis_name: str | None = None
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, images: Array, train: bool = False) -> Output:
        """Classifies images [B, H, W, channels]."""
        del train  # nothing here differs in training
        x = layers.conv(images.astype(self.dtype), self.widths[0], 3, name='conv1',
                        kernel_init=layers.he_normal, dtype=self.dtype)  # fmt: skip
        x = nn.relu(GroupNorm(self.groups, dtype=self.dtype, name='norm1')(x))
        maps = []
        for stage, width in enumerate(self.widths, start=1):
            for i in range(self.depth):
                stride = 2 if stage > 1 and i == 0 else 1
                block = Block(width, stride, self.groups, self.dtype, name=f'layer{stage}_{i}')
                x = block(x)
            maps.append(x)

        features = jnp.mean(layers.wide(x), (1, 2))
        logits = layers.linear(features, self.num_classes, name='fc')
        return Output(logits, features, {}, tuple(maps), x)
