"""DiffDFKD: guidance as the reference has it, Latent CutMix, the bank on disk, and whole runs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from ml_collections import ConfigDict
from processes import at_row, killed_at, output, to_the_end
from reference import last, near

from dfkd_jax import build, contract, data, diffusion, loops, losses, models, port
from dfkd_jax.configs import common, digits
from dfkd_jax.data import synthetic
from dfkd_jax.diffusion import schedule as schedules
from dfkd_jax.distributed import sharding
from dfkd_jax.errors import BankError, ConfigError
from dfkd_jax.loops import alternating, offline, supervised
from dfkd_jax.methods import diffdfkd
from dfkd_jax.reporting import artifacts, metrics, page
from dfkd_jax.storage import checkpoints, files, model_folder

pytestmark = pytest.mark.usefixtures('fast_runs')


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
    expected = dict(np.load(golden / 'tiny_sd' / 'expected.npz'))
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
    frozen = contract.Frozen(weights, diffdfkd.Prior(prior.frozen, text))
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
    state, row = alternating.make_round(method, phase, plan)(frozen, state, jax.random.key(1))
    return jax.device_get((state, row))


def test_guidance_raises_confidence_and_lowers_the_distance_of_statistics():
    (state, guided), (_, unguided) = trajectory(), trajectory('unguided')
    assert guided['g/final_confidence'] > unguided['g/final_confidence'] + 0.1
    assert trajectory(bn=2.0)[1]['g/final_bn'] < 0.9 * unguided['g/final_bn']
    assert guided['g/final_ce'] < unguided['g/final_ce']
    assert set(state.extra.label) == {2}, 'round r makes class r'
    assert 'g/ce' not in unguided, 'the teacher has no part in it'


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


def test_quirks_are_options():
    fresh, stale = trajectory()[0].extra.image, trajectory(final='stale')[0].extra.image
    assert not np.array_equal(fresh, stale)
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


def test_the_student_has_a_say_once_it_has_learnt_enough():
    """With weight zero before, so that the same program serves; the teacher's answers are given."""
    config = tiny.config('diffdfkd', synthesis__cutmix=False, synthesis__per_class=6 * tiny.BATCH)
    config.in_loop.update(start=2 * tiny.BATCH, every=tiny.BATCH, batch_size=tiny.BATCH)
    assert diffdfkd.sessions(config)[0] == tiny.CLASSES
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
        frozen = contract.Frozen(teacher, diffdfkd.Prior({}, states))
        state = method.init(frozen, jax.random.key(0))
        state = state.replace(round=state.round + 2)
        state, _ = method.begin(frozen, state, jax.random.key(0))
        state, _ = method.generator_step(frozen, state, jax.random.key(0))
        np.testing.assert_allclose(state.extra.eps, 0.5 + scale * (wanted - 0.5), rtol=1e-6)


# 2. Latent CutMix.


def mixed(key: int, shape: tuple[int, ...] = (6, 16, 8, 2), **options: Any) -> tuple[Any, Any]:
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    return x, np.asarray(diffdfkd.cutmix(jax.random.key(key), jnp.asarray(x), **options))


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


# 3. The bank.

FACTS = data.Facts('set', 4, ('a', 'b', 'c', 'd'), (6, 6, 1), (0.5,), (0.5,), 9, 9, True, 1)


def fill(folder: Path, batches: int = 3, size: int = 6) -> np.ndarray:
    """Batches of 2, 3, 4... images; returns all images."""
    rng, all_ = np.random.default_rng(0), []
    for number in range(batches):
        image = rng.integers(0, 255, (number + 2, size, size, 1)).astype(np.uint8)
        synthetic.write(folder, number, image, np.full(len(image), number), 7, {'g/ce': number / 2})
        all_.append(image)
    return np.concatenate(all_)


