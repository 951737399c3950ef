"""Mistakes of a user: told in one line, before anything is compiled, with what to do."""

from __future__ import annotations

import errno
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import jax
import mistakes
import numpy as np
import pytest
import tiny
from mistakes import config

from dfkd_jax import build, loops, port
from dfkd_jax.distributed import sharding
from dfkd_jax.errors import ConfigError, PortError
from dfkd_jax.loops import supervised
from dfkd_jax.storage import files, model_folder, safe_read
from dfkd_jax.storage.workdir import claim

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def nothing_compiles(monkeypatch):
    """A mistake must be found before the first program is made."""

    def compiled(*_, **__):
        raise AssertionError('something was compiled before the mistake was reported')

    monkeypatch.setattr(jax._src.compiler, 'compile_or_get_cached', compiled)


KINDS = [(kind, wrong) for kind, cases in mistakes.CASES.items() for wrong in cases]


@pytest.mark.parametrize('kind, wrong', KINDS, ids=['-'.join(each) for each in KINDS])
def test_what_the_table_says_is_said(tmp_path, monkeypatch, kind, wrong):
    """And nothing is compiled, and no file that is read is executed."""
    monkeypatch.chdir(ROOT)
    if kind == 'weights of a teacher':
        pytest.importorskip('torch', reason='PyTorch reads .pth files')
    said = mistakes.said(mistakes.CASES[kind][wrong], tmp_path)
    assert mistakes.cell(said) == mistakes.rows()[kind, wrong]


def test_the_table_holds_these_kinds_and_no_other():
    assert list(mistakes.rows()) == KINDS and len(KINDS) > 100


def test_what_is_hostile_would_have_been_executed(tmp_path):
    """The trap works: a plain unpickling springs it."""
    mistakes.hostile_pickle(tmp_path)
    pickle.loads((tmp_path / 'weights.pth').read_bytes())
    assert (tmp_path / 'executed').exists()


@pytest.mark.parametrize(
    'raised, message',
    [
        (OSError(errno.ENOSPC, 'No space left on device', 'metrics.csv'), 'No space left.*metrics'),
        (KeyboardInterrupt(), 'interrupted at once'),
    ],
)
def test_what_ends_a_run_from_outside_is_one_line(tmp_path, monkeypatch, raised, message):
    def run(*_):
        raise raised

    monkeypatch.setattr(loops, 'run', run)
    said = mistakes.said(mistakes.shell('--config=digits'), tmp_path)
    assert re.fullmatch(f'error: .*{message}.* What was saved is whole: the same command .*', said)


def test_what_is_too_large_or_no_table_is_not_read(tmp_path):
    """Whatever is well-formed passes."""
    path = tmp_path / 'a.json'
    path.write_text('{"a": [1, {"b": null}]}')
    assert safe_read.read_json(path) == {'a': [1, {'b': None}]}
    os.truncate(path, safe_read.JSON_BYTES + 1)
    with pytest.raises(safe_read.Refused, match='67,108,865 bytes, and no more than 67,108,864'):
        safe_read.read_json(path)
    np.savez_compressed(tmp_path / 'zeros.npz', x=np.zeros(10**6))  # small enough to be no harm
    safe_read.check_archive(tmp_path / 'zeros.npz')
    safe_read.check_archive(path)


@pytest.mark.parametrize('method', ['nayer', 'cae'])
def test_a_batch_of_embeddings_divides(tmp_path, method):
    wrong = config(method, synthesis__batch_size=18, synthesis__bank=36)
    with pytest.raises(build.EXPECTED_ERRORS, match='does not divide over 4'):
        loops.run(wrong, tmp_path / 'run')


def test_sources_that_do_not_fit_the_batch(tmp_path):
    wrong = config('cae', noise__sources=('sign',) * 3, noise__magnitudes=(1.0,) * 3)
    with pytest.raises(ConfigError, match='does not divide over 3 sources of noise'):
        loops.run(wrong, tmp_path / 'run')


