"""Every method, one teacher, equal time, several seeds.

    python experiments/compare.py --output=DIR
        --pairs=fashion_mnist,fashion_mnist:lenet5/lenet5_half,cifar10:five
        [--methods=kd,noise,cpsc,nayer,...] [--seeds=0,1,2] [--seconds=600] [--points=20]
        [--runs=DIR] [--data_dir=DIR] [--teacher=[[CONFIG:]MODEL=]FILE ...]
        [--set=[METHOD,...:]FIELD=VALUE ...]
        [--flags=small] [--smoke] [--finished]

A pair is a file of configs/, with TEACHER/STUDENT for networks other than its own; cifar10:five and
cifar100:five are the field's five pairs.  A method is an argument of the config, or one of
`table.VARIANTS`, followed by --flags.  A pair has one teacher: --teacher, or one trained once on
the real data.  --set changes a field for all methods' runs, or for those that it names.

A method's first process is a short run that measures its speed (``calibration.json``: seconds of
the start, of an evaluation with its save, and of a unit of each phase).  One factor then scales all
phases so that a run takes --seconds, evaluations included.  Lengths and schedules are fixed before
the first round, so a killed run continues to the same end, and a busier machine makes a run longer
but not worse.  Scaled are rounds and warm-up steps; for DiffDFKD, images of a class; for KD,
epochs.  Measure and run on a machine that does nothing else.

Every run is a process with its own folder under --runs; finished ones are skipped and interrupted
ones continue.  Ctrl-C or SIGTERM ends the study with its present run; --finished runs nothing.  A
method that does not fit a pair ends with an error, which the table shows.  If it would compare
batch statistics and the teacher has no batch norms, it runs without that loss and without the prior
that takes its place, and the table says so.

The output folder gets ``rows.csv`` (a line for each run), ``table.md`` and a picture for each pair:
accuracy by seconds and by images through the teacher.  `published.py` puts the rows beside
published numbers.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import hashlib
import importlib
import json
import os
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from table import NAMES, VARIANTS, save, spread

from dfkd_jax.configs import common
from dfkd_jax.reporting import metrics
from dfkd_jax.storage import files, model_folder

FIVE = ('resnet34/resnet18', 'vgg11/resnet18', 'wrn40_2/wrn16_1', 'wrn40_2/wrn40_1',
        'wrn40_2/wrn16_2')  # fmt: skip
PROBE_ROUNDS = 6  # of each phase
MEASURED = ('last', 'best', 'agreement', 'seconds', 'images_synthesised', 'teacher_queries')
COLUMNS = ('pair', 'method', 'seed', 'budget_seconds', *MEASURED, 'teacher_accuracy',
           'teacher_sha256', 'note', 'device', 'versions', 'command')  # fmt: skip


class Pair(NamedTuple):
    """A file of configs/ and the names of two networks."""

    config: str
    teacher: str
    student: str

    @property
    def name(self) -> str:
        return f'{self.config}:{self.teacher}/{self.student}'

    @property
    def folder(self) -> str:
        return '-'.join(self)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--output', type=Path, required=True)
    parser.add_argument('--pairs', required=True)
    parser.add_argument('--methods', default=','.join(common.METHODS))
    parser.add_argument('--seeds', default='0,1,2')
    parser.add_argument('--seconds', type=float, default=600.0)
    parser.add_argument('--points', type=int, default=20, help='evaluations of a run')
    parser.add_argument('--runs', type=Path, default=Path('runs/compare'))
    parser.add_argument('--data_dir')
    parser.add_argument('--teacher', action='append', default=[], metavar='[[CONFIG:]MODEL=]FILE')
    parser.add_argument('--set', action='append', default=[], metavar='[METHOD,...:]FIELD=VALUE')
    parser.add_argument('--flags', default='', help='of every config, e.g. small')
    parser.add_argument('--smoke', action='store_true', help="every config's smoke version")
    parser.add_argument('--finished', action='store_true')
    args = parser.parse_args()
    # Also ends the present run: subprocess.run kills its child when it exits.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit('stopped; the same command continues'))
    args.output.mkdir(parents=True, exist_ok=True)

    rows: list[dict] = []
    curves: dict[str, dict[str, list[Path]]] = {}
    for pair in pairs(args.pairs, args.flags):
        teacher = find_teacher(pair, args)
        if teacher is None:
            continue
        digest = sha256(teacher)
        for method in args.methods.split(','):
            for seed in map(int, args.seeds.split(',')):
                run = Run(pair, method, seed, teacher, args)
                if (row := run.row()) is None:
                    continue
                rows.append(dict.fromkeys(COLUMNS) | row | {'teacher_sha256': digest})
                if row.get('last') is not None:
                    curves.setdefault(pair.folder, {}).setdefault(method, []).append(run.workdir)
                save(args.output, rows, report(rows))
        if pair.folder in curves:
            draw(curves[pair.folder], pair.name, args.output / f'{pair.folder}.png')


def pairs(text: str, flags: str = '') -> list[Pair]:
    """`digits,cifar10:vgg11/resnet18,cifar100:five` as pairs; flags may change the networks."""
    found = []
    for each in text.split(','):
        name, _, networks = each.partition(':')
        config = load(name, flags)
        default = f'{config.teacher.model}/{config.student.model}'
        for both in FIVE if networks == 'five' else (networks or default,):
            found.append(Pair(name, *both.split('/')))
    return found


def load(name: str, argument: str = '') -> Any:
    """The config of a file of configs/."""
    return importlib.import_module(f'dfkd_jax.configs.{name}').get_config(argument)


def find_teacher(pair: Pair, args: argparse.Namespace) -> Path | None:
    """The checkpoint of a pair's teacher, trained if need be; None: missing, and --finished."""
    for given in args.teacher:
        model, _, path = given.rpartition('=')
        if model in ('', pair.teacher, f'{pair.config}:{pair.teacher}'):
            return Path(path)
    # The pairs of a data set share it.
    workdir = args.runs / 'teachers' / f'{pair.config}-{pair.teacher}'
    if not (workdir / model_folder.CARD).exists():
        if args.finished:
            return None
        flag = ':smoke' if args.smoke else ''
        command = ['python', '-m', 'dfkd_jax.teach', f'--config=configs/{pair.config}.py{flag}',
                   f'--workdir={workdir}', f'--config.teacher.model={pair.teacher}',
                   *data_dir(args)]  # fmt: skip
        if error := run(command, workdir / model_folder.CARD):
            sys.exit(f'error: {error}')
    return workdir


