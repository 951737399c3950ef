"""The official CIFAR-10 and a teacher in a `.pth` file: from the shell to the summary."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import standins

from dfkd_jax import data, models, port
from dfkd_jax.storage import files, model_folder

ROOT = Path(__file__).resolve().parents[1]
MODEL = 'wrn16_1'
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
TIMEOUT = 400.0  # seconds; a run takes a twentieth of it where nothing else does


def main(*arguments: str, config: str = 'configs/cifar10.py:cpsc,smoke') -> Any:
    """Runs the entry point in a process of its own."""
    fast = {
        'JAX_PLATFORMS': 'cpu',
        'JAX_DISABLE_MOST_OPTIMIZATIONS': 'true',  # of a minute, they would take the most part
        'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
    }
    return subprocess.run(
        [sys.executable, '-m', 'dfkd_jax.main', f'--config={config}', *arguments],
        cwd=ROOT,
        env=os.environ | fast,
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
    )


@pytest.fixture(scope='module')
def teacher(tmp_path_factory: pytest.TempPathFactory, rule: Any) -> Path:
    """A WRN-16-1 as users of the field have theirs: a dict with its state dict and the epoch.

    Its weights are random; statistics and biases are such that pictures fall into many classes.
    """
    torch = pytest.importorskip('torch', reason='PyTorch writes the .pth file of the teacher')
    module = models.make(MODEL, num_classes=10)
    pictures = np.stack([standins.picture(label, 0, 32) for label in range(10)])
    x = data.normalise(pictures, MEAN, STD)
    shapes = jax.eval_shape(module.init, jax.random.key(0), x)
    blank = port.to_torch(MODEL, jax.tree.map(lambda leaf: np.zeros(leaf.shape), shapes))
    weights = rule.state_dict((name, array.shape) for name, array in blank.items())
    variables = port.from_torch(MODEL, weights)
    out, _ = module.apply(variables, x, train=True, mutable=['batch_stats'])
    variables['batch_stats'] = out.statistics
    variables['params']['fc']['bias'] -= np.mean(out.logits, axis=0)
    arrays = port.to_torch(MODEL, jax.device_get(variables))
    state = {name: torch.from_numpy(np.array(array)) for name, array in arrays.items()}
    path = tmp_path_factory.mktemp('teacher') / 'tiny.pth'
    torch.save({'state_dict': state, 'epoch': 240, 'best_acc1': 12.5}, path)
    return path


@pytest.mark.slow
def test_from_a_pth_teacher_to_a_summary(teacher: Path, tmp_path: Path) -> None:
    standins.cifar(tmp_path / 'data')
    workdir = tmp_path / 'run'
    done = main(
        f'--config.data.data_dir={tmp_path / "data"}',
        f'--config.teacher.checkpoint={teacher}',
        f'--config.teacher.model={MODEL}',
        f'--config.student.model={MODEL}',
        f'--workdir={workdir}',
    )
    assert done.returncode == 0, done.stderr
    summary = json.loads((workdir / 'summary.json').read_text())
    assert (summary['dataset'], summary['method'], summary['rounds']) == ('cifar10', 'cpsc', 2)
    assert (summary['teacher'], summary['student']) == (MODEL, MODEL)

    # Measured again, with nothing of the run's: plain pixels, constants and one call.
    test = data.load(standins.config('cifar10', tmp_path / 'data'), 'test')
    x = (test.images / np.float32(255) - np.float32(MEAN)) / np.float32(STD)
    module = models.make(MODEL, num_classes=10)

    def predict(variables: Any) -> np.ndarray:
        return np.asarray(module.apply(variables, x).logits).argmax(-1)

    by_teacher = predict(port.from_torch(MODEL, teacher))
    assert len(np.unique(by_teacher)) > 2  # else a wrong port might not show
    accuracy = 100 * float(np.mean(by_teacher == test.labels))
    assert summary['teacher_accuracy'] == pytest.approx(accuracy)
    assert f'teacher {MODEL}: {accuracy:.2f} % of the {test.size} test images' in done.stdout
    arrays = files.load_arrays(workdir / 'student.safetensors')
    by_student = predict(model_folder.unflatten(arrays))
    last, agreement = np.mean(by_student == test.labels), np.mean(by_student == by_teacher)
    assert summary['student_accuracy_last'] == pytest.approx(100 * float(last))
    assert summary['agreement_with_teacher'] == pytest.approx(100 * float(agreement))


def test_without_the_data_set_it_tells_how_to_get_it(tmp_path: Path) -> None:
    done = main(
        f'--config.data.data_dir={tmp_path}',
        f'--config.teacher.checkpoint={tmp_path / "teacher.pth"}',
        f'--workdir={tmp_path / "run"}',
    )
    assert done.returncode != 0
    assert 'Traceback' not in done.stderr
    assert f"no data set 'cifar10' in {tmp_path}" in done.stderr
    assert f'python -m dfkd_jax.data prepare cifar10 --data_dir={tmp_path}' in done.stderr
    assert not (tmp_path / 'run').exists()
