"""EfficientNet-B0 (Tan & Le 2019) and EfficientNet-Lite0 (Liu 2020), its form for small devices.

Lite0 has ReLU6 where B0 has swish, and no squeeze-and-excitation.  Two B0 are published, of the
same shapes, that compute different things: TensorFlow's original, which ``efficientnet_pytorch``
ported, with 'SAME' padding and batch norms of epsilon 1e-3; and that of torchvision and timm, which
pads all sides alike and has PyTorch's epsilon, 1e-5.  Lite0 is as the former.

``_blocks.3._bn1`` of ``efficientnet_pytorch`` is ``blocks_3/bn1`` here.  Dropout and stochastic
depth are left out: every classifier of this zoo is a function of its weights and images alone.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

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


class Kind(NamedTuple):
    """In what the three networks differ."""

    activation: Callable[[Array], Array]
    squeeze: bool  # with squeeze-and-excitation
    padding: str | None  # 'SAME': as TensorFlow pads; None: as PyTorch does
    momentum: float  # of batch norms
    epsilon: float
    kernel_init: nn.initializers.Initializer | None


LITE = Kind(nn.relu6, False, 'SAME', 0.99, 1e-3, None)
TENSORFLOW = Kind(nn.swish, True, 'SAME', 0.99, 1e-3, layers.he_normal)
TORCH = Kind(nn.swish, True, None, 0.9, 1e-5, layers.he_normal)


class MBConv(nn.Module):
    """1x1 to `expand` times the channels, depthwise, 1x1 to `features`; a sum if that fits."""

    kind: Kind
    features: int
    stride: int
    expand: int
    size: int
    axis_name: str | None = None
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array, train: bool) -> tuple[Array, dict]:
        kind = self.kind

        def norm(x: Array, name: str) -> Array:
            y, taps[name] = BatchNorm(kind.momentum, kind.epsilon, axis_name=self.axis_name,
                                      dtype=self.dtype, name=name)(x, train)  # fmt: skip
            return y

        taps: dict = {}
        conv = partial(layers.conv, kernel_init=kind.kernel_init, dtype=self.dtype)
        hidden = self.expand * x.shape[-1]
        y = x
        if self.expand != 1:
            y = kind.activation(norm(conv(y, hidden, 1, name='expand_conv'), 'bn0'))
        y = conv(y, hidden, self.size, stride=self.stride, padding=kind.padding, groups=hidden,
                 name='depthwise_conv')  # fmt: skip
        y = kind.activation(norm(y, 'bn1'))
        if kind.squeeze:
            # A quarter of the channels that enter the block, not of the hidden ones.
            y = layers.SqueezeExcite(x.shape[-1] // 4, kind.activation,
                                     kernel_init=kind.kernel_init,
                                     bias_init=nn.initializers.zeros, dtype=self.dtype,
                                     name='se')(y)  # fmt: skip
        y = norm(conv(y, self.features, 1, name='project_conv'), 'bn2')
        if self.stride == 1 and x.shape[-1] == self.features:
            y = x + y
        return y, taps


class EfficientNet(nn.Module):
    """B0 or Lite0, for images of 32 px and more (224 as published)."""

    kind: Kind
    num_classes: int = 10
    axis_name: str | None = None
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, images: Array, train: bool = False) -> Output:
        """Classifies images [B, H, W, channels]; Lite0 as published for (pixel - 127) / 128."""
        kind = self.kind

        def norm(x: Array, name: str) -> Array:
            y, taps[name] = BatchNorm(kind.momentum, kind.epsilon, axis_name=self.axis_name,
                                      dtype=self.dtype, name=name)(x, train)  # fmt: skip
            return kind.activation(y)

        taps: dict = {}
        maps: dict = {}
        conv = partial(layers.conv, kernel_init=kind.kernel_init, dtype=self.dtype)
        x = conv(images.astype(self.dtype), 32, 3, stride=2, padding=kind.padding, name='conv_stem')
        x = norm(x, 'bn0')
        blocks = [
            (width, stride if i == 0 else 1, expand, size)
            for expand, size, width, depth, stride in STAGES
            for i in range(depth)
        ]
        for n, sizes in enumerate(blocks):
            name = f'blocks_{n}'
            block = MBConv(kind, *sizes, self.axis_name, self.dtype, name=name)
            x, taps[name] = block(x, train)
            maps[x.shape[1:3]] = x
        x = norm(conv(x, 1280, 1, name='conv_head'), 'bn1')

        features = jnp.mean(layers.wide(x), (1, 2))
        logits = layers.linear(features, self.num_classes, name='fc')
        return Output(logits, features, taps, tuple(maps.values()), x)
