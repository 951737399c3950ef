"""DiffDFKD: guidance as the reference has it, Latent CutMix, and which trajectories there are."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from ml_collections import ConfigDict
from reference import last, near

from dfkd_jax import contract, diffusion, losses, models, port
from dfkd_jax.configs import digits
from dfkd_jax.diffusion import schedule as schedules
from dfkd_jax.distributed import sharding
from dfkd_jax.errors import ConfigError
from dfkd_jax.loops.round import make_round
from dfkd_jax.methods import diffdfkd
from dfkd_jax.methods.shared import trajectories

pytestmark = pytest.mark.usefixtures('fast_runs')


def in_loop_trainings(config: ConfigDict) -> list[int]:
    return trajectories.in_loop_trainings(
        config.synthesis, config.in_loop, config.loss.adversarial, config.data.num_classes
    )


# 1. Guidance.


class Telling(sharding.Shards):
    """Gradients are measured, too."""

    def value_and_grad(self, loss_fn: Any) -> Any:
        def fn(x: jax.Array) -> Any:
            (loss, (terms, image)), grad = sharding.Shards.value_and_grad(self, loss_fn)(x)
            return (loss, (terms | {'grad': grad, 'image': image}, image)), grad

        return fn


def test_a_guided_step_equals_the_reference(golden: Path, rule):
    """Through the U-Net, the decoder and the teacher; blocks recomputed."""
    pytest.importorskip('tokenizers', reason='pip install tokenizers')
    expected = tiny.arrays(golden / 'tiny_sd' / 'expected.npz')
    prior = diffusion.load(golden / 'tiny_sd' / 'model', remat=True)
    config = tiny.config('diffdfkd', synthesis__batch_size=2, synthesis__stored_size=16)
    config.data.update(image_size=16, channels=3, num_classes=10)
    config.prior.steps = 10  # of which the fifth is at timestep 501
    config.loss.adversarial = 0.0
    config.synthesis.update(cutmix=False, per_image=False)
    teacher = models.make('wrn16_1')
    nets = contract.Models(
        teacher, teacher, None, 10, (16, 16, 3), (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010),
        prior._replace(frozen={}),
    )  # fmt: skip
    method = diffdfkd.make(config, nets, Telling())
    shapes = jax.eval_shape(teacher.init, jax.random.key(0), jnp.zeros((1, 16, 16, 3)))
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), shapes)
    names = [(name, value.shape) for name, value in port.to_torch('wrn16_1', zeros).items()]
    weights = port.from_torch('wrn16_1', rule.state_dict(names))
    text = jnp.asarray(expected['text_hidden'])[jnp.asarray([0, 2])]
    frozen = contract.Frozen(weights, trajectories.FrozenPrior(prior.frozen, text))
    z = last(expected['guided_z'])
    blank = jax.eval_shape(method.init, frozen, jax.random.key(0))
    state = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), blank)
    label = jnp.asarray(expected['guided_labels'], jnp.int32)
    extra = state.extra.replace(x=jnp.asarray(z), step=jnp.asarray(4, jnp.int32), label=label)

    key = jax.random.key(5)
    state, measured = jax.jit(method.generator_step)(frozen, state.replace(extra=extra), key)
    near(measured['g/bn'], expected['guided_loss_bn'], 'bn')
    near(measured['g/ce'], expected['guided_loss_cls'], 'ce')
    near(measured['g/loss'], expected['guided_loss'], 'loss')
    near(measured['g/image'], last(expected['guided_image']), 'image')
    near(measured['g/grad'], last(expected['guided_grad']), 'gradient')
    x = z - measured['g/grad']
    noise = jax.random.normal(jax.random.split(key)[1], x.shape)
    after = schedules.ddpm_step(prior.schedule, x, state.extra.eps, 501, 401, noise)
    near(state.extra.x, after, 'x')


@cache
def trajectory(
    source: str = 'guided', mode: str = 'jit', bn: float = 0.1, **synthesis: Any
) -> tuple[contract.State, dict[str, float]]:
    """The end of one trajectory of the tiny diffusion model, and what was measured at its end."""
    config = tiny.config('diffdfkd')
    config.loss.update(adversarial=0.0, bn=bn)
    config.synthesis.update(dict(source=source, cutmix=False) | synthesis)
    config.distil.random_resized_crop = 'stored_size' in synthesis
    plan = sharding.make(mode)
    method = diffdfkd.make(config, tiny.nets(config, plan.shards.axis), plan.shards)
    frozen = plan.replicate(tiny.frozen(method='diffdfkd'))
    whole = diffdfkd.make(config, tiny.nets(config), sharding.Shards())
    state = plan.replicate(whole.init(frozen, jax.random.key(0)))
    state = state.replace(round=state.round + 2)
    phase = ConfigDict(dict(loops=1, g_steps=config.prior.steps - 1, s_steps=0))
    state, row = make_round(method, phase, plan)(frozen, state, jax.random.key(1))
    return jax.device_get((state, row))


@pytest.mark.slow
def test_guidance_raises_confidence_and_lowers_the_distance_of_statistics():
    (state, guided), (_, unguided) = trajectory(), trajectory('unguided')
    assert guided['g/final_confidence'] > unguided['g/final_confidence'] + 0.1
    assert trajectory(bn=2.0)[1]['g/final_bn'] < 0.9 * unguided['g/final_bn']
    assert guided['g/final_ce'] < unguided['g/final_ce']
    assert set(state.extra.label) == {2}, 'round r makes class r'
    assert 'g/ce' not in unguided, 'the teacher has no part in it'


@pytest.mark.slow
def test_steps_through_the_decoder_alone_are_others():
    (through, _), (past, row) = trajectory(), trajectory(through_unet=False)
    assert not np.allclose(through.extra.x, past.extra.x)
    assert row['g/final_confidence'] > trajectory('unguided')[1]['g/final_confidence']


def test_a_batch_shared_by_devices_is_the_same_batch():
    """Bytes may round to either side."""
    (one, _), (four, _) = trajectory(), trajectory(mode='shard_map')
    tiny.close(four.extra.x, one.extra.x, 1e-4)
    difference = np.abs(one.extra.image.astype(int) - four.extra.image.astype(int))
    assert difference.max() <= 1 and (difference > 0).mean() < 0.01


@pytest.mark.slow
def test_quirks_are_options():
    fresh, old = trajectory()[0].extra.image, trajectory(final='stale')[0].extra
    assert not np.array_equal(fresh, old.image)
    # The noise and the timestep of the last guided step, not the timestep of 1 that follows it.
    nets, frozen = tiny.nets(tiny.config('diffdfkd')), tiny.frozen(method='diffdfkd')
    t = schedules.timesteps(nets.prior.schedule, tiny.config('diffdfkd').prior.steps)[-2]
    pixel = diffdfkd.predict_pixels(nets, frozen, old.x, old.eps, t)
    expected = diffdfkd.to_bytes(diffdfkd.resize(nets, pixel, tiny.SIZE))
    assert np.abs(expected.astype(int) - old.image.astype(int)).max() <= 1
    four_taps, _ = trajectory(four_taps=True, stored_size=tiny.SIZE)
    assert four_taps.extra.x.shape == trajectory()[0].extra.x.shape
    whole, _ = trajectory(intermediate=True)
    assert whole.extra.intermediate.shape == (4, *whole.extra.image.shape)
    assert np.array_equal(whole.extra.image, fresh), 'keeping images changes none'
    between = [each.astype(int) for each in [*whole.extra.intermediate, whole.extra.image]]
    assert all(np.abs(a - b).max() > 0 for a, b in zip(between, between[1:], strict=False))
    batch_step, image_step = (trajectory(per_image=flag)[0].extra.x for flag in (False, True))
    assert not np.allclose(batch_step, image_step)


def test_a_size_of_its_own_is_stored():
    state, row = trajectory(stored_size=12)
    assert state.extra.image.shape == (tiny.BATCH, 12, 12, tiny.CHANNELS)
    small = diffusion.resize_bicubic(state.extra.image.astype(np.float32), tiny.SIZE)
    same = trajectory()[0].extra.image
    assert np.corrcoef(np.ravel(small), np.ravel(same))[0, 1] > 0.9
    assert np.isfinite(list(row.values())).all()


def test_noise_images_need_no_diffusion_model():
    state, _ = trajectory('noise')
    pixel = state.extra.image / 255
    config = tiny.config('diffdfkd')
    mean, std = tiny.nets(config).mean[0], tiny.nets(config).std[0]
    assert abs(pixel.mean() - mean) < 0.02 and 0.5 * std < pixel.std() < 1.1 * std
    flat = pixel.reshape(-1, tiny.SIZE, tiny.CHANNELS)
    assert abs(np.corrcoef(np.ravel(flat[:, 1:]), np.ravel(flat[:, :-1]))[0, 1]) < 0.1


@pytest.mark.slow
def test_the_student_has_a_say_once_it_has_learnt_enough():
    """With weight zero before, so that the same program serves; the teacher's answers are given."""
    config = tiny.config('diffdfkd', synthesis__cutmix=False, synthesis__per_class=6 * tiny.BATCH)
    config.in_loop.update(start=2 * tiny.BATCH, every=tiny.BATCH, batch_size=tiny.BATCH)
    assert in_loop_trainings(config)[0] == tiny.CLASSES
    method = diffdfkd.make(config, tiny.nets(config), sharding.Shards())
    frozen = tiny.frozen(method='diffdfkd')
    state, _ = method.begin(frozen, method.init(frozen, jax.random.key(0)), jax.random.key(1))
    state = state.replace(student=state.student.replace(**frozen.teacher))
    half = jax.tree.map(lambda leaf: 0.5 * leaf, state.student.params['fc'])
    state = state.replace(
        student=state.student.replace(params=state.student.params | {'fc': half})
    )  # agrees with the teacher, and is less sure
    step = jax.jit(method.generator_step)
    seen = {}
    for turns in (0, 1, 2):
        at = state.replace(round=jnp.asarray(turns * tiny.CLASSES, jnp.int32))
        after, row = step(frozen, at, jax.random.key(2))
        rest = config.loss.bn * row['g/bn'] + config.loss.ce * row['g/ce']
        seen[turns] = (after.extra.x, float(row['g/loss'] - rest), float(row['g/adversarial']))
    assert seen[0][2] < -1e-3
    assert np.array_equal(seen[0][0], seen[1][0]) and abs(seen[1][1]) < 1e-5
    assert not np.array_equal(seen[0][0], seen[2][0])
    assert seen[2][1] == pytest.approx(seen[2][2], rel=1e-3)
    # A session that comes late, because its batch is large, keeps the student silent until then.
    config.in_loop.batch_size = 3 * tiny.BATCH * tiny.CLASSES
    late = jax.jit(diffdfkd.make(config, tiny.nets(config), sharding.Shards()).generator_step)
    at = state.replace(round=jnp.asarray(2 * tiny.CLASSES, jnp.int32))
    np.testing.assert_array_equal(late(frozen, at, jax.random.key(2))[0].extra.x, seen[0][0])


