"""What two methods need to reach the same accuracy: rounds, synthesis steps and seconds.

    python experiments/efficiency.py --config=FILE --output=FILE.md [--runs=DIR]
        [--rows=nayer,cae] [--levels=70,75,80,82.5,85]

Reads the `metrics.csv` of runs that `table.py` left under --runs.  For each level it finds the
first measured round at which the student's test accuracy is at least that, and averages over the
seeds that reach it.  Students are measured on the way, before their learning rate is annealed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dfkd_jax.reporting import metrics


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--config', type=Path, required=True)
    parser.add_argument('--output', type=Path, required=True)
    parser.add_argument('--runs', type=Path, default=Path('runs'))
    parser.add_argument('--rows', default='nayer,cae')
    parser.add_argument('--levels', default='70,75,80,82.5,85')
    args = parser.parse_args()
    rows = args.rows.split(',')

    heads = [f'{row}: rounds, synthesis steps, seconds' for row in rows]
    lines = [
        f'| student, % | {" | ".join(heads)} |',
        '|---' * (1 + len(rows)) + '|',
    ]
    for level in map(float, args.levels.split(',')):
        cells = []
        for row in rows:
            summaries = (args.runs / args.config.stem / row).glob('seed*/summary.json')
            runs = sorted(path.parent for path in summaries)  # finished ones
            reached = [point for run in runs if (point := first(run, level))]
            means = [f'{statistics.mean(column):.0f}' for column in zip(*reached, strict=True)]
            cells.append(', '.join([*means, f'{len(reached)} of {len(runs)} seeds']))
        lines.append(f'| {level:g} | {" | ".join(cells)} |')
    args.output.write_text('\n'.join(lines) + '\n')
    print(args.output.read_text())


def first(run: Path, level: float) -> tuple[float, float, float] | None:
    """Rounds, generator steps and seconds until a run's student is `level` % accurate."""
    columns = metrics.read(run)
    above = columns['student_accuracy'] >= level  # False where not measured
    if not above.any():
        return None
    row = above.argmax()
    phases = json.loads((run / 'config.json').read_text())['phases']
    each = [p['loops'] * p['g_steps'] for p in phases for _ in range(p['rounds'])]
    done = int(columns['round'][row])
    return done, sum(each[:done]), columns['seconds'][row]


if __name__ == '__main__':
    main()
