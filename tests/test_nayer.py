"""NAYER: one step against the reference implementation, and what makes it NAYER."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from reference import Sided, near

from dfkd_jax import contract, losses, models, port
from dfkd_jax.configs import cifar10, cifar100, common
from dfkd_jax.contract import Method, State
from dfkd_jax.distributed import sharding
from dfkd_jax.methods import nayer
from dfkd_jax.methods.shared import inversion

pytestmark = pytest.mark.usefixtures('fast_compilation')


# Units so near a ReLU's kink that rounding decides on their side, and the reference's: see `Sided`.
TEACHER_SIDES = """
    1:246784+ 1:343183- 1:498932- 2:598425- 3:567454+ 4:102701+ 4:317425- 6:53352- 6:226368+
    8:160421+ 8:171948+ 8:262118- 9:41944- 11:132195+
"""
STUDENT_SIDES = """
    0:33075+ 0:34432+ 0:49347+ 0:196155+ 1:164255+ 1:179981+ 1:292055- 1:340965+ 1:345349-
    1:456473- 1:510475+ 1:565887+ 1:572533+ 2:137470+ 2:472664- 2:613937- 3:242708- 3:424763-
    3:593872- 3:605137- 4:35856- 4:290385+ 4:602975+ 5:125524- 5:276582+ 5:278697+ 5:288306+
    6:2407+ 6:198503+ 6:292463+ 7:26129- 7:170545+ 8:120196- 9:51912- 11:111740+
