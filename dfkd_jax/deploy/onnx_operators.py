"""JAX's primitives as ONNX operators: one function for each, or a row in `ELEMENTWISE`.

A function takes the graph, the equation's parameters, the shapes of its results, and its inputs:
`Tensor`s, or arrays where they are constant.  It returns one result, or a list.  Names and
parameters are those of `jax.lax`; the operators' are those of ONNX 17.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from dfkd_jax.deploy.onnx_graph import Constant, Graph, Order, Tensor
from dfkd_jax.errors import DeployError

Value = Tensor | Constant
Shapes = Sequence[tuple[Any, ...]]


def refuse(primitive: str, what: str) -> DeployError:
    """The error for a primitive in a form that is not translated."""
    return DeployError(
        f'the ONNX writer does not know {primitive!r} with {what}: export the network with '
        '--format=stablehlo.'
    )


def identity_order(shape: Sequence[Any]) -> Order:
    return tuple(range(len(shape)))


def common_order(shape: tuple[Any, ...], inputs: Sequence[Value]) -> Order:
    """How the axes of a result lie: as those of the first tensor of its rank that was turned.

    The others follow.  What was turned came from a convolution and mostly goes to the next.
    """
    plain = identity_order(shape)
    orders = [x.order for x in inputs if isinstance(x, Tensor) and len(x.order) == len(shape)]
    return next((order for order in orders if order != plain), plain)


# 1. Elementwise.

ELEMENTWISE = {
    'add': 'Add', 'add_any': 'Add', 'sub': 'Sub', 'mul': 'Mul', 'div': 'Div', 'max': 'Max',
    'min': 'Min', 'pow': 'Pow', 'neg': 'Neg', 'abs': 'Abs', 'sign': 'Sign', 'floor': 'Floor',
    'ceil': 'Ceil', 'exp': 'Exp', 'log': 'Log', 'tanh': 'Tanh', 'logistic': 'Sigmoid', 'erf': 'Erf',
    'sqrt': 'Sqrt', 'sin': 'Sin', 'cos': 'Cos', 'eq': 'Equal', 'lt': 'Less', 'le': 'LessOrEqual',
    'gt': 'Greater', 'ge': 'GreaterOrEqual', 'and': 'And', 'or': 'Or', 'not': 'Not',
}  # fmt: skip


def elementwise(
    graph: Graph, op: str, shape: tuple[Any, ...], *inputs: Value, **attributes: Any
) -> Tensor:
    """An operator on numbers one by one; sizes of 1 and scalars are broadcast, as in JAX.

    The axes lie as `common_order` says.
    """
    rank = len(shape)
    order = common_order(shape, inputs)
    names = [graph.name_of(x, order if len(x.shape) == rank else None) for x in inputs]
    return Tensor(graph.node(op, names, **attributes), order, shape)


def _elementwise(op: str) -> Callable[..., Tensor]:
    return lambda graph, params, shapes, *inputs: elementwise(graph, op, shapes[0], *inputs)


def chain(*ops: str) -> Callable[..., Tensor]:
    """Several operators of one input, one after the other."""

    def apply(graph: Graph, params: Any, shapes: Shapes, x: Tensor) -> Tensor:
        for op in ops:
            x = elementwise(graph, op, shapes[0], x)
        return x

    return apply


def square(graph: Graph, params: Any, shapes: Shapes, x: Tensor) -> Tensor:
    return elementwise(graph, 'Mul', shapes[0], x, x)


def integer_pow(graph: Graph, params: Any, shapes: Shapes, x: Tensor) -> Tensor:
    return elementwise(graph, 'Pow', shapes[0], x, np.float32(params['y']))


def erfc(graph: Graph, params: Any, shapes: Shapes, x: Tensor) -> Tensor:
    return elementwise(
        graph, 'Sub', shapes[0], np.float32(1), elementwise(graph, 'Erf', shapes[0], x)
    )


def log1p(graph: Graph, params: Any, shapes: Shapes, x: Tensor) -> Tensor:
    return elementwise(
        graph, 'Log', shapes[0], elementwise(graph, 'Add', shapes[0], x, np.float32(1))
    )


def expm1(graph: Graph, params: Any, shapes: Shapes, x: Tensor) -> Tensor:
    return elementwise(
        graph, 'Sub', shapes[0], elementwise(graph, 'Exp', shapes[0], x), np.float32(1)
    )


def select_n(graph: Graph, params: Any, shapes: Shapes, which: Value, *cases: Value) -> Tensor:
    if len(cases) != 2:
        raise refuse('select_n', f'{len(cases)} cases')
    return elementwise(graph, 'Where', shapes[0], which, cases[1], cases[0])


def clamp(graph: Graph, params: Any, shapes: Shapes, low: Value, x: Value, high: Value) -> Tensor:
    return elementwise(graph, 'Min', shapes[0], elementwise(graph, 'Max', shapes[0], x, low), high)


def convert_element_type(graph: Graph, params: Any, shapes: Shapes, x: Tensor) -> Tensor:
    from onnx import helper

    kind = helper.np_dtype_to_tensor_dtype(np.dtype(params['new_dtype']))
    return elementwise(graph, 'Cast', shapes[0], x, to=kind)


def same(graph: Graph, params: Any, shapes: Shapes, *inputs: Value) -> list[Value]:
    return list(inputs)


# 2. Shapes.


def reshape(graph: Graph, params: Any, shapes: Shapes, x: Value) -> Tensor:
    shape = shapes[0]
    name = graph.node('Reshape', [graph.name_of(x), graph.shape(shape)])
    return Tensor(name, identity_order(shape), shape)


def squeeze(graph: Graph, params: Any, shapes: Shapes, x: Tensor) -> Tensor:
    gone = params['dimensions']
    places = [place for place, axis in enumerate(x.order) if axis in gone]
    name = graph.node('Squeeze', [x.name, graph.integers(places)])
    return Tensor(name, _without(x.order, gone), shapes[0])


def transpose(graph: Graph, params: Any, shapes: Shapes, x: Tensor) -> Tensor:
    new = params['permutation']  # axis i of the result is axis new[i] of x
    return Tensor(x.name, tuple(new.index(axis) for axis in x.order), shapes[0])


def broadcast_in_dim(graph: Graph, params: Any, shapes: Shapes, x: Value, *sizes: Any) -> Tensor:
    shape, places = shapes[0], params['broadcast_dimensions']
    new = tuple(axis for axis in range(len(shape)) if axis not in places)
    old = x.order if isinstance(x, Tensor) else identity_order(x.shape)
    name = graph.name_of(x, old)
    # New axes come last, so that a map's channels stay where a convolution wants them.
    order = tuple(places[axis] for axis in old) + new
    if new:
        name = graph.node('Unsqueeze', [name, graph.integers(range(len(old), len(old) + len(new)))])
    here = {place: x.shape[axis] for axis, place in enumerate(places)}
    if any(here.get(axis, 1) != size for axis, size in enumerate(shape)):
        name = graph.node('Expand', [name, graph.exact_shape([shape[axis] for axis in order])])
    return Tensor(name, order, shape)


def concatenate(graph: Graph, params: Any, shapes: Shapes, *inputs: Value) -> Tensor:
    order = common_order(shapes[0], inputs)
    names = [graph.name_of(x, order) for x in inputs]
    name = graph.node('Concat', names, axis=order.index(params['dimension']))
    return Tensor(name, order, shapes[0])


def split(graph: Graph, params: Any, shapes: Shapes, x: Tensor) -> list[Tensor]:
    axis, sizes = x.order.index(params['axis']), params['sizes']
    first = graph.node('Split', [x.name, graph.integers(sizes)], outputs=len(sizes), axis=axis)
    return (
        [Tensor(name, x.order, shape) for name, shape in zip(graph.nodes[-1].outputs, shapes)]
        if first
        else []
    )


def slice_(graph: Graph, params: Any, shapes: Shapes, x: Tensor) -> Tensor:
    starts, limits = params['start_indices'], params['limit_indices']
    return _slice(graph, x, starts, limits, params['strides'] or (1,) * len(starts), shapes[0])


def _slice(
    graph: Graph, x: Tensor, starts: Any, limits: Any, strides: Any, shape: tuple[Any, ...]
) -> Tensor:
    """A part of a tensor; an axis that is taken whole may have any size."""
    cut = [
        axis
        for axis, size in enumerate(x.shape)
        if (starts[axis], limits[axis], strides[axis]) != (0, size, 1)
    ]
    if not cut:
        return x._replace(shape=shape)
    chosen = [graph.integers([int(values[axis]) for axis in cut]) for values in (starts, limits)]
    places = graph.integers([x.order.index(axis) for axis in cut])
    steps = graph.integers([strides[axis] for axis in cut])
    return Tensor(graph.node('Slice', [x.name, *chosen, places, steps]), x.order, shape)


def dynamic_slice(graph: Graph, params: Any, shapes: Shapes, x: Tensor, *starts: Value) -> Tensor:
    if any(isinstance(start, Tensor) for start in starts):
        raise refuse('dynamic_slice', 'places that depend on the images')
    sizes = params['slice_sizes']
    whole = [size == part for size, part in zip(x.shape, sizes)]
    # As in JAX, a slice that would end outside begins earlier.
    first = [
        0 if all_ else max(0, min(np.asarray(start).item(), size - part))
        for all_, start, size, part in zip(whole, starts, x.shape, sizes)
    ]
    limits = [size if all_ else at + size for all_, at, size in zip(whole, first, sizes)]
    return _slice(graph, x, first, limits, (1,) * len(first), shapes[0])


def pad(graph: Graph, params: Any, shapes: Shapes, x: Tensor, value: Value) -> Tensor:
    padding = [params['padding_config'][axis] for axis in x.order]
    if any(low < 0 or high < 0 or between for low, high, between in padding):
        raise refuse('pad', 'negative or interior padding')
    around = [low for low, _, _ in padding] + [high for _, high, _ in padding]
    name = graph.node('Pad', [x.name, graph.integers(around), graph.name_of(value)])
    return Tensor(name, x.order, shapes[0])


def rev(graph: Graph, params: Any, shapes: Shapes, x: Tensor) -> Tensor:
    axes = params['dimensions']
    ends = (-1,) * len(axes), (np.iinfo(np.int64).min,) * len(axes)
    chosen = [graph.integers(values) for values in ends]
    places = graph.integers([x.order.index(axis) for axis in axes])
    name = graph.node('Slice', [x.name, *chosen, places, graph.integers((-1,) * len(axes))])
    return Tensor(name, x.order, shapes[0])


def gather(graph: Graph, params: Any, shapes: Shapes, x: Tensor, indices: Value) -> Tensor:
    """Parts of `x` at constant places: what indexing becomes where the batch is symbolic.

    Along each axis it takes one part, or rows that one axis of the places counts.
    """
    numbers, sizes = params['dimension_numbers'], params['slice_sizes']
    if numbers.operand_batching_dims or isinstance(indices, Tensor):
        raise refuse('gather', 'places that depend on the images')
    indices = np.asarray(indices)
    gone, starts, limits = numbers.collapsed_slice_dims, [0] * len(sizes), list(x.shape)
    rows: dict[int, np.ndarray] = {}  # of an axis of x
    counter: dict[int, int] = {}  # the axis of the places that counts them
    for axis, first in zip(numbers.start_index_map, np.moveaxis(indices, -1, 0)):
        moving = [k for k in range(first.ndim) if np.ptp(first, axis=k).any()]
        if x.shape[axis] == sizes[axis] and not first.any():
            continue
        if first.min() < 0 or first.max() + sizes[axis] > x.shape[axis]:
            raise refuse('gather', 'places outside')
        if not moving:
            starts[axis] = int(first.flat[0])
            limits[axis] = starts[axis] + sizes[axis]
        elif len(moving) == 1 and axis in gone and moving[0] not in counter.values():
            counter[axis] = moving[0]
            rows[axis] = np.moveaxis(first, moving[0], 0).reshape(first.shape[moving[0]], -1)[:, 0]
        else:
            raise refuse('gather', 'places along several axes')
    if sorted(counter.values()) != [k for k in range(indices.ndim - 1) if indices.shape[k] > 1]:
        raise refuse('gather', 'places that repeat')
    x = _slice(graph, x, starts, limits, (1,) * len(starts), x.shape)
    for axis, places in rows.items():
        step = int(places[1] - places[0])
        if step > 0 and not np.diff(places, 2).any():
            ends = [(0, size, 1) for size in x.shape]
            ends[axis] = (int(places[0]), int(places[-1]) + 1, step)
            first, limit, steps = zip(*ends)
            x = _slice(graph, x, first, limit, steps, x.shape)
            continue
        name = graph.node(
            'Gather', [x.name, graph.integers(places.tolist())], axis=x.order.index(axis)
        )
        x = x._replace(name=name)
    return _placed(graph, x, numbers, counter, indices.ndim - 1, shapes[0])


def _placed(
    graph: Graph, x: Tensor, numbers: Any, counter: Any, counters: int, shape: tuple[Any, ...]
) -> Tensor:
    """The result of a gather, whose axes `x` still has in its own order and its own number."""
    batch = [axis for axis in range(len(shape)) if axis not in numbers.offset_dims]
    single = [axis for axis in numbers.collapsed_slice_dims if axis not in counter]
    if single:
        places = [x.order.index(axis) for axis in single]
        x = x._replace(name=graph.node('Squeeze', [x.name, graph.integers(places)]))
    offsets = iter(numbers.offset_dims)
    final = {
        axis: next(offsets)
        for axis in range(len(x.shape))
        if axis not in numbers.collapsed_slice_dims
    }
    final |= {axis: batch[k] for axis, k in counter.items()}
    order = tuple(final[axis] for axis in x.order if axis in final)
    new = tuple(batch[k] for k in range(counters) if k not in counter.values())  # of size 1
    if new:
        last = range(len(order), len(order) + len(new))
        x = x._replace(name=graph.node('Unsqueeze', [x.name, graph.integers(last)]))
    return Tensor(x.name, order + new, shape)


# 3. Reductions and pools.


def _without(order: Order, gone: Sequence[int]) -> Order:
    """The order of the axes that are left, counted without those that are gone."""
    left = sorted(axis for axis in order if axis not in gone)
    return tuple(left.index(axis) for axis in order if axis not in gone)


def reduction(op: str) -> Callable[..., Tensor]:
    def apply(graph: Graph, params: Any, shapes: Shapes, x: Tensor) -> Tensor:
        gone = params['axes']
        if not gone:
            return x
        places = [place for place, axis in enumerate(x.order) if axis in gone]
        if op == 'ReduceSum':  # the one whose axes are an input in opset 17
            name = graph.node(op, [x.name, graph.integers(places)], keepdims=0)
        else:
            name = graph.node(op, [x.name], axes=places, keepdims=0)
        return Tensor(name, _without(x.order, gone), shapes[0])

    return apply


def pool(op: str) -> Callable[..., Tensor]:
    """A reduction over windows of the axes between the first and the last."""

    def apply(graph: Graph, params: Any, shapes: Shapes, x: Tensor) -> Tensor:
        name, rank = f'reduce_window ({op})', len(x.shape)
        window, strides = params['window_dimensions'], params['window_strides']
        padding, dilation = params['padding'], params['window_dilation']
        still = all(window[axis] == strides[axis] == 1 for axis in (0, rank - 1))
        if rank < 3 or not still or any(sum(padding[axis]) for axis in (0, rank - 1)):
            raise refuse(name, 'windows over images or channels')
        if any(size != 1 for size in params['base_dilation']):
            raise refuse(name, 'holes in its input')
        order = (0, rank - 1, *range(1, rank - 1))
        attributes: dict[str, Any] = {
            'kernel_shape': window[1:-1],
            'strides': strides[1:-1],
            'pads': _pads(padding[1:-1]),
        }
        if any(size != 1 for size in dilation):
            attributes['dilations'] = dilation[1:-1]
        if op == 'AveragePool':
            if 'dilations' in attributes:
                raise refuse(name, 'dilation')
            attributes['count_include_pad'] = 1
        pooled = Tensor(graph.node(op, [graph.name_of(x, order)], **attributes), order, shapes[0])
        if op == 'AveragePool':  # of a sum, as JAX has it
            size = np.float32(math.prod(window))
            return elementwise(graph, 'Mul', shapes[0], pooled, size)
        return pooled

    return apply


def _pads(padding: Sequence[tuple[int, int]]) -> list[int]:
    """ONNX's form: what is before each axis, then what is after each."""
    return [low for low, _ in padding] + [high for _, high in padding]


