"""Bicubic resizing as Pillow does it, and as PyTorch does without antialiasing."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from dfkd_jax.models.layers import Array

# The parameter of Keys' kernel: Pillow's, and PyTorch's without antialiasing.
PILLOW, TORCH = -0.5, -0.75


def resize_bicubic(images: Array, size: int | tuple[int, int], antialias: bool = True) -> Array:
    """[B, H, W, C] -> [B, *size, C] float32, which may overshoot the range of `images`.

    antialias: as PIL.Image.resize(size, BICUBIC), but for its rounding to bytes: where an image
      shrinks, the kernel widens with it.  Else as torch.nn.functional.interpolate(mode='bicubic',
      align_corners=False, antialias=False): four taps an axis, however much an image shrinks.
    """
    rows, columns = (size, size) if isinstance(size, int) else size
    _, height, width, _ = images.shape
    if (height, width) == (rows, columns):
        return images.astype(jnp.float32)
    # Two products with dense matrices: differentiable, and small beside any network.
    images = images.astype(jnp.float32)
    down = jnp.asarray(weights(height, rows, antialias))
    across = jnp.asarray(weights(width, columns, antialias))
    images = jnp.einsum('ih,bhwc->biwc', down, images, precision='highest')
    return jnp.einsum('jw,bhwc->bhjc', across, images, precision='highest')


def weights(source: int, target: int, antialias: bool = True) -> np.ndarray:
    """The weight of each source pixel in each target pixel, float32 [target, source]."""
    wide = max(source / target, 1.0) if antialias else 1.0
    at = (np.arange(target) + 0.5) * source / target - 0.5
    reach = int(np.ceil(2 * wide)) + 1
    taps = np.arange(-reach, reach + 1) + np.floor(at).astype(int)[:, None]
    weight = _kernel(np.abs(at[:, None] - taps) / wide, PILLOW if antialias else TORCH)
    matrix = np.zeros((target, source))
    row = np.broadcast_to(np.arange(target)[:, None], taps.shape)
    if antialias:  # a tap beyond the border has no weight
        weight = np.where((taps >= 0) & (taps < source), weight, 0.0)
        weight /= weight.sum(1, keepdims=True)
    # Else it takes the pixel at the border.
    np.add.at(matrix, (row, np.clip(taps, 0, source - 1)), weight)
    return matrix.astype(np.float32)


def _kernel(x: np.ndarray, a: float) -> np.ndarray:
    """Keys' cubic convolution kernel at distances x from 0 on (Keys 1981)."""
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
    return np.where(x <= 1, near, np.where(x < 2, far, 0.0))
