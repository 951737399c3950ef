"""What both tables of operators compute with: arithmetic, layers and resizing on [B, C, H, W].

An array is traced (JAX's: what depends on images or weights) or on the host (NumPy's and Python's:
sizes, indices, constants).  Of host arrays alone, NumPy computes, so that sizes stay numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from dfkd_jax.models import layers
from dfkd_jax.models.layers import wide

Pads = Sequence[tuple[int, int]]  # before and after, for each axis

HOST_NUMBERS = 2**16  # of a larger constant, one value is stored and not all
MOST_NUMBERS = 2**31  # of any array: 8 GB
MOST_ON_HOST = 2**24  # of one that NumPy makes, at once and not in a compiled program


# 1. Hosts and types


def on_host(*arrays: Any) -> bool:
    """Whether NumPy computes of these."""
    return not any(isinstance(x, jax.Array) for x in arrays)


def sized(shape: Sequence[int], on_host: bool = False) -> tuple[int, ...]:
    """A shape.  Raises ValueError for one that no image classifier makes."""
    most = MOST_ON_HOST if on_host else MOST_NUMBERS
    if any(size < 0 for size in shape) or math.prod(shape) > most:
        raise ValueError(f'makes an array of shape {list(shape)}')
    return tuple(int(size) for size in shape)


def full(shape: Sequence[int], value: Any, kind: Any = None) -> Any:
    """An array of one value; on the host if it is small.  kind: its type, else the value's."""
    shape = sized(shape)
    if math.prod(shape) <= HOST_NUMBERS:
        return host(np.full(shape, value), kind)
    return jnp.full(shape, value, None if kind is None else jax.dtypes.canonicalize_dtype(kind))


def host(array: Any, kind: Any = None) -> np.ndarray:
    """An array on the host; of floating-point numbers, in float64 whatever the `kind`."""
    array = np.asarray(array)
    kind = array.dtype if kind is None else kind
    return array.astype(np.float64 if jnp.issubdtype(kind, jnp.floating) else kind)


def cast(x: Any, kind: Any) -> Any:
    """`x` of another type."""
    return host(x, kind) if on_host(x) else x.astype(jax.dtypes.canonicalize_dtype(kind))


def floating(x: Any) -> bool:
    return jnp.issubdtype(jnp.asarray(x).dtype if on_host(x) else x.dtype, jnp.floating)


def together(*arrays: Any) -> list[Any]:
    """Arrays of one rank and one type, as the operators of both formats take them.

    Numbers on the host never widen a traced array: they are constants that the exporter wrote, and
    their type is that of the network it saw.
    """
    if on_host(*arrays):
        sized(np.broadcast_shapes(*(np.shape(x) for x in arrays)), True)
        return list(arrays)
    shaped = [x for x in arrays if isinstance(x, jax.Array)]
    # A traced number without axes does not widen an array that has some.
    deciding = [x for x in shaped if x.ndim] or shaped
    kinds = [x.dtype for x in deciding if floating(x)] or [x.dtype for x in shaped if floating(x)]
    if kinds:
        kind = max(kinds, key=lambda kind: jnp.finfo(kind).bits)
    elif any(floating(x) for x in arrays):
        kind = jnp.result_type(float)
    else:
        with jax.numpy_dtype_promotion('standard'):
            kind = jnp.result_type(*shaped, *(x for x in arrays if isinstance(x, np.ndarray)))
    rank = max(np.ndim(x) for x in arrays)
    found = [jnp.asarray(x).astype(kind) for x in arrays]
    return [x.reshape((1,) * (rank - x.ndim) + x.shape) for x in found]


def of_one_type(arrays: Sequence[Any]) -> list[Any]:
    """Arrays of one type, whatever their ranks."""
    if on_host(*arrays):
        sized((sum(np.size(x) for x in arrays),), True)
        return list(arrays)
    kind = together(*(jnp.ravel(x)[:1] if np.ndim(x) else x for x in arrays))[0].dtype
    return [jnp.asarray(x).astype(kind) for x in arrays]


def elementwise(name: str) -> Callable[..., Any]:
    """The function of that name, which NumPy and JAX have, of two arrays."""

    def call(x: Any, other: Any) -> Any:
        numbers = np if on_host(x, other) else jnp
        return getattr(numbers, name)(*together(x, other))

    return call


def each(name: str) -> Callable[..., Any]:
    """The function of that name, which NumPy and JAX have, of one array."""

    def call(x: Any) -> Any:
        return getattr(np if on_host(x) else jnp, name)(x)

    return call


