"""Reads CIFAR-10 and CIFAR-100 as their authors publish them: folders or archives, two versions.

The binary version has records of label bytes and 3 x 32 x 32 pixels.  The python version, which
torchvision downloads too, has pickles, which are read without running what they name
(`storage.inert_pickle`).
"""

from __future__ import annotations

import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dfkd_jax.data.sets import DATASETS
from dfkd_jax.errors import DataError
from dfkd_jax.storage import inert_pickle, safe_read

LARGEST = 2**28  # bytes of a file; the largest, CIFAR-100's training images, has 155 million
PIXELS = 3 * 32 * 32


class Version(NamedTuple):
    """A version of a set: the names of its files and of what they hold.

    labels: the labels in the order of a record: our name for each, where the names of its classes
      are (a file or, of a pickle, a key of `meta`), and the key of the labels in a pickle.
    """

    name: str  # of the set, as in DATASETS
    kind: str  # 'binary' or 'python'
    folder: str  # what its archive unpacks to
    train: tuple[str, ...]
    test: tuple[str, ...]
    labels: tuple[tuple[str, str, str], ...]
    meta: str = ''

    @property
    def files(self) -> tuple[str, ...]:
        """All files that are read."""
        about = (self.meta,) if self.meta else tuple(names for _, names, _ in self.labels)
        return (*self.train, *self.test, *about)


VERSIONS = (
    Version(
        'cifar10', 'binary', 'cifar-10-batches-bin',
        tuple(f'data_batch_{i}.bin' for i in range(1, 6)), ('test_batch.bin',),
        (('label', 'batches.meta.txt', ''),),
    ),
    Version(
        'cifar10', 'python', 'cifar-10-batches-py',
        tuple(f'data_batch_{i}' for i in range(1, 6)), ('test_batch',),
        (('label', 'label_names', 'labels'),), 'batches.meta',
    ),
    Version(
        'cifar100', 'binary', 'cifar-100-binary', ('train.bin',), ('test.bin',),
        (('coarse_label', 'coarse_label_names.txt', ''), ('label', 'fine_label_names.txt', '')),
    ),
    Version(
        'cifar100', 'python', 'cifar-100-python', ('train',), ('test',),
        (('coarse_label', 'coarse_label_names', 'coarse_labels'),
         ('label', 'fine_label_names', 'fine_labels')), 'meta',
    ),
)  # fmt: skip


class Part(NamedTuple):
    """The images [N, 32, 32, 3] uint8 of a file, and their labels [N], by name."""

    images: np.ndarray
    labels: dict[str, np.ndarray]


class Source(NamedTuple):
    """A version of CIFAR that was found, whose files are read one by one.

    names: the names of the classes of each label, in order.
    """

    version: Version
    where: Path
    read: Callable[[str], bytes]
    names: dict[str, list[str]]

    def parts(self, files: tuple[str, ...]) -> Iterator[Part]:
        """What the files hold, in their order.  Raises DataError for one that is damaged."""
        for file in files:
            part = _part(self, file)
            for name, label in part.labels.items():
                if label.size and not 0 <= label.min() <= label.max() < len(self.names[name]):
                    raise DataError(
                        f'{self.where / file} has labels up to {label.max()}: expected 0 to '
                        f'{len(self.names[name]) - 1}. Get it again'
                    )
            yield part


def find(name: str, place: Path) -> Source | None:
    """CIFAR in a folder, in the folders and archives below it, or in an archive; None if not there.

    name: 'cifar10' or 'cifar100'.
    Raises DataError for the other set, for MATLAB's version, and for one with files missing.
    """
    found = _in_archive(place) if place.is_file() else _in_folder(place)
    if found is None:
        return None
    version, where, read, present = found
    if version.name != name:
        raise DataError(
            f'{where} is the {version.kind} version of {version.name}, not {name}: prepare '
            f'{version.name} from it'
        )
    missing = [file for file in version.files if file not in present]
    if missing:
        raise DataError(f'{where} lacks {", ".join(missing)}: unpack the whole archive again')
    source = Source(version, where, read, {})
    names = _names(source)
    if names['label'] != list(DATASETS[name].class_names):
        raise DataError(
            f'{where} lists the classes {names["label"]}; expected '
            f'{list(DATASETS[name].class_names)}'
        )
    return source._replace(names=names)


# --- Where the files are -------------------------------------------------------------------

Found = tuple[Version, Path, Callable[[str], bytes], set[str]]


