"""PyTorch's operators (ATen), as far as image classifiers use them, by name.

A function's parameters have the names of PyTorch's schema (native_functions.yaml), but for `self`
and `input`, which are `x`.  What an operator's overloads ('aten.add.Tensor') share is one function
under its name ('aten.add'); an overload that differs has a row of its own.
"""

from __future__ import annotations

import math
import operator
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


def add(x: Any, other: Any, alpha: Any = 1) -> Any:
    return layers.add(x, other if alpha == 1 else layers.multiply(other, alpha))


def sub(x: Any, other: Any, alpha: Any = 1) -> Any:
    return layers.subtract(x, other if alpha == 1 else layers.multiply(other, alpha))


def rsub(x: Any, other: Any, alpha: Any = 1) -> Any:
    return sub(other, x, alpha)


def div(x: Any, other: Any, rounding_mode: str | None = None) -> Any:
    if rounding_mode == 'floor':
        return elementwise('floor_divide')(x, other)
    numbers = np if on_host(x, other) else jnp
    x, other = layers.together(x, other)
    if not on_host(x) and not layers.floating(x):
        x, other = (v.astype(jnp.result_type(float)) for v in (x, other))
    quotient = numbers.true_divide(x, other)
    return numbers.trunc(quotient) if rounding_mode == 'trunc' else quotient


def pow_(x: Any, exponent: Any) -> Any:
    if isinstance(exponent, int | float) and not on_host(x):
        # A whole power is a product: its gradient is right at 0 and below.
        whole = float(exponent).is_integer() and layers.floating(x)
        return jax.lax.integer_pow(x, int(exponent)) if whole else x**exponent
    return layers.power(x, exponent)


def addcmul(x: Any, tensor1: Any, tensor2: Any, value: Any = 1) -> Any:
    return add(x, layers.multiply(tensor1, tensor2), value)


def addcdiv(x: Any, tensor1: Any, tensor2: Any, value: Any = 1) -> Any:
    return add(x, div(tensor1, tensor2), value)


def lerp(x: Any, end: Any, weight: Any) -> Any:
    return add(x, layers.multiply(sub(end, x), weight))


def where(condition: Any, x: Any, other: Any) -> Any:
    return layers.where(condition, x, other)


def masked_fill(x: Any, mask: Any, value: Any) -> Any:
    return layers.where(mask, value, x)


def clamp(x: Any, min: Any = None, max: Any = None) -> Any:
    return layers.clamp(x, min, max)


def to(x: Any, dtype: Any = None) -> Any:
    return x if dtype is None else cast(x, dtype)


def type_as(x: Any, other: Any) -> Any:
    return cast(x, np.asarray(other).dtype if on_host(other) else other.dtype)


def same(x: Any) -> Any:
    return x


def copy(x: Any, src: Any) -> Any:
    return layers.expanded(type_as(src, x), np.shape(x))


def comparison(name: str) -> Callable[..., Any]:
    return elementwise(name)


def nothing(*arguments: Any, **keywords: Any) -> None:
    """An assertion on sizes, which the shapes of arrays keep here."""


def dropout(x: Any, p: float, train: bool) -> Any:
    if train:
        raise ValueError('drops numbers at random, as in training')
    return x


# 2. Linear layers and convolutions


def linear(x: Any, weight: Any, bias: Any = None) -> Any:
    return layers.linear(x, weight, bias)


def addmm(x: Any, mat1: Any, mat2: Any, beta: Any = 1, alpha: Any = 1) -> Any:
    product = layers.matmul(mat1, mat2)
    product = product if alpha == 1 else layers.multiply(product, alpha)
    return add(product, x, beta)


def baddbmm(x: Any, batch1: Any, batch2: Any, beta: Any = 1, alpha: Any = 1) -> Any:
    return addmm(x, batch1, batch2, beta, alpha)


def mm(x: Any, mat2: Any) -> Any:
    return layers.matmul(x, mat2)


def matmul(x: Any, other: Any) -> Any:
    return layers.matmul(x, other)


def einsum(equation: str, tensors: Sequence[Any], path: Any = None) -> Any:
    del path
    return jnp.einsum(equation, *layers.of_one_type(tensors))


