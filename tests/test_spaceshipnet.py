"""SpaceshipNet: what is exchanged, what is kept, and the settings of its authors."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from dfkd_jax.configs import cifar10, cifar100, tiny_imagenet
from dfkd_jax.distributed import sharding
from dfkd_jax.methods import spaceshipnet

pytestmark = pytest.mark.usefixtures('fast_compilation')


def synthesised(run: tiny.Built, seed: int = 0, steps: int = 2) -> Any:
    key = jax.random.key(seed)
    state, _ = run.method.begin(run.frozen, run.state, key)
    for i in range(steps):
        state, _ = run.method.generator_step(run.frozen, state, jax.random.fold_in(key, i))
    return run.method.finish(run.frozen, state, key)[0]


def test_half_of_the_channels_stay_drawn_anew_for_each_image():
    keep = np.asarray(spaceshipnet.own_channels(jax.random.key(0), 6, 9))
    np.testing.assert_array_equal(keep.sum(1), 9 // 2)
    assert len(np.unique(keep, axis=0)) > 3
    x, other = np.zeros((6, 2, 3, 9)), np.ones((6, 2, 3, 9))
    mixed = np.asarray(spaceshipnet.exchange(jnp.asarray(x), jnp.asarray(other), keep))
    for image, own in zip(mixed, keep, strict=True):
        np.testing.assert_array_equal(image, np.broadcast_to(~own, (2, 3, 9)))


@pytest.mark.parametrize('level', [0, 1, 2])
@pytest.mark.slow
def test_without_exchange_kept_maps_make_the_images_that_they_are_of(level: int):
    """The generator has not moved since, and evaluates with the moments of the batch."""
    run = tiny.built('spaceshipnet', synthesis__exchange=0.0, synthesis__levels=(level,))
    state = synthesised(run, steps=1)
    nets = tiny.nets(run.config)
    seen = []
    nets.generator.apply(
        {'params': run.state.generator.params, 'batch_stats': run.state.generator.batch_stats},
        state.extra.latent, train=True, mutable=['batch_stats'],
        tap=lambda level, x: seen.append(x) or x,
    )  # fmt: skip
    kept = state.extra.maps[level][: tiny.BATCH]
    np.testing.assert_allclose(kept, seen[level], atol=2e-3, rtol=2e-3)
    image = run.method.sample(run.frozen, state, jax.random.key(4)).image

    def rest(x: jax.Array) -> jax.Array:
        variables = state.generator.variables
        blank = jnp.zeros((len(x), nets.generator.latent))
        put = lambda at, y: x.astype(y.dtype) if at == level else y  # noqa: E731
        return nets.normalise(nets.generator.apply(variables, blank, train=False, tap=put))

    all_images = np.asarray(rest(kept))
    gaps = [np.abs(all_images - one).max((1, 2, 3)).min() for one in np.asarray(image)]
    assert max(gaps) < 1e-4, 'each is one of the bank'


def test_exchange_makes_images_that_are_in_no_bank():
    both = []
    for probability in (0.0, 1.0):
        run = tiny.built('spaceshipnet', synthesis__exchange=probability)
        state = synthesised(run)
        both.append(np.asarray(run.method.sample(run.frozen, state, jax.random.key(1)).image))
    assert np.abs(both[0] - both[1]).mean() > 1e-3


def test_classes_come_equally_often_and_the_generator_goes_on():
    run = tiny.built('spaceshipnet')
    state = synthesised(run)
    label = np.asarray(state.extra.bank.label[: tiny.BATCH])
    np.testing.assert_array_equal(label, np.arange(tiny.BATCH) % tiny.CLASSES)
    after, _ = run.method.begin(run.frozen, state, jax.random.key(9))
    assert tiny.equal(after.generator.params, state.generator.params)
    assert not np.any(tiny.vector(after.generator.opt_state))
    assert not np.array_equal(after.extra.latent, state.extra.latent)
    assert after.extra.maps[0].dtype == jnp.float16


def test_weights_start_as_its_authors_draw_them():
    params = {
        'a': {'kernel': jnp.zeros((3, 3, 64, 128)), 'bias': jnp.ones(128)},
        'b': {'scale': jnp.zeros(4096)},
    }
    for mode, fan in (('fan_in', 9 * 64), ('fan_avg', 9 * (64 + 128) / 2)):
        drawn = spaceshipnet.reinitialise(jax.random.key(0), params, mode)
        np.testing.assert_allclose(np.std(drawn['a']['kernel']), (2 / fan) ** 0.5, rtol=0.02)
        assert not np.any(drawn['a']['bias'])
        np.testing.assert_allclose(np.mean(drawn['b']['scale']), 1, atol=1e-3)
        np.testing.assert_allclose(np.std(drawn['b']['scale']), 0.02, rtol=0.1)


def test_published_numbers():
    """The scripts of its authors, the same for both CIFAR."""
    for config in (cifar10.get_config('spaceshipnet'), cifar100.get_config('spaceshipnet')):
        (phase,) = config.phases
        assert (phase.rounds, phase.loops, phase.g_steps, phase.s_steps) == (200, 1, 200, 2000)
        loss, synthesis, generator = config.loss, config.synthesis, config.generator
        assert (loss.bn, loss.ce, loss.adversarial, loss.student) == (1, 0.5, 0, 'msarc')
        assert (config.msarc.cam, config.msarc.gradcam, config.msarc.temperature) == (1, 1, 30)
        assert config.msarc.kd == 1 / config.data.num_classes
        assert (synthesis.batch_size, synthesis.student_batch_size) == (256, 256)
        assert (synthesis.exchange, tuple(synthesis.levels)) == (0.7, (0, 1, 2))
        assert synthesis.bank == 200 * 256
        assert (generator.latent, generator.width, generator.lr) == (256, 64, 1e-3)
        student = config.student
        assert (student.lr, student.final_lr, student.weight_decay) == (0.1, 0, 1e-4)
    assert tiny_imagenet.get_config('spaceshipnet').phases[0].rounds == 400


@pytest.mark.parametrize(
    ('changes', 'match'),
    [
        (dict(synthesis__exchange=1.5), 'exchange=1.5: expected a probability'),
        (dict(synthesis__levels=(0, 3)), 'levels=.0, 3.: expected one or more of .*0, 1, 2'),
        (dict(synthesis__levels=()), 'expected one or more'),
        (dict(generator__model='nayer_generator'), 'needs a generator of pixels from latents'),
    ],
)
def test_mistakes(changes: dict[str, Any], match: str):
    with pytest.raises(ValueError, match=match):
        tiny.method(tiny.config('spaceshipnet', **changes), sharding.Shards())
