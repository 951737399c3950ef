"""ONNX's operators of opset 13 to 25, as far as image classifiers use them, by name.

A function's first parameters are the operator's inputs, in order, and the others have the names of
its attributes.  An input that was once an attribute (axes, pads) is a parameter of that name.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dfkd_jax.models.layers import wide
from dfkd_jax.port.exported import layers
from dfkd_jax.port.exported.layers import cast, each, elementwise, on_host, sized
from dfkd_jax.port.exported.program import Dialect

# 1. Arithmetic


def div(a: Any, b: Any) -> Any:
    numbers = np if on_host(a, b) else jnp
    a, b = layers.together(a, b)
    if layers.floating(a):
        return numbers.true_divide(a, b)
    return numbers.trunc(numbers.true_divide(a, b)).astype(a.dtype)


def mod(a: Any, b: Any, fmod: int = 0) -> Any:
    return elementwise('fmod' if fmod else 'mod')(a, b)


def chain(function: Callable[[Any, Any], Any]) -> Callable[..., Any]:
    """An operator of any number of arrays, from one of two."""

    def call(*arrays: Any) -> Any:
        total = arrays[0]
        for array in arrays[1:]:
            total = function(total, array)
        return total

    return call


def mean_of(*arrays: Any) -> Any:
    return div(chain(layers.add)(*arrays), float(len(arrays)))


def power(x: Any, y: Any) -> Any:
    if not on_host(x) and on_host(y) and np.size(y) == 1 and float(np.ravel(y)[0]).is_integer():
        return jax.lax.integer_pow(x, int(np.ravel(y)[0]))
    result = layers.power(x, y)
    return result if on_host(x) else result.astype(x.dtype)


def clip(x: Any, min: Any = None, max: Any = None) -> Any:
    return layers.clamp(x, min, max)


def cast_to(x: Any, to: Any, saturate: int = 1, round_mode: str = 'up') -> Any:
    return cast(x, to)


def cast_like(x: Any, target: Any, saturate: int = 1, round_mode: str = 'up') -> Any:
    return cast(x, np.asarray(target).dtype if on_host(target) else target.dtype)


def where(condition: Any, x: Any, y: Any) -> Any:
    return layers.where(condition, x, y)


def dropout(x: Any, ratio: Any = 0.5, training_mode: Any = False, seed: int = 0) -> Any:
    if np.any(training_mode):
        raise ValueError('drops numbers at random, as in training')
    return x, np.zeros(0)


# 2. Linear layers and convolutions


def gemm(
    a: Any,
    b: Any,
    c: Any = None,
    alpha: float = 1.0,
    beta: float = 1.0,
    transA: int = 0,
    transB: int = 0,
) -> Any:
    y = layers.matmul(
        jnp.swapaxes(a, 0, 1) if transA else a, jnp.swapaxes(b, 0, 1) if transB else b
    )
    y = y if alpha == 1 else y * alpha
    return y if c is None else layers.add(y, c if beta == 1 else c * beta)


def einsum(*tensors: Any, equation: str) -> Any:
    return jnp.einsum(equation, *layers.of_one_type(tensors))


def _pads(
    x: Any,
    kernel: Sequence[int],
    strides: Sequence[int],
    dilations: Sequence[int],
    pads: Sequence[int] | None,
    auto_pad: str,
) -> list[tuple[int, int]]:
    rank = len(kernel)
    if auto_pad in ('SAME_UPPER', 'SAME_LOWER'):
        more_after = auto_pad == 'SAME_UPPER'
        return layers.same_pads(x.shape[2:], kernel, strides, dilations, more_after)
    listed = [0] * 2 * rank if pads is None or auto_pad == 'VALID' else list(pads)
    return list(zip(listed[:rank], listed[rank:]))


def conv(
    x: Any,
    w: Any,
    b: Any = None,
    auto_pad: str = 'NOTSET',
    dilations: Any = None,
    group: int = 1,
    kernel_shape: Any = None,
    pads: Any = None,
    strides: Any = None,
) -> Any:
    ones = [1] * (x.ndim - 2)
    strides, dilations = strides or ones, dilations or ones
    found = _pads(x, w.shape[2:], strides, dilations, pads, auto_pad)
    return layers.convolution(x, w, b, strides, found, dilations, group)


# 3. Normalisation


def batch_normalization(
    x: Any,
    scale: Any,
    b: Any,
    input_mean: Any,
    input_var: Any,
    epsilon: float = 1e-5,
    momentum: float = 0.9,
    training_mode: int = 0,
    spatial: int = 1,
) -> Any:
    if training_mode:
        raise ValueError(
            "normalises with the batch's own moments (training_mode=1): export the network in "
            'evaluation mode, after model.eval()'
        )
    return layers.batch_norm(x, scale, b, input_mean, input_var, epsilon)


def instance_normalization(x: Any, scale: Any, b: Any, epsilon: float = 1e-5) -> Any:
    return layers.group_norm(x, x.shape[1], scale, b, epsilon)


def group_normalization(
    x: Any, scale: Any, bias: Any, num_groups: int, epsilon: float = 1e-5, stash_type: int = 1
) -> Any:
    # Opset 18 has a scale for each group; opset 21 has one for each channel.
    repeats = x.shape[1] // scale.shape[0]
    scale, bias = (jnp.repeat(v, repeats) for v in (scale, bias))
    return layers.group_norm(x, num_groups, scale, bias, epsilon)


def layer_normalization(
    x: Any, scale: Any, b: Any = None, axis: int = -1, epsilon: float = 1e-5, stash_type: int = 1
) -> Any:
    rank = x.ndim - axis % x.ndim
    _, mean, deviation = layers.normalised(x, tuple(range(x.ndim - rank, x.ndim)), epsilon)
    return layers.layer_norm(x, rank, scale, b, epsilon), mean, deviation


def rms_normalization(
    x: Any, scale: Any, axis: int = -1, epsilon: float = 1e-5, stash_type: int = 1
) -> Any:
    axes, y = tuple(range(axis % x.ndim, x.ndim)), wide(x)
    y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axes, keepdims=True) + epsilon)
    return layers.multiply(y, wide(scale)).astype(x.dtype)


def lp_normalization(x: Any, axis: int = -1, p: int = 2) -> Any:
    return x / reduce_l2(x, axis) if p == 2 else x / jnp.sum(jnp.abs(x), axis, keepdims=True)


def softmax(x: Any, axis: int = -1) -> Any:
    return layers.in_wide(jax.nn.softmax)(x, axis)


def log_softmax(x: Any, axis: int = -1) -> Any:
    return layers.in_wide(jax.nn.log_softmax)(x, axis)


def attention(
    q: Any,
    k: Any,
    v: Any,
    attn_mask: Any = None,
    is_causal: int = 0,
    scale: float | None = None,
    q_num_heads: int | None = None,
    kv_num_heads: int | None = None,
    softmax_precision: int = 1,
) -> Any:
    if q_num_heads is None:
        return layers.attention(q, k, v, attn_mask, bool(is_causal), scale)
    if kv_num_heads != q_num_heads:
        raise ValueError('attention with fewer keys than queries is not read')

    def heads(x: Any) -> Any:
        return x.reshape(*x.shape[:2], q_num_heads, -1).swapaxes(1, 2)

    y = layers.attention(heads(q), heads(k), heads(v), attn_mask, bool(is_causal), scale)
    return y.swapaxes(1, 2).reshape(*q.shape[:2], -1)


# 4. Activations


def elu(x: Any, alpha: float = 1.0) -> Any:
    return jnp.where(x > 0, x, alpha * jnp.expm1(jnp.where(x > 0, 0.0, x)))


def selu(
    x: Any, alpha: float = 1.67326319217681884765625, gamma: float = 1.05070102214813232421875
) -> Any:
    return gamma * elu(x, alpha)


def celu(x: Any, alpha: float = 1.0) -> Any:
    return jnp.where(x > 0, x, alpha * jnp.expm1(jnp.where(x > 0, 0.0, x) / alpha))


def leaky_relu(x: Any, alpha: float = 0.01) -> Any:
    return jnp.where(x > 0, x, x * alpha)


def prelu(x: Any, slope: Any) -> Any:
    return layers.where(x > 0, x, layers.multiply(x, slope))


def softplus(x: Any) -> Any:
    return jnp.logaddexp(x, 0.0)


def hard_sigmoid(x: Any, alpha: float = 0.2, beta: float = 0.5) -> Any:
    return layers.hardsigmoid(x, _sixth(alpha), beta)


def _sixth(alpha: float) -> float:
    """PyTorch's slope, 1/6, which a file has in float32."""
    return 1 / 6 if abs(alpha - 1 / 6) < 1e-7 else alpha


