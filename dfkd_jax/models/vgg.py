"""VGG (Simonyan & Zisserman 2015) with batch norm and one linear layer, as in RepDistiller.

``block2.3`` is ``block2_3`` here: in each block the convolutions are numbers 0 and 3, their batch
norms 1 and 4.
"""

from __future__ import annotations

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
        return Output(logits, features, taps, tuple(maps.values()))
