"""The rows of the transfer table: what the features of finished runs are worth elsewhere.

    python experiments/transfer_table.py --config=FILE --output=DIR --data_dir=DIR [--runs=DIR]
        [--seeds=0,1,2] [--rows=teacher,student,kd,cpsc,nayer,cae,new] [--scenes=FOLDER]
        [--tasks=animals/probe,animals/pooled,animals/finetune,...,scenes/dense]

The networks are those that `table.py` left under --runs: for each seed, the student of that seed.
The row teacher measures one network with each seed.  The row new has the student's architecture
with new weights.  A task is DATASET/PROTOCOL: probe (penultimate features), pooled (also those of
all stages), finetune, and for scenes dense (see transfer_data.py).

Every measurement is a process of its own and leaves one file beside the network's run; one whose
file exists is not repeated.  The output folder gets ``rows.csv`` and ``table.md`` (mean and
standard deviation over seeds).
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
from pathlib import Path

from table import save, spread

COLUMNS = ('row', 'task', 'seed', 'score', 'source_accuracy', 'seconds', 'device', 'versions',
           'command')  # fmt: skip
NAMES = {
    'teacher': 'teacher (the larger network)',
    'student': 'student on real data',
    'kd': 'student, ordinary KD on real data',
    'new': 'new weights',
}
FLAGS = {'probe': (), 'pooled': ('--pooled',), 'finetune': (), 'dense': ()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--config', type=Path, required=True)
    parser.add_argument('--output', type=Path, required=True)
    parser.add_argument('--data_dir', required=True)
    parser.add_argument('--runs', type=Path, default=Path('runs'))
    parser.add_argument('--seeds', default='0,1,2')
    parser.add_argument('--rows', default='teacher,student,kd,cpsc,nayer,cae,new')
    parser.add_argument('--scenes')
    parser.add_argument('--tasks', default='animals/probe,animals/pooled,animals/finetune')
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    root, seeds = args.runs / args.config.stem, [int(seed) for seed in args.seeds.split(',')]

    results = []
    for task in args.tasks.split(','):
        for row in args.rows.split(','):
            for seed in seeds:
                source = 'cpsc' if row == 'new' else row  # for new, only its architecture is read
                network = root / source / f'seed{seed}'
                if row in ('teacher', 'new'):  # a single network serves all seeds
                    network = min((root / source).glob('seed*'))
                results.append(measure(row, task, seed, network, args))
                write(args.output, results)


def measure(row: str, task: str, seed: int, network: Path, args: argparse.Namespace) -> dict:
    """One line of ``rows.csv``, measured unless its file exists."""
    dataset, protocol = task.split('/')
    output = network / 'transfer' / f'{row}-{dataset}-{protocol}-seed{seed}.json'
    where = f'--scenes={args.scenes}' if protocol == 'dense' else f'--dataset={dataset}'
    command = ['python', '-m', 'dfkd_jax.transfer', f'--student={network}', where, f'--seed={seed}',
               f'--output={output}', f'--data_dir={args.data_dir}', *FLAGS[protocol]]  # fmt: skip
    if protocol == 'dense':
        command[2] += '_dense'
    else:
        command.append(f'--protocol={"probe" if protocol == "pooled" else protocol}')
    if row == 'new':
        command.append('--untrained')
    if not output.exists():
        print(shlex.join(command), flush=True)
        subprocess.run([sys.executable, *command[1:]], check=True)
    facts = json.loads(output.read_text())
    score = facts['miou' if protocol == 'dense' else 'accuracy']
    versions = ' '.join(f'{name} {version}' for name, version in facts['versions'].items())
    values = (row, task, seed, score, None if row == 'new' else facts.get('source_accuracy'),
              facts['seconds'], facts['device'], versions, shlex.join(command))  # fmt: skip
    return dict(zip(COLUMNS, values, strict=True))


def write(output: Path, results: list[dict]) -> None:
    tasks = list(dict.fromkeys(result['task'] for result in results))
    lines = [f'| | {" | ".join(tasks)} |', '|---' * (1 + len(tasks)) + '|']
    for row in dict.fromkeys(result['row'] for result in results):
        cells = []
        for task in tasks:
            scores = [r['score'] for r in results if (r['row'], r['task']) == (row, task)]
            cells.append(spread(scores) if scores else '')
        lines.append(f'| {NAMES.get(row, row)} | {" | ".join(cells)} |')
    save(output, results, lines)


if __name__ == '__main__':
    main()
