"""What growth costs: steps on 1 to 8 virtual devices of a CPU, at batches of 128 to 1024.

    python experiments/bench/growth.py [--method=cpsc] [--pair=wrn16_2/wrn16_1]
        [--devices=1,2,4,8] [--batches=128,256,512,1024] [--output=experiments/bench/growth.md]

Virtual devices share the cores, so the model of `experiments/scaling.md` predicts for n of them the
time of one, times the FLOPs of all n over those of one: what is above is the cost of sharing and of
what crosses.  For a batch it predicts the time of the smallest, times the ratio of their sizes.
Memory is that of a device's larger program: arguments, results and temporaries.
"""

from __future__ import annotations

import argparse
import gc
import os
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
os.environ.setdefault('JAX_NUM_CPU_DEVICES', '8')  # read when the backend starts

import jax
import ours

from dfkd_jax.configs import cifar10

KINDS = ('generator', 'student')


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--method', choices=('cpsc', 'nayer'), default='cpsc')
    parser.add_argument('--pair', default='wrn16_2/wrn16_1', help='TEACHER/STUDENT')
    parser.add_argument('--width', type=int, default=32, help="the generator's")
    parser.add_argument('--devices', default='1,2,4,8')
    parser.add_argument('--batches', default='128,256,512,1024')
    parser.add_argument('--turns', type=int, default=5, help='timed steps of each kind')
    parser.add_argument('--output', type=Path, default=Path(__file__).with_suffix('.md'))
    args = parser.parse_args()
    jax.config.update('jax_platforms', 'cpu')
    facts = ours.facts(args)
    first: dict[str, float] = {}  # milliseconds of the smallest batch, one device
    rows = []
    for batch in map(int, args.batches.split(',')):
        alone: dict[str, tuple[float, float]] = {}  # milliseconds and GFLOP of one device
        for devices in map(int, args.devices.split(',')):
            steps = ours.Steps(make_config(args, batch), devices)
            row = [batch, devices]
            for kind in KINDS:
                block = steps.stepwise(kind, 1)
                block()
                took = 1e3 * statistics.median(ours.time_block(block) for _ in range(args.turns))
                work = devices * steps.programs[kind].gflop
                alone.setdefault(kind, (took, work))
                first.setdefault(kind, took / batch)
                of_devices = alone[kind][0] * work / alone[kind][1]
                row += [f'{took:.0f}', f'{of_devices:.0f}', f'{first[kind] * batch:.0f}']
            row.append(f'{max(steps.programs[kind].megabytes for kind in KINDS):.0f}')
            rows.append(row)
            print(*row, flush=True)
            del steps
            gc.collect()
            jax.clear_caches()
    head = ['batch', 'devices']
    head += [f'{k} step, {x}' for k in KINDS for x in ('ms', 'of one device', 'of the batch')]
    head.append('MB a device')
    text = (
        f'# Growth: {args.method}, {args.pair.replace("/", " -> ")}, generator width '
        f'{args.width}, 32 px\n\n`{facts["command"]}`, {facts["device"]}, {facts["cores"]} cores, '
        f'jax {facts["versions"]["jax"]}, load {facts["load_before"][0]:.1f}. "of one device" and '
        '"of the batch" are what the model predicts from one device and from the smallest batch.'
    )
    args.output.write_text(f'{text}\n\n{ours.table(head, rows)}\n')


def make_config(args: argparse.Namespace, batch: int):
    config = ours.resize(cifar10.get_config(args.method), args.pair, batch, '1+1')
    config.generator.width = args.width
    return config


if __name__ == '__main__':
    main()
