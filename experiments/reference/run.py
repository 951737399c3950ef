"""The authors' own code of NAYER or CPSC-DFKD beside ours: one teacher, settings, numbers of steps.

    python experiments/reference/run.py run --folder=CLONE --config=cifar10:nayer,resnet20-resnet8
        --teacher=FILE --output=DIR [--data_dir=DIR] [--seeds=0,1,2] [--sides=theirs,ours]
        [--set=FIELD=VALUE ...]
    python experiments/reference/run.py table DIR...

CLONE is a folder with the authors' repository, which you get yourself; README.md says which.  The
config is ours, and `theirs.py` starts their program with the same numbers, our teacher's and our
student's first weights, our label embeddings and our test images.  A field that their code does not
have must hold what their code does, and is told otherwise.

DIR gets a folder for each side and seed, and ``result.json``; finished ones are skipped.  `table`
prints the results of such folders, mean ± standard deviation over seeds.
"""

from __future__ import annotations

import argparse
import ast
import csv
import json
import os
import shlex
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import jax
import numpy as np

from dfkd_jax import build, cli, data, labels, port
from dfkd_jax.errors import ConfigError, UserError
from dfkd_jax.reporting import metrics
from dfkd_jax.storage import files, workdir

THEIRS = Path(__file__).with_name('theirs.py')
PROGRAM = {'nayer': 'datafree_kd.py', 'cpsc': 'CPSC_DFKD.py'}  # of the authors
EPOCH = 50  # rounds of CPSC-DFKD's epoch

# What their code does and has no number for.
FIXED: dict[str, dict[str, Any]] = {
    'nayer': {
        'generator.model': 'nayer_generator', 'generator.beta1': 0.5, 'generator.beta2': 0.999,
        'student.momentum': 0.9, 'synthesis.crop_padding': 4, 'synthesis.flip': True,
        'synthesis.shade': 0.0, 'synthesis.cutmix': 0.0, 'loss.student': 'kd',
        'loss.bn_form': 'sum', 'data.channels': 3,
    },
    'cpsc': {
        'generator.model': 'cpsc_generator', 'generator.beta1': 0.5, 'generator.beta2': 0.999,
        'generator.spread': 0.0, 'generator.class_brightness': True, 'generator.bounded': False,
        'generator.darkest': 1.0, 'generator.decay': False, 'generator.reset_adam': True,
        'student.momentum': 0.9, 'student.nesterov': False, 'student.schedule': 'published',
        'synthesis.bank': 0, 'synthesis.crop_padding': 0, 'synthesis.flip': False,
        'synthesis.shade': 0.0, 'synthesis.cutmix': 0.0,
        'synthesis.update_student_statistics': True, 'loss.kd': 1.0, 'loss.temperature': 1.0,
        'loss.student_pseudo_labels': True, 'loss.double_softmax': True,
        'loss.adapter_normalise': False, 'loss.student': 'kd', 'loss.bn_form': 'sum',
        'data.channels': 3,
    },
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest='what', required=True)
    add = commands.add_parser('run').add_argument
    add('--folder', type=Path, help="of the authors' repository; not needed for --sides=ours")
    add('--config', required=True, help='as of dfkd_jax.main')
    add('--teacher', required=True, help="the teacher's weights or model folder")
    add('--data_dir', help='where CIFAR-10, or what the config names, is prepared')
    add('--output', type=Path, required=True)
    add('--seeds', default='0')
    add('--sides', default='theirs,ours')
    add('--set', action='append', default=[], metavar='FIELD=VALUE')
    commands.add_parser('table').add_argument('folders', nargs='+', type=Path)
    args = parser.parse_args()
    try:
        if args.what == 'table':
            print(table([json.loads((each / 'result.json').read_text()) for each in args.folders]))
        else:
            run(args)
    except UserError as error:
        sys.exit(f'error: {error}')


