"""The script for ten minutes of one GPU: its commands fit, and at tiny sizes it runs on a CPU."""

from __future__ import annotations

import ast
import csv
import json
import os
import re
import shlex
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference
import standins

from dfkd_jax import cli

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / 'experiments' / 'gpu.sh'
PARTS = ('check', 'nayer', 'cpsc', 'steps', 'compile', 'layers', 'sd', 'more')


def script(*parts: str, **variables: str) -> Any:
    return subprocess.run(
        ['bash', str(SCRIPT), *parts], env=os.environ | {'PYTHON': sys.executable} | variables,
        capture_output=True, text=True, cwd=ROOT,
    )  # fmt: skip


def commands(**variables: str) -> dict[str, tuple[int, list[str]]]:
    """The limit and the words of every part, as the script would run them."""
    done = script(DRY='1', **variables)
    assert done.returncode == 0, done.stderr
    # %q writes $'...' for the program of `check`, which holds no flags.
    lines = [line for line in done.stdout.splitlines() if "$'" not in line]
    words = [shlex.split(line) for line in lines]
    return {name: (int(limit), rest) for name, limit, *rest in words}


def options(path: Path) -> set[str]:
    """The flags that a script's parser adds, read from its source."""
    calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    return {
        argument.value
        for call in calls
        for argument in call.args
        if isinstance(argument, ast.Constant) and str(argument.value).startswith('--')
    }


@pytest.mark.parametrize('tiny', ['', '1'])
def test_every_command_has_what_it_names(tiny: str) -> None:
    found = commands(TINY=tiny, TEACHER='t.th', DATA='d')
    assert set(found) == set(PARTS) - {'check'}
    for name, (_, words) in found.items():
        assert words[0] == sys.executable
        flags = [word.partition('=')[0] for word in words if word.startswith('--')]
        if words[1] == '-m':
            assert words[2] == 'dfkd_jax.main'
            config = cli.load_config(words[3].partition('=')[2])
            for word in words[4:]:
                field, _, value = word.removeprefix('--config.').partition('=')
                if word.startswith('--config.'):
                    config.update_from_flattened_dict({field: parsed(value)})
            assert config.dtype == 'bfloat16'
            assert config.teacher.checkpoint == 't.th'
            assert config.data.data_dir == 'd'
            assert (config.method == 'cpsc') == (name == 'cpsc')
        else:
            assert set(flags) <= options(ROOT / words[1]), words
    published = cli.load_config(found['nayer'][1][3].partition('=')[2])
    assert published.generator.width == (16 if tiny else 64)


def parsed(value: str) -> Any:
    try:
        return ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return value


def test_the_parts_fit_into_their_minutes() -> None:
    """At ten minutes and at fewer; what is said of them is what they get."""
    for minutes in (10, 5):
        limits = {name: limit for name, (limit, _) in commands(MINUTES=str(minutes)).items()}
        left = 60 * minutes - 25 - 3 * minutes  # without `check`, and the time to save
        assert sum(limit for name, limit in limits.items() if name != 'more') <= left
    told = re.findall(r'^#     (\w+) +(\d+|-)  ', SCRIPT.read_text(), re.MULTILINE)
    assert tuple(name for name, _ in told) == PARTS
    limits = {name: limit for name, (limit, _) in commands().items()} | {'check': 30}
    assert {name: int(limit) for name, limit in told if limit != '-'} == {
        name: limit for name, limit in limits.items() if name != 'more'
    }


def test_an_unknown_part_is_told() -> None:
    done = script('stpes', DRY='1')
    assert done.returncode == 2
    assert 'no part stpes' in done.stderr


def test_wheels_are_of_what_the_library_needs() -> None:
    """All requirements but those that machines with JAX and PyTorch have."""
    lines = (ROOT / 'experiments' / 'gpu_wheels.txt').read_text().splitlines()
    pinned = [line for line in lines if not line.startswith('#')]
    assert all(re.fullmatch(r'[\w-]+==[\d.]+', line) for line in pinned)
    there = {'jax', 'numpy', 'scikit-learn', 'pillow', 'matplotlib', 'tqdm'}
    wanted = {
        re.split('[<>=]', line)[0]
        for line in (ROOT / 'requirements.txt').read_text().splitlines()
        if not line.startswith('#')
    }
    assert wanted - there <= {line.partition('==')[0] for line in pinned}


@pytest.mark.slow
def test_the_script_runs_on_a_cpu(rule: Any, tmp_path: Path) -> None:
    pytest.importorskip('torch', reason='PyTorch is the other side of the steps')
    standins.cifar(tmp_path / 'data')
    name = 'resnet20_option_a'
    weights = reference.weights(rule, name, np.zeros((1, 32, 32, 3), np.float32))
    np.savez(tmp_path / 't.npz', **weights)
    variables = {
        'TINY': '1', 'PAIR': 'resnet20-resnet8', 'DATA': str(tmp_path / 'data'),
        'TEACHER': str(tmp_path / 't.npz'), 'OUT': str(tmp_path / 'out'),
        'RUNS': str(tmp_path / 'runs'), 'JAX_DISABLE_MOST_OPTIMIZATIONS': 'true',
        'JAX_NUM_CPU_DEVICES': '1', 'MINUTES': '30',
    }  # fmt: skip
    parts = [part for part in PARTS if part != 'compile']  # of minutes, and needs a C++ compiler
    done = script(*parts, **variables)
    out = tmp_path / 'out'
    logs = {path.name: path.read_text()[-2000:] for path in out.glob('*.log')}
    assert done.returncode == 0, (done.stdout, done.stderr, logs)
    told = (out / 'parts.txt').read_text()
    assert re.findall(r'^(\w+): exit 0', told, re.MULTILINE) == parts, told

    for name in ('nayer', 'cpsc'):
        summary = json.loads((out / f'{name}-summary.json').read_text())
        assert (summary['method'], summary['rounds']) == (name, 4 if name == 'nayer' else 2)
        assert summary['config']['dtype'] == 'bfloat16'
    (measured,) = out.glob('digits-nayer-*.json')
    sides = json.loads(measured.read_text())['steps']
    assert list(sides) == ['round', 'student']
    assert set(sides['round']) == {'dfkd_jax', 'dfkd_jax, fused', 'PyTorch, eager'}
    with open(out / 'layers.csv') as file:
        rows = list(csv.DictReader(file))
    assert [(row['layer'], row['pass']) for row in rows] == [
        (layer, each) for layer in ('UpsampleConv', 'ConvTranspose')
        for each in ('forward', 'gradient')
    ]  # fmt: skip
    with open(out / 'sd_step.csv') as file:
        assert float(next(csv.DictReader(file))['step_seconds']) > 0
    with tarfile.open(out / 'receipts.tar.gz') as packed:
        names = {Path(name).name for name in packed.getnames()}
    assert names >= {'parts.txt', 'layers.csv', 'sd_step.csv', 'nayer-metrics.csv', 'steps.log'}


@pytest.mark.slow
def test_without_a_gpu_nothing_is_measured(tmp_path: Path) -> None:
    done = script(OUT=str(tmp_path / 'out'), RUNS=str(tmp_path / 'runs'), JAX_PLATFORMS='cpu')
    assert done.returncode == 1
    assert 'jax sees no GPU' in done.stdout
    assert [path.name for path in (tmp_path / 'out').glob('*.log')] == ['check.log']