def gelu(x: Any, approximate: str = 'none') -> Any:
    return layers.gelu(x, approximate)


def swish(x: Any, alpha: float = 1.0) -> Any:
    return x * jax.nn.sigmoid(x if alpha == 1 else alpha * x)


# 5. Pools and resizing


def max_pool(
    x: Any,
    auto_pad: str = 'NOTSET',
    ceil_mode: int = 0,
    dilations: Any = None,
    kernel_shape: Any = (),
    pads: Any = None,
    storage_order: int = 0,
    strides: Any = None,
) -> Any:
    ones = [1] * len(kernel_shape)
    strides, dilations = strides or ones, dilations or ones
    found = _pads(x, kernel_shape, strides, dilations, pads, auto_pad)
    return layers.max_pool(x, kernel_shape, strides, found, dilations, bool(ceil_mode))


def average_pool(
    x: Any,
    auto_pad: str = 'NOTSET',
    ceil_mode: int = 0,
    count_include_pad: int = 0,
    dilations: Any = None,
    kernel_shape: Any = (),
    pads: Any = None,
    strides: Any = None,
) -> Any:
    ones = [1] * len(kernel_shape)
    if dilations and list(dilations) != ones:
        raise ValueError('an average pool with dilations is not read')
    strides = strides or ones
    found = _pads(x, kernel_shape, strides, ones, pads, auto_pad)
    counted = bool(count_include_pad)
    return layers.average_pool(x, kernel_shape, strides, found, bool(ceil_mode), counted)


