"""The methods with a bank of images: what they share; then DeepInversion, CMI and Fast-DFKD."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from tiny import Built

from dfkd_jax import contract, losses
from dfkd_jax.configs import cifar10, cifar100, common, imagenet
from dfkd_jax.contract import State
from dfkd_jax.distributed import sharding
from dfkd_jax.methods import cmi, deepinversion
from dfkd_jax.methods.shared import inversion

pytestmark = pytest.mark.usefixtures('fast_compilation')
TRAINED = ('deepinversion', 'cmi', 'fast')  # what these train is made anew for every batch
ALL = (*TRAINED, 'nayer', 'cae')
WARMUP = 4  # rounds


def built(name: str, **changes: Any) -> Built:
    return tiny.built(name, WARMUP, **changes)


def begun(run: Built, state: State | None = None, seed: int = 0) -> State:
    return run.method.begin(run.frozen, state or run.state, jax.random.key(seed))[0]


def stepped(run: Built, state: State, seed: int = 0) -> tuple[State, dict[str, float]]:
    state, metrics = run.method.generator_step(run.frozen, state, jax.random.key(seed))
    return state, {k.removeprefix('g/'): float(v) for k, v in metrics.items()}


def finished(run: Built, state: State) -> State:
    return run.method.finish(run.frozen, state, None)[0]


def at(state: State, number: int) -> State:
    return state.replace(round=jnp.asarray(number, jnp.int32))


# 1. All methods with a bank.


@pytest.mark.parametrize('name', tiny.quick(ALL, 'deepinversion'))
def test_the_student_has_a_say_after_the_warm_up_only(name: str):
    run = built(name)
    state = begun(run)
    early_run = run._replace(method=run.method._replace(generator_step=run.method.warmup_step))
    (before, early), (after, late) = (stepped(each, state) for each in (early_run, run))
    assert late['adversarial'] < 0 and 'adversarial' not in early
    gap = run.config.loss.adversarial * late['adversarial']
    if name == 'deepinversion':
        gap -= run.config.loss.bn * run.config.loss.student_bn * late['student_bn']
    np.testing.assert_allclose(late['loss'] - early['loss'], gap, rtol=1e-2)
    trained = [tiny.vector((end.generator, end.extra)) for end in (before, after)]
    assert not np.array_equal(*trained), 'and not in the metrics alone'


@pytest.mark.parametrize('name', tiny.quick(ALL, 'deepinversion', 'nayer'))
def test_the_warm_up_does_not_compute_what_it_leaves_out(name: str):
    """A step of it has fewer operations, by the student's forward and backward pass at least."""
    run = built(name)
    arguments = (run.frozen, run.state, jax.random.key(0))

    def operations(step: Any, *given: Any) -> float:
        return step.lower(*given).cost_analysis()['flops']

    module, image = (
        tiny.nets(run.config).student,
        jnp.zeros((tiny.BATCH, tiny.SIZE, tiny.SIZE, tiny.CHANNELS)),
    )

    def of_image(variables: Any, image: Any) -> Any:
        return jax.grad(lambda x: jnp.sum(module.apply(variables, x).logits))(image)

    student = operations(jax.jit(of_image), run.state.student.variables, image)
    whole, less = (
        operations(step, *arguments) for step in (run.method.generator_step, run.method.warmup_step)
    )
    assert whole - less > 0.9 * student > 0


@pytest.mark.parametrize('name', tiny.quick(ALL, 'deepinversion', 'nayer'))
@pytest.mark.parametrize('term', ['bn', 'ce', 'adversarial'])
def test_a_term_of_weight_zero_is_left_out(name: str, term: str):
    changes = {f'loss__{term}': 0.0, 'loss__student_bn': 0.0}
    run = built(name, **{k: v for k, v in changes.items() if name == 'deepinversion' or term in k})
    step = run.method.generator_step
    _, metrics = jax.eval_shape(step, run.frozen, run.state, jax.random.key(0))
    assert 'g/loss' in metrics and f'g/{term}' not in metrics


