"""Two layers of the generators as `models.layers` computes them, beside the plain way.

    python experiments/bench/layers.py [--batch=512] [--dtype=bfloat16] [--seconds=1]
        [--shapes=16x128x128,112x64x64] [--output=DIR]

`UpsampleConv` is a product of patches, and plainly an upsampled map and its convolution.
`ConvTranspose` takes its kernel's gradient from the convolution that it transposes, and plainly
from XLA.  Milliseconds of the forward pass and of the gradient with respect to input and kernel
(medians of alternating turns), and the megabytes that a call holds.  Both ways must agree first.  A
shape is pixels of the input x channels in x channels out.
"""

from __future__ import annotations

import argparse
import csv
import functools
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import jax
import jax.numpy as jnp
import numpy as np
import ours

from dfkd_jax import build
from dfkd_jax.models import layers
from dfkd_jax.storage import workdir

# The largest difference of two ways that compute the same; a GPU's float32 is TensorFloat-32.
TOLERANCE = {'float32': 5e-3, 'bfloat16': 5e-2}
LAYOUT = ('NHWC', 'HWIO', 'NHWC')
# Of the generators at 32 px, then at 224 px.
SHAPES = '8x128x128,16x128x64,28x256x128,112x64x64'


def upsample_product(x: Any, kernel: Any) -> Any:
    module = layers.UpsampleConv(kernel.shape[-1], dtype=x.dtype)
    return module.apply({'params': {'kernel': kernel}}, x)


def upsample_plain(x: Any, kernel: Any) -> Any:
    big, pad = layers.upsample2(x), ((1, 1), (1, 1))
    kernel = kernel.astype(x.dtype)
    return jax.lax.conv_general_dilated(big, kernel, (1, 1), pad, dimension_numbers=LAYOUT)


def transposed_ours(x: Any, kernel: Any) -> Any:
    return layers.convolve_transposed(x, kernel.astype(x.dtype))


def transposed_plain(x: Any, kernel: Any) -> Any:
    kernel, pad = kernel.astype(x.dtype), ((2, 2), (2, 2))
    return jax.lax.conv_transpose(x, kernel, (2, 2), pad, transpose_kernel=True)


WAYS: dict[str, dict[str, Callable]] = {
    'UpsampleConv': {'ours': upsample_product, 'plain': upsample_plain},
    'ConvTranspose': {'ours': transposed_ours, 'plain': transposed_plain},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--batch', type=int, default=512)
    parser.add_argument('--dtype', choices=build.DTYPES, default='bfloat16')
    parser.add_argument('--seconds', type=float, default=1.0, help='timed, for each way')
    parser.add_argument('--shapes', default=SHAPES)
    parser.add_argument('--output', type=Path, help='of layers.csv, row by row')
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for shape in args.shapes.split(','):
        side, channels, features = map(int, shape.split('x'))
        # At 224 px, a batch of the size that fits there.
        batch = args.batch if side <= 16 else max(args.batch // 8, 1)
        for name in WAYS:
            rows += measure(name, (batch, side, channels, features), args)
            print(*rows[-2:], sep='\n', flush=True)
            if args.output:
                write(args.output, rows)


def measure(name: str, shape: tuple[int, int, int, int], args: argparse.Namespace) -> list[dict]:
    """A row for each pass of a layer.  Raises RuntimeError where the two ways differ."""
    batch, side, channels, features = shape
    random = np.random.default_rng(0).standard_normal
    x = jnp.asarray(random((batch, side, side, channels)), args.dtype)
    size = (3, 3, channels, features) if name == 'UpsampleConv' else (4, 4, features, channels)
    kernel = jnp.asarray(random(size) / (3 * channels**0.5), jnp.float32)
    wanted = jnp.asarray(random((batch, 2 * side, 2 * side, features)), args.dtype)
    rows = []
    for what in ('forward', 'gradient'):
        programs = {}
        for way, layer in WAYS[name].items():
            call = layer if what == 'forward' else gradient(layer)
            given = (x, kernel) if what == 'forward' else (x, kernel, wanted)
            program = ours.compile_program(jax.jit(call), *given)
            programs[way] = program._replace(call=functools.partial(program.call, *given))
        found = [jax.tree.leaves(program.call()) for program in programs.values()]
        worst = max(map(apart, *found))
        if not worst < TOLERANCE[args.dtype]:
            raise RuntimeError(f'{name}, {what}, {shape}: the two ways differ by {worst:.1e}.')
        blocks = {way: block(program.call) for way, program in programs.items()}
        taken = ours.interleave(blocks, args.seconds)
        ms = {way: 1e3 * statistics.median(seconds) / CALLS for way, seconds in taken.items()}
        rows.append({
            'layer': name, 'pass': what, 'batch': batch, 'px': side, 'channels': channels,
            'features': features, 'dtype': args.dtype,
            'ours_ms': round(ms['ours'], 4), 'plain_ms': round(ms['plain'], 4),
            'plain_over_ours': round(ms['plain'] / ms['ours'], 2),
            'ours_mb': round(programs['ours'].megabytes, 1),
            'plain_mb': round(programs['plain'].megabytes, 1), 'differ': f'{worst:.0e}',
            'device': workdir.device(), 'jax': jax.__version__,
        })  # fmt: skip
    return rows


CALLS = 10  # in a turn: a GPU's queue hides the start of all but the first


def block(call: Callable[[], Any]) -> Callable[[], None]:
    def turn() -> None:
        for _ in range(CALLS):
            out = call()
        jax.block_until_ready(out)

    turn()
    return turn


def gradient(layer: Callable) -> Callable:
    """The gradients of a layer with respect to its input and its kernel."""

    def call(x: Any, kernel: Any, wanted: Any) -> Any:
        return jax.vjp(layer, x, kernel)[1](wanted)

    return call


def apart(a: Any, b: Any) -> float:
    """The largest difference, relative to the largest value."""
    a, b = (np.asarray(v, np.float32) for v in (a, b))
    return float(np.abs(a - b).max() / np.abs(b).max())


def write(folder: Path, rows: list[dict[str, Any]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / 'layers.csv', 'w', newline='') as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator='\n')
        writer.writeheader()
        writer.writerows(rows)


if __name__ == '__main__':
    main()
