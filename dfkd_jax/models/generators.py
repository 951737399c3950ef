"""Image generators: latents, and labels or label embeddings, to images.

A generator says what it is conditioned on, which decides what it is called with:

    conditioning = 'none'       latents [B, latent]
    conditioning = 'label'      latents [B, latent] and labels [B]
    conditioning = 'embedding'  label embeddings [B, embedding]

The DCGAN ones let a caller see and change their maps on the way: ``tap(level, map) -> map`` is
called with each [B, h, w, C], from level 0, the coarsest, on.

Layers equal those of the methods' PyTorch code under ported weights; latents are spread over
channels first, as PyTorch reshapes them, so that a linear layer ports as a plain transpose.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn

from dfkd_jax.models import layers
from dfkd_jax.models.layers import Array, BatchNorm, Dtype

Tap = Callable[[int, Array], Array]


class ConditionalBatchNorm(nn.Module):
    """Batch norm over the whole batch, then a scale and a shift looked up by class.

    spread: the standard deviation of the initial class tables, of scales around 1 and of shifts
    around 0.  CPSC-DFKD's code starts with equal classes (0); with a spread they differ from the
    first step on (ours).
    """

    num_classes: int
    spread: float = 0.0
    epsilon: float = 1e-3
    axis_name: str | None = None
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array, label: Array, train: bool) -> Array:
        y, _ = BatchNorm(epsilon=self.epsilon, affine=False, axis_name=self.axis_name,
                         dtype=self.dtype, name='norm')(x, train)  # fmt: skip

        def table(name: str, start: float) -> Array:
            def init(key: Array, shape: tuple[int, ...]) -> Array:
                return start + self.spread * jax.random.normal(key, shape)

            return self.param(name, init, (self.num_classes, x.shape[-1]))

        # A product with one-hot rows, not a gather: the gradient of a gather is a scatter, which
        # GPUs add up in an order that changes from run to run.
        row = jax.nn.one_hot(label, self.num_classes)
        scale = jnp.dot(row, table('scale', 1.0), precision='highest')[:, None, None, :]
        shift = jnp.dot(row, table('bias', 0.0), precision='highest')[:, None, None, :]
        return y * scale.astype(self.dtype) + shift.astype(self.dtype)


class CPSCGenerator(nn.Module):
    """CPSC-DFKD's generator for 32 px (any multiple of 4): the class enters by conditional norms.

    Called with latents [B, latent] and labels [B]; returns images [B, H, W, channels] of about
    zero mean and unit variance per channel, read by the networks as already normalised.

    class_brightness: whether each class has its own scale and shift in the last norm, the contrast
    and brightness of an image, as in the authors' code; False: one for all classes (ours).
    """

    conditioning: ClassVar[str] = 'label'
    num_classes: int = 10
    image_size: int = 32
    channels: int = 3
    latent: int = 256
    width: int = 64
    spread: float = 0.0
    class_brightness: bool = True
    axis_name: str | None = None
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, z: Array, label: Array, train: bool = True) -> Array:
        def norm(x: Array, name: str) -> Array:
            return ConditionalBatchNorm(self.num_classes, self.spread, axis_name=self.axis_name,
                                        dtype=self.dtype, name=name)(x, label, train)  # fmt: skip

        def upsample_conv(x: Array, features: int, name: str) -> Array:
            return layers.UpsampleConv(features, bias=True, dtype=self.dtype, name=name)(x)

        x = _project(z, 2 * self.width, self.image_size // 4, self.dtype)
        x = norm(x, 'norm0')
        x = nn.leaky_relu(norm(upsample_conv(x, 2 * self.width, 'conv1'), 'norm1'), 0.2)
        x = nn.leaky_relu(norm(upsample_conv(x, self.width, 'conv2'), 'norm2'), 0.2)
        x = layers.conv(x, self.channels, 3, bias=True, name='conv3', dtype=self.dtype)
        # No spread here: it would give whole classes another brightness and contrast.
        rows, row = (self.num_classes, label) if self.class_brightness else (1, 0 * label)
        x = ConditionalBatchNorm(rows, axis_name=self.axis_name, dtype=self.dtype,
                                 name='norm3')(jnp.tanh(x), row, train)  # fmt: skip
        return layers.wide(x)


class CPSCDeepGenerator(nn.Module):
    """CPSC-DFKD's transposed-convolution generator for 64 and 224 px (any multiple of 16).

    Called as `CPSCGenerator`; ends in a tanh, so images lie in [-1, 1].  Weights start from
    N(0, 0.02) and biases from zero.

    epsilon: of the four inner norms; 0.8 in the authors' code, where a momentum was meant.
    """

    conditioning: ClassVar[str] = 'label'
    num_classes: int = 10
    image_size: int = 64
    channels: int = 3
    latent: int = 256
    width: int = 64
    spread: float = 0.0
    epsilon: float = 1e-3
    axis_name: str | None = None
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, z: Array, label: Array, train: bool = True) -> Array:
        def norm(x: Array, name: str, epsilon: float) -> Array:
            return ConditionalBatchNorm(self.num_classes, self.spread, epsilon, self.axis_name,
                                        self.dtype, name=name)(x, label, train)  # fmt: skip

        normal, zeros = nn.initializers.normal(0.02), nn.initializers.zeros
        x = _project(z, 8 * self.width, self.image_size // 16, self.dtype, normal, zeros)
        x = norm(x, 'norm0', 1e-3)
        for i, features in enumerate((4, 2, 1, 1), start=1):
            x = layers.ConvTranspose(features * self.width, normal, self.dtype, name=f'conv{i}')(x)
            x = nn.leaky_relu(norm(x, f'norm{i}', self.epsilon), 0.2)
        x = layers.conv(x, self.channels, 3, bias=True, kernel_init=normal, bias_init=zeros,
                        name='conv5', dtype=self.dtype)  # fmt: skip
        return layers.wide(jnp.tanh(x))


class DCGANGenerator(nn.Module):
    """The unconditional generator of DAFL, ZSKT, DFAD, DFQ, CMI and Fast-DFKD.

    Called with latents [B, latent]; returns images [B, H, W, channels].

    ending: 'pixels', a sigmoid, so that images lie in [0, 1] (CMI's and Fast-DFKD's code);
        'norm', a tanh and a batch norm without scale and shift, so that they have zero mean and
        unit variance per channel and the networks read them as normalised (DAFL's, DFAD's); or
        'affine', a batch norm with scale and shift and no tanh, read likewise (ZSKT's).
    """

    conditioning: ClassVar[str] = 'none'
    image_size: int = 32
    channels: int = 3
    latent: int = 256
    width: int = 64
    ending: str = 'pixels'
    axis_name: str | None = None
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, z: Array, train: bool = True, tap: Tap | None = None) -> Array:
        x = _project(z, 2 * self.width, self.image_size // 4, self.dtype)
        return _dcgan_trunk(x, self.width, self.channels, self.axis_name, self.dtype, train,
                            self.ending, tap)  # fmt: skip


class DCGANDeepGenerator(nn.Module):
    """As `DCGANGenerator`, for 224 px (any multiple of 16): NAYER's deep trunk on plain latents."""

    conditioning: ClassVar[str] = 'none'
    image_size: int = 224
    channels: int = 3
    latent: int = 256
    width: int = 64
    ending: str = 'pixels'
    axis_name: str | None = None
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, z: Array, train: bool = True, tap: Tap | None = None) -> Array:
        x = _project(z, 2 * self.width, self.image_size // 16, self.dtype)
        return _deep_trunk(x, self.width, self.channels, self.axis_name, self.dtype, train,
                           self.ending, tap)  # fmt: skip


class NAYERGenerator(nn.Module):
    """NAYER's generator: label embedding, batch norm, a noisy layer, then the DCGAN trunk.

    Called with label embeddings [B, embedding] that repeat the class list; repetition i passes
    through noisy linear i.  A share of a batch is called with the number of its first row.
    Returns images [B, H, W, channels] in [0, 1].

    repeats: the number of noisy linears; at least the batch size over the number of classes,
    rounded up.
    """

    conditioning: ClassVar[str] = 'embedding'
    num_classes: int = 10
    repeats: int = 40
    image_size: int = 32
    channels: int = 3
    embedding: int = 512
    noisy_width: int = 1000
    width: int = 64
    axis_name: str | None = None
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, embedding: Array, first: Array | int = 0, train: bool = True) -> Array:
        x = _noisy_layer(self, embedding, first, train)
        x = _project(x, 2 * self.width, self.image_size // 4, self.dtype)
        return _dcgan_trunk(x, self.width, self.channels, self.axis_name, self.dtype, train)


class NAYERDeepGenerator(nn.Module):
    """NAYER's generator for 224 px (any multiple of 16): four upsamplings in place of two.

    Called as `NAYERGenerator`.
    """

    conditioning: ClassVar[str] = 'embedding'
    num_classes: int = 1000
    repeats: int = 1
    image_size: int = 224
    channels: int = 3
    embedding: int = 512
    noisy_width: int = 1000
    width: int = 64
    axis_name: str | None = None
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, embedding: Array, first: Array | int = 0, train: bool = True) -> Array:
        x = _noisy_layer(self, embedding, first, train)
        x = _project(x, 2 * self.width, self.image_size // 16, self.dtype)
        return _deep_trunk(x, self.width, self.channels, self.axis_name, self.dtype, train)


def _noisy_layer(module: Any, embedding: Array, first: Array | int, train: bool) -> Array:
    """Batch norm, then a linear layer for each repetition of the class list.

    embedding: [B, E], rows `first` to `first` + B of a whole batch; returns [B, noisy_width].
    """
    x, _ = BatchNorm(axis_name=module.axis_name, dtype=module.dtype, name='n1')(embedding, train)
    kernel = module.param('noisy_kernel', nn.initializers.normal(1.0),
                        (module.repeats, x.shape[-1], module.noisy_width))  # fmt: skip
    bias = module.param('noisy_bias', nn.initializers.zeros, (module.repeats, module.noisy_width))
    # The repetitions that these rows belong to, and the rows at their place in them.
    batch = x.shape[0]
    count = min(module.repeats, -(-batch // module.num_classes) + 1)
    start = jnp.minimum(first // module.num_classes, module.repeats - count)
    row = first - start * module.num_classes
    kernel, bias = (
        jax.lax.dynamic_slice_in_dim(w, start, count).astype(module.dtype).astype(x.dtype)
        for w in (kernel, bias)
    )
    rows = jnp.zeros((count * module.num_classes, x.shape[-1]), x.dtype)
    rows = jax.lax.dynamic_update_slice_in_dim(rows, x, row, 0)
    rows = rows.reshape(count, module.num_classes, -1)
    x = jnp.einsum('rce,ren->rcn', rows, kernel) + bias[:, None]
    return jax.lax.dynamic_slice_in_dim(x.reshape(-1, module.noisy_width), row, batch)


def _project(
    z: Array, channels: int, size: int, dtype: Dtype,
    kernel_init: nn.initializers.Initializer | None = None,
    bias_init: nn.initializers.Initializer | None = None,
) -> Array:  # fmt: skip
    """A linear layer from latents to a [B, size, size, channels] map."""
    x = layers.linear(z.astype(dtype), channels * size * size, name='project', dtype=dtype,
                      kernel_init=kernel_init, bias_init=bias_init)  # fmt: skip
    return x.reshape(-1, channels, size, size).transpose(0, 2, 3, 1)


def _dcgan_trunk(
    x: Array, width: int, channels: int, axis_name: str | None, dtype: Dtype, train: bool,
    ending: str = 'pixels', tap: Tap | None = None,
) -> Array:  # fmt: skip
    """Two upsamplings by two from [B, s, s, 2 width] to images [B, 4s, 4s, channels]."""

    def norm(x: Array, name: str) -> Array:
        return BatchNorm(axis_name=axis_name, dtype=dtype, name=name)(x, train)[0]

    def upsample_conv(x: Array, features: int, name: str) -> Array:
        return layers.UpsampleConv(features, dtype=dtype, name=name)(x)

    see = tap or _unchanged
    x = see(0, norm(x, 'norm0'))
    x = see(1, nn.leaky_relu(norm(upsample_conv(x, 2 * width, 'conv1'), 'norm1'), 0.2))
    x = see(2, nn.leaky_relu(norm(upsample_conv(x, width, 'conv2'), 'norm2'), 0.2))
    x = layers.conv(x, channels, 3, bias=True, name='conv3', dtype=dtype)
    return _end(x, ending, axis_name, dtype, train)


def _deep_trunk(
    x: Array, width: int, channels: int, axis_name: str | None, dtype: Dtype, train: bool,
    ending: str = 'pixels', tap: Tap | None = None,
) -> Array:  # fmt: skip
    """Four upsamplings by two from [B, s, s, 2 width] to images [B, 16s, 16s, channels].

    As NAYER's code has it for ImageNet.
    """
    for i, features in enumerate((2 * width, 2 * width, width, width, width)):
        if i == 0:
            x = layers.conv(x, features, 3, dtype=dtype, name='conv0')
        else:
            x = layers.UpsampleConv(features, dtype=dtype, name=f'conv{i}')(x)
        x, _ = BatchNorm(axis_name=axis_name, dtype=dtype, name=f'norm{i}')(x, train)
        x = (tap or _unchanged)(i, nn.leaky_relu(x, 0.2))
    x = layers.conv(x, channels, 3, bias=True, name='conv5', dtype=dtype)
    return _end(x, ending, axis_name, dtype, train)


def _unchanged(level: int, x: Array) -> Array:
    del level
    return x


def _end(x: Array, ending: str, axis_name: str | None, dtype: Dtype, train: bool) -> Array:
    """Images from a trunk's last map; see `DCGANGenerator.ending`."""
    if ending == 'pixels':
        return layers.wide(nn.sigmoid(x))
    affine = ending == 'affine'
    norm = BatchNorm(affine=affine, axis_name=axis_name, dtype=dtype, name='norm')
    x, _ = norm(x if affine else jnp.tanh(x), train)
    return layers.wide(x)
