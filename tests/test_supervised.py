"""Training on stored images: a step on shares of a batch, mixtures, and learning rates."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from dfkd_jax import contract, data
from dfkd_jax.configs import common, digits
from dfkd_jax.distributed import sharding
from dfkd_jax.errors import ConfigError
from dfkd_jax.loops import supervised

pytestmark = pytest.mark.usefixtures('fast_compilation')


FACTS = data.Facts('set', 4, ('a', 'b', 'c', 'd'), (6, 6, 1), (0.5,), (0.5,), 9, 9, True, 1)


def stepped(shards: int = 1, **recipe: Any) -> tuple[supervised.State, dict[str, Any]]:
    """One step of distillation on images of 12 pixels, for a network of 8."""
    config = tiny.config('diffdfkd')
    config.distil.update(dict(crop_padding=1) | recipe)
    plan = sharding.make('vmap', jax.devices()[:shards])
    size = tiny.SIZE if not config.distil.random_resized_crop else 12
    facts = FACTS._replace(image_shape=(tiny.SIZE, tiny.SIZE, tiny.CHANNELS))
    nets, tx = tiny.nets(config, plan.shards.axis), supervised.optimiser(config.distil, 1)
    step = supervised.make_step(nets.student, nets.teacher, tx, config.distil, facts, plan.shards)
    variables = tiny.nets(config).student.init(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))
    net = contract.start(variables['params'], variables['batch_stats'], tx)
    state = supervised.State(jnp.zeros((), jnp.int32), net)
    images = np.random.default_rng(0).integers(0, 255, (8, size, size, 3)).astype(np.uint8)
    inputs = ((images, np.zeros(8, np.int32)), jax.random.key(1))
    return jax.device_get(plan.compile_rows(step)(tiny.frozen().teacher, state, inputs))


@pytest.mark.parametrize(
    'recipe',
    [
        pytest.param({}, marks=pytest.mark.slow),
        pytest.param({'random_resized_crop': True}, marks=pytest.mark.slow),
        {'shade': 0.5, 'cutmix': 0.5},
    ],
)
def test_distillation_on_shares_is_that_on_the_whole_batch(recipe: dict):
    one, four = stepped(1, **recipe), stepped(4, **recipe)
    tiny.close(four[0].net.params, one[0].net.params, 1e-5)
    # 900 times a divergence of 4e-5, whose last digits are rounding.
    tiny.close(four[1]['loss'], one[1]['loss'], 1e-3)


@pytest.mark.slow
def test_mixing_changes_what_is_seen_and_needs_a_teacher():
    assert stepped()[1]['loss'] != stepped(shade=0.5, cutmix=0.5)[1]['loss']
    config = digits.get_config('cpsc')
    config.teach.cutmix = 0.5
    with pytest.raises(ConfigError, match='which only a teacher can tell'):
        supervised.prepare(config, 'teach', 'resnet8', 1)


def test_learning_rates_fall_at_milestones():
    recipe = common.teach(epochs=10, batch_size=1, lr=0.4, milestones=(5, 8), weight_decay=0.0)
    recipe.momentum = 0.0
    tx = supervised.optimiser(recipe, epoch_steps=2)
    state, steps = tx.init(1.0), []
    for _ in range(20):
        update, state = tx.update(1.0, state, 1.0)
        steps.append(-float(update))
    np.testing.assert_allclose(steps, [0.4] * 10 + [0.04] * 6 + [0.004] * 4, rtol=1e-5)
