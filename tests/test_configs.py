"""Every config names parts that exist and fit, at true size, without compiling anything."""

from __future__ import annotations

import importlib
import itertools
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny
from absl import flags

from dfkd_jax import build, cli, data
from dfkd_jax.configs import cifar10, common
from dfkd_jax.contract import Frozen
from dfkd_jax.data.sets import DATASETS
from dfkd_jax.errors import ConfigError
from dfkd_jax.loops import kd, supervised
from dfkd_jax.methods import METHODS
from dfkd_jax.methods.shared.trajectories import FrozenPrior
from dfkd_jax.models import layers

ROOT = Path(__file__).resolve().parents[1]
NAMES = [name for name in cli.config_names() if not name.startswith('prior')]


def get_config(name: str, argument: str = ''):
    config = cli.load_config(f'{name}:{argument}')
    if 'labels' in config and config.labels.source == 'minilm':
        config.labels.source = 'onehot'  # the encoder is a package that need not be there
    return config


@pytest.fixture(autouse=True)
def facts_without_files(monkeypatch):
    """What `data.check` would say were the data set there."""

    shape: tuple[int, ...] = ()

    def check(config, needed=()):
        nonlocal shape
        spec = DATASETS[config.name]
        shape = (config.image_size, config.image_size, config.channels)
        return data.Facts(
            config.name, config.num_classes, spec.class_names, shape, spec.mean, spec.std,
            100, 100, spec.flip, spec.padding,
        )  # fmt: skip

    def load_prior(*_):  # after `check`
        return tiny.prior()._replace(shape=shape, frozen=tiny.prior_params(shape[-1]))

    monkeypatch.setattr(data, 'check', check)
    monkeypatch.setattr(build, 'load_prior', load_prior)


@pytest.mark.parametrize(
    'argument',
    ['', 'cpsc', 'cpsc,smoke', 'as_published', 'cpsc,untrained,smoke', 'nayer', 'nayer,smoke',
     'cae', 'cae,smoke', 'cae,untrained', 'dafl,smoke', 'dafl,benchmark', 'zskt,smoke',
     'zskt,untrained', 'dfad,smoke', 'dfq,benchmark,smoke', 'fast', 'fast,smoke', 'fast,untrained',
     'cmi', 'cmi,smoke', 'deepinversion,smoke', 'deepinversion,untrained', 'diffdfkd',
     'diffdfkd,smoke', 'diffdfkd,unguided', 'diffdfkd,noise,smoke', 'diffdfkd,as_published',
     'noise,smoke'],
)  # fmt: skip
@pytest.mark.parametrize('name', tiny.quick(NAMES, 'cifar10', 'digits', 'imagenet'))
def test_builds(name, argument):
    run = build.build(get_config(name, argument))
    assert run.models.num_classes == DATASETS[name].num_classes


# These have image sizes and networks of the kinds of the others.
ALIKE = ('cifar100', 'domainnet', 'tiny_imagenet', 'fashion_mnist')
# Methods that meet 224 px, and 32 px, in every run of the tests.
LARGE = {'imagenet': ('diffdfkd',), 'cifar10': ('cpsc', 'nayer')}
PAIRS = [*itertools.product(NAMES, METHODS)]
OFTEN = [
    (name, method) for name, method in PAIRS
    if name not in ALIKE and method in LARGE.get(name, METHODS)
]  # fmt: skip


@pytest.mark.parametrize(('name', 'method'), tiny.quick(PAIRS, *OFTEN))
def test_steps_keep_the_state_at_true_size(monkeypatch, name, method):
    """Shapes only: every step of the real networks and batches."""
    monkeypatch.setattr(layers, 'MOST_PARTS', 1)  # quicker to trace
    config = get_config(name, method)
    config.parallel = 'jit'
    run = build.build(config)
    key = jax.random.key(0)
    blank = np.zeros((1, *run.models.image_shape), np.float32)
    extra = FrozenPrior(run.extra.frozen, ()) if 'prior' in config else run.extra
    frozen = Frozen(jax.eval_shape(run.models.teacher.init, key, blank), extra)
    state = jax.eval_shape(run.whole.init, frozen, key)
    steps = (run.whole.begin, run.whole.generator_step, run.whole.finish, run.whole.student_step)
    for step in steps:
        after, metrics = jax.eval_shape(step, frozen, state, key)
        assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(
            lambda x: (x.shape, x.dtype), state
        )
        assert all(value.shape == () for value in metrics.values())
    image, label = jax.eval_shape(run.whole.sample, frozen, state, key)
    batch = config.synthesis.get('student_batch_size', config.synthesis.batch_size)
    assert image.shape == (batch, *run.models.image_shape)
    assert label.shape == (batch,)


