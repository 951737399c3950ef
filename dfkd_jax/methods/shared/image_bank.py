"""A bank of synthetic images on the device: a ring buffer of the newest ones.

It is plain data in the state of a method, so checkpoints hold it.  It is the same on every device:
whole batches are put in, and the rows asked for are taken out.  A pixel takes one byte, as in the
8-bit images that networks are trained on: 160,000 images of 32 x 32 x 3 take 493 MB.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

Array = jax.Array
Key = jax.Array


class Bank(struct.PyTreeNode):
    """N images and what they were made for."""

    image: Array  # [N, H, W, C] uint8 pixels
    label: Array  # [N] int32, the classes that were asked for
    source: Array  # [N] int32, what else a method remembers of each; 0 if nothing
    written: Array  # [] int32, images ever put in


def empty(size: int, image_shape: tuple[int, int, int]) -> Bank:
    """A bank for `size` images [H, W, C]."""
    return Bank(
        image=jnp.zeros((size, *image_shape), jnp.uint8),
        label=jnp.zeros((size,), jnp.int32),
        source=jnp.zeros((size,), jnp.int32),
        written=jnp.zeros((), jnp.int32),
    )


def check(synthesis: Any) -> None:
    """Checks the fields of a bank in `config.synthesis`.

    Raises ValueError unless it holds whole batches, and for mixing that is out of range.
    """
    if synthesis.bank <= 0 or synthesis.bank % synthesis.batch_size:
        raise ValueError(
            f'config.synthesis.bank={synthesis.bank} must be a positive multiple of '
            f'config.synthesis.batch_size={synthesis.batch_size}.'
        )
    for name in ('shade', 'cutmix'):
        if not 0 <= synthesis[name] <= 1:
            raise ValueError(f'config.synthesis.{name}={synthesis[name]}: expected 0 to 1.')


def put(bank: Bank, pixel: Array, label: Array, source: Array | None = None) -> Bank:
    """Replaces the oldest images by a batch: pixels [B, H, W, C] in [0, 1], labels, sources [B].

    Raises ValueError unless the size of the bank is a multiple of B: a batch never wraps around.
    """
    size, batch = len(bank.image), len(pixel)
    if size % batch:
        raise ValueError(f'a bank of {size} images takes no batches of {batch}: use a multiple.')
    byte = jnp.round(255 * jnp.clip(pixel, 0, 1)).astype(jnp.uint8)
    source = jnp.zeros_like(label) if source is None else source
    at = bank.written % size
    return Bank(
        image=jax.lax.dynamic_update_slice_in_dim(bank.image, byte, at, 0),
        label=jax.lax.dynamic_update_slice_in_dim(bank.label, label, at, 0),
        source=jax.lax.dynamic_update_slice_in_dim(bank.source, source, at, 0),
        written=bank.written + batch,
    )


def draw(bank: Bank, key: Key, batch: int) -> Array:
    """Rows to take, [B], uniform over the images put in so far.  The key is consumed.

    An empty bank gives rows of black images.
    """
    filled = jnp.clip(bank.written, 1, len(bank.image))
    return jax.random.randint(key, (batch,), 0, filled)


def take(bank: Bank, rows: Array) -> tuple[Array, Array]:
    """Pixels [B, H, W, C] in [0, 1] and labels [B] of these rows."""
    return bank.image[rows].astype(jnp.float32) / 255, bank.label[rows]


# A part of every batch can be kept apart: `SHARE` of its rows, which lie elsewhere in every batch,
# so that all classes and sources are among them whatever their order in a batch is.
SHARE = 0.1


def kept_apart(made: int) -> int:
    """How many images of a batch of `made` are kept apart.  Raises ValueError for a batch of 1."""
    if made < 2:
        raise ValueError(
            f'config.synthesis.batch_size={made}: without real images a part of every batch is '
            'kept to measure on, so it takes 2 or more.'
        )
    return max(1, round(made * SHARE))


def draw_part(bank: Bank, key: Key, batch: int, made: int, apart: bool) -> Array:
    """Rows to take, [B], uniform over the part of all batches that is kept apart, or over the rest.

    made: the images of a batch put in.  The key is consumed.
    """
    key_slot, key_place = jax.random.split(key)
    held = kept_apart(made)
    filled = jnp.clip(bank.written, made, len(bank.image)) // made
    slot = jax.random.randint(key_slot, (batch,), 0, filled)
    place = jax.random.randint(key_place, (batch,), 0, held if apart else made - held)
    first = slot * held + (0 if apart else held)
    return slot * made + (first + place) % made
