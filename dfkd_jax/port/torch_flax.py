"""Weights of PyTorch <-> variables of the model zoo, by the tables of names in `tables/`.

The Flax module decides what a source must hold: the PyTorch names and shapes of its leaves, by one
of the architecture's tables.  Arrays are NumPy's on both sides, so neither direction touches a
device.
"""

from __future__ import annotations

import dataclasses
import os
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import jax
import numpy as np
from flax import traverse_util

from dfkd_jax import models
from dfkd_jax.errors import PortError
from dfkd_jax.port import candidates, dialects, weight_files
from dfkd_jax.port.candidates import Candidate
from dfkd_jax.port.exported import onnx_file
from dfkd_jax.port.rules import Leaf, Row, Table
from dfkd_jax.port.tables import tables_of, twin_of
from dfkd_jax.storage import files, model_folder
from dfkd_jax.storage.inert_pickle import Inert

Shape = tuple[int, ...]

LISTED = 10  # the most names that a message lists for each kind
# What counters and profilers leave beside every layer (thop, torch's averaging), by the last name.
LEFT_OUT = ('total_ops', 'total_params', 'n_averaged')
# The last names of a normalisation layer in front of the network, mean and standard deviation.
NORMALISATION = (('mean', 'std'), ('mu', 'sigma'), ('_mean', '_std'), ('pixel_mean', 'pixel_std'))
EXPORT = (
    f'Export it with its code, by `{onnx_file.EXPORT}`, and set --config.teacher.model=exported.'
)


class PortWarning(UserWarning):
    """What was left out of a file, or could be meant in two ways."""


class Ported(NamedTuple):
    """The variables of a network, and what its file said beside them.

    variables: ``{'params': ..., 'batch_stats': ...}``, nested dicts of float32 NumPy arrays that
      share no memory with the source.
    notes: what was taken and left out, and what could be meant in two ways; a sentence each.
    mean, std: of a normalisation layer in front of the network, per channel, of images in [0, 1];
      () if the file has none.  The variables leave it out, so images must be normalised so.
    """

    variables: dict[str, Any]
    notes: tuple[str, ...] = ()
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()


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


class _Fit(NamedTuple):
    """A candidate, read by a table."""

    candidate: Candidate
    table: Table
    plan: Plan
    channels: int


def from_torch(
    name: str, source: Mapping[str, Any] | str | os.PathLike, num_classes: int = 10, **sizes: Any
) -> dict[str, Any]:
    """The variables of the architecture `name` from weights; `read`, with its notes as warnings."""
    ported = read(name, source, num_classes, **sizes)
    for note in ported.notes:
        warnings.warn(note, PortWarning, stacklevel=2)
    return ported.variables


def read(
    name: str, source: Mapping[str, Any] | str | os.PathLike, num_classes: int = 10, **sizes: Any
) -> Ported:
    """The variables of the architecture `name` from weights of PyTorch or Flax.

    Args:
      name: of `models.MODELS` or `models.FAMILIES`.
      source: names and arrays (NumPy, JAX or PyTorch), or a path of `weight_files.read`, with
        ``#key`` after it to choose one of several sets of weights.  They may lie under any key and
        behind any prefix.
      num_classes: of the classifier or the conditional generator.
      **sizes: `channels` of the images (if not given, a classifier's are read from its first
        layer); the fields of a generator (latent, width, image_size, ...).

    Raises:
      PortError: unless every array of the source is used exactly once and every leaf is filled
        with finite numbers of its shape, or where two sets of weights fit and differ.  It lists
        what is wrong, and names the architecture that the source fits, if there is one.
      ValueError: for an architecture that is not known.
    """
    _known(name)
    if isinstance(source, (str, os.PathLike)):
        content, where, key = weight_files.read(source)
    else:
        content, where, key = source, 'the given mapping', ''
    flax = _flax_variables(content)
    if flax is not None:
        return Ported(_check_flax(name, where, flax, num_classes, **sizes))
    groups = _groups(content, where, key)
    fits = _fits(name, groups, num_classes, **sizes)
    fit = _choose(name, where, key, fits, groups, num_classes)
    return _port(name, where, fit, num_classes)