@pytest.mark.parametrize('pair', cifar10.PUBLIC)
def test_a_public_pair_has_its_normalisation(pair):
    config = get_config('cifar10', f'nayer,{pair},smoke')
    assert config.data.mean == (0.485, 0.456, 0.406) and config.data.std == (0.229, 0.224, 0.225)
    teacher, student = pair.split('-')
    assert (config.teacher.model, config.student.model) == (f'{teacher}_option_a', student)
    build.build(config)
    with pytest.raises(ConfigError, match=f'found resnet20-resnet9; .*{pair}'):
        get_config('cifar10', 'nayer,resnet20-resnet9')


@pytest.mark.parametrize('method', tiny.quick(METHODS, 'nayer', 'cpsc', 'noise'))
def test_a_teacher_without_batch_norms(method):
    """Told where a loss compares its statistics; every method can be traced, and some differ."""
    config = get_config('fashion_mnist', method)
    config.parallel, config.teacher.model, config.student.model = 'jit', 'lenet5', 'lenet5_half'
    if config.loss.get('student') == 'msarc':  # which needs what those lack
        config.loss.student = 'kd'
    run = build.build(config)
    if 'bn' in config.loss and config.loss.bn:
        told = run.warnings.pop('no_batch_statistics')
        assert 'lenet5 has no batch norms' in told
        assert 'nothing takes its place (--config.image_prior.tv' in told
        config.image_prior.tv = 0.1
        told = build.build(config).warnings['no_batch_statistics']
        assert 'takes its place, --config.image_prior.tv=0.1 and .l2=0.' in told
        off = config.copy_and_resolve_references()
        off.loss.bn = 0.0
        assert not build.build(off).warnings
    assert not run.warnings
    key = jax.random.key(0)
    blank = np.zeros((1, *run.models.image_shape), np.float32)
    teacher = {'batch_stats': {}} | jax.eval_shape(run.models.teacher.init, key, blank)
    extra = FrozenPrior(run.extra.frozen, ()) if 'prior' in config else run.extra
    phase = common.phase(rounds=1, loops=2, g_steps=3, s_steps=0 if 'prior' in config else 5)
    [queries] = build.queries(config, run.models, Frozen(teacher, extra), (phase,))
    batch = config.synthesis.batch_size
    if 'prior' in config:  # a batch's last images are judged too
        assert queries == 2 * (3 + 1) * batch
    else:
        steps = 0 if method == 'noise' else 2 * 3
        assert queries >= steps * batch + 5 * config.synthesis.student_batch_size


@pytest.mark.parametrize('name', NAMES)
def test_references(name):
    """Noise is a method and a control of DiffDFKD; KD on real data is a run without a method."""
    config = get_config(name, 'kd,smoke')
    config.teach.batch_size = 40  # of the 100 images there are here
    assert kd.prepare(config).epoch_steps == 2
    assert 'synthesis' not in config and 'phases' not in config
    assert get_config(name, 'diffdfkd,noise').synthesis.source == 'noise'
    assert get_config(name, 'noise').method == 'noise'
    loops = {'kd': 'kd', 'diffdfkd': 'offline', 'noise': 'alternating', 'cpsc': 'alternating'}
    assert {method: get_config(name, method).loop for method in loops} == loops


@pytest.mark.parametrize('name', NAMES)
def test_flags_do_what_they_say(name):
    plain, smoke = get_config(name, 'cpsc'), get_config(name, 'cpsc,smoke')
    assert sum(p.rounds for p in smoke.phases) < 10 <= sum(p.rounds for p in plain.phases)
    untrained = get_config(name, 'cpsc,untrained')
    assert untrained.generator.lr == 0
    assert untrained.phases == plain.phases  # and all else as in the run it controls
    published = get_config(name, 'cpsc,as_published')
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


