"""VGG (Simonyan & Zisserman 2015): RepDistiller's blocks, and the sequence of torchvision.

* `VGG`, with batch norm and one linear layer: ``block2.3`` is ``block2_3`` here; in each block the
  convolutions are numbers 0 and 3, their batch norms 1 and 4.
* `SequentialVGG`: ``features.3`` is ``features_3`` here, or ``features_4_norm`` for a batch norm.
"""

from __future__ import annotations

from functools import partial

import jax.numpy as jnp
from flax import linen as nn

from dfkd_jax.models import layers
from dfkd_jax.models.layers import Array, BatchNorm, Dtype, Output

WIDTHS = (64, 128, 256, 512, 512)


class VGG(nn.Module):
    """Five blocks of 3x3 convolutions, 64 to 512 channels wide, for images of 8 px and more.

    A max-pool follows blocks 0, 1 and 2, and block 3 only where images are 64 px high; the last
    block is averaged over space whatever its size.

    depths: convolutions of each block, 1 or 2.
    """

    depths: tuple[int, int, int, int, int]
    num_classes: int = 10
    axis_name: str | None = None
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, images: Array, train: bool = False) -> Output:
        """Classifies images [B, H, W, channels].  Raises ValueError where they pool to nothing."""
        height, width = images.shape[1:3]
        if min(height, width) < 8:
            raise ValueError(
                f'VGG needs images of 8 px and more, not {height}x{width}: resize them'
            )
        taps: dict = {}
        maps: dict = {}
        x = images.astype(self.dtype)
        for block, (depth, channels) in enumerate(zip(self.depths, WIDTHS, strict=True)):
            for i in range(depth):
                conv, norm = f'block{block}_{3 * i}', f'block{block}_{3 * i + 1}'
                x = layers.conv(x, channels, 3, bias=True, name=conv, kernel_init=layers.he_normal,
                                bias_init=nn.initializers.zeros, dtype=self.dtype)  # fmt: skip
                x, taps[norm] = BatchNorm(axis_name=self.axis_name, dtype=self.dtype,
                                          name=norm)(x, train)  # fmt: skip
                x = nn.relu(x)
            maps[x.shape[1:3]] = x
            if block < 3 or (block == 3 and height == 64):
                x = layers.max_pool(x, 2)

        features = jnp.mean(layers.wide(x), (1, 2))
        logits = layers.linear(features, self.num_classes, name='classifier',
                               kernel_init=nn.initializers.normal(0.01),
                               bias_init=nn.initializers.zeros)  # fmt: skip
        return Output(logits, features, taps, tuple(maps.values()), x)


# Convolutions of each of the five blocks.
DEPTHS = {11: (1, 1, 2, 2, 2), 13: (2, 2, 2, 2, 2), 16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}


class SequentialVGG(nn.Module):
    """Five blocks, each followed by a max-pool, then one or three linear layers.

    As in torchvision, with or without batch norm; for CIFAR, kuangliu/pytorch-cifar has one linear
    layer and others have three.  Images have 32 px at least.  Dropout is left out.

    depths: convolutions of each block.
    norm: whether a batch norm follows each convolution.
    hidden: the width of the first two linear layers; 0: there is one linear layer alone.
    side: maps are averaged to side x side before the linear layers.
    """

    depths: tuple[int, ...]
    norm: bool = True
    hidden: int = 0
    side: int = 1
    num_classes: int = 10
    axis_name: str | None = None
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, images: Array, train: bool = False) -> Output:
        """Classifies images [B, H, W, channels].  Raises ValueError where they pool to nothing."""
        if min(images.shape[1:3]) < 32:
            raise ValueError(
                f'VGG with five pools needs images of 32 px and more, not {images.shape[1]}x'
                f'{images.shape[2]}: resize them'
            )
        taps: dict = {}
        maps: dict = {}
        x, n = images.astype(self.dtype), 0
        for depth, channels in zip(self.depths, WIDTHS, strict=True):
            for _ in range(depth):
                x = layers.conv(x, channels, 3, bias=True, name=f'features_{n}',
                                kernel_init=layers.he_normal, bias_init=nn.initializers.zeros,
                                dtype=self.dtype)  # fmt: skip
                if self.norm:
                    name = f'features_{n + 1}_norm'
                    norm = BatchNorm(axis_name=self.axis_name, dtype=self.dtype, name=name)
                    x, taps[name] = norm(x, train)
                x = nn.relu(x)
                n += 3 if self.norm else 2
            maps[x.shape[1:3]] = x
            x = layers.max_pool(x, 2)
            n += 1
        last = x if self.side == 1 and not self.hidden else None
        x = layers.adaptive_mean(x, self.side)
        x = x.transpose(0, 3, 1, 2).reshape(x.shape[0], -1)  # PyTorch's order of channels first
        if not self.hidden:
            features = layers.wide(x)
            logits = layers.linear(features, self.num_classes, name='classifier')
            return Output(logits, features, taps, tuple(maps.values()), last)
        for name in ('classifier_0', 'classifier_3'):
            x = nn.relu(layers.linear(x, self.hidden, name=name, dtype=self.dtype))
        features = layers.wide(x)
        logits = layers.linear(features, self.num_classes, name='classifier_6')
        return Output(logits, features, taps, tuple(maps.values()))


def sequential(depth: int, norm: str | None, kind: str) -> partial:
    """`SequentialVGG`: for CIFAR with one linear layer, or three of a width; or for ImageNet."""
    hidden, side = {
        'cifar': (0, 1),
        'cifar_512': (512, 1),
        'cifar_4096': (4096, 1),
        'imagenet': (4096, 7),
    }[kind]
    return partial(SequentialVGG, DEPTHS[depth], bool(norm), hidden, side)