def test_only_the_student_is_pushed_by_the_adversarial_term():
    config = tiny.config('diffdfkd', synthesis__cutmix=False, synthesis__per_class=6 * tiny.BATCH)
    config.in_loop.update(start=0, every=tiny.BATCH, batch_size=tiny.BATCH)
    config.loss.update(bn=0.0, ce=0.0, adversarial=1.0)
    nets, frozen = tiny.nets(config), tiny.frozen(method='diffdfkd')
    method = diffdfkd.make(config, nets, Telling())
    state, _ = method.begin(frozen, method.init(frozen, jax.random.key(0)), jax.random.key(1))
    half = jax.tree.map(lambda leaf: 0.5 * leaf, frozen.teacher['params']['fc'])
    student = frozen.teacher | {'params': frozen.teacher['params'] | {'fc': half}}
    state = state.replace(
        student=state.student.replace(**student), round=jnp.asarray(tiny.CLASSES, jnp.int32)
    )
    _, row = jax.jit(method.generator_step)(frozen, state, jax.random.key(2))

    def expected(x: jax.Array, answers: Any = None) -> tuple[jax.Array, jax.Array]:
        t = schedules.timesteps(nets.prior.schedule, config.prior.steps)[0]
        eps = nets.prior.pure.eps(frozen.extra.params, x, np.full(len(x), t), None)
        z0 = schedules.to_x0(nets.prior.schedule, eps, x, t)
        image = nets.normalise(nets.prior.pure.decode({}, z0))
        logits = nets.teacher.apply(frozen.teacher, image).logits
        answers = logits if answers is None else answers
        student_logits = nets.student.apply(student, image).logits
        return jnp.mean(losses.adversarial(student_logits, answers)), logits

    _, answers = expected(state.extra.x)
    grad = jax.jit(jax.grad(lambda x: expected(x, answers)[0]))(state.extra.x)
    assert np.abs(grad).max() > 0
    near(row['g/grad'], grad, 'gradient')


