"""Kills a long run ten times: is its memory flat, does it recompile, does it continue?

    python experiments/soak.py --minutes=60 --output=experiments/soak

runs CAE-DFKD on small digits (its bank, two phases, evaluation and checkpoints) in a process of its
own.  It kills the process with SIGKILL ten times in the first half and leaves it alone in the
second.  From outside it checks

    memory       the resident set, once a second.  In the second half, after a fifth of it, no mean
                 of 30 seconds is more than 2 % from the median of these means
    compilation  JAX's log (`jax_log_compiles`).  Nothing is compiled after a phase's first row
    metrics      metrics.csv, before each kill and at the end.  No round is missing or there twice,
                 and rounds repeated after a kill have the same numbers, except for seconds

and writes ``memory.csv``, ``kills.csv`` and the receipt, ``README.md``.  The status is 1 if one of
the three does not hold.
"""

from __future__ import annotations

import argparse
import csv
import os
import platform
import random
import re
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from dfkd_jax.storage import workdir as folder

ROOT = Path(__file__).resolve().parents[1]
WARM_UP = 5  # rounds of the first phase
EVERY = 10  # rounds between rows and evaluations
# Rounds between checkpoints: about half a minute, more often than a long run saves.  Orbax keeps
# tenths of a MB of native memory for each save, and that must count too.
SAVE = 1000
ARGUMENTS = [
    '--config=configs/digits.py:cae,smoke', '--config.data.image_size=8',
    '--config.teacher.model=resnet8_half', '--config.teach.epochs=2', '--config.generator.width=8',
    '--config.synthesis.batch_size=40', '--config.synthesis.student_batch_size=40',
    '--config.synthesis.bank=400', f'--config.phases[0].rounds={WARM_UP}',
    '--config.phases[1].rounds=1000000', f'--config.log_every_rounds={EVERY}',
    f'--config.eval_every_rounds={EVERY}', f'--config.save_every_rounds={SAVE}',
    '--config.parallel=jit',
]  # fmt: skip
COMPILED = 'Finished XLA compilation of '
Rows = dict[int, dict[str, str]]


def rows_of(workdir: Path) -> Rows:
    """metrics.csv by round, without the seconds and without an incomplete last line."""
    path = workdir / 'metrics.csv'
    text = path.read_text() if path.exists() else ''
    lines = csv.DictReader(text[: text.rfind('\n') + 1].splitlines())
    return {int(row['round']): {k: v for k, v in row.items() if k != 'seconds'} for row in lines}


def resident(pid: int) -> float:
    """The resident memory of a process, in MB."""
    pages = int(Path(f'/proc/{pid}/statm').read_text().split()[1])
    return pages * os.sysconf('SC_PAGE_SIZE') / 1e6


def compiled_again(log: str) -> int:
    """How many programs a process compiled after the first row of its last phase."""
    past = 0
    for match in re.finditer(r'^round +(\d+)/', log, re.MULTILINE):
        if int(match[1]) > WARM_UP:
            past = match.end()
            break
    return log[past:].count(COMPILED) if past else 0


