"""A run leaves what it promises, and one stopped or killed anywhere ends as one that was not."""

from __future__ import annotations

import csv
import json
import random
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import tiny
from ml_collections import ConfigDict
from PIL import Image
from processes import TIMEOUT, at_row, killed_at, output, process, to_the_end, wait_for

from dfkd_jax import build, loops, port
from dfkd_jax.configs import common, digits
from dfkd_jax.contract import Frozen
from dfkd_jax.errors import ConfigError
from dfkd_jax.loops import Stopped, alternating, supervised
from dfkd_jax.reporting import metrics
from dfkd_jax.storage import files, model_folder
from dfkd_jax.storage.checkpoints import Checkpoints, Restored

pytestmark = pytest.mark.usefixtures('fast_runs')
ROOT = Path(__file__).resolve().parents[1]
ROUNDS = 7


def small() -> ConfigDict:
    """The digits run at 4 pixels, seconds long: two phases, and cadences that do not coincide."""
    config = digits.get_config('cpsc,smoke')
    config.data.image_size = 4
    config.teacher.model = config.student.model = tiny.RESNET
    config.teach.update(epochs=3, save_every_epochs=5, batch_size=128)
    config.generator.update(latent=8, width=4)
    config.synthesis.update(batch_size=8, student_batch_size=8)
    config.student.warmup_steps = 2
    config.phases = (
        common.phase(rounds=4, g_steps=2, s_steps=1, loops=2),
        common.phase(rounds=ROUNDS - 4, g_steps=1, s_steps=2),
    )
    config.log_every_rounds, config.eval_every_rounds, config.save_every_rounds = 2, 3, 4
    return config


@pytest.fixture(scope='module')
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The workdir of an uninterrupted run, its teacher in ``teacher/``."""
    workdir = tmp_path_factory.mktemp('finished') / 'run'
    assert loops.run(small(), workdir)['rounds'] == ROUNDS
    return workdir


def state_of(workdir: Path) -> Restored:
    """The last checkpoint of a run of `small`."""
    teacher = model_folder.load_model(workdir / 'teacher')[1]
    like = jax.eval_shape(build.build(small()).whole.init, Frozen(teacher), jax.random.key(0))
    with Checkpoints(workdir / 'checkpoints') as checkpoints:
        restored = checkpoints.restore(like)
    assert restored is not None
    return restored


def rows_of(workdir: Path) -> list[dict[str, str]]:
    """``metrics.csv`` as text, but for the one column of time."""
    with open(workdir / metrics.FILE, newline='') as file:
        return [{k: v for k, v in row.items() if k != 'seconds'} for row in csv.DictReader(file)]


def summary_of(workdir: Path) -> dict[str, Any]:
    summary = json.loads((workdir / 'summary.json').read_text())
    assert summary.pop('seconds') > 0
    return summary


def assert_same(a: Any, b: Any) -> None:
    """The same trees, bit for bit."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        x, y = np.asarray(x), np.asarray(y)
        assert x.dtype == y.dtype and x.shape == y.shape
        assert x.tobytes() == y.tobytes()


WEIGHTS = (
    'teacher/variables.safetensors',
    'student/variables.safetensors',
    'student.safetensors',
    'student_torch.safetensors',
)


def assert_same_run(workdir: Path, expected: Path) -> None:
    """The same weights, numbers and summary, but for seconds."""
    for name in WEIGHTS:
        assert (workdir / name).read_bytes() == (expected / name).read_bytes(), name
    assert rows_of(workdir) == rows_of(expected)
    assert rows_of(workdir / 'teacher') == rows_of(expected / 'teacher')
    assert summary_of(workdir) == summary_of(expected)


# What is left


def test_every_promised_file_is_left(finished: Path) -> None:
    present = {path.name for path in finished.iterdir()}
    assert present >= {
        'config.json', 'checkpoints', 'metrics.csv', 'tensorboard', 'images.png', 'curves.png',
        'student.safetensors', 'student_torch.safetensors', 'student', 'summary.json',
        'report.html', 'teacher',
    }  # fmt: skip
    whole = {path.name for path in (finished / 'checkpoints').iterdir() if path.is_dir()}
    assert whole == {'4', str(ROUNDS)}
    assert sum(path.stat().st_size for path in (finished / 'tensorboard').iterdir()) > 0
    assert not list(finished.rglob('*tmp*'))


