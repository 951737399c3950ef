"""Losses: golden values, values by hand, fixed points, gradients, extremes."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from absl.testing import parameterized
from jax.test_util import check_grads

from dfkd_jax import losses
from dfkd_jax.distributed.sharding import Shards
from dfkd_jax.methods import cpsc, dafl, zskt
from dfkd_jax.models.layers import Output

STUDENT = np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32)
TEACHER = np.random.default_rng(1).normal(size=(6, 4)).astype(np.float32)
LABEL = np.array([0, 1, 2, 3, 1, 1])
FEATURES = np.random.default_rng(2).normal(size=(2, 6, 5)).astype(np.float32)


def log_softmax(x: np.ndarray) -> np.ndarray:
    x = x.astype(np.float64)
    return x - np.log(np.sum(np.exp(x), -1, keepdims=True))


def cpsc_terms(student: np.ndarray, teacher: np.ndarray, label: np.ndarray, ikd_form: str):
    """CPSC's terms on logits alone, of the generator and of the student."""
    config = dict(kd=1.0, ikd=1.0, bn=0.0, scl=0.0, ce=1.0, temperature=1.0)
    loss = SimpleNamespace(
        **config,
        ikd_form=ikd_form,
        double_softmax=True,
        student_pseudo_labels=True,
        student='kd',
        bn_form='sum',
    )
    outputs = (Output(logits, logits, {}) for logits in (teacher, student))
    of_generator = cpsc.generator_terms(loss, *outputs, None, {}, label, Shards())
    return of_generator, cpsc.student_terms(loss, student, teacher, label, Shards())


# 1. Equal to the reference implementations.


def test_losses_equal_the_reference(golden: Path):
    given = tiny.arrays(golden / 'losses.npz')
    student, teacher, label = (given[k] for k in ('student_logits', 'teacher_logits', 'labels'))
    views = losses.normalise(np.stack([given['student_features'], given['teacher_features']]))
    generator_mse, student_mse = cpsc_terms(student, teacher, label, 'mse')
    generator_log, student_log = cpsc_terms(student, teacher, label, 'log')

    def contrast(temperature: float) -> jax.Array:
        # The reference scales by the temperature over a base temperature of 0.07.
        loss = jnp.mean(losses.supervised_contrastive(views, label, temperature))
        return loss * temperature / 0.07

    l1 = SimpleNamespace(discrepancy='l1')
    ours = {
        'kl_T1': jnp.mean(losses.kd(student, teacher)),
        'kl_T20': jnp.mean(losses.kd(student, teacher, 20.0)),
        'cpsc_kd': student_mse['kd'],
        'supcon_two_views_t0.07': contrast(0.07),
        'supcon_two_views_t0.5': contrast(0.5),
        'cpsc_ce_on_teacher_probs': generator_mse['ce'],
        'teacher_ce': jnp.mean(losses.cross_entropy(teacher, label)),
        'teacher_ce_argmax': jnp.mean(losses.one_hot(teacher)),
        'class_balance': losses.class_balance(jnp.mean(jax.nn.softmax(teacher), 0)),
        'activation_l1': jnp.mean(dafl.activation(given['teacher_features'])),
        'l1_logits': jnp.mean(zskt.discrepancy(l1, student, teacher)),
        'cpsc_ikd_log_mse': -generator_log['ikd'],
        'cpsc_ikd_log_norm': student_log['ikd'],
        'mse': student_mse['ikd'],
    }
    for name, value in ours.items():
        np.testing.assert_allclose(value, given[f'loss/{name}'], rtol=1e-4, err_msg=name)
    np.testing.assert_allclose(generator_mse['kd'], -given['loss/cpsc_kd'], rtol=1e-4)
    np.testing.assert_allclose(generator_mse['ikd'], -given['loss/mse'], rtol=1e-4)


# 2. By hand, compiled or not.


