"""PyTorch state dicts <-> variables of the model zoo, by the tables of `rules.py`.

The Flax module decides what a source must hold: the PyTorch names and shapes of its leaves, by the
architecture's table, no fewer and no more.  Arrays are NumPy's on both sides, so neither direction
touches a device.
"""

from __future__ import annotations

import dataclasses
import os
import re
import warnings
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import jax
import numpy as np
from flax import traverse_util

from dfkd_jax import models
from dfkd_jax.errors import PortError
from dfkd_jax.port.rules import TABLES, Leaf, Row, Table
from dfkd_jax.storage import safe_read

Shape = tuple[int, ...]

NESTED_UNDER = ('state_dict', 'model')  # where training scripts put the weights in a checkpoint
PREFIXES = ('module.', '_orig_mod.')  # of DataParallel and of torch.compile
LISTED = 1000  # the most names that an error lists for each kind of mistake


class Slot(NamedTuple):
    """Where one PyTorch array lives in Flax."""

    path: str  # of the leaf: 'params/layer1_0/conv1/kernel'
    place: int | None  # its index along the leaf's first axis, where the leaf stacks several
    axes: Shape | None  # the PyTorch array's axes in Flax's order, without ones behind
    shape: Shape  # in PyTorch
    ones: int  # how many of its last axes, of length 1, Flax lacks


class Plan(NamedTuple):
    """The PyTorch names of one set of Flax leaves."""

    slots: dict[str, Slot]
    counters: list[str]  # names that only PyTorch has: see `rules.STATISTICS`


def from_torch(
    name: str, source: Mapping[str, Any] | str | os.PathLike, num_classes: int = 10, **sizes: Any
) -> dict[str, Any]:
    """The variables of the architecture `name` from PyTorch weights.

    Args:
      name: of `models.MODELS`.
      source: name -> array (NumPy, JAX or PyTorch), or a path to .pth, .pt, .safetensors or .npz;
        a state dict, or one under 'state_dict' or 'model', with or without the prefix 'module.'.
      num_classes: of the classifier or the conditional generator.
      **sizes: `channels` of the images (if not given, a classifier's are read from its first
        layer); the fields of a generator (latent, width, image_size, ...).

    Returns:
      ``{'params': ..., 'batch_stats': ...}``, nested dicts of float32 NumPy arrays that share no
      memory with the source.

    Raises:
      PortError: unless every array of the source is used exactly once and every leaf is filled
        with finite numbers of its shape.  It lists every mistake, and names the architecture that
        the source fits, if there is one.
    """
    table = TABLES[_known(name)]
    found = _state_dict(source)
    from dfkd_jax.port.tables import TABLES as _more

    for each in _more.get(name, ()):
        names = _plan(each, _structure(name, num_classes, 3)).slots
        if len(set(names) & set(found)) > len(found) // 2:
            table = each
    channels = sizes.pop('channels', None)
    shapes = {key: _shape(value) for key, value in found.items()}
    if channels is None:
        channels = _sizes(table, shapes)[1] or 3
    plan = _plan(table, _structure(name, num_classes, channels, **sizes))
    # Only arrays of the right shape are converted: a view of one number may claim to be a million.
    fits = [key for key, slot in plan.slots.items() if shapes.get(key) == slot.shape]
    arrays = {key: _float32(found[key]) for key in fits}
    mistakes = {
        'missing': [key for key in plan.slots if key not in found],
        'unexpected': [key for key in found if key not in plan.slots and key not in plan.counters],
        'mis-shaped': [f'{key} {shapes[key]}, expected {slot.shape}'
                       for key, slot in plan.slots.items()
                       if shapes.get(key, slot.shape) != slot.shape],
        'not plain floating-point': [f'{key} {getattr(found[key], "dtype", type(found[key]))}'
                                     for key, array in arrays.items() if array is None],
        'not finite': [key for key, array in arrays.items()
                       if array is not None and not np.isfinite(array).all()],
    }  # fmt: skip
    if any(mistakes.values()):
        what = f'{name!r} with num_classes={num_classes}, channels={channels}'
        names = mistakes['missing'] or mistakes['unexpected'] or mistakes['mis-shaped']
        _fail(what, _origin(source), mistakes, _hint(shapes) if names else '')
    return {'params': {}, 'batch_stats': {}} | _variables(plan, arrays)


