"""A method's steps for n seeds: side by side in one program against one by one.

    python experiments/bench/seeds.py [--config=digits] [--method=cpsc] [--seeds=3] [--output=DIR]

Both do the same updates from the same states: `jax.vmap` over states and keys with a shared
teacher, against n calls of the step compiled for one.  They take turns, so that other load on the
machine affects both; the fastest of --turns counts.  The teacher's weights are random: they cost
the same.
"""

from __future__ import annotations

import argparse
import csv
import importlib
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from dfkd_jax import build
from dfkd_jax.contract import Frozen
from dfkd_jax.storage import workdir


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--config', default='digits')
    parser.add_argument('--method', default='cpsc')
    parser.add_argument('--seeds', type=int, default=3)
    parser.add_argument('--turns', type=int, default=10)
    parser.add_argument('--output', type=Path)
    args = parser.parse_args()
    config = importlib.import_module(f'dfkd_jax.configs.{args.config}').get_config(args.method)
    config.parallel = 'jit'
    run = build.build(config)
    blank = jnp.zeros((1, *run.models.image_shape))
    frozen = Frozen(run.models.teacher.init(jax.random.key(0), blank), run.extra)
    keys = jax.random.split(jax.random.key(1), args.seeds)
    states = [run.whole.init(frozen, key) for key in keys]
    together = jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)

    rows = []
    for name in ('generator_step', 'student_step'):
        step = getattr(run.whole, name)
        one = jax.jit(step)
        all_at_once = jax.jit(jax.vmap(step, in_axes=(None, 0, 0)))

        def in_turn(one: Callable = one) -> list[Any]:
            return [one(frozen, state, key) for state, key in zip(states, keys)]

        def side_by_side(step: Callable = all_at_once) -> Any:
            return step(frozen, together, keys)

        for each in (in_turn, side_by_side):  # compiles
            jax.block_until_ready(each())
        took = [(seconds(in_turn), seconds(side_by_side)) for _ in range(args.turns)]
        sequential, vmapped = map(min, zip(*took))
        rows.append({
            'config': args.config, 'method': args.method, 'seeds': args.seeds, 'step': name,
            'one_by_one_ms': round(1e3 * sequential, 1), 'vmap_ms': round(1e3 * vmapped, 1),
            'speedup': round(sequential / vmapped, 2), 'device': workdir.device(),
            'cores': os.cpu_count(), 'load_average': round(os.getloadavg()[0], 1),
            'jax': jax.__version__,
        })  # fmt: skip
        print(rows[-1], flush=True)
    if args.output:
        path = args.output / 'seeds.csv'
        new = not path.exists()
        with open(path, 'a', newline='') as file:
            writer = csv.DictWriter(file, list(rows[0]), lineterminator='\n')
            if new:
                writer.writeheader()
            writer.writerows(rows)


def seconds(call: Callable[[], Any]) -> float:
    started = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - started


if __name__ == '__main__':
    main()
