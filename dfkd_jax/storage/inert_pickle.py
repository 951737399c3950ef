"""Reads pickles, PyTorch's files among them, without running anything that they name.

A pickle is a program: it names functions and calls them.  Here every name becomes a class of its
own that does nothing but keep what it was called with, so a file makes data and no more.  Then
`_resolve` turns what it knows by name into plain data: dictionaries, NumPy arrays and PyTorch
tensors.  All else stays an `Inert` object.  Neither PyTorch nor a module that a file names
is imported.

Sources: the pickle opcodes (CPython's ``pickletools``), and the two layouts of ``torch.save``: a
zip archive with ``data.pkl`` and one member a storage, and before PyTorch 1.6 a row of pickles that
the bytes of the storages follow.
"""

from __future__ import annotations

import io
import math
import os
import pickle
import pickletools
import struct
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

import ml_dtypes
import numpy as np

from dfkd_jax.storage.safe_read import Refused, check_archive

Storage = Callable[[str, np.dtype], Callable[[], bytes]]  # a key -> how to read its bytes

MAGIC = 0x1950A86A20F9469CFC6C  # the first pickle of a PyTorch file before 1.6
DEEPEST = 20  # of tuples in tuples
MAPPINGS = (
    'collections.OrderedDict', 'collections.defaultdict', 'flax.core.frozen_dict.FrozenDict',
)  # fmt: skip
# PyTorch's kinds of storage.
STORAGES: dict[str, Any] = {
    'Double': np.float64, 'Float': np.float32, 'Half': np.float16, 'BFloat16': ml_dtypes.bfloat16,
    'Long': np.int64, 'Int': np.int32, 'Short': np.int16, 'Char': np.int8, 'Byte': np.uint8,
    'Bool': np.bool_, 'ComplexDouble': np.complex128, 'ComplexFloat': np.complex64,
}  # fmt: skip


class Inert:
    """An object of a class that was not loaded: what it was made with, and nothing else.

    name: of the class or function, as the file says it: ``argparse.Namespace``.
    args: of the call that made it.
    state, items: what was set on it afterwards.
    """

    name = ''

    def __new__(cls, *args: Any, **kwargs: Any) -> Inert:
        made = super().__new__(cls)
        made.args, made.state, made.items = (*args, *kwargs.values()), None, []
        return made

    args: tuple[Any, ...]
    state: Any
    items: list[Any]

    def __init__(self, *args: Any, **kwargs: Any):
        pass

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __setitem__(self, key: Any, value: Any) -> None:
        self.items.append((key, value))

    def append(self, value: Any) -> None:
        self.items.append(value)

    add = append

    def extend(self, values: Any) -> None:
        self.items.extend(values)

    @property
    def is_module(self) -> bool:
        """Whether this is a PyTorch module, pickled whole."""
        return isinstance(self.state, Mapping) and '_modules' in self.state


class Tensor:
    """A PyTorch tensor in a file; its numbers are read when NumPy asks for them."""

    def __init__(self, shape: tuple, strides: tuple, first: int, dtype: Any, read: Callable):
        self.shape, self.dtype = shape, np.dtype(dtype)
        self._strides, self._first, self._read = strides, first, read

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        storage = np.frombuffer(self._read(), self.dtype)
        end = self._first + sum(s * (n - 1) for n, s in zip(self.shape, self._strides, strict=True))
        if math.prod(self.shape) and not 0 <= self._first <= end < len(storage):
            raise Refused(f'a tensor of shape {self.shape} reaches beyond its storage')
        strides = [stride * self.dtype.itemsize for stride in self._strides]
        view = np.lib.stride_tricks.as_strided(storage[self._first :], self.shape, strides)
        return np.array(view, dtype)


def load(path: str | os.PathLike[str]) -> Any:
    """The content of a pickle or a PyTorch file, with `Tensor` and `Inert` objects in it.

    Strings of Python 2 are read as Latin-1.  Raises Refused, or any error of the pickle and zipfile
    modules, for a file that is damaged.
    """
    path = Path(path)
    check_archive(path)
    if zipfile.is_zipfile(path):
        return _load_zip(path)
    with open(path, 'rb') as file:
        first = _unpickle(file)
        if first == MAGIC:
            return _load_rows(file, lambda: open(path, 'rb'))
        return _resolve(first, _no_storage)


def loads(data: bytes) -> Any:
    """The content of a pickle without tensors, as `load` gives it."""
    return _resolve(_unpickle(io.BytesIO(data)), _no_storage)


