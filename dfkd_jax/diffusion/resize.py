"""Bicubic resizing as in PyTorch, without antialiasing."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from dfkd_jax.models.layers import Array

A = -0.75  # of Keys' kernel in PyTorch; jax.image.resize takes -0.5 and antialiases


def resize_bicubic(images: Array, size: int | tuple[int, int]) -> Array:
    """[B, H, W, C] -> [B, *size, C] float32, which may overshoot the range of `images`.

    As torch.nn.functional.interpolate(mode='bicubic', align_corners=False, antialias=False).
    """
    rows, columns = (size, size) if isinstance(size, int) else size
    _, height, width, _ = images.shape
    if (height, width) == (rows, columns):
        return images.astype(jnp.float32)
    # Two products with dense matrices: differentiable, and small beside any network.
    images = images.astype(jnp.float32)
    down = jnp.asarray(weights(height, rows))
    across = jnp.asarray(weights(width, columns))
    images = jnp.einsum('ih,bhwc->biwc', down, images, precision='highest')
    return jnp.einsum('jw,bhwc->bhjc', across, images, precision='highest')


def weights(source: int, target: int) -> np.ndarray:
    """The weight of each source pixel in each target pixel, float32 [target, source]."""
    at = (np.arange(target) + 0.5) * source / target - 0.5
    first = np.floor(at).astype(int)
    matrix = np.zeros((target, source))
    for tap in range(-1, 3):
        # A tap beyond the border takes the pixel at the border.
        pixel = np.clip(first + tap, 0, source - 1)
        np.add.at(matrix, (np.arange(target), pixel), _kernel(np.abs(at - first - tap)))
    return matrix.astype(np.float32)


def _kernel(x: np.ndarray) -> np.ndarray:
    """Keys' cubic convolution kernel at distances x in [0, 2] (Keys 1981)."""
    near = ((A + 2) * x - (A + 3)) * x * x + 1
    far = ((A * x - 5 * A) * x + 8 * A) * x - 4 * A
    return np.where(x <= 1, near, far)
