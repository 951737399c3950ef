"""What a round costs a device, and what crosses between 1, 2, 4 and 8: compiled, never run.

    python experiments/bench/scaling.py [--sizes=digits,cifar10,imagenet] [--methods=cpsc,nayer]
        [--devices=1,2,4,8] [--output=experiments/bench/scaling.csv]

Every step of a method is compiled for virtual devices of the CPU, from shapes alone.  XLA counts
its FLOPs; the all-reduces and all-gathers are read from its program and summed.  A round is each
step times its number in the config's last phase.  No step runs, so nothing here is a speed.  New
rows replace those of the same size, method and devices, and the file fills the table of
`experiments/scaling.md`.
"""

from __future__ import annotations

import argparse
import csv
import importlib
import re
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dfkd_jax import build
from dfkd_jax.contract import Frozen, unchanged
from dfkd_jax.data import loading
from dfkd_jax.distributed import sharding
from dfkd_jax.methods import METHODS
from dfkd_jax.models import layers

BYTES = {'f32': 4, 's32': 4, 'u32': 4, 'f16': 2, 'bf16': 2, 'u8': 1, 'pred': 1}
COLUMNS = ['size', 'method', 'devices', 'step', 'times', 'gflop', 'sums', 'mbyte', 'gradient_mbyte']


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--sizes', default='digits,cifar10,imagenet')
    parser.add_argument('--methods', default='cpsc,nayer')
    parser.add_argument('--devices', default='1,2,4,8')
    parser.add_argument('--output', default='experiments/bench/scaling.csv')
    arguments = parser.parse_args()
    jax.config.update('jax_platforms', 'cpu')
    jax.config.update('jax_num_cpu_devices', 8)
    jax.config.update('jax_disable_most_optimizations', True)
    layers.PART = 2**62  # one part: XLA counts the body of the loop over parts only once
    for size in arguments.sizes.split(','):
        for method in arguments.methods.split(','):
            for devices in map(int, arguments.devices.split(',')):
                started = time.monotonic()
                rows = list(measure(size, method, devices))
                keep(Path(arguments.output), rows)
                page(Path(arguments.output), Path('experiments/scaling.md'))
                print(size, method, devices, f'{time.monotonic() - started:.0f} s', flush=True)


def measure(size: str, name: str, devices: int) -> Any:
    """A row for every step of a round."""
    config = importlib.import_module(f'dfkd_jax.configs.{size}').get_config(name)
    plan = sharding.make('shard_map', jax.devices()[:devices], fused=False)
    facts = loading.check(config.data)
    table = None
    if 'labels' in config:
        table = np.zeros((config.data.num_classes, 384), np.float32)
    shared = build.make_models(config, facts, plan.shards.axis, table)
    method = METHODS[name](config, shared, plan.shards)
    whole = METHODS[name](config, build.make_models(config, facts, None, table), sharding.Shards())
    image = jax.ShapeDtypeStruct((1, *shared.image_shape), np.float32)
    variables = jax.eval_shape(lambda x: whole_of(shared.teacher).init(jax.random.key(0), x), image)
    frozen = Frozen(
        teacher={'batch_stats': {}} | dict(variables), extra=() if table is None else table
    )
    key = jax.random.key(0)
    state = jax.eval_shape(whole.init, frozen, key)
    phase = config.phases[-1]
    times = {
        'begin': phase.loops,
        'generator_step': phase.loops * phase.g_steps,
        'finish': phase.loops,
        'student_step': phase.s_steps,
    }
    trained = {'generator_step': state.generator, 'student_step': state.student}
    for step, number in times.items():
        fn = getattr(method, step)
        if fn is unchanged or not number:
            continue
        program = plan.compile(fn).lower(frozen, state, key).compile()
        sums, crossing = crossings(program.as_text())
        gradient = 0
        if step in trained:
            gradient = 4 * sum(x.size for x in jax.tree.leaves(trained[step].params))
        yield {
            'size': size, 'method': name, 'devices': devices, 'step': step, 'times': number,
            'gflop': f'{program.cost_analysis()["flops"] / 1e9:.5g}', 'sums': sums,
            'mbyte': f'{crossing / 1e6:.5g}', 'gradient_mbyte': f'{gradient / 1e6:.5g}',
        }  # fmt: skip


