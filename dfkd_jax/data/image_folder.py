"""Reads images from folders: plain ones, and those with a folder for each class.

What PyTorch's ImageFolder would make of a folder is what a teacher was most likely trained on, so
labels follow the names of class folders, sorted as text, and pixels are taken as they are stored:
transparency is dropped, and a rotation in the metadata (EXIF) is not applied.  What ImageFolder
would take in silence and no teacher should see (a hidden folder, an empty class, a split that no
one reads) is left out where its meaning is plain, and an error elsewhere.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dfkd_jax.errors import DataError

SUFFIXES = (
    '.png', '.jpg', '.jpeg', '.jpe', '.jfif', '.bmp', '.gif', '.ppm', '.pgm', '.tif', '.tiff',
    '.webp',
)  # fmt: skip
# What may lie beside images: notes of people and of their systems.
NOTES = (
    '.txt', '.md', '.csv', '.tsv', '.json', '.xml', '.yaml', '.yml', '.html', '.pdf', '.log',
    '.db', '.ini', '.py', '.sh', '.ipynb',
)  # fmt: skip
# The names of splits, in any capitals, and the split that each is.
SPLITS = {
    'train': 'train', 'training': 'train',
    'val': 'validation', 'valid': 'validation', 'validation': 'validation', 'dev': 'validation',
    'test': 'test', 'testing': 'test',
}  # fmt: skip

ORDER = tuple(dict.fromkeys(SPLITS.values()))

GREY_16 = ('I;16', 'I;16L', 'I;16B', 'I;16N')  # Pillow's names for 16 bits of grey

Labelled = list[tuple[Path, int]]  # image files and their labels


def _hidden(name: str) -> bool:
    """Whether a file or folder is of a system or a program, such as Jupyter or macOS's zip."""
    return name.startswith('.') or name == '__MACOSX'


def _is_note(path: Path) -> bool:
    """Whether a file may lie beside images without being one."""
    return path.suffix.lower() in NOTES or path.stem.lower() in ('readme', 'license')


def _files(folder: Path) -> list[Path]:
    """The files in a folder and in the folders below it, sorted, without what is hidden.

    Links to folders are followed.  Raises DataError for a link that leads to a folder again.
    """
    found, seen = [], set()
    for root, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(root)
        if real in seen:
            raise DataError(f'{root} is a link to a folder that is read already: remove it')
        seen.add(real)
        folders[:] = [name for name in folders if not _hidden(name)]
        found += [Path(root, name) for name in names if not _hidden(name)]
    return sorted(found)


def image_files(folder: Path) -> list[Path]:
    """The image files in a folder and in the folders below it, sorted; hidden ones are left out."""
    return [path for path in _files(folder) if path.suffix.lower() in SUFFIXES]


def _folders(folder: Path) -> list[Path]:
    """The folders in a folder, sorted, without hidden ones."""
    return sorted(path for path in folder.iterdir() if path.is_dir() and not _hidden(path.name))


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


def eight_bits(image: Any) -> Any:
    """A Pillow image whose pixels have eight bits a channel: the upper ones of sixteen.

    Pillow itself would clip 16 bits of grey to white.  Raises ValueError for pixels of 32 bits,
    whose range no one knows.
    """
    from PIL import Image

    if image.mode in GREY_16 or image.mode == 'I' and image.format in ('PNG', 'PPM'):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ('I', 'F'):
        raise ValueError('its pixels have 32 bits: save it with 8 or 16')
    return image


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
            image = eight_bits(file).convert('RGBA')
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


class Layout(NamedTuple):
    """A folder of labelled images, understood.

    top: the folder itself or, where an archive was unpacked into one of its own, that one.
    splits: the folders of 'train', 'validation' and 'test' that there are; {'train': top} for a
      folder of class folders without splits.
    classes: the names of the class folders, sorted; a label is a place in this list, as in
      PyTorch's ImageFolder.
    """

    top: Path
    splits: dict[str, Path]
    classes: list[str]


def understand(folder: Path) -> Layout:
    """The splits and the classes of a folder.

    Training images tell the classes or, without them, the images of the other splits.
    Raises DataError where there are fewer than two classes, for a class without images, and for
    whatever beside the splits or the classes is not understood.
    """
    top = _unwrapped(folder)
    splits = _splits(top)
    if not splits:
        _refuse_strays(top, top.iterdir(), 'beside its class folders')
        splits = {'train': top}
    telling = [splits['train']] if 'train' in splits else list(splits.values())
    classes = sorted({name for split in telling for name in _classes_of(split)})
    if len(classes) < 2:
        where = ' and '.join(map(str, telling))
        raise DataError(
            f'{where} has {len(classes)} folders of images: expected two or more, one for each '
            'class'
        )
    return Layout(top, splits, classes)


def _unwrapped(folder: Path) -> Path:
    """The folder in which the images are: archives often unpack into one folder of their own."""
    inside = _folders(folder)
    while len(inside) == 1 and inside[0].name.lower() not in SPLITS and _folders(inside[0]):
        if any(path.suffix.lower() in SUFFIXES for path in folder.iterdir()):
            break  # images beside it: an error, of which the caller says more
        folder, inside = inside[0], _folders(inside[0])
    return folder


