"""What larger pages of memory save: rounds with and without `glibc.malloc.hugetlb=1`.

    python experiments/bench/huge_pages.py > experiments/bench/huge_pages.csv

XLA asks for the memory of its temporaries at every step, and the kernel hands it out a page at a
time, each with a fault.  The variable GLIBC_TUNABLES makes glibc ask for pages of 2 MB (Linux,
glibc 2.35 or later, transparent huge pages at `madvise` or `always`).  It is read when a process
starts, so each turn is a process; with and without take turns.  Seconds are of a round, wall and
CPU.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

SIZES = {  # by config: teacher and student; steps of the generator and of the student in a round
    'digits': ('resnet8/resnet8_half', '3+20'),
    'cifar10': ('wrn40_2/wrn16_1', '2+2'),
}
TUNABLE = 'glibc.malloc.hugetlb=1'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--sizes', default=','.join(SIZES))
    parser.add_argument('--methods', default='cpsc,nayer')
    parser.add_argument('--turns', type=int, default=3)
    parser.add_argument('--seconds', type=float, default=10.0, help='timed in each turn')
    parser.add_argument('--one', help='SIZE,METHOD: one turn in this process')
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(*args.one.split(','), args.seconds)))
        return
    print('size,method,huge_pages,turn,seconds,cpu_seconds,page_faults')
    for size in args.sizes.split(','):
        for method in args.methods.split(','):
            for turn in range(args.turns):
                for huge in (False, True):
                    found = run(f'{size},{method}', huge, args.seconds)
                    print(size, method, huge, turn, *found, sep=',', flush=True)


def run(one: str, huge: bool, seconds: float) -> list[float]:
    environment = {k: v for k, v in os.environ.items() if k != 'GLIBC_TUNABLES'}
    if huge:
        environment['GLIBC_TUNABLES'] = TUNABLE
    command = [sys.executable, __file__, f'--one={one}', f'--seconds={seconds}']
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def measure(size: str, method: str, seconds: float) -> list[float]:
    """Wall seconds, CPU seconds and page faults of a round, after one that is not counted."""
    import jax
    import ours

    from dfkd_jax.configs import cifar10, digits

    jax.config.update('jax_platforms', 'cpu')
    pair, steps = SIZES[size]
    config = {'digits': digits, 'cifar10': cifar10}[size].get_config(method)
    config = ours.resize(config, pair, 128, steps)
    block = ours.Steps(config).round(1)
    block()
    before, started, rounds = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter(), 0
    while (took := time.perf_counter() - started) < seconds or rounds < 3:
        block()
        rounds += 1
    after = resource.getrusage(resource.RUSAGE_SELF)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    faults = after.ru_minflt - before.ru_minflt
    return [round(took / rounds, 4), round(cpu / rounds, 4), round(faults / rounds)]


if __name__ == '__main__':
    main()
