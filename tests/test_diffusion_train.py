"""A prior learns, continues where it stopped, and is read back as what it was."""

from __future__ import annotations

import csv
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from ml_collections import ConfigDict
from PIL import Image
from tiny import quick

from dfkd_jax import diffusion
from dfkd_jax.configs import prior_clipart, prior_strokes
from dfkd_jax.data.image_folder import read_folder
from dfkd_jax.diffusion import prior as priors
from dfkd_jax.diffusion import recipe as recipes
from dfkd_jax.diffusion import schedule as schedules
from dfkd_jax.distributed import sharding
from dfkd_jax.errors import ConfigError, DataError, DiffusionError
from dfkd_jax.loops import Stopped, diffusion_prior
from experiments import prior_data

SIZE, STEPS = 8, 60


@pytest.fixture(scope='module', autouse=True)
def fast_to_compile() -> Iterator[None]:
    """Programs that compile in a third of the time, each once or twice."""
    changes = {
        'jax_disable_most_optimizations': True,
        'jax_persistent_cache_min_compile_time_secs': 0.0,
    }
    before = {name: jax.config.values[name] for name in changes}
    for name, value in changes.items():
        jax.config.update(name, value)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.fixture(scope='module')
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Bright boxes on black, 8 pixels a side, some in a folder of their own."""
    folder, rng = tmp_path_factory.mktemp('pictures'), np.random.default_rng(0)
    (folder / 'more').mkdir()
    for i in range(24):
        image = np.zeros((SIZE, SIZE), np.uint8)
        top, left = rng.integers(0, SIZE - 3, 2)
        image[top : top + 4, left : left + 4] = 255
        Image.fromarray(image).save(folder / ('more' if i % 2 else '') / f'{i:02d}.png')
    (folder / 'images.json').write_text('{"data": "boxes"}')
    return folder


def tiny(pictures: Path | None = None) -> ConfigDict:
    config = prior_strokes.get_config('smoke')
    config.data.update(image_size=SIZE, held_out=4)
    if pictures is not None:
        config.data.folder = str(pictures)
    config.unet.update(widths=(4,), groups=2, head_width=4)
    config.train.update(steps=STEPS, batch_size=16, lr=1e-2, ema_decay=0.5)
    config.log_every_steps, config.save_every_steps = 10, 30
    config.parallel = 'jit'
    return config


class Stub:
    """In place of a network: the same answer whatever it is asked."""

    def __init__(self, answer: Any):
        self.answer = answer

    def apply(self, variables: Any, x: jax.Array, t: jax.Array) -> Any:
        self.seen = x
        return self.answer


# The loss


def test_loss_is_that_of_the_papers() -> None:
    config = tiny()
    rng = np.random.default_rng(0)
    x0, noise = rng.standard_normal((2, 3, 4, 4, 1)).astype(np.float32)
    t = np.array([0, 500, 999])
    for prediction in schedules.PREDICTIONS:
        config.schedule.prediction = prediction
        _, schedule = recipes.check(config)
        share = schedule.alphas_cumprod[t].astype(np.float64)[:, None, None, None]
        target = noise
        if prediction == 'v_prediction':
            target = np.sqrt(share) * noise - np.sqrt(1 - share) * x0
        stub: Any = Stub(np.zeros_like(x0))
        found = diffusion_prior.losses(stub, schedule, {}, x0, t, noise)
        np.testing.assert_allclose(found, np.mean(target**2, (1, 2, 3)), rtol=1e-5)
        mixed = np.sqrt(share) * x0 + np.sqrt(1 - share) * noise
        np.testing.assert_allclose(stub.seen, mixed, atol=1e-6)
        # What has no loss is what the samplers take for the noise.
        perfect: Any = Stub(target.astype(np.float32))
        assert np.max(diffusion_prior.losses(perfect, schedule, {}, x0, t, noise)) < 1e-10
        eps = schedules.to_eps(schedule, jnp.asarray(perfect.answer), jnp.asarray(mixed), t)
        np.testing.assert_allclose(eps, noise, atol=1e-5)


class Blur(nn.Module):
    """A network that compiles in no time."""

    @nn.compact
    def __call__(self, x: jax.Array, t: jax.Array) -> jax.Array:
        return (
            nn.Conv(1, (3, 3))(x)
            + nn.Dense(1)(t[:, None].astype(jnp.float32) / 1000.0)[:, None, None]
        )


@pytest.mark.parametrize('mode', quick(['vmap', 'pmap', 'shard_map'], 'shard_map'))
def test_a_step_is_the_same_however_it_is_shared(mode: str) -> None:
    config, module = tiny(), Blur()
    _, schedule = recipes.check(config)
    images = np.random.default_rng(0).integers(0, 256, (5, SIZE, SIZE, 1), np.uint8)
    params = jax.jit(module.init)(jax.random.key(1), jnp.zeros((1, SIZE, SIZE, 1)), jnp.zeros(1))[
        'params'
    ]
    tx = diffusion_prior.optimiser(config.train)
    found = []
    for plan in (sharding.make('jit'), sharding.make(mode)):
        step = plan.compile(
            diffusion_prior.make_step(module, schedule, tx, config.train, plan.shards)
        )
        copies = [jax.tree.map(jnp.copy, params) for _ in range(2)]
        state = plan.replicate(diffusion_prior.State(jnp.int32(3), *copies, tx.init(params)))
        for _ in range(2):  # the first has no rate yet
            before = jax.device_get(state)
            state, metrics = step(images, state, jax.random.key(0))
        found.append(jax.device_get((state, metrics)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), *found)
    after = found[1][0]
    assert after.step == 5
    assert np.abs(after.params['Conv_0']['kernel'] - before.params['Conv_0']['kernel']).max() > 1e-3
    # After four steps the average is over few: min(0.5, 5 / 14).
    expected = jax.tree.map(lambda old, new: 5 / 14 * old + 9 / 14 * new, before.ema, after.params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), after.ema, expected)


# Runs


@pytest.fixture(scope='module')
def finished(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The workdir of an uninterrupted run."""
    workdir = tmp_path_factory.mktemp('finished')
    assert diffusion_prior.run(tiny(pictures), workdir, command='python -m ...')['steps'] == STEPS
    return workdir