def data_dir(args: argparse.Namespace) -> list[str]:
    return [f'--config.data.data_dir={args.data_dir}'] if args.data_dir else []


def sha256(path: Path) -> str:
    """The SHA-256 of a checkpoint, or of the weights in a model folder."""
    file = path / model_folder.VARIABLES if path.is_dir() else path
    return hashlib.sha256(file.read_bytes()).hexdigest()


def run(command: list[str], result: Path) -> str:
    """Runs a command that leaves `result`; returns '', or the error that it reported to the user.

    Ends the study if the command was stopped, or ended by a bug in the library.
    """
    print(shlex.join(command), flush=True)
    done = subprocess.run([sys.executable, *command[1:]], stderr=subprocess.PIPE, text=True)
    told = done.stderr.strip().splitlines()[-1:]
    if done.returncode and told and told[0].startswith('error: '):
        return told[0].removeprefix('error: ')
    if done.returncode or not result.exists():
        sys.stderr.write(done.stderr)
        sys.exit(f'stopped ({done.returncode}): {shlex.join(command)}')
    return ''


# One run: calibrate, scale, read


class Run(NamedTuple):
    """One method with one seed on one pair."""

    pair: Pair
    method: str
    seed: int
    teacher: Path
    args: argparse.Namespace

    @property
    def root(self) -> Path:
        return self.args.runs / self.pair.folder / self.args.flags / self.method

    @property
    def workdir(self) -> Path:
        return self.root / f'{self.args.seconds:g}s' / f'seed{self.seed}'

    @property
    def argument(self) -> str:
        method = VARIANTS.get(self.method, (self.method, {}))[0]
        flags = [word for word in (self.args.flags, 'smoke' * self.args.smoke) if word]
        return ','.join([method, *flags])

    def config(self) -> Any:
        """The run's config, before scaling."""
        config = load(self.pair.config, self.argument)
        for change in changes(self.args.set, self.method):
            name, _, value = change.partition('=')
            if '[' not in name:  # the rest are lengths of phases
                with contextlib.suppress(ValueError, SyntaxError):  # a text, which scales nothing
                    config.update_from_flattened_dict({name: ast.literal_eval(value)})
        return config

    def command(self, workdir: Path, seed: int, fields: dict[str, Any]) -> list[str]:
        fields = VARIANTS.get(self.method, ('', {}))[1] | {
            'seed': seed,
            'teacher.model': self.pair.teacher,
            'student.model': self.pair.student,
            'teacher.checkpoint': self.teacher,
        } | fields  # fmt: skip
        return ['python', '-m', 'dfkd_jax.main',
                f'--config=configs/{self.pair.config}.py:{self.argument}', f'--workdir={workdir}',
                *(f'--config.{name}={value}' for name, value in fields.items()),
                *(f'--config.{change}' for change in changes(self.args.set, self.method)),
                *data_dir(self.args)]  # fmt: skip

    def row(self) -> dict | None:
        """The run's line of ``rows.csv``; None: missing, and --finished."""
        receipt = self.calibrated()
        if receipt is None:
            return None
        row = {'pair': self.pair.name, 'method': self.method, 'seed': self.seed,
               'budget_seconds': self.args.seconds, 'note': receipt['note']}  # fmt: skip
        if 'error' in receipt:
            return row | {'note': receipt['error']}
        config = self.config()
        try:
            scaled = lengths(config, receipt, self.args.seconds, self.args.points)
        except ValueError as error:
            return row | {'note': str(error)}
        command = self.command(self.workdir, self.seed, receipt['fields'] | scaled)
        row['command'] = shlex.join(command)
        finished, failed = self.workdir / 'summary.json', self.workdir.with_suffix('.error')
        if not finished.exists() and not self.args.finished:
            if error := run(command, finished):  # for example, it diverged
                failed.parent.mkdir(parents=True, exist_ok=True)
                failed.write_text(error)
        if not finished.exists():
            return row | {'note': failed.read_text()} if failed.exists() else None
        facts = json.loads(finished.read_text())
        versions = ' '.join(f'{name} {version}' for name, version in facts['versions'].items())
        return row | {
            'last': facts['student_accuracy_last'],
            'best': facts['student_accuracy_best'],
            'agreement': facts['agreement_with_teacher'],
            'versions': versions,
            **{name: facts[name] for name in (*MEASURED[3:], 'teacher_accuracy', 'device')},
        }

    def calibrated(self) -> dict | None:
        """The method's receipt on this pair, measured if need be: its speeds, or its `error`."""
        path, workdir = self.root / 'calibration.json', self.root / 'calibration'
        receipt = json.loads(path.read_text()) if path.exists() else None
        if self.args.finished or (receipt and 'error' not in receipt):
            return receipt  # one with an error is measured again
        config = self.config()
        receipt = {'fields': {}, 'note': '', 'load_average': os.getloadavg()}
        while True:
            shutil.rmtree(workdir, ignore_errors=True)  # half a run measures nothing
            command = self.command(workdir, 0, receipt['fields'] | probe(config))
            error = run(command, workdir / 'summary.json')
            if error or receipt['fields'] or not without_statistics(workdir):
                break
            receipt |= {'fields': {'loss.bn': 0}, 'note': 'without batch statistics'}
        receipt['command'] = shlex.join(command)
        receipt |= {'error': error} if error else speeds(config, workdir)
        self.root.mkdir(parents=True, exist_ok=True)
        files.write_json(path, receipt)
        return receipt


