"""CPSC-DFKD: one step against the reference implementation, term by term; and its choices."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
import tiny
from reference import near
from tiny import Built

from dfkd_jax import contract, losses, models, port
from dfkd_jax.configs import cifar100
from dfkd_jax.contract import State
from dfkd_jax.distributed import sharding
from dfkd_jax.methods import cpsc

pytestmark = pytest.mark.usefixtures('fast_compilation')


# 1. Equal to the reference implementation.

SIZES = dict(latent=32, width=16, image_size=32, channels=3)


class Step(NamedTuple):
    """The golden step: its networks and inputs in float64, and what came out.

    theirs: for the generator and for the student, each term's value and gradient in PyTorch.
    """

    golden: Any
    config: Any
    nets: contract.Models
    frozen: contract.Frozen
    student: dict
    generator: dict
    z: np.ndarray
    label: np.ndarray
    theirs: dict[str, tuple[dict[str, float], dict[str, Any]]]


@pytest.fixture(scope='module')
def step(golden: Path, rule) -> Step:
    facts = json.loads((golden / 'steps' / 'cpsc_step.json').read_text())
    expected = tiny.arrays(golden / 'steps' / 'cpsc_step.npz')
    classes, batch = facts['num_classes'], facts['batch']
    assert {name: facts[name] for name in SIZES if name != 'channels'} == {
        name: size for name, size in SIZES.items() if name != 'channels'
    }
    z, label = rule.normal('z:cpsc_step', (batch, SIZES['latent'])), np.arange(batch) % classes
    image, latent = jnp.zeros((1, 32, 32, 3)), jnp.zeros((1, SIZES['latent']))
    weights = {
        'teacher': reference.weights(rule, 'wrn16_2', image, num_classes=classes),
        'student': reference.weights(
            rule, 'wrn16_2', image, prefix='student.', num_classes=classes
        ),
        'generator': reference.weights(
            rule, 'cpsc_generator', latent, jnp.zeros(1, int), prefix='generator.',
            num_classes=classes, **SIZES,
        ),
    }  # fmt: skip
    config = tiny.config(
        loss__double_softmax=True, synthesis__batch_size=batch, synthesis__student_batch_size=batch,
        student__warmup_steps=0, student__lr=0.1,
    )  # fmt: skip
    theirs = torch_step(weights, z, label, config.loss.scl_temperature)
    with reference.float64():
        classifier, module = (
            models.make(name, num_classes=classes, dtype=jnp.float64, **of)
            for name, of in (('wrn16_2', {}), ('cpsc_generator', SIZES))
        )
        teacher, student, generator = (
            reference.wide(port.from_torch(name, weights[of], num_classes=classes, **sizes))
            for name, of, sizes in (
                ('wrn16_2', 'teacher', {}),
                ('wrn16_2', 'student', {}),
                ('cpsc_generator', 'generator', SIZES),
            )
        )
    nets = contract.Models(
        classifier, classifier, module, classes, (32, 32, 3), (0.5,) * 3, (0.25,) * 3
    )
    return Step(
        expected, config, nets, contract.Frozen(teacher), student, generator,
        z.astype(np.float64), label, theirs,
    )  # fmt: skip


def torch_step(weights: Any, z: np.ndarray, label: np.ndarray, temperature: float) -> Any:
    """The terms of L_G and of L_S in plain PyTorch, and their gradients."""
    torch = pytest.importorskip('torch', reason='PyTorch computes the reference')
    from torch.nn import functional as F

    from experiments.bench import plain_torch

    classes = label.max() + 1
    teacher, student = (plain_torch.WideResNet(16, 2, classes, 3) for _ in range(2))
    teacher = reference.torch_network(teacher, weights['teacher'])
    student = reference.torch_network(student, weights['student'], train=True)
    sizes = [SIZES[name] for name in ('image_size', 'channels', 'latent', 'width')]
    generator = plain_torch.Generator(classes, *sizes)
    generator = reference.torch_network(generator, weights['generator'], train=True)
    statistics = plain_torch.Statistics(teacher)
    target = torch.from_numpy(label)
    image = generator(torch.from_numpy(z).double(), target)
    (t, teacher_features), (s, student_features) = teacher(image), student(image)
    views = torch.cat([F.normalize(student_features), F.normalize(teacher_features)])
    error = F.mse_loss(s, t.detach())
    of_generator = {
        'adversarial': -plain_torch.distillation(s, t),
        'ikd_mse': -error,
        'ikd_log': -torch.log(error),
        'bn': statistics.distance(statistics.pop()),
        'contrast': plain_torch.supervised_contrast(views, target, temperature),
        'ce_on_probabilities': F.cross_entropy(F.softmax(t, 1), target),
        'ce': F.cross_entropy(t, target),
    }
    t, s = t.detach(), student(image.detach())[0]
    of_student = {
        'kd': plain_torch.distillation(s, t),
        'ikd_mse': F.mse_loss(s, t),
        'ikd_log_norm': torch.log(torch.norm(s - t)),
        'ce_on_probabilities': F.cross_entropy(F.softmax(s, 1), target),
    }
    return {
        name: (
            {term: value.item() for term, value in terms.items()},
            {term: reference.torch_gradient(value, net) for term, value in terms.items()},
        )
        for name, terms, net in (
            ('generator', of_generator, generator), ('student', of_student, student)
        )
    }  # fmt: skip


@pytest.mark.parametrize('net', ['generator', 'student'])
@pytest.mark.slow
def test_plain_torch_is_the_reference(step: Step, net: str):
    """Values and gradients of every term; the latter as far as float32 goes."""
    prefix = '' if net == 'generator' else 'student_'
    values, gradients = step.theirs[net]
    for term, value in values.items():
        near(value, step.golden[f'{prefix}loss/{term}'], term, 1e-5)
        norm = np.sqrt(sum(np.sum(x**2) for x in gradients[term].values()))
        near(norm, step.golden[f'{prefix}gradnorm/{term}'], f'{term}, norm', reference.KINKS)
        stored = [key for key in step.golden if key.startswith(f'{prefix}grad/{term}/')]
        assert len(stored) == {'generator': 3, 'student': 1}[net]
        for key in stored:
            expected = step.golden[key]
            near(gradients[term][key.rpartition('/')[2]], expected, key, reference.KINKS)


# In `as_published`'s way and in the other one, our names of PyTorch's terms.
PUBLISHED = {
    'generator': {'kd': 'adversarial', 'ikd': 'ikd_mse', 'bn': 'bn', 'scl': 'contrast',
                  'ce': 'ce_on_probabilities'},
    'student': {'kd': 'kd', 'ikd': 'ikd_mse', 'ce': 'ce_on_probabilities'},
}  # fmt: skip
OTHERS = {
    'generator': PUBLISHED['generator'] | {'ikd': 'ikd_log', 'ce': 'ce'},
    'student': {'kd': 'kd', 'ikd': 'ikd_log_norm'},
}


def stepped(step: Step, net: str, monkeypatch: pytest.MonkeyPatch, **loss: Any) -> Any:
    """The state after a step from the golden weights and draws, and the metrics."""
    config = step.config.copy_and_resolve_references()
    config.loss.update(loss)
    method = cpsc.make(config, step.nets, sharding.Shards())
    state = jax.eval_shape(method.init, step.frozen, jax.random.key(0))
    state = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), state)
    state = state.replace(
        student=state.student.replace(**step.student),
        generator=state.generator.replace(**step.generator),
    )
    normal = jax.random.normal

    def draw(key: jax.Array, shape: Any = (), *args: Any) -> jax.Array:
        # flax asks for the shapes of initial weights in the same way.
        return jnp.asarray(step.z) if tuple(shape) == step.z.shape else normal(key, shape, *args)

    monkeypatch.setattr(jax.random, 'normal', draw)
    monkeypatch.setattr(jax.random, 'randint', lambda *_: jnp.asarray(step.label, jnp.int32))
    compiled = jax.jit(getattr(method, f'{net}_step'))
    return compiled(step.frozen, state, jax.random.key(0))


def compare_terms(metrics: Any, step: Step, net: str, terms: dict[str, str]) -> dict[str, Any]:
    """Values to PyTorch's, whose gradient of the weighted sum is returned."""
    values, gradients = step.theirs[net]
    for ours, theirs in terms.items():
        near(metrics[f'{net[0]}/{ours}'], values[theirs], theirs, 1e-10)
    weights = {theirs: step.config.loss[ours] for ours, theirs in terms.items()}
    return {
        name: sum(weight * gradients[term][name] for term, weight in weights.items())
        for name in gradients['bn' if net == 'generator' else 'kd']
    }