def rows_of(workdir: Path) -> list[dict[str, str]]:
    with open(workdir / 'metrics.csv', newline='') as file:
        return [{k: v for k, v in row.items() if k != 'seconds'} for row in csv.DictReader(file)]


def receipt_of(workdir: Path) -> dict[str, Any]:
    receipt = json.loads((workdir / 'prior' / diffusion_prior.RECEIPT).read_text())
    assert receipt.pop('seconds') > 0
    return receipt


def test_what_is_left(finished: Path) -> None:
    names = {path.name for path in (finished / 'prior').iterdir()}
    assert names == {'config.json', 'diffusion_pytorch_model.safetensors', 'scheduler_config.json',
                     diffusion_prior.RECEIPT, diffusion_prior.SAMPLES}  # fmt: skip
    receipt = receipt_of(finished)
    assert (receipt['images'], receipt['held_out'], receipt['source']) == (20, 4, {'data': 'boxes'})
    assert receipt['command'] == 'python -m ...' and receipt['versions']['jax'] == jax.__version__
    rows = rows_of(finished)
    assert [row['round'] for row in rows] == ['10', '20', '30', '40', '50', '60']
    assert [bool(row['held_out_loss']) for row in rows] == [False, False, True] * 2
    for name in ('loss', 'held_out_loss', 'held_out_eps'):
        assert receipt[name] == pytest.approx(float(rows[-1][name]), rel=1e-6)
    with Image.open(finished / 'prior' / diffusion_prior.SAMPLES) as image:
        assert min(image.size) > 100
    # Steps lower the loss, also of what was not trained on.
    assert receipt['loss'] < 0.8 * float(rows[0]['loss'])
    assert receipt['held_out_loss'] < float(rows[2]['held_out_loss'])


def test_a_finished_run_is_returned_as_it_is(finished: Path, pictures: Path) -> None:
    before = (finished / 'prior' / diffusion_prior.RECEIPT).stat().st_mtime_ns
    assert diffusion_prior.run(tiny(pictures), finished)['steps'] == STEPS
    assert (finished / 'prior' / diffusion_prior.RECEIPT).stat().st_mtime_ns == before


