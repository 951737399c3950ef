"""Checkpoints come back bit for bit, or not at all; model folders are whole or refused."""

from __future__ import annotations

import errno
import json
import logging as std_logging
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import struct

from dfkd_jax.contract import Net, State, start
from dfkd_jax.errors import CheckpointError
from dfkd_jax.storage import files, model_folder
from dfkd_jax.storage.checkpoints import FILES, FORMAT, Checkpoints, Restored, _file_sums


@struct.dataclass
class Extra:
    """What a method may keep: other dtypes, scalars, nested containers, nothing at all."""

    bank: jax.Array
    half: jax.Array
    flags: tuple[jax.Array, ...]
    none: tuple[()] = ()


def make_state(seed: int = 0, width: int = 4) -> State:
    keys = jax.random.split(jax.random.key(seed), 3)
    tx = optax.chain(optax.add_decayed_weights(1e-4), optax.sgd(0.1, momentum=0.9))
    student = {'conv1': {'kernel': jax.random.normal(keys[0], (3, 3, 1, width))}}
    generator = {
        'dense': {'kernel': jax.random.normal(keys[1], (5, width)), 'bias': jnp.ones(width)}
    }
    return State(
        round=jnp.asarray(seed, jnp.int32),
        student=start(student, {'bn1': {'mean': jnp.zeros(width), 'var': jnp.ones(width)}}, tx),
        generator=start(generator, {}, optax.adam(1e-3)),
        extra=Extra(
            bank=jax.random.randint(keys[2], (6, 4, 4, 1), 0, 256).astype(jnp.uint8),
            half=jnp.asarray([0.1, float('nan'), float('inf')], jnp.bfloat16),
            flags=(jnp.asarray(True), jnp.asarray(3.25)),
        ),
    )


def abstract() -> State:
    return jax.eval_shape(make_state)


def assert_same(a: Any, b: Any) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype and x.shape == y.shape
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


