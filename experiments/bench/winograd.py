"""Compares `native`'s convolutions with XLA's and PyTorch's, forward and both gradients.

    python experiments/bench/winograd.py > experiments/bench/winograd.csv

GFLOP/s of a plain 3x3 convolution that takes as long: medians of alternating turns in one process,
so ratios are firmer than rates.  XLA's gradient of the kernel is in parts (`convolve_parts`).
"""

from __future__ import annotations

import statistics
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import jax
import jax.numpy as jnp
import numpy as np
import ours
import torch
import torch.nn.functional as F

from dfkd_jax import native
from dfkd_jax.models import layers, winograd

# Batch, pixels on a side, channels in and out; the last are near the least number of tiles.
SHAPES = [
    (128, 32, 16), (128, 32, 32), (128, 32, 64), (128, 16, 32), (128, 16, 64), (128, 8, 64),
    (128, 8, 128), (128, 8, 256), (128, 4, 512), (64, 4, 64), (64, 4, 512), (16, 4, 256),
    (16, 4, 512),
]  # fmt: skip
PADDING, LAYOUT = ((1, 1), (1, 1)), ('NHWC', 'HWIO', 'NHWC')


def plain(x: Any, kernel: Any) -> Any:
    return layers.convolve_parts(x, kernel, (1, 1), PADDING, dimension_numbers=LAYOUT)


def passes(way: Any, x: Any, kernel: Any, gradient: Any) -> dict[str, Any]:
    """A compiled call for each pass."""
    pull = {
        'forward': way,
        'of the image': lambda x, k, g: jax.vjp(lambda x: way(x, k), x)[1](g)[0],
        'of the kernel': lambda x, k, g: jax.vjp(lambda k: way(x, k), k)[1](g)[0],
    }
    calls = {}
    for name, fn in pull.items():
        given = (x, kernel) if name == 'forward' else (x, kernel, gradient)
        program = jax.jit(fn).lower(*given).compile()
        calls[name] = lambda p=program, given=given: jax.block_until_ready(p(*given))
    return calls


def torch_passes(x: Any, kernel: Any, gradient: Any) -> dict[str, Any]:
    x, gradient = (
        torch.tensor(np.asarray(a)).permute(0, 3, 1, 2).contiguous() for a in (x, gradient)
    )
    kernel = torch.tensor(np.asarray(kernel)).permute(3, 2, 0, 1).contiguous()

    def back(*wanted: bool) -> Any:
        return torch.ops.aten.convolution_backward(
            gradient, x, kernel, None, (1, 1), (1, 1), (1, 1), False, (0, 0), 1, wanted
        )

    return {
        'forward': lambda: F.conv2d(x, kernel, padding=1),
        'of the image': lambda: back(True, False, False),
        'of the kernel': lambda: back(False, True, False),
    }


def main() -> None:
    native.register()
    print('batch,px,channels,pass,xla,winograd,pytorch,to_xla,to_pytorch')
    for batch, side, channels in SHAPES:
        x, kernel, gradient = (
            jax.random.normal(jax.random.key(i), shape)
            for i, shape in enumerate(
                [(batch, side, side, channels), (3, 3, channels, channels)]
                + [(batch, side, side, channels)]
            )
        )
        kernel = kernel / jnp.sqrt(9.0 * channels)
        sides = [
            passes(plain, x, kernel, gradient),
            passes(winograd.convolve, x, kernel, gradient),
            torch_passes(x, kernel, gradient),
        ]
        work = 18e-9 * batch * side**2 * channels**2
        for name in sides[0]:
            blocks = {str(i): calls[name] for i, calls in enumerate(sides)}
            for block in blocks.values():
                block()
            taken = list(ours.interleave(blocks, 0.4).values())
            rates = [work / statistics.median(seconds) for seconds in taken]
            ratios = [statistics.median(a / b for a, b in zip(taken[i], taken[1])) for i in (0, 2)]
            row = [batch, side, channels, name]
            row += [round(rate) for rate in rates] + [round(ratio, 2) for ratio in ratios]
            print(*row, sep=',', flush=True)


if __name__ == '__main__':
    main()
