"""The modes of `config.parallel` compute the same, and sharded code that does not is an error."""

from __future__ import annotations

import itertools
from functools import cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from jax.sharding import PartitionSpec

from dfkd_jax import data, evaluate
from dfkd_jax.distributed import sharding
from dfkd_jax.distributed.sharding import Shards
from dfkd_jax.loops.round import make_round
from dfkd_jax.models import layers

SHARDED = ('vmap', 'pmap', 'shard_map')
ALL = ('jit', *SHARDED)
COUNT = 4  # virtual devices: see conftest.py


pytestmark = pytest.mark.usefixtures('fast_compilation')


# 1. CPSC-DFKD in every mode.  Smooth networks: rounding does not grow in them by itself.


class Run(NamedTuple):
    start: Any  # states, on the host
    first: Any  # after one round
    last: Any  # after twenty
    metrics: list[dict]  # of each round


@cache
def cpsc_run(mode: str, fused: bool = False) -> Run:
    config = tiny.config(
        synthesis__crop_padding=1,
        synthesis__flip=True,
        student__lr=0.05,
        generator__lr=5e-4,
    )
    plan = sharding.make(mode, fused=fused)
    assert plan.shards.size == (1 if mode == 'jit' else COUNT)
    method = tiny.method(config, plan.shards, smooth=True)
    whole = tiny.method(config, Shards(), smooth=True)
    frozen = plan.replicate(tiny.frozen(smooth=True))
    state = plan.replicate(plan.call(whole.init)(frozen, jax.random.key(0)))
    round_fn = make_round(method, config.phases[0], plan)
    states, metrics = [jax.device_get(state)], []
    for i in range(20):
        state, row = round_fn(frozen, state, jax.random.fold_in(jax.random.key(1), i))
        # Waited for at every round: virtual devices on few cores starve each other's collectives.
        metrics.append(jax.device_get(row))
        if i in (0, 19):
            states.append(jax.device_get(state))
    return Run(*states, metrics)


def gap(a: Any, b: Any) -> float:
    """The relative distance of two trees as vectors."""
    difference = optax.tree_utils.tree_norm(jax.tree.map(lambda x, y: x - y, a, b))
    return float(difference / optax.tree_utils.tree_norm(b))


def assert_same(a: Run, b: Run) -> None:
    assert gap(a.start.student.params, b.start.student.params) == 0
    for name in ('student', 'generator'):
        net, other = getattr(a.last, name), getattr(b.last, name)
        assert gap(net.params, other.params) < 1e-6, name
        assert gap(net.batch_stats, other.batch_stats) < 1e-6, name
    assert gap(a.metrics, b.metrics) < 1e-6
    assert a.last.round == b.last.round == 20


@pytest.mark.slow
@pytest.mark.parametrize('mode', ['pmap', 'shard_map', 'jit'])
def test_modes_agree_after_20_rounds(mode: str):
    """With jit too, since every device draws for the whole batch."""
    assert_same(cpsc_run(mode), cpsc_run('vmap'))


@pytest.mark.slow
@pytest.mark.parametrize('mode', ['jit', 'shard_map'])
def test_a_round_as_one_program_is_the_round_step_by_step(mode: str):
    assert_same(cpsc_run(mode, fused=True), cpsc_run(mode))


@pytest.mark.parametrize('mode', tiny.quick(SHARDED, 'shard_map'))
def test_sgd_moves_as_far_on_shares_as_on_the_whole_batch(mode: str):
    """Adam would hide gradients four times too large."""

    def moved(run: Run) -> Any:
        before, after = run.start.student.params, run.first.student.params
        return jax.tree.map(lambda x, y: y - x, before, after)

    assert gap(moved(cpsc_run(mode)), moved(cpsc_run('jit'))) < 1e-5


NAMES = ('nayer', 'cae', 'fast', 'cmi', 'deepinversion', 'zskt', 'dfq')
QUICK = [('shard_map', 'deepinversion')]