def test_summary(finished: Path) -> None:
    summary = json.loads((finished / 'summary.json').read_text())
    assert summary.keys() >= {
        'method', 'teacher', 'student', 'dataset', 'seed', 'teacher_accuracy',
        'student_accuracy_last', 'student_accuracy_best', 'agreement_with_teacher', 'seconds',
        'rounds', 'images_synthesised', 'versions', 'config',
    }  # fmt: skip
    assert summary['method'] == 'cpsc'
    assert (summary['teacher'], summary['student']) == (tiny.RESNET, tiny.RESNET)
    assert (summary['dataset'], summary['seed'], summary['rounds']) == ('digits', 0, ROUNDS)
    assert summary['images_synthesised'] == 8 * (4 * 2 * 2 + 3 * 1 * 1)
    assert summary['images_distilled'] == 8 * (4 * 1 + 3 * 2)
    facts, _ = model_folder.load_model(finished / 'teacher')
    assert summary['teacher_accuracy'] == facts['accuracy']
    assert summary['versions']['jax'] == jax.__version__
    assert summary['config'] == json.loads((finished / 'config.json').read_text())
    assert summary['config']['phases'][1]['rounds'] == ROUNDS - 4


@pytest.mark.slow
def test_a_teacher_without_batch_norms_is_told_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """At the start, in the summary and on the page; a prior takes the place of statistics."""
    config = small()
    config.teacher.model = 'resnet20_gn'
    config.teach.epochs = 1
    config.image_prior.update(tv=0.1, l2=0.01)
    config.phases = config.phases[:1]
    config.phases[0].rounds = 2
    summary = loops.run(config, tmp_path)
    told = summary['warnings']['no_batch_statistics']
    assert told.startswith('resnet20_gn has no batch norms') and 'config.loss.bn=5 drops' in told
    assert capsys.readouterr().out.count(f'warning (no_batch_statistics): {told}') == 1
    assert told in (tmp_path / 'report.html').read_text()
    columns = metrics.read(tmp_path)
    assert {'g/prior_tv', 'g/prior_l2'} <= columns.keys() and 'g/bn' not in columns


def test_metrics(finished: Path) -> None:
    columns = metrics.read(finished)
    assert list(columns)[:2] == ['round', 'seconds']
    assert {'student_accuracy', 'agreement_with_teacher'} <= columns.keys()
    assert any(name.startswith('g/') for name in columns)
    assert any(name.startswith('s/') for name in columns)
    assert columns['round'].tolist() == [2, 3, 4, 6, 7]
    measured = ~np.isnan(columns.pop('student_accuracy'))
    assert columns['round'][measured].tolist() == [3, 6, 7]
    assert np.array_equal(~np.isnan(columns.pop('agreement_with_teacher')), measured)
    assert all(np.isfinite(column).all() for column in columns.values())
    assert (np.diff(columns['seconds']) > 0).all()


def test_summary_tells_the_last_row_of_metrics(finished: Path) -> None:
    columns, summary = metrics.read(finished), summary_of(finished)
    accuracy = columns['student_accuracy']
    assert accuracy[-1] == pytest.approx(summary['student_accuracy_last'], rel=1e-6)
    assert np.nanmax(accuracy) == pytest.approx(summary['student_accuracy_best'], rel=1e-6)
    agreement = columns['agreement_with_teacher'][-1]
    assert agreement == pytest.approx(summary['agreement_with_teacher'], rel=1e-6)


