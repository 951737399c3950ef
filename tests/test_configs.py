"""Every config names parts that exist and fit, at true size, without compiling anything."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from absl import flags
from ml_collections import config_flags

from dfkd_jax import build, data
from dfkd_jax.contract import Frozen
from dfkd_jax.data.sets import DATASETS

NAMES = sorted(
    path.stem for path in Path('configs').glob('*.py') if path.stem not in ('__init__', 'common')
)


def get_config(name: str, argument: str = ''):
    return importlib.import_module(f'configs.{name}').get_config(argument)


@pytest.fixture(autouse=True)
def facts_without_files(monkeypatch):
    """What `data.check` would say were the data set there."""

    def check(config):
        spec = DATASETS[config.name]
        shape = (config.image_size, config.image_size, config.channels)
        return data.Facts(
            config.name, config.num_classes, spec.class_names, shape, spec.mean, spec.std,
            100, 100, spec.flip, spec.padding,
        )  # fmt: skip

    monkeypatch.setattr(data, 'check', check)


@pytest.mark.parametrize('argument', ['', 'cpsc', 'cpsc,smoke', 'as_published', 'untrained,smoke'])
@pytest.mark.parametrize('name', NAMES)
def test_builds(name, argument):
    run = build.build(get_config(name, argument))
    assert run.models.num_classes == DATASETS[name].num_classes


@pytest.mark.parametrize('name', NAMES)
def test_steps_keep_the_state_at_true_size(name):
    """Shapes only: a generator step and a student step of the real networks and batches."""
    config = get_config(name)
    config.parallel = 'jit'
    run = build.build(config)
    key = jax.random.key(0)
    blank = np.zeros((1, *run.models.image_shape), np.float32)
    frozen = Frozen(teacher=jax.eval_shape(run.models.teacher.init, key, blank))
    state = jax.eval_shape(run.whole.init, frozen, key)
    for step in (run.whole.generator_step, run.whole.student_step):
        after, metrics = jax.eval_shape(step, frozen, state, key)
        assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(
            lambda x: (x.shape, x.dtype), state
        )
        assert all(value.shape == () for value in metrics.values())
    image, label = jax.eval_shape(run.whole.sample, frozen, state, key)
    batch = config.synthesis.student_batch_size
    assert image.shape == (batch, *run.models.image_shape)
    assert label.shape == (batch,)


@pytest.mark.parametrize('name', NAMES)
def test_flags_do_what_they_say(name):
    plain, smoke = get_config(name), get_config(name, 'smoke')
    assert sum(p.rounds for p in smoke.phases) < 10 <= sum(p.rounds for p in plain.phases)
    untrained = get_config(name, 'untrained')
    assert all(p.g_steps == 0 for p in untrained.phases)
    assert untrained.synthesis.bank == 0  # else the student would see an empty one
    published = get_config(name, 'as_published')
    assert published.generator.reset_adam and published.loss.double_softmax
    # What only we do is off in the authors' way.
    assert (published.generator.spread, published.generator.decay) == (0, False)
    assert (published.synthesis.crop_padding, published.loss.temperature) == (0, 1)
    assert published.loss.student_pseudo_labels


def test_published_numbers_of_cifar100():
    """The README of the authors' code: 600 epochs of 50 rounds, batch 512, 6 and 5 steps."""
    config = get_config('cifar100', 'as_published')
    (phase,) = config.phases
    assert (phase.rounds, phase.loops, phase.g_steps, phase.s_steps) == (30_000, 1, 6, 5)
    loss = config.loss
    assert (loss.kd, loss.ikd, loss.bn, loss.scl, loss.ce) == (1, 5, 1, 0.7, 0.7)
    assert (config.generator.latent, config.generator.lr, config.generator.beta1) == (
        256,
        1e-3,
        0.5,
    )
    assert config.synthesis.batch_size == 512


def test_argument_is_checked():
    with pytest.raises(ValueError, match='cpsk.*expected one method of cpsc'):
        get_config('digits', 'cpsk')


def test_fields_are_overridden_and_locked(monkeypatch):
    def parse(*arguments):
        command = ['program', '--config=configs/digits.py:cpsc', *arguments]
        monkeypatch.setattr(sys, 'argv', command)  # ml_collections looks there for overrides
        values = flags.FlagValues()
        config = config_flags.DEFINE_config_file('config', flag_values=values, lock_config=True)
        values(command)
        return config.value

    config = parse('--config.student.lr=0.05', '--config.phases[0].rounds=7')
    assert (config.student.lr, config.phases[0].rounds) == (0.05, 7)
    with pytest.raises(AttributeError, match='learning_rate'):
        parse('--config.student.learning_rate=0.05')
