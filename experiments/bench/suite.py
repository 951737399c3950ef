"""Speed of every method at the sizes users have, in one table.

    python experiments/bench/suite.py --output=experiments/bench [--methods=cpsc,nayer,...]
        [--sizes=digits,cifar10:wrn40_2/wrn16_2,cifar10:resnet34/resnet18,imagenet]
        [--batch=128] [--seconds=2] [--dtype=float32]

A size is a file of configs/ and, after a colon, TEACHER/STUDENT.  Each method runs at its published
setting there, with random weights and batches of --batch (at 64 px and more: --large-batch).  A
round keeps the published proportion of generator and student steps, with at most --most steps of a
kind.

    compilation     seconds, of one generator and one student step
    step, round     milliseconds, medians
    host            milliseconds until a round's call returns, while the device still works
    evaluation      images/s of the student
    memory          MB of the larger step's program: arguments, results and temporaries
    of the ceiling  FLOP/s of a step, as XLA counts its FLOPs, over those of a matrix product of
                    2048 in the same run and dtype

`sd_step.py` times DiffDFKD's trajectories; `steps.py` compares CPSC-DFKD and NAYER with PyTorch.
"""

from __future__ import annotations

import argparse
import functools
import gc
import importlib
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import jax
import jax.numpy as jnp
import ours

from dfkd_jax.configs import common
from dfkd_jax.methods import METHODS

SIZES = 'digits,cifar10:wrn40_2/wrn16_2,cifar10:resnet34/resnet18,imagenet'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--output', type=Path, required=True)
    parser.add_argument('--sizes', default=SIZES)
    parser.add_argument('--methods', default=','.join(m for m in METHODS if m != 'diffdfkd'))
    parser.add_argument('--batch', type=int, default=128)
    parser.add_argument('--large-batch', type=int, default=16, help='at 64 px and more')
    parser.add_argument('--most', type=int, default=4, help='steps of a kind in a round')
    parser.add_argument('--seconds', type=float, default=2.0, help='timed, for each cell')
    parser.add_argument('--dtype', default='float32')
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)

    result = ours.facts(args) | {'ceilings': measure_ceilings(args.seconds), 'rows': []}
    path = args.output / f'suite-{result["platform"]}-{args.dtype}'
    for size in args.sizes.split(','):
        for method in args.methods.split(','):
            row = measure(args, size, method, result['ceilings'])
            result['rows'].append(row)
            print(json.dumps(row), flush=True)
            result['load_after'] = os.getloadavg()
            path.with_suffix('.json').write_text(json.dumps(result, indent=2, default=str) + '\n')
            path.with_suffix('.md').write_text(report(result))
            jax.clear_caches()
            gc.collect()


def measure_ceilings(seconds: float) -> dict[str, float]:
    """GFLOP/s (for the copy: GB/s) of each of `ours.ceilings`."""
    return {name: work / median(call, seconds) for name, (work, call) in ours.ceilings().items()}


def median(call: Callable[[], Any], seconds: float) -> float:
    """The median seconds of a call, over as many as fit into `seconds`, at least three."""
    jax.block_until_ready(call())
    taken = ours.interleave({'': lambda: jax.block_until_ready(call())}, seconds, least=3)['']
    return statistics.median(taken)


def make_config(args: argparse.Namespace, size: str, method: str) -> Any:
    """The published setting of a method at a size, with rounds that take a CPU seconds."""
    name, _, networks = size.partition(':')
    config = importlib.import_module(f'dfkd_jax.configs.{name}').get_config(method)
    if networks:
        config.teacher.model, config.student.model = networks.split('/')
    config.dtype, config.parallel = args.dtype, 'shard_map'
    batch = args.batch if config.data.image_size < 64 else args.large_batch
    config.synthesis.batch_size = config.synthesis.student_batch_size = batch
    for field, batches in (('bank', 4), ('memory', 4), ('negatives', 1)):
        if config.synthesis.get(field):
            config.synthesis[field] = batches * batch
    p = config.phases[-1]
    steps = {'g_steps': p.loops * p.g_steps, 's_steps': p.s_steps}
    scale = min(args.most / max(steps.values()), 1.0)
    rounded = {name: max(round(scale * n), 1) if n else 0 for name, n in steps.items()}
    config.phases = (common.phase(rounds=1000, **rounded),)
    return config