def changes(given: Sequence[str], method: str) -> list[str]:
    """`FIELD=VALUE` of each --set that is for all methods or names this one."""
    found = []
    for change in given:
        name, _, value = change.partition('=')
        methods, _, field = name.rpartition(':')
        if not methods or method in methods.split(','):
            found.append(f'{field}={value}')
    return found


def probe(config: Any) -> dict[str, Any]:
    """The fields of a run that is just long enough to be timed."""
    if config.loop == 'kd':
        return {'teach.epochs': 3}
    if config.loop == 'offline':
        return {'synthesis.per_class': least_images(config), 'log_every_rounds': 1}
    rounds = {f'phases[{i}].rounds': PROBE_ROUNDS for i in range(len(config.phases))}
    return rounds | {'log_every_rounds': 1, 'eval_every_rounds': 3, 'save_every_rounds': 3}


def without_statistics(workdir: Path) -> bool:
    """Whether a finished run had batch statistics to compare, and a teacher without batch norms."""
    summary = json.loads((workdir / 'summary.json').read_text())
    return 'no_batch_statistics' in summary['warnings']


def speeds(config: Any, workdir: Path) -> dict[str, Any]:
    """Seconds of a finished probe: `start`, `evaluation`, and `each` unit of what is scaled.

    A save follows every evaluation and belongs to it.
    """
    total = json.loads((workdir / 'summary.json').read_text())['seconds']
    if config.loop == 'alternating':
        columns = metrics.read(workdir)
        took = np.diff(columns['seconds'], prepend=0.0).reshape(-1, PROBE_ROUNDS)
        # A phase's first round compiles the phase, and its third may compile the evaluation.  The
        # second and the fifth stand alone, the fourth includes the third's save, and the sixth an
        # evaluation.
        each = took[:, [1, 4]].mean(axis=1)
        evaluation = max(float(np.median(took[:, 3] + took[:, 5] - 2 * each)), 0.0)
        known = PROBE_ROUNDS * each.sum() + 2 * len(each) * evaluation
        measured = {'evaluation': evaluation, 'each': each.tolist()}
    else:
        took = np.diff(metrics.read(workdir / 'distillation')['seconds'])
        each = float(np.median(took)) if took.size else total
        known = each * (1 + took.size)
        if config.loop == 'offline':
            made = np.diff(metrics.read(workdir / 'synthesis')['seconds'])
            known += float(np.median(made)) * (1 + made.size)
            each = known / least_images(config)
        measured = {'evaluation': 0.0, 'each': [each]}
    return {'start': max(total - float(known), 0.0)} | measured