@pytest.mark.parametrize('name', tiny.quick(ALL, 'deepinversion', 'nayer', 'fast'))
def test_the_bank_gets_the_images_of_the_lowest_loss(name: str):
    run = built(name)
    state, totals, bests = begun(run), [], []
    for i in range(6):
        state, metrics = stepped(run, state, i)
        totals.append(metrics['loss'])
        bests.append(np.asarray(state.extra.batch.best))
        np.testing.assert_allclose(state.extra.batch.lowest, min(totals), rtol=1e-6)
        np.testing.assert_array_equal(bests[-1], bests[int(np.argmin(totals))])
    bank = finished(run, state).extra.bank
    expected = np.round(255 * np.clip(bests[-1], 0, 1)).astype(np.uint8)
    np.testing.assert_array_equal(bank.image[: tiny.BATCH], expected)
    np.testing.assert_array_equal(bank.label[: tiny.BATCH], state.extra.batch.label)
    np.testing.assert_array_equal(bank.source[: tiny.BATCH], state.extra.batch.source)
    assert begun(run, state, seed=9).extra.batch.lowest == inversion.HIGHEST


@pytest.mark.parametrize('name', tiny.quick(TRAINED, 'deepinversion'))
def test_synthesis_finds_what_it_is_asked_for(name: str):
    """The loss falls, and hits are above chance."""
    rates = {} if name == 'deepinversion' else {'generator__lr': 1e-2}
    run = built(name, **rates, loss__bn=1.0)
    state, found = begun(run), []
    for i in range(40):
        state, metrics = stepped(run, state, i)
        found.append((metrics['loss'], metrics['hit']))
    first, last = np.mean(found[:5], 0), np.mean(found[-5:], 0)
    assert last[0] < first[0] and last[1] > 1.4 / tiny.CLASSES


# 2. DeepInversion.


def test_the_divergence_is_the_references(golden: Path):
    given = tiny.arrays(golden / 'losses.npz')
    found = deepinversion.jensen_shannon(given['student_logits'], given['teacher_logits'], 1.0)
    np.testing.assert_allclose(jnp.mean(found), given['loss/js'], rtol=1e-4)


def test_the_divergence_is_clamped():
    """Of two networks that are sure of different classes: [1, 0] and [0, 1] and their mean."""
    sure = jnp.asarray([[1e4, 0.0]])
    found = deepinversion.jensen_shannon(sure, sure[:, ::-1], 1.0)
    expected = 0.5 * np.log(0.5 / 0.99) + 0.5 * np.log(0.5 / 0.01)
    np.testing.assert_allclose(found, [expected], rtol=1e-5)
    assert deepinversion.jensen_shannon(sure, sure, 3.0) == 0
    grads = jax.grad(lambda s: deepinversion.jensen_shannon(s, sure[:, ::-1], 1.0)[0])(sure)
    assert np.all(np.isfinite(grads))


def test_deepinversion_lowers_its_loss_and_raises_the_students_share():
    changes = dict(loss__student_bn=0.25, loss__tv=1e-2, loss__l2=1e-3)
    changes |= dict(pixels__jitter=0, synthesis__flip=False)
    run = built('deepinversion', **changes)
    state = at(begun(run), WARMUP)
    _, found = stepped(run, state)
    loss, image = run.config.loss, state.extra.image
    expected = loss.bn * (found['bn'] - loss.student_bn * found['student_bn'])
    expected += loss.ce * found['ce'] + loss.adversarial * found['adversarial']
    expected += loss.tv * found['tv'] + loss.l2 * found['l2']
    np.testing.assert_allclose(found['loss'], expected, rtol=1e-5)

    nets = tiny.nets(run.config)
    teacher = nets.teacher.apply(run.frozen.teacher, image)
    student = nets.student.apply(state.student.variables, image)
    divergence = deepinversion.jensen_shannon(student.logits, teacher.logits, 3.0)
    x = np.asarray(image, np.float64)
    pairs = (
        x[:, :, 1:] - x[:, :, :-1],
        x[:, 1:] - x[:, :-1],
        x[:, 1:, 1:] - x[:, :-1, :-1],
        x[:, 1:, :-1] - x[:, :-1, 1:],
    )
    for name, value in {
        'bn': losses.bn_statistics(teacher.statistics, run.frozen.teacher['batch_stats']),
        'student_bn': losses.bn_statistics(student.statistics, state.student.batch_stats),
        'ce': jnp.mean(losses.cross_entropy(teacher.logits, state.extra.batch.label)),
        'adversarial': -jnp.mean(divergence),
        'tv': sum(np.abs(pair).mean() for pair in pairs),  # as in CMI's and Fast-DFKD's code
        'l2': np.linalg.norm(x),
    }.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-4, err_msg=name)


