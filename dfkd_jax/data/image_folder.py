"""Reads images from folders: plain ones, and those with a folder for each class."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from dfkd_jax.errors import DataError

SUFFIXES = ('.png', '.jpg', '.jpeg', '.bmp', '.gif', '.ppm', '.pgm', '.tif', '.tiff', '.webp')

Labelled = list[tuple[Path, int]]  # image files and their labels


def image_files(folder: Path) -> list[Path]:
    """The image files in a folder and in the folders below it, sorted; hidden ones are left out."""
    return sorted(
        path
        for path in folder.rglob('*')
        if path.suffix.lower() in SUFFIXES and not path.name.startswith('.')
    )


@contextlib.contextmanager
def open_image(path: Path) -> Iterator[Any]:
    """Opens an image with Pillow, which decodes it when its pixels are asked for.

    Raises DataError where either fails.
    """
    from PIL import Image

    try:
        with Image.open(path) as image:
            yield image
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(
            f'{path} cannot be read as an image ({error}): remove it or get it again'
        ) from error


# --- Images without classes, such as a diffusion prior is trained on ------------------------


def read_folder(folder: Path, size: int, channels: int) -> np.ndarray:
    """All images under a folder, sorted by path: [N, size, size, channels] uint8.

    Transparent pixels become black.  An image that is not square is cropped to its centre.
    channels: 1 (grey) or 3.

    Raises DataError where there are no images, or one cannot be read.
    """
    from PIL import Image

    files = image_files(folder)
    if not files:
        raise DataError(
            f'there are no images in {folder} ({", ".join(SUFFIXES)}): check config.data.folder.'
        )
    images = np.empty((len(files), size, size, channels), np.uint8)
    for path, out in zip(files, images):
        with open_image(path) as file:
            image = file.convert('RGBA')
        image = Image.alpha_composite(Image.new('RGBA', image.size, (0, 0, 0, 255)), image)
        image = image.convert('L' if channels == 1 else 'RGB')
        if image.size != (size, size):
            (width, height), side = image.size, min(image.size)
            left, top = (width - side) / 2, (height - side) / 2
            box = (left, top, left + side, top + side)
            image = image.resize((size, size), Image.Resampling.BOX, box)
        out[:] = np.asarray(image).reshape(out.shape)
    return images


# --- Class folders -------------------------------------------------------------------------


def training_folder(folder: Path) -> Path:
    """Where the training images are: in train/ or, without it, in the folder itself."""
    return folder / 'train' if (folder / 'train').is_dir() else folder


def class_folders(folder: Path) -> list[str]:
    """The classes of the training images: the names of the folders with images in them, sorted.

    A label is a place in this list, as in PyTorch's ImageFolder.
    Raises DataError where there are fewer than two classes.
    """
    top = training_folder(folder)
    classes = sorted(path.name for path in top.iterdir() if path.is_dir() and image_files(path))
    if len(classes) < 2:
        raise DataError(
            f'{top} has {len(classes)} folders of images: expected two or more, one for each class'
        )
    return classes


def labelled_splits(folder: Path, classes: list[str]) -> dict[str, Labelled]:
    """The labelled images of 'train' and of 'validation', 'test' or both.

    Without labelled images in val/ or test/, a fifth of each class becomes 'test'.
    Raises DataError for a class that the training images lack or that is too small to split, and
    for images that are listed but missing.
    """
    top, labels = training_folder(folder), {name: label for label, name in enumerate(classes)}
    splits = {'train': _labelled(top, labels)}
    if top != folder:
        for part, split in (('val', 'validation'), ('validation', 'validation'), ('test', 'test')):
            found = _labelled(folder / part, labels) if (folder / part).is_dir() else []
            if found:  # Tiny-ImageNet's test/ has images, but no classes
                splits[split] = found
    return splits if len(splits) > 1 else _hold_out(splits['train'], classes)


def _labelled(folder: Path, labels: dict[str, int]) -> Labelled:
    """The images of a split's folder with their labels; none where it has no classes."""
    if (folder / 'val_annotations.txt').is_file():
        return _annotated(folder, labels)
    folders = sorted(path for path in folder.iterdir() if path.is_dir() and image_files(path))
    if [path.name for path in folders] == ['images']:
        return []
    unknown = [path.name for path in folders if path.name not in labels]
    if unknown:
        raise DataError(
            f'{folder} has class folders that the training images lack: {", ".join(unknown[:5])}'
        )
    return [(path, labels[top.name]) for top in folders for path in image_files(top)]


def _annotated(folder: Path, labels: dict[str, int]) -> Labelled:
    """The images of Tiny-ImageNet's val/, whose classes are listed in val_annotations.txt."""
    annotations = folder / 'val_annotations.txt'  # file, class, and the corners of a box
    rows = [row.split('\t')[:2] for row in annotations.read_text().splitlines() if row.strip()]
    unknown = sorted({row[-1] for row in rows} - set(labels))
    if unknown:
        raise DataError(f'{annotations} names classes without a folder: {unknown[:5]}')
    found = [(folder / 'images' / file, labels[name]) for file, name in rows]
    missing = [path.name for path, _ in found if not path.is_file()]
    if missing:
        raise DataError(
            f'{folder / "images"} lacks {len(missing)} of the images that {annotations.name} '
            f'lists: {", ".join(missing[:5])}'
        )
    return found


def _hold_out(files: Labelled, classes: list[str]) -> dict[str, Labelled]:
    """A fifth of each class, at least one image, for testing; the rest for training.

    The images whose names hash lowest are held out, so that no file system's order matters.
    """
    splits: dict[str, Labelled] = {'train': [], 'test': []}
    for label, name in enumerate(classes):
        mine = [pair for pair in files if pair[1] == label]
        if len(mine) < 2:
            raise DataError(f'class {name} has {len(mine)} image: expected two, train and test')
        mine.sort(key=lambda pair: hashlib.sha256(f'{name}/{pair[0].name}'.encode()).hexdigest())
        tests = max(1, round(len(mine) / 5))
        splits['test'] += mine[:tests]
        splits['train'] += mine[tests:]
    return splits


def class_names(folder: Path, classes: list[str]) -> list[str]:
    """The folders' names, or the first word that words.txt has for each WordNet id."""
    path = folder / 'words.txt'
    if not path.is_file():
        return classes
    rows = (row.split('\t', 1) for row in path.read_text().splitlines() if '\t' in row)
    words = {key: text.split(',')[0].strip() for key, text in rows}
    names = [words.get(name, name) for name in classes]
    # TFDS wants names that differ: 'crane' is a bird and a machine.
    return [f'{w} ({c})' if names.count(w) > 1 else w for c, w in zip(classes, names, strict=True)]


def formats(paths: Iterable[Path]) -> tuple[bool, tuple[int, int] | None]:
    """Whether all images are grey, and their size (H, W), or None if they differ in size.

    Reads headers only.  Raises DataError for a file that Pillow does not read.
    """
    sizes, modes = set(), set()
    for path in paths:
        with open_image(path) as image:
            sizes.add((image.height, image.width))
            modes.add(image.mode)
    return modes <= {'1', 'L', 'LA'}, sizes.pop() if len(sizes) == 1 else None