def _variables(plan: Plan, arrays: Mapping[str, np.ndarray | None]) -> dict[str, Any]:
    """The Flax variables of PyTorch arrays by name, one for every slot; copies."""
    leaves: dict[str, Any] = {}
    for key, slot in plan.slots.items():
        array = arrays[key]
        assert array is not None
        array = array.reshape(slot.shape[: len(slot.shape) - slot.ones])
        array = np.array(array if slot.axes is None else array.transpose(slot.axes), order='C')
        if slot.place is None:
            leaves[slot.path] = array
        else:
            leaves.setdefault(slot.path, []).append(array)  # plans list a stack in its order
    leaves = {path: np.stack(x) if isinstance(x, list) else x for path, x in leaves.items()}
    return traverse_util.unflatten_dict(leaves, sep='/')


def to_torch(name: str, variables: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The PyTorch state dict of variables of the architecture `name`: the inverse of `from_torch`.

    Returns contiguous NumPy arrays of the variables' own dtypes, bit for bit, and a
    `num_batches_tracked` of 0 for every batch norm.

    Raises:
      PortError: where the variables are not those of the architecture; it lists every mistake.
    """
    table = TABLES[_known(name)]
    leaves = traverse_util.flatten_dict(dict(variables), sep='/')
    shapes = {path: tuple(np.shape(leaf)) for path, leaf in leaves.items()}
    plan = _plan(table, shapes, strict=False)
    ported = {slot.path for slot in plan.slots.values()}
    classes, channels = _sizes(table, {key: slot.shape for key, slot in plan.slots.items()})
    expected = _structure(name, classes or 10, channels or 3)
    ported &= set(expected)
    missing = [path for path in expected if path not in shapes]
    unexpected = [path for path in shapes if path not in ported]
    wrong = []
    for path, shape in expected.items():
        given = shapes.get(path, shape)
        if table.last and given != shape:
            wrong.append(f'{path} {given}, expected {shape}')
        elif len(given) != len(shape):  # a generator's own sizes are not known here
            wrong.append(f'{path} {given}, expected {len(shape)} axes')
    mistakes = {'missing': missing, 'unexpected': unexpected, 'mis-shaped': wrong}
    if any(mistakes.values()):
        _fail(f'{name!r}', 'the given variables', mistakes)

    state_dict: dict[str, np.ndarray] = {}
    for key, slot in plan.slots.items():
        leaf = np.asarray(leaves[slot.path])
        leaf = leaf if slot.place is None else leaf[slot.place]
        leaf = leaf if slot.axes is None else leaf.transpose(np.argsort(slot.axes))
        state_dict[key] = np.array(leaf.reshape(leaf.shape + (1,) * slot.ones), order='C')
    return state_dict | {key: np.zeros((), np.int64) for key in plan.counters}


def classifier_sizes(name: str, variables: Mapping[str, Any]) -> tuple[int, int]:
    """A classifier's numbers of classes and of input channels, read from its variables."""
    table = TABLES[_known(name)]
    shapes = {key: array.shape for key, array in to_torch(name, variables).items()}
    classes, channels = _sizes(table, shapes)
    if classes is None or channels is None:
        raise PortError(f'{name!r} is not a classifier')
    return classes, channels


def _known(name: str) -> str:
    """Returns `name`.  Raises ValueError, with similar names, if there is no table for it."""
    if name not in TABLES:
        models.make(name)
        raise PortError(f'no PyTorch names for {name!r}: add a table to dfkd_jax/port/rules.py')
    return name


# --- What a source must hold: the leaves of the module, and their PyTorch names -------------


@lru_cache(maxsize=128)
def _structure(name: str, num_classes: int, channels: int, **sizes: Any) -> dict[str, Shape]:
    """The shape of every leaf of an architecture, by path; found by tracing `init`."""
    fields = {field.name for field in dataclasses.fields(models.make(name))}
    given = {'num_classes': num_classes, 'channels': channels}
    unknown = [size for size in sizes if size not in fields]
    if unknown:
        takes = ', '.join(
            sorted((fields | {'channels'}) - {'parent', 'name', 'axis_name', 'dtype'})
        )
        raise ValueError(f'{name!r} has no {" or ".join(unknown)}; its sizes are {takes}')
    module = models.make(name, **{k: v for k, v in given.items() if k in fields}, **sizes)
    inputs = TABLES[name].inputs(module, channels)

    def init(*inputs: jax.Array) -> Any:
        return module.init(jax.random.key(0), *inputs)

    leaves = traverse_util.flatten_dict(jax.eval_shape(init, *inputs), sep='/')
    return {path: leaf.shape for path, leaf in leaves.items()}


def _plan(table: Table, shapes: Mapping[str, Shape], strict: bool = True) -> Plan:
    """The PyTorch names of Flax leaves, by a table.

    strict: every leaf must have a row, or it is our own mistake.
    """
    slots: dict[str, Slot] = {}
    counters: dict[str, None] = {}
    for path, shape in shapes.items():
        row, leaf, numbers = _row(table, path)
        if row is None or leaf is None:
            assert not strict, f'no row of dfkd_jax/port/rules.py has the leaf {path}'
            continue
        # A placeholder of the PyTorch side alone runs over the leaf's first axis.
        runs = set(re.findall(r'{(\w+)}', row.torch)) - set(numbers)
        for index in range(shape[0] if shape else 0) if runs else (None,):
            module = row.torch.format(**numbers, **dict.fromkeys(runs, index))
            each = shape[1:] if runs else shape
            if leaf.axes is not None and len(leaf.axes) == len(each):
                each = tuple(each[i] for i in np.argsort(leaf.axes))
            key = f'{module}.{leaf.torch}' if module else leaf.torch
            assert key not in slots, f'two leaves for {key}'
            slots[key] = Slot(path, index, leaf.axes, each + (1,) * leaf.ones, leaf.ones)
            for dropped in row.leaves:
                if not dropped.collection:
                    counters[f'{module}.{dropped.torch}'] = None
    return Plan(slots, list(counters))


def _row(table: Table, path: str) -> tuple[Row | None, Leaf | None, dict[str, str]]:
    """The row and the leaf that a Flax path matches, and the numbers of its placeholders."""
    collection, _, rest = path.partition('/')
    module, _, last = rest.rpartition('/')
    for row in table.rows:
        match = re.fullmatch(re.sub(r'{(\w+)}', r'(?P<\1>\\d+)', row.flax), module)
        for leaf in row.leaves if match else ():
            if (leaf.collection, leaf.flax) == (collection, last):
                return row, leaf, match.groupdict() if match else {}
    return None, None, {}


# --- What a source holds: names and arrays, of a mapping or a file --------------------------


def _state_dict(source: Any) -> dict[str, Any]:
    """The weights alone: read from a file, unnested, and without prefixes."""
    where = _origin(source)
    if isinstance(source, (str, os.PathLike)):
        source = _read(Path(source).expanduser())
    while isinstance(source, Mapping):
        nested = [key for key in NESTED_UNDER if isinstance(source.get(key), Mapping)]
        if not nested:
            break
        source = source[nested[0]]
    if not isinstance(source, Mapping):
        raise PortError(f'{where} holds a {type(source).__name__}, not names and arrays: pass a '
                        "state dict, such as a PyTorch module's `state_dict()`")  # fmt: skip
    found = {str(key): value for key, value in source.items()}
    if not any(hasattr(value, 'shape') for value in found.values()):
        held, under = _listing(list(found)) or 'nothing', ' or '.join(NESTED_UNDER)
        raise PortError(f'{where} holds no arrays, but {held}: expected a state dict, or one under '
                        f'{under}')  # fmt: skip
    for prefix in PREFIXES:
        if all(key.startswith(prefix) for key in found):
            found = {key.removeprefix(prefix): value for key, value in found.items()}
    return found


def _read(path: Path) -> Any:
    """The content of a weights file.  Nothing but tensors is ever unpickled."""
    if path.is_dir():
        hint = 'a model folder is loaded by dfkd_jax.storage.model_folder.load_model'
        raise PortError(f'{path} is a folder; expected a file of weights ({hint})')
    if not path.exists():
        raise PortError(f'no weights at {path}: check the path')
    try:
        safe_read.check_archive(path)
        if path.suffix in ('.pth', '.pt', '.tar', '.bin'):
            return _read_torch(path)
        if path.suffix == '.safetensors':
            from safetensors.numpy import load_file

            return load_file(path)
        if path.suffix == '.npz':
            # Given a path, np.load leaves it open after an error.
            with open(path, 'rb') as file, np.load(file, allow_pickle=False) as arrays:
                return dict(arrays)
    except PortError:
        raise
    except Exception as error:  # these libraries raise errors of every kind on damaged files
        raise PortError(f'cannot read {path} as {path.suffix} weights ({_first_line(error)}): '
                        'it is damaged, cut short, or of another format') from error  # fmt: skip
    raise PortError(f'cannot tell the format of {path} by its ending {path.suffix!r}: '
                    'expected .pth, .pt, .safetensors or .npz')  # fmt: skip


def _read_torch(path: Path) -> Any:
    """The content of a PyTorch file, which may hold only weights."""
    try:
        import torch
    except ImportError as error:
        raise PortError(
            f'reading {path} needs PyTorch, which is not installed: run `pip install torch '
            '--index-url https://download.pytorch.org/whl/cpu`, or save the weights as '
            '.safetensors or .npz on a machine that has it'
        ) from error
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # about old pickles, which it reads or refuses anyway
            return torch.load(path, map_location='cpu', weights_only=True)
    except Exception as error:
        foreign = re.search(r'GLOBAL (\S+)', str(error))
        if foreign is None:
            raise
        raise PortError(
            f'{path} holds a pickled {foreign[1]} beside weights, and only weights are ever '
            'unpickled here: save them alone where you trust the file, with '
            "torch.save(checkpoint['state_dict'], 'weights.pth')"
        ) from error


def _float32(value: Any) -> np.ndarray | None:
    """The array in float32, or None if it does not store floating-point numbers one by one."""
    if 'float' not in str(getattr(value, 'dtype', '')):
        return None
    if hasattr(value, 'detach'):  # PyTorch's; NumPy cannot convert its bfloat16
        if 'strided' not in str(value.layout) or value.is_meta:  # sparse, or without any numbers
            return None
        value = value.detach().cpu().float().numpy()
    with np.errstate(over='ignore'):  # becomes infinite, which is reported by name
        return np.asarray(value).astype(np.float32)


def _shape(value: Any) -> Shape:
    return tuple(int(size) for size in getattr(value, 'shape', ()))


def _origin(source: Any) -> str:
    return str(source) if isinstance(source, (str, os.PathLike)) else 'the given mapping'


# --- What is wrong, and what would fit -----------------------------------------------------


def _fail(what: str, where: str, mistakes: dict[str, list[str]], hint: str = '') -> NoReturn:
    """Raises one error with every mistake of every kind."""
    mistakes = {kind: sorted(names) for kind, names in mistakes.items() if names}
    counts = ', '.join(f'{len(names)} {kind}' for kind, names in mistakes.items())
    lines = [f'cannot port {what} from {where}: {counts}.']
    lines += [f'  {kind} ({len(names)}): {_listing(names)}' for kind, names in mistakes.items()]
    raise PortError('\n'.join(lines + [hint] if hint else lines))


def _listing(names: list[str]) -> str:
    more = f', and {len(names) - LISTED} more' if len(names) > LISTED else ''
    return ', '.join(names[:LISTED]) + more


def _hint(shapes: Mapping[str, Shape]) -> str:
    """Says which architectures have exactly these names and shapes."""
    if any(key.startswith('params/') for key in shapes):
        return (
            'These are Flax names, as dfkd_jax saves them: load them with '
            'dfkd_jax.storage.model_folder.load_model.'
        )
    fitting = []
    for name, table in TABLES.items():
        classes, channels = _sizes(table, shapes)
        if classes is None or channels is None:
            continue
        plan = _plan(table, _structure(name, classes, channels))
        expected = {key: slot.shape for key, slot in plan.slots.items()}
        if expected == {key: shape for key, shape in shapes.items() if key not in plan.counters}:
            fitting.append(f'{name!r} with num_classes={classes}, channels={channels}')
    if not fitting:
        return 'No architecture of the model zoo has exactly these names and shapes.'
    return f'These are the names and shapes of {" or of ".join(fitting)}.'


def _sizes(table: Table, shapes: Mapping[str, Shape]) -> tuple[int | None, int | None]:
    """A classifier's numbers of classes and input channels, by its arrays; None: unknown."""
    last, first = shapes.get(table.last, ()), shapes.get(table.first, ())
    classes, channels = None, None
    if len(last) == 2 and last[0] > 0:
        classes = last[0]
    if len(first) == 4 and first[1] > 0 and first[1] % table.block**2 == 0:
        channels = first[1] // table.block**2
    return classes, channels


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