def test_priors_of_weight_zero_are_left_out():
    assert not {'tv', 'l2'} & set(stepped(built('deepinversion'), begun(built('deepinversion')))[1])


def test_images_move_as_one():
    x = np.random.default_rng(0).normal(size=(3, 6, 6, 2)).astype(np.float32)
    seen = set()
    for seed in range(40):
        found = np.asarray(deepinversion.jitter(jax.random.key(seed), jnp.asarray(x), 1, True))
        ways = [
            (row, column, mirrored)
            for row in (-1, 0, 1)
            for column in (-1, 0, 1)
            for mirrored in (False, True)
            if np.array_equal(
                found, np.roll(x, (row, column), (1, 2))[:, :, :: -1 if mirrored else 1]
            )
        ]
        assert len(ways) == 1
        seen |= set(ways)
    assert len(seen) > 12
    still = deepinversion.jitter(jax.random.key(0), jnp.asarray(x), 0, False)
    np.testing.assert_array_equal(still, x)


def test_images_start_from_noise_and_stay_in_the_range_of_pixels():
    run = built('deepinversion')
    state = begun(run)
    assert abs(float(jnp.std(state.extra.image)) - 1) < 0.1
    state, _ = stepped(run, state)
    pixel = 0.5 + 0.25 * state.extra.image
    assert pixel.min() >= 0 and pixel.max() <= 1
    assert np.any(tiny.vector(state.extra.opt_state))
    again = begun(run, state, seed=1)
    assert not np.any(tiny.vector(again.extra.opt_state))
    assert not np.array_equal(again.extra.image, begun(run).extra.image)


def test_the_published_code_keeps_the_last_images():
    run = built('deepinversion', pixels__keep='last', pixels__lr=10.0)
    state = begun(run)
    for i in range(3):
        state, _ = stepped(run, state, i)
    pixel = 0.5 + 0.25 * state.extra.image
    bank = finished(run, state).extra.bank
    assert (
        np.abs(np.round(255 * np.asarray(pixel)) - np.asarray(bank.image[: tiny.BATCH])).max() <= 1
    )
    assert not np.allclose(pixel, state.extra.batch.best, atol=0.1)
    assert cifar10.get_config('deepinversion,as_published').pixels.keep == 'last'
    assert cifar10.get_config('deepinversion').pixels.keep == 'best'


# 3. CMI.


@pytest.mark.slow
def test_every_batch_has_a_new_generator_and_the_head_lasts():
    run = built('cmi')
    state, _ = stepped(run, begun(run))
    again = begun(run, state, seed=1)
    chex.assert_trees_all_equal(again.extra.memory, state.extra.memory)
    assert not np.any(tiny.vector(again.generator.opt_state)) and np.any(
        tiny.vector(state.generator.opt_state)
    )
    params = again.generator.params['generator']
    for kind, mean, deviation in (('kernel', 0, 0.02), ('scale', 1, 0.02), ('bias', 0, 0)):
        x = tiny.vector([layer[kind] for layer in params.values() if kind in layer])
        np.testing.assert_allclose([np.mean(x), np.std(x)], [mean, deviation], atol=0.01)
        old = state.generator.params['generator'].values()
        assert not np.array_equal(x, tiny.vector([layer[kind] for layer in old if kind in layer]))
    latent = again.generator.params['latent']
    np.testing.assert_allclose(np.std(latent), 1, rtol=0.3)
    moved, _ = stepped(run, again)
    assert not np.array_equal(moved.generator.params['latent'], latent), 'it is trained'
    assert not np.array_equal(
        tiny.vector(moved.extra.memory.head), tiny.vector(again.extra.memory.head)
    )


