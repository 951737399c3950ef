"""Whole runs of DiffDFKD: a bank, students that learn from it, and runs that are killed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import tiny
from ml_collections import ConfigDict
from processes import at_row, killed_at, output, to_the_end
from reference import near

from dfkd_jax import build, data, diffusion, loops
from dfkd_jax.configs import digits
from dfkd_jax.data import synthetic
from dfkd_jax.distributed import sharding
from dfkd_jax.errors import BankError
from dfkd_jax.loops import offline
from dfkd_jax.methods.shared import trajectories
from dfkd_jax.reporting import artifacts, metrics, page, pictures
from dfkd_jax.storage import checkpoints, model_folder

pytestmark = pytest.mark.usefixtures('fast_runs')


# 1. Whole runs.


@pytest.fixture(scope='module')
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a diffusion model with drawn weights, of 4 x 4 grey pixels."""
    return tiny.saved_prior(tmp_path_factory.mktemp('prior') / 'prior')


def small(home: Path, **synthesis: Any) -> ConfigDict:
    """The digits run at 4 pixels: 2 batches of each class, a student in the loop, 3 epochs."""
    config = digits.get_config('diffdfkd,smoke')
    config.data.image_size = config.synthesis.stored_size = 4
    config.teacher.model = config.student.model = tiny.RESNET
    config.teach.update(epochs=1, batch_size=128)
    config.prior.path = str(home)
    config.loss.adversarial = 1.0
    config.synthesis.update(dict(batch_size=2, per_class=3) | synthesis)
    config.in_loop.update(every=2, start=2, steps=3, batch_size=8)
    config.distil.update(epochs=3, batch_size=8, save_every_epochs=1)
    config.log_every_rounds, config.parallel = 4, 'jit'
    return config


