"""Reads `.pt2`, what `torch.export.save` writes, without PyTorch and without unpickling.

The file is a zip archive that stores its members as they are: ``models/model.json``, the graph, and
raw numbers under ``data/weights`` and ``data/constants``, each with a list of shapes.  Its other
members are not opened: PyTorch's own `torch.export.load` unpickles the sample inputs among them,
which runs whatever code the file's author put there.
"""

from __future__ import annotations

import json
import math
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NoReturn

import jax.numpy as jnp
import numpy as np

from dfkd_jax.errors import PortError
from dfkd_jax.port.exported import aten
from dfkd_jax.port.exported.program import Node, Program, Type, Value
from dfkd_jax.storage import safe_read

EXPORT = (
    'torch.export.export(model.eval(), (images,), dynamic_shapes=({0: '
    "torch.export.Dim('batch')},)).run_decompositions({}), saved with torch.export.save"
)
SCHEMA = 8  # of PyTorch 2.9 to 2.14
# Types of numbers by their codes in the schema.
TYPES: dict[int, Any] = {
    1: np.dtype('uint8'),
    2: np.dtype('int8'),
    3: np.dtype('int16'),
    4: np.dtype('int32'),
    5: np.dtype('int64'),
    6: np.dtype('float16'),
    7: np.dtype('float32'),
    8: np.dtype('float64'),
    12: np.dtype('bool'),
    13: np.dtype(jnp.bfloat16),
}
SPREAD = 2**20  # numbers of an array that is a repeated view of fewer
# What says where and how a result is stored, which nothing here depends on.
STORAGE = {'memory_format', 'layout', 'device', 'pin_memory', 'non_blocking', 'copy'}
IMAGES = {'self': 'x', 'input': 'x'}  # what PyTorch calls an operator's first array