class ByHandTest(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    @parameterized.parameters(1.0, 4.0)
    def test_kd_is_the_scaled_divergence_of_the_student_from_the_teacher(self, temperature):
        student, teacher = log_softmax(STUDENT / temperature), log_softmax(TEACHER / temperature)
        expected = temperature**2 * np.sum(np.exp(teacher) * (teacher - student), -1)
        loss = self.variant(lambda s, t: losses.kd(s, t, temperature))(STUDENT, TEACHER)
        np.testing.assert_allclose(loss, expected, rtol=1e-5, atol=1e-6)

    @chex.variants(with_jit=True, without_jit=True)
    def test_cross_entropy_is_minus_the_log_probability_of_the_label(self):
        loss = self.variant(losses.cross_entropy)(STUDENT, LABEL)
        np.testing.assert_allclose(loss, -log_softmax(STUDENT)[np.arange(6), LABEL], rtol=1e-5)

    @chex.variants(with_jit=True, without_jit=True)
    def test_cross_entropy_of_probabilities_takes_the_softmax_twice(self):
        expected = -log_softmax(np.exp(log_softmax(STUDENT)))[np.arange(6), LABEL]
        loss = self.variant(losses.cross_entropy_of_probabilities)(STUDENT, LABEL)
        np.testing.assert_allclose(loss, expected, rtol=1e-5)

    @chex.variants(with_jit=True, without_jit=True)
    def test_squared_error_is_a_mean_over_classes(self):
        loss = self.variant(losses.squared_error)(STUDENT, TEACHER)
        np.testing.assert_allclose(loss, np.mean((STUDENT - TEACHER) ** 2, -1), rtol=1e-5)

    @chex.variants(with_jit=True, without_jit=True)
    def test_bn_statistics_adds_unsquared_distances_over_layers(self):
        batch = {
            'a': {'mean': jnp.array([3.0, 4.0]), 'var': jnp.array([1.0, 1.0])},
            'b': {'bn': {'mean': jnp.array([1.0]), 'var': jnp.array([2.5])}},
        }
        running = jax.tree.map(jnp.zeros_like, batch)
        running['a']['var'] = jnp.array([1.0, 3.0])
        loss = self.variant(losses.bn_statistics)(batch, running)
        np.testing.assert_allclose(loss, 5.0 + 2.0 + 1.0 + 2.5, rtol=1e-6)

    @chex.variants(with_jit=True, without_jit=True)
    def test_normalised_bn_statistics_are_relative_and_means_over_channels_and_layers(self):
        batch = {
            'a': {'mean': jnp.array([3.0, 4.0]), 'var': jnp.array([4.0, 8.0])},
            'b': {'bn': {'mean': jnp.array([1.0]), 'var': jnp.array([2.5])}},
        }
        running = {
            'a': {'mean': jnp.array([1.0, 1.0]), 'var': jnp.array([4.0, 16.0])},
            'b': {'bn': {'mean': jnp.array([0.0]), 'var': jnp.array([1.0])}},
        }
        of_a = np.sqrt((1.0**2 + 0.75**2) / 2) + np.sqrt((0.0**2 + 0.5**2) / 2)
        of_b = 1.0 + 1.5
        loss = self.variant(lambda x, y: losses.bn_statistics(x, y, 'normalised'))(batch, running)
        np.testing.assert_allclose(loss, (of_a + of_b) / 2, rtol=1e-4)

    @chex.variants(with_jit=True, without_jit=True)
    def test_supervised_contrastive_is_its_definition(self):
        views = FEATURES / np.linalg.norm(FEATURES, axis=-1, keepdims=True)
        entries, labels = views.reshape(12, 5).astype(np.float64), np.tile(LABEL, 2)
        expected = []
        for a in range(12):
            others = [i for i in range(12) if i != a]
            total = np.sum(np.exp([entries[a] @ entries[i] / 0.5 for i in others]))
            of_class = [i for i in others if labels[i] == labels[a]]
            logs = [entries[a] @ entries[i] / 0.5 - np.log(total) for i in of_class]
            expected.append(-np.mean(logs))
        loss = self.variant(lambda v: losses.supervised_contrastive(v, LABEL, 0.5))(views)
        np.testing.assert_allclose(loss, np.reshape(expected, (2, 6)), rtol=1e-5)

    @chex.variants(with_jit=True, without_jit=True)
    def test_normalise_gives_unit_length(self):
        unit = self.variant(losses.normalise)(FEATURES)
        np.testing.assert_allclose(np.linalg.norm(unit, axis=-1), 1.0, rtol=1e-6)
        np.testing.assert_allclose(
            unit[0, 0], FEATURES[0, 0] / np.linalg.norm(FEATURES[0, 0]), 1e-5
        )


def test_double_softmax_is_one_nat_wide():
    """[log((e + C - 1) / e), log(e + C - 1)]: 1.461 to 2.461 for ten classes."""
    logits = jnp.zeros((2, 10)).at[:, 0].set(1000.0)
    low, high = losses.cross_entropy_of_probabilities(logits, jnp.array([0, 1]))
    np.testing.assert_allclose((low, high), (1.461, 2.461), atol=5e-4)


# 3. Fixed points, gradients, extremes.


def test_classes_are_balanced_where_all_are_as_likely():
    np.testing.assert_allclose(losses.class_balance(jnp.full(4, 0.25)), -np.log(4), rtol=1e-6)
    assert losses.class_balance(jnp.array([0.0, 1.0, 0.0, 0.0])) == 0
    assert losses.class_balance(jnp.array([0.2, 0.3, 0.2, 0.3])) < losses.class_balance(
        jnp.array([0.1, 0.4, 0.1, 0.4])
    )


def test_losses_are_zero_at_the_fixed_point():
    stats = {'bn': {'mean': jnp.arange(3.0), 'var': jnp.ones(3)}}
    assert np.all(losses.kd(TEACHER, TEACHER, 4.0) == 0)
    assert np.all(losses.squared_error(TEACHER, TEACHER) == 0)
    assert losses.bn_statistics(stats, stats) < 1e-11  # the floor that keeps gradients finite
    for fn in (lambda x: jnp.sum(losses.kd(x, TEACHER)),
               lambda x: jnp.sum(losses.squared_error(x, TEACHER))):  # fmt: skip
        np.testing.assert_allclose(jax.grad(fn)(jnp.asarray(TEACHER)), 0.0, atol=1e-6)
    grads = jax.grad(losses.bn_statistics)(stats, stats)
    assert np.all(grads['bn']['mean'] == 0), 'zero, not nan'


def test_a_contrast_without_positives_is_zero():
    views = losses.normalise(FEATURES[:1, :4])
    assert np.all(losses.supervised_contrastive(views, jnp.arange(4), 0.07) == 0)


GRADIENTS = {
    'kd': lambda x: losses.kd(x, TEACHER, 4.0),
    'kd of the teacher': lambda x: losses.kd(STUDENT, x, 4.0),
    'cross_entropy': lambda x: losses.cross_entropy(x, LABEL),
    'cross_entropy_of_probabilities': lambda x: losses.cross_entropy_of_probabilities(x, LABEL),
    'one_hot': losses.one_hot,
    'class_balance': lambda x: losses.class_balance(jnp.mean(jax.nn.softmax(x), 0)),
    'squared_error': lambda x: losses.squared_error(x, TEACHER),
    'supervised_contrastive': lambda x: losses.supervised_contrastive(
        losses.normalise(jnp.stack([x, TEACHER])), LABEL, 0.5
    ),
    'bn_statistics': lambda x: losses.bn_statistics({'var': x}, {'var': TEACHER}),
}


@pytest.mark.parametrize('name', GRADIENTS)
def test_gradients_equal_finite_differences(name: str):
    check_grads(GRADIENTS[name], (jnp.asarray(STUDENT),), 1, 'rev', atol=0.01, rtol=0.01, eps=0.01)


@pytest.mark.parametrize('name', GRADIENTS)
@pytest.mark.parametrize('scale', [0.0, 1e-6, 100.0, 1e4])
def test_losses_and_gradients_are_finite_at_extremes(name: str, scale: float):
    value, grad = jax.value_and_grad(lambda x: jnp.mean(GRADIENTS[name](x)))(scale * STUDENT)
    assert np.isfinite(value) and np.all(np.isfinite(grad))


def test_gradients_point_the_right_way():
    """Down the loss, the student's logit of the teacher's favourite class rises."""
    grad = jax.grad(lambda x: jnp.sum(losses.kd(x, jnp.array([[5.0, 0.0, 0.0]]))))(
        jnp.zeros((1, 3))
    )
    assert grad[0, 0] < 0 < grad[0, 1]
    grad = jax.grad(lambda x: jnp.sum(losses.cross_entropy(x, jnp.array([2]))))(jnp.zeros((1, 3)))
    assert grad[0, 2] < 0 < grad[0, 1]


def test_contrast_prefers_clusters_by_class():
    label = jnp.array([0, 0, 1, 1])
    axes = jnp.eye(2)
    together, mixed = axes[label], axes[jnp.array([0, 1, 0, 1])]
    of = [jnp.mean(losses.supervised_contrastive(v[None], label, 0.5)) for v in (together, mixed)]
    assert of[0] < of[1]


def test_normalised_bn_statistics_know_no_scale_depth_or_width():
    """Ten times as large, twice as wide, three times as deep: another teacher, the same loss."""
    rng = np.random.default_rng(0)
    mean, var = rng.normal(size=8), 1 + rng.random(8)
    batch, running = {'mean': mean + 0.3, 'var': 1.5 * var}, {'mean': mean, 'var': var}

    def distances(scale: float, wide: int, deep: int) -> dict[str, float]:
        def network(layer):
            layer = {'mean': scale * layer['mean'], 'var': scale**2 * layer['var']}
            layer = jax.tree.map(lambda x: jnp.tile(jnp.asarray(x, jnp.float32), wide), layer)
            return {str(i): layer for i in range(deep)}

        trees = network(batch), network(running)
        return {form: float(losses.bn_statistics(*trees, form)) for form in losses.BN_FORMS}

    small, large = distances(1.0, 1, 1), distances(10.0, 2, 3)
    np.testing.assert_allclose(large['normalised'], small['normalised'], rtol=1e-3)
    assert large['sum'] > 100 * small['sum']
    zero = {'a': {'mean': jnp.ones(3), 'var': jnp.ones(3)}}
    grads = jax.grad(lambda x: losses.bn_statistics(x, zero, 'normalised'))(zero)
    assert np.all(np.isfinite(jax.tree.leaves(grads)))
    with pytest.raises(ValueError, match="form='mean'; expected one of"):
        losses.bn_statistics(zero, zero, 'mean')
