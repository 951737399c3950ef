"""LeNet-5 (LeCun et al. 1998) as the first data-free distillation papers use it, and its half.

Names follow the common PyTorch file: ``features.3`` is ``features_3`` here.
"""

from __future__ import annotations

import jax.numpy as jnp
from flax import linen as nn

from dfkd_jax.models import layers
from dfkd_jax.models.layers import Array, Dtype, Output


class LeNet5(nn.Module):
    """Three 5x5 convolutions and two linear layers, no batch norm, for images of 32 px.

    Its `features` are the last convolution's, the input of the *first* linear layer, as in the
    PyTorch file: DAFL's activation loss is taken there.
    """

    widths: tuple[int, int, int, int] = (6, 16, 120, 84)
    num_classes: int = 10
    axis_name: str | None = None
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, images: Array, train: bool = False) -> Output:
        """Classifies images [B, 32, 32, channels]; features are [B, widths[2]].

        Raises ValueError where the third convolution would not end in one pixel.
        """
        del train  # the same in both modes
        height, width = images.shape[1:3]
        if not (32 <= height <= 35 and 32 <= width <= 35):
            raise ValueError(f'LeNet-5 needs images of 32 px, not {height}x{width}: pad 28 px ones '
                             'by 2 on each side, resize others')  # fmt: skip

        maps: dict = {}
        x = images.astype(self.dtype)
        for i, width in enumerate(self.widths[:3]):
            x = layers.max_pool(x, 2) if i > 0 else x
            x = layers.conv(x, width, 5, padding=0, bias=True, name=f'features_{3 * i}',
                            dtype=self.dtype)  # fmt: skip
            x = nn.relu(x)
            maps[x.shape[1:3]] = x
        features = x.reshape(x.shape[0], -1)
        x = nn.relu(layers.linear(features, self.widths[3], name='fc_0', dtype=self.dtype))
        logits = layers.linear(layers.wide(x), self.num_classes, name='fc_2')
        return Output(logits, layers.wide(features), {}, tuple(maps.values()))