def test_features_are_means_over_positions():
    rng = np.random.default_rng(0)
    stages = [rng.normal(size=shape).astype(np.float32) for shape in ((2, 4, 4, 3), (2, 2, 2, 5))]
    found = cmi.pooled(tuple(map(jnp.asarray, stages)))
    np.testing.assert_allclose(
        found, np.concatenate([x.mean((1, 2)) for x in stages], 1), rtol=1e-5, atol=1e-6
    )


def test_the_contrast_is_cross_entropy_to_the_diagonal():
    rng = np.random.default_rng(0)
    views = rng.normal(size=(2, 7, 4))
    local, whole = views / np.linalg.norm(views, axis=-1, keepdims=True)
    valid, new, temperature = np.arange(7) < 6, 3, 0.2
    similarity = (local @ whole.T / temperature)[:6, :6]
    lost = np.log(np.exp(similarity).sum(-1)) - np.diag(similarity)
    given = jnp.asarray(local, jnp.float32), jnp.asarray(whole, jnp.float32)
    found = cmi.contrastive_loss(*given, jnp.asarray(valid), new, temperature)
    np.testing.assert_allclose(found, lost[:3].mean() + lost[3:].mean(), rtol=1e-5)
    grads = jax.grad(cmi.contrastive_loss, (0, 1))(*given, jnp.asarray(valid), new, temperature)
    assert np.all(np.isfinite(tiny.vector(grads))) and not np.any(grads[1]), (
        'none to the global views'
    )
    assert np.any(grads[0][0]) and not np.any(grads[0][6])
    alone = cmi.contrastive_loss(*given, jnp.arange(7) < 3, new, temperature)
    similarity = similarity[:3, :3]
    lost = np.log(np.exp(similarity).sum(-1)) - np.diag(similarity)
    np.testing.assert_allclose(alone, lost.mean(), rtol=1e-5)


def test_what_is_recalled_was_written_and_is_no_row_twice():
    memory = jnp.arange(12.0)[:, None]
    for written, expected in ((0, 0), (3, 3), (9, 5), (12, 5), (40, 5)):
        rows, held = cmi.draw_negatives(jax.random.key(written), memory, jnp.asarray(written), 5)
        rows = np.asarray(rows)[np.asarray(held), 0]
        assert len(set(rows)) == len(rows) == expected
        assert np.all(rows < written)
    draws = [
        cmi.draw_negatives(jax.random.key(i), memory, jnp.asarray(12), 5)[0] for i in range(30)
    ]
    assert len(set(tiny.vector(draws))) == 12


def test_the_memory_is_written_in_a_circle_with_the_best_features():
    run = built('cmi')
    state, rows = run.state, []
    assert len(state.extra.memory.feature) == 2 * tiny.BATCH
    for batch in range(3):
        state, best = begun(run, state, seed=batch), None
        for i in range(4):
            lowest = float(state.extra.batch.lowest)
            state, metrics = stepped(run, state, i)
            if metrics['loss'] < lowest:
                best = np.asarray(state.extra.memory.best)
            np.testing.assert_array_equal(state.extra.memory.best, best)
        state = finished(run, state)
        rows.append(best)
    expected = np.concatenate([rows[2], rows[1]])
    np.testing.assert_array_equal(state.extra.memory.feature, expected)