def whole_of(module: Any) -> Any:
    return module.clone(axis_name=None)


def crossings(text: str) -> tuple[int, float]:
    """The number of all-reduces and all-gathers in a program, and their bytes.

    A gather sends each byte of its result once where a sum sends it twice, so it counts by half.
    """
    count, total = 0, 0.0
    for line in text.splitlines():
        match = re.search(r'= (.*?) all-(reduce|gather)(?:-start)?\(', line)
        if match:
            count += 1
            for kind, sides in re.findall(r'\b(\w+)\[([\d,]*)\]', match[1]):
                size = BYTES[kind] * int(np.prod([int(n) for n in sides.split(',') if n]))
                total += size if match[2] == 'reduce' else size / 2
    return count, total


# Vendors' figures per chip: peak bf16 FLOP/s, and bytes/s between chips that are far apart.
CHIPS = {
    'v5e': (197e12, 200e9),
    'H200 in a host': (989e12, 450e9),
    'H200 over hosts': (989e12, 50e9),
}
SHARE = 0.3  # of the peak that steps reach: assumed
LATENCY = 10e-6  # seconds of a sum, however small: assumed


def page(path: Path, text: Path) -> None:
    """Fills the page's table from the rows, between its marks."""
    runs: dict[tuple[str, str], dict[int, list[dict[str, str]]]] = {}
    for row in csv.DictReader(path.open()):
        by_devices = runs.setdefault((row['size'], row['method']), {})
        by_devices.setdefault(int(row['devices']), []).append(row)
    lines = [
        '| | devices | TFLOP a device | of 1/n | sums | MB in sums | of it gradients '
        '| n, v5e | n, H200 in a host | n, H200 over hosts |',
        '|---|---|---|---|---|---|---|---|---|---|',
    ]

    def total(rows: list[dict[str, str]], column: str) -> float:
        return sum(int(row['times']) * float(row[column]) for row in rows)

    for (size, method), found in runs.items():
        alone = min(found)
        work = alone * 1e9 * total(found[alone], 'gflop')
        for devices, rows in sorted(found.items()):
            mega, sums = total(rows, 'mbyte'), total(rows, 'sums')
            flops = 1e9 * total(rows, 'gflop')
            counts = [
                0.1 * work / (peak * SHARE) / (2 * 1e6 * mega / speed + sums * LATENCY)
                for peak, speed in CHIPS.values()
            ]
            cells = [
                f'{size}, {method}', devices, f'{flops / 1e12:.4g}',
                f'{flops * devices / work:.3f}',
                f'{sums:.0f}', f'{mega:.4g}', f'{total(rows, "gradient_mbyte"):.4g}',
                *(f'{count:.2g}' for count in counts),
            ]  # fmt: skip
            lines.append('| ' + ' | '.join(map(str, cells)) + ' |')
    before, _, rest = text.read_text().partition('<!-- table -->\n')
    after = rest.partition('<!-- end -->')[2]
    table = '\n'.join(lines)
    text.write_text(f'{before}<!-- table -->\n{table}\n<!-- end -->{after}')


def keep(path: Path, rows: list[dict[str, Any]]) -> None:
    """Writes rows into the table, replacing those of the same run."""
    new = {(row['size'], row['method'], str(row['devices'])) for row in rows}
    old = list(csv.DictReader(path.open())) if path.exists() else []
    rows = [r for r in old if (r['size'], r['method'], r['devices']) not in new] + rows
    with path.open('w', newline='') as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator='\n')
        writer.writeheader()
        writer.writerows(rows)


if __name__ == '__main__':
    main()