def read(path: Path, digest: str) -> Program:
    """The program in a `.pt2` file.

    Raises PortError for a file that is damaged, of another format or version, or exported in
    training mode, without decompositions or for one batch size.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            members = _members(path, archive)
            return _program(path, digest, archive, members)
    except PortError:
        raise
    except RecursionError:
        _refuse(path, 'its graph is nested too deeply')
    except Exception as error:  # a damaged file can fail in any way
        _refuse(path, f'it is damaged ({type(error).__name__}: {error})')


def _refuse(path: Path, why: str) -> NoReturn:
    raise PortError(f'{path} cannot be read: {why}. Export it with {EXPORT}.')


def _members(path: Path, archive: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
    """The members by name, without the folder that holds all.

    Members are stored and not packed, so no file can hold more than it weighs.
    """
    listed = archive.infolist()
    if sum(member.file_size for member in listed) > path.stat().st_size:
        _refuse(path, 'it would unpack to more than its size, which no file of PyTorch does')
    if any(member.compress_type != zipfile.ZIP_STORED for member in listed):
        _refuse(path, 'it is packed, and torch.export.save does not pack')
    members = {member.filename.partition('/')[2]: member for member in listed}
    if len(members) < len(listed):
        _refuse(path, 'it holds two members of one name')
    return members


def _json(path: Path, archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> Any:
    if member.file_size > safe_read.JSON_BYTES:
        _refuse(path, f'{member.filename} has {member.file_size:,} bytes')
    return json.loads(archive.read(member))


def _program(
    path: Path, digest: str, archive: zipfile.ZipFile, members: dict[str, zipfile.ZipInfo]
) -> Program:
    graphs = [name for name in members if name.startswith('models/') and name.endswith('.json')]
    if len(graphs) != 1:
        about = ', '.join(sorted(members)[:5]) or 'nothing'
        _refuse(path, f'it holds {len(graphs)} graphs under models/, and not one (it has {about})')
    found = _json(path, archive, members[graphs[0]])
    _check_version(path, found, members)
    if 'byteorder' in members and archive.read(members['byteorder']) != b'little':
        _refuse(path, 'its numbers are not little-endian')
    graph, signature = found['graph_module']['graph'], found['graph_module']['signature']
    arrays = _Arrays(path, archive, members)

    parameters, constants, images, names = {}, {}, [], {}
    for spec in signature['input_specs']:
        (kind, about), *_ = spec.items()
        if kind == 'user_input':
            images.append(about['arg'])
            continue
        if kind not in ('parameter', 'buffer', 'tensor_constant'):
            _refuse(path, f'it has an input of the kind {kind}, and only arrays are read')
        name, array = about[f'{kind}_name'], arrays(about[f'{kind}_name'], kind)
        # As modules call it, where no result can be called so too.
        name = name if '.' in name else about['arg']['name']
        names[about['arg']['name']] = name
        if jnp.issubdtype(array.dtype, jnp.floating) and array.size != 1:
            parameters[name] = array
        else:
            single = jnp.issubdtype(array.dtype, jnp.floating)
            constants[name] = array.astype(np.float64) if single else array
    image = _only(path, 'input', images)
    results = _results(path, signature)
    shape = graph['tensor_values'][image]['sizes']
    return Program(
        source=str(path),
        digest=digest,
        dialect=aten.DIALECT,
        nodes=tuple(_renamed(node, names) for node in _nodes(path, graph['nodes'])),
        image=image,
        result=_only(path, 'output', results),
        image_shape=_image_shape(path, shape),
        channels_last=False,
        parameters=parameters,
        constants=constants,
    )


def _check_version(path: Path, found: Any, members: dict[str, Any]) -> None:
    """Raises PortError unless the graph is of the schema that is read, and decomposed."""
    version, writer = found['schema_version']['major'], found.get('torch_version', 'unknown')
    if any(name.startswith('data/weights/') and name.endswith('.pt') for name in members):
        _refuse(
            path,
            f'PyTorch {writer} pickled its weights, and nothing is unpickled here; '
            'PyTorch 2.9 and later do not',
        )
    if version != SCHEMA:
        _refuse(
            path,
            f'its schema is {version} (PyTorch {writer}), and {SCHEMA} is read '
            '(PyTorch 2.9 and later)',
        )
    if 'ATEN' not in found.get('verifiers', ()):
        _refuse(
            path,
            'it was saved without .run_decompositions({}), so what it writes in place '
            'would be lost',
        )


def _results(path: Path, signature: Any) -> list[Any]:
    results = []
    for spec in signature['output_specs']:
        (kind, about), *_ = spec.items()
        if kind == 'buffer_mutation':
            _refuse(
                path, f'it changes {about["buffer_name"]}, as in training: call model.eval() first'
            )
        if kind != 'user_output':
            _refuse(path, f'it has a result of the kind {kind}')
        results.append(about['arg'])
    return results


def _only(path: Path, what: str, arguments: list[Any]) -> str:
    if len(arguments) != 1 or 'as_tensor' not in arguments[0]:
        names = ', '.join(_name(argument) for argument in arguments) or 'none'
        _refuse(
            path,
            f'it has as {what}s {names}, and one is read: images, and logits. Wrap the '
            'network in a module whose forward takes images and returns logits',
        )
    return arguments[0]['as_tensor']['name']


def _name(argument: Any) -> str:
    ((kind, about), *_) = argument.items()
    return str(about.get('name', kind)) if isinstance(about, dict) else str(about)


def _image_shape(path: Path, sizes: list[Any]) -> tuple[int | None, int | None, int | None]:
    """(channels, height, width).  Raises PortError for a fixed batch size."""
    if len(sizes) != 4:
        _refuse(path, f'its input has {len(sizes)} axes, and images have four: [B, C, H, W]')
    if 'as_int' in sizes[0]:
        _refuse(
            path,
            f'it is for batches of {sizes[0]["as_int"]} images alone, since no '
            'dynamic_shapes were given',
        )
    channels, height, width = (size.get('as_int') for size in sizes[1:])
    return channels, height, width


def _nodes(path: Path, listed: Iterable[Any]) -> Iterable[Node]:
    for node in listed:
        operator = node['target'].removeprefix('torch.ops.')
        keywords = {
            IMAGES.get(each['name'], each['name']): _argument(path, operator, each['arg'])
            for each in node['inputs']
            if each['name'] not in STORAGE
        }
        results, several = _named(path, operator, node['outputs'])
        stack = node.get('metadata', {}).get('nn_module_stack', '')
        place = stack.split(';')[-1].split(',')[1] if stack.count(',') > 1 else ''
        place = place or node.get('name') or (results or ('?',))[0]
        yield Node(operator, (), keywords, results, place, several)


def _renamed(argument: Any, names: dict[str, str]) -> Any:
    """A node or a tree of arguments, its `Value`s under other names."""
    if isinstance(argument, Node):
        return argument._replace(keywords=_renamed(argument.keywords, names))
    if isinstance(argument, Value):
        return Value(names.get(argument.name, argument.name))
    if isinstance(argument, list):
        return [_renamed(each, names) for each in argument]
    if isinstance(argument, dict):
        return {key: _renamed(each, names) for key, each in argument.items()}
    return argument


def _named(path: Path, operator: str, outputs: Any) -> tuple[tuple[str, ...], bool]:
    """The names of a node's results, and whether they are one list."""
    names = []
    for output in outputs:
        ((kind, about), *_) = output.items()
        if kind == 'as_tensors':
            if len(outputs) > 1:
                _refuse(path, f'{operator} returns a list and more')
            return tuple(each['name'] for each in about), True
        if kind not in ('as_tensor', 'as_sym_int', 'as_sym_bool', 'as_sym_float', 'as_none'):
            _refuse(path, f'{operator} returns a result of the kind {kind}')
        if kind == 'as_none':
            names.append('')
        else:
            names.append(about.get('name') or about.get('as_name') or '')
    return tuple(names), False


