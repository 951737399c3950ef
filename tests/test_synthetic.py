"""The bank of synthetic images on disk: it gives back what was put in, or says what is wrong."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pytest

from dfkd_jax import data
from dfkd_jax.data import synthetic
from dfkd_jax.errors import BankError
from dfkd_jax.storage import files

FACTS = data.Facts('set', 4, ('a', 'b', 'c', 'd'), (6, 6, 1), (0.5,), (0.5,), 9, 9, True, 1)


def fill(folder: Path, batches: int = 3, size: int = 6) -> np.ndarray:
    """Batches of 2, 3, 4... images; returns all images."""
    rng, all_ = np.random.default_rng(0), []
    for number in range(batches):
        image = rng.integers(0, 255, (number + 2, size, size, 1)).astype(np.uint8)
        synthetic.write(folder, number, image, np.full(len(image), number), 7, {'g/ce': number / 2})
        all_.append(image)
    return np.concatenate(all_)


def test_bank_gives_back_what_was_put_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    images = fill(tmp_path)
    assert synthetic.count(tmp_path) == 3
    batch = synthetic.read(tmp_path, 1)
    assert batch['seed'].tolist() == [[7, 1]] * 3 and batch['label'].tolist() == [1, 1, 1]
    assert synthetic.measured(tmp_path, 1) == {'g/ce': 0.5}
    whole = synthetic.dataset(tmp_path, 3, FACTS, 6)
    assert whole.images is not None
    monkeypatch.setattr(data, 'IN_MEMORY_BYTES', 0)
    streamed = synthetic.dataset(tmp_path, 3, FACTS, 6)
    assert streamed.images is None and streamed.size == whole.size == 9
    for dataset in (whole, streamed):
        order = np.array([8, 0, 4, 4])
        image, label = dataset.fetch(order)
        np.testing.assert_array_equal(image, images[order])
        assert label.tolist() == [2, 0, 1, 1] and label.dtype == np.int32
    for a, b in zip(whole.shuffled(4, 1), streamed.shuffled(4, 1), strict=False):
        np.testing.assert_array_equal(a.image, b.image)
        if a.image is not None:
            break
    assert synthetic.dataset(tmp_path, 2, FACTS, 6).size == 5
    late = synthetic.dataset(tmp_path, 3, FACTS, 6)
    synthetic.path_of(tmp_path, 2).write_bytes(b'')
    with pytest.raises(BankError, match='batch-000002.*no longer whole.*put it back'):
        late.fetch(np.array([8]))


def test_a_bank_that_does_not_fit_is_refused(tmp_path: Path):
    fill(tmp_path)
    with pytest.raises(BankError, match=r'batch-000000.*\[6, 6, 1\].*\[8, 8, 1\]'):
        synthetic.dataset(tmp_path, 3, FACTS, 8)
    with pytest.raises(BankError, match='classes'):
        synthetic.dataset(tmp_path, 3, FACTS._replace(num_classes=2), 6)
    floats = {'image': np.full((2, 6, 6, 1), np.nan, np.float32), 'label': np.zeros(2, np.int32)}
    floats['sum'] = np.zeros(2, np.uint32)
    files.save_arrays(synthetic.path_of(tmp_path / 'nan', 0), floats)
    with pytest.raises(BankError, match=r'images F32\[6, 6, 1\].*expected U8'):
        synthetic.dataset(tmp_path / 'nan', 1, FACTS, 6)
    with pytest.raises(BankError, match='batch-000003.*missing or damaged'):
        synthetic.dataset(tmp_path, 4, FACTS, 6)
    path = synthetic.path_of(tmp_path, 1)
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(BankError, match='batch-000001.*missing or damaged'):
        synthetic.dataset(tmp_path, 3, FACTS, 6)
    with pytest.raises(BankError, match='not a whole safetensors file'):
        synthetic.read(tmp_path, 1)


@pytest.mark.parametrize('name', ['image', 'label'])
def test_a_changed_bit_of_a_bank_is_noticed(tmp_path: Path, monkeypatch, name: str):
    fill(tmp_path)
    arrays = synthetic.read(tmp_path, 1)
    streaming = partial(monkeypatch.setattr, data, 'IN_MEMORY_BYTES', 0)
    arrays[name] = arrays[name].copy()
    arrays[name].flat[-1] ^= 1  # of the last of its three images
    files.save_arrays(synthetic.path_of(tmp_path, 1), arrays)
    message = 'batch-000001.* has images that are not what was written. Remove it and all after'
    with pytest.raises(BankError, match=message):
        synthetic.dataset(tmp_path, 3, FACTS, 6)
    streaming()
    streamed = synthetic.dataset(tmp_path, 3, FACTS, 6)
    streamed.fetch(np.array([2, 8, 3, 0]))
    with pytest.raises(BankError, match=message):
        streamed.fetch(np.array([2, 8, 4]))
    # Wherever a bit of the file changes: noticed, or not of the images and labels.
    fill(tmp_path, batches=1)
    path = synthetic.path_of(tmp_path, 0)
    whole, file = synthetic.dataset(tmp_path, 1, FACTS, 6).fetch(np.arange(2)), path.read_bytes()
    noticed = 0
    for at in range(len(file)):
        path.write_bytes(file[:at] + bytes([file[at] ^ 1 << at % 8]) + file[at + 1 :])
        try:
            found = synthetic.dataset(tmp_path, 1, FACTS, 6).fetch(np.arange(2))
        except BankError:
            noticed += 1
        else:
            for one, other in zip(found, whole, strict=True):
                np.testing.assert_array_equal(one, other)
    assert noticed > len(file) // 2
    path.write_bytes(file)
    del arrays['sum']
    files.save_arrays(synthetic.path_of(tmp_path, 1), arrays)
    with pytest.raises(BankError, match='batch-000001.* lacks sum'):
        synthetic.read(tmp_path, 1)