def test_published_numbers_of_diffdfkd():
    """The repository of its authors: its defaults, and its scripts for CIFAR-10 and DomainNet."""
    config = get_config('cifar10', 'diffdfkd')
    assert (config.prior.steps, config.prior.scale, config.synthesis.per_class) == (50, 3, 5000)
    assert (config.loss.bn, config.loss.ce, config.loss.adversarial) == (0.1, 1, 1)
    recipe = config.distil
    assert (recipe.epochs, recipe.batch_size, recipe.lr, recipe.weight_decay) == (
        240, 256, 0.2, 5e-4,
    )  # fmt: skip
    assert (recipe.kd_temperature, recipe.kd_weight, recipe.momentum) == (30, 1, 0.9)
    assert recipe.milestones == (150, 180, 210)
    config = get_config('domainnet', 'diffdfkd')
    assert (config.prior.steps, config.prior.scale, config.prior.prompt) == (70, 7, 'an image.')
    recipe = config.distil
    assert (recipe.epochs, recipe.batch_size, recipe.lr, recipe.weight_decay) == (
        220, 256, 0.1, 1e-4,
    )  # fmt: skip
    assert recipe.random_resized_crop and config.synthesis.stored_size == 256
    assert get_config('domainnet').method == 'diffdfkd'


@pytest.mark.parametrize('method', common.METHODS)
def test_a_flag_that_the_method_does_not_have_is_refused(method):
    has = {'smoke', *importlib.import_module(f'dfkd_jax.configs.methods.{method}').FLAGS}
    for flag in ('smoke', 'as_published', 'benchmark', 'untrained', 'unguided', 'noise'):
        if flag == method:
            continue  # the word names it
        if flag in has:
            assert get_config('digits', f'{method},{flag}').method == method
            continue
        with pytest.raises(ConfigError, match=f'found {flag}; .* FLAG, for {method}, one of smoke'):
            get_config('digits', f'{method},{flag}')


@pytest.mark.parametrize('method', common.METHODS)
def test_cifar10_has_a_small_setting_of_every_method(method):
    config, plain = (
        get_config('cifar10', f'{method},{words}') for words in ('small', 'resnet20-resnet8')
    )
    assert (config.teacher.model, config.student.model) == cifar10.PUBLIC['resnet20-resnet8']
    assert config.data.to_dict() == plain.data.to_dict()  # with the normalisation of the teacher
    assert config.teach.epochs < plain.teach.epochs
    if method != 'kd':  # which has no numbers beside these
        assert config.to_dict() != plain.to_dict() | {'teach': config.teach.to_dict()}
    other = get_config('cifar10', f'{method},resnet56-resnet20,small')
    assert other.teacher.model == 'resnet56_option_a' and other.teach == config.teach
    with pytest.raises(ConfigError, match='found small; expected'):
        get_config('digits', f'{method},small')
    flags = importlib.import_module(f'dfkd_jax.configs.methods.{method}').FLAGS
    for flag in common.WHOLE.intersection(flags):
        with pytest.raises(ConfigError, match=f'found {flag} and small, .* e.g. {method},{flag}'):
            get_config('cifar10', f'{method},small,{flag}')


@pytest.mark.parametrize('argument', ['cpsk', 'cpsc,cpsk', 'cpsc,nayer', 'kd,untrained'])
def test_argument_is_checked(argument):
    expected = (
        f'{argument!r}: found .*; expected METHOD.*, METHOD one of {", ".join(common.METHODS)}'
    )
    with pytest.raises(ConfigError, match=expected):
        get_config('digits', argument)


def test_a_flag_that_is_also_a_method():
    """Noise is a control after the name of a method that has it, else a method, in any order."""
    assert get_config('digits', 'diffdfkd,noise').method == 'diffdfkd'
    assert get_config('domainnet', 'smoke,noise').method == 'noise'


def test_configs_are_found_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in cli.config_names():
        by_name = cli.load_config(name)
        assert by_name == cli.load_config(f'configs/{name}.py')
        assert by_name == cli.load_config(str(ROOT / 'configs' / f'{name}.py'))
    assert cli.load_config('configs/digits.py:nayer,smoke').method == 'nayer'
    text = """
from dfkd_jax.configs import digits
def get_config(arg=None):
    config = digits.get_config(arg)
    config.seed = 7
    return config
"""
    (tmp_path / 'configs').mkdir()
    (tmp_path / 'configs' / 'digits.py').write_text(text)  # the user's, which goes first
    for path in ('configs/digits.py', './configs/digits.py', tmp_path / 'configs' / 'digits.py'):
        config = cli.load_config(f'{path}:nayer,smoke')
        assert (config.seed, config.method) == (7, 'nayer')
    assert cli.load_config('digits').seed == 0


