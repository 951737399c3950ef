"""DAFL, ZSKT, DFAD and DFQ: what they share, and what makes each that method."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from dfkd_jax import contract, losses
from dfkd_jax.configs import cifar10, cifar100
from dfkd_jax.distributed import sharding
from dfkd_jax.errors import ConfigError
from dfkd_jax.methods import zskt
from dfkd_jax.methods.shared import generator_only

pytestmark = pytest.mark.usefixtures('fast_compilation')
ALL = ('dafl', 'zskt', 'dfad', 'dfq')


def metrics_of(name: str, step: str, **changes: Any) -> dict[str, Any]:
    """What a step would report, traced and not computed."""
    method = tiny.method(tiny.config(name, **changes), sharding.Shards())
    frozen, key = jax.eval_shape(tiny.frozen), jax.random.key(0)
    state = jax.eval_shape(method.init, frozen, key)
    return jax.eval_shape(getattr(method, step), frozen, state, key)[1]


# 1. What they share.

TERMS = {
    'dafl': ({'one_hot', 'activation', 'balance'}, {'kd'}),
    'zskt': ({'adversarial'}, {'kd', 'attention'}),
    'dfad': ({'adversarial'}, {'kd'}),
    'dfq': ({'adversarial', 'bn', 'one_hot', 'balance'}, {'kd'}),
}


@pytest.mark.parametrize('name', tiny.quick(ALL, 'dfq'))
def test_losses_are_weighted_sums_of_a_methods_terms(name: str):
    _, method, frozen, state = tiny.built(name)
    loss = tiny.config(name).loss
    for step, prefix, terms in zip(
        (method.generator_step, method.student_step), ('g/', 's/'), TERMS[name]
    ):
        metrics = step(frozen, state, jax.random.key(1))[1]
        own = {k.removeprefix(prefix): float(v) for k, v in metrics.items()}
        assert set(own) - {'loss', 'agreement'} == terms
        np.testing.assert_allclose(own['loss'], sum(loss[k] * own[k] for k in terms), rtol=1e-4)


@pytest.mark.parametrize('name', ALL)
def test_a_term_of_weight_zero_is_left_out(name: str):
    for term in TERMS[name][0] - {'bn'}:
        left = metrics_of(name, 'generator_step', **{f'loss__{term}': 0.0})
        assert set(left) == {f'g/{other}' for other in TERMS[name][0] - {term}} | {'g/loss'}


@pytest.mark.parametrize('name', ['dafl', 'dfad'])
def test_the_student_has_no_say_in_dafls_images(name: str):
    _, method, frozen, state = tiny.built(name)
    other = state.replace(student=jax.tree.map(lambda x: x + 1, state.student))
    ends = [
        tiny.vector(method.generator_step(frozen, start, jax.random.key(1))[0].generator)
        for start in (state, other)
    ]
    assert np.array_equal(*ends) == (name == 'dafl')


@pytest.mark.slow
def test_the_benchmarks_mistake_leaves_a_generator_without_an_adversary(
    monkeypatch: pytest.MonkeyPatch,
):
    """Its gradient is rounding error beside that of a true adversary."""
    monkeypatch.setattr(contract, 'update', lambda net, grads, *_: net.replace(params=grads))
    _, _, frozen, state = tiny.built('dfad')
    norms = {}
    for adversary in ('train', 'eval', 'teacher'):
        config = tiny.config('dfad', synthesis__adversary=adversary)
        method = tiny.method(config, sharding.Shards())
        after, metrics = jax.jit(method.generator_step)(frozen, state, jax.random.key(1))
        norms[adversary] = float(optax.tree_utils.tree_norm(after.generator.params))
        assert (abs(metrics['g/adversarial']) < 1e-6) == (adversary == 'teacher')
    assert norms['teacher'] < 1e-5 * min(norms['train'], norms['eval'])
    assert norms['train'] != norms['eval']


def test_the_student_follows_the_generator_on_the_latents_of_the_round():
    """ZSKT's steps of a round share latents; DFAD's have their own."""
    _, method, frozen, state = tiny.built('zskt')
    state, _ = method.begin(frozen, state, jax.random.key(0))
    images = [method.sample(frozen, state, jax.random.key(i)).image for i in (1, 2)]
    np.testing.assert_array_equal(*images)
    again, _ = method.begin(frozen, state, jax.random.key(5))
    assert not np.array_equal(again.extra.z, state.extra.z)
    after, _ = method.generator_step(frozen, state, jax.random.key(3))
    np.testing.assert_array_equal(after.extra.z, state.extra.z)
    assert not np.array_equal(method.sample(frozen, after, jax.random.key(1)).image, images[0])
    _, method, frozen, state = tiny.built('dfad')
    assert method.begin is contract.unchanged and state.extra == ()
    images = [method.sample(frozen, state, jax.random.key(i)).image for i in (1, 2)]
    assert not np.array_equal(*images)


@pytest.mark.parametrize('ending', tiny.quick(['pixels', 'norm', 'affine'], 'affine'))
def test_images_end_as_pixels_or_as_normalised(ending: str):
    _, method, frozen, state = tiny.built('dfad', generator__ending=ending)
    last = state.generator.params.get('norm')
    assert (last is not None) == (ending == 'affine')
    image, label = method.sample(frozen, state, jax.random.key(1))
    if ending == 'pixels':
        pixel = 0.5 + 0.25 * image
        assert 0 < pixel.min() and pixel.max() < 1
    else:
        np.testing.assert_allclose(jnp.mean(image, (0, 1, 2)), 0, atol=1e-5)
        np.testing.assert_allclose(jnp.std(image, (0, 1, 2)), 1, rtol=1e-2)
    logits = tiny.nets(tiny.config('dfad')).teacher.apply(frozen.teacher, image).logits
    np.testing.assert_array_equal(label, jnp.argmax(logits, -1))


def rates(config: Any, of: str, shares: tuple[float, ...]) -> list[float]:
    """What an optimiser without a memory makes of a gradient of one, at shares of the run."""
    tx = generator_only.optimisers(config)[('student', 'generator').index(of)]
    steps = {'student': 's_steps', 'generator': 'g_steps'}[of]
    total = sum(phase.rounds * phase[steps] for phase in config.phases)
    found = []
    for share in shares:
        start = optax.tree_utils.tree_set(
            tx.init(jnp.zeros(())), count=jnp.asarray(round(share * total), jnp.int32)
        )
        update = tx.update(jnp.ones(()), start, jnp.zeros(()))[0]
        found.append(-float(update))
    return found


def test_rates_fall_as_their_authors_let_them():
    at = (0.0, 0.19, 0.21, 0.41, 1.0)
    dfad = cifar10.get_config('dfad')
    np.testing.assert_allclose(rates(dfad, 'student', at), [0.1, 0.1, 0.01, 1e-3, 1e-3], rtol=1e-4)
    found = np.array(rates(dfad, 'generator', at[1:]))  # of Adam's steps only the ratios count
    np.testing.assert_allclose(found / found[0], [1, 0.1, 0.01, 0.01], rtol=1e-2)
    dfq = cifar10.get_config('dfq')
    found = rates(dfq, 'student', (0.0, 0.5, 1.0))
    np.testing.assert_allclose(found, [0.1, (0.1 + 2e-4) / 2, 2e-4], rtol=1e-4)


def test_a_gradients_norm_is_limited_before_anything_else():
    student_tx, generator_tx = generator_only.optimisers(
        tiny.config('zskt', student__optimiser='sgd')
    )
    grads = jnp.full((4,), 1e3)
    updates, _ = student_tx.update(grads, student_tx.init(grads), jnp.zeros(4))
    np.testing.assert_allclose(optax.tree_utils.tree_norm(updates), 5.0 * 2e-3, rtol=1e-5)


def test_zskts_images_end_without_a_tanh():
    """In a norm with scale and shift, of a map without bounds (ZSKT's repository)."""
    assert cifar10.get_config('zskt').generator.ending == 'affine'
    assert cifar10.get_config('dfad').generator.ending == 'norm'
    module = tiny.nets(tiny.config('zskt')).generator
    z = jax.random.normal(jax.random.key(0), (16, module.latent))
    variables = jax.jit(module.init)(jax.random.key(1), z)
    kernel = variables['params']['conv3']['kernel']
    ends = []
    for factor in (1.0, 50.0):  # a norm takes it out again, a tanh between them would not
        variables['params']['conv3']['kernel'] = factor * kernel
        ends.append(np.asarray(module.apply(variables, z, mutable=['batch_stats'])[0]))
    np.testing.assert_allclose(ends[0], ends[1], atol=2e-2)
    variables['params']['norm'] = {'scale': jnp.full(3, 2.0), 'bias': jnp.full(3, 1.0)}
    moved, _ = module.apply(variables, z, mutable=['batch_stats'])
    np.testing.assert_allclose(moved, 1 + 2 * ends[1], atol=1e-4)


# 2. Attention.


def test_attention_is_where_a_map_is_active():
    x = np.random.default_rng(0).normal(size=(2, 3, 4, 5)).astype(np.float32)
    energy = np.mean(x.astype(np.float64) ** 2, -1).reshape(2, 12)
    expected = energy / np.linalg.norm(energy, axis=-1, keepdims=True)
    np.testing.assert_allclose(zskt.attention(jnp.asarray(x)), expected, rtol=1e-5)
    np.testing.assert_allclose(zskt.attention(jnp.asarray(7 * x)), expected, rtol=1e-5)


def test_attention_is_compared_on_maps_of_equal_size():
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    student = (draw(2, 8, 8, 3), draw(2, 4, 4, 5), draw(2, 2, 2, 5))
    teacher = (draw(2, 8, 8, 6), draw(2, 4, 4, 7))
    expected = sum(
        np.mean(np.square(zskt.attention(s) - zskt.attention(t)), -1)
        for s, t in zip(student, teacher)
    )
    found = zskt.attention_transfer(student, teacher)
    assert found.shape == (2,)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert np.all(zskt.attention_transfer(teacher, teacher) == 0)
    grads = jax.grad(lambda s: jnp.sum(zskt.attention_transfer(s, teacher)))(
        jax.tree.map(jnp.zeros_like, student)
    )
    assert np.all(np.isfinite(tiny.vector(grads))), 'of maps that are zero everywhere too'


@pytest.mark.slow
def test_attention_draws_the_students_maps_to_the_teachers():
    """At equal divergence's weight, and against a student without it."""
    ends = []
    for weight in (0.0, 250.0):
        _, method, frozen, state = tiny.built('zskt', loss__attention=weight, student__lr=1e-2)
        state, _ = method.begin(frozen, state, jax.random.key(0))
        image = method.sample(frozen, state, jax.random.key(0)).image
        for i in range(20):
            state, _ = method.student_step(frozen, state, jax.random.key(i))
        nets = tiny.nets(tiny.config('zskt'))
        teacher = nets.teacher.apply(frozen.teacher, image)
        out, _ = nets.student.apply(
            state.student.variables, image, train=True, mutable=['batch_stats']
        )
        ends.append(float(jnp.mean(zskt.attention_transfer(out.stages, teacher.stages))))
    assert ends[1] < 0.7 * ends[0]


# 3. The two discrepancies.


def test_zskt_and_dfad_are_one_loss_apart():
    rng = np.random.default_rng(0)
    student, teacher = (jnp.asarray(rng.normal(size=(6, 4)), jnp.float32) for _ in range(2))
    for name, expected in (
        ('zskt', losses.kd(student, teacher)),
        ('dfad', np.mean(np.abs(student - teacher), -1)),
    ):
        loss = tiny.config(name).loss
        np.testing.assert_allclose(zskt.discrepancy(loss, student, teacher), expected, rtol=1e-5)
        assert np.all(zskt.discrepancy(loss, teacher, teacher) == 0)


@pytest.mark.parametrize('name', tiny.quick(['zskt', 'dfad', 'dfq'], 'dfq'))
def test_the_generator_widens_what_the_student_narrows(name: str):
    _, method, frozen, state = tiny.built(name, generator__lr=1e-2)
    before, _ = method.begin(frozen, state, jax.random.key(0))
    state, measured = before, []
    for i in range(15):
        state, metrics = method.generator_step(frozen, state, jax.random.key(i))
        measured.append(float(metrics['g/adversarial']))
    assert np.mean(measured[-4:]) < np.mean(measured[:4]) < 0


def test_dafl_finds_confident_images_of_all_classes():
    _, method, frozen, state = tiny.built(
        'dafl', generator__lr=1e-2, loss__one_hot=1.0, loss__activation=0.0
    )
    measured = []
    for i in range(40):
        state, metrics = method.generator_step(frozen, state, jax.random.key(i))
        measured.append((float(metrics['g/one_hot']), float(metrics['g/balance'])))
    first, last = np.mean(measured[:5], axis=0), np.mean(measured[-5:], axis=0)
    assert last[0] < 0.8 * first[0]
    assert last[1] < -0.9 * np.log(tiny.CLASSES), 'nearly as balanced as can be'


# 4. Settings.


def test_published_numbers():
    """The READMEs, scripts and defaults of DAFL's, ZSKT's and DFAD's authors; CMI's for DFQ."""
    expected = {  # batch, latents, rates, rounds, steps of the student
        'dafl': (1024, 1000, 0.02, 0.1, 240_000, 1),
        'zskt': (128, 100, 1e-3, 2e-3, 80_000, 10),
        'dfad': (256, 256, 1e-3, 0.1, 25_000, 5),
        'dfq': (256, 256, 1e-3, 0.1, 8_000, 10),
    }
    for name, numbers in expected.items():
        config = cifar10.get_config(name)
        (phase,) = config.phases
        assert numbers == (
            config.synthesis.batch_size, config.generator.latent, config.generator.lr,
            config.student.lr, phase.rounds, phase.s_steps,
        )  # fmt: skip
        assert phase.g_steps == phase.loops == 1
        assert config.loss.temperature == 1
    loss = cifar10.get_config('dafl').loss
    np.testing.assert_allclose(loss.balance, 5 / np.log(10), rtol=1e-3)
    np.testing.assert_allclose(cifar100.get_config('dafl').loss.balance, 20 / np.log(10), rtol=1e-3)
    assert (loss.one_hot, loss.activation) == (0.05, 0.01)
    loss = cifar10.get_config('zskt').loss
    assert (loss.attention, loss.kd, loss.adversarial) == (250, 0.1, 0.1)
    loss = cifar10.get_config('dfq').loss
    assert (loss.adversarial, loss.bn, loss.one_hot, loss.balance) == (1, 1, 1, 20)


def test_the_benchmark_runs_all_four_alike():
    """200 epochs of 400 steps of the student, batches of 256; the right student, temperature 1."""
    for name in ALL:
        config = cifar10.get_config(f'{name},benchmark')
        (phase,) = config.phases
        assert phase.rounds * phase.s_steps == 200 * 400 and phase.g_steps == 1
        assert (config.synthesis.batch_size, config.student.lr) == (256, 0.1)
        assert (config.student.optimiser, config.student.weight_decay) == ('sgd', 1e-4)
        assert (config.generator.lr, config.generator.beta1) == (1e-3, 0.5)
        assert (config.synthesis.adversary, config.loss.temperature) == ('eval', 1)
        assert config.generator.ending == 'pixels'
    loss = cifar10.get_config('dafl,benchmark').loss
    assert (loss.one_hot, loss.activation, loss.balance) == (1, 1e-3, 20)
    assert cifar10.get_config('zskt,benchmark').loss.attention == 0
    with pytest.raises(ConfigError, match='found benchmark; .* FLAG, for nayer, one of smoke'):
        cifar10.get_config('nayer,benchmark')


@pytest.mark.parametrize(
    ('name', 'changes', 'match'),
    [
        ('dafl', dict(synthesis__adversary='itself'), "adversary='itself'.*expected one of"),
        ('dafl', dict(student__optimiser='lamb'), "optimiser='lamb'"),
        ('dafl', dict(generator__ending='relu'), "ending='relu'"),
        ('dafl', dict(student__milestones=(0.5, 40.0)), 'expected shares of the run'),
        ('zskt', dict(synthesis__student_batch_size=8), 'differ: make them equal'),
        ('dfad', dict(loss__discrepancy='l2'), "discrepancy='l2'"),
        ('dfq', dict(generator__model='nayer_generator'), 'needs a generator of latents alone'),
    ],
)
def test_mistakes(name: str, changes: dict[str, Any], match: str):
    with pytest.raises(ValueError, match=match):
        tiny.method(tiny.config(name, **changes), sharding.Shards())


def test_networks_without_maps_of_one_size_have_no_attention_to_transfer():
    config = tiny.config('zskt')
    nets = tiny.nets(config)
    small = nets._replace(student=tiny.WithoutMaps())
    with pytest.raises(ValueError, match='none can be compared'):
        zskt.make(config, small, sharding.Shards())
    config.loss.attention = 0.0
    zskt.make(config, small, sharding.Shards())
