"""Residual networks (He et al. 2016): the thin CIFAR ones, the wide CIFAR ones, ImageNet's.

Three families that differ in stem, widths, initialisation and the names of their PyTorch files:

* resnet8, 14, 20, ... (6n + 2), resnet8x4, resnet32x4: three stages, ``downsample`` and ``fc``, as
  in RepDistiller; ``option_a``: shortcuts without weights; the ``half`` and ``s2d`` variants are
  ours, for small machines;
* resnet18/34/50/101/152 for CIFAR: four stages behind a 3x3 stem, ``shortcut`` and ``linear``;
  ``pool``: with a max-pool after the stem; ``preact``: norms before convolutions;
* the same for ImageNet: a 7x7 stem of stride 2 and a max-pool, ``downsample`` and ``fc``, as in
  torchvision, with the bottleneck's stride on its 3x3 convolution.

``layer2.0.conv1`` is ``layer2_0/conv1`` here, ``layer2.0.downsample.1`` is
``layer2_0/downsample_1``.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax.numpy as jnp
from flax import linen as nn

from dfkd_jax.models import layers
from dfkd_jax.models.layers import Array, BatchNorm, Dtype, Output


class Block(nn.Module):
    """Two 3x3 convolutions, or with `bottleneck` 1x1, 3x3 and 1x1 to four times the width."""

    features: int
    stride: int
    bottleneck: bool
    shortcut: str
    kernel_init: nn.initializers.Initializer | None = None
    axis_name: str | None = None
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array, train: bool) -> tuple[Array, dict]:
        def conv_norm(
            x: Array, features: int, size: int, stride: int, conv: str, norm: str
        ) -> Array:
            x = layers.conv(x, features, size, stride=stride, name=conv,
                            kernel_init=self.kernel_init, dtype=self.dtype)  # fmt: skip
            batch_norm = BatchNorm(axis_name=self.axis_name, dtype=self.dtype, name=norm)
            x, taps[norm] = batch_norm(x, train)
            return x

        taps: dict = {}
        if self.bottleneck:
            features = 4 * self.features
            y = nn.relu(conv_norm(x, self.features, 1, 1, 'conv1', 'bn1'))
            y = nn.relu(conv_norm(y, self.features, 3, self.stride, 'conv2', 'bn2'))
            y = conv_norm(y, features, 1, 1, 'conv3', 'bn3')
        else:
            features = self.features
            y = nn.relu(conv_norm(x, features, 3, self.stride, 'conv1', 'bn1'))
            y = conv_norm(y, features, 3, 1, 'conv2', 'bn2')
        if self.stride != 1 or x.shape[-1] != features:
            if self.shortcut:
                conv, norm = f'{self.shortcut}_0', f'{self.shortcut}_1'
                x = conv_norm(x, features, 1, self.stride, conv, norm)
            else:  # option A: every second pixel, and as many new channels of zeros on both sides
                more = (features - x.shape[-1]) // 2
                x = x[:, :: self.stride, :: self.stride]
                x = jnp.pad(x, ((0, 0), (0, 0), (0, 0), (more, more)))
        return nn.relu(x + y), taps


class ResNet(nn.Module):
    """Stem, stages of residual blocks (stride 1, then 2), global average pool, linear layer.

    depths: blocks of each stage.
    widths: channels of the stem, then of each stage.
    stem: '3x3' / '3x3-pool' (and a max-pool of stride 2) / 's2d' (2x2 pixels to channels, then
      3x3: a quarter of the work) / '7x7' (of stride 2, and a max-pool).
    shortcut, head: the names of their layers; '': shortcuts without weights, the paper's option A.
    """

    depths: tuple[int, ...]
    widths: tuple[int, ...]
    stem: str = '3x3'
    bottleneck: bool = False
    shortcut: str = 'downsample'
    head: str = 'fc'
    kernel_init: nn.initializers.Initializer | None = layers.he_normal
    num_classes: int = 10
    axis_name: str | None = None
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, images: Array, train: bool = False) -> Output:
        """Classifies images [B, H, W, channels]; with the 's2d' stem H and W are even."""
        taps: dict = {}
        x = images.astype(self.dtype)
        if self.stem == 's2d':
            x = layers.space_to_depth(x, 2)
        size, stride = (7, 2) if self.stem == '7x7' else (3, 1)
        x = layers.conv(x, self.widths[0], size, stride=stride, name='conv1',
                        kernel_init=self.kernel_init, dtype=self.dtype)  # fmt: skip
        x, taps['bn1'] = BatchNorm(axis_name=self.axis_name, dtype=self.dtype, name='bn1')(x, train)
        x = nn.relu(x)
        if self.stem in ('7x7', '3x3-pool'):
            x = layers.max_pool(x, 3, 2, padding=1)

        maps: dict = {}
        for stage, (depth, width) in enumerate(
            zip(self.depths, self.widths[1:], strict=True), start=1
        ):
            for i in range(depth):
                name = f'layer{stage}_{i}'
                stride = 2 if stage > 1 and i == 0 else 1
                block = Block(width, stride, self.bottleneck, self.shortcut, self.kernel_init,
                              self.axis_name, self.dtype, name=name)  # fmt: skip
                x, taps[name] = block(x, train)
            maps[x.shape[1:3]] = x

        features = jnp.mean(layers.wide(x), (1, 2))
        logits = layers.linear(features, self.num_classes, name=self.head)
        return Output(logits, features, taps, tuple(maps.values()), x)


class PreActBlock(nn.Module):
    """`Block` with the norm and the ReLU before each convolution (He et al. 2016b)."""

    features: int
    stride: int
    bottleneck: bool
    axis_name: str | None = None
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array, train: bool) -> tuple[Array, dict]:
        def norm(x: Array, name: str) -> Array:
            batch_norm = BatchNorm(axis_name=self.axis_name, dtype=self.dtype, name=name)
            x, taps[name] = batch_norm(x, train)
            return nn.relu(x)

        def conv(x: Array, features: int, size: int, stride: int, name: str) -> Array:
            return layers.conv(x, features, size, stride=stride, name=name, dtype=self.dtype)

        taps: dict = {}
        y = norm(x, 'bn1')
        features = (4 if self.bottleneck else 1) * self.features
        if self.stride != 1 or x.shape[-1] != features:
            x = conv(y, features, 1, self.stride, 'shortcut_0')
        if self.bottleneck:
            y = conv(y, self.features, 1, 1, 'conv1')
            y = conv(norm(y, 'bn2'), self.features, 3, self.stride, 'conv2')
            y = conv(norm(y, 'bn3'), features, 1, 1, 'conv3')
        else:
            y = conv(y, features, 3, self.stride, 'conv1')
            y = conv(norm(y, 'bn2'), features, 3, 1, 'conv2')
        return x + y, taps


class PreActResNet(nn.Module):
    """A pre-activation ResNet for CIFAR, as in kuangliu/pytorch-cifar.

    final_norm: whether a norm and a ReLU follow the last stage, as in the paper and in the files of
      the robustness field; kuangliu's has none.
    """

    depths: tuple[int, ...]
    bottleneck: bool = False
    final_norm: bool = False
    num_classes: int = 10
    axis_name: str | None = None
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, images: Array, train: bool = False) -> Output:
        """Classifies images [B, H, W, channels]."""
        taps: dict = {}
        maps: dict = {}
        x = layers.conv(images.astype(self.dtype), 64, 3, name='conv1', dtype=self.dtype)
        for stage, depth in enumerate(self.depths, start=1):
            for i in range(depth):
                name = f'layer{stage}_{i}'
                stride = 2 if stage > 1 and i == 0 else 1
                block = PreActBlock(32 * 2**stage, stride, self.bottleneck, self.axis_name,
                                    self.dtype, name=name)  # fmt: skip
                x, taps[name] = block(x, train)
            maps[x.shape[1:3]] = x
        if self.final_norm:
            batch_norm = BatchNorm(axis_name=self.axis_name, dtype=self.dtype, name='bn')
            x, taps['bn'] = batch_norm(x, train)
            x = nn.relu(x)
        features = jnp.mean(layers.wide(x), (1, 2))
        logits = layers.linear(features, self.num_classes, name='linear')
        return Output(logits, features, taps, tuple(maps.values()), x)


# Blocks of each stage, and whether they are bottlenecks.
DEPTHS = {
    18: ((2, 2, 2, 2), False),
    34: ((3, 4, 6, 3), False),
    50: ((3, 4, 6, 3), True),
    101: ((3, 4, 23, 3), True),
    152: ((3, 8, 36, 3), True),
}
WIDTHS = (64, 64, 128, 256, 512)


def thin(
    depth: int,
    widths: tuple[int, ...] = (16, 16, 32, 64),
    stem: str = '3x3',
    option_a: bool = False,
) -> partial:
    """ResNet-depth for CIFAR of the 2016 paper: three stages of (depth - 2) / 6 blocks.

    Raises ValueError for a depth that is not 6n + 2.
    """
    if depth < 8 or (depth - 2) % 6:
        raise ValueError(f'a ResNet for CIFAR has 6n + 2 layers: 8, 14, 20, ..., not {depth}')
    names = ('', 'linear') if option_a else ('downsample', 'fc')
    return partial(ResNet, 3 * ((depth - 2) // 6,), widths, stem, False, *names)


def wide(depth: int, stem: str = '3x3') -> partial:
    """The ImageNet networks' stages behind a stem for CIFAR, with PyTorch's default init."""
    return partial(ResNet, DEPTHS[depth][0], WIDTHS, stem, DEPTHS[depth][1], 'shortcut', 'linear',
                   None)  # fmt: skip


def imagenet(depth: int) -> partial:
    """The ImageNet networks, for images of 32 px and more (224 as published)."""
    return partial(ResNet, DEPTHS[depth][0], WIDTHS, '7x7', DEPTHS[depth][1])


def preact(depth: int, final_norm: Any = False) -> partial:
    """`PreActResNet` of the ImageNet networks' depths."""
    return partial(PreActResNet, *DEPTHS[depth], final_norm=bool(final_norm))
