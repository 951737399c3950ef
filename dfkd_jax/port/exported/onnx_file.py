"""Reads `.onnx` with the package `onnx` (the extra `onnx`), which parses and runs nothing."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NoReturn

import jax.numpy as jnp
import numpy as np

from dfkd_jax.errors import PortError
from dfkd_jax.port.exported import onnx_operators
from dfkd_jax.port.exported.program import MOST_NODES, Node, Program, Type, Value

EXPORT = (
    "torch.onnx.export(model.eval(), (images,), 'teacher.onnx', dynamo=True, optimize=False, "
    "dynamic_shapes=({0: torch.export.Dim('batch', max=4096)},))"
)
OPSETS = range(13, 26)
PLAIN = ('', 'ai.onnx')  # the domain of ONNX's own operators
# The types of numbers that are read; complex, string and four-bit ones are not.
KINDS = 'float32 float64 float16 bfloat16 int64 int32 int16 int8 uint8 bool'.split()


def read(path: Path, digest: str) -> Program:
    """The program in an `.onnx` file, with its weights inside or in files beside it.

    Raises PortError for a file that is damaged, of another opset, or exported for one batch size;
    for weights outside the file's folder; and where `onnx` is not installed.
    """
    try:
        import onnx
    except ImportError as error:
        raise PortError(
            f'reading {path} needs the package onnx, which is not installed: run `pip install '
            "'onnx>=1.21'`, or export the network as .pt2, which needs no package."
        ) from error
    try:
        model = onnx.load_model(str(path), load_external_data=False)
        return _program(path, digest, model)
    except PortError:
        raise
    except RecursionError:
        _refuse(path, 'its graph is nested too deeply')
    except Exception as error:  # a damaged file can fail in any way
        _refuse(path, f'it is damaged ({type(error).__name__}: {str(error)[:200]})')


def _refuse(path: Path, why: str) -> NoReturn:
    raise PortError(f'{path} cannot be read: {why}. With PyTorch, export it with {EXPORT}.')


def _program(path: Path, digest: str, model: Any) -> Program:
    graph = model.graph
    opset = next((entry.version for entry in model.opset_import if entry.domain in PLAIN), None)
    if opset not in OPSETS:
        cure = (
            f"onnx.save(onnx.version_converter.convert_version(onnx.load('{path.name}'), 17), "
            "'teacher.onnx')"
        )
        raise PortError(
            f'{path} has the opset {opset}, and {OPSETS[0]} to {OPSETS[-1]} are read. Convert it '
            f'with {cure}.'
        )
    if len(graph.node) > MOST_NODES:
        _refuse(path, f'it has {len(graph.node):,} nodes, and no more than {MOST_NODES:,} are read')
    if graph.sparse_initializer:
        _refuse(path, 'it has sparse weights')
    if model.functions:
        names = ', '.join(function.name for function in list(model.functions)[:10])
        raise PortError(
            f'{path} has functions of its own ({names}), which are not read. Put them in place '
            f"with onnx.save(onnx.inliner.inline_local_functions(onnx.load('{path.name}')), "
            "'teacher.onnx')."
        )
    arrays = {tensor.name: _array(path, tensor) for tensor in graph.initializer}
    if len(arrays) < len(graph.initializer):
        _refuse(path, 'it holds two arrays of one name')
    nodes = []
    for number, node in enumerate(graph.node):
        if node.op_type == 'Constant' and node.domain in PLAIN:
            arrays[node.output[0]] = _constant(path, node)
        else:
            nodes.append(_node(path, node, number))
    inputs = [each for each in graph.input if each.name not in arrays]
    image, result = _only(path, 'input', inputs), _only(path, 'output', graph.output)
    shape, channels_last = _image_shape(path, image)
    parameters, constants = {}, {}
    # How much larger a map becomes is a size, though of floating-point numbers.
    factors = {name for node in graph.node if node.op_type == 'Resize' for name in node.input[1:]}
    for name, array in arrays.items():
        if name in factors or not jnp.issubdtype(array.dtype, jnp.floating):
            constants[name] = array
        elif array.size == 1:
            constants[name] = array.astype(np.float64)
        else:
            parameters[name] = array
    return Program(
        source=str(path),
        digest=digest,
        dialect=onnx_operators.DIALECT,
        nodes=tuple(nodes),
        image=image.name,
        result=result.name,
        image_shape=shape,
        channels_last=channels_last,
        parameters=parameters,
        constants=constants,
    )


def _only(path: Path, what: str, listed: Any) -> Any:
    if len(listed) != 1:
        names = ', '.join(each.name for each in listed) or 'none'
        _refuse(
            path,
            f'it has as {what}s {names}, and one is read: images, and logits. Wrap the '
            'network in a module whose forward takes images and returns logits',
        )
    return listed[0]


def _image_shape(path: Path, image: Any) -> tuple[tuple[Any, Any, Any], bool]:
    """(channels, height, width), None where any will do; and whether channels come last."""
    import onnx

    about = image.type.tensor_type
    kind = onnx.TensorProto.DataType.Name(about.elem_type).lower()
    if kind not in ('float', 'double', 'float16', 'bfloat16'):
        _refuse(path, f'it takes images of {kind}, and normalised ones, of float, are expected')
    sizes = [dim.dim_value or None for dim in about.shape.dim]
    if len(sizes) != 4:
        _refuse(path, f'its input has {len(sizes)} axes, and images have four')
    if sizes[0] is not None:
        _refuse(
            path,
            f'it is for batches of {sizes[0]} images alone, since no dynamic shapes were given',
        )
    # TensorFlow's networks have channels last.
    channels_last = sizes[3] in (1, 3) and sizes[1] not in (1, 3)
    if channels_last:
        return (sizes[3], sizes[1], sizes[2]), True
    return (sizes[1], sizes[2], sizes[3]), False


def _node(path: Path, node: Any, number: int) -> Node:
    import onnx

    operator = node.op_type if node.domain in PLAIN else f'{node.domain}.{node.op_type}'
    keywords: dict[str, Any] = {}
    for attribute in node.attribute:
        if attribute.type in (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS):
            continue  # of an operator that `program.check` names
        value = onnx.helper.get_attribute_value(attribute)
        if isinstance(value, bytes):
            value = value.decode()
        elif isinstance(value, onnx.TensorProto):
            value = _array(path, value)
        elif attribute.type in (onnx.AttributeProto.INTS, onnx.AttributeProto.FLOATS):
            value = list(value)
        if attribute.name in ('to', 'dtype'):
            value = Type(_kind(path, value))
        keywords[attribute.name] = value
    arguments = tuple(Value(name) if name else None for name in node.input)
    if operator == 'Split' and len(arguments) == 1:
        keywords['num_outputs'] = len(node.output)
    listed = operator == 'Split'
    place = node.name or f'node {number}'
    return Node(operator, arguments, keywords, tuple(node.output), place, listed)


def _constant(path: Path, node: Any) -> np.ndarray:
    import onnx

    (attribute,) = node.attribute
    value = onnx.helper.get_attribute_value(attribute)
    if isinstance(value, onnx.TensorProto):
        return _array(path, value)
    if attribute.name not in ('value_float', 'value_floats', 'value_int', 'value_ints'):
        _refuse(path, f'{node.name} is a constant of the kind {attribute.name}')
    return np.asarray(value, np.float32 if 'float' in attribute.name else np.int64)


def _kind(path: Path, code: int) -> str:
    import onnx

    kind = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(code)).name
    if kind not in KINDS:
        _refuse(path, f'it has numbers of type {kind}, which are not read')
    return kind


def _array(path: Path, tensor: Any) -> np.ndarray:
    """A copy of an array in the file, or in one beside it."""
    import onnx

    kind = np.dtype(jnp.dtype(_kind(path, tensor.data_type)))
    shape = tuple(tensor.dims)
    if min(shape, default=0) < 0:
        _refuse(path, f'{tensor.name} has the shape {list(shape)}')
    if tensor.data_location == onnx.TensorProto.EXTERNAL:
        data = _outside(path, tensor, math.prod(shape) * kind.itemsize)
        return np.frombuffer(data, kind).reshape(shape).copy()
    # A number takes a byte at least, so a shape cannot claim more than the file holds.
    if math.prod(shape) > tensor.ByteSize():
        _refuse(path, f'{tensor.name} has the shape {list(shape)}, which its bytes do not hold')
    return np.array(onnx.numpy_helper.to_array(tensor), kind, order='C').reshape(shape)


def _outside(path: Path, tensor: Any, size: int) -> bytes:
    """The bytes of an array in another file, which must lie in the folder of the first."""
    about = {entry.key: entry.value for entry in tensor.external_data}
    location = about.get('location', '')
    place = path.parent / location
    folder = path.parent.resolve()
    if not location or place.is_symlink() or folder not in place.resolve().parents:
        _refuse(path, f'{tensor.name} is said to be in {location!r}, outside its folder')
    if not place.is_file():
        raise PortError(
            f'{path} has its weights in {location}, which is not beside it: copy both, or export '
            'with external_data=False.'
        )
    start = int(about.get('offset', 0))
    length = int(about.get('length', size))
    if length != size or start < 0 or start + length > place.stat().st_size:
        _refuse(
            path, f'{tensor.name} takes {size:,} bytes, which {location} does not hold at {start:,}'
        )
    with open(place, 'rb') as file:
        file.seek(start)
        return file.read(length)
