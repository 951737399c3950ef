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
    x = np.random.default_rng(0).normal(size=(9, 6, 5, 3)).astype(np.float32)
    offsets = np.asarray(augment.draw_crop(key, 9, padding))
    got = jax.jit(lambda x, o: augment.crop(x, o, padding, fill))(x, offsets)
    np.testing.assert_array_equal(got, by_hand(x, offsets, padding, np.asarray(fill, np.float32)))


def test_centred_crop_and_no_padding_change_nothing():
    x = np.random.default_rng(0).normal(size=(4, 8, 8, 1)).astype(np.float32)
    centred = jax.jit(lambda x: augment.crop(x, jnp.full((4, 2), 3), 3, -1.0))
    np.testing.assert_array_equal(centred(x), x)
    assert augment.crop(x, np.zeros((4, 2), np.int32), 0) is x


def test_crop_keeps_bytes():
    x = np.random.default_rng(0).integers(0, 255, (3, 4, 4, 3), np.uint8)
    offsets = np.array([(0, 0), (4, 1), (2, 3)], np.int32)
    got = jax.jit(lambda x, o: augment.crop(x, o, 2, jnp.array([7, 8, 9])))(x, offsets)
    assert got.dtype == jnp.uint8
    np.testing.assert_array_equal(got, by_hand(x, offsets, 2, np.array([7, 8, 9])))


def test_crop_gradient_is_the_transpose(key):
    """<crop(x), y> is linear in x: its gradient puts every pixel of y back where it came from."""
    x, y = np.random.default_rng(0).normal(size=(2, 7, 6, 5, 2)).astype(np.float32)
    offsets = np.asarray(augment.draw_crop(key, 7, 3))
    gradient = jax.jit(jax.grad(lambda x: jnp.sum(augment.crop(x, offsets, 3, 1.0) * y)))(x)
    expected = np.zeros((7, 12, 11, 2), np.float32)
    for image, (i, j), row in zip(expected, offsets, y):
        image[i : i + 6, j : j + 5] += row
    np.testing.assert_array_equal(gradient, expected[:, 3:-3, 3:-3])


def test_crop_has_second_derivatives():
    x = np.random.default_rng(0).normal(size=(2, 4, 4, 1)).astype(np.float32)
    offsets = np.array([(0, 2), (1, 1)], np.int32)

    def slope(x):
        return jnp.sum(jax.grad(lambda x: jnp.sum(augment.crop(x, offsets, 1) ** 3))(x))

    shown = np.ones_like(x)  # pixels that the crop shows
    shown[0, -1] = shown[0, :, 0] = 0
    np.testing.assert_allclose(jax.jit(jax.grad(slope))(x), 6 * x * shown, rtol=1e-6)


def test_flip_mirrors_marked_images():
    x = np.random.default_rng(0).normal(size=(3, 4, 5, 2)).astype(np.float32)
    got = np.asarray(jax.jit(augment.flip)(x, np.array([True, False, True])))
    np.testing.assert_array_equal(got, np.stack([x[0, :, ::-1], x[1], x[2, :, ::-1]]))


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
    x = np.random.default_rng(0).normal(size=(8, 6, 6, 3)).astype(np.float32)
    draws = jax.jit(lambda key: (augment.draw_crop(key, 8, 2), augment.draw_flip(key, 8)))(key)

    def apply(x, offsets, flips):
        return augment.flip(augment.crop(x, offsets, 2, (0.0, 1.0, 2.0)), flips)

    shares = jax.tree.map(lambda a: np.asarray(a).reshape(4, 2, *a.shape[1:]), (x, *draws))
    got = np.asarray(jax.jit(jax.vmap(apply))(*shares)).reshape(x.shape)
    np.testing.assert_array_equal(got, jax.jit(apply)(x, *draws))


def test_crop_has_one_gradient_in_shard_map(key):
    """Under the strict check of replicated values too, as the loop compiles it."""
    count = jax.device_count()
    mesh = jax.make_mesh((count,), ('data',), axis_types=(jax.sharding.AxisType.Auto,))
    x = np.random.default_rng(0).normal(size=(2 * count, 6, 6, 3)).astype(np.float32)
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
    np.testing.assert_allclose(
        sharded(2.0, x, offsets), jax.jit(jax.grad(loss))(2.0, x, offsets), rtol=1e-5
    )


def test_crop_flip_is_a_crop_then_a_flip(key):
    x = np.random.default_rng(0).normal(size=(64, 6, 6, 3)).astype(np.float32)

    @jax.jit
    def both(key, x):
        offsets, mask = drawn = augment.draw_crop_flip(key, 64, 2)
        return augment.crop_flip(x, drawn, 2, -1.0), augment.crop(x, offsets, 2, -1.0), mask

    got, cropped, mask = (np.asarray(a) for a in both(key, x))
    np.testing.assert_array_equal(got[mask], cropped[mask][:, :, ::-1])
    np.testing.assert_array_equal(got[~mask], cropped[~mask])
    assert 0.2 < mask.mean() < 0.8
    nothing = augment.draw_crop_flip(key, 64, 0, flips=False)
    assert augment.crop_flip(x, nothing, 0) is x