def test_texts_are_those_of_the_classes_or_one_for_all():
    """Classifier-free guidance, of an eps that is the text itself."""
    config = tiny.config('diffdfkd', synthesis__source='unguided', synthesis__cutmix=False)
    nets = tiny.nets(config)

    def eps(params: Any, x: jax.Array, t: jax.Array, cond: jax.Array) -> jax.Array:
        return jnp.broadcast_to(cond[:, :1, :1, None], x.shape)

    nets = nets._replace(prior=nets.prior._replace(pure=nets.prior.pure._replace(eps=eps)))
    method = diffdfkd.make(config, nets, sharding.Shards())
    teacher = tiny.frozen(method='diffdfkd').teacher
    scale = config.prior.scale
    for text, wanted in (([1.0, 2, 3, 4, 0.5], 3.0), ([1.0, 0.5], 1.0)):
        states = jnp.asarray(text)[:, None, None]
        frozen = contract.Frozen(teacher, trajectories.FrozenPrior({}, states))
        state = method.init(frozen, jax.random.key(0))
        state = state.replace(round=state.round + 2)
        state, _ = method.begin(frozen, state, jax.random.key(0))
        state, _ = method.generator_step(frozen, state, jax.random.key(0))
        np.testing.assert_allclose(state.extra.eps, 0.5 + scale * (wanted - 0.5), rtol=1e-6)