def soak(minutes: float, kills: int, output: Path, workdir: Path) -> list[str]:
    """Runs, kills, measures and writes the receipt; returns the checks that failed."""
    output.mkdir(parents=True, exist_ok=True)
    rng, wrong = random.Random(0), []
    began = time.monotonic()
    # Evenly spaced, so that each start gets somewhere, with a random share.
    each = minutes * 60 / 2 / kills
    ends = [each * (i + rng.uniform(0.8, 1)) for i in range(kills)] + [minutes * 60]
    samples: list[tuple[float, int, float]] = []
    killed: list[dict[str, float]] = []
    before: Rows = {}
    environment = os.environ | {'JAX_PLATFORMS': 'cpu', 'JAX_LOG_COMPILES': '1'}
    for number, end in enumerate(ends):
        log = output / f'start{number}.log'
        with open(log, 'wb') as file:
            run = subprocess.Popen(
                [sys.executable, '-m', 'dfkd_jax.main', *ARGUMENTS, f'--workdir={workdir}'],
                cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT,
            )  # fmt: skip
            while (now := time.monotonic() - began) < end:
                if run.poll() is not None:
                    raise SystemExit(f'error: the run ended by itself: see {log}')
                samples.append((now, number, resident(run.pid)))
                time.sleep(1)
            run.send_signal(signal.SIGKILL if number < kills else signal.SIGTERM)
            status = run.wait()
        text, rows = log.read_text(errors='replace'), rows_of(workdir)
        again = [round for round in before if round in rows and before[round] != rows[round]]
        lost = [round for round in before if round not in rows and round <= max(rows, default=0)]
        found = re.search(r'continuing after round (\d+) of', text)
        first = int(found[1]) if found else 0
        killed.append({
            'start': number, 'status': status, 'seconds': round(end), 'continued_after': first,
            'last_row': max(rows, default=0), 'rows_done_again': sum(r > first for r in before),
            'rows_that_differ': len(again) + len(lost), 'compiled_again': compiled_again(text),
        })  # fmt: skip
        print(killed[-1], flush=True)
        before = rows
        if 'Traceback' in text:
            wrong.append(f'start {number} left a traceback')
        if not compiled_again(text) == 0:
            wrong.append(f'start {number} compiled again')
        if again or lost:
            wrong.append(f'start {number} changed the rows of rounds {again + lost}')
        log.unlink()
    if status:
        wrong.append(f'asked to stop, it ended with status {status}')
    wanted = list(range(EVERY, max(before, default=0) + 1, EVERY))
    if [round for round in before if round % EVERY == 0] != wanted or not wanted:
        wrong.append('metrics.csv is not continuous')

    last = [(at, memory) for at, start, memory in samples if start == kills]
    settled = last[0][0] + (last[-1][0] - last[0][0]) / 5
    means: dict[int, list[float]] = {}
    for at, memory in last:
        if at >= settled:
            means.setdefault(int(at // 30), []).append(memory)
    levels = [statistics.mean(each) for each in means.values()]
    middle = statistics.median(levels)
    spread = 100 * max(abs(level / middle - 1) for level in levels)
    if spread > 2:
        wrong.append(f'memory moved by {spread:.1f} %')

    write_csv(output / 'memory.csv', [
        {'seconds': round(at), 'start': start, 'MB': round(memory, 1)}
        for at, start, memory in samples[::10]
    ])  # fmt: skip
    write_csv(output / 'kills.csv', killed)
    checks = (
        ('memory after the first fifth of the unbroken half: from its median, at most',
         f'{spread:.2f} % of {middle:.0f} MB', spread <= 2),
        ('programs compiled after the first row of a phase, in all starts',
         str(sum(row['compiled_again'] for row in killed)), 'compiled' not in ' '.join(wrong)),
        ('rows that were done again after a kill, and differ',
         f'{sum(row["rows_that_differ"] for row in killed)} of '
         f'{sum(row["rows_done_again"] for row in killed)}', 'rows' not in ' '.join(wrong)),
        ('rows of metrics.csv, none missing and none twice', str(len(before)),
         'continuous' not in ' '.join(wrong)),
    )  # fmt: skip
    lines = [
        '# A long run, killed', '',
        f'`python experiments/soak.py --minutes={minutes:g} --kills={kills}`: {kills} kills in the '
        f'first half; memory was read {len(samples)} times ([memory.csv](memory.csv), '
        '[kills.csv](kills.csv)).', '', '| | measured | holds |', '|---|---|---|',
        *(f'| {what} | {measured} | {"yes" if holds else "**no**"} |'
          for what, measured, holds in checks), '',
        *(f'**{each}.**' for each in wrong),
        f'{platform.processor() or platform.machine()}, {len(os.sched_getaffinity(0))} of '
        f'{os.cpu_count()} cores, Python {platform.python_version()}, '
        + ', '.join(f'{name} {version}' for name, version in folder.versions().items()) + '.', '',
    ]  # fmt: skip
    (output / 'README.md').write_text('\n'.join(lines))
    return wrong


def write_csv(path: Path, rows: Sequence[dict]) -> None:
    with open(path, 'w', newline='') as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator='\n')
        writer.writeheader()
        writer.writerows(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawTextHelpFormatter)  # fmt: skip
    parser.add_argument('--minutes', type=float, default=60)
    parser.add_argument('--kills', type=int, default=10)
    parser.add_argument('--output', type=Path, default=ROOT / 'experiments' / 'soak')
    parser.add_argument('--workdir', type=Path, default=Path('runs/soak'))
    args = parser.parse_args()
    if (args.workdir / 'config.json').exists():
        sys.exit(f'error: {args.workdir} holds a run: remove it, or give another --workdir.')
    wrong = soak(args.minutes, args.kills, args.output, args.workdir)
    print((args.output / 'README.md').read_text())
    if wrong:
        sys.exit('error: ' + '; '.join(wrong))


if __name__ == '__main__':
    main()
