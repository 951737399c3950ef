"""CAE-DFKD: the diffusion of embeddings, the contrast of their images, and the degenerate cases."""

from __future__ import annotations

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from dfkd_jax import losses
from dfkd_jax.configs import common
from dfkd_jax.contract import Method, State
from dfkd_jax.distributed import sharding
from dfkd_jax.methods import cae

pytestmark = pytest.mark.usefixtures('fast_compilation')


@pytest.mark.parametrize(
    ('batch', 'classes', 'sources'),
    [(400, 100, 4), (120, 10, 4), (40, 10, 8), (24, 5, 4), (9, 9, 1)],
)
def test_every_class_meets_every_source(key, batch: int, classes: int, sources: int):
    label, source = map(np.asarray, cae.classes_and_sources(key, batch, classes, sources))
    assert label.shape == source.shape == (batch,) and set(source) == set(range(sources))
    pairs = np.zeros((classes, sources), int)
    np.add.at(pairs, (label, source), 1)
    assert np.all(pairs == pairs[:, :1]), 'a class meets each source equally often'
    if batch >= classes * sources:
        assert pairs.min() >= batch // (classes * sources)
        assert pairs.max() <= pairs.min() + 1, 'what is left over is spread'
    else:
        assert set(pairs[:, 0]) == {0, 1}, 'distinct classes, where not all have room'


def test_what_is_left_over_is_drawn_anew():
    drawn = {
        tuple(np.asarray(cae.classes_and_sources(jax.random.key(i), 24, 5, 4)[0])[-4:])
        for i in range(20)
    }
    assert len(drawn) > 1


@pytest.mark.parametrize('name', cae.SOURCES)
def test_sources_have_zero_mean_and_unit_variance(key, name: str):
    drawn = np.asarray(cae.SOURCES[name](key, (200_000,)), np.float64)
    assert abs(drawn.mean()) < 0.01 and abs(drawn.std() - 1) < 0.01
    # And are themselves: by the fourth moment, 3, 9/5, 6 and 1.
    fourth = {'normal': 3.0, 'uniform': 1.8, 'laplace': 6.0, 'sign': 1.0}[name]
    assert abs(np.mean(drawn**4) - fourth) < 0.05 * fourth


def test_each_image_has_the_noise_of_its_source(key):
    noise = common.ConfigDict(
        dict(sources=('sign', 'normal', 'sign'), magnitudes=(0.5, 1.0, 2.0), subspaces=False)
    )
    source = jnp.asarray([0, 1, 2, 2, 1, 0])
    drawn = np.asarray(cae.diffuse(key, source, 500, noise))
    np.testing.assert_array_equal(np.abs(drawn[[0, 5]]), 0.5)
    np.testing.assert_array_equal(np.abs(drawn[[2, 3]]), 2.0)
    np.testing.assert_allclose(drawn[[1, 4]].std(), 1, atol=0.1)
    assert len(np.unique(drawn, axis=0)) == 6, 'drawn for every image'


def test_in_subspaces_each_source_has_dimensions_of_its_own(key):
    noise = common.ConfigDict(
        dict(sources=('sign', 'normal'), magnitudes=(0.5, 1.0), subspaces=True)
    )
    drawn = np.asarray(cae.diffuse(key, jnp.asarray([0, 1, 1, 0]), 400, noise))
    assert np.all(drawn[[0, 3], 1::2] == 0) and np.all(drawn[[1, 2], ::2] == 0)
    # The energy of all dimensions in a half of them.
    np.testing.assert_allclose(np.square(drawn[[0, 3]]).mean(), 0.25, rtol=1e-6)
    np.testing.assert_allclose(np.square(drawn[[1, 2]]).mean(), 1, rtol=0.2)