def accuracy_in(path: str | os.PathLike[str]) -> float | None:
    """The accuracy in per cent that a file of weights or a model folder states; None if none.

    Raises PortError as `read` does.
    """
    card = Path(path) / model_folder.CARD
    if card.is_file():
        return files.read_json(card).get('accuracy')
    return candidates.accuracy(weight_files.read(path)[0])


def _groups(content: Any, where: str, key: str) -> dict[str, dict[str, Any]]:
    """The dictionaries of arrays in a content.  Raises PortError where there are none."""
    whole = candidates.modules(content)
    groups = candidates.groups(content)
    groups = {label: dialects.plain(group, _float32) for label, group in groups.items()}
    if whole and not any(len(group) > 1 for group in groups.values()):
        keys = ''.join(f'[{key!r}]' for key in whole[0])
        loaded = f"torch.load('{where}', weights_only=False){keys}.state_dict()"
        raise PortError(
            f'{where} is a whole pickled model, which is code and not weights alone: with its code '
            f'beside it, {weight_files.RESAVE.format(what=loaded)}'
        )
    if groups and all(candidates.is_optimizers(label, content) for label in groups):
        raise PortError(
            f"{where} holds an optimiser's state alone, which has no weights: pass the file of the "
            'model that was saved beside it'
        )
    if any(candidates.is_quantised(group) for _, group in candidates.dictionaries(content)):
        raise PortError(
            f'{where} holds a quantised network, whose weights are integers: expected those in '
            'floating point, from before it was quantised'
        )
    if groups:
        return groups
    if not isinstance(content, Mapping):
        kind = content.name if isinstance(content, Inert) else type(content).__name__
        raise PortError(f'{where} holds a {kind}, not names and arrays: pass a '
                        "state dict, such as a PyTorch module's `state_dict()`")  # fmt: skip
    raise PortError(f'{where} holds no arrays, but {_listing(map(str, content)) or "nothing"}: '
                    'expected a state dict, alone or under a key')  # fmt: skip


def _fits(
    name: str, groups: Mapping[str, dict[str, Any]], num_classes: int, **sizes: Any
) -> list[_Fit]:
    """The best candidates for an architecture, over all its tables."""
    given = sizes.pop('channels', None)
    fits = []
    for table in tables_of(name):
        for label, group in groups.items():
            before = candidates.prefixes(group, table.first) if table.first else []
            first = {table.first: _shape(group[before[0] + table.first])} if before else {}
            channels = given or _sizes(table, first)[1] or 3
            plan = _plan(table, _structure(name, num_classes, channels, **sizes))
            if plan is None:
                continue
            names = sorted(plan.slots, key=lambda key: key != table.first)
            head = table.last.removesuffix('.weight')
            found = candidates.find(label, group, names, head)
            fits += [_Fit(each, table, plan, channels) for each in found]
    complete = [fit for fit in fits if len(fit.candidate.names) == len(fit.plan.slots)]
    if complete:
        return complete
    # Names that many networks have, such as `bn1.weight`, do not make it one of these.
    near = [fit for fit in fits if 2 * len(fit.candidate.names) > len(fit.plan.slots)]
    return sorted(near, key=lambda fit: -len(fit.candidate.names))[:1]