add, subtract, multiply = (elementwise(name) for name in ('add', 'subtract', 'multiply'))
maximum, minimum, power = (elementwise(name) for name in ('maximum', 'minimum', 'power'))


def where(condition: Any, x: Any, other: Any) -> Any:
    if on_host(condition, x, other):
        return np.where(*together(condition, x, other))
    x, other = together(
        *(jnp.asarray(v) if on_host(v) and on_host(x, other) else v for v in (x, other))
    )
    rank = max(np.ndim(v) for v in (condition, x, other))
    condition, x, other = (
        jnp.asarray(v).reshape((1,) * (rank - np.ndim(v)) + np.shape(v))
        for v in (condition, x, other)
    )
    return jnp.where(condition.astype(bool), x, other)


def in_wide(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of one array that computes in float32 at least, and returns the array's type."""

    def call(x: Any, *rest: Any, **keywords: Any) -> Any:
        x = jnp.asarray(x)
        if not floating(x):
            x = x.astype(jnp.result_type(float))
        return function(wide(x), *rest, **keywords).astype(x.dtype)

    return call


def axes_of(x: Any, axes: Any) -> tuple[int, ...]:
    """Axes as a tuple without negative numbers; all of them for None or none."""
    rank = np.ndim(x)
    listed = [] if axes is None else np.ravel(axes).tolist()
    return tuple(sorted(int(axis) % rank for axis in listed)) or tuple(range(rank))


# 2. Layers


def linear(x: Any, weight: Any, bias: Any = None) -> Any:
    """x [..., in] times weight [out, in], plus bias."""
    return matmul(x, jnp.swapaxes(weight, -1, -2), bias)


def matmul(x: Any, other: Any, bias: Any = None) -> Any:
    """The product of matrices, of which those of lower rank are repeated; plus bias."""
    rank = max(np.ndim(x), np.ndim(other))
    vector, column = np.ndim(x) == 1, np.ndim(other) == 1
    x, other = (v[None] if v.ndim == 1 else v for v in map(jnp.asarray, (x, other)))
    if column:
        other = jnp.swapaxes(other, -1, -2)
    if rank > 2 and other.ndim == 2:  # as one product and not one for each of a batch
        x, other = of_one_type((x, other))
    else:
        x, other = together(x, other)
    y = jnp.matmul(x, other)
    y = y if bias is None else add(y, cast(bias, y.dtype))
    if vector:
        y = jnp.squeeze(y, -2)
    return jnp.squeeze(y, -1) if column else y


def convolution(
    x: Any,
    weight: Any,
    bias: Any,
    strides: Sequence[int],
    pads: Pads,
    dilations: Sequence[int],
    groups: int,
) -> Any:
    """[B, C, H, W] and [out, C / groups, h, w], or both with one axis of space less.

    Computed channels-last, as the zoo does: a CPU takes a tenth of the time for one kernel for each
    channel, and no longer for others.
    """
    x, weight = of_one_type((x, weight))
    if x.ndim not in (3, 4) or weight.ndim != x.ndim:
        raise ValueError(f'a convolution of {x.ndim - 2} axes, and only one or two are read')
    flat = x.ndim == 3
    if flat:
        x, weight = x[:, :, None], weight[:, :, None]
        strides, pads, dilations = (1, *strides), ((0, 0), *pads), (1, *dilations)
    x, kernel = x.transpose(0, 2, 3, 1), weight.transpose(2, 3, 1, 0)
    settings: dict[str, Any] = {
        'dimension_numbers': ('NHWC', 'HWIO', 'NHWC'),
        'feature_group_count': groups,
    }
    if tuple(dilations) == (1, 1):
        y = layers.convolve(x, kernel, tuple(strides), tuple(pads), **settings)
    else:
        y = lax.conv_general_dilated(
            x, kernel, tuple(strides), tuple(pads), rhs_dilation=tuple(dilations), **settings
        )
    y = y.transpose(0, 3, 1, 2)
    y = y[:, :, 0] if flat else y
    return y if bias is None else y + channels(bias, y)


def channels(vector: Any, x: Any) -> Any:
    """One number for each channel, shaped and typed to be added to x [B, C, ...]."""
    return jnp.asarray(vector).astype(x.dtype).reshape(1, -1, *(1,) * (x.ndim - 2))


def batch_norm(x: Any, weight: Any, bias: Any, mean: Any, variance: Any, epsilon: float) -> Any:
    """One multiplication and one addition, as the zoo's `layers.BatchNorm`."""
    scale = lax.rsqrt(wide(variance) + epsilon)
    scale = scale if weight is None else scale * wide(jnp.asarray(weight))
    shift = -wide(mean) * scale
    shift = shift if bias is None else shift + wide(jnp.asarray(bias))
    return x * channels(scale, x) + channels(shift, x)


def moments(x: Any, axis_name: str | None) -> dict[str, Any]:
    """The mean and biased variance of each channel of x [B, C, ...], over all shards of it."""
    axes = (0, *range(2, x.ndim))
    x = wide(x)
    mean, square = jnp.mean(x, axes), jnp.mean(jnp.square(x), axes)
    if axis_name is not None:
        mean, square = lax.pmean((mean, square), axis_name)
    return {'mean': mean, 'var': jnp.maximum(square - jnp.square(mean), 0.0)}


def normalised(x: Any, axes: tuple[int, ...], epsilon: float) -> tuple[Any, Any, Any]:
    """`x` with mean 0 and variance 1 along axes, in float32; its mean, 1 / deviation."""
    x = wide(x)
    mean = jnp.mean(x, axes, keepdims=True)
    centred = x - mean
    scale = lax.rsqrt(jnp.mean(jnp.square(centred), axes, keepdims=True) + epsilon)
    return centred * scale, mean, scale


def layer_norm(x: Any, rank: int, weight: Any, bias: Any, epsilon: float) -> Any:
    """Over the last `rank` axes."""
    y, _, _ = normalised(x, tuple(range(x.ndim - rank, x.ndim)), epsilon)
    y = y if weight is None else multiply(y, wide(jnp.asarray(weight)))
    y = y if bias is None else add(y, wide(jnp.asarray(bias)))
    return y.astype(x.dtype)


def group_norm(x: Any, groups: int, weight: Any, bias: Any, epsilon: float) -> Any:
    """Of x [B, C, ...], over the channels of a group and all pixels."""
    grouped = x.reshape(x.shape[0], groups, -1)
    y, _, _ = normalised(grouped, (2,), epsilon)
    y = y.reshape(x.shape)
    y = y if weight is None else y * channels(weight, y)
    y = y if bias is None else y + channels(bias, y)
    return y.astype(x.dtype)


def attention(
    query: Any, key: Any, value: Any, mask: Any = None, causal: bool = False, scale: Any = None
) -> Any:
    """softmax(query key' scale + mask) value, of [..., tokens, width]."""
    query, key, value = together(query, key, value)
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    scores = wide(jnp.matmul(query * jnp.asarray(scale, query.dtype), jnp.swapaxes(key, -1, -2)))
    if causal:
        mask = np.tril(np.ones(scores.shape[-2:], bool))
    if mask is not None and floating(mask):
        scores = add(scores, cast(mask, scores.dtype) if not on_host(mask) else mask)
    elif mask is not None:
        scores = where(mask, scores, -jnp.inf)
    return jnp.matmul(jax.nn.softmax(scores, -1).astype(value.dtype), value)


# 3. Activations.  At a kink, the gradient is PyTorch's.


def clamp(x: Any, least: Any = None, most: Any = None) -> Any:
    """The gradient is 1 at the bounds."""
    if on_host(x):
        return np.clip(x, least, most)
    for bound, outside in ((least, jnp.less), (most, jnp.greater)):
        if bound is not None:
            x, bound = together(x, bound)
            x = jnp.where(outside(x, bound), bound, x)
    return x


def hardtanh(x: Any, least: float = -1.0, most: float = 1.0) -> Any:
    """The gradient is 0 at the bounds."""
    inside = (x > least) & (x < most)
    return jnp.where(inside, x, lax.stop_gradient(jnp.clip(x, least, most)))


def hardsigmoid(x: Any, slope: float = 1 / 6, middle: float = 0.5) -> Any:
    return hardtanh(x * slope + middle, 0.0, 1.0)


def gelu(x: Any, approximate: str = 'none') -> Any:
    if approximate == 'tanh':
        return 0.5 * x * (1 + jnp.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    return 0.5 * x * (1 + lax.erf(x * math.sqrt(0.5)))


# 4. Windows: pools


def window_count(
    size: int, kernel: int, stride: int, pad: tuple[int, int], dilation: int, ceil_mode: bool
) -> int:
    """How many windows lie along an axis; the last one begins inside the map or its left pad."""
    room = size + sum(pad) - dilation * (kernel - 1) - 1
    count = (-(-room // stride) if ceil_mode else room // stride) + 1
    if ceil_mode and (count - 1) * stride >= size + pad[0]:
        count -= 1
    return count


def same_pads(
    sizes: Sequence[int],
    kernel: Sequence[int],
    strides: Sequence[int],
    dilations: Sequence[int],
    more_after: bool = True,
) -> list[tuple[int, int]]:
    """TensorFlow's padding, with which a map shrinks by its stride."""
    found = []
    for size, width, stride, dilation in zip(sizes, kernel, strides, dilations):
        reach = (-(-size // stride) - 1) * stride + dilation * (width - 1) + 1
        total = max(reach - size, 0)
        before = total // 2 if more_after else total - total // 2
        found.append((before, total - before))
    return found


def _reduce(
    x: Any,
    start: Any,
    function: Any,
    kernel: Sequence[int],
    strides: Sequence[int],
    pads: Pads,
    dilations: Sequence[int],
    ceil_mode: bool,
) -> Any:
    sizes, filled = x.shape[2:], []
    for size, k, s, pad, d in zip(sizes, kernel, strides, pads, dilations):
        count = window_count(size, k, s, pad, d, ceil_mode)
        filled.append((pad[0], max((count - 1) * s + d * (k - 1) + 1 - size - pad[0], 0)))
    start = np.asarray(start, x.dtype)
    return lax.reduce_window(
        x,
        start,
        function,
        (1, 1, *kernel),
        (1, 1, *strides),
        ((0, 0), (0, 0), *filled),
        window_dilation=(1, 1, *dilations),
    )


def max_pool(
    x: Any,
    kernel: Sequence[int],
    strides: Sequence[int],
    pads: Pads,
    dilations: Sequence[int],
    ceil_mode: bool,
) -> Any:
    return _reduce(x, -jnp.inf, lax.max, kernel, strides, pads, dilations, ceil_mode)


def average_pool(
    x: Any,
    kernel: Sequence[int],
    strides: Sequence[int],
    pads: Pads,
    ceil_mode: bool,
    count_pads: bool,
    divisor: int | None = None,
) -> Any:
    """count_pads: whether pixels of the pads count; what lies beyond them never does."""
    ones = (1,) * len(kernel)
    total = _reduce(wide(x), 0.0, lax.add, kernel, strides, pads, ones, ceil_mode)
    shares = np.ones(ones)
    for axis, (size, k, s, pad) in enumerate(zip(x.shape[2:], kernel, strides, pads)):
        starts = s * np.arange(total.shape[2 + axis]) - pad[0]
        ends = np.minimum(starts + k, size + pad[1])
        if not count_pads:
            starts, ends = np.maximum(starts, 0), np.minimum(ends, size)
        row = [1] * len(kernel)
        row[axis] = -1
        shares = shares / (ends - starts).reshape(row)
    if divisor:
        shares = np.full(ones, 1 / divisor)
    return (total * jnp.asarray(shares, total.dtype)[None, None]).astype(x.dtype)


# 5. Resizing: a matrix for each axis


def along_axes(x: Any, matrices: Sequence[np.ndarray]) -> Any:
    """Multiplies each axis of space of x [B, C, ...] by a matrix [new size, size]."""
    y = wide(x)
    for axis, matrix in enumerate(matrices, start=2):
        if not np.array_equal(matrix, np.eye(*matrix.shape)):
            y = jnp.tensordot(y, jnp.asarray(matrix, y.dtype), ((axis,), (1,)))
            y = jnp.moveaxis(y, -1, axis)
    return y.astype(x.dtype)


def adaptive_average_pool(x: Any, sizes: Sequence[int]) -> Any:
    """Means over windows that overlap where sizes do not divide."""
    if all(size == 1 for size in sizes):
        axes = tuple(range(x.ndim - len(sizes), x.ndim))
        return jnp.mean(wide(x), axes, keepdims=True).astype(x.dtype)
    return along_axes(x, [_means(old, new) for old, new in zip(x.shape[-len(sizes) :], sizes)])


def _means(old: int, new: int) -> np.ndarray:
    sized((new, old), True)
    row, column = np.arange(new)[:, None], np.arange(old)
    inside = (column >= row * old // new) & (column < -(-(row + 1) * old // new))
    return inside / inside.sum(1, keepdims=True)


def resized(
    x: Any,
    sizes: Sequence[int],
    kind: str,
    align_corners: bool = False,
    scales: Sequence[float | None] = (None, None),
    cubic: float = -0.75,
) -> Any:
    """Maps [B, C, H, W] of other sizes.  kind: nearest / linear / cubic.

    scales: new by old size, where they differ from that of `sizes`.
    """
    return along_axes(
        x,
        [
            _interpolation(old, new, kind, align_corners, scale, cubic)
            for old, new, scale in zip(x.shape[2:], sizes, scales)
        ],
    )


def _interpolation(
    old: int, new: int, kind: str, align_corners: bool, scale: float | None, cubic: float
) -> np.ndarray:
    """The matrix [new, old] of one axis."""
    sized((new, old), True)
    step = old / new if not scale else 1 / scale
    place = np.arange(new)
    if align_corners:
        at = place * ((old - 1) / (new - 1) if new > 1 else 0.0)
    elif kind == 'nearest':
        at = np.floor(place * step)
    else:
        at = (place + 0.5) * step - 0.5
    if kind == 'linear':
        at = np.clip(at, 0, old - 1)
    first = np.floor(at).astype(int)
    part = at - first
    if kind == 'nearest':
        taps = {0: np.ones(new)}
    elif kind == 'linear':
        taps = {0: 1 - part, 1: part}
    else:
        taps = {i: _cubic(np.abs(part - i), cubic) for i in (-1, 0, 1, 2)}
    matrix = np.zeros((new, old))
    for offset, weight in taps.items():
        np.add.at(matrix, (place, np.clip(first + offset, 0, old - 1)), weight)
    return matrix


def _cubic(distance: np.ndarray, a: float) -> np.ndarray:
    """Keys' kernel of cubic convolution (1981)."""
    near = ((a + 2) * distance - (a + 3)) * distance**2 + 1
    far = a * (((distance - 5) * distance + 8) * distance - 4)
    return np.where(distance <= 1, near, np.where(distance < 2, far, 0.0))


# 6. Shapes


def expanded(x: Any, shape: Sequence[int]) -> Any:
    """`x` repeated along axes of size 1; -1: as it is."""
    shape, old = list(shape), (1,) * (len(shape) - np.ndim(x)) + tuple(np.shape(x))
    shape = sized([o if new == -1 else new for new, o in zip(shape, old)])
    numbers = np if on_host(x) and math.prod(shape) <= HOST_NUMBERS else jnp
    return numbers.broadcast_to(x, shape)


def taken(x: Any, indices: Any, axis: int) -> Any:
    """The entries of an axis at indices, which are not negative."""
    if on_host(x, indices) and np.size(x) * np.size(indices) <= MOST_ON_HOST:
        return np.take(x, indices, axis)
    return jnp.take(jnp.asarray(x), jnp.asarray(indices), axis)


def sliced(x: Any, axis: int, start: Any, end: Any, step: int = 1) -> Any:
    """Every `step`-th entry of an axis; bounds beyond the ends are the ends."""
    place = [slice(None)] * np.ndim(x)
    place[axis % np.ndim(x)] = slice(start, end, step)
    return x[tuple(place)]


def depth_to_space(x: Any, block: int, channels_first: bool = True) -> Any:
    """[B, C * b * b, H, W] -> [B, C, H * b, W * b]; channels_first: as torch.nn.PixelShuffle."""
    b, c, h, w = x.shape
    if channels_first:
        x = x.reshape(b, -1, block, block, h, w).transpose(0, 1, 4, 2, 5, 3)
    else:
        x = x.reshape(b, block, block, -1, h, w).transpose(0, 3, 4, 1, 5, 2)
    return x.reshape(b, c // block**2, h * block, w * block)


def space_to_depth(x: Any, block: int, channels_first: bool = True) -> Any:
    """The inverse of `depth_to_space`."""
    b, c, h, w = x.shape
    x = x.reshape(b, c, h // block, block, w // block, block)
    order = (0, 1, 3, 5, 2, 4) if channels_first else (0, 3, 5, 1, 2, 4)
    return x.transpose(order).reshape(b, c * block**2, h // block, w // block)


def padded(x: Any, pads: Pads, mode: str = 'constant', value: Any = 0.0) -> Any:
    """Pads for every axis, negative ones crop.  mode: constant / reflect / edge / wrap."""
    cut = tuple(slice(max(-a, 0), n - max(-b, 0)) for (a, b), n in zip(pads, np.shape(x)))
    x, rest = x[cut], [(max(a, 0), max(b, 0)) for a, b in pads]
    sized([n + a + b for n, (a, b) in zip(np.shape(x), rest)], on_host(x))
    keywords = {'constant_values': value} if mode == 'constant' else {}
    if on_host(x):
        return np.pad(x, rest, mode, **keywords)  # type: ignore[call-overload]
    if keywords:
        keywords = {'constant_values': jnp.asarray(value).astype(x.dtype)}
    return jnp.pad(x, rest, mode, **keywords)