def test_shading_is_a_product_with_another_image(key):
    pixel, other = np.random.default_rng(0).random((2, 3, 4, 4, 1), np.float32)
    depth = jnp.asarray([0.0, 0.5, 1.0])
    got = augment.shade(pixel, other, depth)
    np.testing.assert_allclose(got[0], pixel[0])
    np.testing.assert_allclose(got[1], pixel[1] * (0.5 + 0.5 * other[1]), rtol=1e-6)
    np.testing.assert_allclose(got[2], pixel[2] * other[2], rtol=1e-6)
    drawn = augment.draw_shade(key, 1000, 0.7)
    assert 0 <= drawn.min() < 0.05 and 0.65 < drawn.max() <= 0.7


def test_a_mixture_of_nothing_changes_nothing_and_of_all_takes_parts(key):
    pixel, other = jax.random.uniform(key, (2, 8, 16, 16, 3))
    none = augment.draw_mixture(key, pixel.shape, shade=0.0, cutmix=0.0)
    np.testing.assert_array_equal(augment.mix(pixel, other, none), pixel)
    boxes = augment.draw_mixture(key, pixel.shape, shade=0.0, cutmix=1.0)
    lent = np.asarray(augment.mix(pixel, other, boxes) == other).all(-1)
    assert (lent.any((1, 2)) & ~lent.all((1, 2))).all()


def test_boxes_are_pasted_from_another_image(key):
    x, other = np.zeros((200, 12, 10, 3), np.float32), np.ones((200, 12, 10, 3), np.float32)
    boxes = augment.draw_boxes(key, 200, 12, 10, p=0.5)
    pasted = np.asarray(augment.cutmix(x, other, boxes))
    by_hand = np.zeros_like(pasted)
    for image, (row, column, half_height, half_width) in zip(by_hand, np.asarray(boxes)):
        for i in range(12):
            for j in range(10):
                image[i, j] = abs(i - row) < half_height and abs(j - column) < half_width
    np.testing.assert_array_equal(pasted, by_hand)
    share = np.mean(pasted.any((1, 2, 3)))
    assert 0.35 < share < 0.6  # half of them, less those whose box missed every pixel's centre
    assert pasted.mean((1, 2, 3)).max() < 0.65


@pytest.mark.parametrize('p, expected', [(0.0, 0), (1.0, 50)])
def test_boxes_as_often_as_asked(key, p, expected):
    boxes = augment.draw_boxes(key, 50, 8, 8, p)
    assert int((boxes[:, 2] > 0).sum()) == expected


# --- Areas -----------------------------------------------------------------------------------


def test_areas_lie_in_the_image_and_have_the_sizes_drawn():
    areas = np.asarray(augment.draw_areas(jax.random.key(0), 4000))
    top, left, height, width = areas.T
    assert (areas >= 0).all()
    assert (top + height <= 1 + 1e-6).all() and (left + width <= 1 + 1e-6).all()
    part, ratio = height * width, width / height
    assert 0.07 < part.min() < 0.1 and 0.9 < part.max() <= 1 + 1e-6
    assert 0.45 < part.mean() < 0.55
    whole = (height < 1) & (width < 1)
    assert (0.75 - 1e-4 < ratio[whole]).all() and (ratio[whole] < 4 / 3 + 1e-4).all()


def test_resized_crop_of_the_whole_image_is_a_resize():
    x = np.random.default_rng(0).random((2, 12, 12, 3)).astype(np.float32)
    areas = jnp.asarray([[0.0, 0, 1, 1]] * 2)
    near = dict(rtol=0, atol=1e-5)
    np.testing.assert_allclose(augment.resized_crop(jnp.asarray(x), areas, 12), x, **near)
    for size in (7, 20):
        expected = jax.image.resize(jnp.asarray(x), (2, size, size, 3), 'linear', antialias=True)
        actual = augment.resized_crop(jnp.asarray(x), areas, size)
        np.testing.assert_allclose(actual, expected, **near)


def test_resized_crop_cuts_the_area_of_each_image():
    x = np.random.default_rng(0).random((2, 16, 16, 1)).astype(np.float32)
    areas = jnp.asarray([[0.25, 0.5, 0.5, 0.25], [0.0, 0.0, 0.5, 0.5]])  # whole pixels
    y = np.asarray(augment.resized_crop(jnp.asarray(x), areas, 8))
    # Away from the cut's borders, where what lies beyond them is not seen.
    tall = jax.image.resize(jnp.asarray(x[:1, 4:12, 8:12]), (1, 8, 8, 1), 'linear')
    np.testing.assert_allclose(y[0, 1:-1, 1:-1], tall[0, 1:-1, 1:-1], rtol=0, atol=1e-5)
    np.testing.assert_allclose(y[1], x[1, :8, :8], rtol=0, atol=1e-5)