def test_the_contrast_of_a_step_is_that_of_its_views():
    """Of the first batch there is nothing to compare with but itself."""
    run = built('cmi')
    state = at(begun(run), WARMUP)
    after, found = stepped(run, state)
    feature = after.extra.memory.best
    head = cmi.Head(run.config.head.width)
    views = head.apply({'params': state.extra.memory.head.params}, feature)
    valid = jnp.ones(tiny.BATCH, bool)
    temperature = run.config.loss.contrast_temperature
    expected = cmi.contrastive_loss(views[:, 0], views[:, 1], valid, tiny.BATCH, temperature)
    np.testing.assert_allclose(found['contrast'], expected, rtol=1e-4)
    loss = run.config.loss
    total = loss.bn * found['bn'] + loss.ce * found['ce'] + loss.adversarial * found['adversarial']
    np.testing.assert_allclose(found['loss'], total + loss.contrast * expected, rtol=1e-4)
    assert not np.allclose(feature[:, 0], feature[:, 1]), 'the views differ'


@pytest.mark.slow
def test_without_the_contrast_there_is_no_memory():
    run = built('cmi', loss__contrast=0.0)
    state, found = stepped(run, begun(run))
    assert state.extra.memory == () and 'contrast' not in found
    assert finished(run, state).extra.bank.written == tiny.BATCH


# 4. Fast-DFKD.


def two_steps(run: Built, state: State) -> tuple[State, Any]:
    """A batch of two steps, and the sum of its gradients, read from Adam's first moments."""
    beta, moments = run.config.generator.beta1, []
    state = begun(run, state)
    for i in range(2):
        state, _ = stepped(run, state, i)
        adam = state.extra.fast.opt_state.inner_states['generator'].inner_state[0]
        moments.append(adam.mu['generator'])
    total = jax.tree.map(lambda a, b: (a + b - beta * a) / (1 - beta), *moments)
    return state, total


def stepped_meta(run: Built, net: contract.Net, grads: Any) -> contract.Net:
    """A net after one step of the meta-generator's Adam."""
    settings = run.config.generator
    tx = optax.adam(settings.meta_lr, settings.beta1, settings.beta2)
    return contract.update(net, grads, tx)


@pytest.mark.parametrize('meta', tiny.quick(['fomaml', 'reptile'], 'fomaml'))
def test_the_meta_generator_follows_its_gradient_with_an_adam_that_lasts(meta: str):
    run = built('fast') if meta == 'fomaml' else built('fast', generator__meta=meta)
    state = run.state
    for batch in range(2):
        before = state.generator
        state, grads = two_steps(run, state)
        chex.assert_trees_all_equal(state.generator, before)  # until the end of a batch
        learnt = state.extra.fast.params['generator']
        if meta == 'reptile':
            grads = jax.tree.map(lambda a, b: 67 * (a - b), before.params, learnt)
        else:
            tiny.close(state.extra.gradient, grads, 1e-4)
            grads = state.extra.gradient  # their rounding errors, for Adam
        expected = stepped_meta(run, before, grads)
        state = finished(run, state)
        tiny.close(state.generator.params, expected.params, 1e-5)
        tiny.close(state.generator.opt_state, expected.opt_state, 1e-5)
        assert state.generator.opt_state[0].count == batch + 1
        chex.assert_trees_all_equal(state.generator.batch_stats, run.state.generator.batch_stats)


def test_a_batch_starts_from_the_meta_generator_with_a_new_adam():
    run = built('fast')
    state = finished(run, two_steps(run, run.state)[0])
    again = begun(run, state, seed=5)
    chex.assert_trees_all_equal(again.extra.fast.params['generator'], state.generator.params)
    assert not np.any(tiny.vector((again.extra.fast.opt_state, again.extra.gradient)))
    latent = again.extra.fast.params['latent']
    np.testing.assert_allclose(np.std(latent), 1, rtol=0.3)
    assert not np.array_equal(latent, begun(run, state, seed=6).extra.fast.params['latent'])