def test_diversity_is_how_alike_the_images_of_a_class_are():
    """By hand; an image that is alone in its class counts for nothing, and has no gradient."""
    features = jnp.asarray([[2.0, 0.0], [0.6, 0.8], [0.0, 1.0], [-1.0, 0.0]])
    label = jnp.asarray([0, 0, 0, 1])
    config = common.ConfigDict(dict(loss=dict(diversity_temperature=0.5)))

    def loss(features: Any) -> jax.Array:
        return cae.diversity(config, sharding.Shards(), features, label)

    e = np.exp
    pairs = [(0.6, 0.0), (0.6, 0.8), (0.0, 0.8)]  # of images 0, 1 and 2 to the two others
    wanted = np.mean([0.5 * np.log((e(2 * a) + e(2 * b)) / 2) for a, b in pairs])
    np.testing.assert_allclose(loss(features), wanted, rtol=1e-6)
    grads = jax.grad(loss)(features)
    assert np.all(np.isfinite(grads)) and not np.any(grads[3]) and np.all(np.any(grads[:3], 1))
    alone = jnp.asarray([0, 1, 2, 3])
    assert cae.diversity(config, sharding.Shards(), features, alone) == 0


def test_positives_are_the_same_class_from_another_source():
    """On four images in the plane, by hand."""
    features = jnp.asarray([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [-1.0, 0.0]])
    label, source = np.array([0, 0, 0, 1]), np.array([0, 1, 0, 0])
    positive = (label[:, None] == label[None]) & (source[:, None] != source[None])
    got = losses.contrastive(features, jnp.asarray(positive), 0.5)
    e = np.exp
    # Image 0 has one positive, 1, at similarity 0; others: 2 at 1 and 3 at -1 (over 0.5).
    of_0 = -np.log(1 / (1 + e(2) + e(-2)))
    # Image 1 has two, 0 and 2, all at similarity 0, as is 3.
    of_1 = -np.log(1 / 3)
    np.testing.assert_allclose(got, [of_0, of_1, of_0, 0.0], rtol=1e-6)


def test_images_of_one_class_and_source_are_neither_drawn_together_nor_pushed_apart():
    """The mean counts the images that have a positive; by hand."""
    features = jnp.asarray([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0], [-1.0, 0.0]])
    label, source = jnp.asarray([0, 0, 0, 1]), jnp.asarray([0, 0, 1, 0])
    config = common.ConfigDict(dict(loss=dict(contrast_temperature=0.5)))
    got = cae.cncl(config, sharding.Shards(), features, label, source)
    e = np.exp
    # Image 0: positive 2 at similarity 0; other class 3 at -1.  Image 1: 2 at .8, 3 at -.6.
    of_0 = -np.log(1 / (1 + e(-2)))
    of_1 = -np.log(e(1.6) / (e(1.6) + e(-1.2)))
    # Image 2: positives 0 at 0 and 1 at .8; other class 3 at 0.  Image 3 has no positive.
    whole = 1 + e(1.6) + 1
    of_2 = -(np.log(1 / whole) + np.log(e(1.6) / whole)) / 2
    np.testing.assert_allclose(got, (of_0 + of_1 + of_2) / 3, rtol=1e-6)


def synthesised(method: Method, frozen: Any, state: State, seed: int = 0) -> State:
    for i, step in enumerate((method.begin, method.generator_step, method.finish)):
        state, _ = step(frozen, state, jax.random.key(10 * seed + i))
    return state


def test_without_noise_a_class_has_one_image():
    """Zero magnitudes: what is left of CEND is the embedding alone."""
    _, method, frozen, state = tiny.built('cae', noise__magnitudes=(0.0,) * 4)
    state, _ = method.begin(frozen, state, jax.random.key(0))
    state, _ = method.generator_step(frozen, state, jax.random.key(1))
    best, label = np.asarray(state.extra.batch.best), np.asarray(state.extra.batch.label)
    for c in range(tiny.CLASSES):
        of = best[label == c]
        np.testing.assert_allclose(of, np.broadcast_to(of[:1], of.shape), atol=1e-6)
    assert np.abs(best[label == 0][0] - best[label == 1][0]).max() > 1e-3


def test_one_source_has_no_positives():
    """N = 1: no two images of a class differ in their source, and the contrast has nothing."""
    _, method, frozen, state = tiny.built(
        'cae', noise__sources=('normal',), noise__magnitudes=(1.0,)
    )
    state = synthesised(method, frozen, state)
    _, metrics = method.student_step(frozen, state, jax.random.key(5))
    assert metrics['s/contrast'] == 0
    np.testing.assert_allclose(metrics['s/loss'], metrics['s/kd'], rtol=1e-6)


