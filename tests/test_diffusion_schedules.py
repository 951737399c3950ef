"""Noise schedules: the reference's timesteps and steps, the papers' identities, clear errors."""

from __future__ import annotations

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from reference import last, near

from dfkd_jax.diffusion import schedule
from dfkd_jax.errors import DiffusionError

SD = {'_class_name': 'DDPMScheduler', 'beta_start': 0.00085, 'beta_end': 0.012,
      'beta_schedule': 'scaled_linear', 'clip_sample': False, 'steps_offset': 1}  # fmt: skip
X = np.random.default_rng(0).standard_normal((2, 4, 4, 3)).astype(np.float32)
EPS = np.random.default_rng(1).standard_normal(X.shape).astype(np.float32)
NOISE = np.random.default_rng(2).standard_normal(X.shape).astype(np.float32)


def make(**changes) -> schedule.Schedule:
    return schedule.from_config(SD | changes)


# 1. The reference.


@pytest.fixture
def expected(golden: Path):
    return tiny.arrays(golden / 'tiny_sd' / 'expected.npz')


@pytest.fixture
def table(golden: Path) -> schedule.Schedule:
    path = golden / 'tiny_sd' / 'model' / 'scheduler' / 'scheduler_config.json'
    return schedule.from_config(json.loads(path.read_text()))


def test_table_and_timesteps_equal_the_reference(table, expected):
    near(table.alphas_cumprod, expected['alphas_cumprod'], 'alphas', 2e-6)
    for steps in (10, 50, 70):
        actual = schedule.timesteps(table, steps)
        np.testing.assert_array_equal(actual, expected[f'ddpm_timesteps_{steps}'])
        np.testing.assert_array_equal(schedule.previous(table, steps), [*actual[1:], -1])


@pytest.mark.parametrize('name', ['ddpm_981', 'ddpm_501', 'ddpm_21', 'ddpm_1',
                                  'ddim_981', 'ddim_501', 'ddim_21'])  # fmt: skip
def test_steps_equal_the_reference(table, expected, name):
    sampler, t = name.split('_')
    before = schedule.timesteps(table, 50).tolist()
    t_next = schedule.previous(table, 50, sampler)[before.index(int(t))]
    inputs = [last(expected['latents']), last(expected['unet_eps']), int(t), t_next]
    if sampler == 'ddpm':
        actual = schedule.ddpm_step(table, *inputs, last(expected['step_noise']))
    else:
        actual = schedule.ddim_step(table, *inputs)
    near(actual, last(expected[f'{sampler}_step_T50_t{t}']), name)


# 2. Tables.


def test_betas():
    linear = make(beta_schedule='linear', beta_start=0.1, beta_end=0.3, num_train_timesteps=3)
    np.testing.assert_allclose(linear.alphas_cumprod, [0.9, 0.72, 0.504], rtol=1e-6)
    scaled = make(beta_start=0.04, beta_end=0.16, num_train_timesteps=3)
    np.testing.assert_allclose(scaled.alphas_cumprod, np.cumprod([0.96, 0.91, 0.84]), rtol=1e-6)
    given = make(trained_betas=[0.5, 0.25])
    np.testing.assert_allclose(given.alphas_cumprod, [0.5, 0.375], rtol=1e-6)
    # The cosine itself, until the cap: at the middle of 1000 steps (0.508 / 1.008) quarter turns.
    cosine = make(beta_schedule='squaredcos_cap_v2').alphas_cumprod
    start = np.cos(0.008 / 1.008 * np.pi / 2) ** 2
    assert cosine[499] == pytest.approx(np.cos(0.508 / 1.008 * np.pi / 2) ** 2 / start, rel=1e-4)
    assert cosine[-1] / cosine[-2] == pytest.approx(0.001, rel=1e-3)


def test_defaults_are_those_of_each_class():
    """What files of old versions leave out: DDPM and DDIM clip, PNDM does not."""
    bare = {'beta_schedule': 'scaled_linear'}
    clips = {kind: schedule.from_config({'_class_name': kind} | bare) for kind in schedule.TYPES}
    assert [clips[kind].clip for kind in schedule.TYPES] == [1.0, 1.0, None]
    assert [clips[kind].alpha_after_last == 1 for kind in schedule.TYPES] == [True, True, False]
    assert clips['DDPMScheduler'].variance == 'fixed_small'
    assert clips['DDPMScheduler'].spacing == 'leading' and not clips['DDPMScheduler'].offset


@pytest.mark.parametrize(
    'spacing, offset, expected',
    [
        ('leading', 0, [750, 500, 250, 0]),
        ('leading', 1, [751, 501, 251, 1]),
        ('trailing', 1, [999, 749, 499, 249]),
        ('linspace', 1, [999, 666, 333, 0]),
    ],
)
def test_spacing(spacing, offset, expected):
    table = make(timestep_spacing=spacing, steps_offset=offset)
    t = schedule.timesteps(table, 4)
    assert t.dtype == np.int32 and t.tolist() == expected
    assert schedule.previous(table, 4).tolist() == [*expected[1:], -1]
    assert schedule.previous(table, 4, 'ddim').tolist() == [each - 250 for each in expected]


def test_trailing_timesteps_are_as_many_as_asked_for():
    """1000 / 7 and the like, where rounding decides whether one more fits."""
    table = make(timestep_spacing='trailing')
    for steps in (*range(1, 120), 333, 999, 1000):
        t = schedule.timesteps(table, steps)
        assert len(t) == steps and t[0] == 999 and t[-1] >= 0 and (np.diff(t) < 0).all()


# 3. Steps.