@pytest.mark.slow
def test_without_meta_learning_the_generator_goes_on():
    run = built('fast', generator__meta='none')
    assert run.state.extra.gradient == ()
    state, _ = two_steps(run, run.state)
    learnt = state.extra.fast
    state = finished(run, state)
    chex.assert_trees_all_equal(state.generator.params, learnt.params['generator'])
    chex.assert_trees_all_equal(state.generator.batch_stats, learnt.batch_stats)
    chex.assert_trees_all_equal(state.generator.opt_state, run.state.generator.opt_state)
    again = begun(run, state, seed=5)
    chex.assert_trees_all_equal(again.extra.fast.params['generator'], learnt.params['generator'])
    assert not np.any(tiny.vector(again.extra.fast.opt_state))


def test_latents_have_a_rate_of_their_own():
    """Adam's first step is as long as the rate."""
    run = built('fast')
    state = begun(run)
    after, _ = stepped(run, state)
    for name, rate in (('generator', 2e-3), ('latent', 0.01)):
        moved = np.abs(
            tiny.vector(after.extra.fast.params[name]) - tiny.vector(state.extra.fast.params[name])
        )
        np.testing.assert_allclose(np.quantile(moved, 0.9), rate, rtol=2e-2)


def test_the_first_layer_is_drawn_anew_once():
    run = built('fast', generator__reset_batch=3)
    state = run.state
    for number in range(1, 6):
        before = state.generator.params
        state = begun(run, state, seed=number)
        params = state.generator.params
        same = {
            name
            for name in params
            if np.array_equal(tiny.vector(params[name]), tiny.vector(before[name]))
        }
        assert params.keys() - same == ({'project', 'norm0'} if number == 3 else set())
        chex.assert_trees_all_equal(state.extra.fast.params['generator'], params)
        if number == 3:
            for x in (params['project']['kernel'], params['norm0']['scale']):
                np.testing.assert_allclose([np.mean(x), np.std(x)], [0, 0.02], atol=0.015)
            assert not np.any(params['project']['bias']) and not np.any(params['norm0']['bias'])
        state = finished(run, state)  # without a step: the gradient is zero


# 5. Settings.


def test_published_numbers():
    """The scripts of Fast-DFKD's repository."""
    for configs in (cifar10, cifar100):
        for name in TRAINED:
            config = configs.get_config(name)
            synthesis, student = config.synthesis, config.student
            assert (synthesis.batch_size, synthesis.student_batch_size) == (256, 256)
            assert (student.final_lr, student.momentum, student.weight_decay) == (2e-4, 0.9, 1e-4)
            assert (config.loss.temperature, synthesis.crop_padding) == (20, 4)
            assert sum(p.rounds * p.s_steps for p in config.phases) == 200 * 400
            made = sum(p.rounds * p.loops for p in config.phases) * 256
            assert synthesis.bank == made, 'nothing that the published run keeps is lost'
    config = cifar10.get_config('fast')
    assert config.student.lr == 0.2
    assert [(p.rounds, p.g_steps) for p in config.phases] == [(20, 10), (200, 10)]
    settings, loss = config.generator, config.loss
    assert (settings.lr, settings.latent_lr, settings.reset_batch) == (2e-3, 0.01, 140)
    np.testing.assert_allclose(settings.meta_lr, 10 * settings.lr)
    assert (loss.bn, loss.ce, loss.adversarial, loss.bn_momentum) == (10, 0.5, 1.33, 0.9)
    config = cifar10.get_config('cmi')
    loss, synthesis = config.loss, config.synthesis
    assert (config.student.lr, config.phases[0].g_steps, config.generator.lr) == (0.1, 200, 1e-3)
    assert (loss.bn, loss.ce, loss.adversarial, loss.bn_momentum) == (1, 1, 0.5, 0)
    assert (loss.contrast, loss.contrast_temperature, config.head.width) == (0.8, 0.2, 256)
    assert (synthesis.memory, synthesis.negatives, synthesis.local_area) == (40960, 4096, 0.25)
    config = cifar10.get_config('deepinversion')
    loss, pixels = config.loss, config.pixels
    assert (config.student.lr, config.phases[0].g_steps, pixels.jitter) == (0.1, 1000, 4)
    assert (pixels.lr, pixels.beta1, pixels.beta2) == (0.1, 0.5, 0.99)
    assert (loss.bn, loss.student_bn, loss.ce, loss.adversarial) == (10, 1e-3, 1, 1)
    assert (loss.adversarial_temperature, loss.tv, loss.l2) == (3, 0, 0)


