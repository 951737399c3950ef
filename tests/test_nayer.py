"""NAYER: one step against the reference implementation, and what makes it NAYER."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
import tiny
from reference import near

from dfkd_jax import contract, losses, models, port
from dfkd_jax.configs import cifar10, cifar100, common
from dfkd_jax.contract import State
from dfkd_jax.distributed import sharding
from dfkd_jax.methods import nayer
from dfkd_jax.methods.shared import inversion

pytestmark = pytest.mark.usefixtures('fast_compilation')


# 1. Equal to the reference implementation.

SIZES = ('embedding', 'noisy_width', 'width', 'image_size')
NORM = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)  # of CIFAR-10


def torch_step(weights: dict[str, Any], table: np.ndarray, label: np.ndarray, sizes: Any) -> Any:
    """The terms of L_G in plain PyTorch, and their gradients with respect to the generator."""
    torch = pytest.importorskip('torch', reason='PyTorch computes the reference')
    from experiments.bench import plain_torch

    classes = len(table)
    networks = [plain_torch.WideResNet(16, 2, classes, 3) for _ in range(2)]
    teacher, student = map(reference.torch_network, networks, weights['classifiers'])
    sizes = sizes | {'classes': classes, 'channels': 3}
    generator = plain_torch.NoisyGenerator(sizes)
    generator = reference.torch_network(generator, weights['generator'], train=True)
    statistics = plain_torch.Statistics(teacher)
    mean, std = (torch.tensor(x).view(1, 3, 1, 1) for x in NORM)
    target = torch.from_numpy(label)
    image = (generator(torch.from_numpy(table).double()[target]) - mean) / std
    (logits, _), (student_logits, _) = teacher(image), student(image)
    agree = logits.argmax(1) == student_logits.argmax(1)
    terms = {
        'bn': statistics.distance(statistics.pop()),
        'ce': torch.nn.functional.cross_entropy(logits, target),
        'adversarial': -(agree * plain_torch.divergence(student_logits, logits)).mean(),
    }
    gradients = {name: reference.torch_gradient(term, generator) for name, term in terms.items()}
    return {name: term.item() for name, term in terms.items()}, gradients


def test_a_generator_step_equals_the_reference(golden: Path, rule, monkeypatch: pytest.MonkeyPatch):
    facts = json.loads((golden / 'steps' / 'nayer_step.json').read_text())
    expected = tiny.arrays(golden / 'steps' / 'nayer_step.npz')
    classes, batch_size = facts['num_classes'], facts['batch']
    sizes = {name: facts[name] for name in SIZES} | {'repeats': batch_size // classes}

    def by_rule(name: str, shape: tuple[int, ...], prefix: str = '', **sizes: Any) -> Any:
        return reference.weights(
            rule, name, jnp.zeros(shape), prefix=prefix, num_classes=classes, **sizes
        )

    image_shape = (1, 32, 32, 3)
    teacher, own = (by_rule('wrn16_2', image_shape, prefix) for prefix in ('', 'student.'))
    student = {key: 0.8 * x + 0.2 * own[key] for key, x in teacher.items()}
    generator = by_rule('nayer_generator', (1, sizes['embedding']), 'generator.', **sizes)
    table = rule.normal('emb:nayer_step', (classes, sizes['embedding']))
    np.testing.assert_array_equal(expected['labels'], np.arange(batch_size) % classes)
    weights = {'classifiers': (teacher, student), 'generator': generator}
    values, gradients = torch_step(weights, table, expected['labels'], sizes)

    config = tiny.config('nayer', synthesis__batch_size=batch_size, synthesis__bank=batch_size)
    config.loss = cifar10.get_config('nayer').loss
    config.synthesis.update(crop_padding=0, flip=False)
    config.phases = (common.phase(rounds=2, g_steps=1, s_steps=1),)
    monkeypatch.setattr(contract, 'update', lambda net, grads, *_: net.replace(params=grads))
    with reference.float64():
        classifier, module = (
            models.make(name, num_classes=classes, dtype=jnp.float64, **of)
            for name, of in (('wrn16_2', {}), ('nayer_generator', sizes))
        )
        nets = contract.Models(classifier, classifier, module, classes, image_shape[1:], *NORM)
        method = nayer.make(config, nets, sharding.Shards())

        def ported(name: str, arrays: Any, **of: Any) -> Any:
            return reference.wide(port.from_torch(name, arrays, num_classes=classes, **of))

        variables = ported('nayer_generator', generator, **sizes)
        frozen = contract.Frozen(ported('wrn16_2', teacher), reference.wide(table))
        state = jax.eval_shape(method.init, frozen, jax.random.key(0))
        state = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), state)
        label = jnp.asarray(expected['labels'], jnp.int32)
        batch = inversion.begin(state.extra.batch, label)
        state = state.replace(
            student=state.student.replace(**ported('wrn16_2', student)),
            generator=state.generator.replace(**variables),
            extra=state.extra.replace(batch=batch),
        )
        after, found = jax.jit(method.generator_step)(frozen, state, jax.random.key(0))
        batch = jax.jit(method.finish)(frozen, after, None)[0].extra.batch

        # 1. Values: the authors' float32 differs from float64 in its last digits.
        pixel = np.transpose(after.extra.batch.best, (0, 3, 1, 2))
        near(pixel, expected['images'], 'images', 1e-5)
        near(found['g/loss'], expected['generator_total'], 'generator_total', 1e-5)
        near(after.extra.batch.lowest, expected['generator_total'], 'lowest', 1e-5)
        for term in values:
            near(found[f'g/{term}'], expected[f'loss/{term}'], term, 1e-5)
            near(found[f'g/{term}'], values[term], term, 1e-10)
        # 2. The gradient of the weighted sum.
        scales = {'bn': 10.0, 'ce': 0.5, 'adversarial': 1.33}
        grads = reference.torch_named('nayer_generator', after.generator.params, variables)
        total = {
            name: sum(scale * gradients[term][name] for term, scale in scales.items())
            for name in gradients['bn']
        }
        reference.near_gradients(grads, total, 1e-8)
        for name in ('n1.weight', 'le1.0.bias'):
            total = sum(w * expected[f'grad/{term}/{name}'] for term, w in scales.items())
            near(grads[name], total, name, reference.KINKS)
        # 3. The statistics' moving average: two later batches, measured before they are averaged.
        mean, std = (np.float32(x).reshape(1, 1, 1, 3) for x in NORM)
        apply = jax.jit(classifier.apply)
        for name in ('images2_bn_first_update', 'images3_bn_second_update'):
            images = rule.normal(f'{name[:7]}:nayer_step', expected['images'].shape)
            pixel = np.transpose(jax.nn.sigmoid(images), (0, 2, 3, 1))
            moments = apply(frozen.teacher, (pixel - mean) / std).statistics
            smooth = losses.moving_average(batch.average, moments, 0.9, batch.batches)
            distance = losses.bn_statistics(smooth, frozen.teacher['batch_stats'])
            near(distance, expected[name], name, 1e-5)
            batch = batch.replace(average=smooth, batches=batch.batches + 1)
    logits = expected['student_logits'], expected['teacher_logits']
    kd = jnp.mean(losses.kd(*logits, config.loss.temperature))
    near(kd, expected['student_kd_T20'], 'student_kd_T20')


# 2. What makes it NAYER.


def at_round(state: State, number: int) -> State:
    return state.replace(round=jnp.asarray(number, jnp.int32))


def changed(before: Any, after: Any) -> set[str]:
    """The names of the layers that differ."""
    return {
        name for name in before
        if not np.array_equal(*map(tiny.vector, (before[name], after[name])))
    }  # fmt: skip


@pytest.mark.slow
def test_every_batch_has_a_new_noisy_layer_and_a_new_adam():
    _, method, frozen, state = tiny.built('nayer')
    state, _ = method.generator_step(frozen, at_round(state, 1), jax.random.key(0))
    assert np.any(tiny.vector(state.generator.opt_state))
    after, _ = method.begin(frozen, state, jax.random.key(1))
    noisy = {'noisy_kernel', 'noisy_bias'}
    assert changed(state.generator.params, after.generator.params) == noisy
    kernel, bias = (np.asarray(after.generator.params[name]) for name in sorted(noisy)[::-1])
    assert not np.any(bias) and abs(kernel.std() - 1) < 0.2 and abs(kernel.mean()) < 0.2
    assert not np.any(tiny.vector(after.generator.opt_state))
    again, _ = method.begin(frozen, after, jax.random.key(2))
    assert changed(after.generator.params, again.generator.params) == {'noisy_kernel'}


@pytest.mark.parametrize('warmup', [0, 4])
def test_the_generator_lives_for_its_rounds(warmup: int):
    """Lives are counted from the start of the run and from the end of the warm-up."""
    _, method, frozen, state = tiny.built('nayer', warmup, generator__life=3)
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


def test_a_life_of_zero_is_the_whole_run():
    """Also at the end of the warm-up, where any other life ends."""
    _, method, frozen, state = tiny.built('nayer', 4, generator__life=0)
    for number in range(6):
        before = state.generator.params
        state, _ = method.begin(frozen, at_round(state, number), jax.random.key(number))
        assert changed(before, state.generator.params) <= {'noisy_kernel', 'noisy_bias'}


@pytest.mark.parametrize('batch', tiny.quick([2, 3], 3))
def test_a_batch_without_room_for_all_classes_takes_the_next_ones(batch: int):
    """None comes again before all others came, and lists differ."""
    _, method, frozen, state = tiny.built(
        'nayer', synthesis__batch_size=batch, synthesis__bank=4 * batch
    )
    classes, lists = [], 6
    for number in range(lists * tiny.CLASSES // batch):
        state, _ = method.begin(frozen, state, jax.random.key(number))
        classes += np.asarray(state.extra.batch.label).tolist()
        state, _ = method.finish(frozen, state, jax.random.key(number))
    rows = np.reshape(classes, (lists, tiny.CLASSES))
    np.testing.assert_array_equal(np.sort(rows), [np.arange(tiny.CLASSES)] * lists)
    assert len(np.unique(rows, axis=0)) > 2


def test_embeddings_are_frozen():
    """They are an argument and no part of the state, so no gradient reaches them."""
    _, method, frozen, state = tiny.built('nayer')
    before = np.asarray(frozen.extra)
    state, _ = method.begin(frozen, state, jax.random.key(0))
    state, _ = method.generator_step(frozen, state, jax.random.key(0))
    np.testing.assert_array_equal(frozen.extra, before)
    assert not any(
        np.shape(x) == before.shape for x in jax.tree.leaves((state.generator, state.extra))
    )


@pytest.mark.parametrize(
    ('batch', 'shards'), tiny.quick([(16, 4), (16, 2), (18, 3), (12, 6), (40, 8)], (16, 2))
)
def test_shares_pass_through_the_noisy_layers_of_their_rows(batch: int, shards: int):
    classes = 4
    repeats = -(-batch // classes)
    module = models.make(
        'nayer_generator', num_classes=classes, repeats=repeats, image_size=8, embedding=6,
        noisy_width=5, width=4,
    )  # fmt: skip
    x = jax.random.normal(jax.random.key(0), (batch, 6))
    variables = jax.jit(module.init)(jax.random.key(1), x)
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
