"""The ring of synthetic images: what goes in comes out, the oldest leaves first."""

import jax
import numpy as np
import pytest

from dfkd_jax.methods.shared import image_bank as banks

SHAPE = (2, 3, 1)


def batch(number: int, size: int = 4) -> tuple[np.ndarray, np.ndarray]:
    """Images of one brightness, and labels, that tell which batch they came with."""
    pixel = np.full((size, *SHAPE), number / 255, np.float32)
    return pixel, np.full(size, number, np.int32)


def filled(times: int, size: int = 12) -> banks.Bank:
    put = jax.jit(banks.put, donate_argnums=0)
    bank = banks.empty(size, SHAPE)
    for number in range(times):
        bank = put(bank, *batch(number))
    return bank


@pytest.mark.parametrize('times, labels', [(2, [0, 1]), (3, [0, 1, 2]), (7, [4, 5, 6])])
def test_the_last_batches_are_kept(times: int, labels: list[int]):
    bank = filled(times)
    assert int(bank.written) == 4 * times
    rows = np.asarray(banks.draw(bank, jax.random.key(0), 2_000))
    pixel, label = jax.jit(banks.take)(bank, rows)
    assert sorted(set(label.tolist())) == labels
    np.testing.assert_allclose(255 * pixel[:, 0, 0, 0], label, atol=1e-4)
    assert len(set(rows.tolist())) == min(4 * times, 12)  # each of them can be drawn


def test_a_bank_of_160000_cifar_images_takes_half_a_gigabyte():
    bank = jax.eval_shape(lambda: filled_once(160_000, 400, (32, 32, 3)))
    assert bank.image.dtype == np.uint8
    assert sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(bank)) == 492_800_004


def filled_once(size: int, batch_size: int, shape: tuple[int, int, int]) -> banks.Bank:
    label = jax.numpy.zeros(batch_size, np.int32)
    return banks.put(banks.empty(size, shape), jax.numpy.zeros((batch_size, *shape)), label)


def test_pixels_are_rounded_to_bytes_and_clipped():
    pixel = np.float32([-0.2, 0.0, 0.4999 / 255, 0.5001 / 255, 0.7, 1.0, 1.3, 1.0])
    bank = banks.put(banks.empty(8, (1, 1, 1)), pixel.reshape(8, 1, 1, 1), np.arange(8))
    assert bank.image.dtype == np.uint8
    got, label = banks.take(bank, np.arange(8))
    np.testing.assert_array_equal(label, np.arange(8))
    wanted = np.round(np.clip(pixel, 0, 1) * 255) / 255
    np.testing.assert_allclose(np.ravel(got), wanted, rtol=1e-6)


def test_an_empty_bank_gives_black_and_a_batch_that_would_wrap_is_refused():
    bank = banks.empty(12, SHAPE)
    pixel, _ = banks.take(bank, banks.draw(bank, jax.random.key(0), 5))
    assert not np.any(pixel)
    with pytest.raises(ValueError, match='12 images takes no batches of 5'):
        banks.put(bank, *batch(0, 5))
