"""One device or four, fused or step by step: the same run."""

from __future__ import annotations

from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax.sharding import PartitionSpec

from dfkd_jax import parallel, train

SHARDED = ('vmap', 'pmap', 'shard_map')
ROUNDS = 20


@pytest.fixture(scope='module', autouse=True)
def fast_compilation():
    """Programs of these tests run for milliseconds and compile for seconds."""
    jax.config.update('jax_disable_most_optimizations', True)
    yield
    jax.config.update('jax_disable_most_optimizations', False)


@cache
def run(mode: str, fused: bool) -> dict[int, Any]:
    """CPSC-DFKD on smooth networks: the state after rounds 1 and 20, on the host."""
    config = tiny.config(synthesis__crop_padding=1, synthesis__flip=True)
    # Training amplifies rounding: at rates of 0.1 and 1e-3 or with the log form of the
    # imitation term, the modes are 4e-6 apart in the end.
    config.student.lr, config.generator.lr = 0.02, 2e-4
    plan = parallel.make(mode, fused=fused)
    method = tiny.method(config, plan.shards, smooth=True)
    whole = tiny.method(config, parallel.Shards(), smooth=True)
    frozen = plan.replicate(tiny.frozen(smooth=True))
    state = plan.replicate(plan.call(whole.init)(frozen, jax.random.key(0)))
    round_fn = train.make_round(method, config.phases[0], plan)
    states = {}
    for number in range(1, ROUNDS + 1):
        key = jax.random.fold_in(jax.random.key(5), number)
        state, _ = round_fn(frozen, state, key)
        # Waited for at every round: virtual devices on few cores starve each other's collectives.
        jax.block_until_ready(state)
        if number in (1, ROUNDS):
            states[number] = jax.device_get((state.student, state.generator, state.round))
    return states


@pytest.mark.parametrize('mode', ['pmap', 'shard_map'])
def test_sharded_modes_agree_after_twenty_rounds(mode: str):
    """Every number of both networks and optimisers: to 1e-6, and 1e-6 of its size."""
    a, b = run(mode, False)[ROUNDS], run('vmap', False)[ROUNDS]
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-6), a, b)


def test_four_shares_do_what_one_device_does():
    """Draws are equal by design; sums over the batch are taken in another order."""
    for number, tolerance in ((1, 1e-4), (ROUNDS, 1e-2)):
        tiny.close(run('vmap', False)[number], run('jit', False)[number], tolerance)


@pytest.mark.parametrize('mode', ['jit', 'shard_map'])
def test_a_round_as_one_program_equals_its_steps(mode: str):
    tiny.close(run(mode, True)[1], run(mode, False)[1], 1e-4)


@pytest.mark.parametrize('mode', ('jit', *SHARDED))
def test_gradients_have_the_scale_of_the_mean_loss(mode: str):
    """d/dw mean((w x)^2) = 2 w mean(x^2), whatever the number of shares: SGD depends on it."""
    plan = parallel.make(mode)
    x = np.arange(8, dtype=np.float32)

    def step(frozen: Any, w: jax.Array, inputs: jax.Array) -> tuple[jax.Array, dict]:
        def loss_fn(w: jax.Array) -> tuple[jax.Array, tuple]:
            return jnp.mean((w * plan.shards.share(inputs)) ** 2), ()

        (loss, _), gradient = plan.shards.value_and_grad(loss_fn)(w)
        return w - gradient, {'loss': loss}

    w, metrics = plan.compile(step)({}, plan.replicate(jnp.float32(3.0)), x)
    np.testing.assert_allclose(metrics['loss'], 9 * np.mean(x**2), rtol=1e-6)
    np.testing.assert_allclose(w, 3 - 6 * np.mean(x**2), rtol=1e-6)


@pytest.mark.parametrize('mode', ('jit', *SHARDED))
def test_sharing_and_gathering_are_inverse(mode: str):
    plan = parallel.make(mode)
    x = np.random.default_rng(0).standard_normal((8, 3)).astype(np.float32)

    def step(frozen: Any, state: jax.Array, inputs: jax.Array) -> tuple[jax.Array, dict]:
        mine = plan.shards.share(inputs)
        assert mine.shape == (8 // plan.shards.size, 3)
        mean = plan.shards.mean(jnp.mean(mine))
        return state + plan.shards.gather(mine), {'mean': mean}

    state, metrics = plan.compile(step)({}, plan.replicate(jnp.zeros((8, 3))), x)
    np.testing.assert_array_equal(state, x)
    np.testing.assert_allclose(metrics['mean'], x.mean(), rtol=1e-5)


@pytest.mark.parametrize('mode', ['vmap', 'shard_map'])
def test_a_forgotten_mean_is_refused(mode: str):
    """pmap would take the first share's value in silence."""
    plan = parallel.make(mode)

    def step(frozen: Any, state: jax.Array, inputs: jax.Array) -> tuple[jax.Array, dict]:
        return state, {'loss': jnp.mean(plan.shards.share(inputs))}

    with pytest.raises(ValueError, match='out_axes is None|out_specs'):
        plan.compile(step)({}, plan.replicate(jnp.zeros(())), np.arange(8.0, dtype=np.float32))


def test_rows_of_a_prediction_are_spread_over_the_devices():
    plan = parallel.make('shard_map')
    predict = plan.predict(lambda variables, batch: batch * variables)
    out = predict(plan.replicate(jnp.float32(2.0)), np.arange(8, dtype=np.float32))
    np.testing.assert_array_equal(out, 2 * np.arange(8))
    assert len(out.sharding.device_set) == 4
    assert out.sharding.spec == PartitionSpec(parallel.AXIS)


def test_indivisible_batches_are_refused():
    with pytest.raises(ValueError, match='batch=10 does not divide over 4 devices.*8 or 12'):
        parallel.Shards('shards', 4).check('batch', 10)