def test_the_settings_for_imagenet():
    config = imagenet.get_config('fast')
    (phase,) = config.phases
    assert (phase.rounds, phase.g_steps, phase.s_steps) == (4000, 50, 100)
    settings, loss = config.generator, config.loss
    assert (settings.meta, settings.lr, settings.latent_lr) == ('reptile', 2e-4, 0.01)
    assert (settings.meta_lr, config.student.lr, loss.temperature) == (1e-4, 0.1, 5)
    assert imagenet.get_config('deepinversion').pixels.jitter == 28


def test_the_untrained_control_trains_nothing():
    for name, rates in (
        ('fast', ('lr', 'latent_lr', 'meta_lr')),
        ('cmi', ('lr',)),
        ('deepinversion', ('lr',)),
    ):
        config = cifar10.get_config(f'{name},untrained')
        group = config.pixels if name == 'deepinversion' else config.generator
        assert all(group[rate] == 0 for rate in rates)


@pytest.mark.parametrize(
    ('name', 'changes', 'match'),
    [
        *(
            (name, dict(synthesis__bank=bank), f'bank={bank} must be a positive multiple')
            for name in ALL
            for bank in (0, tiny.BATCH + 1)
        ),
        ('nayer', dict(generator__model='cpsc_generator'), 'nayer needs its noisy layer'),
        ('cae', dict(generator__model='nayer_generator'), 'cae needs a generator of pixels'),
        ('fast', dict(generator__meta='maml'), "meta='maml'; expected one of"),
        ('fast', dict(generator__reset_batch=-1), 'reset_batch=-1: expected the number'),
        ('fast', dict(generator__model='nayer_generator'), 'fast needs a generator of pixels'),
        ('cmi', dict(generator__model='cpsc_generator'), 'cmi needs a generator of pixels'),
        ('cmi', dict(synthesis__memory=tiny.BATCH + 1), 'must be a positive multiple'),
        ('cmi', dict(synthesis__negatives=3 * tiny.BATCH), 'negatives=48: expected 1 to'),
        ('cmi', dict(synthesis__local_area=0.0), 'local_area=0.0: expected above 0'),
        ('deepinversion', dict(pixels__keep='worst'), "keep='worst'; expected one of"),
        ('deepinversion', dict(pixels__jitter=tiny.SIZE), 'jitter=8: expected 0 or more'),
    ],
)
def test_mistakes(name: str, changes: dict[str, Any], match: str):
    config = tiny.config(name, **changes)
    with pytest.raises(ValueError, match=match):
        tiny.method(config, sharding.Shards())


@pytest.mark.parametrize('name', ALL)
def test_a_student_that_never_learns_is_a_mistake(name: str):
    config = tiny.config(name)
    config.phases = (common.phase(rounds=1, g_steps=1, s_steps=0),)
    with pytest.raises(ValueError, match='anneals by the round'):
        tiny.method(config, sharding.Shards())


def test_a_teacher_without_maps_has_nothing_to_contrast():
    config = tiny.config('cmi')
    nets = tiny.nets(config)._replace(teacher=tiny.WithoutMaps())
    with pytest.raises(ValueError, match='returns no maps'):
        cmi.make(config, nets, sharding.Shards())
    config.loss.contrast = 0.0
    cmi.make(config, nets, sharding.Shards())


def test_deepinversion_has_no_generator():
    nets = tiny.nets(tiny.config('fast'))
    with pytest.raises(ValueError, match='trains no generator'):
        deepinversion.make(tiny.config('deepinversion'), nets, sharding.Shards())