def conv(
    x: Any,
    weight: Any,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Any:
    rank = x.ndim - 2
    stride, dilation = many(stride, rank), many(dilation, rank)
    if isinstance(padding, str):
        kernel = weight.shape[2:]
        if padding == 'valid':
            pads = [(0, 0)] * rank
        else:  # 'same', which PyTorch has for stride 1 alone
            pads = layers.same_pads(x.shape[2:], kernel, stride, dilation)
    else:
        pads = [(pad, pad) for pad in many(padding, rank)]
    return layers.convolution(x, weight, bias, stride, pads, dilation, groups)


def convolution(
    x: Any,
    weight: Any,
    bias: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    transposed: bool,
    output_padding: Any,
    groups: int,
) -> Any:
    if transposed:
        raise ValueError('a transposed convolution is not read')
    return conv(x, weight, bias, stride, padding, dilation, groups)


def many(value: Any, rank: int) -> tuple[int, ...]:
    """One number for each axis of space."""
    listed = tuple(value) if isinstance(value, list | tuple) else (value,)
    return listed if len(listed) == rank else listed * rank


def embedding(
    weight: Any,
    indices: Any,
    padding_idx: int = -1,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Any:
    return layers.taken(weight, indices, 0)


def scaled_dot_product_attention(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: Any = None,
    enable_gqa: bool = False,
) -> Any:
    if dropout_p or enable_gqa:
        raise ValueError('attention with dropout, or with fewer keys than queries, is not read')
    return layers.attention(query, key, value, attn_mask, is_causal, scale)


# 3. Normalisation


def native_batch_norm(
    x: Any, weight: Any, bias: Any, running_mean: Any, running_var: Any, momentum: float, eps: float
) -> Any:
    nobody = np.zeros(0)
    return layers.batch_norm(x, weight, bias, running_mean, running_var, eps), nobody, nobody


def batch_norm(
    x: Any,
    weight: Any,
    bias: Any,
    running_mean: Any,
    running_var: Any,
    training: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool,
) -> Any:
    if training:
        raise ValueError("normalises with the batch's own moments, as in training")
    return layers.batch_norm(x, weight, bias, running_mean, running_var, eps)


def own_batch_norm(
    x: Any, weight: Any, bias: Any, training: bool, momentum: float, eps: float
) -> Any:
    """Of weights: a network that standardises them has it."""
    axes = (0, *range(2, x.ndim))
    y, mean, scale = layers.normalised(x, axes, eps)
    y = y if weight is None else y * layers.channels(weight, y)
    y = y if bias is None else y + layers.channels(bias, y)
    return y.astype(x.dtype), mean.ravel(), scale.ravel()


def native_layer_norm(x: Any, normalized_shape: Any, weight: Any, bias: Any, eps: float) -> Any:
    axes = tuple(range(x.ndim - len(normalized_shape), x.ndim))
    _, mean, scale = layers.normalised(x, axes, eps)
    return layer_norm(x, normalized_shape, weight, bias, eps), mean, scale


def layer_norm(
    x: Any,
    normalized_shape: Any,
    weight: Any = None,
    bias: Any = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> Any:
    return layers.layer_norm(x, len(normalized_shape), weight, bias, eps)


def rms_norm(x: Any, normalized_shape: Any, weight: Any = None, eps: float | None = None) -> Any:
    axes = tuple(range(x.ndim - len(normalized_shape), x.ndim))
    eps = float(jnp.finfo(x.dtype).eps) if eps is None else eps
    y = wide(x)
    y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axes, keepdims=True) + eps)
    return (y if weight is None else layers.multiply(y, wide(weight))).astype(x.dtype)


def group_norm(
    x: Any,
    num_groups: int,
    weight: Any = None,
    bias: Any = None,
    eps: float = 1e-5,
    cudnn_enabled: bool = True,
) -> Any:
    return layers.group_norm(x, num_groups, weight, bias, eps)


def native_group_norm(
    x: Any, weight: Any, bias: Any, N: int, C: int, HxW: int, group: int, eps: float
) -> Any:
    _, mean, scale = layers.normalised(x.reshape(N, group, -1), (2,), eps)
    return layers.group_norm(x, group, weight, bias, eps), mean[..., 0], scale[..., 0]


def instance_norm(
    x: Any,
    weight: Any,
    bias: Any,
    running_mean: Any,
    running_var: Any,
    use_input_stats: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool,
) -> Any:
    if not use_input_stats:
        raise ValueError('an instance norm with running statistics is not read')
    return layers.group_norm(x, x.shape[1], weight, bias, eps)


def softmax(x: Any, dim: int, half_to_float: bool = False, dtype: Any = None) -> Any:
    return layers.in_wide(jax.nn.softmax)(to(x, dtype), dim)


def log_softmax(x: Any, dim: int, half_to_float: bool = False, dtype: Any = None) -> Any:
    return layers.in_wide(jax.nn.log_softmax)(to(x, dtype), dim)


# 4. Activations


def elu(x: Any, alpha: float = 1.0, scale: float = 1.0, input_scale: float = 1.0) -> Any:
    negative = alpha * jnp.expm1(jnp.where(x > 0, 0.0, x) * input_scale)
    return scale * jnp.where(x > 0, x, negative)


def selu(x: Any) -> Any:
    return elu(x, 1.6732632423543772848170429916717, 1.0507009873554804934193349852946)


def celu(x: Any, alpha: float = 1.0) -> Any:
    return elu(x, alpha, 1.0, 1 / alpha)


def leaky_relu(x: Any, negative_slope: float = 0.01) -> Any:
    return jnp.where(x > 0, x, x * negative_slope)


def prelu(x: Any, weight: Any) -> Any:
    weight = cast(weight, x.dtype)
    weight = layers.channels(weight, x) if np.size(weight) > 1 else jnp.reshape(weight, ())
    return jnp.where(x > 0, x, x * weight)


def softplus(x: Any, beta: float = 1.0, threshold: float = 20.0) -> Any:
    straight = x * beta > threshold
    return jnp.where(straight, x, jnp.logaddexp(jnp.where(straight, 0, x) * beta, 0.0) / beta)


def mish(x: Any) -> Any:
    return x * jnp.tanh(softplus(x))


def glu(x: Any, dim: int = -1) -> Any:
    first, second = jnp.split(x, 2, dim)
    return first * jax.nn.sigmoid(second)


def hardtanh(x: Any, min_val: float = -1.0, max_val: float = 1.0) -> Any:
    return layers.hardtanh(x, min_val, max_val)


def gelu(x: Any, approximate: str = 'none') -> Any:
    return layers.gelu(x, approximate)


# 5. Pools and resizing


def max_pool(
    x: Any,
    kernel_size: Any,
    stride: Any = (),
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
) -> Any:
    rank = x.ndim - 2
    kernel = many(kernel_size, rank)
    pads = [(pad, pad) for pad in many(padding, rank)]
    return layers.max_pool(
        x, kernel, many(stride, rank) if stride else kernel, pads, many(dilation, rank), ceil_mode
    )


def max_pool_with_indices(
    x: Any,
    kernel_size: Any,
    stride: Any = (),
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
) -> Any:
    return max_pool(x, kernel_size, stride, padding, dilation, ceil_mode), np.zeros(0)


def avg_pool(
    x: Any,
    kernel_size: Any,
    stride: Any = (),
    padding: Any = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Any:
    rank = x.ndim - 2
    kernel = many(kernel_size, rank)
    pads = [(pad, pad) for pad in many(padding, rank)]
    return layers.average_pool(
        x,
        kernel,
        many(stride, rank) if stride else kernel,
        pads,
        ceil_mode,
        count_include_pad,
        divisor_override,
    )


def adaptive_avg_pool(x: Any, output_size: Any) -> Any:
    return layers.adaptive_average_pool(x, output_size)


def adaptive_max_pool2d(x: Any, output_size: Any) -> Any:
    for old, new in zip(x.shape[-2:], output_size):
        if old % new:
            raise ValueError(f'the maximum over {new} uneven parts of {old} pixels is not read')
    (h, w), (rows, columns) = x.shape[-2:], output_size
    parts = x.reshape(*x.shape[:-2], rows, h // rows, columns, w // columns)
    return jnp.max(parts, (-3, -1)), np.zeros(0)


def _new_sizes(x: Any, output_size: Any, factors: Any) -> tuple[Any, Any]:
    if output_size is not None:
        return output_size, (None, None)
    return [math.floor(n * f) for n, f in zip(x.shape[2:], factors)], factors


def upsample_nearest(x: Any, output_size: Any = None, scale_factors: Any = None) -> Any:
    sizes, scales = _new_sizes(x, output_size, scale_factors)
    return layers.resized(x, sizes, 'nearest', scales=scales)


def upsample_linear(
    x: Any, output_size: Any, align_corners: bool, scale_factors: Any = None
) -> Any:
    sizes, scales = _new_sizes(x, output_size, scale_factors)
    return layers.resized(x, sizes, 'linear', align_corners, scales)


def upsample_cubic(x: Any, output_size: Any, align_corners: bool, scale_factors: Any = None) -> Any:
    sizes, scales = _new_sizes(x, output_size, scale_factors)
    return layers.resized(x, sizes, 'cubic', align_corners, scales)


def pixel_shuffle(x: Any, upscale_factor: int) -> Any:
    return layers.depth_to_space(x, upscale_factor)


def pixel_unshuffle(x: Any, downscale_factor: int) -> Any:
    return layers.space_to_depth(x, downscale_factor)


def channel_shuffle(x: Any, groups: int) -> Any:
    b, c, h, w = x.shape
    return x.reshape(b, groups, c // groups, h, w).swapaxes(1, 2).reshape(b, c, h, w)


# 6. Sums over axes


def reduction(name: str, in_float: bool = False) -> Callable[..., Any]:
    """A sum over axes; in_float: computed in float32 at least."""

    def call(x: Any, dim: Any = None, keepdim: bool = False, dtype: Any = None) -> Any:
        x, axes = to(x, dtype), layers.axes_of(x, dim)
        if on_host(x):
            return getattr(np, name)(x, axes, keepdims=keepdim)
        function = getattr(jnp, name)
        if in_float:
            return layers.in_wide(function)(x, axes, keepdims=keepdim)
        return function(x, axes, keepdims=keepdim)

    return call


def of_axis(name: str) -> Callable[..., Any]:
    """max.dim and min.dim: values and their places."""

    def call(x: Any, dim: int, keepdim: bool = False) -> Any:
        place = getattr(jnp, f'arg{name}')(x, dim, keepdims=True)
        value = jnp.take_along_axis(x, place, dim)
        return (value, place) if keepdim else (value.squeeze(dim), place.squeeze(dim))

    return call


def variance(
    x: Any, dim: Any = None, correction: Any = None, keepdim: bool = False, unbiased: bool = True
) -> Any:
    ddof = int(unbiased) if correction is None else correction
    axes = layers.axes_of(x, dim)
    return layers.in_wide(jnp.var)(x, axes, ddof=ddof, keepdims=keepdim)


def deviation(
    x: Any, dim: Any = None, correction: Any = None, keepdim: bool = False, unbiased: bool = True
) -> Any:
    return jnp.sqrt(variance(x, dim, correction, keepdim, unbiased))


def var_mean(
    x: Any, dim: Any = None, correction: Any = None, keepdim: bool = False, unbiased: bool = True
) -> Any:
    mean = reduction('mean', in_float=True)(x, dim, keepdim)
    return variance(x, dim, correction, keepdim, unbiased), mean


def vector_norm(
    x: Any, ord: Any = 2, dim: Any = None, keepdim: bool = False, dtype: Any = None
) -> Any:
    x, axes = to(x, dtype), layers.axes_of(x, dim)
    if ord == 1:
        return jnp.sum(jnp.abs(x), axes, keepdims=keepdim)
    if ord != 2:
        raise ValueError(f'a norm of order {ord} is not read')
    total = jnp.sum(jnp.square(x), axes, keepdims=keepdim)
    positive = total > 0  # the gradient at 0 is 0, as PyTorch's
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, total, 1)), 0)


def norm(x: Any, p: Any = 2, dim: Any = None, keepdim: bool = False, dtype: Any = None) -> Any:
    return vector_norm(x, 2 if p is None else p, dim, keepdim, dtype)


def cumsum(x: Any, dim: int, dtype: Any = None) -> Any:
    x = to(x, dtype)
    return np.cumsum(x, dim) if on_host(x) else jnp.cumsum(x, dim)


def argmax(x: Any, dim: int | None = None, keepdim: bool = False) -> Any:
    return jnp.argmax(x, dim, keepdims=keepdim)


# 7. Shapes


def view(x: Any, size: Any) -> Any:
    return x.reshape([int(n) for n in size])


def view_as(x: Any, other: Any) -> Any:
    return x.reshape(np.shape(other))


def flatten(x: Any, start_dim: int = 0, end_dim: int = -1) -> Any:
    shape, rank = np.shape(x), np.ndim(x)
    start, end = start_dim % rank, end_dim % rank
    return x.reshape(*shape[:start], math.prod(shape[start : end + 1]), *shape[end + 1 :])


def unflatten(x: Any, dim: int, sizes: Any) -> Any:
    shape, dim = np.shape(x), dim % np.ndim(x)
    return x.reshape(*shape[:dim], *sizes, *shape[dim + 1 :])


def permute(x: Any, dims: Any) -> Any:
    return x.transpose(dims)


def transpose(x: Any, dim0: int, dim1: int) -> Any:
    return x.swapaxes(dim0, dim1)


def t(x: Any) -> Any:
    return x.T


def unsqueeze(x: Any, dim: int) -> Any:
    return (np if on_host(x) else jnp).expand_dims(x, dim)


def squeeze(x: Any, dim: Any = None) -> Any:
    axes = tuple(axis for axis in layers.axes_of(x, dim) if np.shape(x)[axis] == 1)
    return x.squeeze(axes)


def expand(x: Any, size: Any, implicit: bool = False) -> Any:
    return layers.expanded(x, size)


def expand_as(x: Any, other: Any) -> Any:
    return layers.expanded(x, np.shape(other))


def cat(tensors: Sequence[Any], dim: int = 0) -> Any:
    tensors = layers.of_one_type([x for x in tensors if np.shape(x) != (0,)])
    return (np if on_host(*tensors) else jnp).concatenate(tensors, dim)


def stack(tensors: Sequence[Any], dim: int = 0) -> Any:
    tensors = layers.of_one_type(tensors)
    return (np if on_host(*tensors) else jnp).stack(tensors, dim)


def split(x: Any, split_size: int, dim: int = 0) -> Any:
    ends = range(split_size, np.shape(x)[dim], split_size)
    return (np if on_host(x) else jnp).split(x, list(ends), dim)


def split_with_sizes(x: Any, split_sizes: Any, dim: int = 0) -> Any:
    return (np if on_host(x) else jnp).split(x, np.cumsum(split_sizes)[:-1].tolist(), dim)


def chunk(x: Any, chunks: int, dim: int = 0) -> Any:
    return split(x, -(-np.shape(x)[dim] // chunks), dim)


def unbind(x: Any, dim: int = 0) -> Any:
    return [select(x, dim, i) for i in range(np.shape(x)[dim])]


def slice_(x: Any, dim: int = 0, start: Any = None, end: Any = None, step: int = 1) -> Any:
    return layers.sliced(x, dim, start, end, step)


def narrow(x: Any, dim: int, start: int, length: int) -> Any:
    return layers.sliced(x, dim, start, start + length)


def select(x: Any, dim: int, index: int) -> Any:
    return x[(slice(None),) * (dim % np.ndim(x)) + (index,)]


def _place(x: Any, dim: int, place: Any) -> tuple[Any, ...]:
    return (slice(None),) * (dim % np.ndim(x)) + (place,)


def _written(x: Any, place: Any, value: Any) -> Any:
    """`x` with a part of it replaced."""
    if on_host(x, value):
        x = np.array(x)
        x[place] = value
        return x
    x = jnp.asarray(x)
    return x.at[place].set(cast(value, x.dtype) if not on_host(value) else value)


def slice_scatter(
    x: Any, src: Any, dim: int = 0, start: Any = None, end: Any = None, step: int = 1
) -> Any:
    return _written(x, _place(x, dim, slice(start, end, step)), src)


def select_scatter(x: Any, src: Any, dim: int, index: int) -> Any:
    return _written(x, _place(x, dim, index), src)


def index_put(x: Any, indices: Any, values: Any, accumulate: bool = False) -> Any:
    place = tuple(slice(None) if i is None else i for i in indices)
    if accumulate:
        raise ValueError('index_put that accumulates is not read')
    return _written(x, place, values)


def index(x: Any, indices: Sequence[Any]) -> Any:
    spread = math.prod(np.size(i) for i in indices if i is not None)
    if on_host(x, *indices) and np.size(x) * spread <= layers.MOST_ON_HOST:
        return x[tuple(slice(None) if i is None else i for i in indices)]
    return jnp.asarray(x)[tuple(slice(None) if i is None else jnp.asarray(i) for i in indices)]


def index_select(x: Any, dim: int, index: Any) -> Any:
    return layers.taken(x, index, dim)


def gather(x: Any, dim: int, index: Any, sparse_grad: bool = False) -> Any:
    return jnp.take_along_axis(jnp.asarray(x), jnp.asarray(index), dim)


def roll(x: Any, shifts: Any, dims: Any = ()) -> Any:
    return (np if on_host(x) else jnp).roll(x, tuple(shifts), tuple(dims) or None)


def flip(x: Any, dims: Any) -> Any:
    return (np if on_host(x) else jnp).flip(x, tuple(dims))


def repeat(x: Any, repeats: Any) -> Any:
    rank = len(repeats)
    shape = (1,) * (rank - np.ndim(x)) + tuple(np.shape(x))
    sized([n * times for n, times in zip(shape, repeats)], on_host(x))
    return (np if on_host(x) else jnp).tile(x, tuple(repeats))


def repeat_interleave(
    x: Any, repeats: int, dim: int | None = None, output_size: int | None = None
) -> Any:
    sized((np.size(x), repeats), on_host(x))
    return (np if on_host(x) else jnp).repeat(x, repeats, dim)


def padded(x: Any, pad: Any, mode: str = 'constant', value: Any = None) -> Any:
    pairs = list(zip(pad[::2], pad[1::2]))[::-1]  # the last axis is the first pair
    kinds = {'replicate': 'edge', 'circular': 'wrap'}
    whole = [(0, 0)] * (np.ndim(x) - len(pairs)) + pairs
    return layers.padded(x, whole, kinds.get(mode, mode), value or 0.0)


def constant_pad(x: Any, pad: Any, value: Any = 0) -> Any:
    return padded(x, pad, 'constant', value)


def reflection_pad(x: Any, padding: Any) -> Any:
    return padded(x, padding, 'reflect')


def replication_pad(x: Any, padding: Any) -> Any:
    return padded(x, padding, 'replicate')


def tri(name: str) -> Callable[..., Any]:
    def call(x: Any, diagonal: int = 0) -> Any:
        return getattr(np if on_host(x) else jnp, name)(x, diagonal)

    return call


def meshgrid(tensors: Sequence[Any], indexing: str = 'ij') -> Any:
    sized([np.size(x) for x in tensors], on_host(*tensors))
    return (np if on_host(*tensors) else jnp).meshgrid(*tensors, indexing=indexing)


# 8. New arrays


def arange(end: Any, dtype: Any = None) -> Any:
    return arange_from(0, end, 1, dtype)


def arange_from(start: Any, end: Any, step: Any = 1, dtype: Any = None) -> Any:
    sized((max(math.ceil((end - start) / step), 0),), True)
    return layers.host(np.arange(start, end, step), dtype)


def linspace(start: Any, end: Any, steps: int, dtype: Any = None) -> Any:
    sized((steps,), True)
    return layers.host(np.linspace(start, end, steps), dtype)


def eye(n: int, m: int | None = None, dtype: Any = None) -> Any:
    sized((n, n if m is None else m), True)
    return layers.host(np.eye(n, m), dtype)


def full(size: Any, fill_value: Any, dtype: Any = None) -> Any:
    return layers.full(size, fill_value, dtype)


def filled(value: float) -> Callable[..., Any]:
    def call(size: Any, dtype: Any = None) -> Any:
        return layers.full(size, value, dtype)

    return call


def filled_like(value: float) -> Callable[..., Any]:
    def call(x: Any, dtype: Any = None) -> Any:
        return layers.full(np.shape(x), value, dtype or _kind(x))

    return call


def full_like(x: Any, fill_value: Any, dtype: Any = None) -> Any:
    return layers.full(np.shape(x), fill_value, dtype or _kind(x))


def new_filled(value: float) -> Callable[..., Any]:
    def call(x: Any, size: Any, dtype: Any = None) -> Any:
        return layers.full(size, value, dtype or _kind(x))

    return call


def new_full(x: Any, size: Any, fill_value: Any, dtype: Any = None) -> Any:
    return layers.full(size, fill_value, dtype or _kind(x))


def fill(x: Any, value: Any) -> Any:
    return layers.full(np.shape(x), value, _kind(x))


def scalar_tensor(s: Any, dtype: Any = None) -> Any:
    return layers.full((), s, dtype)


def _kind(x: Any) -> Any:
    return np.asarray(x).dtype if on_host(x) else x.dtype


# 9. Sizes, which are Python's numbers


def sym_size(x: Any, dim: int) -> int:
    return int(np.shape(x)[dim])


def sym_numel(x: Any) -> int:
    return int(np.size(x))


def binary(function: Callable[[Any, Any], Any]) -> Callable[..., Any]:
    def call(a: Any, b: Any) -> Any:
        return function(a, b)

    return call


OPERATORS: dict[str, Callable[..., Any]] = {
    # arithmetic
    'aten.add': add,
    'aten.sub': sub,
    'aten.rsub': rsub,
    'aten.mul': layers.multiply,
    'aten.div': div,
    'aten.floor_divide': elementwise('floor_divide'),
    'aten.remainder': elementwise('remainder'),
    'aten.pow': pow_,
    'aten.square': lambda x: layers.multiply(x, x),
    'aten.addcmul': addcmul,
    'aten.addcdiv': addcdiv,
    'aten.lerp': lerp,
    'aten.maximum': layers.maximum,
    'aten.minimum': layers.minimum,
    'aten.max.other': layers.maximum,
    'aten.min.other': layers.minimum,
    'aten.abs': each('abs'),
    'aten.neg': each('negative'),
    'aten.sign': each('sign'),
    'aten.exp': each('exp'),
    'aten.expm1': each('expm1'),
    'aten.log': each('log'),
    'aten.log1p': each('log1p'),
    'aten.sqrt': each('sqrt'),
    'aten.rsqrt': lambda x: jax.lax.rsqrt(x),
    'aten.reciprocal': each('reciprocal'),
    'aten.sin': each('sin'),
    'aten.cos': each('cos'),
    'aten.tan': each('tan'),
    'aten.erf': lambda x: jax.lax.erf(x),
    'aten.floor': each('floor'),
    'aten.ceil': each('ceil'),
    'aten.round': each('round'),
    'aten.trunc': each('trunc'),
    'aten.eq': comparison('equal'),
    'aten.ne': comparison('not_equal'),
    'aten.lt': comparison('less'),
    'aten.le': comparison('less_equal'),
    'aten.gt': comparison('greater'),
    'aten.ge': comparison('greater_equal'),
    'aten.logical_and': comparison('logical_and'),
    'aten.logical_or': comparison('logical_or'),
    'aten.logical_not': each('logical_not'),
    'aten.bitwise_and': comparison('bitwise_and'),
    'aten.bitwise_or': comparison('bitwise_or'),
    'aten.bitwise_not': each('invert'),
    'aten.where': where,
    'aten.masked_fill': masked_fill,
    'aten.clamp': clamp,
    'aten.clamp_min': lambda x, min: layers.clamp(x, min),
    'aten.clamp_max': lambda x, max: layers.clamp(x, None, max),
    # types and copies
    'aten.to': to,
    'aten._to_copy': to,
    'aten.type_as': type_as,
    'aten.clone': same,
    'aten.contiguous': same,
    'aten.alias': same,
    'aten.detach': same,
    'aten.detach_': same,
    'aten.lift_fresh_copy': same,
    'aten.positive': same,
    'aten.copy': copy,
    'aten.dropout': dropout,
    'aten.feature_dropout': dropout,
    'aten.alpha_dropout': dropout,
    'aten._assert_tensor_metadata': nothing,
    'aten._assert_scalar': nothing,
    'aten._assert_async': nothing,
    'aten.sym_constrain_range_for_size': nothing,
    'aten.sym_constrain_range': nothing,
    # linear layers and convolutions
    'aten.linear': linear,
    'aten.addmm': addmm,
    'aten.baddbmm': baddbmm,
    'aten.mm': mm,
    'aten.bmm': mm,
    'aten.matmul': matmul,
    'aten.einsum': einsum,
    'aten.conv1d': conv,
    'aten.conv2d': conv,
    'aten.convolution': convolution,
    'aten.embedding': embedding,
    'aten.scaled_dot_product_attention': scaled_dot_product_attention,
    # normalisation
    'aten._native_batch_norm_legit_no_training': native_batch_norm,
    'aten.batch_norm': batch_norm,
    'aten._native_batch_norm_legit.no_stats': own_batch_norm,
    'aten.native_layer_norm': native_layer_norm,
    'aten.layer_norm': layer_norm,
    'aten.rms_norm': rms_norm,
    'aten.group_norm': group_norm,
    'aten.native_group_norm': native_group_norm,
    'aten.instance_norm': instance_norm,
    'aten.softmax': softmax,
    'aten._softmax': softmax,
    'aten.log_softmax': log_softmax,
    'aten._log_softmax': log_softmax,
    # activations
    'aten.relu': lambda x: jax.nn.relu(x),
    'aten.relu6': lambda x: layers.hardtanh(x, 0.0, 6.0),
    'aten.hardtanh': hardtanh,
    'aten.hardsigmoid': lambda x: layers.hardsigmoid(x),
    'aten.hardswish': lambda x: x * layers.hardsigmoid(x),
    'aten.sigmoid': lambda x: jax.nn.sigmoid(x),
    'aten.log_sigmoid': lambda x: jax.nn.log_sigmoid(x),
    'aten.silu': lambda x: x * jax.nn.sigmoid(x),
    'aten.tanh': each('tanh'),
    'aten.gelu': gelu,
    'aten.elu': elu,
    'aten.selu': selu,
    'aten.celu': celu,
    'aten.leaky_relu': leaky_relu,
    'aten.prelu': prelu,
    'aten._prelu_kernel': prelu,
    'aten.softplus': softplus,
    'aten.softsign': lambda x: x / (1 + jnp.abs(x)),
    'aten.mish': mish,
    'aten.glu': glu,
    # pools and resizing
    'aten.max_pool1d': max_pool,
    'aten.max_pool2d': max_pool,
    'aten.max_pool2d_with_indices': max_pool_with_indices,
    'aten.avg_pool1d': avg_pool,
    'aten.avg_pool2d': avg_pool,
    'aten.adaptive_avg_pool1d': adaptive_avg_pool,
    'aten.adaptive_avg_pool2d': adaptive_avg_pool,
    'aten._adaptive_avg_pool2d': adaptive_avg_pool,
    'aten.adaptive_max_pool2d': adaptive_max_pool2d,
    'aten.upsample_nearest2d.vec': upsample_nearest,
    'aten.upsample_bilinear2d.vec': upsample_linear,
    'aten.upsample_bicubic2d.vec': upsample_cubic,
    'aten.pixel_shuffle': pixel_shuffle,
    'aten.pixel_unshuffle': pixel_unshuffle,
    'aten.channel_shuffle': channel_shuffle,
    # sums over axes
    'aten.mean': reduction('mean', in_float=True),
    'aten.sum': reduction('sum', in_float=True),
    'aten.prod': reduction('prod'),
    'aten.amax': reduction('max'),
    'aten.amin': reduction('min'),
    'aten.any': reduction('any'),
    'aten.all': reduction('all'),
    'aten.max': reduction('max'),
    'aten.min': reduction('min'),
    'aten.max.dim': of_axis('max'),
    'aten.min.dim': of_axis('min'),
    'aten.var': variance,
    'aten.std': deviation,
    'aten.var_mean': var_mean,
    'aten.linalg_vector_norm': vector_norm,
    'aten.norm': norm,
    'aten.cumsum': cumsum,
    'aten.argmax': argmax,
    # shapes
    'aten.view': view,
    'aten._unsafe_view': view,
    'aten.reshape': lambda x, shape: view(x, shape),
    'aten.view_as': view_as,
    'aten.reshape_as': view_as,
    'aten.flatten': flatten,
    'aten.unflatten': unflatten,
    'aten.permute': permute,
    'aten.transpose': transpose,
    'aten.t': t,
    'aten.unsqueeze': unsqueeze,
    'aten.squeeze': squeeze,
    'aten.expand': expand,
    'aten.expand_as': expand_as,
    'aten.cat': cat,
    'aten.stack': stack,
    'aten.split': split,
    'aten.split_with_sizes': split_with_sizes,
    'aten.chunk': chunk,
    'aten.unbind': unbind,
    'aten.slice': slice_,
    'aten.narrow': narrow,
    'aten.select': select,
    'aten.slice_scatter': slice_scatter,
    'aten.select_scatter': select_scatter,
    'aten.index_put': index_put,
    'aten.index': index,
    'aten.index_select': index_select,
    'aten.gather': gather,
    'aten.roll': roll,
    'aten.flip': flip,
    'aten.repeat': repeat,
    'aten.tile': lambda x, dims: repeat(x, dims),
    'aten.repeat_interleave.self_int': repeat_interleave,
    'aten.pad': padded,
    'aten.constant_pad_nd': constant_pad,
    'aten.reflection_pad2d': reflection_pad,
    'aten.replication_pad2d': replication_pad,
    'aten.tril': tri('tril'),
    'aten.triu': tri('triu'),
    'aten.meshgrid': meshgrid,
    # new arrays
    'aten.arange': arange,
    'aten.arange.start': arange_from,
    'aten.arange.start_step': arange_from,
    'aten.linspace': linspace,
    'aten.eye': eye,
    'aten.full': full,
    'aten.zeros': filled(0),
    'aten.ones': filled(1),
    'aten.empty': filled(0),
    'aten.full_like': full_like,
    'aten.zeros_like': filled_like(0),
    'aten.ones_like': filled_like(1),
    'aten.empty_like': filled_like(0),
    'aten.new_full': new_full,
    'aten.new_zeros': new_filled(0),
    'aten.new_ones': new_filled(1),
    'aten.new_empty': new_filled(0),
    'aten.fill': fill,
    'aten.scalar_tensor': scalar_tensor,
    # sizes
    'aten.sym_size': sym_size,
    'aten.sym_numel': sym_numel,
    '_operator.add': binary(operator.add),
    '_operator.sub': binary(operator.sub),
    '_operator.mul': binary(operator.mul),
    '_operator.floordiv': binary(operator.floordiv),
    '_operator.truediv': binary(operator.truediv),
    '_operator.mod': binary(operator.mod),
    '_operator.pow': binary(operator.pow),
    '_operator.eq': binary(operator.eq),
    '_operator.ne': binary(operator.ne),
    '_operator.lt': binary(operator.lt),
    '_operator.le': binary(operator.le),
    '_operator.gt': binary(operator.gt),
    '_operator.ge': binary(operator.ge),
    '_operator.neg': lambda a: -a,
}


def _named(names: str) -> frozenset[str]:
    return frozenset(f'aten.{name}' for name in names.split())


DIALECT = Dialect(
    operators=OPERATORS,
    norms=_named('_native_batch_norm_legit_no_training batch_norm'),
    batch_norms=_named('_native_batch_norm_legit.no_stats'),
    other_norms=_named(
        'native_layer_norm layer_norm rms_norm group_norm native_group_norm instance_norm '
        '_native_batch_norm_legit.no_stats'
    ),
    layers=_named('linear addmm mm matmul conv2d convolution'),
    convolutions=_named('conv2d convolution'),
    passing=_named(
        'add sub mul div view _unsafe_view reshape flatten unflatten permute transpose t unsqueeze '
        'squeeze clone contiguous alias detach to _to_copy dropout mean sum stack cat select slice '
        'relu avg_pool2d adaptive_avg_pool2d _adaptive_avg_pool2d'
    ),
    softmaxes=_named('softmax _softmax log_softmax _log_softmax'),
    resizing=_named(
        'conv2d convolution max_pool2d max_pool2d_with_indices avg_pool2d adaptive_avg_pool2d '
        '_adaptive_avg_pool2d mean'
    ),
    measuring=_named('sym_size sym_numel'),
)
