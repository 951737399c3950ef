"""Writes data sets in the format and at the place of tensorflow-datasets, without TensorFlow.

Three kinds of source are read: the IDX files of Fashion-MNIST, CIFAR as its authors publish it (the
binary or the python version, a folder or an archive), and a folder of class folders of images.  An
official data set is written with its official name, version and features, so
``tfds.data_source(name, data_dir=...)`` reads it in any process.  Without a source, TFDS itself
downloads and prepares an official data set; that needs TensorFlow.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import re
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dfkd_jax.data import cifar, image_folder
from dfkd_jax.data.sets import DATASETS, Spec, how_to_prepare, spec_of
from dfkd_jax.errors import DataError
from dfkd_jax.storage import files

FASHION_MNIST = '/usr/share/datasets/fashion-mnist'  # of the Debian package
Examples = Iterable[tuple[Any, dict[str, Any]]]  # keys, which TFDS shuffles by, and features


class Split(NamedTuple):
    """The examples of one split."""

    size: int
    make: Callable[[], Examples]  # images as files (paths or file objects), labels as numbers


def prepare(name: str, data_dir: str | Path, source: str | Path | None = None) -> Path:
    """Puts a data set into `data_dir` and returns its folder, which appears whole or not at all.

    Raises DataError where the folder exists already, and for a source that is missing or unusable.
    """
    spec = spec_of(name)
    root = files.expanded(data_dir)
    if name == 'digits':
        raise DataError('digits comes with scikit-learn: there is nothing to prepare')
    if not re.fullmatch(r'[a-z][a-z0-9_]*', name):
        raise DataError(f'name {name!r}: expected lower-case letters, digits and _, as in my_set')
    official, version = (spec.tfds_name or name, spec.version) if spec else (name, '1.0.0')
    target = root / official / str(version)
    if target.exists():
        raise DataError(f'{target} is there already: remove it first to prepare {name} again')
    if source is None and name == 'fashion_mnist':
        source = FASHION_MNIST
    if source is None:
        return _official(name, root)

    place = files.expanded(source)
    if name in _CIFAR and place.exists():
        found = cifar.find(name, place)
        if found is not None:
            return write(name, spec, root, *_cifar(name, found))
    if not place.is_dir():
        raise DataError(f'no folder {place}. To prepare {name}:\n{how_to_prepare(name, str(root))}')
    if name == 'fashion_mnist':
        return write(name, spec, root, *_fashion_mnist(place))
    if official == 'imagenet2012' and any(place.glob('ILSVRC2012_img_*.tar')):
        return _official(name, root, place)
    return write(name, spec, root, *_class_folders(name, spec, place))


def write(
    name: str,
    spec: Spec | None,
    data_dir: str | Path,
    features: dict[str, Any],
    splits: dict[str, Split],
    metadata: dict[str, Any] | None = None,
) -> Path:
    """Writes splits as TFDS does: array_record files of shuffled examples, and their description.

    features: of `tfds.features`, by name.
    metadata: is stored after the examples are written, so their generators may add to it.
    """
    import tensorflow_datasets as tfds

    class Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[call-arg]
        VERSION = tfds.core.Version(spec.version if spec else '1.0.0')
        code_path = None  # or TFDS looks for checksums of downloads beside this file

        def _info(self) -> Any:
            return tfds.core.DatasetInfo(
                builder=self,
                features=tfds.features.FeaturesDict(features),
                supervised_keys=('image', 'label'),
                metadata=stored if metadata is not None else None,
            )

        def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
            del dl_manager  # the source is here
            return {key: self._generate_examples(key, split) for key, split in splits.items()}

        def _generate_examples(self, key: str, split: Split) -> Examples:
            yield from _with_progress(f'{name} {key}', split)
            stored.update(metadata or {})

    stored = tfds.core.MetadataDict()
    Builder.name = (spec.tfds_name if spec else None) or name
    Path(data_dir).mkdir(parents=True, exist_ok=True)
    builder = Builder(data_dir=str(data_dir), file_format='array_record')
    tfds.disable_progress_bar()
    try:
        with tempfile.TemporaryDirectory() as downloads, contextlib.redirect_stdout(io.StringIO()):
            # Into a folder beside it, renamed when whole.
            builder.download_and_prepare(download_dir=downloads)
    finally:
        tfds.enable_progress_bar()
    return Path(builder.data_dir)


def _with_progress(title: str, split: Split) -> Examples:
    """Yields the split's examples and counts them on stderr, live where that is a terminal."""
    live, started, shown = sys.stderr.isatty(), time.monotonic(), 0.0
    for done, example in enumerate(split.make()):
        if live and time.monotonic() - shown > 0.5:
            shown = time.monotonic()
            print(f'\r{title}: {done:,} of {split.size:,} images', end='', file=sys.stderr)
        yield example
    seconds = time.monotonic() - started
    end = '\r' if live else ''
    print(f'{end}{title}: {split.size:,} images in {seconds:.1f} s', file=sys.stderr, flush=True)