@pytest.fixture(scope='module')
def finished(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    workdir = tmp_path_factory.mktemp('finished') / 'run'
    assert loops.run(small(home), workdir)['images_synthesised'] == 30
    return workdir


def bank_of(workdir: Path) -> list[bytes]:
    return [path.read_bytes() for path in sorted((workdir / 'bank').iterdir())]


def digest(workdir: Path, network: str = 'distillation') -> str:
    return json.loads((workdir / network / 'model.json').read_text())['variables_sha256']


def test_a_run_leaves_what_every_run_leaves(finished: Path):
    summary = json.loads((finished / artifacts.SUMMARY).read_text())
    assert summary['images_synthesised'] == 30 and summary['method'] == 'diffdfkd'
    assert summary['seconds_synthesis'] > 0 and summary['seconds_distillation'] > 0
    for name in ('student.safetensors', 'student_torch.safetensors', pictures.IMAGES,
                 pictures.CURVES, page.PAGE, 'student/model.json'):  # fmt: skip
        assert (finished / name).stat().st_size > 0, name
    labels = [synthetic.read(finished / 'bank', number)['label'] for number in range(20)]
    assert np.bincount(np.concatenate(labels)).tolist() == [3] * 10
    rows = metrics.read(finished / 'synthesis')
    assert rows['round'].tolist() == [4, 8, 12, 16, 20]
    assert np.isfinite(rows['g/ce']).all() and np.isfinite(rows['g/adversarial']).all()
    assert [path.name for path in sorted((finished / 'in_loop').iterdir())] == ['000010']
    epochs = metrics.read(finished / 'distillation')
    assert epochs['round'].tolist() == [1, 2, 3] and np.isfinite(epochs['test_accuracy']).all()


class Killed(BaseException):
    """What no code is written to survive."""


def killing(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, call: int, before: bool):
    """From its so many-th call on, a function dies, before or after it does its work."""
    function, calls = getattr(owner, name), []

    def dying(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        if before and len(calls) > call:
            raise Killed
        result = function(*args, **kwargs)
        if len(calls) > call:
            raise Killed
        return result

    monkeypatch.setattr(owner, name, dying)


@pytest.mark.parametrize(
    'owner, name, call, before',
    [
        (synthetic, 'write', 5, True),
        (synthetic, 'write', 11, False),  # between the images and a row of what was measured
        (synthetic, 'write', 19, False),  # after the last images
        (checkpoints.Checkpoints, 'save', 0, False),  # of the student in the loop
        (checkpoints.Checkpoints, 'save', 2, False),  # of the student
    ],
)
@pytest.mark.slow
def test_killed_anywhere_it_ends_as_if_it_had_not_been(
    finished: Path,
    home: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    owner: Any,
    name: str,
    call: int,
    before: bool,
):
    workdir, config = tmp_path / 'run', small(home)
    config.teacher.checkpoint = str(finished / 'teacher')
    with monkeypatch.context() as patch:
        killing(patch, owner, name, call, before)
        with pytest.raises(Killed):
            loops.run(config, workdir)
    assert loops.run(config, workdir)
    assert bank_of(workdir) == bank_of(finished)
    assert digest(workdir) == digest(finished)
    assert digest(workdir, 'in_loop/000010') == digest(finished, 'in_loop/000010')
    for place in ('synthesis', 'distillation'):
        ours, theirs = metrics.read(workdir / place), metrics.read(finished / place)
        for column in theirs.keys() - {'seconds'}:
            np.testing.assert_array_equal(ours[column], theirs[column], column)


@pytest.mark.slow
@pytest.mark.faults
def test_killed_as_a_process_it_ends_the_same(home: Path, tmp_path: Path):
    """While images are made, twice, and while the student learns of them."""
    arguments = [
        '--config=configs/digits.py:diffdfkd,smoke', '--config.data.image_size=4',
        '--config.synthesis.stored_size=4', '--config.teacher.model=resnet8_half',
        '--config.teach.batch_size=128', f'--config.prior.path={home}',
        '--config.loss.adversarial=1.0', '--config.synthesis.batch_size=2',
        '--config.synthesis.per_class=12', '--config.in_loop.every=4', '--config.in_loop.start=4',
        '--config.in_loop.steps=3', '--config.in_loop.batch_size=8', '--config.distil.epochs=20',
        '--config.distil.batch_size=8', '--config.distil.save_every_epochs=2',
        '--config.log_every_rounds=4',
    ]  # fmt: skip
    whole, workdir = tmp_path / 'whole', tmp_path / 'run'
    to_the_end(arguments, whole)
    moments = [
        (at_row(workdir / 'synthesis', 4), 0.01),
        (at_row(workdir / 'synthesis', 32), 0.02),
        (at_row(workdir / 'distillation', 5), 0.05),
    ]
    killed_at(arguments, workdir, moments)
    to_the_end(arguments, workdir)
    assert output(workdir).count('continuing after trajectory') == 2
    assert output(workdir).count('continuing after epoch') == 1
    assert bank_of(workdir) == bank_of(whole)
    assert digest(workdir) == digest(whole)
    assert len(metrics.read(workdir / 'distillation')['round']) == 20


def filled(config: ConfigDict, teacher: Path, workdir: Path) -> list[dict[str, np.ndarray]]:
    """The files of a bank that the loop filled for this teacher, without a student."""
    run = build.build(config)
    variables = model_folder.load_model(teacher)[1]
    assert offline.synthesise(config, workdir, run, variables, lambda: False)
    total = trajectories.count(config.synthesis, config.data.num_classes)
    return [synthetic.read(workdir / 'bank', number) for number in range(total)]


@pytest.mark.slow
@pytest.mark.parametrize('count', [2, 4])
def test_several_devices_fill_the_same_bank(
    finished: Path, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int
):
    """All classes, through the loop; bytes may round to either side."""
    images, make = {}, sharding.make
    config = small(home, batch_size=4, per_class=4)
    config.loss.adversarial, config.parallel = 0.0, 'shard_map'
    for several in (1, count):
        devices = jax.devices()[:several]
        with monkeypatch.context() as patch:
            patch.setattr(sharding, 'make', lambda mode, devices=devices: make(mode, devices))
            files = filled(config, finished / 'teacher', tmp_path / str(several))
        assert [set(each['label']) for each in files] == [{label} for label in range(10)]
        images[several] = np.concatenate([each['image'] for each in files]).astype(int)
    difference = np.abs(images[count] - images[1])
    assert difference.max() <= 1 and (difference > 0).mean() < 0.01


@pytest.mark.slow
def test_latents_of_a_text_to_image_model_fill_a_bank(golden: Path, finished: Path, tmp_path: Path):
    """A folder of Stable Diffusion's format, prompts by class, colours to the teacher's grey."""
    pytest.importorskip('tokenizers', reason='pip install tokenizers')
    config = small(golden / 'tiny_sd' / 'model')
    config.loss.adversarial = 0.0
    config.prior.update(prompt='a photo of a {}.', steps=3)
    files = filled(config, finished / 'teacher', tmp_path)
    assert [len(each['image']) for each in files] == [2] * 10 + [1] * 10
    images = np.concatenate([each['image'] for each in files])
    assert images.shape == (30, 4, 4, 1) and images.std((1, 2, 3)).min() > 0


@pytest.mark.slow
def test_larger_images_are_cut_to_size_and_read_from_disk(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Noise, which needs no diffusion model; stopped and continued while the student learns."""
    config = small(Path('nowhere'), source='noise', stored_size=6)
    config.teacher.checkpoint = str(finished / 'teacher')
    config.distil.random_resized_crop = True
    monkeypatch.setattr(synthetic.data, 'IN_MEMORY_BYTES', 0)
    assert loops.run(config, tmp_path / 'whole')['images_synthesised'] == 30
    with monkeypatch.context() as patch:
        killing(patch, checkpoints.Checkpoints, 'save', 0, before=False)
        with pytest.raises(Killed):
            loops.run(config, tmp_path / 'killed')
    loops.run(config, tmp_path / 'killed')
    assert digest(tmp_path / 'killed') == digest(tmp_path / 'whole')


@pytest.mark.slow
def test_prompts_are_encoded_by_class(golden: Path):
    pytest.importorskip('tokenizers', reason='pip install tokenizers')
    prior = diffusion.load(golden / 'tiny_sd' / 'model')
    config = tiny.config('diffdfkd')
    config.prior.prompt = 'a photo of a {}'
    names = ('cat', 'dog', 'fork_lift', 'owl')
    facts = data.Facts('set', 4, names, (8, 8, 3), (0.5,) * 3, (0.5,) * 3, 9, 9, True, 1)
    run = build.Run(None, None, None, tiny.nets(config), facts, prior)
    found = offline.conditions(config, run)
    wanted = prior.encode(['a photo of a cat', 'a photo of a dog', 'a photo of a fork lift',
                           'a photo of a owl', ''])  # fmt: skip
    near(found.text, wanted, 'text')
    config.prior.prompt = 'a photo.'
    near(offline.conditions(config, run).text, prior.encode(['a photo.', '']), 'text')


@pytest.mark.slow
def test_students_of_the_loop_follow_each_other_and_leave_little(
    finished: Path, home: Path, tmp_path: Path
):
    config = small(home, per_class=7)
    config.in_loop.every = 2
    assert offline.in_loop_trainings(config) == [10, 20, 30]
    config.teacher.checkpoint = str(finished / 'teacher')
    run = build.build(config)
    teacher = build.load_network(finished / 'teacher', tiny.RESNET, config.data)
    assert offline.synthesise(config, tmp_path, run, teacher, lambda: False)
    assert [path.name for path in sorted((tmp_path / 'in_loop').iterdir())] == ['000020', '000030']
    assert not list((tmp_path / 'in_loop').glob('*/checkpoints'))
    # A session goes on where the one before ended: from other weights it ends elsewhere.
    learn = offline.learner(config, tmp_path / 'other', run, teacher, lambda: False)
    assert learn(5) == {}
    # A damaged batch and all after it are removed, and so is a student: both come back the same,
    # though the students that they come from are long gone.
    made = {path: path.read_bytes() for path in sorted(tmp_path.rglob('*.safetensors'))}
    for number in range(21, synthetic.count(tmp_path / 'bank')):
        synthetic.path_of(tmp_path / 'bank', number).unlink()
    shutil.rmtree(tmp_path / 'in_loop' / '000020')
    assert offline.synthesise(config, tmp_path, run, teacher, lambda: False)
    assert {path: path.read_bytes() for path in sorted(tmp_path.rglob('*.safetensors'))} == made


def test_asked_to_stop_it_stops_and_continues(
    finished: Path, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    config = small(home)
    config.teacher.checkpoint = str(finished / 'teacher')
    run = build.build(config)
    teacher = build.load_network(finished / 'teacher', tiny.RESNET, config.data)
    asked: Iterator[bool] = iter([False] * 5 + [True])
    with pytest.raises(loops.Stopped):
        offline.synthesise(config, tmp_path, run, teacher, lambda: next(asked))
    assert synthetic.count(tmp_path / 'bank') == 6
    assert offline.synthesise(config, tmp_path, run, teacher, lambda: False)
    assert bank_of(tmp_path) == bank_of(finished)


@pytest.mark.slow
def test_another_students_run_takes_the_bank_as_it_is(finished: Path, home: Path, tmp_path: Path):
    config = small(home, bank=str(finished / 'bank'))
    config.seed, config.teacher.checkpoint = 1, str(finished / 'teacher')
    summary = loops.run(config, tmp_path / 'run')
    assert summary['seconds_synthesis'] == 0 and not (tmp_path / 'run' / 'bank').exists()
    assert digest(tmp_path / 'run') != digest(finished)
    config.synthesis.per_class = 9
    with pytest.raises(BankError, match='per_class 3, here 9'):
        loops.run(config, tmp_path / 'more')
    with pytest.raises(BankError, match='is not a bank'):
        config.synthesis.bank = str(tmp_path)
        loops.run(config, tmp_path / 'none')


# 2. Mistakes.


@pytest.mark.parametrize(
    'change, match',
    [
        (dict(prior__path=None), 'set --config.prior.path'),
        (dict(prior__path='/nowhere'), 'there is no folder /nowhere'),
        (dict(prior__dtype='float16'), 'config.prior.dtype=.float16.'),
        (dict(prior__steps=1), 'config.prior.steps=1: expected 2 or more'),
        (dict(prior__steps=2000), 'a sampler of 2000 steps'),
        (dict(synthesis__source='guided!'), 'expected guided or unguided or noise'),
        (dict(synthesis__final='last'), 'config.synthesis.final=.last.: expected fresh or stale'),
        (dict(synthesis__batch_size=1), 'cutmix mixes the images of a batch'),
        (dict(synthesis__batch_size=3), 'does not divide over 4 devices'),
        (dict(synthesis__stored_size=5), 'stored_size=5 and config.data.image_size=4 differ'),
        (dict(synthesis__per_class=0), 'config.synthesis.per_class=0'),
        (dict(distil__batch_size=96), 'more than the 80 images'),
        (dict(in_loop__batch_size=2), 'config.in_loop.batch_size=2 does not divide'),
        (dict(distil__cutmix=0.5, distil__kd_weight=0.5), 'which only a teacher can tell'),
        (dict(distil__eval_every_epochs=0), 'config.distil.eval_every_epochs=0'),
        (dict(in_loop__steps=0), 'config.in_loop.steps is not positive'),
        (dict(prior__prompt='A {name}'), "config.prior.prompt='A {name}': expected a text"),
        (dict(distil__batch_size=10), 'config.distil.batch_size=10 does not divide'),
    ],
)
def test_mistakes_are_told(finished: Path, home: Path, tmp_path: Path, change: dict, match: str):
    config = small(home, batch_size=4, per_class=8)
    config.teacher.checkpoint = str(finished / 'teacher')
    config.parallel = 'shard_map'
    for name, value in change.items():
        group, _, field = name.partition('__')
        config[group][field] = value
    with pytest.raises(build.EXPECTED_ERRORS, match=match):
        loops.run(config, tmp_path / 'run')
    assert not (tmp_path / 'run' / 'bank').exists(), 'before anything is made'
