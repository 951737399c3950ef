"""MobileNetV2 (Sandler et al. 2018) for ImageNet and for CIFAR, named as in torchvision.

``features.4.conv.1.0`` is ``features_4/conv_1_0`` here.  The dropout before the linear layer is
left out: every classifier of this zoo is a function of its weights and images alone.
"""

from __future__ import annotations

from functools import partial

import jax.numpy as jnp
from flax import linen as nn

from dfkd_jax.models import layers
from dfkd_jax.models.layers import Array, BatchNorm, Dtype, Output

# Expansion, output channels, blocks, stride of the first block: table 2 of the paper.
STAGES = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)
# As huyvnphan/PyTorch_CIFAR10 and chenyaofo/pytorch-cifar-models have them.
CIFAR_STRIDES = (1, 1, 1, 2, 2, 1, 2, 1)


class InvertedResidual(nn.Module):
    """1x1 to `expand` times the channels, depthwise 3x3, 1x1 to `features`; a sum if that fits."""

    features: int
    stride: int
    expand: int
    axis_name: str | None = None
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array, train: bool) -> tuple[Array, dict]:
        def norm(x: Array, name: str) -> Array:
            batch_norm = BatchNorm(axis_name=self.axis_name, dtype=self.dtype, name=name)
            x, taps[name] = batch_norm(x, train)
            return x

        taps: dict = {}
        conv = partial(layers.conv, kernel_init=layers.he_normal, dtype=self.dtype)
        hidden = self.expand * x.shape[-1]
        y, n = x, 0  # n: torchvision numbers the convolutions that are there
        if self.expand != 1:
            y = nn.relu6(norm(conv(y, hidden, 1, name='conv_0_0'), 'conv_0_1'))
            n = 1
        y = conv(y, hidden, 3, stride=self.stride, groups=hidden, name=f'conv_{n}_0')
        y = nn.relu6(norm(y, f'conv_{n}_1'))
        y = norm(conv(y, self.features, 1, name=f'conv_{n + 1}'), f'conv_{n + 2}')
        if self.stride == 1 and x.shape[-1] == self.features:
            y = x + y
        return y, taps


class MobileNetV2(nn.Module):
    """MobileNetV2 of width 1.

    strides: of the stem, then of the seven stages.  Those of `STAGES` are ImageNet's; CIFAR's
      files have the same names and shapes and other strides (`CIFAR_STRIDES`).
    """

    strides: tuple[int, ...] = (2, *(stride for *_, stride in STAGES))
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
            batch_norm = BatchNorm(axis_name=self.axis_name, dtype=self.dtype, name=norm)
            x, taps[norm] = batch_norm(x, train)
            return nn.relu6(x)

        taps: dict = {}
        maps: dict = {}
        x = conv_norm(images.astype(self.dtype), 32, 3, self.strides[0], 'features_0')
        blocks = [
            (width, stride if i == 0 else 1, expand)
            for (expand, width, depth, _), stride in zip(STAGES, self.strides[1:], strict=True)
            for i in range(depth)
        ]
        for n, sizes in enumerate(blocks, start=1):
            name = f'features_{n}'
            block = InvertedResidual(*sizes, self.axis_name, self.dtype, name=name)
            x, taps[name] = block(x, train)
            maps[x.shape[1:3]] = x
        x = conv_norm(x, 1280, 1, 1, f'features_{len(blocks) + 1}')

        features = jnp.mean(layers.wide(x), (1, 2))
        logits = layers.linear(features, self.num_classes, name='classifier_1',
                               kernel_init=nn.initializers.normal(0.01),
                               bias_init=nn.initializers.zeros)  # fmt: skip
        return Output(logits, features, taps, tuple(maps.values()), x)