@pytest.fixture(scope='module')
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rounds 2 and 3 of a run, whose states are those of seeds 2 and 3."""
    path = tmp_path_factory.mktemp('checkpoints')
    with Checkpoints(path) as checkpoints:
        for done in (1, 2, 3):
            checkpoints.save(done, make_state(done), {'best': done / 7})
    return path


@pytest.fixture
def folder(template: Path, tmp_path: Path) -> Path:
    """A copy of the template, to damage."""
    return Path(shutil.copytree(template, tmp_path / 'checkpoints'))


def restored(checkpoints: Checkpoints, done: int, like: Any = None) -> Restored:
    """What is restored, which must be the round `done`, as the template has it."""
    found = checkpoints.restore(like or jax.eval_shape(make_state))
    assert found is not None and found.done == done
    assert found.progress == {'best': done / 7}
    assert_same(found.state, make_state(done))
    return found


def test_restores_bits_structure_and_progress(folder: Path) -> None:
    """Of the structure of a state, or of its shapes."""
    with Checkpoints(folder) as checkpoints:
        for like in (abstract(), make_state(0)):
            state = restored(checkpoints, 3, like).state
            assert isinstance(state.student, Net)
            assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(state))


def test_empty_directory_has_none(tmp_path: Path) -> None:
    with Checkpoints(tmp_path / 'a' / 'b') as checkpoints:
        assert checkpoints.restore(abstract()) is None


def test_a_method_without_generator(tmp_path: Path) -> None:
    state = make_state(1).replace(generator=(), extra=())
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state, {})
        found = checkpoints.restore(jax.eval_shape(lambda: state))
    assert found is not None
    assert_same(found.state, state)


def test_keeps_the_last_ones(folder: Path, tmp_path: Path) -> None:
    assert sorted(os.listdir(folder)) == ['2', '3']
    with Checkpoints(tmp_path / 'three', keep=3) as checkpoints:
        for done in range(5):
            checkpoints.save(done, make_state(done), {})
    assert sorted(os.listdir(tmp_path / 'three')) == ['2', '3', '4']


def test_a_saved_state_may_be_donated_and_so_may_a_restored_one(tmp_path: Path) -> None:
    @jax.jit
    def bits(state: State) -> State:
        return jax.tree.map(lambda x: x, state)

    step = jax.jit(
        lambda s: s.replace(student=jax.tree.map(lambda x: x + 1, s.student)), donate_argnums=0
    )
    with Checkpoints(tmp_path) as checkpoints:
        state = bits(make_state(1))
        checkpoints.save(1, state, {'best': 1 / 7})
        step(state)
        step(restored(checkpoints, 1).state)
        restored(checkpoints, 1)


@pytest.mark.skipif(jax.device_count() < 2, reason='needs two devices (jax_num_cpu_devices)')
def test_a_state_replicated_by_a_mesh_continues_anywhere(tmp_path: Path) -> None:
    mesh = jax.make_mesh((2,), ('data',), devices=jax.devices()[:2])
    spread = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, jax.device_put(make_state(1), spread), {'best': 1 / 7})
        restored(checkpoints, 1)


def test_saving_a_round_again_keeps_it_and_going_back_is_refused(folder: Path) -> None:
    with Checkpoints(folder) as checkpoints:
        checkpoints.save(3, make_state(3), {'best': 3 / 7})
        with pytest.raises(CheckpointError, match='already holds round 3'):
            checkpoints.save(2, make_state(2), {})


def test_progress_must_be_json(tmp_path: Path) -> None:
    with Checkpoints(tmp_path) as checkpoints, pytest.raises(TypeError, match='JSON'):
        checkpoints.save(1, make_state(1), {'x': object()})


def _damage(path: Path, how: str) -> None:
    data = path.read_bytes()
    if how == 'delete':
        path.unlink()
    elif how == 'truncate':
        path.write_bytes(data[: len(data) // 2])
    elif how == 'empty':
        path.write_bytes(b'')
    else:  # one bit
        path.write_bytes(data[:-5] + bytes([data[-5] ^ 4]) + data[-4:])


@pytest.mark.parametrize(
    ('which', 'how'),
    [
        ('state/manifest.ocdbt', 'truncate'),
        ('state/_METADATA', 'empty'),
        ('record/metadata', 'delete'),
        ('record/metadata', 'flip'),
        (FILES, 'truncate'),
        ('', 'truncate'),  # the largest file: arrays
        ('', 'flip'),
    ],
)
def test_damaged_newest_is_set_aside(
    folder: Path, which: str, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    files = (path for path in (folder / '3').rglob('*') if path.is_file())
    victim = folder / '3' / which if which else max(files, key=lambda path: path.stat().st_size)
    _damage(victim, how)
    with Checkpoints(folder) as checkpoints:
        restored(checkpoints, 2)
        assert 'the checkpoint of round 3 cannot be read' in caplog.text
        assert sorted(os.listdir(folder)) == ['2', '3.broken']


def test_a_round_that_was_set_aside_is_saved_anew(folder: Path) -> None:
    _damage(folder / '3' / 'state' / 'manifest.ocdbt', 'truncate')
    with Checkpoints(folder) as checkpoints:
        restored(checkpoints, 2)
        checkpoints.save(3, make_state(3), {'best': 3 / 7})
        restored(checkpoints, 3)
    assert sorted(os.listdir(folder)) == ['2', '3', '3.broken']  # which does not count as kept


def test_every_checkpoint_damaged(folder: Path) -> None:
    for done in (2, 3):
        _damage(folder / str(done) / 'state' / 'manifest.ocdbt', 'truncate')
    with Checkpoints(folder) as checkpoints:
        with pytest.raises(CheckpointError, match='kept there as 3.broken, 2.broken'):
            checkpoints.restore(abstract())
        assert checkpoints.restore(abstract()) is None  # asked again, it begins anew


def test_an_empty_folder_and_a_folder_without_sums(folder: Path) -> None:
    (folder / '4').mkdir()  # as if a copy had stopped
    (folder / '3' / FILES).unlink()  # as if killed just after the rename
    with Checkpoints(folder) as checkpoints:
        restored(checkpoints, 3)


def test_what_a_killed_save_left_is_removed(folder: Path) -> None:
    os.rename(folder / '3', folder / '3.orbax-checkpoint-tmp')
    with Checkpoints(folder) as checkpoints:
        restored(checkpoints, 2)
    deadline = time.monotonic() + 20  # orbax removes it in the background
    while sorted(os.listdir(folder)) != ['2'] and time.monotonic() < deadline:
        time.sleep(0.1)
    assert sorted(os.listdir(folder)) == ['2']


def test_another_layout_is_an_error_that_names_the_difference(folder: Path) -> None:
    with Checkpoints(folder) as checkpoints:
        with pytest.raises(CheckpointError, match='another config') as caught:
            checkpoints.restore(jax.eval_shape(lambda: make_state(0, width=5)))
        kernel = 'student/params/conv1/kernel: float32[3,3,1,4] there, float32[3,3,1,5] here'
        assert kernel in str(caught.value)
        assert '--workdir' in str(caught.value)
        with pytest.raises(CheckpointError, match='generator/params/dense/bias: .*not part of'):
            checkpoints.restore(jax.eval_shape(lambda: make_state(0).replace(generator=())))
        with pytest.raises(CheckpointError, match='extra/more: missing there'):
            checkpoints.restore(
                jax.eval_shape(lambda: make_state(0).replace(extra={'more': jnp.zeros(2)}))
            )
    assert sorted(os.listdir(folder)) == ['2', '3']  # nothing was set aside


@pytest.mark.parametrize('change', [{'format': FORMAT + 1}, {'format': None}, {'layout': None}])
def test_a_whole_checkpoint_of_another_version_is_refused(folder: Path, change: dict) -> None:
    record = folder / '3' / 'record' / 'metadata'
    changed = json.loads(record.read_text()) | change
    record.write_text(json.dumps({k: v for k, v in changed.items() if v is not None}))
    files.write_json(folder / '3' / FILES, _file_sums(folder / '3'))
    with Checkpoints(folder) as checkpoints:
        with pytest.raises(CheckpointError, match='all the bytes that were saved.*another version'):
            checkpoints.restore(abstract())
    assert sorted(os.listdir(folder)) == ['2', '3']  # nothing was set aside


def test_a_full_disk_is_told_and_takes_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, 'No space left on device')

    with Checkpoints(folder) as checkpoints:
        with monkeypatch.context() as patch:
            patch.setattr(checkpoints._manager, 'save', full)
            with pytest.raises(CheckpointError, match='No space left.*last whole one.* round 3'):
                checkpoints.save(4, make_state(4), {})
        assert sorted(os.listdir(folder)) == ['2', '3']
        checkpoints.save(4, make_state(4), {})
    assert sorted(os.listdir(folder)) == ['3', '4']


def test_orbax_is_quiet_and_we_are_not(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    logger = std_logging.getLogger('absl')
    level = logger.level
    logger.setLevel(std_logging.INFO)  # what absl's app sets
    try:
        with Checkpoints(tmp_path) as checkpoints:
            checkpoints.save(1, make_state(1), {})
            checkpoints.restore(abstract())
        logger.info('a message of ours')
    finally:
        logger.setLevel(level)
    assert [record.getMessage() for record in caplog.records] == ['a message of ours']


KILLED = """
import sys, jax, jax.numpy as jnp
from dfkd_jax.storage.checkpoints import Checkpoints
with Checkpoints(sys.argv[1]) as checkpoints:
    like = {'x': jax.ShapeDtypeStruct((300, 300), jnp.float32)}
    restored = checkpoints.restore(like)
    done = restored.done if restored else 0
    print('start', done, flush=True)
    while True:
        done += 1
        checkpoints.save(done, {'x': jnp.full((300, 300), done, jnp.float32)}, {'done': done})
        print('saved', done, flush=True)