def _choose(
    name: str,
    where: str,
    key: str,
    fits: list[_Fit],
    groups: Mapping[str, dict[str, Any]],
    num_classes: int,
) -> _Fit:
    """The one candidate that is meant.  Raises PortError where none or several are."""
    if key:
        kept = [fit for fit in fits if candidates.chosen(fit.candidate.label, key)]
        if not kept:
            held = {fit.candidate.label or '(the top)' for fit in fits} or set(groups)
            raise PortError(f'{where} holds no weights of {name!r} under {key!r}: expected one of '
                            f'{_listing(sorted(held))}')  # fmt: skip
        fits = kept
    if not fits:
        group = max(groups.values(), key=len)
        table = tables_of(name)[0]
        plan = _plan(table, _structure(name, num_classes, 3)) or Plan({}, [])
        return _Fit(Candidate('', group, {}, '', ''), table, plan, 3)
    first, *others = fits
    different = [other for other in others if not _same(first, other)]
    if different:
        labels = sorted({fit.candidate.label for fit in (first, *different)})
        chosen = f'{where}#{labels[0]}'
        raise PortError(
            f'{where} holds {len(labels)} different sets of weights of {name!r}, under '
            f'{" and ".join(labels)}: choose one, such as {chosen}'
        )
    return first


def _same(one: _Fit, other: _Fit) -> bool:
    """Whether two candidates hold the same numbers for the same Flax leaves."""

    def arrays(fit: _Fit) -> dict[Any, Any]:
        slots, (_, group, names, *_) = fit.plan.slots, fit.candidate
        return {slots[name][:2]: _float32(group[key]) for name, key in names.items()}

    a, b = arrays(one), arrays(other)
    return a.keys() == b.keys() and all(
        x is not None and y is not None and np.array_equal(x, y)
        for x, y in ((a[key], b[key]) for key in a)
    )


def _port(name: str, where: str, fit: _Fit, num_classes: int) -> Ported:
    """The variables of one candidate, checked array by array."""
    (label, group, names, prefix, _), table, plan, channels = fit
    used = set(names.values())
    counters = {prefix + key for key in plan.counters} | set(plan.counters)
    left = [
        key for key in group
        if key not in used and key not in counters and not key.endswith('.num_batches_tracked')
    ]  # fmt: skip
    mean, std, layer = _normalisation(group, left, channels)
    spare = [
        key for key in left
        if key not in layer
        and (
            key.rpartition('.')[2] in LEFT_OUT
            or not fit.candidate.has(key)
            or any(key.startswith(f'{prefix}{unused}.') for unused in table.unused)
        )
    ]  # fmt: skip
    plain = {name: group[key] for name, key in names.items() if candidates.is_array(group[key])}
    shapes = {name: _shape(value) for name, value in plain.items()}
    # Only arrays of the right shape are converted: a view of one number may claim to be a million.
    fitting = [key for key, slot in plan.slots.items() if shapes.get(key) == slot.shape]
    arrays = {key: _float32(group[names[key]]) for key in fitting}
    mistakes = {
        'missing': [key for key in plan.slots if key not in names],
        'unexpected': [key for key in left if key not in spare and key not in layer],
        'mis-shaped': [f'{key} {shapes[key]}, expected {slot.shape}'
                       for key, slot in plan.slots.items()
                       if shapes.get(key, slot.shape) != slot.shape],
        'not plain floating-point': [
            f'{key} {getattr(value := group[names[key]], "dtype", getattr(value, "name", value))}'
            for key in names if key not in plain or (key in arrays and arrays[key] is None)],
        'not finite': [key for key, array in arrays.items()
                       if array is not None and not np.isfinite(array).all()],
    }  # fmt: skip
    if any(mistakes.values()):
        what = f'{name!r} with num_classes={num_classes}, channels={channels}'
        wrong = mistakes['missing'] or mistakes['unexpected'] or mistakes['mis-shaped']
        good = len([key for key, array in arrays.items() if array is not None])
        another = 2 * good < len(plan.slots)  # so it is another network's
        hint = _hint(group, _other_head(table, mistakes), another) if wrong else ''
        most = LISTED if good else 3  # of another network's names, a few say enough
        _fail(what, where, mistakes, hint, good, len(plan.slots), most)
    notes = []
    if spare:
        notes.append(f'{where}: left out, since {name!r} has no such arrays: {_listing(spare)}.')
    if mean:
        notes.append(
            f'{where}: the network normalises its images itself; that layer is left out, so set '
            f'--config.data.mean="{mean}" --config.data.std="{std}".'
        )
    twin = twin_of(name)
    if twin and _fits_twin(twin, plan, num_classes, channels):
        notes.append(
            f'{where}: its names and shapes are those of {name!r} and of {twin!r}, which compute '
            f'different things; it is read as {name!r}, as asked.'
        )
    variables = {'params': {}, 'batch_stats': {}} | _variables(plan, arrays)
    return Ported(variables, tuple(notes), mean, std)