"""
SIZES = ('embedding', 'noisy_width', 'width', 'image_size')


def test_a_generator_step_equals_the_reference(golden: Path, rule, monkeypatch: pytest.MonkeyPatch):
    facts = json.loads((golden / 'steps' / 'nayer_step.json').read_text())
    expected = np.load(golden / 'steps' / 'nayer_step.npz')
    classes, batch = facts['num_classes'], facts['batch']
    sizes = {name: facts[name] for name in SIZES} | {'repeats': batch // classes}

    def state_dict(name: str, prefix: str = '', **kwargs: Any) -> dict[str, np.ndarray]:
        module = models.make(name, num_classes=classes, **kwargs)
        example = jnp.zeros((1, 32, 32, 3)) if not kwargs else jnp.zeros((1, sizes['embedding']))
        shapes = jax.eval_shape(module.init, jax.random.key(0), example)
        zeros = jax.tree.map(lambda x: np.zeros(x.shape, np.float32), shapes)
        names = {key: x.shape for key, x in port.to_torch(name, zeros).items()}
        return rule.state_dict(names.items(), prefix)

    teacher = state_dict('wrn16_2')
    own = state_dict('wrn16_2', 'student.')
    student = {key: 0.8 * x + 0.2 * own[key] for key, x in teacher.items()}
    generator = state_dict('nayer_generator', 'generator.', **sizes)

    def ported(name: str, weights: Any, **kwargs: Any) -> Any:
        return port.from_torch(name, weights, num_classes=classes, **kwargs)

    config = tiny.config('nayer', synthesis__batch_size=batch, synthesis__bank=batch)
    config.update(common_losses())
    config.synthesis.update(crop_padding=0, flip=False)
    config.phases = (common.phase(rounds=2, g_steps=1, s_steps=1),)
    classifier = models.make('wrn16_2', num_classes=classes)
    nets = contract.Models(
        Sided(classifier, TEACHER_SIDES),
        Sided(classifier, STUDENT_SIDES),
        models.make('nayer_generator', num_classes=classes, **sizes),
        classes,
        (32, 32, 3),
        (0.4914, 0.4822, 0.4465),
        (0.2023, 0.1994, 0.2010),
    )
    method = nayer.make(config, nets, sharding.Shards())
    table = rule.normal('emb:nayer_step', (classes, sizes['embedding']))
    frozen = contract.Frozen(ported('wrn16_2', teacher), jnp.asarray(table))
    state = jax.eval_shape(method.init, frozen, jax.random.key(0))
    state = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), state)
    generator_variables = ported('nayer_generator', generator, **sizes)
    state = state.replace(
        student=state.student.replace(**ported('wrn16_2', student)),
        generator=state.generator.replace(**generator_variables),
        extra=state.extra.replace(
            making=inversion.begin(state.extra.making, jnp.asarray(expected['labels'], jnp.int32))
        ),
    )
    np.testing.assert_array_equal(expected['labels'], np.arange(batch) % classes)

    def gradients_as_params(net, grads, tx, batch_stats=None):
        return net.replace(params=grads)

    monkeypatch.setattr(contract, 'update', gradients_as_params)
    jax.config.update('jax_disable_most_optimizations', False)
    step = jax.jit(method.generator_step)
    after, metrics = step(frozen, state, jax.random.key(0))
    near(np.transpose(after.extra.making.best, (0, 3, 1, 2)), expected['images'], 'images')
    near(metrics['g/loss'], expected['generator_total'], 'generator_total')
    near(after.extra.making.lowest, expected['generator_total'], 'lowest')
    weights = {'bn': 10.0, 'ce': 0.5, 'adversarial': 1.33}
    grads = port.to_torch(
        'nayer_generator', generator_variables | {'params': jax.device_get(after.generator.params)}
    )
    for term in weights:
        near(metrics[f'g/{term}'], expected[f'loss/{term}'], term)
    for name in ('n1.weight', 'le1.0.bias'):
        total = sum(w * expected[f'grad/{term}/{name}'] for term, w in weights.items())
        near(grads[name], total, name)

    # The statistics' moving average: two later batches, each measured before it is averaged in.
    mean, std = (np.float32(x).reshape(1, 1, 1, 3) for x in (nets.mean, nets.std))
    making = method.finish(frozen, after, None)[0].extra.making
    for name in ('images2_bn_first_update', 'images3_bn_second_update'):
        images = rule.normal(f'{name[:7]}:nayer_step', expected['images'].shape)
        pixel = np.transpose(jax.nn.sigmoid(images), (0, 2, 3, 1))
        moments = classifier.apply(frozen.teacher, (pixel - mean) / std).statistics
        smooth = losses.averaged(making.average, moments, 0.9, making.batches)
        distance = losses.bn_statistics(smooth, frozen.teacher['batch_stats'])
        near(distance, expected[name], name)
        making = making.replace(average=smooth, batches=making.batches + 1)
    student_logits, teacher_logits = expected['student_logits'], expected['teacher_logits']
    kd = jnp.mean(losses.kd(student_logits, teacher_logits, config.loss.temperature))
    near(kd, expected['student_kd_T20'], 'student_kd_T20')


def common_losses() -> Any:
    """The published weights."""
    return {'loss': cifar10.get_config('nayer').loss}


@cache
def built(warmup: int = 0, life: int = 3) -> tuple[Any, Method, contract.Frozen, State]:
    config = tiny.config('nayer', generator__life=life)
    main = common.phase(rounds=20, g_steps=2, s_steps=2)
    config.phases = (common.phase(rounds=warmup, g_steps=2, s_steps=0),) * bool(warmup) + (main,)
    method = tiny.method(config, sharding.Shards())
    frozen = tiny.frozen()
    jitted = method._replace(
        **{name: jax.jit(getattr(method, name)) for name in ('begin', 'generator_step', 'finish')}
    )
    return config, jitted, frozen, jax.jit(method.init)(frozen, jax.random.key(0))


def at_round(state: State, number: int) -> State:
    return state.replace(round=jnp.asarray(number, jnp.int32))


def changed(before: Any, after: Any) -> set[str]:
    return {name for name in before if not np.array_equal(*map(leaf, (before[name], after[name])))}


def leaf(tree: Any) -> np.ndarray:
    return np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])


def test_every_batch_has_a_new_noisy_layer_and_a_new_adam():
    _, method, frozen, state = built()
    state, _ = method.generator_step(frozen, at_round(state, 1), jax.random.key(0))
    assert np.any(leaf(state.generator.opt_state))
    after, _ = method.begin(frozen, state, jax.random.key(1))
    noisy = {'noisy_kernel', 'noisy_bias'}
    assert changed(state.generator.params, after.generator.params) == noisy
    kernel, bias = (np.asarray(after.generator.params[name]) for name in sorted(noisy)[::-1])
    assert not np.any(bias) and abs(kernel.std() - 1) < 0.2 and abs(kernel.mean()) < 0.2
    assert not np.any(leaf(after.generator.opt_state))
    again, _ = method.begin(frozen, after, jax.random.key(2))
    assert changed(after.generator.params, again.generator.params) == {'noisy_kernel'}


@pytest.mark.parametrize('warmup', [0, 4])
def test_the_generator_lives_for_its_rounds(warmup: int):
    """A life counts from the run's start and from the warm-up's end, whichever comes."""
    _, method, frozen, state = built(warmup, life=3)
    renewed = []
    for number in range(12):
        for loop in range(2):  # of one round: it is renewed at the first alone
            before = state.generator.params
            key = jax.random.key(2 * number + loop)
            state, _ = method.begin(frozen, at_round(state, number), key)
            if 'project' in changed(before, state.generator.params):
                renewed.append((number, loop))
                assert 'conv1' in changed(before, state.generator.params)
    # The generator of round 0 is new from the start.
    expected = [n for n in range(1, 12) if n % 3 == 0 or (n - warmup) % 3 == 0]
    assert renewed == [(number, 0) for number in expected]


def test_the_bank_gets_the_images_of_the_lowest_loss():
    config, method, frozen, state = built()
    state, _ = method.begin(frozen, state, jax.random.key(0))
    bests, totals = [], []
    for i in range(8):
        state, metrics = method.generator_step(frozen, state, jax.random.key(i))
        totals.append(float(metrics['g/loss']))
        bests.append(np.asarray(state.extra.making.best))
    lowest = int(np.argmin(totals))
    np.testing.assert_allclose(state.extra.making.lowest, min(totals), rtol=1e-6)
    np.testing.assert_array_equal(bests[-1], bests[lowest])
    assert all(
        np.array_equal(a, b) == (totals[i] > min(totals[:i]))
        for i, (a, b) in enumerate(zip(bests[1:], bests[:-1], strict=True), start=1)
    )
    bank = method.finish(frozen, state, None)[0].extra.bank
    kept = np.asarray(bank.image[: tiny.BATCH])
    np.testing.assert_array_equal(kept, np.round(255 * bests[-1]).astype(np.uint8))
    np.testing.assert_array_equal(
        bank.label[: tiny.BATCH], np.arange(tiny.BATCH) % config.data.num_classes
    )
    fresh, _ = method.begin(frozen, state, jax.random.key(9))
    assert fresh.extra.making.lowest == inversion.HIGHEST


def test_the_student_is_an_adversary_after_the_warm_up_only():
    _, method, frozen, state = built(warmup=4)
    ends = []
    for number in (3, 4):
        before, _ = method.begin(frozen, at_round(state, number), jax.random.key(0))
        before = before.replace(generator=state.generator)  # 3 starts a new life, 4 too
        after, metrics = method.generator_step(frozen, before, jax.random.key(1))
        ends.append((metrics, leaf(after.generator.params)))
        assert metrics['g/adversarial'] < 0
    loss = built(warmup=4)[0].loss
    gap = ends[1][0]['g/loss'] - ends[0][0]['g/loss']
    np.testing.assert_allclose(gap, loss.adversarial * ends[1][0]['g/adversarial'], rtol=1e-2)
    assert not np.array_equal(ends[0][1], ends[1][1])


def test_embeddings_are_frozen():
    """They are an argument, and no gradient is ever taken to them."""
    _, method, frozen, state = built()
    before = np.asarray(frozen.extra)
    state, _ = method.begin(frozen, state, jax.random.key(0))
    state, _ = method.generator_step(frozen, state, jax.random.key(0))
    np.testing.assert_array_equal(frozen.extra, before)
    assert not any(
        np.shape(x) == before.shape for x in jax.tree.leaves((state.generator, state.extra))
    )


@pytest.mark.parametrize(('batch', 'shards'), [(16, 4), (16, 2), (18, 3), (12, 6), (40, 8)])
def test_shares_pass_through_the_noisy_layers_of_their_rows(batch: int, shards: int):
    classes = 4
    repeats = -(-batch // classes)
    module = models.make(
        'nayer_generator', num_classes=classes, repeats=repeats, image_size=8, embedding=6,
        noisy_width=5, width=4,
    )  # fmt: skip
    x = jax.random.normal(jax.random.key(0), (batch, 6))
    variables = module.init(jax.random.key(1), x)
    whole = module.apply(variables, x, train=False)
    size = batch // shards
    parts = [
        module.apply(variables, x[i : i + size], first=jnp.asarray(i), train=False)
        for i in range(0, batch, size)
    ]
    np.testing.assert_allclose(np.concatenate(parts), whole, atol=1e-6)


def test_the_rate_falls_by_the_round_to_its_last_value():
    config = cifar100.get_config('nayer')
    tx = contract.sgd_by_round(config.student, config.phases)
    rates = []
    for step in (0, 399, 400, 50 * 400, 100 * 400 - 1, 100 * 400):
        start = optax.tree_utils.tree_set(tx.init(jnp.zeros(())), count=jnp.asarray(step))
        rates.append(-float(tx.update(jnp.ones(()), start, jnp.zeros(()))[0]))
    assert rates[0] == rates[1] > rates[2]
    middle = 2e-4 + (0.2 - 2e-4) / 2
    np.testing.assert_allclose([rates[0], rates[3], rates[5]], [0.2, middle, 2e-4], rtol=1e-3)
    assert 2e-4 < rates[4] < 3e-4


def test_mistakes():
    for changes, match in (
        (dict(synthesis__bank=0), 'bank=0 must be a positive multiple'),
        (dict(synthesis__bank=tiny.BATCH + 1), 'must be a positive multiple'),
    ):
        with pytest.raises(ValueError, match=match):
            tiny.method(tiny.config('nayer', **changes), sharding.Shards())
    config = tiny.config('nayer')
    config.phases = (common.phase(rounds=1, g_steps=1, s_steps=0),)
    with pytest.raises(ValueError, match='anneals by the round'):
        tiny.method(config, sharding.Shards())