def _load_zip(path: Path) -> Any:
    archive = zipfile.ZipFile(path)  # closed when the last tensor that reads from it is gone
    names = archive.namelist()
    root = next((name[:-8] for name in names if name.rpartition('/')[2] == 'data.pkl'), None)
    if root is None:
        raise Refused('a zip archive without PyTorch weights in it')
    order = f'{root}byteorder'
    big = order in names and archive.read(order) == b'big'

    def storage(key: str, dtype: np.dtype) -> Callable[[], bytes]:
        return lambda: _little(archive.read(f'{root}data/{key}'), dtype, big)

    return _resolve(_unpickle(io.BytesIO(archive.read(f'{root}data.pkl'))), storage)


def _load_rows(file: IO[bytes], reopen: Callable[[], IO[bytes]]) -> Any:
    """The rest of a file before PyTorch 1.6: protocol, machine, content, keys, storages."""
    _, machine, content, keys = (_unpickle(file) for _ in range(4))
    big = not machine.get('little_endian', True)
    dtypes: dict[str, np.dtype] = {}
    places: dict[str, tuple[int, int]] = {}  # known once all dtypes are

    def storage(key: str, dtype: np.dtype) -> Callable[[], bytes]:
        dtypes[key] = dtype

        def read() -> bytes:
            place, size = places[key]
            with reopen() as again:
                again.seek(place)
                return _little(again.read(size), dtype, big)

        return read

    resolved = _resolve(content, storage)
    here = file.tell()
    end = file.seek(0, os.SEEK_END)
    file.seek(here)
    for key in keys:
        (count,) = struct.unpack('<q', file.read(8))
        size = count * dtypes.get(key, np.dtype(np.uint8)).itemsize
        places[key] = file.tell(), size
        if size < 0 or file.tell() + size > end:
            raise Refused('the file ends before its tensors do')
        file.seek(size, os.SEEK_CUR)
    return resolved


def _load_storage(raw: bytes) -> Any:
    """The storage in a PyTorch file inside a pickle, which is of the kind before 1.6."""
    file = io.BytesIO(raw)
    if _unpickle(file) != MAGIC:
        raise Refused('a tensor without its numbers')
    return _load_rows(file, lambda: io.BytesIO(raw))


def _no_storage(key: str, dtype: np.dtype) -> Callable[[], bytes]:
    raise Refused('a tensor without its numbers')


def _little(raw: bytes, dtype: np.dtype, big: bool) -> bytes:
    return np.frombuffer(raw, dtype).byteswap().tobytes() if big else raw


# --- The pickle machine --------------------------------------------------------------------


class _Persistent(tuple):
    """What stands for a storage in a pickle: its kind, key, device and size."""


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: Any):
        super().__init__(file, encoding='latin1')
        self.classes: dict[str, type[Inert]] = {}

    def find_class(self, module: str, name: str) -> type[Inert]:
        whole = f'{module}.{name}'
        return self.classes.setdefault(whole, type('Inert', (Inert,), {'name': whole}))

    def persistent_load(self, pid: Any) -> Any:
        if isinstance(pid, tuple) and len(pid) > 1 and pid[0] == 'module':
            return pid[1]  # a class, whose source text follows
        return _Persistent(pid if isinstance(pid, tuple) else (pid,))


def _unpickle(file: Any) -> Any:
    """One pickle as inert data; the file stands behind it afterwards."""
    start = file.tell()
    _check(file)
    file.seek(start)
    return _Unpickler(file).load()


def _check(file: Any) -> None:
    """Raises Refused for a pickle that would fill the memory or take for ever.

    The machine's memory grows to its largest index, however few objects there are.  And the hash
    of a tuple of tuples, as a key of a dictionary, may take twice as long for each level.
    """
    levels: list[Any] = []  # of tuples in tuples, of the objects on the stack
    memory: dict[Any, int] = {}
    for number, (opcode, argument, _) in enumerate(pickletools.genops(file)):
        name = opcode.name
        if name in ('PUT', 'BINPUT', 'LONG_BINPUT', 'MEMOIZE'):
            if (argument or 0) > number:
                raise Refused('its pickle would fill the memory')
            memory[len(memory) if name == 'MEMOIZE' else argument] = levels[-1]
            continue
        if name in ('GET', 'BINGET', 'LONG_BINGET'):
            levels.append(memory[argument])
            continue
        taken = []
        if pickletools.markobject in opcode.stack_before:
            while levels[-1] is not None:
                taken.append(levels.pop())
            levels.pop()
            for _ in opcode.stack_before[: opcode.stack_before.index(pickletools.markobject)]:
                taken.append(levels.pop())
        else:
            taken = [levels.pop() for _ in opcode.stack_before]
        level = max((each for each in taken if each is not None), default=0)
        if name.startswith('TUPLE') or name == 'FROZENSET':
            level += 1
        if level > DEEPEST:
            raise Refused('its pickle has tuples in tuples without end')
        marks = opcode.stack_after == [pickletools.markobject]
        levels += [None if marks else level for _ in opcode.stack_after]