def measure(
    args: argparse.Namespace, size: str, method: str, ceilings: dict[str, float]
) -> dict[str, Any]:
    """A row of the table."""
    config = make_config(args, size, method)
    steps = ours.Steps(config)
    phase, batch = config.phases[0], config.synthesis.batch_size
    row: dict[str, Any] = {
        'size': f'{config.data.name} {config.data.image_size} px',
        'pair': f'{config.teacher.model}/{config.student.model}',
        'method': method,
        'batch': batch,
        'round': f'{phase.g_steps}+{phase.s_steps}',
    }
    kinds = [kind for kind in steps.programs if phase[f'{kind[0]}_steps']]
    programs = {kind: steps.programs[kind] for kind in kinds}
    row['compile_seconds'] = sum(program.seconds for program in programs.values())
    row['memory_mb'] = max(program.megabytes for program in programs.values())
    best = ceilings['matrix product' + (', bfloat16' if args.dtype == 'bfloat16' else '')]
    for kind, program in programs.items():
        seconds = time_step(steps.stepwise(kind, 1), args.seconds)
        row |= {
            f'{kind}_ms': 1e3 * seconds,
            f'{kind}_gflop': program.gflop,
            f'{kind}_of_ceiling': program.gflop / seconds / best,
        }
    row['round_ms'] = 1e3 * time_step(steps.round(1), args.seconds)
    row['host_ms'] = 1e3 * host(steps)
    row['evaluation_images_per_second'] = evaluation(steps, batch, args.seconds)
    stats = jax.devices()[0].memory_stats() or {}
    row['device_peak_mb'] = stats.get('peak_bytes_in_use', 0) / 1e6
    return row


def time_step(block: Callable[[], None], seconds: float) -> float:
    block()
    return statistics.median(ours.interleave({'': block}, seconds, least=3)[''])


def host(steps: ours.Steps) -> float:
    """Seconds until a round's call returns: the median of three, each on an idle device."""
    taken = []
    for i in range(3):
        started = time.perf_counter()
        key = jax.random.fold_in(steps.key, i)
        steps.state, _ = steps.whole_round(steps.frozen, steps.state, key)
        taken.append(time.perf_counter() - started)
        jax.block_until_ready(steps.state)
    return statistics.median(taken)


def evaluation(steps: ours.Steps, batch: int, seconds: float) -> float:
    """Images/s of the student's predictions."""

    def predict(variables: Any, images: jax.Array) -> jax.Array:
        return jnp.argmax(steps.models.student.apply(variables, images).logits, -1)

    images = jnp.zeros((batch, *steps.models.image_shape))
    call = functools.partial(steps.plan.predict(predict), steps.state.student.variables, images)
    return batch / median(call, seconds)


def report(result: dict[str, Any]) -> str:
    """A result as Markdown."""
    versions = ', '.join(f'{name} {version}' for name, version in result['versions'].items())
    load = ' -> '.join(f'{result[f"load_{when}"][0]:.1f}' for when in ('before', 'after'))
    limits = ', '.join(f'{name} {value:.0f}' for name, value in result['ceilings'].items())
    rows = []
    for row in result['rows']:
        cells = [row['size'], row['pair'], row['method'], row['batch'],
                 f'{row["compile_seconds"]:.0f}']  # fmt: skip
        for kind in ('generator', 'student'):
            some = f'{kind}_ms' in row
            cells.append(f'{row[f"{kind}_ms"]:.0f}' if some else '')
            cells.append(f'{100 * row[f"{kind}_of_ceiling"]:.0f} %' if some else '')
        cells += [f'{row["round_ms"]:.0f} ({row["round"]})', f'{row["host_ms"]:.1f}']
        cells += [f'{row[name]:.0f}' for name in ('evaluation_images_per_second', 'memory_mb')]
        rows.append(cells)
    head = ['size', 'pair', 'method', 'batch', 'compilation, s', 'generator step, ms',
            'of the ceiling', 'student step, ms', 'of the ceiling', 'round, ms (steps)', 'host, ms',
            'evaluation, images/s', 'memory, MB']  # fmt: skip
    return '\n\n'.join([
        f'`{result["command"]}`',
        f'{result["device"]}, {result["cores"]} cores; {versions}; {result["arguments"]["dtype"]}; '
        f'load average {load}.  Ceilings, GFLOP/s: {limits}.',
        ours.table(head, rows),
    ]) + '\n'  # fmt: skip


if __name__ == '__main__':
    main()