def _normalisation(
    group: Mapping[str, Any], left: list[str], channels: int
) -> tuple[tuple[float, ...], tuple[float, ...], set[str]]:
    """Mean and deviation of a normalisation layer, for images in [0, 1], and its two names."""
    for key in left:
        place, dot, last = key.rpartition('.')
        for mean_name, std_name in NORMALISATION:
            other = f'{place}{dot}{std_name}'
            if last != mean_name or other not in left:
                continue
            arrays = [_float32(group[each]) for each in (key, other)]
            mean, std = (() if x is None else x.ravel().tolist() for x in arrays)
            if len(mean) in (1, channels) and len(mean) == len(std) and min(std) > 0:
                scale = 255 if max(*mean, *std) > 2 else 1  # of images in [0, 255]
                return (
                    tuple(round(x / scale, 4) for x in mean),
                    tuple(round(x / scale, 4) for x in std),
                    {key, other},
                )
    return (), (), set()


def _fits_twin(twin: str, plan: Plan, num_classes: int, channels: int) -> bool:
    """Whether another architecture has a table with the same names and shapes."""
    shapes = {key: slot.shape for key, slot in plan.slots.items()}
    for table in tables_of(twin):
        other = _plan(table, _structure(twin, num_classes, channels))
        if other and {key: slot.shape for key, slot in other.slots.items()} == shapes:
            return True
    return False


# --- Variables of Flax ---------------------------------------------------------------------


def _flax_variables(content: Any) -> dict[str, Any] | None:
    """The flat collections of Flax variables in a content, 'params/...'; None if it has none."""
    for _, each in candidates.dictionaries(content):
        params = each.get('params')
        if isinstance(params, Mapping) and any(isinstance(x, Mapping) for x in params.values()):
            held = {key: each[key] for key in ('params', 'batch_stats') if key in each}
            return traverse_util.flatten_dict(held, sep='/')
        if each and all(str(key).startswith(('params/', 'batch_stats/')) for key in each):
            return dict(each)
    return None


def _check_flax(
    name: str, where: str, found: Mapping[str, Any], num_classes: int, **sizes: Any
) -> dict[str, Any]:
    """Variables of our own module, checked.  Raises PortError where they are another's."""
    channels = sizes.pop('channels', None) or 3
    expected = _structure(name, num_classes, channels, **sizes)
    arrays = {key: _float32(value) for key, value in found.items()
              if _shape(value) == expected.get(key)}  # fmt: skip
    mistakes = {
        'missing': [key for key in expected if key not in found],
        'unexpected': [key for key in found if key not in expected],
        'mis-shaped': [f'{key} {_shape(found[key])}, expected {shape}'
                       for key, shape in expected.items()
                       if key in found and _shape(found[key]) != shape],
        'not plain floating-point': [key for key, array in arrays.items() if array is None],
        'not finite': [key for key, array in arrays.items()
                       if array is not None and not np.isfinite(array).all()],
    }  # fmt: skip
    if any(mistakes.values()):
        what = f'{name!r} with num_classes={num_classes}, channels={channels}'
        hint = 'These are variables of Flax: expected those of the same module of this zoo.'
        _fail(what, where, mistakes, hint, len(arrays), len(expected))
    copies = {key: np.array(array) for key, array in arrays.items()}
    return {'params': {}, 'batch_stats': {}} | traverse_util.unflatten_dict(copies, sep='/')