@pytest.mark.slow
def test_an_interrupted_run_ends_at_the_same_weights(
    finished: Path, pictures: Path, tmp_path: Path
) -> None:
    questions = iter([False] * 27 + [True])  # between two rows
    with pytest.raises(Stopped):
        diffusion_prior.run(tiny(pictures), tmp_path, lambda: next(questions))
    assert not (tmp_path / 'prior').exists() and len(rows_of(tmp_path)) == 2
    diffusion_prior.run(tiny(pictures), tmp_path, command='python -m ...')
    weights = 'prior/diffusion_pytorch_model.safetensors'
    assert (tmp_path / weights).read_bytes() == (finished / weights).read_bytes()
    assert rows_of(tmp_path) == rows_of(finished)
    assert receipt_of(tmp_path) == receipt_of(finished)


@pytest.mark.parametrize(
    'kept, tolerance',
    [pytest.param('float32', 0.0, marks=pytest.mark.slow), ('float16', 0.01)],
)
def test_the_folder_is_read_back_as_what_was_trained(
    tmp_path: Path, kept: str, tolerance: float
) -> None:
    config = tiny()
    config.weights = kept
    module, schedule = recipes.check(config)
    x = jax.random.normal(jax.random.key(0), (2, SIZE, SIZE, 1))
    t = jnp.array([3, 900])
    params = jax.jit(module.init)(jax.random.key(1), x, t)['params']
    diffusion_prior.write(tmp_path, config, params, np.zeros((12, SIZE, SIZE, 1)), {'loss': 0.1})
    prior = diffusion.load(tmp_path)
    assert prior.shape == (SIZE, SIZE, 1) and prior.schedule.prediction == 'v_prediction'
    assert prior.schedule.spacing == 'trailing'
    expected = schedules.to_eps(schedule, module.apply({'params': params}, x, t), x, t)
    np.testing.assert_allclose(prior.eps(x, t), expected, atol=tolerance)


# Images


def test_folders_are_read_in_order_on_black(tmp_path: Path) -> None:
    (tmp_path / 'b').mkdir()
    clear = np.zeros((4, 4, 4), np.uint8)
    clear[..., 0] = 255  # red, where it is not transparent
    clear[:, 2:, 3] = 255
    Image.fromarray(clear).save(tmp_path / 'b' / '1.png')
    wide = np.zeros((4, 8), np.uint8)
    wide[:, 2:6] = 200
    Image.fromarray(wide).save(tmp_path / 'a.PNG')
    (tmp_path / 'notes.txt').write_text('not an image')
    images = read_folder(tmp_path, 4, 3)
    assert images.shape == (2, 4, 4, 3) and (images[0] == 200).all()
    assert (images[1, :, :2] == 0).all() and (images[1, :, 2:] == [255, 0, 0]).all()
    assert (read_folder(tmp_path, 2, 1)[1, :, 1] == 76).all()  # 0.299 red
    (tmp_path / 'c.jpg').write_bytes(b'no picture')
    with pytest.raises(DataError, match='c.jpg cannot be read as an image.*get it again'):
        read_folder(tmp_path, 4, 1)


def test_sets_in_tfds_format_do_too() -> None:
    config = tiny()
    config.data.update(name='digits', num_classes=10, image_size=8, invert=True, held_out=37)
    images, held_out = diffusion_prior.load_images(config.data)
    assert images.shape == (1400, 8, 8, 1) and held_out.shape == (37, 8, 8, 1)
    assert np.median(images) > 200  # a negative


def test_clip_art_without_clothing() -> None:
    def kept(path: str) -> bool:
        return prior_data.kept(Path(path))

    assert all(map(kept, ['food/fruit/apple_01.png', 'animals/bugs/ladybug_01.png',
                          'office/addressed_envelope.png', 'computer/desktop.png']))  # fmt: skip
    out = ['people/clothing/hats/x.png', 'recreation/holiday/hiking_boot_01.png',
           'containers/paperbag1_j.png', 'transportation/aiga_coat_check_.png', 'party/hat_02.png',
           'signs_and_symbols/boy_symbol.png', 'tools/T-Shirts.png']  # fmt: skip
    assert not any(map(kept, out))


def test_clip_art_is_cut_to_its_object(tmp_path: Path) -> None:
    pixels = np.full((60, 60, 3), 255, np.uint8)
    pixels[10:50, 20:40] = 51  # a dark object on white
    Image.fromarray(pixels).save(tmp_path / 'dark.png')
    image = prior_data.placed(tmp_path / 'dark.png')
    assert image is not None and image.shape == (32, 32)
    assert (image[2:30, 9:23] == 204).all() and image.sum() == 204 * 28 * 14
    Image.fromarray(np.full((60, 60, 3), 255, np.uint8)).save(tmp_path / 'white.png')
    blank = prior_data.placed(tmp_path / 'white.png')
    assert blank is None or blank.min() >= 0


