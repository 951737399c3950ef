"""Reads the files that hold weights, whatever their endings: the bytes tell what a file is.

PyTorch's (`torch.save`, of any age), pickles of arrays, safetensors, NumPy's .npz, Flax's msgpack;
and folders: Hugging Face's, sharded files with an index, orbax checkpoints, and our own model
folders.  Nothing that a file names is run: see `storage.inert_pickle`.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import tarfile
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from dfkd_jax.errors import PortError, UserError
from dfkd_jax.storage import files, inert_pickle, model_folder, safe_read

# In a folder, in this order: an index names the files that it is in parts of.
IN_FOLDERS = (
    'model.safetensors.index.json', 'model.safetensors',
    'pytorch_model.bin.index.json', 'pytorch_model.bin',
    'diffusion_pytorch_model.safetensors', 'flax_model.msgpack',
)  # fmt: skip
ORBAX = ('_METADATA', '_CHECKPOINT_METADATA', 'manifest.ocdbt')

RESAVE = 'where you trust it, run `python -c "import torch; torch.save({what}, \'weights.pth\')"`'
TRACED = RESAVE.format(what="torch.jit.load('{path}').state_dict()")
LOADED = RESAVE.format(what="torch.load('{path}', weights_only=False)")
PACKAGED = RESAVE.format(
    what="torch.package.PackageImporter('{path}').load_pickle('{package}', '{resource}')"
)
DISTRIBUTED = (
    'a checkpoint of torch.distributed, in parts: put it together, with `python -m '
    'torch.distributed.checkpoint.format_utils dcp_to_torch {path} weights.pth`'
)
TO_ONNX = (
    'convert it to ONNX, with `python -m tf2onnx.convert {flag} {path} --output teacher.onnx`, '
    'and set --config.teacher.model=exported'
)
BY_NAME = 'read its arrays with {reader} and save them with `numpy.savez`, by the PyTorch names'
SORTED_TABLE = bytes.fromhex('57fb808b247547db')  # ends the index of a TensorFlow checkpoint
CHECKPOINT = (
    'a TensorFlow checkpoint, arrays without their network: read them with '
    "`tf.train.load_checkpoint('{path}')` and save them with `numpy.savez`, by the PyTorch names"
)
LISTED_IN_TAR = 100  # an archive of a data set has a million members
LUA = 'a file of Lua Torch: ' + BY_NAME.format(reader='the package torchfile')

# What is no file of weights, by its first bytes, and what mends it.
STRANGERS = (
    (b'version https://git-lfs', 'a pointer of Git LFS, not the file: run `git lfs pull` in its '
     'repository, or download the file itself'),
    (b'\x89HDF\r\n', 'an HDF5 file, as Keras writes them: ' + TO_ONNX.replace('{flag}', '--keras')),
    (b'\x08\x01\x12', 'the graph of a TensorFlow SavedModel: pass its folder'),
    (b'\x93NUMPY', 'one array or pickled object of NumPy (.npy), without names. If it is a pickled '
     'dictionary that you trust, run `python -c "import numpy as np; np.savez(\'weights.npz\', '
     '**np.load(\'{path}\', allow_pickle=True).item())"`'),
    (b'\x04\0\0\0\x01\0\0\0', LUA),
    (b'\x03\0\0\0\x01\0\0\0', LUA),
    (b'BZh', 'a bzip2 archive: unpack it first, with `tar xf` or `bunzip2`'),
    (b'\x28\xb5\x2f\xfd', 'a Zstandard archive: unpack it first, with `unzstd`'),
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
    path, key = files.expanded(text), ''
    if not path.exists() and '#' in text:
        text, _, key = text.rpartition('#')
        path = files.expanded(text)
    if not path.exists():
        if Path(f'{path}.index').exists():
            raise PortError(f'{path} is {CHECKPOINT.format(path=path)}')
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
            raise PortError(f'{path} is {what.format(path=path)}')
    if path.suffix == '.distcp' or path.name == '.metadata':
        raise PortError(f'{path} is a part of {DISTRIBUTED.format(path=path.parent)}')
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
        raise PortError(f'{path} is {_tar(path)}')
    if head[4:8] == b'TFL3':
        onnx = TO_ONNX.format(flag='--tflite', path=path)
        raise PortError(f'{path} is a LiteRT model: take the one that it was made from, or {onnx}')
    if head.startswith(b'PK'):
        return _read_zip(path)
    if head[8:9] == b'{' and 0 < int.from_bytes(head[:8], 'little') <= path.stat().st_size:
        from safetensors.numpy import load_file

        return load_file(path)
    if head[:1] == b'\x80' and head[1:2] <= b'\x05':
        if b'joblib.numpy_pickle' in head:
            raise PortError(
                f'{path} is a file of joblib: where you trust it, run `python -c "import joblib, '
                f"pickle; pickle.dump(joblib.load('{path}'), open('weights.pkl', 'wb'))\"`"
            )
        return inert_pickle.load(path)
    if head[0] in (*range(0x81, 0x90), 0xDE, 0xDF):  # a map
        from flax.serialization import msgpack_restore

        return msgpack_restore(path.read_bytes())
    if head[:1] == b'\x08' and head[1:2] > b'\x02':  # ONNX, whose version is 3 or later
        raise PortError(_exported(path))
    if (message := _protobuf(head)) or (message := _tensorflow(path)):
        raise PortError(f'{path} is {message}')
    raise safe_read.Refused(f'it starts with {head[:8]!r}')


def _exported(path: Path) -> str:
    return (
        f'{path} is an exported program, not weights alone: it brings its own architecture, '
        '--config.teacher.model=exported'
    )


def _tar(path: Path) -> str:
    """What a tar archive is: a PyTorch file from before 0.2, or any."""
    members: set[str] = set()
    with contextlib.suppress(tarfile.TarError), tarfile.open(path) as archive:
        members |= {each.name for _, each in zip(range(LISTED_IN_TAR), archive, strict=False)}
    if {'storages', 'tensors', 'pickle'} <= members:
        return f'a PyTorch file from before 0.2: {LOADED.format(path=path)}'
    return 'a tar archive: unpack it first, with `tar xf`'


def _protobuf(head: bytes) -> str:
    """Which framework's message begins so; '' if none's."""
    if head[:1] != b'\n':
        return ''
    start = 1
    while head[start : start + 1] >= b'\x80':  # a length of several bytes
        start += 1
    name = head[start + 1 :]
    nested = name[:1] == b'\n'
    name = name[2 : 2 + name[1]] if nested else name[: head[start]]
    if not (name.isascii() and name.decode('ascii', 'replace').isprintable()):
        return ''
    if not nested:
        return f'a network of Caffe: {BY_NAME.format(reader="caffe or OpenCV")}'
    if b'Float32' in head or b'Float16' in head:
        return (
            'a checkpoint of MindSpore: read it with `mindspore.load_checkpoint` and save it with '
            '`numpy.savez`, by the PyTorch names'
        )
    return 'a frozen graph of TensorFlow: pass the SavedModel or the weights that it was made from'


def _tensorflow(path: Path) -> str:
    """What a part of a TensorFlow checkpoint is; '' for another file."""
    with open(path, 'rb') as file:
        file.seek(max(0, path.stat().st_size - len(SORTED_TABLE)))
        index = file.read() == SORTED_TABLE
    if index or re.search(r'\.data-\d+-of-\d+$', path.name):
        return f'a part of {CHECKPOINT.format(path=path.with_suffix(""))}'
    return ''


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
        export = f"import keras; keras.saving.load_model('{path}').export('folder')"
        onnx = TO_ONNX.format(flag='--saved-model', path='folder')
        raise PortError(f'{path} is a Keras model: run `python -c "{export}"`, then {onnx}')
    packages = [name.split('/')[1:] for name in names if name.endswith('.pkl')]
    if 'extern_modules' in last and packages:
        *package, resource = packages[0]
        command = PACKAGED.format(path=path, package='.'.join(package), resource=resource)
        raise PortError(f'{path} is a torch.package, a program: {command}')
    raise PortError(f'{path} is a zip archive of {_few(names)}: unpack it first, with `unzip`')


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
    if message := _foreign(path, held):
        raise PortError(f'{path} is {message}')
    known = [name for name in IN_FOLDERS if name in held]
    parts = known[:1] or [name for name in held if _is_weights(path / name)]
    if len(parts) == 1:
        return _read_file(path / parts[0])
    if parts:
        raise PortError(f'{path} holds several files of weights, {_few(parts)}: name one of them')
    raise PortError(
        f'{path} is a folder without weights (it holds {_few(held)}): expected a file of weights, '
        'a model folder, a Hugging Face folder (model.safetensors) or an orbax checkpoint'
    )


def _foreign(path: Path, held: list[str]) -> str:
    """What a folder in another format is, and what mends it; '' for none."""
    if any(name.endswith('.distcp') for name in held):
        return DISTRIBUTED.format(path=path)
    if 'zero_to_fp32.py' in held:
        convert = f'`python {path}/zero_to_fp32.py {path} weights`'
        return f'a checkpoint of DeepSpeed, in parts: put it together, with {convert}'
    if 'saved_model.pb' in held:
        onnx = TO_ONNX.format(flag='--saved-model', path=path)
        return f'a TensorFlow SavedModel: {onnx}'
    if index := [name for name in held if name.endswith('.index')]:
        return CHECKPOINT.format(path=path / index[0].removesuffix('.index'))
    return ''


def _is_weights(path: Path) -> bool:
    """Whether a file in a folder is taken for weights, by its name: an optimiser's state is not."""
    if re.search(r'optim|sched|rng_state|training_args', path.name):
        return False
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