def run(args: argparse.Namespace) -> None:
    """Runs what is missing of both sides, and writes ``result.json`` after each."""
    config = make_config(args)
    arguments = translate(config)
    if 'theirs' in args.sides and not (args.folder and (args.folder / program(config)).exists()):
        raise ConfigError(
            f'--folder={args.folder} has no {program(config)}: expected a clone of the repository '
            f"of {config.method}'s authors, which experiments/reference/README.md names."
        )
    path = args.output / 'result.json'
    result = json.loads(path.read_text()) if path.exists() else {'runs': []}
    result |= {
        'config': args.config, 'set': args.set, 'teacher': config.teacher.model,
        'student': config.student.model, 'method': config.method, 'arguments': arguments,
        'device': workdir.device(), 'versions': workdir.versions(),
        'command': shlex.join(['python', *sys.argv]),
    }  # fmt: skip
    for seed in map(int, args.seeds.split(',')):
        for side in args.sides.split(','):
            if any((row['side'], row['seed']) == (side, seed) for row in result['runs']):
                continue
            row = {'theirs': run_theirs, 'ours': run_ours}[side](args, config, arguments, seed)
            result['runs'].append({'side': side, 'seed': seed} | row)
            files.write_json(path, result)
    print(table([result]))


def program(config: Any) -> str:
    return PROGRAM[config.method]


# 1. One config for both.


def make_config(args: argparse.Namespace) -> Any:
    """The config with the fields set.  Raises ConfigError where their code cannot do the same."""
    config = cli.load_config(args.config)
    if config.method not in PROGRAM:
        raise ConfigError(
            f'{args.config} is of {config.method}: expected one of {" and ".join(PROGRAM)}.'
        )
    for change in args.set:
        set_field(config, change)
    config.teacher.checkpoint = args.teacher
    if args.data_dir:
        config.data.data_dir = args.data_dir
    wrong = {
        name: value for name, value in FIXED[config.method].items()
        if config[name.partition('.')[0]][name.partition('.')[2]] != value
    }  # fmt: skip
    if wrong:
        fields = ' '.join(f'--set={name}={value!r}' for name, value in wrong.items())
        raise ConfigError(
            f"{args.config} differs from what the authors' code does in {', '.join(wrong)}: add "
            f'{fields}'
        )
    return config


def set_field(config: Any, change: str) -> None:
    """Sets a field, such as ``student.lr=0.1`` or ``phases[0].rounds=5``."""
    name, _, value = change.partition('=')
    *groups, field = name.replace(']', '').replace('[', '.').split('.')
    try:
        for each in groups:
            config = config[int(each)] if each.isdigit() else config[each]
        config[field] = ast.literal_eval(value)
    except (IndexError, KeyError, TypeError, ValueError, SyntaxError) as error:
        raise ConfigError(f'--set={change}: {error}; expected FIELD=VALUE.') from error


def translate(config: Any) -> list[str]:
    """The arguments of their program that say the same as a config of ours."""
    return {'nayer': nayer_arguments, 'cpsc': cpsc_arguments}[config.method](config)


def nayer_arguments(config: Any) -> list[str]:
    """Of datafree_kd.py.  Its epochs are our rounds."""
    loss, synthesis, phases = config.loss, config.synthesis, config.phases
    if len(phases) != 2 or phases[0].s_steps or phases[0].g_steps != phases[1].g_steps:
        raise ConfigError(
            f'phases={[dict(phase) for phase in phases]}: expected a warm-up without student steps '
            'and one more phase, with equal g_steps.'
        )
    if config.generator.life < 1:
        raise ConfigError(
            'generator.life=0: their generator is renewed; add --set=generator.life=10'
        )
    return [
        '--method=nayer', '--dataset=cifar10', '--teacher=teacher', '--student=student',
        f'--adv={loss.adversarial}', f'--bn={loss.bn}', f'--oh={loss.ce}',
        f'--bn_mmt={loss.bn_momentum}', f'--T={loss.temperature}',
        f'--epochs={phases[0].rounds + phases[1].rounds}', f'--warmup={phases[0].rounds}',
        f'--g_steps={phases[1].g_steps}', f'--gwp_loops={phases[0].loops}',
        f'--g_loops={phases[1].loops}', f'--kd_steps={phases[1].s_steps}',
        f'--g_life={config.generator.life}', f'--lr_g={config.generator.lr}',
        f'--le_emb_size={config.generator.noisy_width}', f'--lr={config.student.lr}',
        f'--eta_min={config.student.final_lr}', f'--wd={config.student.weight_decay}',
        f'--batch_size={synthesis.student_batch_size}',
        f'--synthesis_batch_size={synthesis.batch_size}', '--workers=0', '--log_tag=theirs',
    ]  # fmt: skip