@pytest.mark.parametrize(('mode', 'name'), tiny.quick(itertools.product(SHARDED, NAMES), *QUICK))
def test_a_round_is_the_same_on_every_device(mode: str, name: str):
    """Above all a bank and what its images were made from, byte for byte."""
    ends = []
    for each in ('jit', mode):
        config, plan = tiny.config(name), sharding.make(each, fused=False)
        method, whole = tiny.method(config, plan.shards), tiny.method(config, Shards())
        frozen = plan.replicate(tiny.frozen())
        state = plan.replicate(plan.call(whole.init)(frozen, jax.random.key(0)))
        round_fn = make_round(method, config.phases[0], plan)
        ends.append(jax.device_get(round_fn(frozen, state, jax.random.key(1))))
    (alone, metrics), (shared, shared_metrics) = ends
    tiny.close(shared.student.params, alone.student.params, 1e-4)
    if name in ('zskt', 'dfq'):
        tiny.close(shared_metrics, metrics, 1e-4)
        return
    np.testing.assert_array_equal(alone.extra.bank.label, shared.extra.bank.label)
    np.testing.assert_array_equal(alone.extra.bank.source, shared.extra.bank.source)
    difference = alone.extra.bank.image.astype(int) - shared.extra.bank.image
    assert np.abs(difference).max() <= 1  # a byte may be rounded to either side


# 2. Shards.


def compute(mode: str, fn: Any, *inputs: Any) -> Any:
    """What `fn(shards, *inputs)` returns when compiled in a mode."""
    plan = sharding.make(mode)

    def step(frozen: Any, state: Any, inputs: Any) -> tuple[Any, Any]:
        return state, fn(plan.shards, *inputs)

    return jax.device_get(plan.compile(step)(None, plan.replicate(jnp.zeros(3)), inputs)[1])


BATCH = np.random.default_rng(0).normal(size=(8, 3)).astype(np.float32)


@pytest.mark.parametrize('mode', ALL)
def test_shares_gather_to_the_whole_batch(mode: str):
    assert np.array_equal(compute(mode, lambda s, x: s.gather(s.share(x)), BATCH), BATCH)
    label = np.arange(8) % 3
    assert np.array_equal(compute(mode, lambda s, x: s.gather(s.share(x)), label), label)
    rows = {'jit': 8}.get(mode, 2)
    assert compute(mode, lambda s, x: jnp.asarray(s.share(x).shape[0]), BATCH) == rows


@pytest.mark.parametrize('mode', ALL)
def test_means_are_over_all_shares(mode: str):
    out = compute(mode, lambda s, x: s.mean({'a': jnp.mean(s.share(x))}), BATCH)
    np.testing.assert_allclose(out['a'], BATCH.mean(), rtol=1e-5)