# 4. Convolutions and products.


def conv_general_dilated(
    graph: Graph, params: Any, shapes: Shapes, x: Value, kernel: Value
) -> Tensor:
    numbers, padding = params['dimension_numbers'], params['padding']
    if any(size != 1 for size in params['lhs_dilation']) or params['batch_group_count'] != 1:
        raise refuse('conv_general_dilated', 'a dilated input (a transposed convolution)')
    if any(low < 0 or high < 0 for low, high in padding):
        raise refuse('conv_general_dilated', 'negative padding')
    weight = graph.name_of(kernel, numbers.rhs_spec)
    name = graph.node(
        'Conv',
        [graph.name_of(x, numbers.lhs_spec), weight],
        kernel_shape=[kernel.shape[axis] for axis in numbers.rhs_spec[2:]],
        strides=params['window_strides'],
        dilations=params['rhs_dilation'],
        group=params['feature_group_count'],
        pads=_pads(padding),
    )
    return Tensor(name, numbers.out_spec, shapes[0])


def dot_general(graph: Graph, params: Any, shapes: Shapes, a: Value, b: Value) -> Tensor:
    """A product of any axes, as one of matrices: [batch, free, summed] x [batch, summed, free]."""
    (sum_a, sum_b), (batch_a, batch_b) = params['dimension_numbers']
    free_a, free_b = (
        [axis for axis in range(len(x.shape)) if axis not in (*summed, *batch)]
        for x, summed, batch in ((a, sum_a, batch_a), (b, sum_b, batch_b))
    )
    shape = shapes[0]

    def matrix(x: Value, batch: Any, rows: Any, columns: Any, keep_rows: bool) -> str:
        """`x` as [*batch, rows, columns], with groups of axes joined unless they are one."""
        name = graph.name_of(x, (*batch, *rows, *columns))
        if (keep_rows or len(rows) == 1) and len(columns) == 1:
            return name
        sizes = [[x.shape[axis] for axis in axes] for axes in (batch, rows, columns)]
        middle = sizes[1] if keep_rows else [math.prod(sizes[1])]
        return graph.node('Reshape', [name, graph.shape(sizes[0] + middle + [math.prod(sizes[2])])])

    if len(a.shape) == len(b.shape) == 2 and not batch_a:
        left, right = (matrix(a, (), free_a, sum_a, False), matrix(b, (), sum_b, free_b, False))
        return Tensor(graph.node('Gemm', [left, right]), identity_order(shape), shape)
    # Without common axes, the second is one matrix for all rows of the first.
    keep = not batch_a and bool(free_a)
    left = matrix(a, batch_a, free_a, sum_a, keep)
    right = matrix(b, batch_b, sum_b, free_b, False)
    name = graph.node('MatMul', [left, right])
    if not ((keep or len(free_a) == 1) and len(free_b) == 1):
        name = graph.node('Reshape', [name, graph.shape(shape)])
    return Tensor(name, identity_order(shape), shape)


