"""Reads real images, for teachers, for the upper bound with real data and for test accuracies.

Data sets lie in the format and at the place of tensorflow-datasets (TFDS), ``data_dir/name/
version``; they are read without TensorFlow, and ``python -m dfkd_jax.data prepare`` writes them.
`digits` comes with scikit-learn.

A data-free run needs none of them.  Without images, `check` gives the facts that a config states
itself (classes, size, normalisation), and `Facts.test_size` is 0.

Images are uint8 until `normalise`: one byte per pixel on the host and on the way to the device.
"""

from __future__ import annotations

import difflib
import io
import os
import re
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from dfkd_jax.data.image_folder import eight_bits
from dfkd_jax.data.sets import DATASETS, Spec, how_to_prepare, spec_of
from dfkd_jax.errors import DataError
from dfkd_jax.storage import files, safe_read

RESIZE = ('pad', 'resize', 'crop')
EVERY = slice(None)  # all rows of a batch
IN_MEMORY_BYTES = 2 * 2**30  # larger splits are decoded batch by batch

# Indices [n] to images [n, H, W, C] uint8 and labels [n] int32.
Fetch = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]


class Settings(Protocol):
    """The group `data` of a config.

    Attributes:
      name: a data set of `DATASETS`, or one that you prepared under a name of your own; '': none.
      data_dir: the folder of data sets; None: $TFDS_DATA_DIR, else ~/tensorflow_datasets.
      image_size: the side, in pixels, of the images that networks see.
      channels: of these images: 1 (grey) or 3; grey images fill three channels.
      mean, std: of images in [0, 1], one value or one per channel; None: the published constants.
      resize: how a stored image becomes image_size x image_size:
        'pad': zeros on all sides (28 -> 32);
        'resize': bilinear, each side on its own (Pillow, antialiased when it shrinks);
        'crop': bilinear, the short side to image_size * 256 / 224, then the centre (ImageNet).
    """

    name: str
    data_dir: str | None
    num_classes: int
    image_size: int
    channels: int
    mean: Sequence[float] | None
    std: Sequence[float] | None
    resize: str


class Facts(NamedTuple):
    """What is known of a data set, for given settings, before any image is read."""

    name: str
    num_classes: int
    class_names: tuple[str, ...]  # (): not known
    image_shape: tuple[int, int, int]  # (H, W, channels), as networks see them
    mean: tuple[float, ...]  # [channels], of images in [0, 1]
    std: tuple[float, ...]  # [channels]
    train_size: int  # images
    test_size: int
    flip: bool  # whether a mirrored image keeps its class
    padding: int  # of random crops, in pixels
    version: str = ''  # of the stored set; '': there are no images


class Batch(NamedTuple):
    """Images of one fixed shape.  The last batch of a pass is filled up with invalid ones."""

    image: np.ndarray  # [B, H, W, C] uint8
    label: np.ndarray  # [B] int32
    valid: np.ndarray  # [B] bool; False: not an image, leave it out