def test_ddim_with_eta_1_is_ddpm():
    """Song et al., section 4.1: the same mean and the same variance."""
    table = make()
    for t, t_next in ((981, 961), (21, 1), (500, 0)):
        ancestral = schedule.ddpm_step(table, X, EPS, t, t_next, NOISE)
        near(schedule.ddim_step(table, X, EPS, t, t_next, NOISE, 1.0), ancestral, 'eta', 1e-5)


def test_ddim_is_on_the_way_between_image_and_noise():
    table = make()
    x0 = np.clip(X, -1, 1)
    x = schedule.add_noise(table, x0, EPS, 601)
    near(schedule.to_x0(table, EPS, x, 601), x0, 'x0', 1e-5)
    expected = schedule.add_noise(table, x0, EPS, 301)
    near(schedule.ddim_step(table, x, EPS, 601, 301), expected, 'half way', 1e-5)
    near(schedule.ddim_step(table, x, EPS, 601, -1), x0, 'all the way', 1e-5)
    kept = make(set_alpha_to_one=False)
    expected = schedule.add_noise(kept, x0, EPS, 0)
    near(schedule.ddim_step(kept, x, EPS, 601, -1), expected, 'to the first timestep', 1e-5)


def test_last_ddpm_step_is_the_image_without_noise():
    table = make()
    x = schedule.add_noise(table, X, EPS, 1)
    near(schedule.ddpm_step(table, x, EPS, 1, -1, NOISE), X, 'image', 1e-5)
    large = make(variance_type='fixed_large', steps_offset=0)
    x = schedule.add_noise(large, X, EPS, 0)
    near(schedule.ddpm_step(large, x, EPS, 0, -1, NOISE), X, 'no noise at t = 0', 1e-5)


def test_variances():
    """Ho et al., section 3.2: beta, or beta times what is left of the noise."""
    a, b = (float(make().alphas_cumprod[t]) for t in (501, 481))
    beta = 1 - a / b
    for name, variance in (('fixed_large', beta), ('fixed_small', beta * (1 - b) / (1 - a))):
        table = make(variance_type=name)
        drawn = schedule.ddpm_step(table, X, EPS, 501, 481, NOISE)
        mean = schedule.ddpm_step(table, X, EPS, 501, 481, 0 * NOISE)
        near(drawn - mean, np.sqrt(variance) * NOISE, name)


def test_predicted_images_are_clipped():
    table = make(clip_sample=True, clip_sample_range=0.5)
    x0 = np.asarray(schedule.to_x0(table, EPS, X, 500))
    assert np.abs(x0).max() == 0.5
    free = np.asarray(schedule.to_x0(make(), EPS, X, 500))
    np.testing.assert_array_equal(x0, np.clip(free, -0.5, 0.5))
    a, b = (float(table.alphas_cumprod[t]) for t in (500, 480))
    expected = np.sqrt(b) * (1 - a / b) / (1 - a) * x0 + np.sqrt(a / b) * (1 - b) / (1 - a) * X
    near(schedule.ddpm_step(table, X, EPS, 500, 480, 0 * NOISE), expected, 'step')


def test_velocity_becomes_noise():
    table = make(prediction_type='v_prediction')
    t = np.array([10, 900])
    a = table.alphas_cumprod[t].reshape(2, 1, 1, 1)
    x, v = schedule.add_noise(table, X, EPS, t), np.sqrt(a) * EPS - np.sqrt(1 - a) * X
    near(schedule.to_eps(table, v, x, t), EPS, 'eps', 1e-5)
    assert schedule.to_eps(make(), v, x, t) is v


def test_a_timestep_for_each_image():
    table, t, t_next = make(), np.array([981, 1]), np.array([961, -1])
    for step in (schedule.ddpm_step, schedule.ddim_step):
        both = step(table, X, EPS, jnp.asarray(t), jnp.asarray(t_next), NOISE)
        for i in range(2):
            one = [each[i : i + 1] for each in (X, EPS)]
            alone = step(table, *one, int(t[i]), int(t_next[i]), NOISE[i : i + 1])
            near(both[i : i + 1], np.asarray(alone), 'image', 1e-6)


# 4. Mistakes.


@pytest.mark.parametrize(
    'changes, says',
    [
        ({'_class_name': 'EulerDiscreteScheduler'}, "'EulerDiscreteScheduler': expected DDPMSch"),
        ({'_class_name': None}, 'None: expected DDPMScheduler'),
        ({'beta_schedule': 'sigmoid'}, "'sigmoid': expected linear"),
        ({'prediction_type': 'sample'}, "'sample': expected epsilon or v_prediction"),
        ({'timestep_spacing': 'karras'}, "'karras': expected leading or"),
        ({'variance_type': 'learned'}, "'learned': expected fixed_small or"),
        ({'thresholding': True}, 'thresholding=True'),
        ({'rescale_betas_zero_snr': True}, 'rescale_betas_zero_snr=True'),
        ({'num_train_timesteps': 0}, 'num_train_timesteps=0: expected a positive'),
        ({'beta_end': 1.5}, 'between 0 and 1'),
        ({'trained_betas': [[0.1]]}, 'between 0 and 1'),
        ({'something_new': 3}, 'something_new=3'),
    ],
)
def test_other_schedulers_are_refused(changes, says):
    with pytest.raises(DiffusionError, match=says):
        make(**changes)


@pytest.mark.parametrize('steps', [0, -1, 1001, 2.0, True])
def test_wrong_numbers_of_steps(steps):
    with pytest.raises(DiffusionError, match='from 1 to 1000'):
        schedule.timesteps(make(), steps)


def test_too_many_steps_for_an_offset():
    with pytest.raises(DiffusionError, match='begin at timestep 1000 of 1000'):
        schedule.timesteps(make(), 1000)
