"""Runs of a user who has a teacher and no image; and data and teachers that move during a run."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import standins
import tiny
from ml_collections import ConfigDict

from dfkd_jax import build, cli, data, labels, loops, port
from dfkd_jax.configs import common, digits
from dfkd_jax.contract import Frozen
from dfkd_jax.data import prepare
from dfkd_jax.distributed import processes, sharding
from dfkd_jax.errors import ConfigError, DataError
from dfkd_jax.loops import alternating, offline, supervised
from dfkd_jax.methods import METHODS
from dfkd_jax.methods.shared import image_bank as banks
from dfkd_jax.port import __main__ as port_command
from dfkd_jax.reporting import metrics, page
from dfkd_jax.storage import files, model_folder
from dfkd_jax.storage import workdir as folder

pytestmark = pytest.mark.usefixtures('fast_runs')

CLASSES, SIZE = 3, 4


@pytest.fixture(autouse=True)
def nowhere(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """There are no data sets where they are looked for."""
    monkeypatch.setenv('TFDS_DATA_DIR', str(tmp_path_factory.mktemp('nothing')))


def settings(method: str = 'noise', **data_changes: Any) -> ConfigDict:
    """A run of seconds, of a data set `mine` that is nowhere."""
    config = digits.get_config(f'{method},smoke')
    config.data.update(
        dict(name='mine', num_classes=CLASSES, image_size=SIZE, channels=3, mean=(0.5,), std=(0.5,))
        | data_changes
    )
    config.teacher.model = config.student.model = tiny.RESNET
    config.teacher.train = False
    config.eval_batch_size, config.parallel = 16, 'jit'
    if 'phases' in config:
        config.phases = tuple(
            common.phase(rounds=2, g_steps=min(p.g_steps, 1), s_steps=min(p.s_steps, 1))
            for p in config.phases
        )
        config.synthesis.batch_size = config.synthesis.student_batch_size = 12
        if config.synthesis.get('bank'):
            config.synthesis.bank = 48
        for name in ('memory', 'negatives'):
            if name in config.synthesis:
                config.synthesis[name] = 24
    if 'generator' in config:
        config.generator.width = 4
    return config


@pytest.fixture(scope='module')
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The weights of a teacher with three classes, as a model folder; drawn, not trained."""
    place = tmp_path_factory.mktemp('teacher') / 'teacher'
    config = settings()
    module = build.make_classifier(tiny.RESNET, config.data)
    variables = jax.jit(module.init)(jax.random.key(1), jnp.zeros((1, SIZE, SIZE, 3)))
    model_folder.save_classifier(place, tiny.RESNET, variables, config.data)
    return place