# Mistakes


@pytest.mark.parametrize(
    'field, value, message',
    [
        ('schedule.prediction', 'velocity', "'velocity': expected epsilon or v_prediction"),
        ('schedule.betas', 'cosine', "'cosine': expected linear, scaled_linear or squaredcos"),
        ('data.image_size', 9, 'image_size is 9: expected a multiple of 2'),
        ('data.channels', 2, 'channels is 2: expected 1'),
        ('unet.widths', (4, 6), r'\[4, 6\] and norm_num_groups=4: expected channels that divide'),
        ('unet.head_width', 3, 'attention_head_dim=3, which does not divide'),
        ('unet.attention', (2,), r'attention is \(2,\): expected numbers of levels, 0 to 1'),
        ('train.batch_size', 6, 'batch_size=6 does not divide over 4 devices'),
        ('train.steps', 0, 'steps is 0: expected a positive number'),
        ('train.warmup_steps', STEPS, 'warmup_steps is 60: expected 0 to less than'),
        ('train.ema_decay', 1.0, 'ema_decay is 1.0: expected 0 to less than 1'),
        ('weights', 'int8', "'int8': expected float16 or float32"),
        ('parallel', 'tpu', "unknown config.parallel 'tpu'"),
    ],
)
def test_mistakes_in_fields(field: str, value: Any, message: str) -> None:
    config = tiny()
    config.parallel = 'shard_map'
    config.unet.update(widths=(4, 4), groups=4)
    config.update_from_flattened_dict({field: value})
    with pytest.raises(ConfigError, match=message):
        diffusion_prior.check(config)


def test_mistakes_in_images(tmp_path: Path, pictures: Path) -> None:
    config = tiny()
    with pytest.raises(ConfigError, match='set one of --config.data.folder'):
        diffusion_prior.load_images(config.data)
    config.data.folder = str(tmp_path)
    with pytest.raises(DataError, match='there are no images in'):
        diffusion_prior.load_images(config.data)
    config.data.update(folder=str(pictures), held_out=24)
    with pytest.raises(DataError, match='24 images, of which config.data.held_out=24'):
        diffusion_prior.load_images(config.data)


@pytest.mark.slow
def test_at_the_shell(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, '-m', 'dfkd_jax.diffusion.train', '--config=configs/prior_clipart.py',
         f'--workdir={tmp_path / "run"}', '--config.schedule.prediction=x0'],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode != 0 and 'Traceback' not in done.stderr, done.stderr
    assert re.search("error: config.schedule has prediction_type='x0': expected", done.stderr)
    assert not (tmp_path / 'run').exists()


@pytest.mark.parametrize('file', [prior_clipart, prior_strokes])
def test_configs_fit(file: Any) -> None:
    for argument in (None, 'smoke'):
        diffusion_prior.check(file.get_config(argument))
    with pytest.raises(ConfigError, match="'smok': expected nothing or smoke"):
        file.get_config('smok')


# What ships


def test_shipped_priors_have_their_receipts() -> None:
    assert diffusion.shipped() == ['clipart32', 'strokes16']
    files = list(priors.SHIPPED.rglob('*'))
    assert sum(path.stat().st_size for path in files if path.is_file()) < 8e6
    for name, size in (('clipart32', 32), ('strokes16', 16)):
        prior = diffusion.load(name)
        assert prior.shape == (size, size, 1)
        receipt = json.loads((priors.SHIPPED / name / diffusion_prior.RECEIPT).read_text())
        assert receipt.keys() >= {'source', 'images', 'steps', 'seconds', 'loss', 'held_out_loss',
                                  'command', 'versions', 'device', 'config'}  # fmt: skip
        weights = sum(x.size for x in jax.tree.leaves(prior.frozen))
        assert weights == receipt['weights']
        with Image.open(priors.SHIPPED / name / diffusion_prior.SAMPLES) as image:
            assert min(image.size) > 100


def test_an_unknown_prior_is_told_what_ships() -> None:
    with pytest.raises(DiffusionError, match='no folder clipart.*clipart32 and strokes'):
        diffusion.load('clipart')
