"""Small data sets in the official formats and places, for tests that need no download.

Pictures are generated: a colour and a stripe for each class, and noise, so that a network can learn
them.  CIFAR stand-ins hold the 20 labelled test images that PyPI's foolbox ships, where it is
installed (`pip install --no-deps foolbox==3.3.4`).
"""

from __future__ import annotations

import gzip
import importlib.util
import struct
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from ml_collections import ConfigDict
from PIL import Image

from dfkd_jax.data import DATASETS
from dfkd_jax.data.prepare import Split, png, write

COARSE = 20  # superclasses of CIFAR-100


def config(name: str, data_dir: str | Path | None, **changes: Any) -> ConfigDict:
    """What `config.data` is: a listed set at its own size, but for the changes."""
    spec = DATASETS.get(name)
    fields = dict(
        name=name,
        data_dir=data_dir and str(data_dir),
        num_classes=spec.num_classes if spec else 3,
        image_size=(spec and spec.image_size) or 32,
        channels=spec.channels if spec else 3,
        resize='resize',
        mean=None,
        std=None,
    )
    return ConfigDict(fields | changes)


def picture(label: int, i: int, size: int, channels: int = 3) -> np.ndarray:
    """Image i of a class: [size, size, channels] uint8."""
    color = np.random.default_rng(label).integers(60, 200, channels)
    image = color + np.random.default_rng((label, i)).normal(0, 12, (size, size, channels))
    image[label % size] += 50
    return np.clip(image, 0, 255).astype(np.uint8)


def foolbox_images(data_set: str) -> list[tuple[np.ndarray, int]]:
    """The 20 images and labels that foolbox has of 'cifar10', 'cifar100'; none if not installed."""
    found = importlib.util.find_spec('foolbox')  # not imported: it needs more packages
    if found is None or not found.submodule_search_locations:
        return []
    files = sorted((Path(found.submodule_search_locations[0]) / 'data').glob(f'{data_set}_*.png'))
    return [(np.asarray(Image.open(file)), int(file.stem.split('_')[-1])) for file in files]


