"""Ordinary distillation on real data as a run of `main`, beside the one run without data."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import tiny
from ml_collections import ConfigDict

from dfkd_jax import loops
from dfkd_jax.configs import common, digits
from dfkd_jax.errors import ConfigError
from dfkd_jax.loops import kd, supervised
from dfkd_jax.methods import METHODS
from dfkd_jax.reporting import metrics
from dfkd_jax.storage import files, model_folder

pytestmark = pytest.mark.usefixtures('fast_runs')


def small(method: str) -> ConfigDict:
    """A run at 4 pixels, seconds long."""
    config = digits.get_config(f'{method},smoke')
    config.data.image_size = 4
    config.teacher.model = config.student.model = tiny.RESNET
    config.teach.update(epochs=2, batch_size=256)
    if method != 'kd':
        config.synthesis.update(batch_size=8, student_batch_size=8)
        config.phases = (common.phase(rounds=2, g_steps=0, s_steps=3),)
    return config


@pytest.fixture(scope='module')
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Workdirs: a run on noise with its own teacher, and one of KD with that teacher."""
    root = tmp_path_factory.mktemp('runs')
    loops.run(small('noise'), root / 'noise')
    loops.run(kd_from(root / 'noise'), root / 'kd')
    return {path.name: path for path in root.iterdir()}


def kd_from(noise: Path) -> ConfigDict:
    config = small('kd')
    config.teacher.checkpoint = str(noise / 'teacher')
    return config


def summary(path: Path) -> dict:
    return json.loads((path / 'summary.json').read_text())


@pytest.mark.slow
def test_main_trains_what_teach_trains(runs: dict[str, Path], tmp_path: Path) -> None:
    supervised.run(kd_from(runs['noise']), tmp_path / 'teach', role='kd')
    expected = files.load_arrays(tmp_path / 'teach' / 'variables.safetensors')
    found = files.load_arrays(runs['kd'] / 'student' / 'variables.safetensors')
    assert {k: v.tobytes() for k, v in found.items()} == {
        k: v.tobytes() for k, v in expected.items()
    }
    facts = model_folder.load_model(tmp_path / 'teach')[0]
    assert summary(runs['kd'])['student_accuracy_last'] == facts['accuracy']


def test_a_run_on_real_data_leaves_what_others_leave(runs: dict[str, Path]) -> None:
    kd, noise = summary(runs['kd']), summary(runs['noise'])
    assert kd.keys() == noise.keys()
    assert (kd['method'], noise['method']) == ('kd', 'noise')
    left = {name: {path.name for path in runs[name].iterdir()} for name in ('kd', 'noise')}
    left['noise'] -= {
        'images.png', 'metrics.csv', 'tensorboard', 'checkpoints', 'teacher', 'progress',
    }  # fmt: skip
    assert left['noise'] <= left['kd']
    page = (runs['kd'] / 'report.html').read_text()
    assert 'on real data' in page and 'without real data' not in page
    assert 'without real data' in (runs['noise'] / 'report.html').read_text()


def test_teacher_queries_are_counted(runs: dict[str, Path]) -> None:
    assert summary(runs['noise'])['teacher_queries'] == 2 * 3 * 8
    assert summary(runs['noise'])['images_synthesised'] == 0
    assert metrics.read(runs['noise'])['teacher_queries'].tolist() == [24, 48]
    kd = summary(runs['kd'])
    assert kd['teacher_queries'] == kd['images_distilled'] == 2 * (1437 // 256) * 256


def test_a_finished_run_is_left_alone(runs: dict[str, Path], capsys) -> None:
    assert loops.run(kd_from(runs['noise']), runs['kd']) == summary(runs['kd'])
    assert 'finished' in capsys.readouterr().out


def test_mistakes_are_told_before_a_teacher_is_trained(tmp_path: Path) -> None:
    config = small('kd')
    config.student.model = 'resnet9'
    with pytest.raises(ConfigError, match=re.escape("'resnet9'")):
        loops.run(config, tmp_path / 'run')
    assert not (tmp_path / 'run').exists()


def test_it_is_no_method() -> None:
    """What a data-free run is made of cannot be handed the training images."""
    assert kd.METHOD not in METHODS