"""


@pytest.mark.faults
def test_sigkill_while_saving_loses_at_most_the_save_under_way(tmp_path: Path) -> None:
    env = {**os.environ, 'PYTHONPATH': str(Path(__file__).parents[1]), 'JAX_PLATFORMS': 'cpu'}
    saved = 0
    rng = random.Random(0)
    for _ in range(2):
        command = [sys.executable, '-c', KILLED, str(tmp_path)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env)
        assert process.stdout is not None
        start = int(process.stdout.readline().split()[1])
        assert start in (saved, saved + 1)  # the save under way may have been finished, not told
        assert process.stdout.readline() == f'saved {start + 1}\n'
        time.sleep(rng.uniform(0.0, 0.3))
        process.send_signal(signal.SIGKILL)
        told = process.communicate()[0].splitlines()
        saved = int(told[-1].split()[1]) if told else start + 1
    with Checkpoints(tmp_path) as checkpoints:
        found = checkpoints.restore({'x': jax.ShapeDtypeStruct((300, 300), jnp.float32)})
    assert found is not None
    assert found.done in (saved, saved + 1)
    assert found.progress == {'done': found.done}
    np.testing.assert_array_equal(found.state['x'], np.full((300, 300), found.done))


# Files


def test_write_bytes_replaces_whole_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / 'new' / 'a.txt'
    files.write_bytes(path, b'one')
    files.write_bytes(path, b'two')
    assert path.read_bytes() == b'two'

    def dies(*_: object) -> None:
        raise OSError('killed')

    monkeypatch.setattr(os, 'replace', dies)
    with pytest.raises(OSError, match='killed'):
        files.write_bytes(path, b'three')
    assert path.read_bytes() == b'two'
    assert os.listdir(path.parent) == ['a.txt']


def test_write_json_knows_what_a_run_has(tmp_path: Path) -> None:
    obj = {
        'accuracy': jnp.asarray(0.5),
        'count': np.int64(3),
        'curve': np.asarray([1.0, np.nan]),
        'path': tmp_path,
        'nothing': None,
        'loss': float('inf'),
        7: ('a', True),
    }
    files.write_json(tmp_path / 'a.json', obj)
    assert json.loads((tmp_path / 'a.json').read_text()) == {
        'accuracy': 0.5,
        'count': 3,
        'curve': [1.0, None],
        'path': str(tmp_path),
        'nothing': None,
        'loss': None,
        '7': ['a', True],
    }
    with pytest.raises(TypeError):
        files.write_json(tmp_path / 'b.json', {'x': object()})
    assert not (tmp_path / 'b.json').exists()


def test_arrays_round_trip(tmp_path: Path) -> None:
    arrays = {
        'turned': np.arange(12.0, dtype=np.float32).reshape(3, 4).T,
        'scalar': np.asarray(3, np.int64),
        'half': np.asarray([1.5, -2.0], np.float16),
        'empty': np.zeros((0, 3), np.float32),
    }
    files.save_arrays(tmp_path / 'a.safetensors', arrays)
    loaded = files.load_arrays(tmp_path / 'a.safetensors')
    assert loaded.keys() == arrays.keys()
    for name, x in arrays.items():
        assert loaded[name].dtype == x.dtype
        np.testing.assert_array_equal(np.asarray(x), loaded[name])
    with pytest.raises(ValueError, match='convert it to float32'):
        files.save_arrays(tmp_path / 'b.safetensors', {'x': jnp.ones(2, jnp.bfloat16)})


# Model folders


def variables() -> dict[str, Any]:
    rng = np.random.default_rng(0)
    return {
        'params': {'conv1': {'kernel': rng.normal(size=(3, 3, 1, 2)).astype(np.float32)}},
        'batch_stats': {'bn1': {'mean': np.zeros(2, np.float32), 'var': np.ones(2, np.float32)}},
    }


def test_flatten_and_back() -> None:
    flat = model_folder.flatten(variables())
    assert list(flat) == ['params/conv1/kernel', 'batch_stats/bn1/mean', 'batch_stats/bn1/var']
    assert_same(model_folder.unflatten(flat), variables())


@pytest.mark.parametrize('change', [{}, {'batch_stats': {}}], ids=['', 'without batch norm'])
def test_model_folder_round_trip(tmp_path: Path, change: dict) -> None:
    model_folder.save_model(
        tmp_path / 'm', 'wrn16_1', variables() | change, num_classes=10, source='t.pth'
    )
    card, loaded = model_folder.load_model(tmp_path / 'm')
    assert card['model'] == 'wrn16_1' and card['num_classes'] == 10 and card['source'] == 't.pth'
    assert card['keys'] == (1 if change else 3)
    assert_same(loaded, variables() | change)
    assert sorted(os.listdir(tmp_path / 'm')) == ['model.json', 'variables.safetensors']


def test_model_folder_errors(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match='not a model folder'):
        model_folder.load_model(tmp_path / 'nowhere')
    model_folder.save_model(tmp_path, 'wrn16_1', variables())
    path = tmp_path / model_folder.VARIABLES
    data = path.read_bytes()
    path.write_bytes(data[:-7])
    with pytest.raises(CheckpointError, match='not a whole safetensors file'):
        model_folder.load_model(tmp_path)
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(CheckpointError, match='sha256 differs'):
        model_folder.load_model(tmp_path)
    path.write_bytes(data)
    (tmp_path / model_folder.CARD).write_text('{"model": ')
    with pytest.raises(CheckpointError, match='is not JSON'):
        model_folder.load_model(tmp_path)
    (tmp_path / model_folder.CARD).write_text('{}')
    with pytest.raises(CheckpointError, match='lacks model'):
        model_folder.load_model(tmp_path)
    with pytest.raises(CheckpointError, match='there is no file'):
        files.load_arrays(tmp_path / 'none.safetensors')