def global_average_pool(x: Any) -> Any:
    return layers.adaptive_average_pool(x, (1,) * (x.ndim - 2))


def global_max_pool(x: Any) -> Any:
    return jnp.max(x, tuple(range(2, x.ndim)), keepdims=True)


def resize(
    x: Any,
    roi: Any = None,
    scales: Any = None,
    sizes: Any = None,
    antialias: int = 0,
    axes: Any = None,
    coordinate_transformation_mode: str = 'half_pixel',
    cubic_coeff_a: float = -0.75,
    exclude_outside: int = 0,
    extrapolation_value: float = 0.0,
    keep_aspect_ratio_policy: str = 'stretch',
    mode: str = 'nearest',
    nearest_mode: str = 'round_prefer_floor',
) -> Any:
    manner = coordinate_transformation_mode
    if antialias or exclude_outside or keep_aspect_ratio_policy != 'stretch' or x.ndim != 4:
        raise ValueError('resizing with antialias, exclude_outside or aspect ratios is not read')
    if axes is not None and list(axes) not in ([0, 1, 2, 3], [2, 3]):
        raise ValueError(f'resizing of axes {list(axes)} is not read')
    factors: list[float | None] = [None, None]
    if sizes is not None and np.size(sizes):
        new = _whole(sizes)[-2:]
    else:
        factors = [float(f) for f in np.ravel(scales)[-2:]]
        new = [math.floor(n * f) for n, f in zip(x.shape[2:], np.ravel(scales)[-2:])]
    whole = all(n % old == 0 for n, old in zip(new, x.shape[2:]))
    if mode == 'nearest':
        # For whole factors all manners take the same pixels.
        known = (manner, nearest_mode) == ('asymmetric', 'floor') or whole
    else:
        known = manner in ('half_pixel', 'pytorch_half_pixel', 'align_corners')
        known &= manner != 'pytorch_half_pixel' or min(new) > 1
    if not known:
        raise ValueError(f'resizing by {mode}, {manner}, {nearest_mode} is not read')
    corners = manner == 'align_corners' and mode != 'nearest'
    return layers.resized(x, new, mode, corners, factors, cubic_coeff_a)


def depth_to_space(x: Any, blocksize: int, mode: str = 'DCR') -> Any:
    return layers.depth_to_space(x, blocksize, mode == 'CRD')


def space_to_depth(x: Any, blocksize: int) -> Any:
    return layers.space_to_depth(x, blocksize, channels_first=False)


# 6. Sums over axes


def reduction(function: Callable[..., Any], of_host: Callable[..., Any]) -> Callable[..., Any]:
    def call(x: Any, axes: Any = None, keepdims: int = 1, noop_with_empty_axes: int = 0) -> Any:
        if not np.size(() if axes is None else axes) and noop_with_empty_axes:
            return x
        over = layers.axes_of(x, axes)
        return (of_host if on_host(x) else function)(x, over, keepdims=bool(keepdims))

    return call