class Dataset(NamedTuple):
    """One split: in memory where it fits, otherwise decoded in threads on request."""

    facts: Facts
    size: int
    fetch: Fetch  # any images, by index
    images: np.ndarray | None  # [size, H, W, C] uint8; None: too large, use `fetch`
    labels: np.ndarray | None  # [size] int32

    def batches(self, batch_size: int, rows: slice = EVERY) -> Iterator[Batch]:
        """One pass in stored order.  All batches have one shape, so evaluation compiles once.

        rows: the rows of every batch to read; the others belong to other processes.
        """
        starts = range(0, self.size, batch_size)
        number = len(range(batch_size)[rows])
        chunks = (np.arange(i, i + batch_size)[rows] for i in starts)
        for image, label in self._read(chunk[chunk < self.size] for chunk in chunks):
            missing = number - len(label)
            yield Batch(
                np.pad(image, ((0, missing), (0, 0), (0, 0), (0, 0))),
                np.pad(label, (0, missing)),
                np.arange(number) < len(label),
            )

    def part(self, rows: np.ndarray) -> Dataset:
        """The images of these rows [n], in this order."""
        images = None if self.images is None else self.images[rows]
        labels = None if self.labels is None else self.labels[rows]
        return Dataset(self.facts, len(rows), lambda i: self.fetch(rows[i]), images, labels)

    def resized(self, size: int) -> Dataset:
        """The images at another size, as 'resize' makes them: read on request."""
        from PIL import Image

        shape = (size, size, self.facts.image_shape[2])

        def fetch(indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            images, labels = self.fetch(indices)
            out = np.zeros((len(images), *shape), np.uint8)
            for pixels, place in zip(images, out):
                grey = pixels.shape[-1] == 1
                fit_image(Image.fromarray(pixels[..., 0] if grey else pixels), 'resize', place)
            return out, labels

        return Dataset(self.facts._replace(image_shape=shape), self.size, fetch, None, None)

    def shuffled(
        self, batch_size: int, seed: int, start: int = 0, rows: slice = EVERY
    ) -> Iterator[Batch]:
        """Endless training batches from step `start` on.  Step i depends on (seed, i) alone.

        Every epoch has its own order and size // batch_size whole batches; the rest is left out.
        rows: as in `batches`.
        Raises DataError, at the first batch, where the split is smaller than a batch.
        """
        per_epoch = self.size // batch_size
        if not per_epoch:
            raise DataError(
                f'a batch of {batch_size} images is larger than the {self.size} training images of '
                f'{self.facts.name}: lower the batch size'
            )

        def chunks() -> Iterator[np.ndarray]:
            epoch, order = -1, np.empty(0, np.int64)
            for step in count(start):
                if step // per_epoch != epoch:
                    epoch = step // per_epoch
                    order = np.random.default_rng((seed, epoch)).permutation(self.size)
                first = step % per_epoch * batch_size
                yield order[first : first + batch_size][rows]

        valid = np.ones(len(range(batch_size)[rows]), bool)
        for image, label in self._read(chunks()):
            yield Batch(image, label, valid)

    def _read(self, chunks: Iterator[np.ndarray]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Fetches chunk after chunk; where that means decoding, two chunks ahead of the caller."""
        if self.images is not None:
            yield from map(self.fetch, chunks)
            return
        with ThreadPoolExecutor(1) as ahead:
            coming = deque(ahead.submit(self.fetch, c) for _, c in zip(range(2), chunks))
            for chunk in chunks:
                coming.append(ahead.submit(self.fetch, chunk))
                yield coming.popleft().result()
            while coming:
                yield coming.popleft().result()


def check(settings: Settings, needed: Sequence[str] = ()) -> Facts:
    """Checks the settings against the data set, without reading an image.

    needed: the splits without which the caller can do nothing, of 'train' and 'test'.  Where none
      is needed, there may be no data set at all: `Facts.test_size` is 0 then.
    Raises DataError for an unknown or missing data set or split, and for sizes, channels, classes
    or constants that do not fit it.  Without a data set, the constants must be given or published;
    one that is not in the folder that `data_dir` names is an error.
    """
    facts, _, _ = _open(settings, images=bool(needed))
    for split in needed:
        _check_split(settings, facts, split)
    return facts


def absence(settings: Settings) -> str:
    """Says which images there are not, for a run without any."""
    if settings.name in NO_NAME:
        return 'no real images are named (config.data.name)'
    directory, origin = data_folder(settings.data_dir)
    return f'no images of {settings.name} are in {directory} ({origin})'


def identity(facts: Facts) -> dict[str, Any]:
    """What a data set is known by, wherever it lies."""
    if not facts.test_size:
        return {'name': facts.name or '', 'version': 'no images'}
    names = ('name', 'version', 'train_size', 'test_size')
    return {name: getattr(facts, name) for name in names}


def load(
    settings: Settings,
    split: str,
    limit: int | None = None,
    in_memory_bytes: int = IN_MEMORY_BYTES,
) -> Dataset:
    """The images of one split, 'train' or 'test'.

    'test' is the split on which accuracies are reported: 'validation' for ImageNet.

    limit: take only the first so many images; `prepare` has shuffled them.
    Raises DataError as `check` does, and for files that cannot be decoded.
    """
    if split not in ('train', 'test'):
        raise DataError(f"split {split!r}: expected 'train' or 'test'")
    facts, builder, test_split = _open(settings, images=True)
    _check_split(settings, facts, split)
    if builder is None:
        return _digits(settings, facts, split, limit)
    size = facts.train_size if split == 'train' else facts.test_size
    size = size if limit is None else min(limit, size)
    fetch = _reader(settings, facts, builder, 'train' if split == 'train' else test_split)
    if size * int(np.prod(facts.image_shape)) > in_memory_bytes:
        return Dataset(facts, size, fetch, None, None)
    return _in_memory(facts, *fetch(np.arange(size)))


def normalise(images: Any, mean: Sequence[float], std: Sequence[float]) -> jax.Array:
    """uint8 images [..., C] to what networks see: float32, ``(images / 255 - mean) / std``.

    mean, std: one value, or one per channel.
    """
    x = jnp.asarray(images).astype(jnp.float32) / 255
    return (x - _per_channel(mean, x.ndim)) / _per_channel(std, x.ndim)


def denormalise(images: Any, mean: Sequence[float], std: Sequence[float]) -> jax.Array:
    """Normalised images [..., C] back to [0, 1], clipped."""
    x = jnp.asarray(images, jnp.float32)
    return jnp.clip(x * _per_channel(std, x.ndim) + _per_channel(mean, x.ndim), 0, 1)


def _per_channel(values: Sequence[float], rank: int) -> jax.Array:
    return jnp.asarray(values, jnp.float32).reshape((1,) * (rank - 1) + (-1,))


# --- From settings to facts ----------------------------------------------------------------


class _Stored(NamedTuple):
    """What the files say of a data set."""

    num_classes: int
    channels: int
    sides: tuple[int, int] | None  # (H, W); None: they differ
    class_names: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    train_size: int
    test_size: int
    version: str = '1'


def _open(settings: Settings, images: bool) -> tuple[Facts, Any, str]:
    """The facts, and where to read: a TFDS builder and its test split; None for digits.

    images: whether there must be some; without them there is no builder either.
    """
    spec = spec_of(settings.name) if settings.name else None
    if settings.name == 'digits':
        spec, test = DATASETS['digits'], _DIGITS_TEST
        stored = _Stored(10, 1, (8, 8), spec.class_names, spec.mean, spec.std, 1797 - test, test)
        return _facts(settings, spec, stored), None, 'test'
    builder = _builder(settings, spec, images)
    if builder is None:
        return _facts(settings, spec, _nothing(settings, spec)), None, 'test'
    stored, test_split = _stored(settings.name, spec, builder)
    return _facts(settings, spec, stored), builder, test_split


class _NotFound(DataError):
    """There is no data set of a name where data sets are kept."""


def _builder(settings: Settings, spec: Spec | None, images: bool) -> Any:
    """The TFDS builder of the settings' data set; None if there is none, nor need be."""
    name = settings.name
    known = spec is not None or settings.mean is not None and settings.std is not None
    if name in NO_NAME:
        if images:
            raise DataError(
                'config.data.name is empty, which means that there are no real images, and this '
                'needs some: name a data set that `python -m dfkd_jax.data prepare` made, or give '
                'a trained teacher by --config.teacher.checkpoint=FILE.'
            )
        if not known:
            raise DataError(f'without a data set, {_CONSTANTS}')
        return None
    try:
        return find(name, settings.data_dir)
    except _NotFound as error:
        # A folder that was named is where the images should be.
        if images or settings.data_dir or not known:
            raise (error if images else DataError(f'{error}\n{_without(spec)}')) from None
        return None


NO_NAME = ('', 'None', None)
_CONSTANTS = (
    'config.data.mean and config.data.std must be those that the teacher was trained with, of '
    "images in [0, 1]. The usual ones: '(0.485,0.456,0.406)' and '(0.229,0.224,0.225)' "
    "(ImageNet), '(0.4914,0.4822,0.4465)' and '(0.2023,0.1994,0.2010)' (CIFAR-10), '(0.5,)' and "
    "'(0.5,)' (images in [-1, 1]), '(0.0,)' and '(1.0,)' (images in [0, 1])."
)


def _without(spec: Spec | None) -> str:
    """How to run without images, for the end of a message."""
    mean, std = (str(x).replace(' ', '') for x in ((spec.mean, spec.std) if spec else ('…', '…')))
    return (
        'Or distil without any real image, and measure no accuracy:\n'
        f"  --config.data.name='' --config.data.mean='{mean}' --config.data.std='{std}'"
        + ('' if spec else f'\n({_CONSTANTS})')
    )


def _nothing(settings: Settings, spec: Spec | None) -> _Stored:
    """What is known where there are no images: what the settings say."""
    size, channels, classes = settings.image_size, settings.channels, settings.num_classes
    if classes < 2:
        raise DataError(f'config.data.num_classes is {classes}: expected 2 or more')
    if channels not in (1, 3):
        raise DataError(f'config.data.channels is {channels}: expected 1 (grey) or 3 (colour)')
    return _Stored(
        num_classes=spec.num_classes if spec else classes,
        channels=spec.channels if spec else channels,
        sides=(size, size),
        class_names=spec.class_names if spec else (),
        mean=spec.mean if spec else (),
        std=spec.std if spec else (),
        train_size=0,
        test_size=0,
        version='',
    )


def _check_split(settings: Settings, facts: Facts, split: str) -> None:
    """Raises DataError where a split has no images."""
    if not (facts.train_size if split == 'train' else facts.test_size):
        raise DataError(
            f'{settings.name} has no {"training" if split == "train" else split} images, which '
            'training a teacher, distilling on real data (kd) and fine-tuning need: prepare it '
            f'with {split}/ too, or give a trained teacher by --config.teacher.checkpoint=FILE.'
        )


def find(name: str, data_dir: str | None) -> Any:
    """The TFDS builder of a data set's newest version in the data folder.

    data_dir: as in `Settings`.
    Raises DataError where there is none that can be read.
    """
    directory, origin = data_folder(data_dir)
    spec = spec_of(name)
    stored_as = spec.tfds_name if spec and spec.tfds_name else name
    versions = [
        (tuple(map(int, path.parent.name.split('.'))), path.parent)
        for path in (directory / stored_as).glob('*/dataset_info.json')
        if re.fullmatch(r'\d+\.\d+\.\d+', path.parent.name)  # not one half written
    ]
    if not versions:
        raise _not_found(name, directory, origin)

    place = max(versions)[1]
    import tensorflow_datasets as tfds  # slow; never imports TensorFlow here

    try:
        _check_features(place)
        builder = tfds.builder_from_directory(str(place))
        formats = sorted(each.value for each in builder.info.available_file_formats())
        if 'array_record' in formats:
            return tfds.builder_from_directory(str(place), file_format='array_record')
    except Exception as error:
        raise DataError(
            f'{place} cannot be read as a data set ({error}). Remove it and prepare it again:\n'
            f'{how_to_prepare(name, str(directory))}'
        ) from error
    raise DataError(
        f'{place} holds {" and ".join(formats)} files, which only TensorFlow reads; expected '
        f'array_record. Prepare it in another data_dir:\n{how_to_prepare(name, "DIR")}'
    )


def data_folder(given: str | None) -> tuple[Path, str]:
    """The folder of data sets, and what decided it."""
    if given:
        root, origin = given, 'config.data.data_dir'
    elif os.environ.get('TFDS_DATA_DIR'):
        root, origin = os.environ['TFDS_DATA_DIR'], '$TFDS_DATA_DIR'
    else:
        root, origin = '~/tensorflow_datasets', 'the default; or set config.data.data_dir'
    return files.expanded(root), origin


def _not_found(name: str, directory: Path, origin: str) -> _NotFound:
    """The error for a data set that is not in the data folder, listed or unknown."""
    how = how_to_prepare(name, str(directory))
    if spec_of(name):
        return _NotFound(f'no data set {name!r} in {directory} ({origin}). Prepare it once:\n{how}')
    here = sorted({path.parts[-3] for path in directory.glob('*/*/dataset_info.json')})
    known = sorted({*DATASETS, *here})
    near = difflib.get_close_matches(name, known, n=3)
    return _NotFound(
        f'unknown data set {name!r}.'
        + (f' Did you mean {" or ".join(near)}?' if near else '')
        + f' Known: {", ".join(known)}. In {directory} ({origin}): {", ".join(here) or "none"}.'
        f' To make one:\n{how}'
    )


def _check_features(place: Path) -> None:
    """Raises Refused where features.json names classes that are not TFDS's own.

    TFDS imports the module of any class that the file names, and so runs its code.
    """

    def classes(tree: Any) -> Iterator[str]:
        for name, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
            if isinstance(value, dict | list):
                yield from classes(value)
            elif name in ('pythonClassName', 'python_class_name', 'type'):
                yield str(value)

    path = place / 'features.json'
    for name in classes(safe_read.read_json(path)) if path.is_file() else ():
        if not name.startswith('tensorflow_datasets.'):
            raise safe_read.Refused(
                f'features.json names the class {name}, which only its module knows'
            )


def _stored(name: str, spec: Spec | None, builder: Any) -> tuple[_Stored, str]:
    """What the files of a TFDS builder say, and the name of their test split."""
    info = builder.info
    features, splits = info.features, info.splits
    place, root = builder.data_dir, str(Path(builder.data_dir).parent.parent)
    again = f'Remove it and prepare it again:\n{how_to_prepare(name, root)}'
    label: Any = features['label'] if 'label' in features else None
    if 'image' not in features or not hasattr(label, 'num_classes'):
        raise DataError(
            f'{place} has the features {sorted(features)}: expected an image and a class label, '
            f"named 'image' and 'label'"
        )
    wanted = [spec.test_split] if spec else ['test', 'validation']
    test_split = next((split for split in wanted if split in splits), None)
    if test_split is None:
        raise DataError(
            f'{place} has the splits {sorted(splits)}: expected {" or ".join(wanted)}, and train '
            f'if a teacher is to be trained. {again}'
        )
    for split in {'train', test_split} & set(splits):
        for path in splits[split].filepaths:
            if not os.path.exists(path):
                raise DataError(f'{place} is not whole, {Path(path).name} is missing. {again}')
    height, width, channels = features['image'].shape
    metadata = info.metadata or {}
    stored = _Stored(
        num_classes=label.num_classes,
        channels=channels,
        sides=(height, width) if height and width else None,
        class_names=(spec.class_names if spec else ()) or tuple(label.names),
        mean=spec.mean if spec else tuple(metadata.get('mean', ())),
        std=spec.std if spec else tuple(metadata.get('std', ())),
        train_size=splits['train'].num_examples if 'train' in splits else 0,
        test_size=splits[test_split].num_examples,
        version=Path(place).name,
    )
    return stored, test_split


def _facts(settings: Settings, spec: Spec | None, stored: _Stored) -> Facts:
    """The facts for these settings.  Raises DataError where they do not fit what is stored."""
    _check_images(settings, stored)
    mean = _constant('mean', settings.mean, stored.mean, settings)
    std = _constant('std', settings.std, stored.std, settings)
    if min(std) <= 0:
        raise DataError(f'config.data.std is {std}: expected positive values')
    size = settings.image_size
    return Facts(
        name=settings.name,
        num_classes=stored.num_classes,
        class_names=stored.class_names,
        image_shape=(size, size, settings.channels),
        mean=mean,
        std=std,
        train_size=stored.train_size,
        test_size=stored.test_size,
        flip=spec.flip if spec else True,
        padding=spec.padding if spec else max(1, size // 8),
        version=stored.version,
    )


def _check_images(settings: Settings, stored: _Stored) -> None:
    """Raises DataError where the stored images cannot become those of the settings."""
    name, size, channels = settings.name, settings.image_size, settings.channels
    if settings.num_classes != stored.num_classes:
        raise DataError(
            f'config.data.num_classes is {settings.num_classes}, but {name} has '
            f'{stored.num_classes} classes: set --config.data.num_classes={stored.num_classes}'
        )
    if channels not in (1, 3) or channels < stored.channels:
        allowed = '1 or 3' if stored.channels == 1 else '3'
        color = 'grey' if stored.channels == 1 else 'in colour'
        raise DataError(
            f'config.data.channels is {channels}, but the images of {name} are {color}: set it to '
            f'{allowed}'
        )
    if not isinstance(size, int) or size < 1:
        raise DataError(f'config.data.image_size is {size!r}: expected pixels, 1 or more')
    if settings.resize not in RESIZE:
        near = difflib.get_close_matches(str(settings.resize), RESIZE, n=1)
        raise DataError(
            f'config.data.resize is {settings.resize!r}: expected one of {", ".join(RESIZE)}.'
            + (f' Did you mean {near[0]!r}?' if near else '')
        )
    if settings.resize == 'pad' and (stored.sides is None or max(stored.sides) > size):
        have = 'of many sizes' if stored.sides is None else 'x'.join(map(str, stored.sides))
        raise DataError(
            f"config.data.resize is 'pad', which cannot bring the images of {name}, {have}, to "
            f'{size}x{size}: set it to resize or crop, or raise config.data.image_size'
        )


def _constant(
    field: str, given: Any, published: tuple[float, ...], settings: Settings
) -> tuple[float, ...]:
    """The mean or the std of the images, [channels]: as given, else as published."""
    values = published if given is None else tuple(np.atleast_1d(given).astype(float).tolist())
    if not values:
        raise DataError(
            f'no {field} is published for {settings.name}: set config.data.{field}, one value or '
            f'one for each channel, of images in [0, 1]'
        )
    if len(values) not in (1, settings.channels):
        raise DataError(
            f'config.data.{field} is {values}, {len(values)} values: expected one, or one for '
            f'each of the {settings.channels} channels'
        )
    return values * (settings.channels // len(values))


# --- From files to arrays ------------------------------------------------------------------


def _reader(settings: Settings, facts: Facts, builder: Any, split: str) -> Fetch:
    """Reads, decodes and resizes images of a TFDS split, by index, in threads."""
    import tensorflow_datasets as tfds
    from PIL import Image, UnidentifiedImageError

    # TFDS would decode with OpenCV where that is installed, and with Pillow elsewhere.  Their JPEG
    # pixels differ, and accuracies with them, so we always take Pillow.
    source = builder.as_data_source(split=split, decoders={'image': tfds.decode.SkipDecoding()})
    mode = 'L' if builder.info.features['image'].shape[-1] == 1 else 'RGB'
    threads = os.cpu_count() or 1

    def records(chunk: list[int]) -> list[dict[str, Any]]:
        try:
            return source.__getitems__(chunk)
        except Exception as error:  # array_record raises errors of every kind
            raise DataError(
                f'{facts.name}: images of {split} in {builder.data_dir} can no longer be read '
                f'({error}). Put the folder back, and the same command continues, or prepare '
                f'it again'
            ) from error

    def decode(index: int, file: bytes, out: np.ndarray) -> None:
        try:
            with Image.open(io.BytesIO(file)) as image:
                fit_image(eight_bits(image).convert(mode), settings.resize, out)
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            # Pillow would name the object in memory that it cannot read.
            unknown = isinstance(error, UnidentifiedImageError)
            raise DataError(
                f'{facts.name}: image {index} of {split} in {builder.data_dir} cannot be used '
                f'({"no format that is known" if unknown else error}). Put back a whole '
                f'copy of the folder, and the same command continues, or prepare the data '
                f'set again'
            ) from error

    def read(indices: np.ndarray, images: np.ndarray, labels: np.ndarray) -> None:
        for start in range(0, len(indices), 256):  # bounds the encoded images held at once
            chunk = indices[start : start + 256].tolist()
            for i, record in enumerate(records(chunk)):
                decode(chunk[i], record['image'], images[start + i])
                labels[start + i] = record['label']

    def fetch(indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        images = np.zeros((len(indices), *facts.image_shape), np.uint8)
        labels = np.zeros(len(indices), np.int32)
        bounds = np.linspace(0, len(indices), threads + 1).astype(int)
        parts = [slice(a, b) for a, b in zip(bounds, bounds[1:], strict=False) if a < b]
        with ThreadPoolExecutor(threads) as pool:  # Pillow decodes outside the interpreter's lock
            list(pool.map(lambda s: read(indices[s], images[s], labels[s]), parts))
        return images, labels

    return fetch


def fit_image(image: Any, resize: str, out: np.ndarray) -> None:
    """Writes a Pillow image into `out` [S, S, C], which is zeros, as `resize` says.

    Raises DataError where an image to pad is larger than `out`.
    """
    from PIL import Image

    size = out.shape[0]
    if resize == 'resize' and image.size != (size, size):
        image = image.resize((size, size), Image.Resampling.BILINEAR)
    elif resize == 'crop':
        # torchvision's Resize and CenterCrop, rounding included.
        width, height = image.size
        short = round(size * 256 / 224)
        wide = short if width <= height else int(short * width / height)
        high = short if height <= width else int(short * height / width)
        left, top = round((wide - size) / 2), round((high - size) / 2)
        image = image.resize((wide, high), Image.Resampling.BILINEAR)
        image = image.crop((left, top, left + size, top + size))
    pixels = np.asarray(image)
    pixels = pixels.reshape(*pixels.shape[:2], -1)  # [h, w, 1 or 3]
    height, width = pixels.shape[:2]
    if height > size or width > size:
        raise DataError(f'{width}x{height} pixels do not fit into {size}x{size}')
    top, left = (size - height) // 2, (size - width) // 2
    out[top : top + height, left : left + width] = pixels  # a grey channel fills all of C


def _in_memory(facts: Facts, images: np.ndarray, labels: np.ndarray) -> Dataset:
    return Dataset(facts, len(labels), lambda i: (images[i], labels[i]), images, labels)


_DIGITS_TEST = 360  # images


@cache
def _digits_arrays() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Training images, test images (uint8 [N, 8, 8]), training labels, test labels.

    scikit-learn has no split of its own.  Ours is its stratified one: 360 test images, seed 0.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    images = np.round(digits.images * (255 / 16)).astype(np.uint8)
    return tuple(
        train_test_split(
            images, digits.target, test_size=_DIGITS_TEST, stratify=digits.target, random_state=0
        )
    )


def _digits(settings: Settings, facts: Facts, split: str, limit: int | None) -> Dataset:
    from PIL import Image

    train, test, train_labels, test_labels = _digits_arrays()
    stored, labels = (train, train_labels) if split == 'train' else (test, test_labels)
    images = np.zeros((len(stored[:limit]), *facts.image_shape), np.uint8)
    for digit, out in zip(stored, images, strict=False):
        fit_image(Image.fromarray(digit), settings.resize, out)
    return _in_memory(facts, images, labels[:limit].astype(np.int32))