# --- From names to plain data --------------------------------------------------------------


def _resolve(content: Any, storage: Storage) -> Any:
    """Inert data with dictionaries, arrays and tensors in the place of what stands for them."""
    done: dict[int, tuple[Any, Any]] = {}  # with the original, or its identity would be given anew

    def resolve(x: Any) -> Any:
        if id(x) in done:
            return done[id(x)][1]
        made: Any = x
        if isinstance(x, dict | list | Inert):
            made = _container(x)
            done[id(x)] = x, made  # before what it holds, which may hold it
        if isinstance(x, dict):
            made.update((_key(resolve(key)), resolve(value)) for key, value in x.items())
        elif isinstance(x, list):
            made.extend(map(resolve, x))
        elif isinstance(x, _Persistent):
            made = _storage(x, storage)
        elif isinstance(x, tuple):
            made = tuple(map(resolve, x))
        elif isinstance(x, Inert):
            args, state, items = resolve(x.args), resolve(x.state), resolve(x.items)
            if isinstance(made, dict):
                pairs = args[-1] if args and isinstance(args[-1], list | dict) else []
                pairs = [*pairs.items()] if isinstance(pairs, dict) else pairs
                made.update((_key(key), value) for key, value in (*pairs, *items))
            else:
                made.args, made.state, made.items = args, state, items
                made = _known(x.name, made)
        done[id(x)] = x, made
        return made

    try:
        return resolve(content)
    except RecursionError:
        raise Refused('it is nested too deeply') from None


def _container(x: Any) -> Any:
    """An empty one of the same kind."""
    if isinstance(x, Inert) and x.name not in MAPPINGS:
        return type(x)()
    return [] if isinstance(x, list) else {}


def _key(key: Any) -> Any:
    return key if isinstance(key, str | int | float | bytes | bool | tuple | None) else str(key)


def _storage(pid: tuple, storage: Storage) -> tuple[np.dtype | None, Any]:
    """The dtype of a storage and how to read its bytes; None and nothing where it is not known."""
    if len(pid) < 5 or (len(pid) > 5 and pid[5]):  # a view of another, in the oldest files
        return None, None
    kind = getattr(pid[1], 'name', '').rpartition('.')[2].removesuffix('Storage')
    if kind not in STORAGES:
        return None, None
    dtype = np.dtype(STORAGES[kind])
    return dtype, storage(str(pid[2]), dtype)


def _known(name: str, x: Inert) -> Any:
    """What an object stands for, by its name; itself where that is not known."""
    module, _, last = name.rpartition('.')
    if name == '_codecs.encode' and isinstance(x.args[0], str):
        return x.args[0].encode('latin1')
    if name == 'torch.Size':
        return tuple(x.args[0])
    if module == 'torch._utils' and last.startswith('_rebuild_parameter'):
        return x.args[0]
    if name in ('torch._utils._rebuild_tensor', 'torch._utils._rebuild_tensor_v2'):
        (dtype, read), first, shape, strides = x.args[:4]
        numbers = (first, *shape, *strides)
        if dtype is None or not all(isinstance(n, int) and n >= 0 for n in numbers):
            return x
        return Tensor(tuple(shape), tuple(strides), first, dtype, read)
    if name == 'torch.storage._load_from_bytes':  # a tensor that `pickle.dump` wrote
        return _load_storage(x.args[0])
    if last == 'tuple' and len(x.args[0]) == 2:  # PaddlePaddle's tensor: its name and an array
        return x.args[0][1]
    if name == 'jax._src.array._reconstruct_array':
        x.state = x.args[2]
        return _numpy('_reconstruct', x)
    if module.split('.')[0] == 'numpy':
        return _numpy(last, x)
    return x


def _numpy(name: str, x: Inert) -> Any:
    """An array, dtype or number of NumPy, from the call that would make it."""
    if name == 'dtype':
        dtype: Any = np.dtype(str(x.args[0]))
        order: Any = x.state[1] if x.state else '='
        return dtype.newbyteorder(order) if order in ('<', '>') else dtype
    raw: Any
    shape: Any = ()
    if name == '_reconstruct' and x.state:
        _, shape, dtype, fortran, raw = x.state
        order = 'F' if fortran else 'C'
    elif name == '_frombuffer':
        raw, dtype, shape, order = x.args
    elif name == 'scalar':
        (dtype, raw), order = x.args, 'C'
    else:
        return x
    raw = raw.encode('latin1') if isinstance(raw, str) else raw
    if not isinstance(raw, bytes | bytearray) or not isinstance(dtype, np.dtype) or dtype.hasobject:
        return x
    array = np.frombuffer(raw, dtype).reshape(shape, order=order)
    return array[()] if name == 'scalar' else array