def test_bank_gives_back_what_was_put_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    images = fill(tmp_path)
    assert synthetic.count(tmp_path) == 3
    batch = synthetic.read(tmp_path, 1)
    assert batch['seed'].tolist() == [[7, 1]] * 3 and batch['label'].tolist() == [1, 1, 1]
    assert synthetic.measured(tmp_path, 1) == {'g/ce': 0.5}
    whole = synthetic.dataset(tmp_path, 3, FACTS, 6)
    assert whole.images is not None
    monkeypatch.setattr(data, 'IN_MEMORY_BYTES', 0)
    streamed = synthetic.dataset(tmp_path, 3, FACTS, 6)
    assert streamed.images is None and streamed.size == whole.size == 9
    for dataset in (whole, streamed):
        order = np.array([8, 0, 4, 4])
        image, label = dataset.fetch(order)
        np.testing.assert_array_equal(image, images[order])
        assert label.tolist() == [2, 0, 1, 1] and label.dtype == np.int32
    for a, b in zip(whole.shuffled(4, 1), streamed.shuffled(4, 1), strict=False):
        np.testing.assert_array_equal(a.image, b.image)
        if a.image is not None:
            break
    assert synthetic.dataset(tmp_path, 2, FACTS, 6).size == 5
    late = synthetic.dataset(tmp_path, 3, FACTS, 6)
    synthetic.path_of(tmp_path, 2).write_bytes(b'')
    with pytest.raises(BankError, match='batch-000002.*no longer whole.*put it back'):
        late.fetch(np.array([8]))


def test_a_bank_that_does_not_fit_is_refused(tmp_path: Path):
    fill(tmp_path)
    with pytest.raises(BankError, match=r'batch-000000.*\[6, 6, 1\].*\[8, 8, 1\]'):
        synthetic.dataset(tmp_path, 3, FACTS, 8)
    with pytest.raises(BankError, match='classes'):
        synthetic.dataset(tmp_path, 3, FACTS._replace(num_classes=2), 6)
    floats = {'image': np.full((2, 6, 6, 1), np.nan, np.float32), 'label': np.zeros(2, np.int32)}
    floats['sum'] = np.zeros(2, np.uint32)
    files.save_arrays(synthetic.path_of(tmp_path / 'nan', 0), floats)
    with pytest.raises(BankError, match=r'images F32\[6, 6, 1\].*expected U8'):
        synthetic.dataset(tmp_path / 'nan', 1, FACTS, 6)
    with pytest.raises(BankError, match='batch-000003.*missing or damaged'):
        synthetic.dataset(tmp_path, 4, FACTS, 6)
    path = synthetic.path_of(tmp_path, 1)
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(BankError, match='batch-000001.*missing or damaged'):
        synthetic.dataset(tmp_path, 3, FACTS, 6)
    with pytest.raises(BankError, match='not a whole safetensors file'):
        synthetic.read(tmp_path, 1)


@pytest.mark.parametrize('name', ['image', 'label'])
def test_a_changed_bit_of_a_bank_is_noticed(tmp_path: Path, monkeypatch, name: str):
    fill(tmp_path)
    arrays = synthetic.read(tmp_path, 1)
    streaming = partial(monkeypatch.setattr, data, 'IN_MEMORY_BYTES', 0)
    arrays[name] = arrays[name].copy()
    arrays[name].flat[-1] ^= 1  # of the last of its three images
    files.save_arrays(synthetic.path_of(tmp_path, 1), arrays)
    message = 'batch-000001.* has images that are not what was written. Remove it and all after'
    with pytest.raises(BankError, match=message):
        synthetic.dataset(tmp_path, 3, FACTS, 6)
    streaming()
    streamed = synthetic.dataset(tmp_path, 3, FACTS, 6)
    streamed.fetch(np.array([2, 8, 3, 0]))
    with pytest.raises(BankError, match=message):
        streamed.fetch(np.array([2, 8, 4]))
    # Wherever a bit of the file changes: noticed, or not of the images and labels.
    fill(tmp_path, batches=1)
    path = synthetic.path_of(tmp_path, 0)
    whole, file = synthetic.dataset(tmp_path, 1, FACTS, 6).fetch(np.arange(2)), path.read_bytes()
    noticed = 0
    for at in range(len(file)):
        path.write_bytes(file[:at] + bytes([file[at] ^ 1 << at % 8]) + file[at + 1 :])
        try:
            found = synthetic.dataset(tmp_path, 1, FACTS, 6).fetch(np.arange(2))
        except BankError:
            noticed += 1
        else:
            for one, other in zip(found, whole, strict=True):
                np.testing.assert_array_equal(one, other)
    assert noticed > len(file) // 2
    path.write_bytes(file)
    del arrays['sum']
    files.save_arrays(synthetic.path_of(tmp_path, 1), arrays)
    with pytest.raises(BankError, match='batch-000001.* lacks sum'):
        synthetic.read(tmp_path, 1)