@pytest.mark.slow
def test_noise_is_drawn_at_every_step_or_once_a_batch():
    for fresh in (True, False):
        _, method, frozen, state = tiny.built(
            'cae',
            noise__fresh=fresh,
            generator__lr=0.0,
            synthesis__crop_padding=0,
            synthesis__flip=False,
        )
        state, _ = method.begin(frozen, state, jax.random.key(0))
        totals = [
            float(method.generator_step(frozen, state, jax.random.key(i))[1]['g/loss'])
            for i in range(3)
        ]
        assert (len(set(totals)) == 1) == (not fresh)


@pytest.mark.slow
def test_the_generator_and_its_adam_stay_unless_told():
    _, method, frozen, state = tiny.built('cae', generator__reset_adam=False)
    state = synthesised(method, frozen, state)
    after, _ = method.begin(frozen, state.replace(round=jnp.asarray(10)), jax.random.key(1))
    chex.assert_trees_all_equal(after.generator, state.generator)
    _, method, frozen, state = tiny.built('cae', generator__life=10, generator__reset_adam=True)
    state = synthesised(method, frozen, state)
    after, _ = method.begin(frozen, state, jax.random.key(1))
    chex.assert_trees_all_equal(after.generator.params, state.generator.params)
    assert not any(np.any(x) for x in jax.tree.leaves(after.generator.opt_state))
    after, _ = method.begin(frozen, state.replace(round=jnp.asarray(10)), jax.random.key(1))
    kernel = [s.generator.params['project']['kernel'] for s in (after, state)]
    assert not np.allclose(*kernel)


@pytest.mark.parametrize(
    ('changes', 'terms'),
    [
        ({}, {'kd', 'contrast'}),
        pytest.param({'loss__contrast': 0.0}, {'kd'}, marks=pytest.mark.slow),
        pytest.param({'loss__contrast_of': 'images'}, {'kd', 'contrast'}, marks=pytest.mark.slow),
        ({'synthesis__mixup': 0.4}, {'kd', 'contrast'}),
    ],
)
def test_the_student_of_each_ablation(changes: dict, terms: set[str]):
    _, method, frozen, state = tiny.built('cae', **changes)
    state = synthesised(method, frozen, state)
    after, metrics = method.student_step(frozen, state, jax.random.key(5))
    assert {name.removeprefix('s/') for name in metrics} == terms | {'loss', 'agreement'}
    chex.assert_tree_all_finite((after.student, metrics))
    if 'contrast' in terms:
        assert metrics['s/contrast'] > 0


def test_images_of_one_source_do_not_attract_but_their_augmentations_may():
    """`contrast_of='images'` needs no class and no source."""
    _, method, frozen, state = tiny.built('cae', loss__contrast_of='images')
    state = synthesised(method, frozen, state)
    key = jax.random.key(5)
    _, metrics = method.student_step(frozen, state, key)
    bank = state.extra.bank.replace(label=0 * state.extra.bank.label)
    other = state.replace(extra=state.extra.replace(bank=bank))
    _, same = method.student_step(frozen, other, key)
    assert metrics['s/contrast'] == same['s/contrast']
    _, method, frozen, _ = tiny.built('cae')
    _, of_sources = method.student_step(frozen, state, key)
    _, changed = method.student_step(frozen, other, key)
    assert of_sources['s/contrast'] != changed['s/contrast']


def test_mistakes():
    for changes, match in (
        (dict(noise__sources=('normal', 'pink')), 'one or more of normal, uniform, laplace, sign'),
        (dict(noise__sources=()), 'one or more of'),
        (dict(noise__magnitudes=(1.0,)), 'expected 4 numbers of 0 or more'),
        (dict(noise__magnitudes=(1.0, 1.0, 1.0, -1.0)), 'expected 4 numbers of 0 or more'),
        (
            dict(noise__sources=('sign',) * 3, noise__magnitudes=(1.0,) * 3),
            'does not divide over 3 sources',
        ),
        (dict(loss__contrast_of='pixels'), "expected 'sources' or 'images'"),
    ):
        with pytest.raises(ValueError, match=match):
            tiny.method(tiny.config('cae', **changes), sharding.Shards())