def ne(graph: Graph, params: Any, shapes: Shapes, a: Value, b: Value) -> Tensor:
    return elementwise(graph, 'Not', shapes[0], elementwise(graph, 'Equal', shapes[0], a, b))


OPERATORS: dict[str, Callable[..., Any]] = {
    **{name: _elementwise(op) for name, op in ELEMENTWISE.items()},
    'rsqrt': chain('Sqrt', 'Reciprocal'),
    'square': square,
    'integer_pow': integer_pow,
    'erfc': erfc,
    'log1p': log1p,
    'expm1': expm1,
    'ne': ne,
    'select_n': select_n,
    'clamp': clamp,
    'convert_element_type': convert_element_type,
    'stop_gradient': same,
    'copy': same,
    'copy_p': same,
    'optimization_barrier': same,
    'reshape': reshape,
    'squeeze': squeeze,
    'expand_dims': reshape,
    'transpose': transpose,
    'broadcast_in_dim': broadcast_in_dim,
    'concatenate': concatenate,
    'split': split,
    'slice': slice_,
    'dynamic_slice': dynamic_slice,
    'pad': pad,
    'rev': rev,
    'gather': gather,
    'reduce_sum': reduction('ReduceSum'),
    'reduce_max': reduction('ReduceMax'),
    'reduce_min': reduction('ReduceMin'),
    'reduce_prod': reduction('ReduceProd'),
    'reduce_window_max': pool('MaxPool'),
    'reduce_window_sum': pool('AveragePool'),
    'conv_general_dilated': conv_general_dilated,
    'dot_general': dot_general,
}
