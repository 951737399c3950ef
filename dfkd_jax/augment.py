"""Random flips, crops and mixtures of images on the device, one draw for each image.

Drawing and applying are separate functions.  A shard draws for the whole batch and applies its own
rows, so the images are the same on one device as on many.  Images are [B, H, W, C], uint8 or float,
normalised or not; floats are differentiable (in reverse mode).  All functions are pure and jit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp

Array = jax.Array
Key = jax.Array


def draw_flip(key: Key, batch: int, p: float = 0.5) -> Array:
    """Which images to flip: [B] bool, True with probability p.  The key is consumed."""
    return jax.random.bernoulli(key, p, (batch,))


def flip(x: Array, mask: Array) -> Array:
    """Mirrors left and right the images that `mask` [B] marks."""
    return jnp.where(mask[:, None, None, None], x[:, :, ::-1], x)


def draw_crop(key: Key, batch: int, padding: int) -> Array:
    """Where each crop starts in its padded image: [B, 2] int32 (row, column) in 0..2 * padding.

    The key is consumed.
    """
    return jax.random.randint(key, (batch, 2), 0, 2 * padding + 1, jnp.int32)


def crop(
    x: Array, offsets: Array, padding: int, fill: float | Sequence[float] | Array = 0.0
) -> Array:
    """Pads every side by `padding` pixels of `fill`, then cuts each image at its own offset.

    offsets: [B, 2] int32 from `draw_crop`; (padding, padding) leaves an image unchanged.
    fill: a number, or one for each channel [C] (black is ``-mean / std`` after normalisation).
    """
    if padding == 0:
        return x
    height, width, channels = x.shape[1:]
    padded = jnp.pad(x, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    if not isinstance(fill, (int, float)) or fill != 0:
        rows = jnp.pad(jnp.ones((height, 1), bool), ((padding, padding), (0, 0)))
        columns = jnp.pad(jnp.ones((1, width), bool), ((0, 0), (padding, padding)))
        color = jnp.broadcast_to(jnp.asarray(fill, x.dtype), (channels,))
        padded = jnp.where((rows & columns)[None, :, :, None], padded, color[None, None, None, :])
    return _windows(padded, offsets, padding)


def draw_areas(key: Key, batch: int, least: float = 0.08) -> Array:
    """A random area of each image, [B, 4] float32 in [0, 1]: its top, left, height and width.

    It covers `least` to 1 of the image, with an aspect ratio of 3/4 to 4/3, at a uniform position
    (Szegedy et al. 2015).  Sides that would not fit are cut to the image's.  The key is consumed.
    """
    key_part, key_ratio, key_place = jax.random.split(key, 3)
    part = jax.random.uniform(key_part, (batch,), minval=least)
    ratio = jnp.exp(jax.random.uniform(key_ratio, (batch,), minval=-1.0, maxval=1.0) * LOG_RATIO)
    sides = jnp.minimum(jnp.sqrt(jnp.stack([part / ratio, part * ratio], axis=1)), 1.0)
    return jnp.concatenate([jax.random.uniform(key_place, (batch, 2)) * (1 - sides), sides], axis=1)


LOG_RATIO = math.log(4 / 3)


def resized_crop(x: Array, areas: Array, size: int) -> Array:
    """An area of each image, [B, 4] from `draw_areas`, resized to `size` pixels a side.

    Bilinear, antialiased when it shrinks.  [B, H, W, C] float -> [B, size, size, C].
    """
    sides = jnp.asarray(x.shape[1:3], jnp.float32)

    def cut(image: Array, area: Array) -> Array:
        scale = size / (area[2:] * sides)
        shape = (size, size, image.shape[-1])
        return jax.image.scale_and_translate(
            image, shape, (0, 1), scale, -area[:2] * sides * scale, 'linear', antialias=True
        )

    return jax.vmap(cut)(x, areas)


def draw_boxes(key: Key, batch: int, height: int, width: int, p: float = 0.5) -> Array:
    """A box for each image, [B, 4] float32: its centre's row and column and half its sides.

    Centres are uniform, half sides uniform in 0.1 to 0.4 of the image's.  With probability 1 - p
    the box is empty.  The key is consumed.
    """
    key_centre, key_half, key_some = jax.random.split(key, 3)
    sides = jnp.asarray([[height, width]], jnp.float32)
    centre = jax.random.uniform(key_centre, (batch, 2)) * sides
    half = jax.random.uniform(key_half, (batch, 2), minval=0.1, maxval=0.4) * sides
    half = jnp.where(jax.random.bernoulli(key_some, p, (batch, 1)), half, 0.0)
    return jnp.concatenate([centre, half], axis=1)


def cutmix(x: Array, other: Array, boxes: Array) -> Array:
    """Images whose box [B, 4], as `draw_boxes` gives, shows another image (Yun et al. 2019).

    Labels are not mixed: a teacher labels the result.
    """
    row, column, half_height, half_width = (boxes[:, i, None, None, None] for i in range(4))
    height, width = x.shape[1:3]
    rows = jnp.arange(height, dtype=jnp.float32)[None, :, None, None]
    columns = jnp.arange(width, dtype=jnp.float32)[None, None, :, None]
    inside = (jnp.abs(rows - row) < half_height) & (jnp.abs(columns - column) < half_width)
    return jnp.where(inside, other, x)


def draw_shade(key: Key, batch: int, most: float) -> Array:
    """How deeply to shade each image: [B], uniform in 0..most.  The key is consumed."""
    return jax.random.uniform(key, (batch,), maxval=most)


def shade(pixel: Array, other: Array, depth: Array) -> Array:
    """Pixels in [0, 1] shaded by another image: multiplied by 1 - depth [B] where it is black.

    This gives flat surfaces the folds and patterns of another image.
    """
    depth = depth[:, None, None, None]
    return pixel * (1 - depth + depth * other)


Mixture = tuple[Array, Array]  # of a batch: depths [B] of shades, and boxes [B, 4]


def draw_mixture(key: Key, shape: Sequence[int], shade: float, cutmix: float) -> Mixture:
    """Shades of depth up to `shade`, and boxes with probability `cutmix`, for a batch of images.

    shape: (B, H, W, ...).  The key is consumed.
    """
    batch, height, width = shape[:3]
    key_shade, key_boxes = jax.random.split(key)
    return draw_shade(key_shade, batch, shade), draw_boxes(key_boxes, batch, height, width, cutmix)


def mix(pixel: Array, other: Array, mixture: Mixture) -> Array:
    """Pixels in [0, 1] shaded by another image and partly covered by it, as drawn."""
    depth, boxes = mixture
    return cutmix(shade(pixel, other, depth), other, boxes)


# Measured on 2 CPU cores at [256, 32, 32, 3], forward / gradient in ms: per-image dynamic slices
# 0.2 / 3.0, fancy or take_along_axis gathers 0.3 / 1.6-2.2, one-hot matrix products 7 / 9, a select
# over all shifts 10 / 80.  So slices forward.  The transpose of cutting at `o` is cutting the
# padded gradient at `2 * padding - o`: slices backward too (0.2 ms), in place of a scatter.
@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _windows(padded: Array, offsets: Array, padding: int) -> Array:
    """The window of each image at its offset, `2 * padding` smaller than the image."""
    _, height, width, channels = padded.shape
    size = (height - 2 * padding, width - 2 * padding, channels)
    return jax.vmap(lambda image, o: jax.lax.dynamic_slice(image, (o[0], o[1], 0), size))(
        padded, offsets
    )


def _windows_forward(padded: Array, offsets: Array, padding: int) -> tuple[Array, Array]:
    return _windows(padded, offsets, padding), offsets


def _windows_backward(padding: int, offsets: Array, gradient: Array) -> tuple[Array, None]:
    margin = (2 * padding, 2 * padding)
    gradient = jnp.pad(gradient, ((0, 0), margin, margin, (0, 0)))
    return _windows(gradient, 2 * padding - offsets, padding), None


_windows.defvjp(_windows_forward, _windows_backward)


CropFlip = tuple[Array, Array | None]  # of a batch: offsets [B, 2], and mask [B] where it flips


def draw_crop_flip(key: Key, batch: int, padding: int, flips: bool = True) -> CropFlip:
    """The crops and, if `flips`, the flips of a batch.  The key is consumed."""
    key_crop, key_flip = jax.random.split(key)
    return draw_crop(key_crop, batch, padding), draw_flip(key_flip, batch) if flips else None


def crop_flip(
    x: Array, drawn: CropFlip, padding: int, fill: float | Sequence[float] | Array = 0.0
) -> Array:
    """Crops of padded images, then flips, as `draw_crop_flip` drew them."""
    offsets, mask = drawn
    x = crop(x, offsets, padding, fill)
    return x if mask is None else flip(x, mask)
