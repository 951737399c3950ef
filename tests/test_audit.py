"""An audit finds members where they can be told, at the rates that their definitions give."""

from __future__ import annotations

import inspect
import json
import math
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import standins
import tiny
from PIL import Image

from dfkd_jax import data, loops, models
from dfkd_jax.audit import measurement, membership, scores, table
from dfkd_jax.audit.__main__ import main
from dfkd_jax.command import arguments
from dfkd_jax.configs import digits
from dfkd_jax.data import prepare, synthetic
from dfkd_jax.deploy import student as students
from dfkd_jax.deploy import synthetic_images
from dfkd_jax.errors import UserError
from dfkd_jax.loops import offline
from dfkd_jax.storage import files, model_folder
from dfkd_jax.storage import workdir as folder

pytestmark = pytest.mark.usefixtures('fast_runs')


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


# 1. Figures.


def pairs(members: np.ndarray, others: np.ndarray) -> float:
    """The area under the curve by its definition: over all pairs, a tie for a half."""
    apart = members[:, None] - others[None]
    return float(np.mean((apart > 0) + 0.5 * (apart == 0)))


def best_rate(members: np.ndarray, others: np.ndarray, rate: float) -> float:
    """The true positive rate at a false positive rate, by trying all thresholds."""
    tried = [(np.mean(others >= t), np.mean(members >= t)) for t in [*members, *others, np.inf]]
    return max(float(tpr) for fpr, tpr in tried if fpr <= rate)


@pytest.mark.parametrize('ties', [False, True])
def test_figures_are_those_of_their_definitions(rng: np.random.Generator, ties: bool) -> None:
    members, others = rng.normal(0.5, 1, 300), rng.normal(0, 1, 1000)
    if ties:
        members, others = np.round(members), np.round(others)
    found = membership.figures(members, others, seed=3, replicates=2)
    assert found['auc'].value == pytest.approx(pairs(members, others), abs=1e-12)
    for rate in (0.01, 0.001):
        value = found[f'tpr_at_fpr_{rate:g}'].value
        assert value == pytest.approx(best_rate(members, others, rate), abs=1e-12)


def test_the_threshold_is_measured_on_images_that_did_not_choose_it(
    rng: np.random.Generator,
) -> None:
    # With so few images the best threshold on all of them is better than chance.
    members, others = rng.normal(size=(2, 100, 100))
    chosen_there = [
        max(np.mean(m >= t) + np.mean(o < t) for t in m) / 2 for m, o in zip(members, others)
    ]
    found = [
        membership.figures(m, o, seed, replicates=1)['balanced_accuracy'].value
        for seed, (m, o) in enumerate(zip(members, others))
    ]
    assert np.mean(chosen_there) > 0.53
    # A hundred means of a standard deviation of 0.05 each.
    assert np.mean(found) == pytest.approx(0.5, abs=4 * 0.05 / 10)


def test_members_that_can_all_be_told_are(rng: np.random.Generator) -> None:
    scores = rng.uniform(size=2000)
    found = membership.figures(scores + 1, scores, seed=0, replicates=5)
    # The threshold is the lowest member of one half; a few of the other half are below it.
    assert found.pop('balanced_accuracy').value == pytest.approx(1, abs=0.01)
    assert all(estimate == (1, 1, 1) for estimate in found.values())
    found = membership.figures(scores, scores + 1, seed=0, replicates=5)
    assert found['auc'].value == 0 and found['tpr_at_fpr_0.01'].value == 0


def test_an_interval_is_that_of_theory_and_narrows(rng: np.random.Generator) -> None:
    members, others = rng.normal(0.5, 1, 400), rng.normal(0, 1, 400)
    found = membership.figures(members, others, seed=0)['auc']
    # Hanley and McNeil (1982).
    area, number = found.value, 400
    assert area is not None and found.low is not None and found.high is not None
    above, below = area / (2 - area), 2 * area**2 / (1 + area)
    variance = area * (1 - area) + (number - 1) * (above + below - 2 * area**2)
    expected = 2 * 1.96 * math.sqrt(variance) / number
    assert found.low < area < found.high
    assert found.high - found.low == pytest.approx(expected, rel=0.15)
    few = membership.figures(members[:100], others[:100], seed=0)['auc']
    assert few.high - few.low == pytest.approx(2 * expected, rel=0.2)