def test_student_is_that_of_the_last_checkpoint(finished: Path) -> None:
    restored = state_of(finished)
    assert restored.done == int(restored.state.round) == ROUNDS
    variables = jax.device_get(restored.state.student.variables)
    arrays = files.load_arrays(finished / 'student.safetensors')
    assert_same(model_folder.unflatten(arrays), variables)
    path = finished / 'student_torch.safetensors'
    assert_same(port.from_torch(tiny.RESNET, path, num_classes=10, channels=1), variables)
    facts, found = model_folder.load_model(finished / 'student')
    assert_same(found, variables)
    assert (facts['model'], facts['num_classes'], facts['channels']) == (tiny.RESNET, 10, 1)
    # Enough to classify with.
    assert (facts['mean'], facts['std'], facts['resize']) == ([0.5], [0.5], 'resize')
    assert facts['class_names'] == list('0123456789') and facts['image_size'] == 4


@pytest.mark.parametrize('name', ['images.png', 'curves.png'])
def test_pictures(finished: Path, name: str) -> None:
    with Image.open(finished / name) as image:
        assert image.format == 'PNG'
        pixels = np.asarray(image.convert('RGB'))
    assert min(pixels.shape[:2]) > 100
    assert pixels.std() > 1


# Stopped and continued, in one process


