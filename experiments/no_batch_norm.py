"""Teachers without batch norms beside one with them, on Fashion-MNIST at 16 px.

    python experiments/no_batch_norm.py --output=DIR --data_dir=DIR [--runs=DIR] [--seeds=0]
        [--teachers=resnet8,resnet8_gn,vit_mini_cifar] [--methods=nayer,cae,deepinversion]
        [--epochs=6] [--rounds=30] [--inversions=15] [--finished]

NAYER, CAE-DFKD and DeepInversion learn from a ResNet-8, the same with group norms, and a small
vision transformer, trained here with one recipe each.  Where there are no batch norms, their
statistics drop out; in the rows `prior` an image prior takes their place.  All runs of a method
have the same number of rounds (--rounds; --inversions of DeepInversion), fewer than the data set's
own setting has, and go on where a generator collapses.

Runs follow one another, each a process with its own folder under --runs.  Finished ones are skipped
and interrupted ones continue; --finished runs nothing and reads what is there.  The output folder
gets ``rows.csv`` and ``table.md``.
"""

from __future__ import annotations

import argparse
import itertools
import shlex
import subprocess
import sys
from pathlib import Path

from table import read, save, spread

NAMES = {
    'nayer': 'NAYER', 'cae': 'CAE-DFKD', 'deepinversion': 'DeepInversion',
    'resnet8': 'ResNet-8', 'resnet8_gn': 'with group norms', 'vit_mini_cifar': 'transformer',
}  # fmt: skip
PRIOR = ('--config.image_prior.tv=0.1', '--config.image_prior.l2=0.01')


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--output', type=Path, required=True)
    parser.add_argument('--data_dir', required=True)
    parser.add_argument('--runs', type=Path, default=Path('runs/no_batch_norm'))
    parser.add_argument('--seeds', default='0')
    parser.add_argument('--teachers', default='resnet8,resnet8_gn,vit_mini_cifar')
    parser.add_argument('--methods', default='nayer,cae,deepinversion')
    parser.add_argument('--epochs', type=int, default=6, help='of the teachers')
    parser.add_argument('--rounds', type=int, default=30)
    parser.add_argument('--inversions', type=int, default=15, help='rounds of DeepInversion')
    parser.add_argument('--finished', action='store_true')
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    size = ('--config.data.image_size=16', '--config.data.resize=resize')
    data = (*size, f'--config.data.data_dir={args.data_dir}')
    teachers, results = args.teachers.split(','), []
    for teacher in teachers:
        # The recipes differ as the networks do: a transformer learns at a lower rate.
        rate = 0.02 if teacher.startswith('vit') else 0.1
        run(args, ['teach', '--config=fashion_mnist', *data, f'--config.teacher.model={teacher}',
                   f'--config.teach.epochs={args.epochs}', f'--config.teach.lr={rate}',
                   f'--workdir={args.runs / teacher}'])  # fmt: skip
    every = (map(int, args.seeds.split(',')), teachers, args.methods.split(','), ((), PRIOR))
    for seed, teacher, method, flags in itertools.product(*every):
        if flags and teacher == 'resnet8':
            continue
        name = f'{method}-prior' if flags else method
        workdir = args.runs / f'{teacher}-{name}-{seed}'
        rounds = args.inversions if method == 'deepinversion' else args.rounds
        command = run(args, [
            'main', f'--config=fashion_mnist:{method}', *data,
            f'--config.teacher.model={teacher}',
            f'--config.teacher.checkpoint={args.runs / teacher}',
            f'--config.seed={seed}', f'--workdir={workdir}',
            f'--config.phases[1].rounds={rounds}', '--config.collapse_patience=0', *flags,
        ])  # fmt: skip
        if (workdir / 'summary.json').exists():
            results.append(read(f'{teacher} {name}', seed, workdir, command))
            save(args.output, results, table(results, teachers))


def run(args: argparse.Namespace, words: list[str]) -> str:
    """Runs `python -m dfkd_jax.WORDS`, unless told not to; returns the command."""
    command = ['python', '-m', f'dfkd_jax.{words[0]}', *words[1:]]
    if not args.finished:
        print(shlex.join(command), flush=True)
        subprocess.run([sys.executable, *command[1:]], check=True)
    return shlex.join(command)


def table(results: list[dict], teachers: list[str]) -> list[str]:
    """The student's accuracy at the last step and, in brackets, its agreement with the teacher."""
    accuracy = {r['row'].split()[0]: r['teacher'] for r in results}
    heads = [f'{NAMES[t]}, {accuracy[t]:.2f}' for t in teachers if t in accuracy]
    lines = [f'| teacher, % | {" | ".join(heads)} |', '|---' * (1 + len(heads)) + '|']
    for name in dict.fromkeys(r['row'].split()[1] for r in results):
        cells = []
        for teacher in accuracy:
            found = [r for r in results if r['row'] == f'{teacher} {name}']
            cell = f'{spread([r["last"] for r in found])} ' if found else ''
            cell += f'({spread([r["agreement"] for r in found])})' if found else ''
            cells.append(cell)
        method, _, prior = name.partition('-')
        label = NAMES[method] + (', prior' if prior else '')
        lines.append(f'| {label} | {" | ".join(cells)} |')
    return lines


if __name__ == '__main__':
    main()