def _sum(x: Any, axes: Any, keepdims: bool) -> Any:
    total = jnp.sum(wide(x), axes, keepdims=keepdims) if layers.floating(x) else None
    return jnp.sum(x, axes, keepdims=keepdims) if total is None else total.astype(x.dtype)


def _l2(x: Any, axes: Any, keepdims: bool) -> Any:
    total = _sum(jnp.square(x), axes, keepdims)
    positive = total > 0  # the gradient at 0 is 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, total, 1)), 0)


def _of_squares(x: Any, axes: Any, keepdims: bool) -> Any:
    return _sum(jnp.square(x), axes, keepdims)


def _l1(x: Any, axes: Any, keepdims: bool) -> Any:
    return _sum(jnp.abs(x), axes, keepdims)


def reduce_l2(x: Any, axis: int) -> Any:
    return _l2(x, (axis,), True)


def argmax(x: Any, axis: int = 0, keepdims: int = 1, select_last_index: int = 0) -> Any:
    return jnp.argmax(x, axis, keepdims=bool(keepdims))


def cumsum(x: Any, axis: Any, exclusive: int = 0, reverse: int = 0) -> Any:
    if exclusive or reverse:
        raise ValueError('a sum that is exclusive or in reverse is not read')
    return (np if on_host(x) else jnp).cumsum(x, int(np.ravel(axis)[0]))


# 7. Shapes


def _whole(value: Any) -> list[int]:
    """The whole numbers of an input that says sizes or axes."""
    if not on_host(value):
        raise ValueError('sizes that depend on the values of images are not read')
    return [int(n) for n in np.ravel(value)]


def shape(x: Any, start: int = 0, end: int | None = None) -> Any:
    return np.asarray(np.shape(x)[start:end], np.int64)


def size_of(x: Any) -> Any:
    return np.asarray(np.size(x), np.int64)


def reshape(x: Any, shape: Any, allowzero: int = 0) -> Any:
    old = np.shape(x)
    sizes = [old[i] if n == 0 and not allowzero else n for i, n in enumerate(_whole(shape))]
    return x.reshape(sizes)


def flatten(x: Any, axis: int = 1) -> Any:
    axis = axis % np.ndim(x) if axis != np.ndim(x) else axis
    return x.reshape(math.prod(np.shape(x)[:axis]), math.prod(np.shape(x)[axis:]))


def transpose(x: Any, perm: Any = None) -> Any:
    return x.transpose(perm)


def squeeze(x: Any, axes: Any = None) -> Any:
    if axes is None:
        return x.squeeze()
    return x.squeeze(tuple(_whole(axes)))


def unsqueeze(x: Any, axes: Any) -> Any:
    return (np if on_host(x) else jnp).expand_dims(x, tuple(_whole(axes)))


def concat(*parts: Any, axis: int) -> Any:
    arrays = layers.of_one_type(parts)
    return (np if on_host(*arrays) else jnp).concatenate(arrays, axis)