def test_checkpoint_of_another_network(tmp_path):
    settings = config()
    module = build.make_classifier('resnet8', settings.data, settings.dtype)
    image = jax.ShapeDtypeStruct((1, 16, 16, 1), np.float32)
    shapes = jax.eval_shape(lambda x: module.init(jax.random.key(0), x), image)
    weights = jax.tree.map(lambda x: np.ones(x.shape, np.float32), shapes)
    model_folder.save_classifier(tmp_path / 'teacher', 'resnet8', weights, settings.data)
    wrong = config(teacher__model='resnet20', teacher__checkpoint=str(tmp_path / 'teacher'))
    with pytest.raises(ConfigError, match='resnet8.*the config says resnet20'):
        loops.run(wrong, tmp_path / 'run')
    arrays = port.to_torch('resnet8', weights)
    files.save_arrays(tmp_path / 'teacher.safetensors', arrays)
    wrong.teacher.checkpoint = str(tmp_path / 'teacher.safetensors')
    with pytest.raises(PortError, match='(?s)missing.*resnet8'):
        loops.run(wrong, tmp_path / 'run2')


def test_workdir_of_another_config(tmp_path):
    with claim(tmp_path / 'run', config()):
        (tmp_path / 'run' / 'checkpoints').mkdir()
    was = f'config.student.lr was {config().student.lr}, now 0.3'
    with pytest.raises(ConfigError, match=was):
        loops.run(config(student__lr=0.3), tmp_path / 'run')


def test_workdir_where_nothing_ran_yet_takes_the_mended_config(tmp_path):
    """Even where the process was killed while it wrote the first file."""
    workdir = tmp_path / 'run'
    with claim(workdir, config()):
        (workdir / '.config.json.12.34.tmp').write_text('{')
    mended = config(student__lr=0.3)
    with claim(workdir, mended):
        (workdir / 'checkpoints').mkdir()
    with claim(workdir, mended):
        pass
    was = f'config.student.lr was 0.3, now {config().student.lr}'
    with pytest.raises(ConfigError, match=was):
        with claim(workdir, config()):
            pass


def test_two_runs_of_one_workdir(tmp_path):
    workdir = tmp_path / 'run'
    with claim(workdir, config()):
        with pytest.raises(ConfigError, match='another process is running in .*run: wait'):
            loops.run(config(), workdir)
    with claim(workdir, config()):
        pass


def test_workdir_that_cannot_be_written(tmp_path):
    (tmp_path / 'file').write_text('here')
    for workdir in (tmp_path / 'file', tmp_path / 'file' / 'run'):
        with pytest.raises(ConfigError, match='cannot be written .Not a directory.: choo'):
            loops.run(config(), workdir)
    assert (tmp_path / 'file').read_text() == 'here'


def test_folder_that_is_no_run(tmp_path):
    (tmp_path / 'thesis.tex').write_text('years of work')
    with pytest.raises(ConfigError, match='not empty and not a run'):
        loops.run(config(), tmp_path)
    assert (tmp_path / 'thesis.tex').read_text() == 'years of work'


def test_batch_of_real_images_divides(tmp_path):
    with pytest.raises(ConfigError, match='teach.batch_size=30 does not divide'):
        supervised.run(config(teach__batch_size=30), tmp_path / 'teacher')


def test_shares_are_named_after_their_field():
    with pytest.raises(ValueError, match='batch=10 does not divide over 4 devices.*8 or 12'):
        sharding.Shards('shards', 4).check('batch', 10)


@pytest.mark.parametrize(
    'arguments, message',
    tiny.quick(
        [
            (('--config=digits:cpsc', '--config.method=cpsk'), 'unknown method'),
            (('--config=digits:cpsc', '--config.student.lrr=1'), 'lrr'),
            (('--config=digits:nonsense',), 'nonsense'),
            (('--config=digits', 'stray'), 'stray'),
        ],
        (('--config=digits:cpsc', '--config.student.lrr=1'), 'lrr'),
    ),
)
def test_at_the_shell(tmp_path, arguments, message):
    """One line that starts with `error:`, and no traceback."""
    done = subprocess.run(
        [sys.executable, '-m', 'dfkd_jax.main', f'--workdir={tmp_path / "run"}', *arguments],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode != 0
    assert 'Traceback' not in done.stderr, done.stderr
    assert message in done.stderr
    assert not (tmp_path / 'run').exists()