def test_a_rate_that_needs_more_images_is_not_told(rng: np.random.Generator) -> None:
    members, others = rng.normal(size=(2, 999))
    found = membership.figures(members, others, seed=0, replicates=2)
    assert found['tpr_at_fpr_0.001'] == (None, None, None)
    assert found['tpr_at_fpr_0.01'].value is not None
    assert table._cell('tpr_at_fpr_0.001', found['tpr_at_fpr_0.001']._asdict()) == '–'


def test_the_same_seed_gives_the_same_figures(rng: np.random.Generator) -> None:
    sets = rng.normal(size=(2, 200))
    same = [membership.figures(*sets, seed=seed, replicates=20) for seed in (0, 0, 1)]
    assert same[0] == same[1] and same[0] != same[2]


# 2. Scores.


def test_the_logit_of_the_true_class_orders_as_the_loss(rng: np.random.Generator) -> None:
    logits = 5 * rng.normal(size=(50, 7)).astype(np.float32)
    label = rng.integers(0, 7, 50)
    found = scores.true_class_logit(logits, label)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, label)
    np.testing.assert_allclose(scores.loss(found), losses, rtol=2e-5, atol=1e-6)
    assert (np.argsort(-found) == np.argsort(scores.loss(found), kind='stable')).all()


def test_images_of_which_a_network_is_sure_are_told_apart() -> None:
    logits = np.asarray([[60, 0, 0], [50, 0, 0], [0, 0, 90]], np.float32)
    label = np.asarray([0, 0, 2])
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, label)
    assert np.unique(losses).size == 1, 'they are all 0'
    assert np.argsort(scores.true_class_logit(logits, label)).tolist() == [1, 0, 2]


@pytest.mark.parametrize('block', [1, 64, 2**22])
def test_the_nearest_is_found(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch, block: int
) -> None:
    monkeypatch.setattr(scores, 'BLOCK', block)
    points, others = (rng.integers(0, 256, (n, 2, 2, 3), np.uint8) for n in (23, 17))
    others[5] = points[11]
    wide = [each.reshape(len(each), 1, -1).astype(float) for each in (points, others)]
    apart = np.linalg.norm(wide[0] - wide[1].transpose(1, 0, 2), axis=-1)
    found = scores.nearest(points, others)
    np.testing.assert_allclose(found, apart.min(1), rtol=1e-12)
    assert found[11] == 0, 'a copy, exactly'
    among = np.linalg.norm(wide[0] - wide[0].transpose(1, 0, 2), axis=-1)
    np.fill_diagonal(among, np.inf)
    np.testing.assert_allclose(scores.nearest(points, points, itself=True), among.min(1))


# 3. Runs.


def drawn(name: str, seed: int) -> dict[str, Any]:
    """The variables of a network for digits at 16 px, drawn."""
    module, image = models.make(name), jax.ShapeDtypeStruct((1, 16, 16, 1), jnp.float32)
    shapes = jax.eval_shape(lambda x: module.init(jax.random.key(0), x), image)
    rng = np.random.default_rng(seed)

    def draw(path: Any, leaf: Any) -> np.ndarray:
        if len(leaf.shape) > 1:
            x = rng.standard_normal(leaf.shape) * np.sqrt(2 / np.prod(leaf.shape[:-1]))
        else:
            x = np.full(leaf.shape, float(path[-1].key in ('scale', 'var')))
        return x.astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes)


