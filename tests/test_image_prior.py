"""Teachers without batch norms: every method runs, with a prior in the place of statistics."""

from __future__ import annotations

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from dfkd_jax.contract import Frozen
from dfkd_jax.distributed import sharding
from dfkd_jax.loops.round import make_round
from dfkd_jax.methods import METHODS
from dfkd_jax.methods.shared import image_prior
from dfkd_jax.methods.shared.trajectories import FrozenPrior
from dfkd_jax.models.resnet_gn import GroupNormResNet
from dfkd_jax.models.vit import ViT

pytestmark = pytest.mark.usefixtures('fast_compilation')

TEACHERS = {
    'group norms': GroupNormResNet(1, (4, 8), 2, num_classes=tiny.CLASSES),
    'tokens': ViT(8, 1, 2, patch=4, image_size=tiny.SIZE, num_classes=tiny.CLASSES),
}


def drawn(teacher: Any) -> Any:
    """Weights of a teacher, without a program that draws them."""
    image = jax.ShapeDtypeStruct((1, tiny.SIZE, tiny.SIZE, tiny.CHANNELS), jnp.float32)
    shapes = jax.eval_shape(lambda x: teacher.init(jax.random.key(0), x), image)
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: 0.3 * rng.standard_normal(x.shape, np.float32), shapes)


def extra(method: str) -> Any:
    """What a method reads beside the teacher: `tiny.frozen` has it too, and computes a teacher."""
    if method == 'diffdfkd':
        return FrozenPrior(jax.tree.map(jnp.asarray, tiny.prior_params()), ())
    rng = np.random.default_rng(1)
    return rng.standard_normal((tiny.CLASSES, tiny.TABLE['embedding']), np.float32)


def round_of(config: Any, teacher: Any, mode: str = 'jit') -> tuple[Any, Any, Any]:
    """The state before and after one round on the tiny networks, and the round's metrics."""
    plan = sharding.make(mode)
    make, nets = METHODS[config.method], tiny.nets(config)._replace(teacher=teacher)
    frozen = plan.replicate(Frozen({'batch_stats': {}} | drawn(teacher), extra(config.method)))
    shared = tiny.nets(config, plan.shards.axis)._replace(teacher=teacher)
    state = plan.call(make(config, nets, sharding.Shards()).init)(frozen, jax.random.key(0))
    before = jax.device_get(state)
    one = make_round(make(config, shared, plan.shards), config.phases[0], plan)
    return before, *one(frozen, state, jax.random.key(1))


# One for each place where a method has the prior, on one teacher; the others are slow.
FAST = [('deepinversion', 'group norms'), ('dfq', 'tokens')]


def cases() -> list[Any]:
    """Every method with both teachers."""
    every = [(name, teacher) for name in METHODS for teacher in TEACHERS]
    return [case if case in FAST else pytest.param(*case, marks=pytest.mark.slow) for case in every]


@pytest.mark.parametrize(('name', 'teacher'), cases())
def test_every_method_runs_a_round(name: str, teacher: str):
    config = tiny.config(name)
    if 'attention' in config.loss and teacher == 'tokens':
        config.loss.attention = 0.0  # the student has no map of 2 x 2 tokens; see below
    config.image_prior.update(tv=0.1, l2=0.01)
    config.phases[0].g_steps = config.phases[0].s_steps = 1
    before, state, metrics = round_of(config, TEACHERS[teacher])
    chex.assert_trees_all_equal_shapes_and_dtypes(state, before)
    chex.assert_tree_all_finite((state, metrics))
    if name != 'diffdfkd':  # whose student learns when all images are there
        assert not tiny.equal(state.student.params, before.student.params)
    compares = bool(config.loss.get('bn'))
    assert compares == (name not in ('dafl', 'dfad', 'zskt', 'noise'))
    assert ('g/prior_tv' in metrics, 'g/prior_l2' in metrics) == (compares, compares)
    assert 'g/bn' not in metrics


@pytest.mark.slow
@pytest.mark.parametrize('name', ['nayer', 'deepinversion', 'cpsc', 'dfq', 'diffdfkd'])
def test_the_prior_is_a_part_of_the_loss(name: str):
    """Of the first step, on the same images; and it is gone where its weights or L_BN's are 0."""
    config = tiny.config(name)
    config.phases[0].g_steps = config.phases[0].s_steps = 1
    config.image_prior.update(tv=0.75, l2=0.5)
    metrics = round_of(config, TEACHERS['group norms'])[2]
    config.image_prior.update(tv=0.0, l2=0.0)
    without = round_of(config, TEACHERS['group norms'])[2]
    assert set(metrics) - set(without) == {'g/prior_tv', 'g/prior_l2'}
    added = 0.75 * metrics['g/prior_tv'] + 0.5 * metrics['g/prior_l2']
    assert added > 0.1
    np.testing.assert_allclose(metrics['g/loss'] - without['g/loss'], added, rtol=1e-4)


@pytest.mark.slow
def test_shares_of_a_batch_have_the_prior_of_the_whole():
    config = tiny.config('dfq')
    config.image_prior.update(tv=1.0, l2=1.0)
    config.phases[0].g_steps = config.phases[0].s_steps = 1
    whole, parts = (round_of(config, TEACHERS['group norms'], mode)[1:] for mode in ('jit', 'vmap'))
    tiny.close(parts[1], whole[1], 1e-4)
    tiny.close(parts[0].student.params, whole[0].student.params, 1e-3)


def test_values_by_hand():
    """Of one image of four grey pixels, 1 2 / 4 8, and of a constant one."""
    image = jnp.asarray([[1.0, 2.0], [4.0, 8.0]]).reshape(1, 2, 2, 1)
    right, down = np.sqrt((1 + 16) / 2), np.sqrt((9 + 36) / 2)
    expected = right + down + abs(4 - 2) + abs(1 - 8)
    both = jnp.concatenate([image, jnp.full_like(image, 3.0)])
    np.testing.assert_allclose(image_prior.total_variation(both), [expected, 0], atol=1e-5)
    np.testing.assert_allclose(
        image_prior.root_mean_square(both), [np.sqrt(85 / 4), 3.0], rtol=1e-6
    )
    gradient = jax.grad(lambda x: image_prior.total_variation(x).sum())(both)
    assert np.isfinite(gradient).all() and not gradient[1].any()


def test_no_prior_beside_statistics():
    config = tiny.config('nayer')
    config.image_prior.update(tv=0.1, l2=0.01)
    without = Frozen({'params': {}, 'batch_stats': {}})
    with_norms = Frozen({'params': {}, 'batch_stats': {'bn1': {'mean': 0.0, 'var': 1.0}}})
    image = jnp.ones((2, 4, 4, 1))
    assert image_prior.loss(config, with_norms, image) == (0.0, {})
    assert set(image_prior.loss(config, without, image)[1]) == {'prior_tv', 'prior_l2'}
    config.loss.bn = 0.0
    assert image_prior.loss(config, without, image) == (0.0, {})