def cpsc_arguments(config: Any) -> list[str]:
    """Of CPSC_DFKD.py.  Its epochs are 50 of our rounds, or the whole of a shorter run."""
    loss, synthesis = config.loss, config.synthesis
    rounds = config.phases[0].rounds
    iterations = min(rounds, EPOCH)
    if len(config.phases) != 1 or rounds % iterations or config.phases[0].loops != 1:
        raise ConfigError(f'phases: expected one, of a multiple of {EPOCH} rounds or fewer.')
    if synthesis.batch_size != synthesis.student_batch_size:
        raise ConfigError('synthesis.student_batch_size: expected the same as batch_size.')
    terms = {'IKD': ('alpha', loss.ikd), 'BN': ('beta', loss.bn), 'SCL': ('gamma', loss.scl),
             'CE': ('eta', loss.ce)}  # fmt: skip
    return [
        # The form of the imitation term goes by the name of the data.
        f'--dataset={"cifar10" if loss.ikd_form == "log" else "cifar100"}',
        f'--num_classes={config.data.num_classes}', f'--batch_size={synthesis.batch_size}',
        f'--epochs={rounds // iterations}', f'--epoch_itrs={iterations}',
        f'--G_steps={config.phases[0].g_steps}', f'--S_steps={config.phases[0].s_steps}',
        f'--lr_S={config.student.lr}', f'--lr_G={config.generator.lr}',
        f'--weight_decay={config.student.weight_decay}', f'--nz={config.generator.latent}',
        f'--temp={loss.scl_temperature}', '--ckpt=teacher.pt',
        *(f'--loss_{name}' for name, (_, weight) in terms.items() if weight),
        *(f'--co_{letter}={weight}' for letter, weight in terms.values()),
    ]  # fmt: skip


# 2. The two sides.


def run_theirs(args: Any, config: Any, arguments: list[str], seed: int) -> dict[str, Any]:
    """Their program, in a folder of its own: accuracies by epoch, steps and seconds."""
    place = (args.output / f'theirs-seed{seed}').resolve()
    prepare(place, config, [*arguments, f'--seed={seed}'], args.folder.resolve(), seed)
    started = time.monotonic()
    with open(place / 'log.txt', 'w') as log:
        done = subprocess.run([sys.executable, str(THEIRS), str(place)], stdout=log, stderr=log)
    if done.returncode:
        last = (place / 'log.txt').read_text().strip().splitlines()[-1:]
        raise ConfigError(f"the authors' program stopped ({''.join(last)}): see {place}/log.txt.")
    with open(place / 'rows.csv') as file:
        rows = [{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)]
    return scores([row['accuracy'] for row in rows], time.monotonic() - started) | {
        'student_steps': int(rows[-1]['student_steps']),
        'generator_steps': int(rows[-1]['generator_steps']),
        'commit': commit(args.folder),
    }


def prepare(
    place: Path, config: Any, arguments: list[str], folder: Path, seed: int
) -> None:  # fmt: skip
    """Writes what `theirs.py` reads: weights, test images, label embeddings and the task."""
    place.mkdir(parents=True, exist_ok=True)
    about = data.check(config.data, ('test',))
    test = data.load(config.data, 'test')
    images, label = test.fetch(np.arange(test.size))
    teacher = build.load_network(config.teacher.checkpoint, config.teacher.model, config.data)
    module = build.make_classifier(config.student.model, config.data)
    blank = np.zeros((1, *about.image_shape), np.float32)
    student = build.make_plan('jit').call(module.init)(jax.random.key(seed), blank)
    for name, model, variables in (
        ('teacher', config.teacher.model, teacher), ('student', config.student.model, student),
    ):  # fmt: skip
        files.save_arrays(place / f'{name}.safetensors',
                          port.to_torch(model, jax.device_get(variables)))  # fmt: skip
    np.savez(place / 'test.npz', images=images, labels=label)
    if 'labels' in config:
        settings = config.labels.copy_and_resolve_references()
        settings.standardise = False  # their generator's first layer does it
        names = config.data.name, about.class_names, config.data.num_classes
        np.save(place / 'labels.npy', labels.load(settings, *names))
    files.write_json(place / 'task.json', {
        'method': config.method, 'arguments': arguments, 'folder': str(folder),
        'program': program(config), 'teacher': config.teacher.model,
        'student': config.student.model, 'classes': config.data.num_classes,
        'size': config.data.image_size, 'width': config.generator.width,
        'mean': about.mean, 'std': about.std,
    })  # fmt: skip


