"""Layers with PyTorch's meaning: batch norm with a statistics tap, paddings, default inits.

Each function or module here equals its PyTorch namesake under ported weights.  Two differences
from flax's own layers decide it: PyTorch pads symmetrically where 'SAME' does not, and PyTorch's
running variance is unbiased.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from dfkd_jax.models import winograd

Array = jax.Array
Dtype = Any


class Output(NamedTuple):
    """What a classifier returns.

    statistics mirrors the `batch_stats` collection leaf for leaf: for every BatchNorm, the mean
    and the biased variance of its input over this batch (over all shards of it where the module
    has an `axis_name`), whether or not the layer normalised with them.

    stages are the last map of each resolution, finest first.

    last is the map whose mean over positions is `features`; None if there is none.
    """

    logits: Array  # [B, num_classes], `wide`
    features: Array  # [B, F], `wide`: the input of the last linear layer
    statistics: dict[str, Any]  # {layer: {'mean': [C], 'var': [C]}}, nested as the module is
    stages: tuple[Array, ...] = ()  # [B, h, w, C] each, in the module's dtype
    last: Array | None = None  # [B, h, w, F], likewise


def wide(x: Array) -> Array:
    """`x` in float32, or in float64 if that is its type.

    So are moments and outputs, whatever the type of the layers between.
    """
    return x if x.dtype == jnp.float64 else x.astype(jnp.float32)


class BatchNorm(nn.Module):
    """torch.nn.BatchNorm over all axes but the last, returning also the moments of its input.

    Moments are `wide` whatever `dtype`.  With `axis_name` they are those of the whole batch over
    that mapped axis, so n devices optimise what one device does.

    momentum: the weight of the old running value (1 minus PyTorch's).
    """

    momentum: float = 0.9
    epsilon: float = 1e-5
    affine: bool = True
    axis_name: str | None = None
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array, train: bool) -> tuple[Array, dict[str, Array]]:
        """Returns ``(y, {'mean', 'var'})``; `train` normalises with the batch's own moments."""
        channels = x.shape[-1]
        running_mean = self.variable('batch_stats', 'mean', jnp.zeros, (channels,), jnp.float32)
        running_var = self.variable('batch_stats', 'var', jnp.ones, (channels,), jnp.float32)

        axes = tuple(range(x.ndim - 1))
        x_wide = wide(x)
        mean, square = jnp.mean(x_wide, axes), jnp.mean(jnp.square(x_wide), axes)
        count = x.size // channels
        if self.axis_name is not None and not self.is_initializing():
            mean, square = jax.lax.pmean((mean, square), self.axis_name)
            count *= jax.lax.axis_size(self.axis_name)
        var = jnp.maximum(square - jnp.square(mean), 0.0)

        if train and not self.is_initializing() and self.is_mutable_collection('batch_stats'):
            keep = self.momentum
            unbiased = var * (count / max(count - 1, 1))
            running_mean.value = keep * running_mean.value + (1 - keep) * mean
            running_var.value = keep * running_var.value + (1 - keep) * unbiased

        used_mean, used_var = (mean, var) if train else (running_mean.value, running_var.value)
        scale = jax.lax.rsqrt(used_var + self.epsilon)
        if self.affine:
            scale = scale * self.param('scale', nn.initializers.ones, (channels,), jnp.float32)
        # One multiply and one add per element: y = x * scale + shift.
        shift = -used_mean * scale
        if self.affine:
            shift = shift + self.param('bias', nn.initializers.zeros, (channels,), jnp.float32)
        row = (1,) * (x.ndim - 1) + (channels,)
        # A wider input, such as float32 embeddings in a bfloat16 network, stays as wide.
        kind = max(x.dtype, self.dtype, key=lambda kind: jnp.finfo(kind).bits)
        scale, shift = (w.reshape(row).astype(self.dtype).astype(kind) for w in (scale, shift))
        return x.astype(kind) * scale + shift, {'mean': mean, 'var': var}


class LayerNorm(nn.Module):
    """torch.nn.LayerNorm over the last axis; its moments are `wide` whatever `dtype`.

    epsilon: 1e-6, as vision transformers and ConvNeXt have it, and not PyTorch's 1e-5.
    """

    epsilon: float = 1e-6
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """[..., C] -> [..., C]."""
        return _scaled(self, _standardised(wide(x), (x.ndim - 1,), self.epsilon), self.dtype)


class GroupNorm(nn.Module):
    """torch.nn.GroupNorm on channels-last maps; its moments are `wide` whatever `dtype`."""

    groups: int
    epsilon: float = 1e-5
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """[B, H, W, C] -> [B, H, W, C], where C is a multiple of `groups`."""
        n, h, w, c = x.shape
        grouped = wide(x).reshape(n, h, w, self.groups, c // self.groups)
        y = _standardised(grouped, (1, 2, 4), self.epsilon)
        return _scaled(self, y.reshape(x.shape), self.dtype)


def _standardised(x: Array, axes: tuple[int, ...], epsilon: float) -> Array:
    """`x` with mean 0 and variance 1 over `axes`, of which the variance is the biased one."""
    centred = x - jnp.mean(x, axes, keepdims=True)
    return centred * jax.lax.rsqrt(jnp.mean(jnp.square(centred), axes, keepdims=True) + epsilon)


def _scaled(module: nn.Module, x: Array, dtype: Dtype) -> Array:
    """A scale and a shift for each channel, parameters of `module`; in `dtype`."""
    channels = x.shape[-1]
    row = (1,) * (x.ndim - 1) + (channels,)
    scale = module.param('scale', nn.initializers.ones, (channels,), jnp.float32)
    bias = module.param('bias', nn.initializers.zeros, (channels,), jnp.float32)
    return (x * scale.reshape(row) + bias.reshape(row)).astype(dtype)


class SqueezeExcite(nn.Module):
    """Squeeze-and-excitation (Hu et al. 2018): each channel times a gate of all channels' means.

    squeezed: channels between the two 1x1 convolutions, ``fc1`` and ``fc2``.
    """

    squeezed: int
    activation: Callable[[Array], Array] = nn.relu
    gate: Callable[[Array], Array] = nn.sigmoid
    kernel_init: nn.initializers.Initializer | None = None
    bias_init: nn.initializers.Initializer | None = None
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """[B, H, W, C] -> [B, H, W, C]."""

        def fc(x: Array, features: int, name: str) -> Array:
            return conv(x, features, 1, bias=True, name=name, kernel_init=self.kernel_init,
                        bias_init=self.bias_init, dtype=self.dtype)  # fmt: skip

        mean = jnp.mean(wide(x), (1, 2), keepdims=True).astype(self.dtype)
        hidden = self.activation(fc(mean, self.squeezed, 'fc1'))
        return x * self.gate(fc(hidden, x.shape[-1], 'fc2'))


def torch_uniform(fan_in: int) -> nn.initializers.Initializer:
    """PyTorch's default for linear and conv layers, biases too: U(-1/sqrt(fan_in), ...)."""
    bound = fan_in**-0.5

    def init(key: Array, shape: tuple[int, ...], dtype: Dtype = jnp.float32) -> Array:
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


# N(0, sqrt(2 / (k * k * out))): He's rule on the fan out, without truncation.
he_normal = nn.initializers.variance_scaling(2.0, 'fan_out', 'normal')
# What trunc_normal_(std=0.02) draws: it cuts at -2 and 2, a hundred standard deviations away.
normal_002 = nn.initializers.normal(0.02)


def conv(
    x: Array,
    features: int,
    size: int,
    *,
    name: str,
    stride: int = 1,
    padding: int | str | None = None,
    bias: bool = False,
    groups: int = 1,
    kernel_init: nn.initializers.Initializer | None = None,
    bias_init: nn.initializers.Initializer | None = None,
    dtype: Dtype = jnp.float32,
) -> Array:
    """torch.nn.Conv2d inside a compact module; `padding` defaults to size // 2 on every side.

    'SAME' pads as TensorFlow does, more after than before where the two differ.
    """
    pad = size // 2 if padding is None else padding
    default = torch_uniform(size * size * x.shape[-1] // groups)
    return nn.Conv(
        features,
        (size, size),
        strides=(stride, stride),
        padding=pad if isinstance(pad, str) else ((pad, pad), (pad, pad)),
        use_bias=bias,
        feature_group_count=groups,
        kernel_init=kernel_init or default,
        bias_init=bias_init or default,
        dtype=dtype,
        conv_general_dilated=convolve,
        name=name,
    )(x)


PART = 2**19  # numbers of a map, 2 MB: about what a core's cache holds
MOST_PARTS = 16  # of a batch: each is traced and compiled


def convolve(x: Array, kernel: Array, strides: Sequence[int], padding: Any, **rest: Any) -> Array:
    """`lax.conv_general_dilated` of [B, H, W, C] x [h, w, C, features], as fast as CPUs compute it.

    For one kernel for each channel, see `convolve_channels`; for patches without overlap,
    `convolve_patches`; for maps smaller than the kernel, `convolve_small`; for 3x3 kernels on CPUs,
    `winograd`; and for all others, `convolve_parts`.
    """
    if rest.get('feature_group_count', 1) == x.shape[-1] == kernel.shape[-1] > 1:
        return convolve_channels(x, kernel, strides, padding, **rest)
    window, whole = kernel.shape[:2], kernel.shape[2] == x.shape[-1]
    dilated = any(max(rest.get(name) or (1,)) > 1 for name in ('lhs_dilation', 'rhs_dilation'))
    if isinstance(padding, str) and not dilated:
        padding = jax.lax.padtype_to_pads(x.shape[1:3], window, strides, padding)
    if dilated or not whole:
        return convolve_parts(x, kernel, strides, padding, **rest)
    if max(window) > 1 and window == tuple(strides) and not any(map(any, padding)):
        return convolve_patches(x, kernel)
    if any(size < side for size, side in zip(_sizes(x, window, strides, padding), window)):
        return convolve_small(x, kernel, strides, padding, **rest)
    if not winograd.suits(x, kernel, strides, padding):
        return convolve_parts(x, kernel, strides, padding, **rest)

    def plain(x: Array, kernel: Array) -> Array:
        return jax.lax.conv_general_dilated(x, kernel, strides, padding, **rest)

    return on_cpus(winograd.convolve, plain)(*winograd.alike(x, kernel))


def _sizes(
    x: Array, window: tuple[int, ...], strides: Sequence[int], padding: Any
) -> tuple[int, ...]:
    """Height and width of the output of a convolution."""
    sides = zip(x.shape[1:3], window, strides, padding)
    return tuple((size + sum(pads) - side) // stride + 1 for size, side, stride, pads in sides)


def on_cpus(
    cpu: Callable[[Array, Array], Array], default: Callable[[Array, Array], Array]
) -> Callable[[Array, Array], Array]:
    """One function of two arrays as `cpu` computes it on CPUs and `default` elsewhere, and back."""

    def call(x: Array, kernel: Array) -> Array:
        return jax.lax.platform_dependent(x, kernel, cpu=cpu, default=default)

    def forward(x: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
        return call(x, kernel), (x, kernel)

    def backward(kept: tuple[Array, Array], gradient: Array) -> Any:
        ways = {
            name: lambda x, kernel, gradient, f=f: jax.vjp(f, x, kernel)[1](gradient)
            for name, f in (('cpu', cpu), ('default', default))
        }
        return jax.lax.platform_dependent(*kept, gradient, **ways)

    chosen = jax.custom_vjp(call)
    chosen.defvjp(forward, backward)
    return chosen


def convolve_parts(
    x: Array, kernel: Array, strides: Sequence[int], padding: Any, **rest: Any
) -> Array:
    """`lax.conv_general_dilated`; on CPUs, its kernel's gradient is summed over parts of the batch.

    XLA sums it over all pixels of all images at once, and on CPUs falls to a tenth of its speed if
    they do not fit into a cache.  In parts, the forward and backward pass of a student at batch 128
    takes 0.6 to 0.7 of the time (WRN-16, ResNet-18); smaller parts gain little more and take longer
    to compile.
    """

    def plain(x: Array, kernel: Array) -> Array:
        return jax.lax.conv_general_dilated(x, kernel, strides, padding, **rest)

    if jax.export.is_symbolic_dim(x.shape[0]):  # exported programs have no gradient
        return plain(x, kernel)
    batch, parts = len(x), min(-(-x.size // PART), MOST_PARTS)
    if parts <= 1:
        return plain(x, kernel)
    size = -(-batch // parts)

    def of_kernel(x: Array, gradient: Array) -> Array:
        return jax.linear_transpose(lambda v: plain(x, v), kernel)(gradient)[0]

    def in_parts(x: Array, gradient: Array) -> Array:
        starts = range(0, batch, size)
        first, *others = [of_kernel(x[i : i + size], gradient[i : i + size]) for i in starts]
        return sum(others, first)

    def forward(x: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
        return plain(x, kernel), (x, kernel)

    def backward(kept: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
        x, kernel = kept
        (of_x,) = jax.linear_transpose(lambda v: plain(v, kernel), x)(gradient)
        return of_x, jax.lax.platform_dependent(x, gradient, cpu=in_parts, default=of_kernel)

    call = jax.custom_vjp(plain)
    call.defvjp(forward, backward)
    return call(x, kernel)


def convolve_channels(
    x: Array, kernel: Array, strides: Sequence[int], padding: Any, **rest: Any
) -> Array:
    """`lax.conv_general_dilated` of each channel with its own kernel: [B, H, W, C] x [h, w, 1, C].

    On CPUs it is a sum of shifted products (`wide`), which takes longer to compile: XLA's grouped
    convolution takes 9 to 80 times longer there, and the gradient of its kernel 2 to 16 times.
    """
    height, width = kernel.shape[:2]
    if isinstance(padding, str):
        padding = jax.lax.padtype_to_pads(x.shape[1:3], (height, width), strides, padding)

    def plain(x: Array, kernel: Array) -> Array:
        return jax.lax.conv_general_dilated(x, kernel, strides, padding, **rest)

    def products(x: Array, kernel: Array) -> Array:
        padded = jnp.pad(wide(x), ((0, 0), *padding, (0, 0)))
        of_row, of_column = (
            [slice(i, i + whole - size + 1, stride) for i in range(size)]
            for whole, size, stride in zip(padded.shape[1:3], (height, width), strides)
        )
        row = wide(kernel)[:, :, None]  # [h, w, 1, 1, C]
        shifted = [
            padded[:, rows, columns] * row[None, i, j]
            for i, rows in enumerate(of_row)
            for j, columns in enumerate(of_column)
        ]
        return sum(shifted[1:], shifted[0]).astype(x.dtype)

    return on_cpus(products, plain)(x, kernel)


def convolve_small(
    x: Array, kernel: Array, strides: Sequence[int], padding: Any, **rest: Any
) -> Array:
    """`lax.conv_general_dilated` for outputs smaller than the kernel; on CPUs a product of patches.

    XLA is up to 41 times slower there (3x3, 512 channels on maps of 2x2 px).  Places of the kernel
    that see nothing but padding are left out: of 3x3 on 1x1 px, one is left.
    """
    sizes = _sizes(x, kernel.shape[:2], strides, padding)
    rows, columns = (
        range(max(0, before - stride * (outputs - 1)), min(side, before + size))
        for size, side, stride, (before, _), outputs in zip(
            x.shape[1:3], kernel.shape, strides, padding, sizes
        )
    )

    def plain(x: Array, kernel: Array) -> Array:
        return jax.lax.conv_general_dilated(x, kernel, strides, padding, **rest)

    def product(x: Array, kernel: Array) -> Array:
        padded = jnp.pad(x, ((0, 0), *padding, (0, 0)))
        patches = [
            padded[:, i :: strides[0], j :: strides[1]][:, : sizes[0], : sizes[1]]
            for i in rows
            for j in columns
        ]
        seen = kernel[rows.start : rows.stop, columns.start : columns.stop]
        return jnp.matmul(
            jnp.concatenate(patches, axis=-1),
            seen.reshape(-1, kernel.shape[-1]),
            precision=rest.get('precision'),
        )

    return on_cpus(product, plain)(x, kernel)


def convolve_patches(x: Array, kernel: Array) -> Array:
    """A convolution with a stride of its size and no padding, as a product of patches.

    [B, H, W, C] x [h, w, C, features] -> [B, H // h, W // w, features]; a rest is left out.  On
    CPUs XLA's own takes minutes for the gradient of 224 px in patches of 16.
    """
    (batch, rows, columns, channels), (height, width) = x.shape, kernel.shape[:2]
    rows, columns = rows // height, columns // width
    x = x[:, : rows * height, : columns * width]
    x = x.reshape(batch, rows, height, columns, width, channels).swapaxes(2, 3)
    size = height * width * channels
    return x.reshape(batch, rows, columns, size) @ kernel.reshape(size, -1)


def convolve_transposed(x: Array, kernel: Array) -> Array:
    """torch.nn.ConvTranspose2d(4, stride 2, padding 1): [B, H, W, C] -> [B, 2H, 2W, features].

    The gradient of its kernel [4, 4, features, C] is computed as that of the convolution which it
    transposes: XLA's own is fifty times slower on CPUs, where it was 95 % of a generator's step at
    224 px.
    """

    def convolution(image: Array, kernel: Array) -> Array:
        layout = ('NHWC', 'HWIO', 'NHWC')
        return convolve(image, kernel, (2, 2), ((1, 1), (1, 1)), dimension_numbers=layout)

    def plain(x: Array, kernel: Array) -> Array:
        pad = ((2, 2), (2, 2))  # kernel - 1 - padding
        return jax.lax.conv_transpose(x, kernel, (2, 2), pad, transpose_kernel=True)

    def forward(x: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
        return plain(x, kernel), (x, kernel)

    def backward(kept: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
        x, kernel = kept
        of_x, pull = jax.vjp(lambda v: convolution(gradient, v), kernel)
        return of_x, *pull(x)

    call = jax.custom_vjp(plain)
    call.defvjp(forward, backward)
    return call(x, kernel)


class ConvTranspose(nn.Module):
    """`convolve_transposed` with its kernel, without a bias."""

    features: int
    kernel_init: nn.initializers.Initializer
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """[B, H, W, C] -> [B, 2H, 2W, features]."""
        kernel = self.param('kernel', self.kernel_init, (4, 4, self.features, x.shape[-1]))
        return convolve_transposed(x.astype(self.dtype), kernel.astype(self.dtype))


def linear(
    x: Array,
    features: int,
    *,
    name: str,
    kernel_init: nn.initializers.Initializer | None = None,
    bias_init: nn.initializers.Initializer | None = None,
    dtype: Dtype | None = None,
) -> Array:
    """torch.nn.Linear inside a compact module; `dtype` defaults to that of x."""
    default = torch_uniform(x.shape[-1])
    return nn.Dense(
        features,
        kernel_init=kernel_init or default,
        bias_init=bias_init or default,
        dtype=dtype or x.dtype,
        name=name,
    )(x)


def max_pool(x: Array, size: int, stride: int | None = None, padding: int = 0) -> Array:
    """torch.nn.MaxPool2d on channels-last maps; `stride` defaults to `size`."""
    stride = stride or size
    return nn.max_pool(x, (size, size), (stride, stride), ((padding, padding),) * 2)


def adaptive_mean(x: Array, side: int) -> Array:
    """torch.nn.AdaptiveAvgPool2d: [B, H, W, C] -> [B, side, side, C], means over windows.

    Output i averages the rows from floor(i H / side) to ceil((i + 1) H / side).
    """

    def windows(size: int) -> Array:
        """The weight of each of `size` places in each output, [side, size]."""
        bounds = [(i * size // side, -(-(i + 1) * size // side)) for i in range(side)]
        rows = [[(a <= k < b) / (b - a) for k in range(size)] for a, b in bounds]
        return jnp.asarray(rows, wide(x).dtype)

    rows, columns = (windows(size) for size in x.shape[1:3])
    mean = jnp.einsum('bhwc,ph,qw->bpqc', wide(x), rows, columns, precision='highest')
    return mean.astype(x.dtype)


def average_pool(x: Array, size: int) -> Array:
    """torch.nn.AvgPool2d on channels-last maps, without overlap; a rest is left out."""
    n, h, w, c = x.shape
    h, w = h // size, w // size
    x = x[:, : h * size, : w * size].reshape(n, h, size, w, size, c)
    return jnp.mean(x, (2, 4))


def space_to_depth(x: Array, block: int) -> Array:
    """torch.nn.PixelUnshuffle on channels-last images: [B, H, W, C] -> [B, H/b, W/b, C*b*b]."""
    n, h, w, c = x.shape
    if h % block or w % block:
        raise ValueError(f'images of {h}x{w} px do not divide into {block}x{block} blocks: resize '
                         f'or pad them to a multiple of {block}')  # fmt: skip
    x = x.reshape(n, h // block, block, w // block, block, c)
    return x.transpose(0, 1, 3, 5, 2, 4).reshape(n, h // block, w // block, c * block * block)


def upsample2(x: Array) -> Array:
    """Nearest-neighbour upsampling by two: [B, H, W, C] -> [B, 2H, 2W, C]."""
    n, h, w, c = x.shape
    x = jnp.broadcast_to(x[:, :, None, :, None, :], (n, h, 2, w, 2, c))
    return x.reshape(n, 2 * h, 2 * w, c)


class UpsampleConv(nn.Module):
    """Nearest-neighbour upsampling by two, then a 3x3 convolution with padding 1, as one.

    Equal to ``conv(upsample2(x), features, 3)`` with the same kernel, with under half of its
    multiplications.  Along an axis, the three taps of an output pixel fall on two input pixels.  So
    the four outputs of an input pixel are 2x2 convolutions of the input itself, with taps added up
    beforehand, and the upsampled map, four times as large, is never made.
    """

    features: int
    bias: bool = False
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """[B, H, W, C] -> [B, 2H, 2W, features]."""
        n, h, w, channels = x.shape
        init = torch_uniform(9 * channels)
        kernel = self.param('kernel', init, (3, 3, channels, self.features))
        # Even outputs see (previous, own), odd ones (own, next): [phase, input pixel, tap].
        taps = jnp.asarray([[[1, 0, 0], [0, 1, 1]], [[1, 1, 0], [0, 0, 1]]], jnp.float32)
        small = jnp.einsum('apy,bqx,yxcf->pqcabf', taps, taps, kernel, precision='highest')
        # As a product of 2x2 patches: XLA's CPU convolutions take 5 times longer for the gradient.
        x = jnp.pad(x.astype(self.dtype), ((0, 0), (1, 1), (1, 1), (0, 0)))
        shifted = [x[:, i : i + h + 1, j : j + w + 1] for i in (0, 1) for j in (0, 1)]
        small = small.reshape(4 * channels, 4 * self.features).astype(self.dtype)
        y = jnp.concatenate(shifted, axis=-1) @ small
        y = y.reshape(n, h + 1, w + 1, 2, 2, self.features)
        # The window before pixel i gives its even output, the one after it its odd output.
        rows = jnp.stack([y[:, :h, :, 0], y[:, 1:, :, 1]], axis=2)  # [n, h, 2, w + 1, 2, f]
        y = jnp.stack([rows[:, :, :, :w, 0], rows[:, :, :, 1:, 1]], axis=4)
        y = y.reshape(n, 2 * h, 2 * w, self.features)
        if self.bias:
            bias = self.param('bias', init, (self.features,)).astype(self.dtype)
            y = y + bias.reshape(1, 1, 1, -1)
        return y
