"""Writes a JAX function of images as an ONNX model.

The function is traced with a symbolic batch.  Its equations become ONNX operators one by one
(`onnx_operators`); what depends on the weights alone is computed now.  A tensor remembers how its
axes lie (`Tensor.order`), so a transposition is written only where an operator needs it, and a
network of channels-last images has none between its convolutions.  At the end, multiplications and
additions per channel, which are batch norms, are folded into the convolution or product before.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from dfkd_jax.deploy.onnx_graph import Graph, Node, Tensor
from dfkd_jax.deploy.onnx_operators import OPERATORS
from dfkd_jax.errors import DeployError

OPSET, IR_VERSION = 17, 8  # read by onnxruntime 1.12 and newer

# Where a call keeps the equations that it calls.
BODIES = ('call_jaxpr', 'jaxpr', 'fun_jaxpr')
CALLS = {
    'jit', 'pjit', 'closed_call', 'core_call', 'checkpoint', 'remat2', 'custom_jvp_call',
    'custom_vjp_call', 'custom_vjp_call_jaxpr',
}  # fmt: skip


def write(
    fn: Callable[[Any, Any], Sequence[Any]],
    variables: Any,
    image_shape: tuple[int, int, int],
    outputs: Sequence[str],
    metadata: Mapping[str, str],
) -> Any:
    """``fn(variables, pixels)`` as an `onnx.ModelProto` with the weights inside.

    fn: pure; its results are arrays [B, ...] called `outputs` in the file.
    image_shape: (H, W, channels) of the input ``pixels``, [B, H, W, channels] uint8, B any number.

    Raises DeployError for an operation that has no translation, naming it.
    """
    batch = jax.export.symbolic_shape('batch')[0]
    images = jax.ShapeDtypeStruct((batch, *image_shape), jnp.uint8)
    traced = jax.make_jaxpr(fn)(variables, images)
    graph = Graph(batch=batch, input='pixels')
    pixels = Tensor('pixels', (0, 1, 2, 3), images.shape)
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(variables)]
    results = translate(graph, traced.jaxpr, traced.consts, [*leaves, pixels])
    for name, result in zip(outputs, results, strict=True):
        graph.nodes.append(Node('Identity', [graph.name_of(result)], [name]))
    fold_affine(graph)
    fold_clip(graph)
    fold_identity(graph, set(outputs))
    shapes = [(name, aval.shape) for name, aval in zip(outputs, traced.out_avals)]
    return _model(graph, image_shape, shapes, metadata)


# 1. From equations to operators.


def translate(
    graph: Graph,
    jaxpr: core.Jaxpr,
    consts: Sequence[Any],
    arguments: Sequence[Any],
    needed: Sequence[bool] | None = None,
    scope: str = '',
) -> list[Any]:
    """The results of a jaxpr: `Tensor`s of the graph, or arrays where they are constant.

    needed: of each result, whether it is used; None for another.
    """
    values: dict[Any, Any] = dict(zip(jaxpr.constvars, map(np.asarray, consts), strict=True))
    values |= dict(zip(jaxpr.invars, arguments, strict=True))

    def value(atom: Any) -> Any:
        return np.asarray(atom.val) if isinstance(atom, core.Literal) else values[atom]

    wanted = [True] * len(jaxpr.outvars) if needed is None else needed
    kept = _needed(jaxpr, [atom for atom, use in zip(jaxpr.outvars, wanted) if use])
    for equation, used in kept:
        inside = '/'.join(filter(None, (scope, str(equation.source_info.name_stack))))
        found = _equation(graph, equation, list(map(value, equation.invars)), used, inside)
        values |= dict(zip(equation.outvars, found, strict=True))
    return [value(atom) if use else None for atom, use in zip(jaxpr.outvars, wanted)]


def _needed(jaxpr: core.Jaxpr, results: Sequence[Any]) -> list[tuple[Any, list[bool]]]:
    """The equations that the results depend on, in order, and which of their outputs are used."""
    live = {atom for atom in results if not isinstance(atom, core.Literal)}
    kept = []
    for equation in reversed(jaxpr.eqns):
        used = [variable in live for variable in equation.outvars]
        if any(used):
            kept.append((equation, used))
            live |= {atom for atom in equation.invars if not isinstance(atom, core.Literal)}
    return kept[::-1]


def _equation(
    graph: Graph, equation: Any, inputs: list[Any], used: list[bool], scope: str
) -> list[Any]:
    """The results of one equation, after those of the functions that it calls."""
    name, params = equation.primitive.name, equation.params
    if name in CALLS:
        body = next(params[key] for key in BODIES if key in params)
        inner = getattr(body, 'jaxpr', body)  # closed or not
        return translate(graph, inner, getattr(body, 'consts', ()), inputs, used, scope)
    if name == 'platform_index':  # which way of computing the same thing suits the platform
        others = [i for i, platforms in enumerate(params['platforms']) if platforms is None]
        return [np.int32(others[0] if others else len(params['platforms']))]
    if name == 'cond' and not isinstance(inputs[0], Tensor):
        branch = params['branches'][int(inputs[0])]
        return translate(graph, branch.jaxpr, branch.consts, inputs[1:], used, scope)
    shapes = [aval.aval.shape for aval in equation.outvars]
    static = all(isinstance(size, int) for shape in shapes for size in shape)
    if static and not any(isinstance(each, Tensor) for each in inputs):
        return _constants(equation, inputs)
    if name not in OPERATORS:
        raise DeployError(
            f'the network computes {name!r}, which the ONNX writer does not know: export it with '
            '--format=stablehlo.'
        )
    graph.scope = scope
    found = OPERATORS[name](graph, params, shapes, *inputs)
    return found if isinstance(found, list) else [found]


# What batch norms and most others do with weights alone; JAX would compile each, for each shape.
NUMPY: dict[str, Callable[..., Any]] = {
    'add': np.add, 'sub': np.subtract, 'mul': np.multiply, 'div': np.divide, 'neg': np.negative,
    'max': np.maximum, 'rsqrt': lambda x: 1 / np.sqrt(x),
}  # fmt: skip


def _constants(equation: Any, inputs: list[Any]) -> list[np.ndarray]:
    """The results of an equation that depends on constants alone."""
    name, params = equation.primitive.name, equation.params
    if name in NUMPY and inputs[0].dtype == np.float32:
        return [np.asarray(NUMPY[name](*inputs), np.float32)]
    if name == 'reshape':
        return [np.reshape(inputs[0], params['new_sizes'])]
    found = equation.primitive.bind(*map(jnp.asarray, inputs), **params)
    found = found if equation.primitive.multiple_results else [found]
    return [np.asarray(each) for each in found]


# 2. Simplifications, each exact but for rounding.


def fold_affine(graph: Graph) -> None:
    """Folds ``Conv * scale + shift``, with constants per channel, into the Conv; so for Gemm."""
    makers, uses = _makers(graph), _uses(graph)
    for node in graph.nodes:
        if node.op not in ('Add', 'Mul') or len(node.inputs) != 2:
            continue
        for of_maker, of_constant in ((0, 1), (1, 0)):
            name, other = node.inputs[of_maker], node.inputs[of_constant]
            maker = makers.get(name)
            if maker is None or maker.op not in ('Conv', 'Gemm') or uses[name] != 1:
                continue
            row = _per_channel(graph, maker, other)
            if row is None or maker.inputs[1] not in graph.constants:
                continue
            _apply(graph, maker, node.op, row)
            maker.outputs, node.op = node.outputs, 'Nothing'
            makers[node.outputs[0]] = maker
            break
    graph.nodes = [node for node in graph.nodes if node.op != 'Nothing']


def _per_channel(graph: Graph, maker: Node, name: str) -> np.ndarray | None:
    """A constant operand of what `maker` makes, as one value per channel; None if it is not."""
    operand = graph.constants.get(name)
    if operand is None:
        return None
    rank = graph.constants[maker.inputs[1]].ndim if maker.inputs[1] in graph.constants else 0
    shape = (1,) * (rank - operand.ndim) + operand.shape
    if any(size != 1 for axis, size in enumerate(shape) if axis != 1):
        return None
    return operand.reshape(-1)


def _apply(graph: Graph, maker: Node, op: str, row: np.ndarray) -> None:
    """Changes the weights and the bias of `maker` so that it adds or multiplies by `row`."""
    kernel = graph.constants[maker.inputs[1]]
    features = 0 if maker.op == 'Conv' else 1  # [out, in, h, w], or [in, out]
    size = kernel.shape[features]
    bias = graph.constants[maker.inputs[2]] if len(maker.inputs) > 2 else np.zeros(size, np.float32)
    if op == 'Mul':
        shape = [-1 if axis == features else 1 for axis in range(kernel.ndim)]
        maker.inputs[1] = graph.constant(kernel * row.reshape(shape), f'{maker.name}/weight')
        bias = bias * row
    else:
        bias = bias + row
    bias = np.broadcast_to(bias, size).astype(np.float32)
    if bias.any() or len(maker.inputs) > 2:
        maker.inputs[2:] = [graph.constant(bias, f'{maker.name}/bias')]


def fold_clip(graph: Graph) -> None:
    """``Max(x, 0)`` as Relu, and ``Min(Relu(x), c)`` as Clip, which runtimes know best."""
    uses = _uses(graph)
    for node in graph.nodes:
        limit = _scalar(graph, node) if node.op in ('Max', 'Min') else None
        if limit is None:
            continue
        tensor, value = limit
        if node.op == 'Max' and value == 0:
            node.op, node.inputs = 'Relu', [tensor]
        elif node.op == 'Max' and value == -np.inf:
            node.op, node.inputs = 'Identity', [tensor]
        elif node.op == 'Min':
            maker = _makers(graph).get(tensor)
            if maker is not None and maker.op == 'Relu' and uses[tensor] == 1:
                low, high = (graph.constant(np.float32(x)) for x in (0, value))
                node.op, node.inputs = 'Clip', [maker.inputs[0], low, high]
                maker.op = 'Nothing'
    graph.nodes = [node for node in graph.nodes if node.op != 'Nothing']


def _scalar(graph: Graph, node: Node) -> tuple[str, float] | None:
    """The tensor and the number that an operator of two inputs compares, if one is a number."""
    for of_tensor, of_number in ((0, 1), (1, 0)):
        number = graph.constants.get(node.inputs[of_number])
        if (
            number is not None
            and number.size == 1
            and node.inputs[of_tensor] not in graph.constants
        ):
            return node.inputs[of_tensor], float(number.reshape(()))
    return None


def fold_identity(graph: Graph, outputs: set[str]) -> None:
    """Takes out operators that do nothing; a result keeps its name."""
    makers = _makers(graph)
    other: dict[str, str] = {}
    for node in graph.nodes:
        node.inputs = [other.get(name, name) for name in node.inputs]
        if node.op != 'Identity':
            continue
        maker = makers.get(node.inputs[0])
        if node.outputs[0] not in outputs:
            other[node.outputs[0]] = node.inputs[0]
            node.op = 'Nothing'
        elif maker is not None and node.inputs[0] not in outputs:
            old, new = node.inputs[0], node.outputs[0]
            maker.outputs = [new if name == old else name for name in maker.outputs]
            other[old] = new
            makers[new] = maker
            node.op = 'Nothing'
    graph.nodes = [node for node in graph.nodes if node.op != 'Nothing']
    for node in graph.nodes:
        node.inputs = [other.get(name, name) for name in node.inputs]


def _makers(graph: Graph) -> dict[str, Node]:
    return {name: node for node in graph.nodes for name in node.outputs}


def _uses(graph: Graph) -> Counter[str]:
    return Counter(name for node in graph.nodes for name in node.inputs)


# 3. The file.


def _model(
    graph: Graph,
    image_shape: tuple[int, int, int],
    outputs: Sequence[tuple[str, tuple[Any, ...]]],
    metadata: Mapping[str, str],
) -> Any:
    """The graph as an `onnx.ModelProto`, checked."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    used = {name for node in graph.nodes for name in node.inputs}
    nodes = [
        helper.make_node(node.op, node.inputs, node.outputs, name=node.name, **node.attributes)
        for node in graph.nodes
    ]
    weights = [
        numpy_helper.from_array(np.ascontiguousarray(array) if array.ndim else array, name)
        for name, array in graph.constants.items()
        if name in used
    ]
    pixels = helper.make_tensor_value_info(graph.input, TensorProto.UINT8, ['batch', *image_shape])
    results = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ['batch', *shape[1:]])
        for name, shape in outputs
    ]
    model = helper.make_model(
        helper.make_graph(nodes, 'classifier', [pixels], results, weights),
        opset_imports=[helper.make_opsetid('', OPSET)],
        ir_version=IR_VERSION,
        producer_name='dfkd_jax',
    )
    helper.set_model_props(model, dict(metadata))
    onnx.checker.check_model(model, full_check=True)
    return model
