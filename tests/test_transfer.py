"""A probe reads features and changes nothing; fine-tuning starts from all weights but the head."""

from __future__ import annotations

import gzip
import io
import json
import pickle
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from mistakes import Hostile
from PIL import Image

from dfkd_jax import build, data, models
from dfkd_jax.data import prepare
from dfkd_jax.distributed import sharding
from dfkd_jax.errors import CheckpointError, DataError
from dfkd_jax.storage import files, model_folder
from dfkd_jax.transfer import classification, segmentation
from dfkd_jax.transfer import network as networks
from dfkd_jax.transfer.__main__ import main as classify
from dfkd_jax.transfer.measurement import Recipe
from dfkd_jax.transfer.network import Network
from dfkd_jax.transfer_dense import main as segment
from experiments import transfer_data

pytestmark = pytest.mark.usefixtures('fast_runs')

SIZE = 8
FEW = (0.01, 1.0)  # values of C
RECIPE = Recipe(epochs=2, batch_size=128, lr=0.1)


@pytest.fixture(scope='module')
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The workdir of a run whose student saw Fashion-MNIST at 8 px: its weights are drawn here."""
    workdir = tmp_path_factory.mktemp('run')
    module = models.make('resnet8_half')
    variables = jax.jit(module.init)(jax.random.key(0), jnp.zeros((1, SIZE, SIZE, 1)))
    settings = SimpleNamespace(
        data=SimpleNamespace(num_classes=10, channels=1, image_size=SIZE, name='fashion_mnist')
    )
    model_folder.save_classifier(
        workdir / 'student', 'resnet8_half', variables, settings.data, accuracy=90.0
    )
    return workdir


@pytest.fixture(scope='module')
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder with `blots`: two classes in colour, dark and bright."""
    source, root = (tmp_path_factory.mktemp(name) for name in ('source', 'data'))
    rng = np.random.default_rng(0)
    for label, level in (('bright', 120), ('dark', 0)):
        (source / label).mkdir()
        for i in range(30):
            pixels = rng.integers(level, level + 80, (SIZE, SIZE, 3), np.uint8)
            Image.fromarray(pixels).save(source / label / f'{i}.png')
    prepare.prepare('blots', root, source)
    return root


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def tiny_network(
    num_classes: int = tiny.CLASSES,
) -> tuple[Any, dict[str, Any], Network]:
    """A tiny module for other classes, and a network of `tiny.frozen`'s weights."""
    card = {'model': 'tiny', 'image_size': tiny.SIZE, 'channels': tiny.CHANNELS}
    weights = jax.device_get(tiny.frozen().teacher)
    ones = (1.0,) * tiny.CHANNELS
    return (
        tiny.Classifier(num_classes=num_classes),
        weights,
        Network(card, weights, ones, ones),
    )


# Probes


