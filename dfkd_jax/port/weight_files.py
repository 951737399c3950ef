"""Reads the files that hold weights, whatever their endings: the bytes tell what a file is.

PyTorch's (`torch.save`, of any age), pickles of arrays, safetensors, NumPy's .npz, Flax's msgpack;
and folders: Hugging Face's, sharded files with an index, orbax checkpoints, and our own model
folders.  Nothing that a file names is run: see `storage.inert_pickle`.
"""

from __future__ import annotations

import hashlib
import os
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from dfkd_jax.errors import PortError, UserError
from dfkd_jax.storage import inert_pickle, model_folder, safe_read

# In a folder, in this order: an index names the files that it is in parts of.
IN_FOLDERS = (
    'model.safetensors.index.json', 'model.safetensors',
    'pytorch_model.bin.index.json', 'pytorch_model.bin',
    'diffusion_pytorch_model.safetensors', 'flax_model.msgpack',
)  # fmt: skip
ORBAX = ('_METADATA', '_CHECKPOINT_METADATA', 'manifest.ocdbt')

RESAVE = 'where you trust it, run `python -c "import torch; torch.save({what}, \'weights.pth\')"`'
TRACED = RESAVE.format(what="torch.jit.load('{path}').state_dict()")

# What is no file of weights, by its first bytes, and what mends it.
STRANGERS = (
    (b'version https://git-lfs', 'a pointer of Git LFS, not the file: run `git lfs pull` in its '
     'repository, or download the file itself'),
    (b'\x89HDF\r\n', 'an HDF5 file, as Keras writes them: read its arrays with h5py and save them '
     'as .npz under the PyTorch names'),
    (b'\x1f\x8b', 'a gzip archive: unpack it first, with `tar xf` or `gunzip`'),
    (b'\xfd7zXZ', 'an xz archive: unpack it first, with `tar xf` or `unxz`'),
    (b'7z\xbc\xaf', 'a 7z archive: unpack it first'),
    (b'Rar!', 'a RAR archive: unpack it first'),
)  # fmt: skip


class Weights(NamedTuple):
    """What a file of weights holds.

    content: nested dictionaries and lists of arrays and others; arrays have `shape` and `dtype`,
      and become NumPy's by `numpy.asarray`.
    where: the file or files, for messages.
    key: of the part that was asked for, as in ``FILE#key``; '' if none was.
    """

    content: Any
    where: str
    key: str


def read(source: str | os.PathLike[str]) -> Weights:
    """The content of a file or folder of weights, ``PATH`` or ``PATH#key``.

    Raises PortError, in one line, for what is not there, damaged, or no weights.
    """
    path, key = locate(source)
    try:
        return Weights(_read_folder(path) if path.is_dir() else _read_file(path), str(path), key)
    except UserError:
        raise
    except Exception as error:  # readers raise errors of every kind on damaged files
        raise PortError(
            f'cannot read {path} as weights ({_first_line(error)}): it is damaged, cut short, or '
            'of another format; expected a file of PyTorch, safetensors, NumPy (.npz) or Flax '
            '(msgpack)'
        ) from error


def locate(source: str | os.PathLike[str]) -> tuple[Path, str]:
    """The file or folder and the key of ``PATH`` or ``PATH#key``.  PortError if it is not there."""
    text = os.fspath(source)
    path, key = Path(text).expanduser(), ''
    if not path.exists() and '#' in text:
        text, _, key = text.rpartition('#')
        path = Path(text).expanduser()
    if not path.exists():
        raise PortError(f'no weights at {path}: check the path')
    return path, key


def digest(source: str | os.PathLike[str]) -> str:
    """The SHA-256 of a file; of a folder's files, names and contents in order."""
    path, _ = locate(source)
    if path.is_file():
        with open(path, 'rb') as file:
            return hashlib.file_digest(file, 'sha256').hexdigest()
    whole = hashlib.sha256()
    for each in sorted(path.rglob('*')):
        if each.is_file():
            whole.update(f'{each.relative_to(path).as_posix()} {digest(each)}\n'.encode())
    return whole.hexdigest()


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _read_file(path: Path) -> Any:
    with open(path, 'rb') as file:
        head = file.read(512)
    for start, what in STRANGERS:
        if head.startswith(start):
            raise PortError(f'{path} is {what}')
    if not head:
        raise PortError(f'{path} is empty: copy or download it again')
    text = head.lstrip(b'\xef\xbb\xbf \t\r\n').lower()
    if text.startswith((b'<!doctype', b'<html', b'<?xml', b'<head')):
        raise PortError(
            f'{path} is a web page, not weights: open its address in a browser, and download the '
            'file again from there'
        )
    if text.startswith(b'{'):
        return _read_index(path)
    if head[257:262] == b'ustar':
        raise PortError(f'{path} is a tar archive: unpack it first, with `tar xf`')
    if head[4:8] == b'TFL3':
        raise PortError(f'{path} is a LiteRT model: expected the weights that it was made from')
    if head.startswith(b'PK'):
        return _read_zip(path)
    if head[8:9] == b'{' and 0 < int.from_bytes(head[:8], 'little') <= path.stat().st_size:
        from safetensors.numpy import load_file

        return load_file(path)
    if head[:1] == b'\x80' and head[1:2] <= b'\x05':
        return inert_pickle.load(path)
    if head[0] in (*range(0x81, 0x90), 0xDE, 0xDF):  # a map
        from flax.serialization import msgpack_restore

        return msgpack_restore(path.read_bytes())
    if head[:1] == b'\x08' and path.suffix == '.onnx':
        raise PortError(_exported(path))
    raise safe_read.Refused(f'it starts with {head[:8]!r}')