# --- There and back ------------------------------------------------------------------------


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
    table = _table(name)
    leaves = traverse_util.flatten_dict(dict(variables), sep='/')
    shapes = {path: tuple(np.shape(leaf)) for path, leaf in leaves.items()}
    plan = _plan(table, shapes, strict=False)
    assert plan is not None  # since it is not strict
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
    table = _table(name)
    shapes = {key: array.shape for key, array in to_torch(name, variables).items()}
    classes, channels = _sizes(table, shapes)
    if classes is None or channels is None:
        raise PortError(f'{name!r} is not a classifier')
    return classes, channels


def _known(name: str) -> str:
    """Returns `name`.  Raises ValueError, with similar names, if there is no table for it."""
    models.make(name)
    if not tables_of(name):
        raise PortError(f'no PyTorch names for {name!r}: add a table to dfkd_jax/port/tables/')
    return name


def _table(name: str) -> Table:
    """The table that an architecture's PyTorch names are written by: its first that fits."""
    tables = tables_of(_known(name))
    if len(tables) == 1 or not tables[0].last:
        return tables[0]
    leaves = _structure(name, 10, 3)
    return next(table for table in tables if _plan(table, leaves) is not None)


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
    inputs = tables_of(name)[0].inputs(module, channels)

    def init(*inputs: jax.Array) -> Any:
        return module.init(jax.random.key(0), *inputs)

    leaves = traverse_util.flatten_dict(jax.eval_shape(init, *inputs), sep='/')
    return {path: leaf.shape for path, leaf in leaves.items()}


def _plan(table: Table, shapes: Mapping[str, Shape], strict: bool = True) -> Plan | None:
    """The PyTorch names of Flax leaves, by a table.

    strict: None unless every leaf has a row, since an architecture's tables may differ in that.
    """
    slots: dict[str, Slot] = {}
    counters: dict[str, None] = {}
    for path, shape in shapes.items():
        row, leaf, numbers = _row(table, path)
        if row is None or leaf is None:
            if strict:
                return None
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


# --- Arrays of any library --------------------------------------------------------------


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


# --- What is wrong, and what would fit -----------------------------------------------------


def _fail(
    what: str,
    where: str,
    mistakes: dict[str, list[str]],
    hint: str = '',
    good: int = 0,
    total: int = 0,
    most: int = LISTED,
) -> NoReturn:
    """Raises one error with every kind of mistake, and how many names fit."""
    lists = [f'{kind} ({len(names)}): {_listing(sorted(names), most)}'
             for kind, names in mistakes.items() if names]  # fmt: skip
    fit = f'{good} of {total} arrays fit, all but these: ' if good else ''
    message = f'cannot port {what} from {where}: {fit}{"; ".join(lists)}.'
    raise PortError(f'{message} {hint}'.rstrip())


def _listing(names: Iterable[str], most: int = LISTED) -> str:
    names = list(names)
    more = f' and {len(names) - most} more' if len(names) > most else ''
    return ', '.join(names[:most]) + more


def _other_head(table: Table, mistakes: Mapping[str, list[str]]) -> str:
    """What to say of a network that fits but for its last layer; '' for others."""
    head = table.last.removesuffix('weight')
    missing, more = mistakes['missing'], mistakes['unexpected']
    if not (head and missing and all(name.startswith(head) for name in missing)):
        return ''
    if mistakes['mis-shaped'] or len(more) > LISTED:
        return ''
    if more:
        return f'Its last layers, {_listing(more)}, are others than {head}weight. {EXPORT}'
    return (
        f'It is a backbone without its classifier, {head}weight: train one on it, or pass the file '
        'that holds both.'
    )


def recognise(
    source: str | os.PathLike[str], name: str = ''
) -> dict[str, tuple[int | None, int | None]]:
    """The architectures that a file of weights fits, with its numbers of classes and channels.

    name: the only one to try.  It may then have arrays that no architecture knows, and what cannot
      be told of it is None.
    Empty where nothing fits, and for Flax variables, whose names do not tell.
    Raises PortError as `read` does for a file that is no weights.
    """
    content, where, key = weight_files.read(source)
    if _flax_variables(content) is not None:
        return {}
    groups = _groups(content, where, key)
    chosen = {label: group for label, group in groups.items()
              if not key or candidates.chosen(label, key)} or groups  # fmt: skip
    if name:
        found = {}
        for fit in _fits(name, chosen, 10):
            group, names = fit.candidate.group, fit.candidate.names
            found[name] = _sizes(fit.table, {each: _shape(group[k]) for each, k in names.items()})
        return found
    return {each[0]: each[1:] for group in chosen.values() for each in _fitting(group)}


