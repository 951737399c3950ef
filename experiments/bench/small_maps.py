"""Compares `layers.convolve_small` with XLA's convolution on maps smaller than the kernel.

    python experiments/bench/small_maps.py > experiments/bench/small_maps.csv

Milliseconds, best of four alternating turns: of a convolution with both gradients, 3x3 with 512
channels, for each size of map and stride; and of a training pass of whole networks.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import jax
import jax.numpy as jnp

from dfkd_jax import models
from dfkd_jax.models import layers

WAYS = {'xla': layers.convolve_parts, 'patches': layers.convolve_small}
BATCH, CHANNELS = 16, 512
SIZES = [(1, 1), (2, 1), (2, 2), (3, 2), (4, 2)]  # pixels on a side, stride
NETWORKS = [('resnet18_imagenet', 64)]


def of_convolution(size: int, stride: int) -> tuple[Callable, tuple]:
    x = jax.random.normal(jax.random.key(0), (BATCH, size, size, CHANNELS))
    kernel = jax.random.normal(jax.random.key(1), (3, 3, CHANNELS, CHANNELS))

    def loss(x: Any, kernel: Any) -> Any:
        layout = ('NHWC', 'HWIO', 'NHWC')
        padding = ((1, 1), (1, 1))
        y = layers.convolve(x, kernel, (stride, stride), padding, dimension_numbers=layout)
        return jnp.sum(jnp.square(y))

    return jax.value_and_grad(loss, (0, 1)), (x, kernel)


def of_network(name: str, size: int) -> tuple[Callable, tuple]:
    module = models.make(name)
    images = jax.random.normal(jax.random.key(0), (BATCH, size, size, 3))
    variables = jax.jit(module.init)(jax.random.key(1), images[:1])

    def loss(params: Any, stats: Any, images: Any) -> Any:
        variables = {'params': params, 'batch_stats': stats}
        out = module.apply(variables, images, train=True, mutable=['batch_stats'])[0]
        return jnp.sum(jnp.square(out.logits))

    return jax.grad(loss), (variables['params'], variables.get('batch_stats', {}), images)


def row(name: str, px: int, stride: int | str, fn: Callable, given: tuple) -> None:
    """Prints the best times, after a comparison of the numbers."""
    programs, results, best = {}, {}, dict.fromkeys(WAYS, float('inf'))
    for way, layers.convolve_small in WAYS.items():
        fresh = jax.jit(lambda *given: fn(*given))  # traced anew
        programs[way] = fresh.lower(*given).compile()
        results[way] = programs[way](*given)
    for a, b in zip(*map(jax.tree.leaves, results.values()), strict=True):
        assert jnp.abs(a - b).max() <= 1e-3 * jnp.abs(b).max(), (name, px, stride)
    for _ in range(4):
        for way, program in programs.items():
            started = time.perf_counter()
            jax.block_until_ready(program(*given))
            best[way] = min(best[way], time.perf_counter() - started)
    times = [round(1e3 * best[way], 1) for way in WAYS]
    print(name, px, stride, BATCH, *times, round(times[0] / times[1], 1), sep=',', flush=True)


def main() -> None:
    print('what,px,stride,batch,xla_ms,patches_ms,ratio')
    for size, stride in SIZES:
        row('convolution', size, stride, *of_convolution(size, stride))
    for name, size in NETWORKS:
        row(name, size, '', *of_network(name, size))


if __name__ == '__main__':
    main()