def _official(name: str, root: Path, manual: Path | None = None) -> Path:
    """Lets TFDS download and prepare an official data set."""
    spec, how = spec_of(name), how_to_prepare(name, str(root))
    if spec is None or (manual is None and not name.startswith('cifar')):
        raise DataError(f'{name} needs --source. To prepare it, {how}')
    try:
        import importlib_resources  # noqa: F401  TFDS needs it to download, and does not say so
        import tensorflow  # noqa: F401
    except ImportError as error:
        raise DataError(
            f'preparing {name} so needs TensorFlow ({error}). Either:\n{how}'
        ) from error
    import tensorflow_datasets as tfds

    builder = tfds.builder(spec.tfds_name, data_dir=str(root), file_format='array_record')
    options = tfds.download.DownloadConfig(manual_dir=str(manual) if manual else None)
    try:
        builder.download_and_prepare(download_config=options)
    except Exception as error:
        raise DataError(f'TFDS could not prepare {name} ({error}). The ways to:\n{how}') from error
    return Path(builder.data_dir)


def png(pixels: np.ndarray) -> io.BytesIO:
    """An image [H, W], [H, W, 1] or [H, W, 3], uint8, as a PNG file in memory."""
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(pixels[..., 0] if pixels.shape[2:] == (1,) else pixels).save(file, 'PNG')
    file.seek(0)
    return file


# --- Fashion-MNIST: four IDX files ---------------------------------------------------------


def _fashion_mnist(folder: Path) -> tuple[dict[str, Any], dict[str, Split]]:
    import tensorflow_datasets as tfds

    splits = {}
    for split, prefix in (('train', 'train'), ('test', 't10k')):
        images = _idx(folder, f'{prefix}-images-idx3-ubyte', 3)
        labels = _idx(folder, f'{prefix}-labels-idx1-ubyte', 1)
        if len(images) != len(labels) or images.shape[1:] != (28, 28) or labels.max() > 9:
            raise DataError(
                f'{folder}: the {split} files hold images {images.shape} and {len(labels)} labels '
                f'up to {labels.max()}; expected as many of both, 28x28 pixels, labels 0 to 9'
            )

        def make(images: np.ndarray = images, labels: np.ndarray = labels) -> Examples:
            for i, (image, label) in enumerate(zip(images, labels, strict=True)):
                yield i, {'image': png(image), 'label': int(label)}

        splits[split] = Split(len(labels), make)
    features = {
        'image': tfds.features.Image(shape=(28, 28, 1)),
        'label': tfds.features.ClassLabel(names=DATASETS['fashion_mnist'].class_names),
    }
    return features, splits


def _idx(folder: Path, name: str, rank: int) -> np.ndarray:
    """The array in an IDX file of unsigned bytes, gzipped or not.

    The format: two zero bytes, the type (8), the rank, the sizes as big-endian 32-bit numbers, and
    the values.
    """
    path = next((p for p in (folder / f'{name}.gz', folder / name) if p.is_file()), None)
    if path is None:
        raise DataError(
            f'no {name}.gz in {folder}. To prepare fashion_mnist:\n'
            f'{how_to_prepare("fashion_mnist", "DIR")}'
        )
    try:
        raw = path.read_bytes()
        raw = gzip.decompress(raw) if path.suffix == '.gz' else raw
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f'{path} cannot be unpacked ({error}): get it again') from error
    start = 4 + 4 * rank
    shape = tuple(np.frombuffer(raw[4:start], '>u4').tolist())
    if raw[:4] != bytes((0, 0, 8, rank)) or len(raw) - start != int(np.prod(shape)):
        raise DataError(
            f'{path} is not a whole IDX file of bytes with {rank} axes '
            f'({len(raw):,} bytes, header {raw[:start].hex(" ")}): get it again'
        )
    return np.frombuffer(raw, np.uint8, offset=start).reshape(shape)


# --- CIFAR -----------------------------------------------------------------------------------

_CIFAR = ('cifar10', 'cifar100')


def _cifar(name: str, source: cifar.Source) -> tuple[dict[str, Any], dict[str, Split]]:
    import tensorflow_datasets as tfds

    def split(key: str, parts: tuple[str, ...]) -> Split:
        def make() -> Examples:
            i = 0
            for part in source.parts(parts):
                for row, image in enumerate(part.images):
                    labels = {name: int(label[row]) for name, label in part.labels.items()}
                    # Keys and ids are TFDS's own, so that the stored order is too.
                    yield i, {'id': f'{key}_{i:05d}', 'image': png(image), **labels}
                    i += 1

        # Read once before anything is written, so that damage is told first.
        return Split(sum(len(part.images) for part in source.parts(parts)), make)

    features = {
        'id': tfds.features.Text(),
        'image': tfds.features.Image(shape=(32, 32, 3)),
        **{key: tfds.features.ClassLabel(names=names) for key, names in source.names.items()},
    }
    version = source.version
    splits = {'train': split('train', version.train), 'test': split('test', version.test)}
    return features, splits