# 2. Latent CutMix.


def mixed(key: int, shape: tuple[int, ...] = (6, 16, 8, 2), **options: Any) -> tuple[Any, Any]:
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    return x, np.asarray(diffdfkd.latent_cutmix(jax.random.key(key), jnp.asarray(x), **options))


def test_cutmix_shows_one_box_of_other_images():
    shares = []
    for key in range(40):
        x, y = mixed(key)
        changed = (x != y).any((0, 3))
        rows, columns = np.flatnonzero(changed.any(1)), np.flatnonzero(changed.any(0))
        shares.append(changed.mean())
        if not len(rows):
            continue
        box = np.ix_(
            range(len(x)), range(rows[0], rows[-1] + 1), range(columns[0], columns[-1] + 1)
        )
        assert changed[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all(), 'a rectangle'
        inside, at = y[box], x[box]
        source = [[np.array_equal(a, b) for b in at] for a in inside]
        assert np.sum(source) == len(x) and np.sum(source, 0).max() == 1, 'a permutation'
    # Half the area on average, less what the borders cut off.
    assert 0.15 < np.mean(shares) < 0.5 and np.max(shares) > 0.6 and np.min(shares) < 0.02


@pytest.mark.parametrize('ratio', ['uniform', 'double_beta'])
def test_the_box_has_a_centre_anywhere_and_rounded_sides(ratio: str):
    """As the function that the repository's augmentation number 3 calls cuts it."""
    height, width, boxes = 16, 8, 0
    for key in range(30):
        x, y = mixed(key, (6, height, width, 2), ratio=ratio)
        _, key_ratio, key_centre, key_beta = jax.random.split(jax.random.key(key), 4)
        stays = jax.random.uniform(key_ratio)
        if ratio == 'double_beta':
            stays = jax.random.beta(key_beta, *2 * [jnp.maximum(stays, 1e-3)])
        row, column = jax.random.uniform(key_centre, (2,))
        expected = np.zeros((height, width), bool)
        ends = [
            np.clip(side * (at + np.array([-0.5, 0.5]) * np.sqrt(1 - stays)), 0, side).round()
            for side, at in ((height, row), (width, column))
        ]
        (top, bottom), (left, right) = np.array(ends, int)
        expected[top:bottom, left:right] = True
        changed = (x != y).any((0, 3))
        if changed.any():
            np.testing.assert_array_equal(changed, expected)
            boxes += 1
    assert boxes > 10


def test_cutmix_of_one_image_changes_nothing():
    x, y = mixed(3, (1, 8, 8, 4))
    np.testing.assert_array_equal(x, y)


def test_double_draw_has_more_extremes():
    """Beta(a, a) with a uniform a is mostly near nothing or all."""

    def shares(ratio: str) -> np.ndarray:
        return np.array([(np.diff(mixed(k, ratio=ratio), axis=0) != 0).mean() for k in range(60)])

    single, double = shares('uniform'), shares('double_beta')
    assert np.isfinite(double).all()
    assert (double < 0.02).mean() > (single < 0.02).mean()


def test_cutmix_comes_at_every_fifth_of_a_trajectory_but_the_last():
    config = tiny.config('diffdfkd', synthesis__source='unguided')
    config.prior.steps = 10
    frozen, found = tiny.frozen(method='diffdfkd'), {}
    for flag in (True, False):
        config.synthesis.cutmix = flag
        method = diffdfkd.make(config, tiny.nets(config), sharding.Shards())
        state, _ = method.begin(frozen, method.init(frozen, jax.random.key(0)), jax.random.key(0))
        step = jax.jit(method.generator_step)
        for number in range(9):
            extra = state.extra.replace(step=jnp.asarray(number, jnp.int32))
            # A key whose box is large.
            after, _ = step(frozen, state.replace(extra=extra), jax.random.key(2))
            found[flag, number] = np.asarray(after.extra.x)
    differ = [not np.array_equal(found[True, n], found[False, n]) for n in range(9)]
    assert [n + 1 for n in range(9) if differ[n]] == [2, 4, 6, 8]


# 3. Trajectories.


def test_every_class_gets_exactly_the_images_wanted():
    config = tiny.config('diffdfkd', synthesis__per_class=21, synthesis__batch_size=8)
    total = trajectories.count(config.synthesis, config.data.num_classes)
    assert total == 3 * tiny.CLASSES
    kept = np.zeros(tiny.CLASSES)
    for number in range(total):
        kept[number % tiny.CLASSES] += trajectories.kept_images(
            config.synthesis, tiny.CLASSES, number
        )
    assert kept.tolist() == [21] * tiny.CLASSES


def test_the_in_loop_student_learns_whenever_there_is_more_to_learn_from():
    config = tiny.config('diffdfkd', synthesis__per_class=40, synthesis__batch_size=4)
    config.in_loop.update(every=10, batch_size=32)
    # 10, 20 and 30 images a class are passed after 3, 5 and 8 batches of each of 4 classes.
    assert in_loop_trainings(config) == [12, 20, 32]
    config.in_loop.batch_size = 60  # more than the first 48 images
    assert in_loop_trainings(config) == [20, 32]
    for group, change in (('loss', {'adversarial': 0.0}), ('in_loop', {'every': 0})):
        other = config.copy_and_resolve_references()
        other[group].update(change)
        assert in_loop_trainings(other) == []


def test_flags_make_the_controls():
    assert digits.get_config('diffdfkd,noise').synthesis.source == 'noise'
    assert digits.get_config('diffdfkd,unguided').synthesis.source == 'unguided'
    with pytest.raises(ConfigError, match='found unguided; .* FLAG, for cpsc, one of smoke'):
        digits.get_config('cpsc,unguided')
    with pytest.raises(ConfigError, match='found untrained; .* FLAG, for diffdfkd, one of smoke'):
        digits.get_config('diffdfkd,untrained')