@pytest.fixture(scope='module')
def prior(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.saved_prior(tmp_path_factory.mktemp('prior') / 'prior')


def run(workdir: Path, teacher: Path, method: str = 'noise', **data_changes: Any) -> dict[str, Any]:
    config = settings(method, **data_changes)
    config.teacher.checkpoint = str(teacher)
    return loops.run(config, workdir)


def student_of(workdir: Path) -> bytes:
    return (workdir / 'student.safetensors').read_bytes()


# 1. Without any image


def assert_says_what_was_measured(workdir: Path, summary: dict[str, Any]) -> None:
    assert json.loads((workdir / 'summary.json').read_text()) == files.plain(summary)
    assert summary['measured_on'] == 'synthetic images held out from the student'
    for name in ('teacher_accuracy', 'student_accuracy_last', 'student_accuracy_best'):
        assert summary[name] is None
    last, best = summary['agreement_with_teacher'], summary['agreement_with_teacher_best']
    assert 0 <= last <= best <= 100
    text = (workdir / page.PAGE).read_text()
    assert f'agrees with the teacher on {last:.2f} % of synthetic images held out' in text
    assert 'so its accuracy is not known' in text
    card, _ = model_folder.load_model(workdir / 'student')
    assert 'accuracy' not in card and card['agreement_with_teacher'] == last
    assert card['measured_on'] == summary['measured_on']
    assert (card['mean'], card['std']) == ([0.5] * 3, [0.5] * 3)
    for name in ('images.png', 'curves.png', 'student_torch.safetensors'):
        assert (workdir / name).stat().st_size > 0


@pytest.mark.parametrize('name', ['', 'mine'])
def test_a_run_goes_through_and_says_what_it_measured(
    tmp_path: Path, teacher: Path, name: str, capsys: Any
) -> None:
    summary = run(tmp_path / 'run', teacher, name=name)
    assert_says_what_was_measured(tmp_path / 'run', summary)
    assert summary['dataset'] == name
    said = capsys.readouterr().out
    absent = 'no images of mine are in' if name else 'no real images are named (config.data.name)'
    assert absent in said and ': no accuracy is measured, but the agreement with the tea' in said
    assert f'student {tiny.RESNET}: agreement with the teacher on synthetic images held out' in said
    columns = metrics.read(tmp_path / 'run')
    assert 'student_accuracy' not in columns
    agreement = columns['agreement_with_teacher']
    assert agreement[-1] == pytest.approx(summary['agreement_with_teacher'], rel=1e-6)
    assert agreement.max() == pytest.approx(summary['agreement_with_teacher_best'], rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize('method', ['cpsc', 'dafl', 'deepinversion', 'cae', 'fast', 'cmi', 'zskt'])
def test_every_kind_of_method_goes_through(tmp_path: Path, teacher: Path, method: str) -> None:
    summary = run(tmp_path / 'run', teacher, method)
    assert_says_what_was_measured(tmp_path / 'run', summary)
    said = summary.get('label_embeddings_of')
    assert said == ('"class 0", "class 1", ...' if method == 'cae' else None)


@pytest.mark.slow
def test_images_of_a_diffusion_model_go_through(tmp_path: Path, teacher: Path, prior: Path) -> None:
    config = settings('diffdfkd')
    config.prior.path, config.teacher.checkpoint = str(prior), str(teacher)
    config.synthesis.update(batch_size=4, per_class=8, stored_size=SIZE)
    config.distil.update(epochs=2, batch_size=8)
    summary = loops.run(config, tmp_path / 'run')
    assert_says_what_was_measured(tmp_path / 'run', summary)
    assert summary['images_synthesised'] == 24
    assert summary['images_distilled'] == 2 * 16  # of 22: two are held out
    card = model_folder.load_model(tmp_path / 'run' / 'distillation')[0]
    assert card['agreement'] == summary['agreement_with_teacher'] and 'accuracy' not in card


@pytest.mark.parametrize('method, stop', [('noise', 1), ('nayer', 3)])
@pytest.mark.slow
def test_stopped_and_continued_it_ends_the_same(
    tmp_path: Path, teacher: Path, method: str, stop: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(tmp_path / 'whole', teacher, method)
    asked: Iterator[bool] = iter([False] * (stop - 1) + [True])
    with monkeypatch.context() as patch:
        patch.setattr(processes, 'any_process', lambda _: next(asked))
        assert run(tmp_path / 'run', teacher, method) == {}
    again = run(tmp_path / 'run', teacher, method)
    assert student_of(tmp_path / 'run') == student_of(tmp_path / 'whole')
    assert_says_what_was_measured(tmp_path / 'run', again)
    assert again | {'seconds': 0} == whole | {'seconds': 0}
    said = again.get('label_embeddings_of')
    assert said == ('"class 0", "class 1", ...' if method == 'nayer' else None)
    rows = [metrics.read(tmp_path / each)['agreement_with_teacher'] for each in ('run', 'whole')]
    np.testing.assert_array_equal(*rows)


@pytest.mark.slow
def test_measuring_on_synthetic_images_changes_no_weight(tmp_path: Path) -> None:
    """The same config with its images and without them (of a method that holds out no bank)."""
    config = settings(name='digits', num_classes=10, channels=1)
    config.teacher.checkpoint = str(tmp_path / 'teacher')
    module = build.make_classifier(tiny.RESNET, config.data)
    variables = jax.jit(module.init)(jax.random.key(1), jnp.zeros((1, SIZE, SIZE, 1)))
    model_folder.save_classifier(tmp_path / 'teacher', tiny.RESNET, variables, config.data)
    measured = loops.run(config, tmp_path / 'with')
    assert measured['student_accuracy_last'] is not None and 'measured_on' not in measured
    config.data.name = ''
    loops.run(config, tmp_path / 'without')
    assert student_of(tmp_path / 'with') == student_of(tmp_path / 'without')


# What is measured on is held out


@pytest.mark.parametrize('batches', [1, 3, 4, 9])
@pytest.mark.parametrize('made', [2, 10, 15])
def test_a_bank_draws_disjoint_parts_that_cover_it(made: int, batches: int) -> None:
    bank = banks.empty(4 * made, (1, 1, 1)).replace(written=jnp.asarray(made * batches, jnp.int32))
    apart, rest = (
        np.asarray(banks.draw_part(bank, jax.random.key(number), 5000, made, held))
        for number, held in ((0, True), (1, False))
    )
    filled = min(batches, 4) * made
    assert not set(apart) & set(rest)
    assert set(apart) | set(rest) == set(range(filled))
    held = max(1, round(0.1 * made))
    assert len(set(apart)) == min(batches, 4) * held
    # Each row as often as another: chi squared, within five deviations of its mean.
    counts = np.bincount(rest, minlength=filled)[sorted(set(rest))]
    chi = np.square(counts - counts.mean()).sum() / counts.mean()
    assert chi < len(counts) + 5 * np.sqrt(2 * len(counts))


def test_what_is_held_out_of_a_bank_is_of_all_classes() -> None:
    """Though NAYER's batches list the classes in order."""
    bank = banks.empty(40 * 400, (1, 1, 1)).replace(written=jnp.asarray(40 * 400, jnp.int32))
    rows = np.asarray(banks.draw_part(bank, jax.random.key(0), 20_000, 400, True))
    counts = np.bincount(rows % 400 % 100, minlength=100)
    assert counts.min() > 120 and counts.max() < 280  # 200 each


def test_a_batch_of_one_has_no_part() -> None:
    with pytest.raises(ValueError, match='batch_size=1: without real images'):
        banks.kept_apart(1)


@pytest.mark.parametrize('name', ['nayer', 'cae', 'fast', 'cmi', 'deepinversion'])
def test_no_student_step_takes_what_a_bank_holds_out(name: str, monkeypatch: Any) -> None:
    config = tiny.config(name, synthesis__cutmix=0.5)
    nets = tiny.nets(config)._replace(hold_out=True)
    method = METHODS[name](config, nets, sharding.Shards())
    given = tiny.frozen(method=name)
    state = jax.eval_shape(method.init, given, jax.random.key(0))
    asked = []
    draw = banks.draw_part

    def recorded(bank: Any, key: Any, batch: int, made: int, apart: bool) -> Any:
        asked.append(apart)
        return draw(bank, key, batch, made, apart)

    monkeypatch.setattr(banks, 'draw_part', recorded)
    monkeypatch.setattr(banks, 'draw', None)  # which knows no parts
    jax.eval_shape(method.student_step, given, state, jax.random.key(0))
    assert asked and not any(asked)
    asked.clear()
    assert method.held_out is not None
    jax.eval_shape(method.held_out, given, state, jax.random.key(0))
    assert asked == [True]


def test_latents_of_a_batch_are_not_those_that_are_held_out() -> None:
    """Where a batch of synthesis keeps its latents for the student."""
    fixed = tiny.built('dafl', synthesis__fresh=False)
    state, _ = fixed.method.begin(fixed.frozen, fixed.state, jax.random.key(3))
    trained_on = fixed.method.sample(fixed.frozen, state, jax.random.key(4)).image
    assert np.array_equal(
        trained_on, fixed.method.sample(fixed.frozen, state, jax.random.key(5)).image
    )
    held = fixed.method.held_out(fixed.frozen, state, jax.random.key(4)).image
    assert held.shape == trained_on.shape and not np.allclose(held, trained_on)


def test_keys_of_held_out_images_are_no_one_elses() -> None:
    root = jax.random.key(0)
    mine = jax.random.key_data(jax.random.fold_in(root, alternating.HELD_OUT)).tolist()
    others = jax.random.key_data(jax.random.split(root, 3)).tolist()
    rounds = jax.random.split(root, 3)[1]
    others += [jax.random.key_data(jax.random.fold_in(rounds, i)).tolist() for i in range(100)]
    assert mine not in others


@pytest.mark.slow
def test_a_tenth_of_a_bank_on_disk_is_held_out(teacher: Path, prior: Path) -> None:
    config = settings('diffdfkd')
    config.prior.path = str(prior)
    config.synthesis.update(batch_size=4, per_class=8, stored_size=SIZE + 2)
    config.distil.random_resized_crop = True
    built = build.build(config)
    images = np.arange(24 * 36 * 3, dtype=np.uint64).reshape(24, 6, 6, 3).astype(np.uint8)
    images[:, 0, 0, 0] = np.arange(24)
    label = np.zeros(24, np.int32)
    facts = built.facts._replace(image_shape=(6, 6, 3))
    bank = data.Dataset(facts, 24, lambda i: (images[i], label[i]), images, label)
    variables = built.plan.replicate(model_folder.load_model(teacher)[1])
    number = offline.held_out_images(24)
    train, test = offline.held_out(config, built, variables, bank, number)
    assert (train.size, test.size, number) == (22, 2, 2)
    kept = set(train.images[:, 0, 0, 0].tolist())
    order = np.random.default_rng(0).permutation(24)
    assert kept == set(order[2:].tolist())
    shown, predicted = test.fetch(np.arange(2))
    assert shown.shape == (2, SIZE, SIZE, 3)  # as networks see them
    logits = built.models.teacher.apply(variables, data.normalise(shown, (0.5,), (0.5,))).logits
    np.testing.assert_array_equal(predicted, np.argmax(logits, -1))
    assert [offline.held_out_images(n) for n in (4, 100, 10**6)] == [1, 10, 5000]


def test_agreement_is_that_of_the_two_networks(tmp_path: Path, teacher: Path) -> None:
    """A student that is the teacher agrees everywhere."""
    config = settings()
    built = build.build(config)
    variables = model_folder.load_model(teacher)[1]
    frozen = built.plan.replicate(Frozen(teacher=variables))
    state = built.plan.call(built.whole.init)(frozen, jax.random.key(0))
    measure = alternating._measure(config, built, frozen, None, None)
    first = measure(state)['agreement_with_teacher']
    assert first == measure(state)['agreement_with_teacher'] < 100
    same = state.replace(student=state.student.replace(**built.plan.replicate(variables)))
    assert measure(same) == {'agreement_with_teacher': 100.0}


# Class names


@pytest.mark.parametrize(
    'source, classes, expected',
    [('table', 3, ('table', 'index')), ('table', 101, ('onehot', 'index')),
     ('minilm', 101, ('minilm', 'index')), ('onehot', 3, ('onehot', 'names'))],
)  # fmt: skip
def test_without_class_names_embeddings_are_of_numbers(
    source: str, classes: int, expected: tuple[str, str]
) -> None:
    given = digits.get_config('nayer').labels
    given.source = source
    found = labels.settled(given, 'mine', (), classes)
    assert (found.source, found.text) == expected
    assert found.prompt == given.prompt and found.standardise == given.standardise
    assert labels.settled(given, 'mine', ('a', 'b', 'c'), 3) is given
    assert labels.settled(given, 'imagenet', (), 1000) is given  # its names ship
    given.update(source='table', path='mine.npy')
    assert labels.settled(given, 'mine', (), classes) is given


def test_a_listed_set_keeps_its_class_names(capsys: Any) -> None:
    config = settings('nayer', name='cifar10', num_classes=10)
    built = build.build(config)
    assert built.facts.class_names == data.DATASETS['cifar10'].class_names
    named = labels.load(config.labels, 'cifar10', built.facts.class_names, 10)
    np.testing.assert_array_equal(built.extra, named)
    assert 'no class names' not in capsys.readouterr().out


# 2. With a test split alone, or what needs training images


@pytest.fixture(scope='module')
def test_only(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp('sets')
    standins.class_folders(home / 'src' / 'test', size=SIZE)
    prepare.prepare('mine', home, home / 'src')
    return home


def test_a_test_split_alone_gives_accuracies(
    tmp_path: Path, teacher: Path, test_only: Path
) -> None:
    summary = run(tmp_path / 'run', teacher, data_dir=str(test_only))
    assert 'measured_on' not in summary and 0 <= summary['student_accuracy_last'] <= 100
    assert summary['teacher_accuracy'] is not None


def test_training_images_are_asked_for_where_they_are_needed(
    tmp_path: Path, teacher: Path, test_only: Path
) -> None:
    message = 'mine has no training images, which training a teacher, .*kd.* need'
    config = settings(data_dir=str(test_only))
    config.teacher.train = True
    with pytest.raises(DataError, match=message):
        loops.run(config, tmp_path / 'run')
    for role in ('teacher', 'kd'):
        with pytest.raises(DataError, match=message):
            config.teacher.checkpoint = str(teacher)
            supervised.run(config, tmp_path / role, role)
        assert not (tmp_path / role).exists()
    config = settings('kd', data_dir=str(test_only))
    config.teacher.checkpoint = str(teacher)
    with pytest.raises(DataError, match=message):
        loops.run(config, tmp_path / 'kd run')
    config = settings(name='')
    config.teacher.train = True
    with pytest.raises(DataError, match='no real images, and this needs some: .*checkpoint=FILE'):
        loops.run(config, tmp_path / 'run2')


# 3. What moves


def stopped(config: ConfigDict, workdir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(processes, 'any_process', lambda _: True)
        assert loops.run(config, workdir) == {}


def test_data_and_teacher_move_and_the_run_continues(
    tmp_path: Path, teacher: Path, test_only: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings(data_dir=str(test_only))
    config.teacher.checkpoint = str(teacher)
    whole = loops.run(config, tmp_path / 'whole')
    stopped(config, tmp_path / 'run', monkeypatch)
    shutil.copytree(test_only, tmp_path / 'elsewhere')
    shutil.copytree(teacher, tmp_path / 'there')
    config.data.data_dir = f'{tmp_path}/elsewhere/'  # a slash at its end
    config.teacher.checkpoint = str(tmp_path / 'there')
    again = loops.run(config, tmp_path / 'run')
    assert student_of(tmp_path / 'run') == student_of(tmp_path / 'whole')
    assert again['student_accuracy_last'] == whole['student_accuracy_last']


@pytest.mark.slow
def test_the_same_weights_in_another_file_continue(
    tmp_path: Path, teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings()
    config.teacher.checkpoint = str(teacher)
    stopped(config, tmp_path / 'run', monkeypatch)
    arrays = port.to_torch(tiny.RESNET, model_folder.load_model(teacher)[1])
    files.save_arrays(tmp_path / 't.safetensors', arrays)
    config.teacher.checkpoint = str(tmp_path / 't.safetensors')
    assert loops.run(config, tmp_path / 'run')['rounds'] == 2


def test_another_teacher_or_data_set_is_refused(
    tmp_path: Path, teacher: Path, test_only: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the same place, too."""
    place = tmp_path / 'teacher'
    shutil.copytree(teacher, place)
    config = settings(data_dir=str(test_only))
    config.teacher.checkpoint = str(place)
    stopped(config, tmp_path / 'run', monkeypatch)
    _, variables = model_folder.load_model(teacher)
    variables['params']['fc']['bias'] = variables['params']['fc']['bias'] + 1
    model_folder.save_classifier(place, tiny.RESNET, variables, config.data)
    with pytest.raises(ConfigError, match='began with something else: teacher was .*, now '):
        loops.run(config, tmp_path / 'run')
    standins.class_folders(tmp_path / 'src' / 'test', size=SIZE, each=6)
    prepare.prepare('mine', tmp_path / 'sets', tmp_path / 'src')
    config.teacher.checkpoint, config.data.data_dir = str(teacher), str(tmp_path / 'sets')
    with pytest.raises(ConfigError, match='data was .*test_size=15, now .*test_size=18'):
        loops.run(config, tmp_path / 'run')
    config.data.data_dir = None  # and none at all
    with pytest.raises(ConfigError, match='data was name=mine .*now name=mine version=no images'):
        loops.run(config, tmp_path / 'run')


@pytest.mark.slow
def test_cadences_may_change_and_the_student_is_the_same(
    tmp_path: Path, teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings()
    config.teacher.checkpoint = str(teacher)
    loops.run(config, tmp_path / 'whole')
    stopped(config, tmp_path / 'run', monkeypatch)
    config.update(log_every_rounds=2, eval_every_rounds=5, save_every_rounds=3, keep_checkpoints=1)
    loops.run(config, tmp_path / 'run')
    assert student_of(tmp_path / 'run') == student_of(tmp_path / 'whole')


def test_an_older_run_is_known_by_its_places(tmp_path: Path) -> None:
    """It wrote no contents."""
    config = settings(data_dir='/a')
    with folder.claim(tmp_path / 'run', config):
        (tmp_path / 'run' / 'checkpoints').mkdir()
    config.data.data_dir = '/b'
    with pytest.raises(ConfigError, match="config.data.data_dir was '/a', now '/b'"):
        with folder.claim(tmp_path / 'run', config):
            pass
    folder.keep_inputs(tmp_path / 'run', data={'name': 'mine'})
    with folder.claim(tmp_path / 'run', config):
        pass
    config.teacher.checkpoint = '/c'  # where there was none
    with pytest.raises(ConfigError, match='config.teacher.checkpoint was False, now True'):
        with folder.claim(tmp_path / 'run', config):
            pass


def test_a_digest_is_of_names_shapes_kinds_and_numbers() -> None:
    tree = {'a': np.arange(6.0), 'b': {'c': np.float32(1)}}
    assert folder.digest(tree) == folder.digest(jax.tree.map(np.copy, tree))
    for other in (
        {'a': np.arange(6.0), 'b': {'d': np.float32(1)}},
        {'a': np.arange(6.0).reshape(2, 3), 'b': {'c': np.float32(1)}},
        {'a': np.arange(6.0, dtype=np.float32), 'b': {'c': np.float32(1)}},
        {'a': np.arange(6.0) + 1, 'b': {'c': np.float32(1)}},
    ):
        assert folder.digest(other) != folder.digest(tree)
    half = jnp.ones(3, jnp.bfloat16)
    assert folder.digest({'a': half}) != folder.digest({'a': 2 * half})


# 4. The home folder


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The home folder; the current one is work/ in it."""
    monkeypatch.setenv('HOME', str(tmp_path))
    (tmp_path / 'work').mkdir()
    monkeypatch.chdir(tmp_path / 'work')
    return tmp_path


@pytest.mark.slow
def test_a_tilde_is_the_home_folder_in_every_flag(home: Path, teacher: Path) -> None:
    arrays = port.to_torch(tiny.RESNET, model_folder.load_model(teacher)[1])
    files.save_arrays(home / 't.safetensors', arrays)
    port_command.main([
        f'--model={tiny.RESNET}', f'--num_classes={CLASSES}', '--source=~/t.safetensors',
        '--output=~/t8',
    ])  # fmt: skip
    assert (home / 't8' / 'model.json').exists()
    for place in ('~/t8', '~/t.safetensors'):
        build.load_network(place, tiny.RESNET, settings().data)
    standins.class_folders(home / 'src' / 'test', size=SIZE)
    prepare.prepare('mine', '~/sets', '~/src')
    assert data.check(settings(data_dir='~/sets').data).test_size == 15
    config = settings(data_dir='~/sets')
    config.teacher.checkpoint = '~/t8'
    assert loops.run(config, '~/run')['rounds'] == 2
    assert (home / 'run' / 'summary.json').exists()
    assert not list((home / 'work').iterdir())  # no folder called ~


@pytest.mark.slow
def test_a_tilde_at_the_shell(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shells leave that of `--flag=~/x` as it is."""
    seen: list[Any] = []
    (home / 'mine.py').write_text('from dfkd_jax.configs.digits import get_config\n')
    arguments = ['dfkd_jax.main', '--config=~/mine.py:noise', '--workdir=~/run']
    monkeypatch.setattr(sys, 'argv', arguments)
    with pytest.raises(SystemExit):
        cli.launch(lambda config, workdir: seen.append((config.method, workdir)))
    assert seen == [('noise', str(home / 'run'))]


def test_a_tilde_of_nobody_is_left_as_it_is() -> None:
    assert files.expanded('~nobody-here/x') == Path('~nobody-here/x')
    assert files.expanded('~') == Path.home()