def cifar(data_dir: Path, name: str = 'cifar10', train: int = 30, test: int = 30) -> Path:
    """CIFAR-10 or CIFAR-100 as TFDS prepares it; foolbox's images are the first test images."""
    spec = DATASETS[name]
    real = foolbox_images(name)

    def split(key: str, size: int) -> Split:
        def make() -> Any:
            for i in range(size):
                label = i % spec.num_classes
                image = picture(label, i, 32)
                if key == 'test' and i < len(real):
                    image, label = real[i]
                example = {'id': f'{key}_{i:05d}', 'image': png(image), 'label': label}
                yield i, example | ({'coarse_label': label // 5} if name == 'cifar100' else {})

        return Split(size, make)

    features = {
        'id': tfds.features.Text(),
        'image': tfds.features.Image(shape=(32, 32, 3)),
        'label': tfds.features.ClassLabel(names=spec.class_names),
    }
    if name == 'cifar100':
        features['coarse_label'] = tfds.features.ClassLabel(num_classes=COARSE)
    splits = {'train': split('train', train), 'test': split('test', test)}
    return write(name, spec, data_dir, features, splits)


def imagenet(data_dir: Path, train: int = 12, validation: int = 6) -> Path:
    """ImageNet (`imagenet2012`) as TFDS prepares it: JPEG files of many sizes, some grey."""
    spec = DATASETS['imagenet']
    sizes = ((40, 30), (30, 48), (56, 56))

    def split(key: str, size: int) -> Split:
        def make() -> Any:
            for i in range(size):
                grey = i % 4 == 3
                pixels = picture(i, i, 64, 1 if grey else 3)
                file = png(pixels)
                image = Image.open(file).resize(sizes[i % 3])
                file.seek(0)
                file.truncate()
                image.save(file, 'JPEG', quality=95)
                file.seek(0)
                yield f'{i}', {'image': file, 'label': i, 'file_name': f'{key}_{i}.JPEG'}

        return Split(size, make)

    features = {
        'image': tfds.features.Image(encoding_format='jpeg'),
        'label': tfds.features.ClassLabel(names=[f'n{i:08d}' for i in range(1000)]),
        'file_name': tfds.features.Text(),
    }
    splits = {'train': split('train', train), 'validation': split('validation', validation)}
    return write('imagenet', spec, data_dir, features, splits)


def fashion_mnist_files(folder: Path, train: int = 40, test: int = 20) -> Path:
    """The four IDX files of Fashion-MNIST, gzipped."""
    folder.mkdir(parents=True, exist_ok=True)
    for prefix, size in (('train', train), ('t10k', test)):
        labels = np.arange(size) % 10
        images = [picture(label, i, 28, 1) for i, label in enumerate(labels.tolist())]
        for kind, values in (('images-idx3', np.stack(images)[..., 0]), ('labels-idx1', labels)):
            header = struct.pack(f'>BBBB{values.ndim}I', 0, 0, 8, values.ndim, *values.shape)
            file = folder / f'{prefix}-{kind}-ubyte.gz'
            file.write_bytes(gzip.compress(header + values.astype(np.uint8).tobytes()))
    return folder


def cifar_files(folder: Path, name: str = 'cifar10', each: int = 10) -> Path:
    """The binary version of CIFAR: label bytes, then planes of pixels."""
    folder.mkdir(parents=True, exist_ok=True)
    spec = DATASETS[name]
    if name == 'cifar10':
        parts = [f'data_batch_{i}.bin' for i in range(1, 6)] + ['test_batch.bin']
        (folder / 'batches.meta.txt').write_text('\n'.join(spec.class_names) + '\n\n')
    else:
        parts = ['train.bin', 'test.bin']
        (folder / 'fine_label_names.txt').write_text('\n'.join(spec.class_names) + '\n')
        coarse = '\n'.join(f'kind_{i}' for i in range(COARSE))
        (folder / 'coarse_label_names.txt').write_text(f'{coarse}\n')
    for part in parts:
        rows = []
        for i in range(each):
            label = i % spec.num_classes
            labels = bytes([label]) if name == 'cifar10' else bytes([label // 5, label])
            rows.append(labels + picture(label, i, 32).transpose(2, 0, 1).tobytes())
        (folder / part).write_bytes(b''.join(rows))
    return folder


def class_folders(folder: Path, names: str = 'ant bee cow', each: int = 5, size: int = 12) -> Path:
    """PNG files in a folder for each class."""
    for label, name in enumerate(names.split()):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for i in range(each):
            Image.fromarray(picture(label, i, size)).save(folder / name / f'{i}.png')
    return folder


def domainnet_files(folder: Path) -> Path:
    """A domain's ten classes, as train/CLASS/* and test/CLASS/*."""
    for label, name in enumerate(DATASETS['domainnet'].class_names):
        for i, split in enumerate(('train', 'train', 'test')):
            (folder / split / name).mkdir(parents=True, exist_ok=True)
            pixels = Image.fromarray(picture(label, i, 40 + i))
            pixels.save(folder / split / name / f'{i}.png')
    return folder


def tiny_imagenet_files(folder: Path, classes: int = 200, each: int = 1, size: int = 64) -> Path:
    """The folder that tiny-imagenet-200.zip unpacks to; the last image of a class is grey."""
    # The published list is in no order; labels must follow the sorted folders all the same.
    ids = [f'n{(i * 7919) % 100_000:08d}' for i in range(classes)]
    ranks = {wnid: rank for rank, wnid in enumerate(sorted(ids))}
    rows = []
    (folder / 'val' / 'images').mkdir(parents=True)
    (folder / 'test' / 'images').mkdir(parents=True)
    for n, wnid in enumerate(ids):
        images = folder / 'train' / wnid / 'images'
        images.mkdir(parents=True)
        (images.parent / f'{wnid}_boxes.txt').write_text(f'{wnid}_0.JPEG\t0\t0\t62\t62\n')
        for i in range(each):
            pixels = picture(ranks[wnid], i, size, 1 if i and i == each - 1 else 3)
            Image.open(png(pixels)).save(images / f'{wnid}_{i}.JPEG')
        val = f'val_{n}.JPEG'
        Image.fromarray(picture(ranks[wnid], 99, size)).save(folder / 'val' / 'images' / val)
        rows.append(f'{val}\t{wnid}\t0\t32\t44\t62\n')
    Image.fromarray(picture(0, 0, size)).save(folder / 'test' / 'images' / 'test_0.JPEG')
    (folder / 'val' / 'val_annotations.txt').write_text(''.join(rows))
    (folder / 'wnids.txt').write_text('\n'.join(ids) + '\n')
    words = [f'{wnid}\t{"crane" if n < 2 else f"thing {n}"}, also\n' for n, wnid in enumerate(ids)]
    (folder / 'words.txt').write_text(''.join(words))
    return folder
