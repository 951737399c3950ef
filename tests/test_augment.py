"""Flips and crops: what they do to pixels, their gradients, their draws."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dfkd_jax import augment


def by_hand(x: np.ndarray, offsets: np.ndarray, padding: int, fill: np.ndarray) -> np.ndarray:
    """The crop with loops over images."""
    b, h, w, c = x.shape
    padded = np.broadcast_to(fill, (b, h + 2 * padding, w + 2 * padding, c)).astype(x.dtype).copy()
    padded[:, padding : padding + h, padding : padding + w] = x
    return np.stack([p[i : i + h, j : j + w] for p, (i, j) in zip(padded, offsets)])


@pytest.mark.parametrize('padding', [1, 4])
@pytest.mark.parametrize('fill', [0.0, 0.25, (-1.0, 0.5, 2.0)])
def test_crop_is_pad_and_cut(key, padding, fill):
    x = jax.random.normal(key, (9, 6, 5, 3))
    offsets = augment.draw_crop(key, 9, padding)
    got = jax.jit(lambda x, o: augment.crop(x, o, padding, fill))(x, offsets)
    np.testing.assert_array_equal(
        got, by_hand(np.asarray(x), np.asarray(offsets), padding, np.asarray(fill, np.float32))
    )


def test_centred_crop_and_no_padding_change_nothing(key):
    x = jax.random.normal(key, (4, 8, 8, 1))
    np.testing.assert_array_equal(augment.crop(x, jnp.full((4, 2), 3), 3, -1.0), x)
    np.testing.assert_array_equal(augment.crop(x, jnp.zeros((4, 2), jnp.int32), 0), x)


def test_crop_keeps_bytes(key):
    x = jax.random.randint(key, (3, 4, 4, 3), 0, 255).astype(jnp.uint8)
    offsets = augment.draw_crop(key, 3, 2)
    got = augment.crop(x, offsets, 2, jnp.array([7, 8, 9]))
    assert got.dtype == jnp.uint8
    np.testing.assert_array_equal(
        got, by_hand(np.asarray(x), np.asarray(offsets), 2, np.array([7, 8, 9]))
    )


def test_crop_gradient_is_the_transpose(key):
    """<crop(x), y> is linear in x: its gradient puts every pixel of y back where it came from."""
    x, y = jax.random.normal(key, (2, 7, 6, 5, 2))
    offsets = augment.draw_crop(key, 7, 3)
    gradient = jax.jit(jax.grad(lambda x: jnp.sum(augment.crop(x, offsets, 3, 1.0) * y)))(x)
    expected = np.zeros((7, 12, 11, 2), np.float32)
    for image, (i, j), row in zip(expected, np.asarray(offsets), np.asarray(y)):
        image[i : i + 6, j : j + 5] += row
    np.testing.assert_array_equal(gradient, expected[:, 3:-3, 3:-3])


def test_crop_has_second_derivatives(key):
    x = jax.random.normal(key, (2, 4, 4, 1))
    offsets = augment.draw_crop(key, 2, 1)

    def slope(x):
        return jnp.sum(jax.grad(lambda x: jnp.sum(augment.crop(x, offsets, 1) ** 3))(x))

    kept = augment.crop(jnp.ones_like(x), 2 - offsets, 1)  # pixels that the crop shows
    np.testing.assert_allclose(jax.grad(slope)(x), 6 * x * kept, rtol=1e-6)


def test_flip_mirrors_marked_images(key):
    x = jax.random.normal(key, (3, 4, 5, 2))
    got = np.asarray(augment.flip(x, jnp.array([True, False, True])))
    np.testing.assert_array_equal(got[0], x[0, :, ::-1])
    np.testing.assert_array_equal(got[1], x[1])
    np.testing.assert_array_equal(got[2], x[2, :, ::-1])


def test_draws_are_uniform_and_in_range(key):
    offsets = np.asarray(augment.draw_crop(key, 20_000, 2))
    assert offsets.dtype == np.int32 and offsets.shape == (20_000, 2)
    counts = np.stack([np.bincount(offsets[:, axis], minlength=5) for axis in (0, 1)])
    assert counts.shape == (2, 5)
    np.testing.assert_allclose(counts / 20_000, 0.2, atol=0.02)
    flips = np.asarray(augment.draw_flip(key, 20_000))
    assert flips.dtype == bool
    np.testing.assert_allclose(flips.mean(), 0.5, atol=0.02)


def test_shares_make_the_whole(key):
    """Drawn for the batch and applied to shares, images are those of one device."""
    x = jax.random.normal(key, (8, 6, 6, 3))
    offsets, flips = augment.draw_crop(key, 8, 2), augment.draw_flip(key, 8)

    def apply(x, offsets, flips):
        return augment.flip(augment.crop(x, offsets, 2, (0.0, 1.0, 2.0)), flips)

    shares = jax.tree.map(lambda a: a.reshape(4, 2, *a.shape[1:]), (x, offsets, flips))
    np.testing.assert_array_equal(
        jax.vmap(apply)(*shares).reshape(x.shape), apply(x, offsets, flips)
    )


def test_crop_has_one_gradient_in_shard_map(key):
    """Under the strict check of replicated values too, as the loop compiles it."""
    count = jax.device_count()
    mesh = jax.make_mesh((count,), ('data',), axis_types=(jax.sharding.AxisType.Auto,))
    x = jax.random.normal(key, (2 * count, 6, 6, 3))
    offsets = augment.draw_crop(key, 2 * count, 2)

    def loss(scale, x, offsets):
        return jnp.mean(augment.crop(x * scale, offsets, 2, (-1.0, 0.0, 1.0)) ** 2)

    def share(scale, x, offsets):
        mean = jax.grad(lambda s: jax.lax.pmean(loss(s, x, offsets), 'data'))(scale)
        return jax.lax.pmean(mean, 'data')

    p = jax.sharding.PartitionSpec
    sharded = jax.jit(
        jax.shard_map(share, mesh=mesh, in_specs=(p(), p('data'), p('data')), out_specs=p())
    )
    np.testing.assert_allclose(sharded(2.0, x, offsets), jax.grad(loss)(2.0, x, offsets), rtol=1e-5)


def test_flip_and_crop(key):
    x = jax.random.normal(key, (64, 6, 6, 3))
    one = augment.flip_and_crop(key, x, 2, -1.0)
    np.testing.assert_array_equal(
        one, jax.jit(augment.flip_and_crop, static_argnums=2)(key, x, 2, -1.0)
    )
    assert one.shape == x.shape and not np.array_equal(
        one, augment.flip_and_crop(jax.random.key(1), x, 2)
    )
    # Without flips and padding nothing is left to do.
    np.testing.assert_array_equal(augment.flip_and_crop(key, x, 0, flips=False), x)