def commit(folder: Path) -> str:
    """The commit of a clone; '' of a folder without git."""
    told = subprocess.run(['git', '-C', str(folder), 'rev-parse', 'HEAD'], capture_output=True,
                          text=True)  # fmt: skip
    return told.stdout.strip()


def run_ours(args: Any, config: Any, arguments: list[str], seed: int) -> dict[str, Any]:
    """A run of this library, evaluated as often as theirs."""
    del arguments
    place = args.output / f'ours-seed{seed}'
    every = 1 if config.method == 'nayer' else min(config.phases[0].rounds, EPOCH)
    command = [
        '-m', 'dfkd_jax.main', f'--config={args.config}', f'--workdir={place}',
        f'--config.seed={seed}', f'--config.teacher.checkpoint={args.teacher}',
        f'--config.log_every_rounds={every}', f'--config.eval_every_rounds={every}',
        *([f'--config.data.data_dir={args.data_dir}'] if args.data_dir else []),
        *(f'--config.{change}' for change in args.set),
    ]  # fmt: skip
    started = time.monotonic()
    root = Path(__file__).resolve().parents[2]
    path = os.pathsep.join(filter(None, (str(root), os.environ.get('PYTHONPATH'))))
    done = subprocess.run([sys.executable, *command], env=os.environ | {'PYTHONPATH': path})
    if done.returncode:
        raise ConfigError('our run stopped: its last line says why; the same command continues it.')
    accuracy = np.asarray(metrics.read(place)['student_accuracy'], float)
    phases = config.phases
    return scores(accuracy[np.isfinite(accuracy)].tolist(), time.monotonic() - started) | {
        'student_steps': sum(phase.rounds * phase.s_steps for phase in phases),
        'generator_steps': sum(phase.rounds * phase.loops * phase.g_steps for phase in phases),
    }


def scores(accuracy: list[float], seconds: float) -> dict[str, Any]:
    """Of accuracies in per cent by epoch, those of the warm-up left out."""
    return {
        'last': round(accuracy[-1], 2), 'best': round(max(accuracy), 2),
        'accuracy': [round(value, 2) for value in accuracy], 'seconds': round(seconds, 1),
    }  # fmt: skip


# 3. The table.


def table(results: list[dict[str, Any]]) -> str:
    """Markdown: a line for each side of each result."""
    lines = [
        '| config | side | last, % | best, % | seeds | student steps | generator steps | seconds |',
        '|---|---|---|---|---|---|---|---|',
    ]
    for result in results:
        for side in dict.fromkeys(row['side'] for row in result['runs']):
            rows = [row for row in result['runs'] if row['side'] == side]
            cells = [spread([row[name] for row in rows]) for name in ('last', 'best')]
            cells += [', '.join(str(row['seed']) for row in rows)]
            cells += [f'{rows[0][name]:,}' for name in ('student_steps', 'generator_steps')]
            cells += [f'{statistics.mean(row["seconds"] for row in rows):,.0f}']
            changed = ' '.join(result['set'])
            lines.append(f'| `{result["config"]}` {changed} | {side} | {" | ".join(cells)} |')
    return '\n'.join(lines)


def spread(values: list[float]) -> str:
    more = f' ± {statistics.stdev(values):.2f}' if len(values) > 1 else ''
    return f'{statistics.mean(values):.2f}{more}'


if __name__ == '__main__':
    main()
