"""Shuffled reading of training images, by `dfkd_jax.data` and by grain: images per second.

    pip install grain==0.2.18
    PYTHONPATH=. python experiments/grain_speed.py --data_dir=FOLDER

Makes a data set of 20,000 PNG images of 32 px and one of 600 JPEG images of 320x240 (which become
224 px), reads batches in turns, and prints the best of five rates of each reader.  Results:
``experiments/grain.md``.
"""

from __future__ import annotations

import argparse
import io
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grain
import numpy as np
import tensorflow_datasets as tfds
from absl import flags
from ml_collections import ConfigDict
from PIL import Image

from dfkd_jax import data
from dfkd_jax.data import loading, prepare

BATCH, ROUNDS, SECONDS = 128, 5, 2.0


def make(name: str, root: Path, number: int, size: tuple[int, int], kind: str) -> ConfigDict:
    """A data set of smooth images with noise; its settings."""

    def examples() -> Iterator[Any]:
        for i in range(number):
            rng = np.random.default_rng(i)
            small = Image.fromarray(rng.integers(0, 256, (6, 8, 3), np.uint8))
            pixels = np.asarray(small.resize(size)) + rng.integers(-9, 10, (*size[::-1], 3))
            file = io.BytesIO()
            Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(file, kind)
            file.seek(0)
            yield i, {'image': file, 'label': i % 10}

    features = {
        'image': tfds.features.Image(shape=(None, None, 3), encoding_format=kind.lower()),
        'label': tfds.features.ClassLabel(num_classes=10),
    }
    if not (root / name).exists():
        splits = {split: prepare.Split(number, examples) for split in ('train', 'test')}
        prepare.write(name, None, root, features, splits)
    return ConfigDict({
        'name': name, 'data_dir': str(root), 'num_classes': 10, 'channels': 3, 'mean': (0.5,),
        'std': (0.5,), 'image_size': 32 if kind == 'PNG' else 224,
        'resize': 'resize' if kind == 'PNG' else 'crop',
    })  # fmt: skip


def by_grain(source: Any, decode: Callable, threads: int, processes: int = 0) -> Iterator[Any]:
    """Shuffled batches of what `decode` makes of the records of a source."""
    found = grain.MapDataset.source(source).seed(0).shuffle().map(decode)
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=4 * threads)
    batches = found.batch(BATCH, drop_remainder=True).repeat().to_iter_dataset(options)
    if processes:
        batches = batches.mp_prefetch(grain.MultiprocessingOptions(num_workers=processes))
    return iter(batches)


def readers(settings: ConfigDict) -> dict[str, Callable[[], Iterator[Any]]]:
    """What reads the training images of a data set, in memory (32 px) and from its files."""
    size, name = settings.image_size, settings.name
    lazy = data.load(settings, 'train', in_memory_bytes=0)
    source = data.find(name, settings.data_dir).as_data_source(
        split='train', decoders={'image': tfds.decode.SkipDecoding()}
    )

    def decode(record: Any) -> tuple[np.ndarray, np.int32]:
        out = np.zeros((size, size, 3), np.uint8)
        with Image.open(io.BytesIO(record['image'])) as image:
            loading.fit_image(image.convert('RGB'), settings.resize, out)
        return out, np.int32(record['label'])

    found: dict[str, Callable[[], Iterator[Any]]] = {
        f'{name}, files, dfkd_jax': lambda: lazy.shuffled(BATCH, 0),
        f'{name}, files, grain, 2 threads': lambda: by_grain(source, decode, 2),
        f'{name}, files, grain, 16 threads': lambda: by_grain(source, decode, 16),
        f'{name}, files, grain, 2 processes': lambda: by_grain(source, decode, 1, 2),
    }
    if size == 32:
        ready = data.load(settings, 'train')
        images, labels = ready.images, ready.labels
        assert images is not None and labels is not None
        indices = range(ready.size)

        def fetch(chosen: Any) -> Any:
            return images[chosen], labels[chosen]

        def whole_batches() -> Iterator[Any]:
            found = grain.MapDataset.source(indices).seed(0).shuffle()
            found = found.batch(BATCH, drop_remainder=True).map(fetch).repeat()
            return iter(found.to_iter_dataset(grain.ReadOptions(0, 0)))

        found |= {
            f'{name}, memory, dfkd_jax': lambda: ready.shuffled(BATCH, 0),
            f'{name}, memory, grain, image by image': lambda: by_grain(indices, fetch, 0),
            f'{name}, memory, grain, indices then batches': whole_batches,
        }
    return found


def rate(reader: Callable[[], Iterator[Any]]) -> float:
    """Images per second after the first batch."""
    batches = reader()
    next(batches)
    done, started = 0, time.perf_counter()
    while time.perf_counter() - started < SECONDS:
        next(batches)
        done += 1
    return done * BATCH / (time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--data_dir', type=Path, required=True)
    root = parser.parse_args().data_dir
    flags.FLAGS.mark_as_parsed()  # or grain's processes do not start
    small = make('small', root, 20_000, (32, 32), 'PNG')
    large = make('large', root, 600, (320, 240), 'JPEG')
    all_readers = readers(small) | readers(large)
    best = dict.fromkeys(all_readers, 0.0)
    for _ in range(ROUNDS):
        for name, reader in all_readers.items():
            best[name] = max(best[name], rate(reader))
    for name, images in best.items():
        print(f'{name:45} {images:12,.0f}')


if __name__ == '__main__':
    main()