def test_every_class_gets_exactly_the_images_wanted():
    config = tiny.config('diffdfkd', synthesis__per_class=21, synthesis__batch_size=8)
    total = diffdfkd.trajectories(config)
    assert total == 3 * tiny.CLASSES
    kept = np.zeros(tiny.CLASSES)
    for number in range(total):
        kept[number % tiny.CLASSES] += diffdfkd.kept(config, number)
    assert kept.tolist() == [21] * tiny.CLASSES


def test_the_in_loop_student_learns_whenever_there_is_more_to_learn_from():
    config = tiny.config('diffdfkd', synthesis__per_class=40, synthesis__batch_size=4)
    config.in_loop.update(every=10, batch_size=32)
    # 10, 20 and 30 images a class are passed after 3, 5 and 8 batches of each of 4 classes.
    assert diffdfkd.sessions(config) == [12, 20, 32]
    config.in_loop.batch_size = 60  # more than the first 48 images
    assert diffdfkd.sessions(config) == [20, 32]
    for group, change in (('loss', {'adversarial': 0.0}), ('in_loop', {'every': 0})):
        other = config.copy_and_resolve_references()
        other[group].update(change)
        assert diffdfkd.sessions(other) == []


# 4. Whole runs.


@pytest.fixture(scope='module')
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a diffusion model with drawn weights, of 4 x 4 grey pixels."""
    return tiny.saved_prior(tmp_path_factory.mktemp('prior') / 'prior')


def small(home: Path, **synthesis: Any) -> ConfigDict:
    """The digits run at 4 pixels: 2 batches of each class, a student in the loop, 3 epochs."""
    config = digits.get_config('diffdfkd,smoke')
    config.data.image_size = config.synthesis.stored_size = 4
    config.teacher.model = 'resnet8_half'
    config.teach.update(epochs=1, batch_size=128)
    config.prior.path = str(home)
    config.loss.adversarial = 1.0
    config.synthesis.update(dict(batch_size=2, per_class=3) | synthesis)
    config.in_loop.update(every=2, start=2, steps=3, batch_size=8)
    config.distil.update(epochs=3, batch_size=8, save_every_epochs=1)
    config.log_every_rounds, config.parallel = 4, 'jit'
    return config


@pytest.fixture(scope='module')
def finished(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    workdir = tmp_path_factory.mktemp('finished') / 'run'
    assert loops.run(small(home), workdir)['images_synthesised'] == 30
    return workdir


def bank_of(workdir: Path) -> list[bytes]:
    return [path.read_bytes() for path in sorted((workdir / 'bank').iterdir())]


def digest(workdir: Path, network: str = 'distillation') -> str:
    return json.loads((workdir / network / 'model.json').read_text())['variables_sha256']


def test_a_run_leaves_what_every_run_leaves(finished: Path):
    summary = json.loads((finished / artifacts.SUMMARY).read_text())
    assert summary['images_synthesised'] == 30 and summary['method'] == 'diffdfkd'
    assert summary['seconds_synthesis'] > 0 and summary['seconds_distillation'] > 0
    for name in ('student.safetensors', 'student_torch.safetensors', page.IMAGES, page.CURVES,
                 page.PAGE, 'student/model.json'):  # fmt: skip
        assert (finished / name).stat().st_size > 0, name
    labels = [synthetic.read(finished / 'bank', number)['label'] for number in range(20)]
    assert np.bincount(np.concatenate(labels)).tolist() == [3] * 10
    rows = metrics.read(finished / 'synthesis')
    assert rows['round'].tolist() == [4, 8, 12, 16, 20]
    assert np.isfinite(rows['g/ce']).all() and np.isfinite(rows['g/adversarial']).all()
    assert [path.name for path in sorted((finished / 'in_loop').iterdir())] == ['000010']
    epochs = metrics.read(finished / 'distillation')
    assert epochs['round'].tolist() == [1, 2, 3] and np.isfinite(epochs['test_accuracy']).all()


class Killed(BaseException):
    """What no code is written to survive."""


def killing(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, call: int, before: bool):
    """From its so many-th call on, a function dies, before or after it does its work."""
    function, calls = getattr(owner, name), []

    def dying(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        if before and len(calls) > call:
            raise Killed
        result = function(*args, **kwargs)
        if len(calls) > call:
            raise Killed
        return result

    monkeypatch.setattr(owner, name, dying)


@pytest.mark.parametrize(
    'owner, name, call, before',
    [
        (synthetic, 'write', 5, True),
        (synthetic, 'write', 11, False),  # between the images and a row of what was measured
        (synthetic, 'write', 19, False),  # after the last images
        (checkpoints.Checkpoints, 'save', 0, False),  # of the student in the loop
        (checkpoints.Checkpoints, 'save', 2, False),  # of the student
    ],
)
def test_killed_anywhere_it_ends_as_if_it_had_not_been(
    finished: Path,
    home: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    owner: Any,
    name: str,
    call: int,
    before: bool,
):
    workdir, config = tmp_path / 'run', small(home)
    config.teacher.checkpoint = str(finished / 'teacher')
    with monkeypatch.context() as patch:
        killing(patch, owner, name, call, before)
        with pytest.raises(Killed):
            loops.run(config, workdir)
    assert loops.run(config, workdir)
    assert bank_of(workdir) == bank_of(finished)
    assert digest(workdir) == digest(finished)
    assert digest(workdir, 'in_loop/000010') == digest(finished, 'in_loop/000010')
    for place in ('synthesis', 'distillation'):
        ours, theirs = metrics.read(workdir / place), metrics.read(finished / place)
        for column in theirs.keys() - {'seconds'}:
            np.testing.assert_array_equal(ours[column], theirs[column], column)


@pytest.mark.slow
@pytest.mark.faults
def test_killed_as_a_process_it_ends_the_same(home: Path, tmp_path: Path):
    """While images are made, twice, and while the student learns of them."""
    arguments = [
        '--config=configs/digits.py:diffdfkd,smoke', '--config.data.image_size=4',
        '--config.synthesis.stored_size=4', '--config.teacher.model=resnet8_half',
        '--config.teach.batch_size=128', f'--config.prior.path={home}',
        '--config.loss.adversarial=1.0', '--config.synthesis.batch_size=2',
        '--config.synthesis.per_class=12', '--config.in_loop.every=4', '--config.in_loop.start=4',
        '--config.in_loop.steps=3', '--config.in_loop.batch_size=8', '--config.distil.epochs=20',
        '--config.distil.batch_size=8', '--config.distil.save_every_epochs=2',
        '--config.log_every_rounds=4',
    ]  # fmt: skip
    whole, workdir = tmp_path / 'whole', tmp_path / 'run'
    to_the_end(arguments, whole)
    moments = [
        (at_row(workdir / 'synthesis', 4), 0.01),
        (at_row(workdir / 'synthesis', 32), 0.02),
        (at_row(workdir / 'distillation', 5), 0.05),
    ]
    killed_at(arguments, workdir, moments)
    to_the_end(arguments, workdir)
    assert output(workdir).count('continuing after trajectory') == 2
    assert output(workdir).count('continuing after epoch') == 1
    assert bank_of(workdir) == bank_of(whole)
    assert digest(workdir) == digest(whole)
    assert len(metrics.read(workdir / 'distillation')['round']) == 20


def filled(config: ConfigDict, teacher: Path, workdir: Path) -> list[dict[str, np.ndarray]]:
    """The files of a bank that the loop filled for this teacher, without a student."""
    run = build.build(config)
    variables = model_folder.load_model(teacher)[1]
    assert offline.synthesise(config, workdir, run, variables, lambda: False)
    total = diffdfkd.trajectories(config)
    return [synthetic.read(workdir / 'bank', number) for number in range(total)]


def test_two_and_four_devices_fill_the_same_bank(
    finished: Path, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """All classes, through the loop; bytes may round to either side."""
    images, make = {}, sharding.make
    config = small(home, batch_size=4, per_class=4)
    config.loss.adversarial, config.parallel = 0.0, 'shard_map'
    for count in (1, 2, 4):
        devices = jax.devices()[:count]
        with monkeypatch.context() as patch:
            patch.setattr(sharding, 'make', lambda mode, devices=devices: make(mode, devices))
            files = filled(config, finished / 'teacher', tmp_path / str(count))
        assert [set(each['label']) for each in files] == [{label} for label in range(10)]
        images[count] = np.concatenate([each['image'] for each in files]).astype(int)
    for count in (2, 4):
        difference = np.abs(images[count] - images[1])
        assert difference.max() <= 1 and (difference > 0).mean() < 0.01


def test_latents_of_a_text_to_image_model_fill_a_bank(golden: Path, finished: Path, tmp_path: Path):
    """A folder of Stable Diffusion's format, prompts by class, colours to the teacher's grey."""
    pytest.importorskip('tokenizers', reason='pip install tokenizers')
    config = small(golden / 'tiny_sd' / 'model')
    config.loss.adversarial = 0.0
    config.prior.update(prompt='a photo of a {}.', steps=3)
    files = filled(config, finished / 'teacher', tmp_path)
    assert [len(each['image']) for each in files] == [2] * 10 + [1] * 10
    images = np.concatenate([each['image'] for each in files])
    assert images.shape == (30, 4, 4, 1) and images.std((1, 2, 3)).min() > 0


def test_larger_images_are_cut_to_size_and_read_from_disk(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Noise, which needs no diffusion model; stopped and continued while the student learns."""
    config = small(Path('nowhere'), source='noise', stored_size=6)
    config.teacher.checkpoint = str(finished / 'teacher')
    config.distil.random_resized_crop = True
    monkeypatch.setattr(synthetic.data, 'IN_MEMORY_BYTES', 0)
    assert loops.run(config, tmp_path / 'whole')['images_synthesised'] == 30
    with monkeypatch.context() as patch:
        killing(patch, checkpoints.Checkpoints, 'save', 0, before=False)
        with pytest.raises(Killed):
            loops.run(config, tmp_path / 'killed')
    loops.run(config, tmp_path / 'killed')
    assert digest(tmp_path / 'killed') == digest(tmp_path / 'whole')


