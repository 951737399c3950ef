"""Bytes, JSON and named arrays in files: written atomically, and read with clear errors."""

from __future__ import annotations

import hashlib
import json
import math
import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import safetensors.numpy

from dfkd_jax.errors import CheckpointError
from dfkd_jax.storage import safe_read


def expanded(path: str | os.PathLike[str]) -> Path:
    """The path that a user gave, with ``~`` as the home folder.

    Shells leave the ``~`` of ``--flag=~/x`` as it is.
    """
    return Path(os.path.expanduser(path))  # Path.expanduser raises for users that are not there


def write_bytes(path: str | os.PathLike[str], data: bytes) -> None:
    """Writes a file atomically, and makes its folder.

    If the process dies while it writes, the file is as it was before.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f'.{path.name}.{os.getpid()}.{threading.get_ident()}.tmp')
    try:
        with open(temporary, 'wb') as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: str | os.PathLike[str], obj: Any) -> None:
    """Writes `plain(obj)` as indented JSON, atomically."""
    text = json.dumps(plain(obj), indent=2, allow_nan=False, ensure_ascii=False)
    write_bytes(path, (text + '\n').encode())


def read_json(
    path: str | os.PathLike[str], cure: str = 'Make it or copy it again.'
) -> dict[str, Any]:
    """The names and values of a JSON file.

    cure: what the user can do if the file cannot be read; the end of the message.

    Raises CheckpointError for a file that is missing, damaged or not a JSON object.
    """
    try:
        return safe_read.read_json(path)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f'{path} is not JSON of names and values ({error}). {cure}'
        ) from error


def plain(obj: Any) -> Any:
    """`obj` in the types of JSON: arrays as lists, paths as strings, config groups as dicts.

    NaN and infinities, which JSON does not have, become None.
    """
    if isinstance(obj, np.generic | np.ndarray | jax.Array):
        obj = np.asarray(obj).tolist()
    elif hasattr(obj, 'to_dict'):  # an ml_collections.ConfigDict
        obj = obj.to_dict()
    if isinstance(obj, Mapping):
        return {str(name): plain(value) for name, value in obj.items()}
    if isinstance(obj, list | tuple):
        return [plain(value) for value in obj]
    if isinstance(obj, float) and not math.isfinite(obj):
        return None
    if isinstance(obj, os.PathLike):
        return os.fspath(obj)
    return obj


def save_arrays(path: str | os.PathLike[str], arrays: Mapping[str, Any]) -> str:
    """Writes named arrays as safetensors, atomically; returns the sha256 of the file.

    Raises ValueError for a dtype that NumPy does not have (bfloat16): it could not be read back.
    """
    # Not np.ascontiguousarray, which makes a scalar a vector.
    host = {name: np.asarray(jax.device_get(x), order='C') for name, x in arrays.items()}
    for name, x in host.items():
        if x.dtype.kind == 'V':
            raise ValueError(f'{name} is {x.dtype}; convert it to float32 before saving.')
    data = safetensors.numpy.save(host)
    write_bytes(path, data)
    return hashlib.sha256(data).hexdigest()


def load_arrays(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """Reads named arrays from a safetensors file.

    Raises CheckpointError for a file that is missing, damaged or of another format.
    """
    return parse_arrays(path, read_bytes(path))


def read_bytes(path: str | os.PathLike[str]) -> bytes:
    """The content of a file.  Raises CheckpointError if it is missing or cannot be read."""
    try:
        return Path(path).read_bytes()
    except FileNotFoundError:
        raise CheckpointError(f'there is no file {path}: check the path.') from None
    except (OSError, MemoryError) as error:
        raise CheckpointError(
            f'{path} cannot be read ({error or "it is too large"}). Check its permissions, or copy '
            'it again.'
        ) from error


def parse_arrays(path: str | os.PathLike[str], data: bytes) -> dict[str, np.ndarray]:
    """The named arrays in the bytes of a safetensors file; `path` is named in the error.

    Raises CheckpointError for data that is damaged or of another format.
    """
    try:
        return safetensors.numpy.load(data)
    except Exception as error:  # safetensors raises its own type, or KeyError for an unknown dtype
        raise CheckpointError(
            f'{path} is not a whole safetensors file ({error}). Make it or copy it again.'
        ) from error
