"""Whole rounds beside eager PyTorch and `torch.compile`, in one table.

    python experiments/bench/rounds.py [--seconds=6] [--cases=0,1,2,3,4] [--two] [--xla]
        [--no-compile] [--output=DIR]

Each case is a run of `steps.py`, whose own tables stay beside this one.  An hour's images count
compilation too: a side that compiles longer must be faster to make up for it.  Needs PyTorch and
an idle machine, for three quarters of an hour.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

import ours  # noqa: E402

CIFAR = ('--config=cifar10', '--pair=wrn40_2/wrn16_1')
DEEP = ('--config=cifar10', '--pair=resnet34/resnet18')
DIGITS = ('--config=digits', '--pair=resnet8/resnet8_half')
# What is run, and the target: times the speed of eager PyTorch.
CASES = (
    (('--method=nayer', *CIFAR, '--round=1+7'), 1.5),
    (('--method=cpsc', *CIFAR, '--round=2+2'), 1.5),
    (('--method=nayer', *DEEP, '--round=1+1'), 1.2),
    (('--method=cpsc', *DEEP, '--round=1+1'), 1.2),
    (('--method=cpsc', *DIGITS, '--round=6+5'), None),
)
HOUR = 3600.0
SIDES = (
    'PyTorch, eager', 'PyTorch, torch.compile', 'dfkd_jax', 'dfkd_jax, 2 devices',
    "dfkd_jax, XLA's convolutions",
)  # fmt: skip


def sides(result: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Each side's ratio to eager PyTorch, images/s, seconds of compilation, images in an hour.

    A side compiles its two steps and, where a round is a program of its own, that in their place.
    """
    steps = result['steps']
    out = {}
    for name, timed in steps['round'].items():
        compiled = timed['compile_seconds'] or sum(
            steps[kind][name]['compile_seconds']
            for kind in ('generator', 'student')
            if name in steps.get(kind, {})
        )
        speed = timed['images_per_second']['median']
        out[name] = {
            'ratio': timed['ratio_to_pytorch']['median'],
            'images_per_second': speed,
            'compilation': compiled,
            'in_an_hour': speed * (HOUR - compiled),
        }
    return out


def table(results: list[tuple[dict[str, Any], float | None]]) -> str:
    """The five rounds as Markdown: images/s and, in brackets, times eager PyTorch."""
    found = [side for side in SIDES if any(side in sides(result) for result, _ in results)]
    rows = []
    for result, target in results:
        args, timed = result['arguments'], sides(result)
        eager = timed['PyTorch, eager']['in_an_hour']
        row = [
            f'{args["method"]}, {args["pair"].replace("/", " -> ")}, {args["config"]}, '
            f'batch {args["batch"]}, {args["round"]} steps'
        ]
        for side in found:
            if side in timed:
                x = timed[side]
                row.append(
                    f'{x["images_per_second"]:.1f} ({x["ratio"]:.2f}), {x["compilation"]:.0f} s, '
                    f'{x["in_an_hour"] / eager:.2f}'
                )
            else:
                row.append('')
        ratio = timed['dfkd_jax']['ratio']
        row.append('' if target is None else f'{target} {"met" if ratio >= target else "MISSED"}')
        rows.append(row)
    return ours.table(['', *found, 'target'], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--seconds', type=float, default=6.0, help='timed, for each round and side')
    parser.add_argument('--cases', default='0,1,2,3,4', help='which, in the order of the table')
    parser.add_argument('--output', type=Path, default=HERE / 'rounds')
    parser.add_argument('--no-compile', action='store_true', help='without torch.compile')
    parser.add_argument('--kinds', default='round', help='round, and generator,student before it')
    parser.add_argument('--two', action='store_true', help='two virtual devices as a side')
    parser.add_argument('--xla', action='store_true', help="with XLA's convolutions as a side")
    args = parser.parse_args()
    results = []
    for number in map(int, args.cases.split(',')):
        case, target = CASES[number]
        folder = args.output / str(number)
        command = [
            sys.executable, str(HERE / 'steps.py'), *case, f'--seconds={args.seconds}',
            '--block-seconds=0.5', '--part-seconds=0', f'--kinds={args.kinds}',
            f'--output={folder}',
        ]  # fmt: skip
        command += ['--compile'] * (not args.no_compile) + ['--xla'] * args.xla
        command += ['--devices=2'] * args.two
        subprocess.run(command, check=True)
        (receipt,) = folder.glob('*.json')
        results.append((json.loads(receipt.read_text()), target))
        text = table(results)
        (args.output / 'table.md').write_text(f'{text}\n')
        told = "Images/s (times eager PyTorch's), compilation, images in an hour over eager's."
        print(f'{told}\n\n{text}', flush=True)


if __name__ == '__main__':
    main()