# --- A folder of class folders -------------------------------------------------------------


def _class_folders(
    name: str, spec: Spec | None, folder: Path
) -> tuple[dict[str, Any], dict[str, Split], dict[str, Any]]:
    """Features, splits and metadata of CLASS/*, or train/CLASS/* with val/ or test/ beside it.

    Without val/ or test/, a fifth of each class becomes the test split; val/ or test/ alone makes a
    set to measure on.  Tiny-ImageNet's val/ (one folder of images, and their classes in
    val_annotations.txt) is understood; words.txt gives words to class folders that are named by
    WordNet ids.  The metadata are the moments of the training images or, without them, of others.
    """
    import tensorflow_datasets as tfds

    layout = image_folder.understand(folder)
    _check_classes(name, spec, layout)
    labelled = image_folder.labelled_splits(layout)
    if spec and spec.test_split not in labelled:
        raise DataError(
            f'{layout.top} has no labelled images of {name} for its split {spec.test_split}: '
            f'expected {spec.test_split}/CLASS/*'
        )
    for remark in image_folder.remarks(layout, labelled):
        print(f'{name}: {remark}', file=sys.stderr, flush=True)

    grey, shape = image_folder.formats(path for part in labelled.values() for path, _ in part)
    names = image_folder.class_names(layout.top, layout.classes)
    features = {
        'image': tfds.features.Image(shape=(*(shape or (None, None)), 1 if grey else 3)),
        'label': tfds.features.ClassLabel(names=names),
        'file_name': tfds.features.Text(),
    }
    # Decoding finds broken files now rather than in a run; a million photographs would take hours.
    decode = spec is not DATASETS['imagenet']
    measured = 'train' if 'train' in labelled else next(iter(labelled))
    moments: dict[str, Any] = {measured: {}}  # filled in by its images
    splits = {
        split: Split(
            len(pairs), partial(_examples, layout.top, pairs, grey, decode, moments.get(split))
        )
        for split, pairs in labelled.items()
    }
    return features, splits, moments[measured]


def _check_classes(name: str, spec: Spec | None, layout: image_folder.Layout) -> None:
    """Raises DataError unless the class folders are those of a listed data set."""
    top, classes = next(iter(layout.splits.values())), layout.classes
    if spec and len(classes) != spec.num_classes:
        raise DataError(
            f'{name} has {spec.num_classes} classes, {top} has {len(classes)} folders of images: '
            f'prepare a part of it under a name of your own'
        )
    if spec and spec.class_names and classes != sorted(spec.class_names):
        raise DataError(
            f'{top} has the folders {", ".join(classes)}: expected the classes of {name}, '
            f'{", ".join(sorted(spec.class_names))}'
        )


def _examples(
    folder: Path,
    files: image_folder.Labelled,
    grey: bool,
    decode: bool,
    moments: dict[str, Any] | None,
) -> Examples:
    """The examples of labelled image files.

    moments: gets the `mean` and `std` of the pixels, in [0, 1], once all images are decoded.
    """
    sums = np.zeros((3, 1 if grey else 3))  # of ones, values and squares
    for path, label in files:
        image, pixels = _to_store(path, grey, decode)
        if pixels is not None and moments is not None:
            x = pixels.reshape(-1, sums.shape[1]) / 255
            sums += (np.full(x.shape[1], len(x)), x.sum(0), np.square(x).sum(0))
        file = path.relative_to(folder).as_posix()
        yield file, {'image': image, 'label': label, 'file_name': path.name}
    if moments is not None and sums[0, 0]:
        mean = sums[1] / sums[0]
        std = np.sqrt(np.maximum(sums[2] / sums[0] - mean**2, 1e-6))
        moments.update(mean=np.round(mean, 4).tolist(), std=np.round(std, 4).tolist())


def _to_store(path: Path, grey: bool, decode: bool) -> tuple[Any, np.ndarray | None]:
    """What to store of an image, a path or a PNG file in memory; and its pixels if `decode`.

    JPEG and PNG files of the right kind are stored as they are.  Others become PNG: palettes get
    their colours and transparency is dropped, as in PyTorch's ImageFolder.
    """
    with image_folder.open_image(path) as image:
        mode = 'L' if grey else 'RGB'
        as_it_is = image.format in ('JPEG', 'PNG') and image.mode in ('L', mode)
        if as_it_is and not decode:
            return str(path), None
        image = image_folder.eight_bits(image)
        # Palettes with transparency first get an alpha channel; Pillow warns otherwise.
        full = image.convert('RGBA') if image.mode == 'P' and not grey else image
        pixels = np.asarray(full.convert(mode))
    return str(path) if as_it_is else png(pixels), pixels