@pytest.mark.parametrize(
    'terms', [PUBLISHED, pytest.param(OTHERS, marks=pytest.mark.slow)], ids=['published', 'others']
)
def test_a_generator_step_equals_the_reference(
    step: Step, terms: dict[str, Any], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(contract, 'update', lambda net, grads, *_: net.replace(params=grads))
    loss = {} if terms is PUBLISHED else {'double_softmax': False, 'ikd_form': 'log'}
    weights = {'kd': 1, 'ikd': 5, 'bn': 1, 'scl': 0.7, 'ce': 0.7}
    assert all(step.config.loss[name] == weight for name, weight in weights.items())
    with reference.float64():
        after, metrics = stepped(step, 'generator', monkeypatch, **loss)
        total = compare_terms(metrics, step, 'generator', terms['generator'])
        grads = reference.torch_named('cpsc_generator', after.generator.params, step.generator)
        reference.near_gradients(grads, total, 1e-8)
        if terms is PUBLISHED:
            near(metrics['g/loss'], step.golden['generator_total'], 'generator_total', 1e-5)


def test_what_the_networks_see_equals_the_reference(step: Step):
    nets, golden = step.nets, step.golden

    @jax.jit
    def outputs(generator: Any, student: Any, teacher: Any) -> Any:
        image, _ = nets.generator.apply(generator, step.z, step.label, mutable=['batch_stats'])
        out, _ = nets.student.apply(student, image, train=True, mutable=['batch_stats'])
        return image, nets.teacher.apply(teacher, image), out

    with reference.float64():
        image, teacher, student = outputs(step.generator, step.student, step.frozen.teacher)
        near(np.transpose(image, (0, 3, 1, 2)), golden['images'], 'images', 1e-5)
        near(teacher.logits, golden['teacher_logits'], 'teacher logits', 1e-5)
        features = losses.normalise(teacher.features)
        near(features, golden['teacher_features'], 'teacher features', 1e-5)
        near(student.logits, golden['student_logits_train'], 'student logits', 1e-5)


def test_a_student_step_ends_at_the_reference_weights(step: Step, monkeypatch: pytest.MonkeyPatch):
    """SGD on kd + 5 ikd + 0.7 ce, at 0.1, with a decay of 5e-4."""
    with reference.float64():
        after, metrics = stepped(step, 'student', monkeypatch)
        grads = compare_terms(metrics, step, 'student', PUBLISHED['student'])
        ends = reference.torch_named('wrn16_2', after.student.params, step.student)
        starts = reference.torch_named('wrn16_2', step.student['params'], step.student)
        moved = {name: ends[name] - starts[name] for name in grads}
        expected = {name: -0.1 * (grad + 5e-4 * starts[name]) for name, grad in grads.items()}
        reference.near_gradients(moved, expected, 1e-8)
        for layer in ('fc', 'conv1'):
            name, golden = f'{layer}.weight', step.golden[f'student_{layer}_after_sgd']
            near(ends[name], golden, name)
            near(moved[name], golden - starts[name], f'step of {name}', reference.KINKS)


@pytest.mark.slow
def test_the_student_imitates_by_the_logarithm_as_the_reference(
    step: Step, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(contract, 'update', lambda net, grads, *_: net.replace(params=grads))
    with reference.float64():
        loss = {'ikd_form': 'log', 'student_pseudo_labels': False}
        after, metrics = stepped(step, 'student', monkeypatch, **loss)
        total = compare_terms(metrics, step, 'student', OTHERS['student'])
        grads = reference.torch_named('wrn16_2', after.student.params, step.student)
        reference.near_gradients(grads, total, 1e-8)


# 2. Its choices.


def shape_of(config: Any, step: str = 'generator_step', **nets_changes: Any) -> Any:
    """What a step would return, traced and not compiled."""
    method = tiny.method(config, sharding.Shards(), **nets_changes)
    key = jax.random.key(0)
    frozen = jax.eval_shape(tiny.frozen)
    state = jax.eval_shape(method.init, frozen, key)
    return jax.eval_shape(getattr(method, step), frozen, state, key)


@pytest.mark.parametrize('term', ['kd', 'ikd', 'bn', 'scl', 'ce'])
def test_a_term_of_weight_zero_is_left_out(term: str):
    _, metrics = shape_of(tiny.config(**{f'loss__{term}': 0.0}))
    assert set(metrics) == {'g/kd', 'g/ikd', 'g/bn', 'g/scl', 'g/ce', 'g/loss', 'g/hit'} - {
        f'g/{term}'
    }
    _, metrics = shape_of(tiny.config(**{f'loss__{term}': 0.0}), 'student_step')
    assert set(metrics) == {'s/kd', 's/ikd', 's/ce', 's/loss', 's/agreement'} - {f's/{term}'}


def test_pseudo_labels_can_be_kept_from_the_student():
    config = tiny.config(loss__student_pseudo_labels=False)
    assert 'g/ce' in shape_of(config)[1]
    assert 's/ce' not in shape_of(config, 'student_step')[1]


def test_bounded_images_stay_within_the_range_of_pixels():
    mean, std = np.float32([[[[0.5, 0.286, 0.1]]]]), np.float32([[[[0.25, 0.353, 0.3]]]])
    x = np.linspace(-30, 30, 601, dtype=np.float32)[:, None, None, None] * np.ones(3, np.float32)
    pixel = np.asarray(cpsc.bound(x, mean, std)) * std + mean
    np.testing.assert_allclose(pixel[0], 0, atol=1e-6)
    np.testing.assert_allclose(pixel[-1], 1, atol=1e-6)
    assert np.all(np.diff(pixel, axis=0) >= -1e-6)
    value, slope = jax.jvp(lambda x: cpsc.bound(x, mean, std), (0 * x[0:1],), (x[0:1] ** 0,))
    np.testing.assert_allclose(value, 0, atol=1e-6)
    np.testing.assert_allclose(slope, 1, rtol=1e-5)


@pytest.mark.parametrize('bounded', tiny.quick([False, True], True))
def test_bounded_samples(bounded: bool):
    """The networks of `tiny` normalise by mean 0.5 and deviation 0.25: pixels are in [-2, 2]."""
    method = tiny.method(tiny.config(generator__bounded=bounded), sharding.Shards())
    key = jax.random.key(0)
    state = jax.jit(method.init)(None, key)
    bias = state.generator.params['norm3']['bias']
    state.generator.params['norm3']['bias'] = bias + 9.0
    image = method.sample(None, state, key).image
    assert bool(jnp.max(image) <= 2) == bounded


def test_images_are_dimmed_each_by_its_own_factor():
    key = jax.random.key(0)
    full, dim = (
        tiny.method(tiny.config(generator__darkest=darkest), sharding.Shards())
        for darkest in (1.0, 0.25)
    )
    state = jax.jit(full.init)(None, key)
    bright, dark = (0.5 + 0.25 * method.sample(None, state, key).image for method in (full, dim))
    factor = np.asarray(dark / bright)
    per_image = factor.mean((1, 2, 3))
    np.testing.assert_allclose(factor / per_image[:, None, None, None], 1, rtol=1e-3)
    assert 0.25 <= per_image.min() < 0.5 and 0.75 < per_image.max() <= 1


@pytest.mark.parametrize('darkest', [0.0, 1.5])
def test_exposure_out_of_range(darkest: float):
    with pytest.raises(ValueError, match='darkest.*expected above 0'):
        tiny.method(tiny.config(generator__darkest=darkest), sharding.Shards())


@pytest.mark.slow
def test_the_student_sees_the_images_that_the_generator_trained_on():
    _, method, frozen, state = tiny.built(
        'cpsc', generator__bounded=True, synthesis__bank=2 * tiny.BATCH
    )
    key = jax.random.key(7)
    state, _ = method.generator_step(frozen, state, key)
    kept = state.extra.bank
    assert int(kept.written) == tiny.BATCH
    key_label = jax.random.split(key, 3)[1]
    label = jax.random.randint(key_label, (tiny.BATCH,), 0, tiny.CLASSES)
    np.testing.assert_array_equal(kept.label[: tiny.BATCH], label)
    assert np.ptp(kept.image[: tiny.BATCH]) > 100 and not np.any(kept.image[tiny.BATCH :])
    # Nothing but the bank reaches the student: from another one it learns something else.
    inverted = kept.replace(image=255 - kept.image)
    measured = [
        method.student_step(frozen, state.replace(extra=state.extra.replace(bank=bank)), key)[1]
        for bank in (kept, inverted, kept)
    ]
    kept_kd, inverted_kd, again = (each['s/kd'] for each in measured)
    assert kept_kd != inverted_kd and kept_kd == again


def test_a_bank_needs_bounded_images_in_whole_batches():
    for changes, match in (
        (dict(synthesis__bank=tiny.BATCH), 'bounded=True'),
        (dict(synthesis__bank=tiny.BATCH + 1, generator__bounded=True), 'a positive multiple'),
        (dict(synthesis__shade=0.5), 'set config.synthesis.bank'),
        (
            dict(synthesis__cutmix=1.5, synthesis__bank=tiny.BATCH, generator__bounded=True),
            'cutmix=1.5: expected 0 to 1',
        ),
    ):
        with pytest.raises(ValueError, match=match):
            tiny.method(tiny.config(**changes), sharding.Shards())


def narrow(as_published: bool, adapter_normalise: bool = True) -> Built:
    """Of a student narrower than its teacher."""
    return tiny.built(
        'cpsc', student_width=4, generator__reset_adam=as_published,
        loss__double_softmax=as_published, loss__adapter_normalise=adapter_normalise,
        synthesis__update_student_statistics=as_published,
    )  # fmt: skip


def moves(run: Built, times: int = 3) -> tuple[list[np.ndarray], State, dict]:
    """How far each generator weight moved in each of some steps."""
    state, rows, metrics = run.state, [], {}
    for i in range(times):
        before = jax.device_get(state.generator.params)
        state, metrics = run.method.generator_step(run.frozen, state, jax.random.key(i))
        after = jax.device_get(state.generator.params)
        rows.append(tiny.vector(after) - tiny.vector(before))
    return rows, state, metrics


@pytest.mark.slow
def test_a_new_adam_at_every_step_is_sign_descent():
    rate = tiny.config().generator.lr
    published, _, _ = moves(narrow(True))
    for row in published:
        moved = np.abs(row[row != 0])
        assert np.mean(np.isclose(moved, rate, rtol=1e-2)) > 0.9
    persistent, _, _ = moves(narrow(False))
    assert np.mean(np.isclose(np.abs(persistent[0]), rate, rtol=1e-2)) > 0.9, (
        'the first is the same'
    )
    assert np.mean(np.isclose(np.abs(persistent[2]), rate, rtol=1e-2)) < 0.5


@pytest.mark.slow
def test_the_published_student_keeps_statistics_of_synthesis():
    published, other = (narrow(flag) for flag in (True, False))
    _, state, _ = moves(published, 1)
    assert not tiny.equal(state.student.batch_stats, published.state.student.batch_stats)
    assert tiny.equal(state.student.params, published.state.student.params)
    assert tiny.equal(state.student.opt_state, published.state.student.opt_state)
    _, state, _ = moves(other, 1)
    assert tiny.equal(state.student, other.state.student)


def test_the_published_cross_entropy_is_one_nat_wide():
    low, high = np.log((np.e + tiny.CLASSES - 1) / np.e), np.log(np.e + tiny.CLASSES - 1)
    run = narrow(True)
    for scale in (1e-3, 1.0, 1e3):
        frozen = jax.tree.map(jnp.copy, run.frozen)
        frozen.teacher['params']['fc']['kernel'] *= scale
        _, metrics = run.method.generator_step(frozen, run.state, jax.random.key(0))
        assert low <= metrics['g/ce'] <= high


@pytest.mark.slow
def test_narrow_students_meet_the_contrast_through_an_untrained_adapter():
    run = narrow(False)
    shapes = jax.tree.map(jnp.shape, run.state.extra.adapter)
    assert shapes == {
        'hidden': {'kernel': (4, 4), 'bias': (4,)}, 'out': {'kernel': (4, 8), 'bias': (8,)}
    }  # fmt: skip
    _, state, metrics = moves(run, 1)
    assert tiny.equal(state.extra, run.state.extra)
    _, _, published = moves(narrow(False, adapter_normalise=False), 1)
    assert not np.isclose(metrics['g/scl'], published['g/scl'], rtol=1e-3)
    np.testing.assert_allclose(metrics['g/kd'], published['g/kd'], rtol=1e-5)
    state = jax.eval_shape(
        tiny.method(tiny.config(), sharding.Shards()).init, None, jax.random.key(0)
    )
    assert state.extra.adapter == {}, 'none where widths agree'


def test_the_adapter_starts_as_pytorchs_linear_layers_do():
    """Uniform to one over the root of what a layer sums, biases too."""
    adapter = cpsc.Adapter(400)
    params = adapter.init(jax.random.key(0), jnp.zeros((1, 100)))['params']
    for leaf in jax.tree.leaves(params):
        assert 0.095 < np.abs(leaf).max() <= 0.1
        np.testing.assert_allclose(np.std(leaf), 0.1 / 3**0.5, rtol=0.15)
        assert abs(np.mean(leaf)) < 0.02


def rate_at(config: Any, step: int) -> float:
    """The student's learning rate at an update, read from what the optimiser does."""
    tx = cpsc._student_optimiser(config)
    state = optax.tree_utils.tree_set(tx.init(jnp.zeros(())), count=jnp.asarray(step))
    updates, _ = tx.update(jnp.ones(()), state, jnp.zeros(()))
    return -float(updates)


def test_the_published_schedule_has_the_authors_values():
    config = cifar100.get_config('cpsc,as_published')
    epoch_steps = 50 * config.phases[0].s_steps
    expected = {1: 0.01, 5: 0.05, 10: 0.1, 11: 0.09999, 50: 0.0989, 100: 0.0946, 300: 0.0526,
                500: 0.0081, 600: 6.9e-5}  # fmt: skip
    for epoch, rate in expected.items():
        first, last = (epoch - 1) * epoch_steps, epoch * epoch_steps - 1
        np.testing.assert_allclose(rate_at(config, first), rate, rtol=1e-2, atol=5e-6)
        assert rate_at(config, first) == rate_at(config, last), 'constant within an epoch'


def test_the_default_schedule_warms_up_and_falls_to_zero():
    config = cifar100.get_config('cpsc')
    total, warmup = 150_000, config.student.warmup_steps
    rates = [rate_at(config, step) for step in (0, warmup // 2, warmup, total // 2, total)]
    np.testing.assert_allclose(rates[:3], (0.0, 0.05, 0.1), atol=1e-6)
    assert 0 < rates[3] < 0.06 and abs(rates[4]) < 1e-8


def test_the_generators_rate_is_constant_or_falls_to_zero():
    grads = jnp.ones(())
    for decay in (False, True):
        config = tiny.config(generator__decay=decay)
        tx = cpsc._generator_optimiser(config)
        state = tx.init(grads)
        moved = []
        for _ in range(cpsc._total_steps(config, 'g_steps') + 1):
            updates, state = tx.update(grads, state)
            moved.append(-float(updates))
        np.testing.assert_allclose(moved[0], config.generator.lr, rtol=1e-5)
        assert (moved[-1] < 1e-8) == decay


def test_as_published_sets_every_documented_choice():
    published, ours = (cifar100.get_config(arg) for arg in ('cpsc,as_published', 'cpsc'))
    for field, value in {
        'loss.double_softmax': True, 'generator.reset_adam': True, 'loss.adapter_normalise': False,
        'synthesis.update_student_statistics': True, 'student.schedule': 'published',
        'generator.spread': 0.0, 'generator.decay': False, 'synthesis.crop_padding': 0,
        'synthesis.flip': False, 'loss.temperature': 1.0, 'student.nesterov': False,
        'loss.student_pseudo_labels': True, 'generator.bounded': False,
        'synthesis.bank': 0, 'generator.darkest': 1.0, 'synthesis.shade': 0.0,
        'synthesis.cutmix': 0.0, 'generator.class_brightness': True, 'generator.epsilon': 0.8,
    }.items():  # fmt: skip
        group, name = field.split('.')
        assert published[group][name] == value, field
        assert field in cpsc.__doc__, f'{field} is not told of'
    assert not any((ours.loss.double_softmax, ours.generator.reset_adam))
    assert ours.generator.epsilon == 1e-3
