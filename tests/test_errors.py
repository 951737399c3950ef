"""Mistakes of a user: told in one line, before anything is compiled, with what to do."""

from __future__ import annotations

import subprocess
import sys

import jax
import numpy as np
import pytest

from configs import digits
from dfkd_jax import build, checkpoint, contract, parallel, port, results, teach, train


@pytest.fixture(autouse=True)
def nothing_compiles(monkeypatch):
    """A mistake must be found before the first program is made."""

    def compiled(*_, **__):
        raise AssertionError('something was compiled before the mistake was reported')

    monkeypatch.setattr(jax._src.compiler, 'compile_or_get_cached', compiled)


def config(of: str = 'cpsc', /, **changes):
    """The digits run with fields changed, as `group__field=value`."""
    result = digits.get_config(f'{of},smoke')
    for name, value in changes.items():
        *groups, field = name.split('__')
        target = result
        for group in groups:
            target = target[group]
        target[field] = value
    return result


MISTAKES = {
    'method': (dict(method='cpsk'), 'unknown method .cpsk.*one of cae, cmi, cpsc, dafl'),
    'teacher': (dict(teacher__model='resnet9'), 'unknown model .resnet9.*Did you mean'),
    'student': (dict(student__model='wrn16'), 'unknown model .wrn16.*Known models'),
    'generator': (dict(generator__model='cpsc_gen'), 'unknown model .cpsc_gen'),
    'wrong generator': (dict(generator__model='resnet8'), 'needs a conditional generator'),
    'data set': (dict(data__name='digitz'), 'unknown data set .digitz.*Did you mean digits'),
    'missing data': (dict(data__name='cifar10', data__data_dir='/nowhere', data__channels=3),
                     'no data set .cifar10.*dfkd_jax.data prepare cifar10'),
    'classes': (dict(data__num_classes=9), 'num_classes is 9, but digits has 10'),
    'channels': (dict(data__channels=2), 'channels is 2'),
    'image size': (dict(data__image_size=0), 'image_size is 0'),
    'size of the network': (dict(teacher__model='lenet5'), 'lenet5 cannot take images'),
    'parallel': (dict(parallel='pmapp'), 'unknown config.parallel .pmapp.*jit, pmap, shard_map'),
    'dtype': (dict(dtype='float16'), 'config.dtype=.float16.*bfloat16'),
    'batch': (dict(synthesis__batch_size=18, synthesis__bank=36),
              'batch_size=18 does not divide over 4 devices'),
    'bank': (dict(synthesis__bank=40), 'synthesis.bank=40 must be a positive multiple'),
    'bank of unbounded images': (dict(generator__bounded=False), 'set config.generator.bounded'),
    'student batch': (dict(synthesis__student_batch_size=6), 'student_batch_size=6 does not'),
    'form': (dict(loss__ikd_form='l1'), "loss.ikd_form='l1'.*expected one of"),
    'schedule': (dict(student__schedule='step'), 'student.schedule=.step'),
    'no teacher': (dict(teacher__train=False), 'no teacher: set --config.teacher.checkpoint'),
    'no such checkpoint': (dict(teacher__checkpoint='/nowhere/t.pth'), '/nowhere/t.pth'),
    'no folder': (dict(teacher__checkpoint='/'), 'not a model folder'),
}  # fmt: skip


@pytest.mark.parametrize('changes, message', MISTAKES.values(), ids=MISTAKES.keys())
def test_mistake_is_told_before_compiling(tmp_path, changes, message):
    with pytest.raises(build.EXPECTED_ERRORS, match=f'(?s){message}'):
        train.run(config(**changes), tmp_path / 'run')


EMBEDDING_MISTAKES = {
    'source': (dict(labels__source='word2vec'), 'labels.source.*word2vec.*minilm'),
    'no such table': (dict(labels__path='/nowhere/t.npy'), '/nowhere/t.npy'),
    'prompt': (dict(labels__prompt='a photo'), r'the prompt .a photo. has \{\} 0 times'),
    'prompt without embeddings': (dict(labels__prompt='a drawing of {}'), 'a drawing of 0'),
    'no encoder': (dict(labels__source='clip'), 'needs config.labels.path=FOLDER'),
    'generator': (dict(generator__model='resnet8'), 'needs'),
    'bank': (dict(synthesis__bank=0), 'bank=0 must be a positive multiple'),
    'batch': (dict(synthesis__batch_size=18, synthesis__bank=36), 'does not divide over 4'),
}  # fmt: skip


@pytest.mark.parametrize('method', ['nayer', 'cae'])
@pytest.mark.parametrize(
    'changes, message', EMBEDDING_MISTAKES.values(), ids=EMBEDDING_MISTAKES.keys()
)
def test_mistake_of_embeddings_is_told_before_compiling(tmp_path, method, changes, message):
    with pytest.raises(build.EXPECTED_ERRORS, match=f'(?s){message}'):
        train.run(config(method, **changes), tmp_path / 'run')


def test_table_of_another_number_of_classes(tmp_path):
    np.save(tmp_path / 'table.npy', np.ones((9, 4), np.float32))
    with pytest.raises(build.EXPECTED_ERRORS, match='9.*10'):
        train.run(config('cae', labels__path=str(tmp_path / 'table.npy')), tmp_path / 'run')