def test_prompts_are_encoded_by_class(golden: Path):
    pytest.importorskip('tokenizers', reason='pip install tokenizers')
    prior = diffusion.load(golden / 'tiny_sd' / 'model')
    config = tiny.config('diffdfkd')
    config.prior.prompt = 'a photo of a {}'
    facts = FACTS._replace(class_names=('cat', 'dog', 'fork_lift', 'owl'))
    run = build.Run(None, None, None, tiny.nets(config), facts, prior)
    found = offline.conditions(config, run)
    wanted = prior.encode(['a photo of a cat', 'a photo of a dog', 'a photo of a fork lift',
                           'a photo of a owl', ''])  # fmt: skip
    near(found.text, wanted, 'text')
    config.prior.prompt = 'a photo.'
    near(offline.conditions(config, run).text, prior.encode(['a photo.', '']), 'text')


def test_students_of_the_loop_follow_each_other_and_leave_little(
    finished: Path, home: Path, tmp_path: Path
):
    config = small(home, per_class=7)
    config.in_loop.every = 2
    assert diffdfkd.sessions(config) == [10, 20, 30]
    config.teacher.checkpoint = str(finished / 'teacher')
    run = build.build(config)
    teacher = build.load_network(finished / 'teacher', 'resnet8_half', config.data)
    assert offline.synthesise(config, tmp_path, run, teacher, lambda: False)
    assert [path.name for path in sorted((tmp_path / 'in_loop').iterdir())] == ['000020', '000030']
    assert not list((tmp_path / 'in_loop').glob('*/checkpoints'))
    # A session goes on where the one before ended: from other weights it ends elsewhere.
    learn = offline.learner(config, tmp_path / 'other', run, teacher, lambda: False)
    assert learn(5) == {}
    # A damaged batch and all after it are removed, and so is a student: both come back the same,
    # though the students that they come from are long gone.
    made = {path: path.read_bytes() for path in sorted(tmp_path.rglob('*.safetensors'))}
    for number in range(21, synthetic.count(tmp_path / 'bank')):
        synthetic.path_of(tmp_path / 'bank', number).unlink()
    shutil.rmtree(tmp_path / 'in_loop' / '000020')
    assert offline.synthesise(config, tmp_path, run, teacher, lambda: False)
    assert {path: path.read_bytes() for path in sorted(tmp_path.rglob('*.safetensors'))} == made