def features(informative: bool, images: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Noise [images, 12], with a one-hot code of 4 classes added where `informative`."""
    rng = np.random.default_rng(seed)
    label = np.arange(images) % 4
    x = rng.normal(size=(images, 12)).astype(np.float32)
    return x + 8 * informative * np.eye(12, dtype=np.float32)[label], label


def test_a_probe_finds_what_is_there_and_nothing_else() -> None:
    found = classification.probe(features(True, 400, 0), features(True, 400, 1), 0, FEW)
    assert found['accuracy'] > 99 and found['validation_accuracy'] > 99
    assert found['C'] in FEW and found['feature_size'] == 12
    noise = classification.probe(features(False, 400, 0), features(False, 400, 1), 0, FEW)
    assert 15 < noise['accuracy'] < 35  # 4 standard deviations about a quarter


def test_a_probe_does_not_depend_on_the_scale_of_a_feature() -> None:
    train, test = features(True, 200, 0), features(True, 200, 1)
    scale = np.logspace(-3, 3, 12, dtype=np.float32)
    scaled = ((train[0] * scale + 5, train[1]), (test[0] * scale + 5, test[1]))
    one, other = (classification.probe(*sets, 0, FEW) for sets in ((train, test), scaled))
    assert one['accuracy'] == pytest.approx(other['accuracy'], abs=1)


def test_a_probe_needs_two_images_of_a_class() -> None:
    x, label = features(True, 9, 0)
    with pytest.raises(DataError, match='two training images of each; the fewest are 1'):
        classification.probe((x[:5], label[:5]), (x, label), seed=0)


def test_features_are_the_penultimate_and_then_the_means_of_the_stages(key: jax.Array) -> None:
    module = models.make('resnet8_half')
    images = jax.random.normal(key, (2, 16, 16, 1))
    variables = jax.jit(module.init)(key, images)
    out, stages = networks.maps(module, variables, images)
    assert [stage.shape for stage in stages] == [(2, 16, 16, 8), (2, 8, 8, 16), (2, 4, 4, 32)]
    np.testing.assert_array_equal(out.logits, module.apply(variables, images).logits)
    np.testing.assert_allclose(jnp.mean(stages[-1], (1, 2)), out.features, rtol=1e-6)
    np.testing.assert_array_equal(classification.features(module, variables, images), out.features)
    pooled = classification.features(module, variables, images, pooled=True)
    assert pooled.shape == (2, 32 + 8 + 16 + 32)


@pytest.mark.parametrize(
    'name', tiny.quick(['lenet5', 'wrn16_1', 'vgg8', 'mobilenetv2'], 'lenet5', 'wrn16_1', 'vgg8')
)
def test_every_family_has_stages(name: str) -> None:
    module = models.make(name)

    def shapes(key: jax.Array) -> list[jax.Array]:
        images = jnp.zeros((2, 32, 32, 3))
        return networks.maps(module, module.init(key, images), images)[1]

    stages = jax.eval_shape(shapes, jax.random.key(0))
    heights = [stage.shape[1] for stage in stages]
    assert len(heights) >= 3 and heights == sorted(set(heights), reverse=True)


@pytest.mark.parametrize('pooled', tiny.quick([False, True], True))
def test_a_probe_leaves_its_files_and_the_network_alone(
    folder: Path, tmp_path: Path, pooled: bool
) -> None:
    before = {path: path.read_bytes() for path in folder.rglob('*') if path.is_file()}
    result = classification.run(
        folder, 'digits', 'probe', pooled=pooled, output=tmp_path / 'a.json'
    )
    assert {path: path.read_bytes() for path in folder.rglob('*') if path.is_file()} == before
    assert result['accuracy'] > 50  # of random weights; chance is 10
    assert result['feature_size'] == 32 + pooled * (8 + 16 + 32)
    written = json.loads((tmp_path / 'a.json').read_text())
    assert written == files.plain(result)
    assert written.keys() >= {
        'protocol', 'dataset', 'model', 'source', 'source_dataset', 'seed', 'accuracy', 'C',
        'seconds', 'train_size', 'test_size', 'versions', 'device',
    }  # fmt: skip
    assert (written['train_size'], written['test_size']) == (1437, 360)


def test_images_have_the_constants_that_the_network_knows(folder: Path) -> None:
    network = networks.load(folder)
    settings = classification.settings_of('digits', network)
    facts = classification.read(settings, network, data.check(settings)).facts
    spec = data.DATASETS['fashion_mnist']
    assert (facts.mean, facts.std) == (spec.mean, spec.std) == (network.mean, network.std)
    # A run's own constants, where its config has some.
    config = folder / 'config.json'
    own = {'name': 'fashion_mnist', 'mean': [0.5], 'std': [0.25]}
    files.write_json(config, {'data': own})
    assert networks.load(folder)[2:] == ((0.5,), (0.25,))
    files.write_json(config, {'data': own | {'name': 'another'}})
    assert networks.load(folder)[2:] == (spec.mean, spec.std)
    config.unlink()


@pytest.mark.slow
def test_colours_become_luma_for_a_grey_network(
    folder: Path, data_dir: Path, rng: np.random.Generator
) -> None:
    colours = rng.integers(0, 256, (5, 9, 9, 3), np.uint8)
    grey = [np.asarray(Image.fromarray(image).convert('L')) for image in colours]
    np.testing.assert_array_equal(classification.luma(colours)[..., 0], grey)

    result = classification.run(folder, 'blots', 'probe', data_dir=str(data_dir))
    assert result['colours_to_luma'] and result['image_shape'] == (SIZE, SIZE, 1)
    assert result['accuracy'] > 95


def test_grey_images_fill_the_channels_of_a_colour_network(folder: Path) -> None:
    network = networks.load(folder)
    network = network._replace(card=network.card | {'channels': 3}, mean=(0.5,) * 3)
    settings = classification.settings_of('digits', network)
    settings.std = (0.25,) * 3
    images = classification.read(settings, network._replace(std=settings.std), data.check(settings))
    assert images.train.images.shape == (1437, SIZE, SIZE, 3)


# Fine-tuning


def test_all_but_the_head_is_copied() -> None:
    plan = sharding.make('jit')
    for classes in (tiny.CLASSES, tiny.CLASSES + 3):  # a new head even for as many classes
        module, weights, network = tiny_network(classes)
        key = jax.random.key(3)
        renewed = jax.device_get(networks.renew_head(plan, module, network, key))
        old, new = model_folder.flatten(weights), model_folder.flatten(renewed)
        assert old.keys() == new.keys()
        for name, array in new.items():
            if name.startswith('params/fc/'):
                assert array.shape[-1] == classes
                assert array.shape != old[name].shape or not np.array_equal(array, old[name])
            else:
                np.testing.assert_array_equal(array, old[name])
        control = networks.renew_head(plan, module, network, key, untrained=True)
        control = model_folder.flatten(jax.device_get(control))
        assert not np.array_equal(control['params/conv1/kernel'], old['params/conv1/kernel'])
        np.testing.assert_array_equal(control['params/fc/kernel'], new['params/fc/kernel'])


def test_weights_of_another_network_are_refused() -> None:
    module, _, network = tiny_network()
    with pytest.raises(build.ConfigError, match='those of another architecture'):
        networks.renew_head(sharding.make(), module.clone(width=4), network, jax.random.key(0))


@pytest.mark.slow
def test_fine_tuning_lowers_the_loss_and_repeats(folder: Path) -> None:
    def run(**options: Any) -> dict[str, Any]:
        return classification.run(folder, 'digits', 'finetune', recipe=RECIPE, **options)

    first, again = run(), run()
    losses = [row['loss'] for row in first['history']]
    assert len(losses) == 2 and losses[1] < losses[0]
    accuracies = [row['test_accuracy'] for row in first['history']]
    assert (first['accuracy'], first['best_accuracy']) == (accuracies[-1], max(accuracies))
    assert first['recipe']['crop_padding'] == 1 and first['recipe']['flip'] is False
    assert first['history'] == again['history']
    assert run(seed=1, untrained=True)['history'] != first['history']


def test_fine_tuning_keeps_the_weights_it_is_given(folder: Path) -> None:
    network, plan = networks.load(folder), sharding.make('jit')
    settings = classification.settings_of('digits', network)
    images = classification.read(settings, network, data.check(settings))
    module = networks.make_module(network, 10)
    variables = networks.renew_head(plan, module, network, jax.random.key(0))
    before = jax.device_get(variables)
    recipe = RECIPE._replace(epochs=1)
    classification.finetune(plan, module, variables, images, recipe, jax.random.key(1), seed=0)
    jax.tree.map(np.testing.assert_array_equal, before, jax.device_get(variables))


# Segmentation


@pytest.fixture(scope='module')
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Bright rectangles, class 1, on a dark ground, 16 px in colour."""
    folder = tmp_path_factory.mktemp('scenes')
    rng = np.random.default_rng(0)
    for part, number in (('train', 32), ('test', 8)):
        for i in range(number):
            top, left = rng.integers(0, 8, 2)
            mask = np.zeros((16, 16), np.uint8)
            mask[top : top + 8, left : left + 8] = 1
            pixels = rng.integers(0, 60, (16, 16, 3), np.uint8) + 180 * mask[..., None]
            mask[0, 0] = segmentation.UNKNOWN
            transfer_data._save(pixels, folder / part / 'images' / f'{i}.png')
            transfer_data._save(mask, folder / part / 'masks' / f'{i}.png')
    return folder


def test_intersection_over_union_by_hand() -> None:
    predicted = np.array([[0, 0, 1, 1, 1]], np.uint8)
    masks = np.array([[0, 1, 1, 1, segmentation.UNKNOWN]], np.uint8)
    counts = segmentation.confusion(predicted, masks, 3)
    np.testing.assert_array_equal(counts, [[1, 0, 0], [1, 2, 0], [0, 0, 0]])
    np.testing.assert_allclose(segmentation.iou(counts), [50, 200 / 3, np.nan])


@pytest.mark.parametrize('frozen', tiny.quick([False, True], True))
def test_a_head_learns_to_segment(folder: Path, scenes: Path, tmp_path: Path, frozen: bool) -> None:
    recipe = Recipe(epochs=12, batch_size=16, lr=0.1)
    result = segmentation.run(
        folder, scenes, size=16, recipe=recipe, frozen=frozen, output=tmp_path / 'a.json'
    )
    losses = result['losses']
    assert losses[0] == pytest.approx(np.log(2), abs=0.1) and losses[-1] < losses[0] / 1.5
    assert result['miou'] > 50  # all of the commoner class: 37
    assert (result['num_classes'], result['stages'], result['test_size']) == (2, 3, 8)
    assert json.loads((tmp_path / 'a.json').read_text()) == files.plain(result)


@pytest.mark.parametrize(
    'changes, message',
    [
        (dict(scenes='/nowhere'), '/nowhere/train has no images/'),
        (dict(student='/nowhere'), 'neither a model folder'),
        (dict(stages=0), 'expected 1 or more'),
        (dict(recipe=Recipe(batch_size=64)), 'larger than the 32 training scenes'),
    ],
)
def test_mistakes_of_segmentation(
    folder: Path, scenes: Path, nothing_compiles: None, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(build.EXPECTED_ERRORS, match=message):
        segmentation.run(**(dict(student=folder, scenes=scenes, size=16) | changes))


def test_a_mask_that_is_missing(scenes: Path, tmp_path: Path) -> None:
    (tmp_path / 'images').mkdir()
    (tmp_path / 'images' / '7.png').write_bytes(b'')
    with pytest.raises(DataError, match='lacks masks/7.png'):
        segmentation.read(tmp_path, 16, 1)
    assert segmentation.read(scenes / 'test', 8, 1).images.shape == (8, 8, 8, 1)
    assert set(np.unique(segmentation.read(scenes / 'test', 8, 3).masks)) <= {0, 1, 255}


# Mistakes


MISTAKES = {
    'no folder': (dict(student='/nowhere'), '/nowhere is neither a model folder'),
    'no model': (dict(student='/'), '/ is neither a model folder'),
    'protocol': (dict(protocol='prob'), "unknown protocol 'prob'; expected one of probe, finetune"),
    'data set': (dict(dataset='digitz'), "unknown data set 'digitz'.*Did you mean digits"),
    'missing data': (dict(dataset='cifar10'), 'no data set .cifar10.*prepare cifar10'),
    'resize': (dict(resize='padd'), "'padd'.*Did you mean 'pad'"),
    'batch': (dict(protocol='finetune', recipe=RECIPE._replace(batch_size=2000)),
              'a batch of 2000 images is larger than the 1437'),
    'epochs': (dict(protocol='finetune', recipe=RECIPE._replace(epochs=0)), '0 epochs'),
}  # fmt: skip


@pytest.fixture
def nothing_compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    def compiled(*_: Any, **__: Any) -> None:
        raise AssertionError('something was compiled before the mistake was reported')

    monkeypatch.setattr(jax._src.compiler, 'compile_or_get_cached', compiled)


@pytest.mark.parametrize('changes, message', MISTAKES.values(), ids=MISTAKES.keys())
@pytest.mark.usefixtures('nothing_compiles')
def test_mistake_is_told_before_compiling(
    folder: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    arguments = dict(student=folder, dataset='digits', protocol='probe', data_dir=str(tmp_path))
    with pytest.raises(build.EXPECTED_ERRORS, match=f'(?s){message}'):
        classification.run(**(arguments | changes))


@pytest.mark.usefixtures('nothing_compiles')
def test_a_result_is_not_overwritten(folder: Path, tmp_path: Path) -> None:
    output = tmp_path / 'result.json'
    output.write_text('hours of work')
    with pytest.raises(build.ConfigError, match='result.json is there already: remove it, or give'):
        classification.run(folder, 'digits', 'probe', output=output)
    assert output.read_text() == 'hours of work'


@pytest.mark.usefixtures('nothing_compiles')
def test_a_folder_that_does_not_tell(folder: Path, tmp_path: Path) -> None:
    """A ported network's folder lacks what only its user knows."""
    card, variables = model_folder.load_model(folder / 'student')
    model_folder.save_model(tmp_path, card['model'], variables, num_classes=10, channels=1)
    with pytest.raises(build.ConfigError, match='dataset: give --source_dataset=NAME'):
        networks.load(tmp_path)
    with pytest.raises(build.ConfigError, match='image_size: give --image_size=PIXELS'):
        networks.load(tmp_path, 'digits')
    assert networks.load(tmp_path, 'digits', SIZE).mean == data.DATASETS['digits'].mean
    with pytest.raises(DataError, match="unknown data set 'photos'"):
        networks.load(tmp_path, 'photos', SIZE, str(tmp_path))
    model_folder.save_model(tmp_path / 'damaged', 'resnet8_half', variables, num_classes=10)
    with pytest.raises(build.ConfigError, match='lacks channels'):
        networks.load(tmp_path / 'damaged', 'digits', SIZE)
    (tmp_path / model_folder.VARIABLES).write_bytes(b'half')
    with pytest.raises(CheckpointError, match='safetensors'):
        networks.load(tmp_path, 'digits', SIZE)


@pytest.mark.usefixtures('nothing_compiles')
def test_channels_that_no_image_has(folder: Path) -> None:
    network = networks.load(folder)
    network = network._replace(card=network.card | {'channels': 2})
    with pytest.raises(build.ConfigError, match='digits cannot be brought to the 2 channels'):
        classification.settings_of('digits', network)


@pytest.mark.parametrize(
    'module, flags, message',
    [
        ('transfer', ['--dataset=nothing', '--protocol=probe'], "unknown data set 'nothing'"),
        ('transfer_dense', ['--scenes=/nowhere'], '/nowhere/train has no images/'),
    ],
)
def test_at_the_shell(
    folder: Path, tmp_path: Path, module: str, flags: list[str], message: str
) -> None:
    """One line that starts with `error:`, and no traceback."""
    command = [sys.executable, '-m', f'dfkd_jax.{module}', f'--student={folder}', *flags]
    command.append(f'--data_dir={tmp_path}')
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 1
    assert done.stderr.startswith(f'error: {message}')
    assert 'Traceback' not in done.stderr


@pytest.mark.slow
def test_the_commands_print_one_line(
    folder: Path, scenes: Path, capsys: pytest.CaptureFixture
) -> None:
    classify([f'--student={folder}', '--dataset=digits', '--protocol=finetune', '--epochs=1',
              '--batch_size=128', '--untrained'])  # fmt: skip
    said = capsys.readouterr().out
    assert said.startswith('finetune of resnet8_half (untrained): ')
    assert ' % of the 360 test images of digits, ' in said
    segment([f'--student={folder}', f'--scenes={scenes}', '--size=16', '--epochs=1',
             '--batch_size=16'])  # fmt: skip
    said = capsys.readouterr().out
    assert said.startswith('segmentation by resnet8_half (trained on fashion_mnist): mIoU ')
    assert ' % of 8 scenes of 2 classes, ' in said


# The packages


def wheel(path: Path, images: Any, labels: Any) -> Path:
    """A stand-in for the package of animals."""
    with zipfile.ZipFile(path, 'w') as file:
        for part, array in (('data', images), ('label', labels)):
            name = f'animal_shape_mnist/data/Animal Shape/animal_{part}_version_3.gz'
            file.writestr(name, gzip.compress(pickle.dumps(array, protocol=4)))
    return path


def test_animals_come_once_and_in_their_class(tmp_path: Path, rng: np.random.Generator) -> None:
    images = rng.integers(0, 256, (100, 28, 28), np.uint8)
    images[50:60] = images[40:50]  # of the same classes
    path = wheel(tmp_path / 'a.whl', images, np.arange(100) % 10)
    sizes = transfer_data.write(transfer_data.animals(path), tmp_path / 'one')
    assert sizes == {'train': 80, 'test': 10}  # 9 of each class: a fifth is 1.8
    files = sorted((tmp_path / 'one').rglob('*.png'))
    assert {file.parent.name for file in files} == set(transfer_data.ANIMALS)
    for file in files:
        assert transfer_data.ANIMALS[int(file.stem) % 10] == file.parent.name
        np.testing.assert_array_equal(np.asarray(Image.open(file)), images[int(file.stem)])
    transfer_data.write(transfer_data.animals(path), tmp_path / 'two')
    again = sorted((tmp_path / 'two').rglob('*.png'))
    assert [f.relative_to(tmp_path / 'two') for f in again] == [
        f.relative_to(tmp_path / 'one') for f in files
    ]


@pytest.mark.parametrize('in_array', [False, True])
def test_nothing_but_arrays_is_unpickled(tmp_path: Path, in_array: bool) -> None:
    hostile: Any = Hostile(tmp_path)
    hostile = np.array([hostile], object) if in_array else hostile
    path = wheel(tmp_path / 'a.whl', hostile, np.arange(3))
    with pytest.raises(pickle.UnpicklingError, match='system is no part of an array'):
        list(transfer_data.animals(path))
    assert not (tmp_path / 'executed').exists()


@pytest.fixture
def emoji(tmp_path: Path) -> Path:
    """A stand-in for the package of emoji: 6 of 'Food & Drink', 2 of which are one; a skin tone."""
    pixels = np.zeros((6, 64, 64, 4), np.uint8)
    pixels[..., :32, :, :3], pixels[..., :32, :, 3] = 200, 128
    pixels[:, 0, 0, 0] = [0, 1, 2, 3, 4, 4]
    codes = ['1F9D1-200D-1F373', '1F468-200D-1F373', '1F469-200D-1F373', '1F34E', '1F34F', '1F350']
    entries = [
        {'image': f'{code.lower()}.png', 'unified': code, 'category': 'Food & Drink'}
        for code in codes
    ]
    entries.append({'image': '1f3fb.png', 'unified': '1F3FB', 'category': 'Component'})
    files = {'emoji.json': json.dumps([e | {'has_img_google': True} for e in entries]).encode()}
    for entry, image in zip(entries, pixels, strict=False):
        file = io.BytesIO()
        Image.fromarray(image).save(file, 'PNG')
        files[f'img/google/64/{entry["image"]}'] = file.getvalue()
    with tarfile.open(tmp_path / 'emoji.tgz', 'w:gz') as package:
        for name, content in files.items():
            member = tarfile.TarInfo(f'package/{name}')
            member.size = len(content)
            package.addfile(member, io.BytesIO(content))
    return tmp_path / 'emoji.tgz'


def test_emoji_are_on_black_and_their_kin_together(emoji: Path) -> None:
    pictures = list(transfer_data.emoji(emoji))
    assert [picture.label for picture in pictures] == ['food_drink'] * 5
    assert len({picture.group for picture in pictures}) == 3  # the cooks are one
    assert pictures[0].pixels.shape == (64, 64, 3)
    assert pictures[0].pixels[1, 1].tolist() == [100, 100, 100]  # 200 at half the opacity
    assert not pictures[0].pixels[32:].any()
    sizes = transfer_data.write(iter(pictures), emoji.parent / 'out')
    assert sizes == {'train': 4, 'test': 1}
    assert not list((emoji.parent / 'out' / 'test').rglob('*1f373*'))


def test_a_scene_shows_what_its_mask_says(rng: np.random.Generator) -> None:
    def plain(label: str, level: int) -> transfer_data.Picture:
        pixels = np.full((64, 64, 4), level, np.uint8)
        pixels[..., 3] = 255
        return transfer_data.Picture(label, label, label, pixels)

    things = [plain('a', 100), plain('b', 200)]
    image, mask = transfer_data.compose(plain('flags', 50), things, {'a': 1, 'b': 2}, rng)
    np.testing.assert_array_equal(image[..., 0], np.array([50, 100, 200])[mask])
    assert set(np.unique(mask)) == {0, 1, 2}


def test_a_package_that_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / 'a.whl'
    path.write_bytes(b'no zip')
    arguments = ['', 'animals', f'--source={path}', f'--output={tmp_path / "out"}']
    monkeypatch.setattr(sys, 'argv', arguments)
    with pytest.raises(SystemExit, match='error: .*a.whl is not the package of animals'):
        transfer_data.main()
    (tmp_path / 'out').mkdir()
    with pytest.raises(SystemExit, match='error: .*out is there already'):
        transfer_data.main()
