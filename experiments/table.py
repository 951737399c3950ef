"""The rows of a results table: teacher, students on real data, the method, its control.

    python experiments/table.py --config=FILE --output=DIR
        [--seeds=0,1,2] [--rows=teacher,student,kd,cpsc,untrained] [--data_dir=DIR] [--runs=DIR]
        [--set=FIELD=VALUE ...] [--teacher=FOLDER] [--finished]

A row is teacher, student, kd, a method, or one of VARIANTS.  --set changes a field of the config
for the runs of all methods (a shorter study: --set=phases[1].rounds=47, with another --runs).

Runs follow one another, each a process with its own folder under --runs.  Finished ones are skipped
and interrupted ones continue; --finished runs nothing and reads what is there.  One teacher (seed
0, or --teacher) serves all rows; with --own_teachers each run of the method trains its own, as the
plain command does.

The output folder gets ``rows.csv`` (a line for each run: accuracies, seconds, command, versions,
device) and ``table.md`` (mean and standard deviation over seeds).
"""

from __future__ import annotations

import argparse
import csv
import json
import shlex
import statistics
import subprocess
import sys
from pathlib import Path

COLUMNS = ('row', 'seed', 'last', 'best', 'teacher', 'agreement', 'seconds', 'device', 'versions',
           'command')  # fmt: skip
NAMES = {
    'teacher': 'teacher',
    'student': 'student on real data',
    'kd': 'student, ordinary KD on real data',
    'untrained': 'control: generator never trained',
}
# Rows that change some fields of a method; any other row is a method as configured.
FOUR = ('normal', 'uniform', 'laplace', 'sign')
VARIANTS: dict[str, tuple[str, dict[str, object]]] = {
    'untrained': ('cpsc,untrained', {}),
    'cae_cend_only': ('cae', {'loss.contrast': 0.0}),
    'cae_cncl_only': ('cae', {'noise.magnitudes': (0.0,) * 4}),
    'cae_neither': ('cae', {'loss.contrast': 0.0, 'noise.magnitudes': (0.0,) * 4}),
    'cae_n1': ('cae', {'noise.sources': FOUR[:1], 'noise.magnitudes': (20.0,)}),
    'cae_n2': ('cae', {'noise.sources': FOUR[:2], 'noise.magnitudes': (20.0,) * 2}),
    'cae_n8': ('cae', {'noise.sources': FOUR * 2, 'noise.magnitudes': (20.0,) * 4 + (10.0,) * 4}),
    'cae_small_noise': ('cae', {'noise.magnitudes': (6.0,) * 4}),
    'cae_fresh': ('cae', {'noise.fresh': True}),
    'cae_images': ('cae', {'loss.contrast_of': 'images'}),
    'cae_mixup': ('cae', {'loss.contrast': 0.0, 'synthesis.mixup': 0.4}),
    'cae_index': ('cae', {'labels.text': 'index'}),
    'cae_onehot': ('cae', {'labels.source': 'onehot'}),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--config', required=True)
    parser.add_argument('--output', type=Path, required=True)
    parser.add_argument('--seeds', default='0,1,2')
    parser.add_argument('--rows', default='teacher,student,kd,cpsc,untrained')
    parser.add_argument('--data_dir')
    parser.add_argument('--runs', type=Path, default=Path('runs'))
    parser.add_argument('--own_teachers', action='store_true')
    parser.add_argument('--set', action='append', default=[], metavar='FIELD=VALUE')
    parser.add_argument('--teacher', type=Path)
    parser.add_argument('--finished', action='store_true')
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    seeds = [int(seed) for seed in args.seeds.split(',')]
    root = args.runs / Path(args.config).stem
    teacher = args.teacher or root / 'teacher' / f'seed{seeds[0]}'
    data = [f'--config.data.data_dir={args.data_dir}'] if args.data_dir else []

    results = []
    for row in args.rows.split(','):
        for seed in seeds[:1] if row == 'teacher' else seeds:
            workdir = root / row / f'seed{seed}'
            module, config, extra = 'main', args.config, []
            if row in ('teacher', 'student', 'kd'):
                module, extra = 'teach', [f'--role={row}']
            else:
                method, changes = VARIANTS.get(row, (row, {}))
                config += f':{method}'
                extra = [f'--config.{field}={value}' for field, value in changes.items()]
                extra += [f'--config.{change}' for change in args.set]
            if row == 'kd' or (module == 'main' and not args.own_teachers):
                extra += [f'--config.teacher.checkpoint={teacher}']
            command = ['python', '-m', f'dfkd_jax.{module}', f'--config={config}',
                       f'--workdir={workdir}', f'--config.seed={seed}', *extra, *data]  # fmt: skip
            if not args.finished:
                print(shlex.join(command), flush=True)
                subprocess.run([sys.executable, *command[1:]], check=True)
            elif not any((workdir / name).exists() for name in ('summary.json', 'model.json')):
                continue
            results.append(read(row, seed, workdir, shlex.join(command)))
            write(args.output, results)


def read(row: str, seed: int, workdir: Path, command: str) -> dict:
    """One finished run as a line of ``rows.csv``."""
    if row in ('teacher', 'student', 'kd'):
        facts = json.loads((workdir / 'model.json').read_text())
        last, best, teacher, agreement = facts['accuracy'], facts['best_accuracy'], None, None
    else:
        facts = json.loads((workdir / 'summary.json').read_text())
        last, best = facts['student_accuracy_last'], facts['student_accuracy_best']
        teacher, agreement = facts['teacher_accuracy'], facts['agreement_with_teacher']
    versions = ' '.join(f'{name} {version}' for name, version in facts['versions'].items())
    values = (row, seed, last, best, teacher, agreement, facts['seconds'], facts['device'],
              versions, command)  # fmt: skip
    return dict(zip(COLUMNS, values, strict=True))


def write(output: Path, results: list[dict]) -> None:
    lines = ['| | last, % | best, % | seconds | seeds |', '|---|---|---|---|---|']
    for row in dict.fromkeys(result['row'] for result in results):
        group = [result for result in results if result['row'] == row]
        cells = [spread([r[name] for r in group]) for name in ('last', 'best')]
        cells.append(f'{statistics.mean(r["seconds"] for r in group):.0f}')
        lines.append(f'| {NAMES.get(row, row)} | {" | ".join(cells)} | {len(group)} |')
    save(output, results, lines)


def save(output: Path, results: list[dict], lines: list[str]) -> None:
    """Writes ``rows.csv``, with the results' names as columns, and ``table.md``."""
    with open(output / 'rows.csv', 'w', newline='') as file:
        writer = csv.DictWriter(file, list(results[0]), lineterminator='\n')
        writer.writeheader()
        writer.writerows(results)
    (output / 'table.md').write_text('\n'.join(lines) + '\n')


def spread(values: list[float]) -> str:
    """Mean ± sample standard deviation over seeds."""
    if len(values) == 1:
        return f'{values[0]:.2f}'
    return f'{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f}'


if __name__ == '__main__':
    main()