@pytest.fixture(scope='module')
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run whose bank holds a part of the training images, pixel for pixel.

    Its networks are drawn: they know nothing.
    """
    workdir = tmp_path_factory.mktemp('audited') / 'run'
    config = digits.get_config('diffdfkd,smoke')
    config.teacher.update(model=tiny.RESNET, checkpoint=str(workdir / 'teacher'))
    about = data.check(config.data)
    teacher = drawn(tiny.RESNET, 0)
    model_folder.save_classifier(workdir / 'teacher', tiny.RESNET, teacher, config.data)
    model_folder.save_classifier(
        workdir / 'student', tiny.RESNET, drawn(tiny.RESNET, 1), config.data,
        **model_folder.preparation(config.data, about),
    )  # fmt: skip
    files.write_json(workdir / folder.CONFIG, files.plain(config))
    folder.keep_inputs(workdir, teacher=folder.digest({'batch_stats': {}} | teacher))
    train = data.load(config.data, 'train')
    synthetic.describe(workdir / 'bank', offline.description(config))
    synthetic.write(workdir / 'bank', 0, train.images[:700], train.labels[:700], 0, {})
    return workdir


@pytest.fixture
def copied(run: Path, tmp_path: Path) -> Path:
    """A copy of the run, to change, without an audit."""
    ignored = shutil.ignore_patterns('audit.*')
    return Path(shutil.copytree(run, tmp_path / 'run', ignore=ignored))


def attack(found: dict[str, Any], name: str) -> dict[str, Any]:
    (one,) = (each for each in found['attacks'] if each['score'].startswith(name))
    return one


def test_a_bank_of_training_images_is_told_and_networks_that_know_nothing_are_not(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main([str(run), '--seed=1'])
    said = capsys.readouterr().out
    found = json.loads((run / 'audit.json').read_text())
    assert found['images'] == {
        'dataset': 'digits', 'version': '1', 'members': 1437, 'others': 360,
    }  # fmt: skip
    assert found['synthetic_images'] == 700
    # 700 of the 1437 members have a copy at distance 0, and the others are as far as test images.
    pixels = attack(found, 'pixels')
    assert pixels['auc']['value'] == pytest.approx(1 - 737 / 1437 / 2, abs=0.03)
    assert pixels['tpr_at_fpr_0.01']['value'] >= 700 / 1437
    assert pixels['balanced_accuracy']['value'] > 0.65
    assert attack(found, "teacher's features")['tpr_at_fpr_0.01']['value'] >= 700 / 1437
    for name in ('loss of the teacher', 'loss of the student', 'control'):
        figures = attack(found, name)['auc']
        assert figures['low'] - 0.02 < 0.5 < figures['high'] + 0.02, name
    assert pixels['tpr_at_fpr_0.001']['value'] is None, '360 test images'
    assert (run / 'audit.md').read_text() in said
    row = next(line for line in said.splitlines() if line.startswith('| pixels'))
    assert f'{pixels["auc"]["value"]:.3f} (' in row and row.endswith('| – |')


def test_networks_that_are_surer_of_members_are_told() -> None:
    config = digits.get_config('diffdfkd,smoke')
    real = measurement._real(config.data, 10_000, 0)
    assert real.members.size == 1437 and real.others.size == 360

    def answers(images: data.Dataset, sure: float) -> measurement.Answers:
        logits = sure * np.eye(10)[images.labels] + np.random.default_rng(images.size).normal(
            size=(images.size, 10)
        )
        return measurement.Answers(logits, logits, images.labels)

    pair = measurement.Pair(answers(real.members, 5), answers(real.others, 3))
    logit = measurement.Pair(*(scores.true_class_logit(x.logits, x.label) for x in pair))
    found = measurement._attack('loss', 'nats', logit, logit, 0)
    assert found['auc']['low'] > 0.8
    assert measurement._accuracy(pair).members > measurement._accuracy(pair).others


def test_the_command_and_the_program_have_the_same_defaults() -> None:
    given = vars(arguments.make('audit').parse_args(['RUN']))
    defaults = inspect.signature(measurement.run).parameters
    assert {name: given[name] for name in given if name != 'run'} == {
        name: each.default for name, each in defaults.items() if name != 'place'
    }


def test_an_audit_is_not_replaced_unasked(copied: Path) -> None:
    files.write_json(copied / 'audit.json', {'old': True})
    refused(copied, 'audit.json is there already: read it, or --overwrite')
    assert json.loads((copied / 'audit.json').read_text()) == {'old': True}
    found = measurement.run(copied, images=100, overwrite=True)
    assert found['images']['members'] == found['images']['others'] == 100
    assert found['synthetic_images'] == 100
    assert json.loads((copied / 'audit.json').read_text()) == files.plain(found)


def test_a_run_without_synthetic_images_says_so(copied: Path) -> None:
    shutil.rmtree(copied / 'bank')
    found = measurement.run(copied, images=100)
    assert found['synthetic_images'] == 0 and len(found['attacks']) == 2
    assert f'no synthetic images: none in {copied / "bank"}' in table.render(found)
    subject = measurement._subject(copied, None, None, None)
    for loop, said in (('kd', 'diffdfkd distils on real ones'), ('alternating', '/checkpoints')):
        subject.config.loop = loop
        assert said in measurement._without_images(subject)


def refused(place: Path, match: str, **given: Any) -> None:
    """The audit ends with one line."""
    with pytest.raises(UserError, match=match) as error:
        measurement.run(place, **given)
    assert '\n' not in str(error.value)


def test_what_is_no_finished_run_is_refused(copied: Path, tmp_path: Path) -> None:
    refused(tmp_path, 'is no run and no model folder')
    refused(copied / 'teacher', 'is a network without the run that distilled it')
    shutil.move(copied / 'student', tmp_path / 'alone')
    refused(copied, 'has not left its student yet')
    refused(tmp_path / 'alone', 'is a network without the run that distilled it')


def test_another_teacher_is_refused(copied: Path, tmp_path: Path) -> None:
    config = digits.get_config('diffdfkd,smoke')
    other = tmp_path / 'other'
    model_folder.save_classifier(other, tiny.RESNET, drawn(tiny.RESNET, 2), config.data)
    refused(
        copied, r'is not the one that the run in .* had .*: give --teacher=', teacher=str(other)
    )
    refused(copied, 'no weights at .*: check the path', teacher=str(tmp_path / 'gone.pth'))


def test_images_that_do_not_fit_are_refused(copied: Path, tmp_path: Path) -> None:
    refused(copied, 'expected 100 images or more, and a seed', images=99)
    refused(copied, 'a seed of 0 or more', seed=-1)
    source = standins.class_folders(tmp_path / 'source')
    prepare.prepare('insects', tmp_path / 'sets', source)
    where = {'dataset': 'insects', 'data_dir': str(tmp_path / 'sets')}
    refused(copied, 'num_classes', **where)
    where['dataset'] = 'ten'
    for split, number, said in (('test', 2, 'no training images'), ('train', 3, '30 training')):
        for label, name in enumerate('abcdefghij'):
            (place := tmp_path / 'ten' / split / name).mkdir(parents=True)
            for i in range(number):
                pixels = standins.picture(label, i, 16, 1)[..., 0]
                Image.fromarray(pixels).save(place / f'{i}.png')
        shutil.rmtree(tmp_path / 'sets' / 'ten', ignore_errors=True)
        prepare.prepare('ten', tmp_path / 'sets', tmp_path / 'ten')
        refused(copied, f'ten has {said}.*, and members are told .* 100 or more', **where)
    settings = files.read_json(copied / folder.CONFIG)
    settings['data']['name'] = ''
    files.write_json(copied / folder.CONFIG, settings)
    refused(copied, 'names no data set: give --dataset=NAME')


@pytest.mark.slow
@pytest.mark.parametrize('method', ['nayer', 'dafl'])
def test_a_run_is_audited(method: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With a bank on the device, and with a generator alone."""
    config = digits.get_config(f'{method},smoke')
    config.data.image_size = 8
    config.teacher.model = config.student.model = tiny.RESNET
    loops.run(config, tmp_path / 'run')
    found = measurement.run(tmp_path / 'run', images=100)
    assert len(found['attacks']) == 5
    assert found['synthetic_images'] == {'nayer': 64, 'dafl': 100}[method]
    summary = files.read_json(tmp_path / 'run' / 'summary.json')
    whole = measurement.run(tmp_path / 'run', overwrite=True)
    for name in ('teacher', 'student'):
        measured = summary[f'{name}_accuracy' + ('_last' if name == 'student' else '')]
        assert whole['accuracy'][name]['others'] == pytest.approx(measured, abs=0.3)
    if method == 'nayer':
        student = students.load(tmp_path / 'run')
        bank, again = (synthetic_images.banked(student, 1000, seed) for seed in (0, 1))
        one, other = (sorted(image.tobytes() for image in each) for each in (bank, again))
        assert one == other and not np.array_equal(bank, again), 'each image once, in any order'
        drawn = synthetic_images.draw(student, 50, 0)
        assert (scores.nearest(drawn, bank) == 0).all(), 'which are of the same bank'
