"""A bank of synthetic images on disk: a folder of whole batches, for images that fill no memory.

``batch-000012.safetensors`` holds `image` [n, S, S, channels] uint8, `label` [n] int32 and `seed`
[n, 2] int32, the run's seed and the number of the batch, from which the images follow, and what was
measured of them; and `sum` [n] uint32, the CRC-32 of each image and its label, since a changed
pixel is still a pixel.  A file is whole or absent, so the number of the next batch says all that a
continued synthesis needs.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open

from dfkd_jax import data
from dfkd_jax.errors import BankError, CheckpointError
from dfkd_jax.storage import files

MEASURED = 'measured/'  # before the names of a batch's metrics
FACTS = 'bank.json'
AGAIN = 'Remove it and all after it; the command that made the bank makes them again.'


def describe(folder: Path, facts: Mapping[str, Any]) -> None:
    """Says what a bank is of, in ``bank.json``: before its first batch."""
    files.write_json(folder / FACTS, facts)


def check(folder: Path, facts: Mapping[str, Any]) -> None:
    """Raises BankError unless a bank is full and is of these facts, as `describe` wrote them."""
    if not (folder / FACTS).is_file():
        raise BankError(f'{folder} is not a bank: it has no {FACTS}.')
    found = files.read_json(folder / FACTS)
    differ = [
        f'{name} {found.get(name)!r}, here {value!r}'
        for name, value in files.plain(facts).items()
        if found.get(name) != value
    ]
    if differ:
        raise BankError(
            f'{folder} is of another synthesis: {"; ".join(differ)}. Set config.synthesis to what '
            'made it.'
        )
    there = count(folder)
    if there < facts['batches']:
        raise BankError(
            f'{folder} has {there} of its {facts["batches"]} batches: finish the run that fills it.'
        )


def path_of(folder: Path, number: int) -> Path:
    """The file of a batch."""
    return folder / f'batch-{number:06d}.safetensors'


def count(folder: Path) -> int:
    """Batches that are there, without a gap from the first on."""
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
    """Puts in a batch of images [n, S, S, channels] uint8, labels [n], and what was measured."""
    seeds = np.tile(np.asarray([seed, number], np.int32), (len(label), 1))
    arrays = {'image': image, 'label': label.astype(np.int32), 'seed': seeds}
    arrays['sum'] = _sums(arrays['image'], arrays['label'])
    arrays |= {MEASURED + name: np.asarray(x, np.float32) for name, x in measured.items()}
    files.save_arrays(path_of(folder, number), arrays)


def read(folder: Path, number: int) -> dict[str, np.ndarray]:
    """A batch: `image`, `label` and `seed`.  Raises BankError if it is damaged or absent."""
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
    """What was measured of a batch.  Raises BankError as `read`."""
    arrays = read(folder, number)
    names = [name for name in arrays if name.startswith(MEASURED)]
    return {name.removeprefix(MEASURED): float(arrays[name]) for name in names}


def dataset(folder: Path, batches: int, facts: data.Facts, size: int) -> data.Dataset:
    """The first so many batches as a data set: in memory if they are small, read row by row if not.

    facts: of the teacher's data; the images have its channels and `size` pixels a side.
    Raises BankError where they do not.
    """
    shape = (size, size, facts.image_shape[2])
    labels, sums, places = [], [], []
    for number in range(batches):
        path = path_of(folder, number)
        try:
            with safe_open(path, framework='numpy') as file:
                image = file.get_slice('image')
                found, kind = tuple(image.get_shape()), image.get_dtype()
                label, check = file.get_tensor('label'), file.get_tensor('sum')
        except Exception as error:  # safetensors raises its own type
            raise BankError(f'{path} is missing or damaged ({error}). {AGAIN}') from error
        if kind != 'U8' or found[1:] != shape or len(label) and label.max() >= facts.num_classes:
            raise BankError(
                f'{path} has images {kind}{list(found[1:])} of classes up to '
                f'{label.max(initial=0)}: expected U8{list(shape)} and {facts.num_classes} '
                'classes. It is the bank of another data set or config.synthesis.stored_size.'
            )
        labels.append(label)
        sums.append(check)
        places += [(number, row) for row in range(found[0])]
    where, label = np.asarray(places).reshape(-1, 2), np.concatenate([*labels, []]).astype(np.int32)
    wanted = np.concatenate([*sums, []]).astype(np.uint32)
    facts = facts._replace(image_shape=shape, name=f'the bank {folder}')
    if len(label) * int(np.prod(shape)) <= data.IN_MEMORY_BYTES:
        whole = [read(folder, number)['image'] for number in range(batches)]
        images = np.concatenate([np.zeros((0, *shape), np.uint8), *whole])
        return data.Dataset(facts, len(label), lambda i: (images[i], label[i]), images, label)

    @lru_cache(maxsize=64)
    def opened(number: int) -> Any:
        return safe_open(path_of(folder, number), framework='numpy')

    def fetch(indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        images = np.zeros((len(indices), *shape), np.uint8)
        for out, (number, row) in zip(images, where[indices].tolist(), strict=True):
            try:
                out[:] = opened(number).get_slice('image')[row]
            except Exception as error:  # safetensors raises its own type
                raise BankError(
                    f'{path_of(folder, number)} is no longer there or no longer whole ({error}): '
                    'put it back, and the same command continues.'
                ) from error
        changed = np.flatnonzero(_sums(images, label[indices]) != wanted[indices])
        if changed.size:
            number = int(where[indices[changed[0]], 0])
            raise BankError(
                f'{path_of(folder, number)} has images that are not what was written. {AGAIN}'
            )
        return images, label[indices]

    return data.Dataset(facts, len(label), fetch, None, None)