def _exported(path: Path) -> str:
    return (
        f'{path} is an exported program, not weights alone: it brings its own architecture, '
        '--config.teacher.model=exported'
    )


def _read_zip(path: Path) -> Any:
    """NumPy's .npz or a PyTorch file; programs are named."""
    safe_read.check_archive(path)
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
    last = {name.rpartition('/')[2] for name in names}
    if names and all(name.endswith('.npy') for name in names):
        import numpy as np

        # Given a path, np.load leaves it open after an error.
        with open(path, 'rb') as file, np.load(file, allow_pickle=False) as arrays:
            return dict(arrays)
    if any('code' in name.split('/')[:-1] and name.endswith('.py') for name in names):
        raise PortError(f'{path} is a TorchScript archive, a program: {TRACED.format(path=path)}')
    if any(name.endswith('models/model.json') for name in names):
        raise PortError(_exported(path))
    if 'data.pkl' in last:
        return inert_pickle.load(path)
    if 'model.weights.h5' in last:
        raise PortError(f'{path} is a Keras model: save its weights as .npz by the PyTorch names')
    raise PortError(f'{path} is a zip archive of {_few(names)}: unpack it first')


def _read_index(path: Path) -> dict[str, Any]:
    """The arrays of a file in parts, by the index that says which part holds which."""
    index = safe_read.read_json(path).get('weight_map')
    if not isinstance(index, dict):
        raise PortError(
            f'{path} is JSON without a weight_map: expected a file of weights, or the index of one '
            'in parts (model.safetensors.index.json)'
        )
    parts = sorted({str(part) for part in index.values()})
    outside = [part for part in parts if Path(part).name != part]
    if outside:
        raise PortError(f'{path} names {_few(outside)}: expected files beside it')
    absent = [part for part in parts if not (path.parent / part).is_file()]
    if absent:
        raise PortError(f'{path} lacks {_few(absent)} beside it: download all parts')
    arrays: dict[str, Any] = {}
    for part in parts:
        arrays |= _read_file(path.parent / part)
    lost = sorted(set(index) - set(arrays))
    if lost:
        raise PortError(f'{path} names {_few(lost)}, which its files do not hold: download again')
    return arrays


def _read_folder(path: Path) -> Any:
    """Our model folder, Hugging Face's, an orbax checkpoint, or a folder of one file."""
    held = sorted(each.name for each in path.iterdir())
    if model_folder.CARD in held:
        return model_folder.load_model(path)[1]
    if any(name in held for name in ORBAX):
        return _read_orbax(path)
    known = [name for name in IN_FOLDERS if name in held]
    files = known[:1] or [name for name in held if _is_weights(path / name)]
    if len(files) == 1:
        return _read_file(path / files[0])
    if files:
        raise PortError(f'{path} holds several files of weights, {_few(files)}: name one of them')
    raise PortError(
        f'{path} is a folder without weights (it holds {_few(held)}): expected a file of weights, '
        'a model folder, a Hugging Face folder (model.safetensors) or an orbax checkpoint'
    )


def _is_weights(path: Path) -> bool:
    return path.suffix.lower() in ('.pth', '.pt', '.safetensors', '.bin', '.ckpt', '.msgpack')


def _read_orbax(path: Path) -> Any:
    """The arrays of an orbax checkpoint, as NumPy's, whatever devices it was saved from."""
    import jax
    import numpy as np
    import orbax.checkpoint as ocp

    with ocp.PyTreeCheckpointer() as checkpointer:
        held = checkpointer.metadata(path.absolute()).item_metadata.tree
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), held)
        return checkpointer.restore(path.absolute(), restore_args=as_numpy)


def _few(names: Iterable[str], most: int = 5) -> str:
    names = list(names)
    more = f' and {len(names) - most} more' if len(names) > most else ''
    return ', '.join(names[:most]) + more if names else 'nothing'