def split_(x: Any, split: Any = None, axis: int = 0, num_outputs: int | None = None) -> Any:
    total = np.shape(x)[axis]
    if split is None:
        size = -(-total // (num_outputs or 1))
        ends = list(range(size, total, size))
    else:
        ends = np.cumsum(_whole(split))[:-1].tolist()
    return (np if on_host(x) else jnp).split(x, ends, axis)


def split_to_sequence(x: Any, split: Any = None, axis: int = 0, keepdims: int = 1) -> Any:
    """A list of arrays, which is one value."""
    if split is None:
        parts = [layers.sliced(x, axis, i, i + 1) for i in range(np.shape(x)[axis])]
        return parts if keepdims else [part.squeeze(axis) for part in parts]
    sizes = _whole(split)
    if np.ndim(split) == 0:
        total = np.shape(x)[axis]
        sizes = [min(sizes[0], total - start) for start in range(0, total, sizes[0])]
    return list(split_(x, sizes, axis))


def sequence_at(sequence: Any, position: Any) -> Any:
    return sequence[int(np.ravel(position)[0])]


def slice_(x: Any, starts: Any, ends: Any, axes: Any = None, steps: Any = None) -> Any:
    starts, ends = _whole(starts), _whole(ends)
    axes = range(len(starts)) if axes is None else _whole(axes)
    for axis, start, end, step in zip(
        axes, starts, ends, [1] * len(starts) if steps is None else _whole(steps)
    ):
        if step < 0:  # the end is before the first entry
            end = None if end < -np.shape(x)[axis] else end
        x = layers.sliced(x, axis, start, end, step)
    return x


def gather(x: Any, indices: Any, axis: int = 0) -> Any:
    return layers.taken(x, indices % np.shape(x)[axis] if on_host(indices) else indices, axis)


def gather_elements(x: Any, indices: Any, axis: int = 0) -> Any:
    return jnp.take_along_axis(jnp.asarray(x), jnp.asarray(indices), axis)


def gather_nd(x: Any, indices: Any, batch_dims: int = 0) -> Any:
    if batch_dims:
        raise ValueError('GatherND with batch_dims is not read')
    x = x if on_host(x, indices) else jnp.asarray(x)
    return x[
        tuple(np.moveaxis(indices, -1, 0) if on_host(indices) else jnp.moveaxis(indices, -1, 0))
    ]


def scatter_nd(x: Any, indices: Any, updates: Any, reduction: str = 'none') -> Any:
    if reduction != 'none':
        raise ValueError('ScatterND that accumulates is not read')
    place = (
        tuple(np.moveaxis(np.asarray(indices), -1, 0))
        if on_host(indices)
        else tuple(jnp.moveaxis(indices, -1, 0))
    )
    if on_host(x, indices, updates):
        x = np.array(x)
        x[place] = updates
        return x
    x = jnp.asarray(x)
    return x.at[place].set(jnp.asarray(updates).astype(x.dtype))


def expand(x: Any, shape: Any) -> Any:
    wanted = _whole(shape)
    rank = max(len(wanted), np.ndim(x))
    pairs = zip([1] * (rank - np.ndim(x)) + list(np.shape(x)), [1] * (rank - len(wanted)) + wanted)
    return layers.expanded(x, [old if new == 1 else new for old, new in pairs])


def tile(x: Any, repeats: Any) -> Any:
    times = _whole(repeats)
    sized([n * t for n, t in zip(np.shape(x), times)], on_host(x))
    return (np if on_host(x) else jnp).tile(x, times)


def pad(
    x: Any, pads: Any, constant_value: Any = None, axes: Any = None, mode: str = 'constant'
) -> Any:
    listed, rank = _whole(pads), np.ndim(x)
    over = list(range(rank)) if axes is None else [a % rank for a in _whole(axes)]
    whole = [(0, 0)] * rank
    for place, axis in enumerate(over):
        whole[axis] = (listed[place], listed[place + len(over)])
    value = 0.0 if constant_value is None else constant_value
    return layers.padded(x, whole, mode, value)


def trilu(x: Any, k: Any = 0, upper: int = 1) -> Any:
    return getattr(np if on_host(x) else jnp, 'triu' if upper else 'tril')(x, int(np.ravel(k)[0]))


# 8. New arrays


def constant_of_shape(shape: Any, value: Any = None) -> Any:
    number = np.zeros(1, np.float32) if value is None else np.ravel(value)
    return layers.full(_whole(shape), number[0], number.dtype)


def range_(start: Any, limit: Any, delta: Any) -> Any:
    first, last, step = (np.ravel(v)[0] for v in (start, limit, delta))
    sized((max(math.ceil((last - first) / step), 0),), True)
    return np.arange(first, last, step)


def eye_like(x: Any, dtype: Any = None, k: int = 0) -> Any:
    sized(np.shape(x), True)
    rows, columns = np.shape(x)
    return layers.host(np.eye(rows, columns, k), dtype)


OPERATORS: dict[str, Callable[..., Any]] = {
    # arithmetic
    'Add': layers.add,
    'Sub': layers.subtract,
    'Mul': layers.multiply,
    'Div': div,
    'Mod': mod,
    'Pow': power,
    'Sum': chain(layers.add),
    'Mean': mean_of,
    'Max': chain(layers.maximum),
    'Min': chain(layers.minimum),
    'Abs': each('abs'),
    'Neg': each('negative'),
    'Sign': each('sign'),
    'Exp': each('exp'),
    'Log': each('log'),
    'Sqrt': each('sqrt'),
    'Reciprocal': each('reciprocal'),
    'Sin': each('sin'),
    'Cos': each('cos'),
    'Tan': each('tan'),
    'Erf': lambda x: jax.lax.erf(x),
    'Floor': each('floor'),
    'Ceil': each('ceil'),
    'Round': each('round'),
    'IsNaN': each('isnan'),
    'Equal': elementwise('equal'),
    'Less': elementwise('less'),
    'LessOrEqual': elementwise('less_equal'),
    'Greater': elementwise('greater'),
    'GreaterOrEqual': elementwise('greater_equal'),
    'And': elementwise('logical_and'),
    'Or': elementwise('logical_or'),
    'Not': each('logical_not'),
    'Where': where,
    'Clip': clip,
    # types and copies
    'Cast': cast_to,
    'CastLike': cast_like,
    'Identity': lambda x: x,
    'Dropout': dropout,
    # linear layers and convolutions
    'Gemm': gemm,
    'MatMul': lambda a, b: layers.matmul(a, b),
    'Einsum': einsum,
    'Conv': conv,
    'Attention': attention,
    # normalisation
    'BatchNormalization': batch_normalization,
    'InstanceNormalization': instance_normalization,
    'GroupNormalization': group_normalization,
    'LayerNormalization': layer_normalization,
    'RMSNormalization': rms_normalization,
    'LpNormalization': lp_normalization,
    'Softmax': softmax,
    'LogSoftmax': log_softmax,
    # activations
    'Relu': lambda x: jax.nn.relu(x),
    'LeakyRelu': leaky_relu,
    'PRelu': prelu,
    'Elu': elu,
    'Selu': selu,
    'Celu': celu,
    'Sigmoid': lambda x: jax.nn.sigmoid(x),
    'HardSigmoid': hard_sigmoid,
    'HardSwish': lambda x: x * layers.hardsigmoid(x),
    'Tanh': each('tanh'),
    'Softplus': softplus,
    'Softsign': lambda x: x / (1 + jnp.abs(x)),
    'Mish': lambda x: x * jnp.tanh(softplus(x)),
    'Gelu': gelu,
    'Swish': swish,
    # pools and resizing
    'MaxPool': max_pool,
    'AveragePool': average_pool,
    'GlobalAveragePool': global_average_pool,
    'GlobalMaxPool': global_max_pool,
    'Resize': resize,
    'DepthToSpace': depth_to_space,
    'SpaceToDepth': space_to_depth,
    # sums over axes
    'ReduceMean': reduction(layers.in_wide(jnp.mean), np.mean),
    'ReduceSum': reduction(_sum, np.sum),
    'ReduceMax': reduction(jnp.max, np.max),
    'ReduceMin': reduction(jnp.min, np.min),
    'ReduceProd': reduction(jnp.prod, np.prod),
    'ReduceL1': reduction(_l1, _l1),
    'ReduceL2': reduction(_l2, _l2),
    'ReduceSumSquare': reduction(_of_squares, _of_squares),
    'ArgMax': argmax,
    'CumSum': cumsum,
    # shapes
    'Shape': shape,
    'Size': size_of,
    'Reshape': reshape,
    'Flatten': flatten,
    'Transpose': transpose,
    'Squeeze': squeeze,
    'Unsqueeze': unsqueeze,
    'Concat': concat,
    'Split': split_,
    'SplitToSequence': split_to_sequence,
    'SequenceAt': sequence_at,
    'Slice': slice_,
    'Gather': gather,
    'GatherElements': gather_elements,
    'GatherND': gather_nd,
    'ScatterND': scatter_nd,
    'Expand': expand,
    'Tile': tile,
    'Pad': pad,
    'Trilu': trilu,
    # new arrays
    'ConstantOfShape': constant_of_shape,
    'Range': range_,
    'EyeLike': eye_like,
}

DIALECT = Dialect(
    operators=OPERATORS,
    norms=frozenset(['BatchNormalization']),
    batch_norms=frozenset(),
    other_norms=frozenset(
        'LayerNormalization InstanceNormalization GroupNormalization RMSNormalization'.split()
    ),
    layers=frozenset('Gemm MatMul Conv'.split()),
    convolutions=frozenset(['Conv']),
    passing=frozenset(
        'Add Sub Mul Div Reshape Flatten Transpose Unsqueeze Squeeze Identity Cast CastLike '
        'Dropout ReduceMean ReduceSum Sum Mean Concat Gather Slice Relu AveragePool '
        'GlobalAveragePool'.split()
    ),
    softmaxes=frozenset('Softmax LogSoftmax'.split()),
    resizing=frozenset('Conv MaxPool AveragePool GlobalAveragePool ReduceMean'.split()),
    measuring=frozenset(['Shape', 'Size']),
)