def test_sources_that_do_not_fit_the_batch(tmp_path):
    wrong = config('cae', noise__sources=('sign',) * 3, noise__magnitudes=(1.0,) * 3)
    with pytest.raises(contract.ConfigError, match='does not divide over 3 sources of noise'):
        train.run(wrong, tmp_path / 'run')


def test_corrupt_checkpoint(tmp_path):
    path = tmp_path / 'teacher.safetensors'
    path.write_bytes(b'not weights at all')
    with pytest.raises(port.PortError, match='teacher.safetensors'):
        train.run(config(teacher__checkpoint=str(path)), tmp_path / 'run')


def test_checkpoint_of_another_network(tmp_path):
    settings = config()
    module = build.make_classifier(settings, 'resnet8')
    image = jax.ShapeDtypeStruct((1, 16, 16, 1), np.float32)
    shapes = jax.eval_shape(lambda x: module.init(jax.random.key(0), x), image)
    weights = jax.tree.map(lambda x: np.ones(x.shape, np.float32), shapes)
    build.save_network(tmp_path / 'teacher', 'resnet8', weights, settings)
    wrong = config(teacher__model='resnet20', teacher__checkpoint=str(tmp_path / 'teacher'))
    with pytest.raises(contract.ConfigError, match='resnet8.*the config says resnet20'):
        train.run(wrong, tmp_path / 'run')
    arrays = port.to_torch('resnet8', weights)
    checkpoint.save_arrays(tmp_path / 'teacher.safetensors', arrays)
    wrong.teacher.checkpoint = str(tmp_path / 'teacher.safetensors')
    with pytest.raises(port.PortError, match='(?s)missing.*resnet8'):
        train.run(wrong, tmp_path / 'run2')


def test_workdir_of_another_config(tmp_path):
    with train.folder.claim(tmp_path / 'run', config()):
        (tmp_path / 'run' / 'checkpoints').mkdir()
    was = f'config.student.lr was {config().student.lr}, now 0.3'
    with pytest.raises(contract.ConfigError, match=was):
        train.run(config(student__lr=0.3), tmp_path / 'run')


def test_workdir_where_nothing_ran_yet_takes_the_mended_config(tmp_path):
    """Even where the process was killed while it wrote the first file."""
    workdir = tmp_path / 'run'
    with train.folder.claim(workdir, config()):
        (workdir / '.config.json.12.34.tmp').write_text('{')
    mended = config(student__lr=0.3)
    with train.folder.claim(workdir, mended):
        (workdir / 'checkpoints').mkdir()
    with train.folder.claim(workdir, mended):
        pass
    was = f'config.student.lr was 0.3, now {config().student.lr}'
    with pytest.raises(contract.ConfigError, match=was):
        with train.folder.claim(workdir, config()):
            pass


def test_two_runs_of_one_workdir(tmp_path):
    workdir = tmp_path / 'run'
    with train.folder.claim(workdir, config()):
        with pytest.raises(contract.ConfigError, match='another process is running in .*run: wait'):
            train.run(config(), workdir)
    with train.folder.claim(workdir, config()):
        pass


def test_workdir_that_cannot_be_written(tmp_path):
    (tmp_path / 'file').write_text('here')
    for workdir in (tmp_path / 'file', tmp_path / 'file' / 'run'):
        with pytest.raises(contract.ConfigError, match='cannot be written .Not a directory.: choo'):
            train.run(config(), workdir)
    assert (tmp_path / 'file').read_text() == 'here'


def test_folder_that_is_no_run(tmp_path):
    (tmp_path / 'thesis.tex').write_text('years of work')
    with pytest.raises(contract.ConfigError, match='not empty and not a run'):
        train.run(config(), tmp_path)
    assert (tmp_path / 'thesis.tex').read_text() == 'years of work'


def test_batch_of_real_images_divides(tmp_path):
    with pytest.raises(contract.ConfigError, match='teach.batch_size=30 does not divide'):
        teach.run(config(teach__batch_size=30), tmp_path / 'teacher')


def test_non_finite_loss_names_metric_and_round(tmp_path):
    rows = [{'g/loss': 1.0, 'g/bn': 2.0}, {'g/loss': 1.0, 'g/bn': float('nan')}]
    with pytest.raises(contract.NonFiniteError, match='g/bn is nan at round 8'):
        results.finite(rows, 8, 'Lower it.')


def test_weights_that_are_not_finite_are_never_saved(tmp_path):
    """The last update of a round may spoil them after every loss was finite."""
    good = contract.Net({'fc': {'kernel': np.ones(3)}}, {}, ())
    bad = good.replace(params={'fc': {'kernel': np.array([1.0, np.inf, 1.0])}})
    state = contract.State(round=np.int32(8), student=good, generator=())
    train._check_weights(state, 8, tmp_path)
    with pytest.raises(contract.NonFiniteError, match='student/params/fc/kernel .* after round 8'):
        train._check_weights(state.replace(student=bad), 8, tmp_path)


def test_shares_are_named_after_their_field():
    with pytest.raises(ValueError, match='batch=10 does not divide over 4 devices.*8 or 12'):
        parallel.Shards('shards', 4).check('batch', 10)


@pytest.mark.parametrize(
    'arguments, message',
    [
        (['--config=configs/digits.py:cpsc', '--config.method=cpsk'], 'unknown method'),
        (['--config=configs/digits.py:cpsc', '--config.student.lrr=1'], 'lrr'),
        (['--config=configs/digits.py:nonsense'], 'nonsense'),
        (['--config=configs/digits.py', 'stray'], 'stray'),
    ],
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