def terminate_at(call: int, function: Callable) -> Callable:
    """`function`, which sends SIGTERM to this process in its n-th call."""
    calls = 0

    def wrapped(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            signal.raise_signal(signal.SIGTERM)
        return function(*args)

    return wrapped


def test_stopped_twice_and_continued(
    finished: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    workdir = tmp_path / 'run'
    handler = signal.getsignal(signal.SIGTERM)

    with monkeypatch.context() as patch:  # in the teacher's second epoch
        patch.setattr(metrics.Writer, 'write', terminate_at(1, metrics.Writer.write))
        assert loops.run(small(), workdir) == {}
    assert signal.getsignal(signal.SIGTERM) is handler
    assert 'stopped and saved after epoch 2 of 3' in capsys.readouterr().out
    assert not (workdir / 'teacher' / model_folder.CARD).exists()
    assert not (workdir / metrics.FILE).exists()

    make_round, rounds = alternating.make_round, []

    def make_counted(*args: Any) -> Callable:
        round_fn = make_round(*args)

        def counted(*inputs: Any) -> Any:
            rounds.append(1)
            if len(rounds) == 5:
                signal.raise_signal(signal.SIGTERM)
            return round_fn(*inputs)

        return counted

    with monkeypatch.context() as patch:  # in a round that is neither logged, measured nor saved
        patch.setattr(alternating, 'make_round', make_counted)
        assert loops.run(small(), workdir) == {}
    assert f'stopped and saved after round 5 of {ROUNDS}' in capsys.readouterr().out
    assert len(rounds) == 5
    assert not (workdir / 'summary.json').exists()
    assert [row['round'] for row in rows_of(workdir)] == ['2', '3', '4']

    assert loops.run(small(), workdir)['rounds'] == ROUNDS
    assert f'continuing after round 5 of {ROUNDS}' in capsys.readouterr().out
    assert_same_run(workdir, finished)
    there, here = state_of(finished), state_of(workdir)
    assert_same(here.state, there.state)
    del here.progress['seconds'], there.progress['seconds']
    assert here.progress == there.progress


def embedded(teacher: Path) -> ConfigDict:
    """`small` with CAE-DFKD, on all devices, from that teacher."""
    config = digits.get_config('cae,smoke')
    config.data.image_size = 4
    config.teacher.model = config.student.model = tiny.RESNET
    config.teacher.checkpoint = str(teacher)
    config.generator.width = 4
    config.synthesis.update(batch_size=40, student_batch_size=8, bank=160)
    config.phases = (
        common.phase(rounds=2, g_steps=2, s_steps=0, loops=2),
        common.phase(rounds=2, g_steps=1, s_steps=2),
    )
    config.eval_every_rounds = config.save_every_rounds = 3
    return config


@pytest.mark.slow
def test_bank_and_embeddings_survive(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert jax.device_count() == 4
    config, states = embedded(finished / 'teacher'), []
    whole, stopped = tmp_path / 'whole', tmp_path / 'stopped'
    assert loops.run(config, whole)['rounds'] == 4
    assert np.load(whole / alternating.TABLE).shape == (10, 384)

    writer = terminate_at(2, metrics.Writer.write)  # heard when the student learns from the bank
    with monkeypatch.context() as patch:
        patch.setattr(metrics.Writer, 'write', writer)
        assert loops.run(config, stopped) == {}
    # What an encoder says on another machine, to its rounding.
    table = np.load(whole / alternating.TABLE) * (1 + 1e-6)
    with monkeypatch.context() as patch:
        patch.setattr(build, 'load_table', lambda *_: table)
        assert loops.run(config, stopped)['rounds'] == 4
    assert rows_of(stopped) == rows_of(whole)
    for workdir in (whole, stopped):
        run = build.build(config)
        frozen = Frozen(model_folder.load_model(finished / 'teacher')[1], run.extra)
        like = jax.eval_shape(run.whole.init, frozen, jax.random.key(0))
        with Checkpoints(workdir / 'checkpoints') as checkpoints:
            states.append(checkpoints.restore(like).state)
    assert states[0].extra.bank.image.dtype == np.uint8
    assert int(states[0].extra.bank.written) == 40 * (2 * 2 + 2)
    assert_same(*states)


def test_other_embeddings_are_refused(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = embedded(finished / 'teacher')
    tables = iter(np.random.default_rng(0).normal(size=(2, 10, 6)))
    monkeypatch.setattr(build, 'load_table', lambda *_: next(tables))

    def stop_here(*_: Any) -> None:
        raise Stopped

    monkeypatch.setattr(alternating.evaluate, 'teacher', stop_here)  # after the table is kept
    assert loops.run(config, tmp_path) == {}
    with pytest.raises(ConfigError, match='other embeddings'):
        loops.run(config, tmp_path)


def test_a_mistaken_teacher_leaves_the_folder_to_another_config(tmp_path: Path) -> None:
    config, workdir = embedded(tmp_path / 'nowhere'), tmp_path / 'run'
    with pytest.raises(build.EXPECTED_ERRORS, match='nowhere'):
        loops.run(config, workdir)
    assert {path.name for path in workdir.iterdir()} == {'config.json', 'inputs.json', 'lock'}
    config.loss.bn = 2.0  # no complaint of another config, but the same mistake
    with pytest.raises(build.EXPECTED_ERRORS, match='nowhere'):
        loops.run(config, workdir)


def test_finished_run_trains_nothing_more(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*args: Any) -> Any:
        raise AssertionError('a finished run trained again')

    files = (*WEIGHTS, 'metrics.csv', 'summary.json', 'images.png')
    before = {name: (finished / name).read_bytes() for name in files}
    monkeypatch.setattr(alternating, 'make_round', forbidden)
    monkeypatch.setattr(supervised, 'make_step', forbidden)
    assert loops.run(small(), finished)['rounds'] == ROUNDS
    assert {name: (finished / name).read_bytes() for name in files} == before


def test_another_config_is_refused(finished: Path) -> None:
    files = {path: path.stat().st_mtime_ns for path in finished.rglob('*') if path.is_file()}
    other = small()
    other.loss.kd = 2.0
    with pytest.raises(ConfigError, match='config.loss.kd was 1.0, now 2.0'):
        loops.run(other, finished)
    assert files == {p: p.stat().st_mtime_ns for p in finished.rglob('*') if p.is_file()}


@pytest.mark.slow
def test_teaching_stopped_and_continued(finished: Path, tmp_path: Path) -> None:
    """The student on real data, taught by the teacher, stopped after its first epoch."""
    config = small()
    config.teacher.checkpoint = str(finished / 'teacher')
    config.teach.epochs = 2
    whole, stopped = tmp_path / 'whole', tmp_path / 'stopped'
    facts = supervised.run(config, whole, 'kd')
    assert (facts['model'], facts['role'], facts['epochs']) == (tiny.RESNET, 'kd', 2)
    with pytest.raises(Stopped):
        supervised.run(config, stopped, 'kd', interrupted=lambda: True)
    assert not (stopped / model_folder.VARIABLES).exists()
    assert supervised.run(config, stopped, 'kd')['variables_sha256'] == facts['variables_sha256']
    name = model_folder.VARIABLES
    assert (stopped / name).read_bytes() == (whole / name).read_bytes()
    assert rows_of(stopped) == rows_of(whole)


# Killed, as processes

PROCESS_ROUNDS = 30
TEACHER_EPOCHS = 5
ARGUMENTS = [
    '--config=configs/digits.py:cpsc,smoke', '--config.data.image_size=4',
    '--config.teacher.model=resnet8_half', f'--config.teach.epochs={TEACHER_EPOCHS}',
    '--config.teach.batch_size=128', '--config.generator.latent=8', '--config.generator.width=4',
    '--config.synthesis.batch_size=8', '--config.synthesis.student_batch_size=8',
    f'--config.phases[0].rounds={PROCESS_ROUNDS}', '--config.log_every_rounds=2',
    '--config.eval_every_rounds=3', '--config.save_every_rounds=4',
]  # fmt: skip


@pytest.fixture(scope='module')
def unkilled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The workdir of a process that nobody disturbed."""
    workdir = tmp_path_factory.mktemp('unkilled') / 'run'
    to_the_end(ARGUMENTS, workdir)
    return workdir


@pytest.mark.slow
@pytest.mark.faults
def test_killed_anywhere_ends_the_same(unkilled: Path, tmp_path: Path) -> None:
    """While the teacher trains, and twice while the student does, perhaps in a save."""
    workdir, rng = tmp_path / 'run', random.Random(0)
    moments = [
        (at_row(workdir / 'teacher', rng.randint(1, TEACHER_EPOCHS - 2)), rng.uniform(0, 0.1)),
        (at_row(workdir, rng.randint(2, 10)), rng.uniform(0, 0.2)),
        (at_row(workdir, rng.randint(14, PROCESS_ROUNDS - 8)), rng.uniform(0, 0.1)),
    ]
    killed_at(ARGUMENTS, workdir, moments)
    to_the_end(ARGUMENTS, workdir)
    assert output(workdir).count('continuing after round') >= 1
    assert_same_run(workdir, unkilled)


@pytest.mark.slow
@pytest.mark.faults
@pytest.mark.parametrize('seed', [1])
def test_killed_ten_times_ends_the_same(unkilled: Path, tmp_path: Path, seed: int) -> None:
    """Also while it starts, and while it leaves its results."""
    workdir, rng = tmp_path / 'run', random.Random(seed)
    moments: list[tuple[Callable[[], bool], float]] = [(lambda: True, rng.uniform(0, 6))]
    for epoch in sorted(rng.sample(range(1, TEACHER_EPOCHS), 3)):
        moments.append((at_row(workdir / 'teacher', epoch), rng.uniform(0, 0.2)))
    for number in sorted(rng.sample(range(2, PROCESS_ROUNDS - 6), 5)):
        moments.append((at_row(workdir, number), rng.uniform(0, 0.2)))
    moments.append(((workdir / 'student.safetensors').exists, rng.uniform(0, 0.1)))
    assert len(moments) == 10
    killed_at(ARGUMENTS, workdir, moments)
    to_the_end(ARGUMENTS, workdir)
    assert_same_run(workdir, unkilled)


@pytest.mark.slow  # the short form of the fault suite does it to the same program, started at once
@pytest.mark.faults
def test_terminated_process_saves_and_exits_cleanly(unkilled: Path, tmp_path: Path) -> None:
    workdir = tmp_path / 'run'
    with process(ARGUMENTS, workdir) as running:
        wait_for(at_row(workdir, 5), running, workdir)
        running.terminate()
        assert running.wait(TIMEOUT) == 0, output(workdir)
    said = re.search(
        rf'stopped and saved after round (\d+) of {PROCESS_ROUNDS}; continue', output(workdir)
    )
    assert said and 'Traceback' not in output(workdir)
    assert (workdir / 'checkpoints' / said[1]).is_dir()
    assert not (workdir / 'summary.json').exists()
    to_the_end(ARGUMENTS, workdir)
    assert f'continuing after round {said[1]} of {PROCESS_ROUNDS}' in output(workdir)
    assert_same_run(workdir, unkilled)