def least_images(config: Any) -> int:
    """Images of a class for one trajectory of each, and for a batch of the distillation."""
    batch = -(-config.distil.batch_size // config.data.num_classes)
    return max(config.synthesis.batch_size, batch)


def lengths(config: Any, receipt: dict, seconds: float, points: int) -> dict[str, Any]:
    """The fields that make a run of a method take `seconds`, by its receipt.

    Raises ValueError if there is no time beyond the start and the evaluations.
    """
    left = seconds - receipt['start'] - points * receipt['evaluation']
    if left <= 0:
        raise ValueError(
            f'{seconds:g} s are too short: the start takes {receipt["start"]:.0f} s, and {points} '
            f'evaluations {receipt["evaluation"]:.1f} s each'
        )
    if config.loop == 'kd':
        return {'teach.epochs': max(round(left / receipt['each'][0]), 1)}
    if config.loop == 'offline':
        return {'synthesis.per_class': max(int(left / receipt['each'][0]), least_images(config))}
    scale = left / sum(p.rounds * each for p, each in zip(config.phases, receipt['each']))
    rounds = [max(round(scale * p.rounds), 1) for p in config.phases]
    fields: dict[str, Any] = {f'phases[{i}].rounds': n for i, n in enumerate(rounds)}
    if 'warmup_steps' in config.student:
        fields['student.warmup_steps'] = round(scale * config.student.warmup_steps)
    every = -(-sum(rounds) // points)
    return fields | dict.fromkeys(
        ('log_every_rounds', 'eval_every_rounds', 'save_every_rounds'), every
    )


# Output


def report(rows: Sequence[dict]) -> list[str]:
    """The lines of ``table.md``: a table for each pair, mean ± standard deviation over seeds."""
    lines = []
    for pair in dict.fromkeys(row['pair'] for row in rows):
        of_pair = [row for row in rows if row['pair'] == pair]
        done = [row for row in of_pair if row['last'] is not None]
        lines += [f'## {pair}', '', f'{of_pair[0]["budget_seconds"]:g} seconds a run.  Teacher: '
                  + (f'{done[0]["teacher_accuracy"]:.2f} %, ' if done else '')
                  + f'sha256 {of_pair[0]["teacher_sha256"][:12]}.', '',
                  '| | last, % | best, % | agreement, % | seconds | images synthesised | teacher '
                  'queries | seeds | |', '|---|---|---|---|---|---|---|---|---|']  # fmt: skip
        for method in dict.fromkeys(row['method'] for row in of_pair):
            group = [row for row in done if row['method'] == method]
            notes = dict.fromkeys(r['note'] for r in of_pair if r['method'] == method and r['note'])
            cells = [spread([r[name] for r in group]) if group else '' for name in MEASURED[:3]]
            cells += [f'{statistics.mean(r[name] for r in group):,.0f}' if group else ''
                      for name in MEASURED[3:]]  # fmt: skip
            told = '; '.join(note.replace('|', '/') for note in notes)
            lines.append(
                f'| {NAMES.get(method, method)} | {" | ".join(cells)} | {len(group)} | {told} |'
            )
        lines.append('')
    return lines[:-1]


def history(workdir: Path) -> np.ndarray:
    """Seconds, images through the teacher, and accuracy in per cent of a finished run, [3, n]."""
    facts = json.loads((workdir / 'summary.json').read_text())
    after = workdir / 'distillation'
    if after.exists():
        columns = metrics.read(after)
        share = columns['round'] / columns['round'][-1]
        queries = facts['teacher_queries'] - (1 - share) * facts['images_distilled']
        seconds = columns['seconds'] + facts.get('seconds_synthesis', 0.0)
        found = np.stack([seconds, queries, columns['test_accuracy']])
    else:
        columns = metrics.read(workdir)
        names = ('seconds', 'teacher_queries', 'student_accuracy')
        found = np.stack([columns[name] for name in names])
    return found[:, np.isfinite(found[2])]


def draw(runs: dict[str, list[Path]], title: str, path: Path) -> None:
    """Accuracy by seconds and by teacher queries: the mean over seeds, and a standard deviation."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 5), layout='constrained')
    both = figure.subplots(1, 2, sharey=True)
    for method, color in zip(runs, colormaps['tab20'].colors * len(runs)):
        curves = [history(run) for run in runs[method]]
        length = min(curve.shape[1] for curve in curves)  # the same for all seeds
        x, queries, accuracy = np.stack([curve[:, :length] for curve in curves], axis=1)
        mean, deviation = accuracy.mean(0), accuracy.std(0, ddof=len(curves) > 1)
        for axes, values in zip(both, (x.mean(0), queries.mean(0))):
            axes.plot(values, mean, '.-', color=color, lw=1.4, ms=4, label=method)
            axes.fill_between(
                values, mean - deviation, mean + deviation, color=color, alpha=0.2, lw=0
            )
    for axes, name in zip(both, ('seconds', 'images through the teacher')):
        axes.set_xlabel(name)
        axes.grid(alpha=0.25)
        axes.spines[['top', 'right']].set_visible(False)
    both[0].set_xlim(left=0)
    both[0].set_ylabel('accuracy on real test images, per cent')
    both[1].set_xscale('log')
    both[1].legend(frameon=False, fontsize=9, loc='center left', bbox_to_anchor=(1, 0.5))
    figure.suptitle(title)
    figure.savefig(path, dpi=100)


if __name__ == '__main__':
    main()