def _splits(top: Path) -> dict[str, Path]:
    """The folders of splits, by the split; {} if there are none.

    Raises DataError for two folders of one split, and for what lies beside them.
    """
    inside = _folders(top)
    named = [path for path in inside if path.name.lower() in SPLITS]
    if not named:
        return {}
    splits: dict[str, Path] = {}
    for path in sorted(named, key=lambda path: ORDER.index(SPLITS[path.name.lower()])):
        split = SPLITS[path.name.lower()]
        if split in splits:
            raise DataError(
                f'{splits[split]} and {path.name} are both the {split} split: put their images '
                'into one folder, or remove one'
            )
        splits[split] = path
    others = [path.name for path in inside if path not in named]
    if others:
        raise DataError(
            f'{top} has {", ".join(others[:5])} beside {", ".join(path.name for path in named)}: '
            f'expected only folders of splits ({", ".join(SPLITS)}, in any capitals). Rename what '
            'is a split, and move away what is not'
        )
    _refuse_strays(top, top.iterdir(), f'beside {named[0].name}')
    return splits


def _refuse_strays(folder: Path, paths: Iterable[Path], where: str) -> None:
    """Raises DataError for files that are neither notes nor hidden."""
    strays = sorted(
        path.name
        for path in paths
        if not path.is_dir() and not _hidden(path.name) and not _is_note(path)
    )
    if strays:
        more = f' and {len(strays) - 5} more' if len(strays) > 5 else ''
        raise DataError(
            f'{folder} has {", ".join(strays[:5])}{more} {where}, of which no class or split is '
            'known: unpack it, move it into the folder of its class, or remove it'
        )


def _is_unlabelled(split: Path) -> bool:
    """Whether a split has images without classes, as Tiny-ImageNet's test/ does."""
    if (split / 'val_annotations.txt').is_file():
        return False
    return [path.name for path in _folders(split)] in ([], ['images']) and bool(image_files(split))


def _classes_of(split: Path) -> list[str]:
    """The names of the class folders in a split's folder.

    Raises DataError for one without images, for files that are no images, and for splits inside.
    """
    if _is_unlabelled(split):
        return []
    names = []
    for folder in _folders(split):
        inner = [path.name for path in _folders(folder) if path.name.lower() in SPLITS]
        if inner:
            raise DataError(
                f'{folder} has the splits {", ".join(inner)} inside: expected the classes inside '
                f'the splits, as in {inner[0]}/{folder.name}'
            )
        files = _files(folder)
        _refuse_foreign(files)
        if not any(path.suffix.lower() in SUFFIXES for path in files):
            raise DataError(
                f"{folder} has no images ({', '.join(SUFFIXES)}): fill it or remove it. PyTorch's "
                'ImageFolder counts an empty folder as a class, so that the labels of all after it '
                'would differ'
            )
        names.append(folder.name)
    return names


def _refuse_foreign(files: Sequence[Path]) -> None:
    """Raises DataError for files in a class folder that are neither images nor notes."""
    foreign = [p for p in files if p.suffix.lower() not in SUFFIXES and not _is_note(p)]
    if foreign:
        more = f' (and {len(foreign) - 1} more)' if foreign[1:] else ''
        raise DataError(
            f'{foreign[0]}{more} is no kind of image that is read ({", ".join(SUFFIXES)}): convert '
            'it or remove it'
        )


def labelled_splits(layout: Layout) -> dict[str, Labelled]:
    """The labelled images of each split.

    Where there are training images alone, a fifth of each class becomes 'test'.
    Raises DataError for a class that the training images lack or that is too small to split, for
    images that are listed but missing, and where no other split than 'train' has classes.
    """
    labels = {name: label for label, name in enumerate(layout.classes)}
    found = {split: _labelled(folder, labels) for split, folder in layout.splits.items()}
    splits = {split: files for split, files in found.items() if files}
    if list(found) == ['train']:
        return _hold_out(found['train'], layout.classes)
    if list(splits) == ['train']:
        without = ' and '.join(str(layout.splits[split]) for split in found if split != 'train')
        raise DataError(
            f'{without} has no images in class folders, so no accuracy can be measured there: sort '
            'them into class folders, or remove the folder, and a fifth of the training images is '
            'held out'
        )
    return splits


def _labelled(folder: Path, labels: dict[str, int]) -> Labelled:
    """The images of a split's folder with their labels; none where it has no classes."""
    if (folder / 'val_annotations.txt').is_file():
        return _annotated(folder, labels)
    if _is_unlabelled(folder):
        return []
    _refuse_strays(folder, folder.iterdir(), 'beside its class folders')
    files = {path.name: _files(path) for path in _folders(folder)}
    for each in files.values():
        _refuse_foreign(each)
    images = {
        name: [path for path in each if path.suffix.lower() in SUFFIXES]
        for name, each in files.items()
    }
    unknown = [name for name, each in images.items() if each and name not in labels]
    if unknown:
        raise DataError(
            f'{folder} has class folders that the training images lack: {", ".join(unknown[:5])}'
        )
    return [(path, labels[name]) for name, each in images.items() for path in each]


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


def remarks(layout: Layout, labelled: dict[str, Labelled]) -> list[str]:
    """What a user may not expect of a folder that was understood, a sentence each."""
    said = [
        f'{folder} has images without classes, which are not used'
        for split, folder in layout.splits.items()
        if split not in labelled
    ]
    if list(layout.splits) == ['train']:
        said.append(f'there is no val/ or test/ in {layout.top}: a fifth of each class is held out')
    if all(name.isdecimal() for name in layout.classes):
        by_number = sorted(layout.classes, key=int)
        if by_number != layout.classes:
            first = ', '.join(f'{name} is label {i}' for i, name in enumerate(layout.classes[:3]))
            said.append(
                f"class folders are sorted as text, as PyTorch's ImageFolder does: {first}, ..."
            )
    return said


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
    return modes <= {'1', 'L', 'LA', 'I', *GREY_16}, sizes.pop() if len(sizes) == 1 else None