def _in_folder(folder: Path) -> Found | None:
    for version in VERSIONS:
        for test in sorted(folder.rglob(version.test[0])):
            # CIFAR-100's python version calls a file 'test', as others call a folder.
            if test.is_file() and (not version.meta or (test.parent / version.meta).is_file()):
                here = test.parent
                read = _reading(here)
                return version, here, read, {path.name for path in here.iterdir()}
    if any(folder.rglob('test_batch.mat')) or any(folder.rglob('fine_label_names.mat')):
        raise DataError(
            f'{folder} holds the MATLAB version of CIFAR: get the python or the binary version'
        )
    archives = [path for path in sorted(folder.rglob('*.tar.gz')) if path.name[:5] == 'cifar']
    return _in_archive(archives[0]) if len(archives) == 1 else None


def _reading(folder: Path) -> Callable[[str], bytes]:
    def read(file: str) -> bytes:
        path = folder / file
        try:
            if path.stat().st_size > LARGEST:
                raise DataError(f'{path} is larger than any file of CIFAR: get it again')
            return path.read_bytes()
        except OSError as error:
            raise DataError(f'{path} cannot be read ({error}): get it again') from error

    return read


def _in_archive(path: Path) -> Found | None:
    """The files of a .tar.gz archive, in memory: nothing is unpacked to the disk."""
    wanted = {file for version in VERSIONS for file in version.files}
    held: dict[str, bytes] = {}
    try:
        with tarfile.open(path, 'r:*') as archive:
            for member in archive:
                name = Path(member.name).name
                if member.isfile() and name in wanted and name not in held:
                    file = archive.extractfile(member)
                    if member.size > LARGEST or file is None:
                        raise DataError(f'{path}: {name} is larger than any file of CIFAR')
                    held[name] = file.read()
    except (tarfile.TarError, OSError, EOFError) as error:
        raise DataError(f'{path} cannot be unpacked ({error}): get it again') from error
    for version in VERSIONS:
        if version.test[0] in held and (not version.meta or version.meta in held):
            return version, path, held.__getitem__, set(held)
    return None


# --- What they hold ------------------------------------------------------------------------


def _names(source: Source) -> dict[str, list[str]]:
    """The names of the classes of each label."""
    version, where = source.version, source.where
    if version.kind == 'binary':
        return {
            label: source.read(file).decode('utf-8', 'replace').split()
            for label, file, _ in version.labels
        }
    meta = _table(where / version.meta, source.read(version.meta))
    found = {label: meta.get(key) for label, key, _ in version.labels}
    for label, names in found.items():
        if not isinstance(names, list) or not all(isinstance(x, str | bytes) for x in names):
            raise DataError(f'{where / version.meta} has no names of {label}: get it again')
    return {label: [_text(name) for name in names or ()] for label, names in found.items()}


def _part(source: Source, file: str) -> Part:
    version, path, data = source.version, source.where / file, source.read(file)
    if version.kind == 'binary':
        record = len(version.labels) + PIXELS
        if not data or len(data) % record:
            raise DataError(
                f'{path} has {len(data):,} bytes, no whole number of records of {record}: unpack '
                'the archive again'
            )
        rows = np.frombuffer(data, np.uint8).reshape(-1, record)
        labels = {label: rows[:, i].astype(int) for i, (label, _, _) in enumerate(version.labels)}
        return Part(_images(rows[:, len(version.labels) :]), labels)
    table = _table(path, data)
    pixels = _array(table.get('data'))
    if pixels is None or pixels.ndim != 2 or pixels.shape[1] != PIXELS:
        raise DataError(f'{path} has no images of {PIXELS} bytes under data: get it again')
    labels = {}
    for label, _, key in version.labels:
        values = table.get(key)
        if (
            not isinstance(values, list)
            or len(values) != len(pixels)
            or not all(type(value) is int for value in values)
        ):
            raise DataError(f'{path} has no {key} for its {len(pixels)} images: get it again')
        labels[label] = np.asarray(values, int)
    return Part(_images(pixels), labels)


def _images(rows: np.ndarray) -> np.ndarray:
    """Planes of red, green and blue, [N, 3072], as images [N, 32, 32, 3]."""
    return rows.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)


# --- Pickles, of which nothing is called ----------------------------------------------------


def _table(path: Path, data: bytes) -> dict[str, Any]:
    """The dict in a pickle, its keys as text.  Raises DataError for anything else."""
    try:
        found = inert_pickle.loads(data)
        if not isinstance(found, dict):
            kind = getattr(found, 'name', type(found).__name__)
            raise safe_read.Refused(f'it holds a {kind}, and no table')
    except Exception as error:  # a damaged pickle raises anything
        raise DataError(
            f'{path} is not one of the pickles of CIFAR ({error}): get it again'
        ) from error
    return {_text(key): value for key, value in found.items() if isinstance(key, str | bytes)}


def _text(name: str | bytes) -> str:
    return name.decode('latin-1') if isinstance(name, bytes) else name


def _array(found: Any) -> np.ndarray | None:
    """An array of bytes; None for anything else."""
    return found if isinstance(found, np.ndarray) and found.dtype == np.uint8 else None
