"""A bank of synthetic images on disk: a folder of batches, for more images than fit in memory.

``batch-000012.safetensors`` holds

    image  [n, S, S, channels] uint8
    label  [n] int32
    seed   [n, 2] int32, the run's seed and the number of the batch, which determine the images
    sum    [n] uint32, the CRC-32 of each image and its label: a changed pixel is still a pixel

and the batch's metrics.  A file is whole or absent, so the number of the next batch is all that a
continued synthesis needs.  ``bank.json`` describes how the bank is made.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import safe_open

from dfkd_jax import data
from dfkd_jax.data.loading import Fetch
from dfkd_jax.errors import BankError, CheckpointError
from dfkd_jax.storage import files

MEASURED = 'measured/'  # prefix of the names of a batch's metrics
DESCRIPTION = 'bank.json'
AGAIN = 'Remove it and all after it; the command that made the bank makes them again.'


def describe(folder: Path, description: Mapping[str, Any]) -> None:
    """Writes ``bank.json``, before the first batch."""
    files.write_json(folder / DESCRIPTION, description)


def check(folder: Path, description: Mapping[str, Any]) -> None:
    """Raises BankError unless a bank is full and has this description, as `describe` wrote it.

    description: has the number of `batches`, beside what tells one synthesis from another.
    """
    if not (folder / DESCRIPTION).is_file():
        raise BankError(f'{folder} is not a bank: it has no {DESCRIPTION}.')
    found = files.read_json(folder / DESCRIPTION)
    differ = [
        f'{name} {found.get(name)!r}, here {value!r}'
        for name, value in files.plain(description).items()
        if found.get(name) != value
    ]
    if differ:
        raise BankError(
            f'{folder} is of another synthesis: {"; ".join(differ)}. Set config.synthesis to what '
            'made it.'
        )
    there = count(folder)
    if there < description['batches']:
        raise BankError(
            f'{folder} has {there} of its {description["batches"]} batches: finish the run that '
            'fills it.'
        )


def path_of(folder: Path, number: int) -> Path:
    """The file of a batch."""
    return folder / f'batch-{number:06d}.safetensors'


def count(folder: Path) -> int:
    """The number of batches in the folder, from the first to the one before a gap."""
    number = 0
    while path_of(folder, number).exists():
        number += 1
    return number


def write(
    folder: Path,
    number: int,
    image: np.ndarray,
    label: np.ndarray,
    seed: int,
    measured: Mapping[str, float],
) -> None:
    """Writes a batch: images [n, S, S, channels] uint8, labels [n], and its metrics by name."""
    seeds = np.tile(np.asarray([seed, number], np.int32), (len(label), 1))
    arrays = {'image': image, 'label': label.astype(np.int32), 'seed': seeds}
    arrays['sum'] = _sums(arrays['image'], arrays['label'])
    arrays |= {MEASURED + name: np.asarray(x, np.float32) for name, x in measured.items()}
    files.save_arrays(path_of(folder, number), arrays)


def read(folder: Path, number: int) -> dict[str, np.ndarray]:
    """The arrays of a batch, by name.  Raises BankError if it is damaged or absent."""
    path = path_of(folder, number)
    try:
        arrays = files.load_arrays(path)
    except CheckpointError as error:
        raise BankError(
            f'{error} Without it and all after it, synthesis makes it again.'
        ) from error
    absent = [name for name in ('image', 'label', 'sum') if name not in arrays]
    if absent:
        raise BankError(f'{path} lacks {" and ".join(absent)}. {AGAIN}')
    if not np.array_equal(arrays['sum'], _sums(arrays['image'], arrays['label'])):
        raise BankError(f'{path} has images that are not what was written. {AGAIN}')
    return arrays


def _sums(image: np.ndarray, label: np.ndarray) -> np.ndarray:
    """The CRC-32 of each image and its label, [n] uint32."""
    rows = zip(image, label, strict=True)
    return np.asarray([zlib.crc32(x.tobytes() + y.tobytes()) for x, y in rows], np.uint32)


def measured(folder: Path, number: int) -> dict[str, float]:
    """The metrics of a batch.  Raises BankError as `read` does."""
    arrays = read(folder, number)
    names = [name for name in arrays if name.startswith(MEASURED)]
    return {name.removeprefix(MEASURED): float(arrays[name]) for name in names}


class _Index(NamedTuple):
    """Where every image of a bank is; all [N, ...]."""

    place: np.ndarray  # [N, 2], the number of its batch, and its row there
    label: np.ndarray  # [N] int32
    sum: np.ndarray  # [N] uint32


def dataset(folder: Path, batches: int, facts: data.Facts, size: int) -> data.Dataset:
    """The first `batches` batches as a data set: in memory if they fit, else read image by image.

    facts: of the teacher's data; the images have its channels and `size` pixels a side.
    Raises BankError where they do not.
    """
    shape = (size, size, facts.image_shape[2])
    index = _index(folder, batches, shape, facts.num_classes)
    number, label = len(index.label), index.label
    facts = facts._replace(image_shape=shape, name=f'the bank {folder}')
    if number * int(np.prod(shape)) <= data.IN_MEMORY_BYTES:
        whole = [read(folder, batch)['image'] for batch in range(batches)]
        images = np.concatenate([np.zeros((0, *shape), np.uint8), *whole])
        return data.Dataset(facts, number, lambda i: (images[i], label[i]), images, label)
    return data.Dataset(facts, number, _reader(folder, index, shape), None, None)


def digest(folder: Path, batches: int) -> str:
    """The sha256 of the checksums of all images, by which a bank is known wherever it lies."""
    sums = [read_sums(folder, number) for number in range(batches)]
    return hashlib.sha256(np.concatenate([*sums, np.zeros(0, np.uint32)]).tobytes()).hexdigest()


def read_sums(folder: Path, number: int) -> np.ndarray:
    """The CRC-32 of each image of a batch and its label, [n] uint32, as written."""
    path = path_of(folder, number)
    try:
        with safe_open(path, framework='numpy') as file:
            return file.get_tensor('sum')
    except Exception as error:  # safetensors raises its own type
        raise BankError(f'{path} is missing or damaged ({error}). {AGAIN}') from error


def _index(folder: Path, batches: int, shape: tuple[int, ...], num_classes: int) -> _Index:
    """The index of the first batches, from their headers, labels and checksums."""
    places, labels, sums = [], [], []
    for number in range(batches):
        path = path_of(folder, number)
        try:
            with safe_open(path, framework='numpy') as file:
                image = file.get_slice('image')
                found, kind = tuple(image.get_shape()), image.get_dtype()
                label, check = file.get_tensor('label'), file.get_tensor('sum')
        except Exception as error:  # safetensors raises its own type
            raise BankError(f'{path} is missing or damaged ({error}). {AGAIN}') from error
        if kind != 'U8' or found[1:] != shape or len(label) and label.max() >= num_classes:
            raise BankError(
                f'{path} has images {kind}{list(found[1:])} of classes up to '
                f'{label.max(initial=0)}: expected U8{list(shape)} and {num_classes} '
                'classes. It is the bank of another data set or config.synthesis.stored_size.'
            )
        places += [(number, row) for row in range(found[0])]
        labels.append(label)
        sums.append(check)
    return _Index(
        np.asarray(places).reshape(-1, 2),
        np.concatenate([*labels, []]).astype(np.int32),
        np.concatenate([*sums, []]).astype(np.uint32),
    )


def _reader(folder: Path, index: _Index, shape: tuple[int, ...]) -> Fetch:
    """Reads images of a bank by index, and checks their sums."""

    @lru_cache(maxsize=64)
    def opened(number: int) -> Any:
        return safe_open(path_of(folder, number), framework='numpy')

    def fetch(indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        images = np.zeros((len(indices), *shape), np.uint8)
        for out, (number, row) in zip(images, index.place[indices].tolist(), strict=True):
            try:
                out[:] = opened(number).get_slice('image')[row]
            except Exception as error:  # safetensors raises its own type
                raise BankError(
                    f'{path_of(folder, number)} is no longer there or no longer whole ({error}): '
                    'put it back, and the same command continues.'
                ) from error
        label = index.label[indices]
        changed = np.flatnonzero(_sums(images, label) != index.sum[indices])
        if changed.size:
            number = int(index.place[indices[changed[0]], 0])
            raise BankError(
                f'{path_of(folder, number)} has images that are not what was written. {AGAIN}'
            )
        return images, label

    return fetch