def _argument(path: Path, operator: str, argument: Any) -> Any:
    """An argument as a `Value`, a `Type` or plain data."""
    ((kind, about), *_) = argument.items()
    match kind:
        case 'as_none':
            return None
        case 'as_tensor':
            return Value(about['name'])
        case 'as_sym_int' | 'as_sym_bool' | 'as_sym_float':
            return Value(about['as_name']) if 'as_name' in about else next(iter(about.values()))
        case 'as_tensors':
            return [Value(each['name']) for each in about]
        case 'as_optional_tensor':
            return _argument(path, operator, about)
        case 'as_optional_tensors' | 'as_sym_ints' | 'as_sym_bools' | 'as_sym_floats':
            single = 'as_optional_tensor' if kind == 'as_optional_tensors' else kind[:-1]
            return [_argument(path, operator, {single: each}) for each in about]
        case 'as_scalar_type':
            if about not in TYPES:
                _refuse(path, f'{operator} makes numbers of type {about}')
            return Type(TYPES[about].name)
        case 'as_float':
            return float(about)  # an infinity may be a string
        case 'as_int' | 'as_bool' | 'as_string' | 'as_ints' | 'as_bools' | 'as_strings':
            return about
        case 'as_floats':
            return [float(each) for each in about]
        case 'as_memory_format' | 'as_layout' | 'as_device':
            return None
        case _:  # a graph, an operator or an object: `program.check` names the operator
            return None


class _Arrays:
    """The arrays of an archive, by the names that modules have."""

    def __init__(
        self, path: Path, archive: zipfile.ZipFile, members: dict[str, zipfile.ZipInfo]
    ) -> None:
        self.path, self.archive, self.members = path, archive, members
        self.about: dict[str, tuple[str, Any]] = {}
        for folder in ('weights', 'constants'):
            for name, member in members.items():
                if name.startswith(f'data/{folder}/') and name.endswith('_config.json'):
                    for key, about in _json(path, archive, member)['config'].items():
                        self.about[key] = f'data/{folder}/{about["path_name"]}', about

    def __call__(self, name: str, kind: str) -> np.ndarray:
        """A copy of the array called `name`; kind: what it is, for messages."""
        if name not in self.about:
            _refuse(self.path, f'the {kind} {name} is not in it')
        member, about = self.about[name]
        if about['use_pickle'] or about['tensor_meta'] is None:
            _refuse(self.path, f'the {kind} {name} is pickled, and nothing is unpickled here')
        if member not in self.members:
            _refuse(self.path, f'the {kind} {name} is not in it')
        return self._array(name, self.archive.read(self.members[member]), about['tensor_meta'])

    def _array(self, name: str, data: bytes, meta: Any) -> np.ndarray:
        if meta['dtype'] not in TYPES:
            _refuse(self.path, f'{name} has numbers of type {meta["dtype"]}, which are not read')
        kind = TYPES[meta['dtype']]
        shape, strides = (tuple(n['as_int'] for n in meta[k]) for k in ('sizes', 'strides'))
        start = meta['storage_offset']['as_int']
        stored = np.frombuffer(data, kind)
        numbers = math.prod(shape)
        wrong = len(shape) != len(strides) or min((start, *shape, *strides)) < 0
        reach = start + sum((n - 1) * step for n, step in zip(shape, strides)) + 1
        if wrong or (numbers and reach > len(stored)) or numbers > max(len(stored), SPREAD):
            _refuse(
                self.path,
                f'{name} has the shape {list(shape)}, which its {len(data):,} bytes do not hold',
            )
        steps = tuple(step * kind.itemsize for step in strides)
        view = np.lib.stride_tricks.as_strided(stored[start:], shape, steps, writeable=False)
        return np.array(view, order='C')