def test_asked_to_stop_it_stops_and_continues(
    finished: Path, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    config = small(home)
    config.teacher.checkpoint = str(finished / 'teacher')
    run = build.build(config)
    teacher = build.load_network(finished / 'teacher', 'resnet8_half', config.data)
    asked: Iterator[bool] = iter([False] * 5 + [True])
    with pytest.raises(loops.Stopped):
        offline.synthesise(config, tmp_path, run, teacher, lambda: next(asked))
    assert synthetic.count(tmp_path / 'bank') == 5
    assert offline.synthesise(config, tmp_path, run, teacher, lambda: False)
    assert bank_of(tmp_path) == bank_of(finished)


def test_another_students_run_takes_the_bank_as_it_is(finished: Path, home: Path, tmp_path: Path):
    config = small(home, bank=str(finished / 'bank'))
    config.seed, config.teacher.checkpoint = 1, str(finished / 'teacher')
    summary = loops.run(config, tmp_path / 'run')
    assert summary['seconds_synthesis'] == 0 and not (tmp_path / 'run' / 'bank').exists()
    assert digest(tmp_path / 'run') != digest(finished)
    config.synthesis.per_class = 9
    with pytest.raises(BankError, match='per_class 3, here 9'):
        loops.run(config, tmp_path / 'more')
    with pytest.raises(BankError, match='is not a bank'):
        config.synthesis.bank = str(tmp_path)
        loops.run(config, tmp_path / 'none')


# 5. Mistakes.


@pytest.mark.parametrize(
    'change, match',
    [
        (dict(prior__path=None), 'set --config.prior.path'),
        (dict(prior__path='/nowhere'), 'there is no folder /nowhere'),
        (dict(prior__dtype='float16'), 'config.prior.dtype=.float16.'),
        (dict(prior__steps=1), 'config.prior.steps=1: expected 2 or more'),
        (dict(prior__steps=2000), 'a sampler of 2000 steps'),
        (dict(synthesis__source='guided!'), 'expected guided or unguided or noise'),
        (dict(synthesis__final='last'), 'config.synthesis.final=.last.: expected fresh or stale'),
        (dict(synthesis__batch_size=1), 'cutmix mixes the images of a batch'),
        (dict(synthesis__batch_size=3), 'does not divide over 4 devices'),
        (dict(synthesis__stored_size=5), 'stored_size=5 and config.data.image_size=4 differ'),
        (dict(synthesis__per_class=0), 'config.synthesis.per_class=0'),
        (dict(distil__batch_size=96), 'more than the 80 images'),
        (dict(in_loop__batch_size=2), 'config.in_loop.batch_size=2 does not divide'),
        (dict(distil__cutmix=0.5, distil__kd_weight=0.5), 'which only a teacher can tell'),
        (dict(distil__eval_every_epochs=0), 'config.distil.eval_every_epochs=0'),
        (dict(in_loop__steps=0), 'config.in_loop.steps is not positive'),
        (dict(prior__prompt='A {name}'), "config.prior.prompt='A {name}': expected a text"),
        (dict(distil__batch_size=10), 'config.distil.batch_size=10 does not divide'),
    ],
)
def test_mistakes_are_told(finished: Path, home: Path, tmp_path: Path, change: dict, match: str):
    config = small(home, batch_size=4, per_class=8)
    config.teacher.checkpoint = str(finished / 'teacher')
    config.parallel = 'shard_map'
    for name, value in change.items():
        group, _, field = name.partition('__')
        config[group][field] = value
    with pytest.raises(build.EXPECTED_ERRORS, match=match):
        loops.run(config, tmp_path / 'run')
    assert not (tmp_path / 'run' / 'bank').exists(), 'before anything is made'


def test_flags_make_the_controls():
    assert digits.get_config('diffdfkd,noise').synthesis.source == 'noise'
    assert digits.get_config('diffdfkd,unguided').synthesis.source == 'unguided'
    with pytest.raises(ConfigError, match='found unguided; .* FLAG, for cpsc, one of smoke'):
        digits.get_config('cpsc,unguided')
    with pytest.raises(ConfigError, match='found untrained; .* FLAG, for diffdfkd, one of smoke'):
        digits.get_config('diffdfkd,untrained')


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
    'recipe', [{}, {'random_resized_crop': True}, {'shade': 0.5, 'cutmix': 0.5}]
)
def test_distillation_on_shares_is_that_on_the_whole_batch(recipe: dict):
    one, four = stepped(1, **recipe), stepped(4, **recipe)
    tiny.close(four[0].net.params, one[0].net.params, 1e-5)
    # 900 times a divergence of 4e-5, whose last digits are rounding.
    tiny.close(four[1]['loss'], one[1]['loss'], 1e-3)


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