def _fitting(group: Mapping[str, Any]) -> Iterator[tuple[str, int, int]]:
    """The architectures whose names and shapes a dictionary has, with classes and channels."""
    kept = {
        key: value for key, value in group.items() if key.rpartition('.')[2] not in LEFT_OUT
    }  # fmt: skip
    for name in _names_for(kept):
        for table in tables_of(name):
            for prefix in candidates.prefixes(kept, table.first) if table.first else ():
                held = {key.removeprefix(prefix): _shape(value) for key, value in kept.items()
                        if key.startswith(prefix)}  # fmt: skip
                classes, channels = _sizes(table, held)
                if classes and channels and _exactly(name, table, held, classes, channels):
                    yield name, classes, channels


def _hint(group: Mapping[str, Any], otherwise: str, another: bool) -> str:
    """Which architectures the names and shapes of a dictionary are those of.

    another: whether to say how another network comes here.
    """
    fitting = {
        name: f'{name!r} with num_classes={classes}, channels={channels}'
        for name, classes, channels in _fitting(group)
    }
    if not fitting:
        none = 'No architecture of the model zoo has exactly these names and shapes.'
        return otherwise or (f'{none} {EXPORT}' if another else none)
    return f'These are the names and shapes of {" or of ".join(fitting.values())}.'


def _exactly(
    name: str, table: Table, shapes: Mapping[str, Shape], classes: int, channels: int
) -> bool:
    """Whether shapes are those of an architecture, no more and no fewer."""
    if depth := re.search(r'(?:resnet|vgg|wrn|densenet)(\d+)', name):
        # Found without tracing a deep module: shortcuts are not counted, nor are all linear layers.
        layers = sum(len(shape) in (2, 4) for shape in shapes.values())
        if not -3 <= layers - int(depth[1]) <= 4:
            return False
    patterns = [re.sub(r'\\{\w+\\}', r'\\d+', re.escape(row.torch)) for row in table.rows]
    patterns = [rf'{pattern}\.[\w.]+' if pattern else r'\w+' for pattern in patterns]
    if not all(any(re.fullmatch(pattern, key) for pattern in patterns) for key in shapes):
        return False  # found without tracing the module
    plan = _plan(table, _structure(name, classes, channels))
    return plan is not None and {key: slot.shape for key, slot in plan.slots.items()} == {
        key: shape for key, shape in shapes.items() if key not in plan.counters
    }


def _names_for(group: Mapping[str, Any]) -> list[str]:
    """The names to try, of the families by rule those of this depth and width."""
    blocks = len({found[1] for key in group if (found := re.search(r'\blayer1\.(\d+)\.', key))})
    layers = [_shape(group[key]) for key in group
              if re.search(r'block1\.layer\.\d+\.conv1\.weight$', key)]  # fmt: skip
    widen = max(1, layers[0][0] // 16) if layers and layers[0] else 1
    return models.names(6 * max(blocks, 1) + 2, 6 * max(len(layers), 1) + 4, widen)


def _sizes(table: Table, shapes: Mapping[str, Shape]) -> tuple[int | None, int | None]:
    """A classifier's numbers of classes and input channels, by its arrays; None: unknown."""
    last, first = shapes.get(table.last, ()), shapes.get(table.first, ())
    classes, channels = None, None
    if len(last) == 2 and last[0] > 0:
        classes = last[0]
    if len(first) == 4 and first[1] > 0 and first[1] % table.block**2 == 0:
        channels = first[1] // table.block**2
    return classes, channels