@pytest.mark.parametrize('mode', ALL)
def test_gradients_are_those_of_the_mean_loss(mode: str):
    """Through a gather too; with arguments and auxiliary outputs."""
    target = np.arange(8, dtype=np.float32)

    def fn(shards: Shards, x: Any, y: Any, scale: Any) -> Any:
        def loss_fn(params: Any, scale: Any) -> tuple[Any, Any]:
            out = shards.share(x) @ params['w']
            whole = shards.gather(out)
            loss = scale * jnp.mean((out - shards.share(y)) ** 2) + jnp.mean(jnp.sin(whole))
            return loss, shards.mean(jnp.mean(out))

        (loss, mean), grads = shards.value_and_grad(loss_fn)({'w': jnp.ones(3)}, scale)
        return loss, mean, grads['w']

    loss, mean, grads = compute(mode, fn, BATCH, target, np.float32(2.0))
    out = BATCH @ np.ones(3)
    expected = 2.0 * BATCH.T @ (2 * (out - target)) / 8 + BATCH.T @ np.cos(out) / 8
    np.testing.assert_allclose(loss, 2 * np.mean((out - target) ** 2) + np.mean(np.sin(out)), 1e-5)
    np.testing.assert_allclose(mean, out.mean(), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(grads, expected, rtol=1e-4)


@pytest.mark.parametrize('shape', [(3, 3, 3, 4), (3, 3, 1, 3), (4, 4, 4, 3)])
@pytest.mark.parametrize('mode', ALL)
def test_kernels_have_one_gradient_in_parts_and_in_every_mode(mode: str, shape, monkeypatch):
    """`layers.convolve` with parts smaller than a share, by channels, and transposed."""
    image, kernel = (
        jax.random.normal(jax.random.key(i), x) for i, x in enumerate([(16, 6, 6, 3), shape])
    )

    def convolution(image, kernel):
        if shape[0] == 4:
            return layers.convolve_transposed(image, kernel)
        how = {'dimension_numbers': ('NHWC', 'HWIO', 'NHWC'), 'feature_group_count': 3 // shape[2]}
        return layers.convolve(image, kernel, (1, 1), ((1, 1), (1, 1)), **how)

    def new_kernel(mode: str) -> jax.Array:
        plan = sharding.make(mode)

        def step(image, kernel, inputs):
            del inputs

            def loss(kernel):
                out = convolution(plan.shards.share(image), kernel)
                return jnp.mean(jnp.sin(out)), ()

            (total, _), gradient = plan.shards.value_and_grad(loss)(kernel)
            return kernel - gradient, {'total': plan.shards.mean(total)}

        given = (plan.replicate(x) for x in (image, jnp.copy(kernel), jnp.zeros(())))
        return plan.compile(step)(*given)[0]

    wanted = new_kernel('jit')
    monkeypatch.setattr(layers, 'PART', 2 * image[0].size)
    tiny.close(new_kernel(mode), wanted, 1e-5)


def test_batch_norm_sees_the_whole_batch():
    image = jax.random.normal(jax.random.key(0), (8, tiny.SIZE, tiny.SIZE, tiny.CHANNELS))
    variables = tiny.frozen().teacher

    def fn(shards: Shards, variables: Any, x: Any) -> Any:
        module = tiny.Classifier(axis_name=shards.axis)
        out, new = module.apply(variables, shards.share(x), train=True, mutable=['batch_stats'])
        return out.statistics, new['batch_stats'], shards.gather(out.logits)

    whole, shares = (compute(mode, fn, variables, image) for mode in ('jit', 'vmap'))
    tiny.close(shares, whole, 1e-5)


@pytest.mark.parametrize('mode', ['vmap', 'shard_map'])
@pytest.mark.parametrize('forgotten', ['gradients', 'metrics'])
def test_a_forgotten_mean_is_an_error(mode: str, forgotten: str):
    """(pmap alone would take the first share's value in silence.)"""
    plan = sharding.make(mode)

    def step(frozen: Any, state: Any, x: Any) -> tuple[Any, Any]:
        mine = jnp.mean(plan.shards.share(x))
        if forgotten == 'gradients':
            return state - mine, {}
        return state, {'g/loss': mine}

    with pytest.raises(ValueError, match='out_axes|out_specs'):
        plan.compile(step)(None, plan.replicate(jnp.zeros(())), BATCH)


def test_a_batch_that_does_not_divide_is_an_error():
    with pytest.raises(ValueError, match=r'size=10 does not divide over 4 .* such as 8 or 12'):
        Shards('shards', 4).check('size', 10)
    with pytest.raises(ValueError, match='such as 4 or 4|such as 4'):
        Shards('shards', 4).check('size', 3)
    Shards('shards', 4).check('size', 12)
    Shards().check('size', 3)


# 3. Plans.


def test_an_unknown_mode_is_an_error():
    with pytest.raises(ValueError, match="'tpu'; expected one of jit, pmap, shard_map"):
        sharding.make('tpu')


def test_a_plan_can_use_some_of_the_devices():
    devices = jax.devices()[:2]
    assert sharding.make('shard_map', devices).shards.size == 2
    assert sharding.make('pmap', devices).shards.size == 2
    assert sharding.make('jit').shards == Shards()


def test_scans_are_left_to_accelerators():
    assert not sharding.make('jit').fused  # the tests run on the CPU
    assert sharding.make('jit', fused=True).fused


def test_rows_of_a_prediction_are_spread_over_the_devices():
    plan = sharding.make('shard_map')
    predict = plan.predict(lambda variables, batch: batch * variables)
    out = predict(plan.replicate(jnp.float32(2.0)), np.arange(8, dtype=np.float32))
    np.testing.assert_array_equal(out, 2 * np.arange(8))
    assert len(out.sharding.device_set) == COUNT
    assert out.sharding.spec == PartitionSpec(sharding.AXIS)


@pytest.mark.parametrize('mode', ['jit', 'shard_map'])
def test_evaluation_spreads_any_number_of_images_over_the_devices(mode: str):
    plan = sharding.make(mode)
    images = np.random.default_rng(0).integers(0, 255, (10, tiny.SIZE, tiny.SIZE, 3), np.uint8)
    label = np.arange(10, dtype=np.int32) % tiny.CLASSES
    facts = data.Facts('x', 4, (), images.shape[1:], (0.5,) * 3, (0.25,) * 3, 0, 10, False, 0)
    test = data.Dataset(facts, 10, lambda i: (images[i], label[i]), images, label)
    classify = evaluate.classifier(plan, tiny.Classifier(), facts)
    variables = tiny.frozen().teacher
    predicted, labels = classify(plan.replicate(variables), test, 7)  # 7 is raised to 8, twice
    logits = tiny.Classifier().apply(variables, (images / 255.0 - 0.5) / 0.25).logits
    assert np.array_equal(predicted, np.argmax(logits, -1))
    assert np.array_equal(labels, label)
    assert evaluate.accuracy(np.array([1, 2, 3, 4]), np.array([1, 2, 3, 0])) == 75.0


def test_a_teacher_that_is_worse_than_its_file_says_is_told(capsys: pytest.CaptureFixture[str]):
    """As with another normalisation than that of its training."""
    plan, module, variables = sharding.make('jit'), tiny.Classifier(), tiny.frozen().teacher
    images = np.random.default_rng(0).integers(0, 255, (40, tiny.SIZE, tiny.SIZE, 3), np.uint8)
    facts = data.Facts('x', 4, (), images.shape[1:], (0.5,) * 3, (0.25,) * 3, 0, 40, False, 0)
    config = tiny.config('cpsc')
    config.data = dict(name='x')
    config.teacher, config.eval_batch_size = dict(model='tiny'), 8
    logits = module.apply(variables, (images / 255.0 - 0.5) / 0.25).logits
    label = np.array(np.argmax(logits, -1), np.int32)
    label[:2] = (label[:2] + 1) % tiny.CLASSES  # 95 % are right

    def measured(mean: float, stated: float | None) -> evaluate.OfTeacher:
        about = facts._replace(mean=(mean,) * 3)
        test = data.Dataset(about, 40, lambda i: (images[i], label[i]), images, label)
        return evaluate.teacher(config, plan, module, variables, test, lambda: stated)

    assert measured(0.5, 96.0).accuracy == 95.0 and not measured(0.5, 96.0).warnings
    assert not measured(0.0, None).warnings
    told = measured(0.0, 96.0).warnings['teacher_unlike_its_file']
    assert 'states an accuracy of 96.00 %' in told and '--config.data.mean' in told
    assert 'of the 40 test images' in capsys.readouterr().out
    assert evaluate.teacher(config, plan, module, variables, None) == evaluate.OfTeacher()


@pytest.mark.parametrize('fused', [False, True])
def test_repeat_counts_keys_and_averages_metrics(fused: bool):
    def step(frozen: Any, state: Any, inputs: Any) -> tuple[Any, Any]:
        key, i = inputs
        return state + 1, {'g/i': jnp.asarray(i, jnp.float32), 'g/key': jax.random.uniform(key)}

    key = jax.random.key(0)
    state, metrics = sharding.repeat(step, None, jnp.zeros(()), key, 5, fused)
    assert state == 5 and metrics['g/i'] == 2.0
    assert sharding.repeat(step, None, state, key, 0, fused) == (state, {}), 'not nan'
    draw = sharding.numbered(lambda frozen, state, key: (state, {'g/x': jax.random.uniform(key)}))
    _, metrics = sharding.repeat(draw, None, state, key, 3, fused)
    each = [jax.random.uniform(jax.random.fold_in(key, i)) for i in range(3)]
    np.testing.assert_allclose(metrics['g/x'], np.mean(each), rtol=1e-6)