def test_no_method_is_a_case_of_its_own():
    """What a method needs is in its file: the others name none, but as the default."""
    for path in ROOT.glob('configs/*.py'):
        text = path.read_text()
        _, code = text.split('"""\n', 1)
        named = {method for method in common.METHODS if f"'{method}'" in code}
        assert named <= {'cpsc', 'diffdfkd', 'kd'}, path  # the last is a loss's name too
        assert len(text.splitlines()) < 200


def test_fields_are_overridden_and_locked(monkeypatch):
    def parse(*arguments):
        command = ['program', '--config=digits:cpsc', *arguments]
        monkeypatch.setattr(sys, 'argv', command)  # ml_collections looks there for overrides
        values = flags.FlagValues()
        config = cli.define_config(values)
        values(command)
        return config.value

    config = parse('--config.student.lr=0.05', '--config.phases[0].rounds=7')
    assert (config.student.lr, config.phases[0].rounds) == (0.05, 7)
    with pytest.raises(AttributeError, match='learning_rate'):
        parse('--config.student.learning_rate=0.05')


@pytest.mark.parametrize('name', NAMES)
def test_what_real_data_trains_is_the_same_for_every_method(name):
    """So that methods can share a teacher's folder."""
    for role in supervised.ROLES:
        settings = [supervised.settings(get_config(name, method), role) for method in METHODS]
        assert all(each == settings[0] for each in settings)


def test_published_numbers_of_nayer():
    """The scripts of its authors: nayer_100.sh for CIFAR-10, CIFAR-100 and Tiny-ImageNet."""
    expected = {
        'cifar10': (0.2, 400, 512, (20, 10, 30, 0), (100, 2, 30, 400)),
        'cifar100': (0.2, 400, 512, (20, 10, 40, 0), (100, 2, 40, 400)),
        'tiny_imagenet': (0.1, 200, 256, (20, 20, 60, 0), (100, 4, 60, 1000)),
    }
    for name, (lr, batch, student_batch, *phases) in expected.items():
        config = get_config(name, 'nayer')
        assert (config.student.lr, config.student.final_lr) == (lr, 2e-4)
        assert (config.student.momentum, config.student.weight_decay) == (0.9, 1e-4)
        assert (config.synthesis.batch_size, config.synthesis.student_batch_size) == (
            batch, student_batch,
        )  # fmt: skip
        found = [(p.rounds, p.loops, p.g_steps, p.s_steps) for p in config.phases]
        assert found == phases
        made = sum(rounds * loops for rounds, loops, _, _ in phases) * batch
        assert config.synthesis.bank == made, 'nothing that the published run keeps is lost'
        loss = config.loss
        assert (loss.bn, loss.ce, loss.adversarial) == (10, 0.5, 1.33)
        assert (loss.bn_momentum, loss.temperature) == (0.9, 20)
        # A round is an epoch: each is logged and measured, and a kill loses a few at most.
        assert config.log_every_rounds == config.eval_every_rounds == 1
        assert config.save_every_rounds <= 4
        generator = config.generator
        assert (generator.life, generator.lr, generator.noisy_width) == (10, 4e-3, 1000)
        assert (generator.beta1, generator.beta2, generator.width) == (0.5, 0.999, 64)


def test_cadences_follow_what_a_round_costs():
    """Of 50 rounds where a round is a few steps, of one where it is an epoch."""
    few, many = get_config('cifar10', 'dafl'), get_config('cifar100', 'cae')
    assert (few.log_every_rounds, few.eval_every_rounds, few.save_every_rounds) == (50, 50, 50)
    assert (many.log_every_rounds, many.eval_every_rounds) == (1, 1)
    for name in ('nayer', 'cae', 'fast', 'cmi', 'deepinversion'):
        config = get_config('cifar10', name)
        steps = max(p.loops * p.g_steps + p.s_steps for p in config.phases)
        assert config.eval_every_rounds * steps <= 1000 or config.eval_every_rounds == 1
        assert config.save_every_rounds * steps <= 4000 or config.save_every_rounds == 1


def test_short_runs_keep_one_generator():
    """So that NAYER and CAE-DFKD differ in their method alone."""
    for name in ('digits', 'fashion_mnist'):
        lives = {get_config(name, method).generator.life for method in ('nayer', 'cae')}
        assert lives == {0}


def test_dafl_on_cifar100_has_its_authors_weights():
    loss = get_config('cifar100', 'dafl').loss
    assert (loss.one_hot, loss.activation) == (0.5, 0.1)
    assert loss.balance == pytest.approx(20 / 2.302585, rel=1e-3)
