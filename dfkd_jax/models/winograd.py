"""3x3 convolutions on CPUs by Winograd's algorithm, in the kernels of `dfkd_jax.native`.

`layers.convolve` takes them where they are faster than XLA's own, once `use` has said that they are
there.  Relative to the largest number they are off by up to 3e-6, XLA's by 2e-6; and they are the
same from run to run, whatever the number of threads.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

Array = jax.Array

CONVOLVE, OF_KERNEL = 'dfkd_winograd', 'dfkd_winograd_kernel'  # as winograd.cc names them
LEAST_TILES = 64  # of 4x4 outputs in a batch: with fewer, transforms of the kernel decide

_on = False


def use(on: bool) -> None:
    """Says whether XLA knows the two targets.  It holds for what is traced from then on."""
    global _on
    _on = on


def suits(x: Array, kernel: Array, strides: Sequence[int], padding: Any) -> bool:
    """Whether `convolve` computes a convolution of [B, H, W, C] x [h, w, C, features], and gains.

    It does for 3x3 kernels with stride 1 and padding 1, in float32, channels in multiples of 16.
    padding: pairs, before and after, of rows and of columns.
    """
    batch, height, width = x.shape[:3]
    if not _on or jax.export.is_symbolic_dim(batch) or not x.dtype == kernel.dtype == jnp.float32:
        return False
    if kernel.shape[:2] != (3, 3) or any(size % 16 for size in kernel.shape[2:]):
        return False
    tiles = batch * -(-height // 4) * -(-width // 4)
    padded = tuple(map(tuple, padding)) == ((1, 1), (1, 1))
    return padded and tuple(strides) == (1, 1) and tiles >= LEAST_TILES


def convolve(x: Array, kernel: Array) -> Array:
    """[B, H, W, C] x [3, 3, C, features] -> [B, H, W, features], with zeros around the maps.

    On CPUs only.  It can be differentiated in reverse, any number of times.
    """
    return _convolve(*alike(x, kernel), False)


def alike(*arrays: Array) -> tuple[Array, ...]:
    """The arrays, each varying over all axes of shard_map over which one of them does."""
    axes = [getattr(kind, 'manual_axis_type', kind) for kind in map(jax.typeof, arrays)]
    axes = [getattr(each, 'varying', getattr(each, 'vma', frozenset())) for each in axes]
    wanted = frozenset().union(*axes)
    return tuple(
        jax.lax.pcast(x, tuple(sorted(wanted - own)), to='varying') if wanted - own else x
        for x, own in zip(arrays, axes, strict=True)
    )


def _call(target: str, shape: tuple[int, ...], x: Array, other: Array, **given: Any) -> Array:
    """The result of a target of XLA, of a shape; it varies over axes of shard_map as `x` does."""
    kind = jax.eval_shape(lambda x: jnp.broadcast_to(x.ravel()[0], shape), x)
    return jax.ffi.ffi_call(target, kind, vmap_method='sequential')(x, other, **given)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _convolve(x: Array, kernel: Array, flipped: bool) -> Array:
    """flipped: the adjoint, [B, H, W, features] x [3, 3, C, features] -> [B, H, W, C]."""
    shape = (*x.shape[:3], kernel.shape[2 if flipped else 3])
    return _call(CONVOLVE, shape, x, kernel, flipped=flipped)


@jax.custom_vjp
def _of_kernel(x: Array, y: Array) -> Array:
    """The gradient of the kernel, [3, 3, C, features], from inputs and gradients of outputs."""
    return _call(OF_KERNEL, (3, 3, x.shape[3], y.shape[3]), x, y)


def _convolve_forward(x: Array, kernel: Array, flipped: bool) -> tuple[Array, Any]:
    return _convolve(x, kernel, flipped), (x, kernel)


def _convolve_backward(flipped: bool, kept: Any, gradient: Array) -> tuple[Array, Array]:
    x, kernel = kept
    of_kernel = _of_kernel(gradient, x) if flipped else _of_kernel(x, gradient)
    return _convolve(gradient, kernel, not flipped), of_kernel


def _of_kernel_forward(x: Array, y: Array) -> tuple[Array, Any]:
    return _of_kernel(x, y), (x, y)


def _of_kernel_backward(kept: Any, gradient: Array) -> tuple[Array, Array]:
    x, y = kept
    return _convolve(y, gradient, True), _convolve(x, gradient, False)


_convolve.defvjp(_convolve_forward, _convolve_backward)
_of_kernel.defvjp(_of_kernel_forward, _of_kernel_backward)
