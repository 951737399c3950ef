"""Folders and archives as users have them: read right, or named in an error."""

from __future__ import annotations

import os
import pickle
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import standins
from PIL import Image

from dfkd_jax import data
from dfkd_jax.data import cifar, image_folder, prepare
from dfkd_jax.errors import DataError


def fill(folder: Path, each: int = 4, label: int = 0, suffix: str = '.png') -> Path:
    """A folder of images of one class."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(each):
        Image.fromarray(standins.picture(label, i, 8)).save(folder / f'{i}{suffix}')
    return folder


def classes(folder: Path, names: str = 'cat dog', each: int = 4) -> Path:
    for label, name in enumerate(names.split()):
        fill(folder / name, each, label)
    return folder


def sizes(source: Path) -> dict[str, int]:
    """The labelled images of each split."""
    splits = image_folder.labelled_splits(image_folder.understand(source))
    return {split: len(files) for split, files in splits.items()}


def names(source: Path) -> list[str]:
    return image_folder.understand(source).classes


def refused(source: Path, message: str) -> None:
    """And no set is left."""
    with pytest.raises(DataError, match=message) as error:
        prepare.prepare('mine', source.parent / 'sets', source)
    assert '\n' not in str(error.value)
    assert not list((source.parent / 'sets').rglob('*.json'))


# 1. Splits


@pytest.mark.parametrize(
    'folder, split',
    [
        ('valid', 'validation'), ('val', 'validation'), ('validation', 'validation'),
        ('dev', 'validation'), ('Valid', 'validation'), ('VAL', 'validation'),
        ('test', 'test'), ('Test', 'test'), ('testing', 'test'), ('Testing', 'test'),
    ],
)  # fmt: skip
@pytest.mark.parametrize('train', ['train', 'Training'])
def test_any_name_of_a_split_is_it(tmp_path: Path, train: str, folder: str, split: str) -> None:
    classes(tmp_path / 'src' / train, each=5)
    classes(tmp_path / 'src' / folder, each=3)
    assert sizes(tmp_path / 'src') == {'train': 10, split: 6}


def test_a_folder_named_valid_is_measured_on(tmp_path: Path) -> None:
    """And no training image becomes a test image."""
    classes(tmp_path / 'src' / 'train', each=10)
    fill(tmp_path / 'src' / 'valid' / 'cat', 10, label=7)
    fill(tmp_path / 'src' / 'valid' / 'dog', 10, label=8)
    prepare.prepare('mine', tmp_path, tmp_path / 'src')
    settings = standins.config('mine', tmp_path, num_classes=2, image_size=8)
    train, test = (data.load(settings, split) for split in ('train', 'test'))
    assert (train.size, test.size) == (20, 20)
    expected = {standins.picture(7 + label, i, 8).tobytes() for label in (0, 1) for i in range(10)}
    assert {image.tobytes() for image in test.images} == expected
    assert test.labels.sum() == 10


@pytest.mark.parametrize('folder', ['test', 'Test', 'val', 'valid'])
def test_a_test_split_alone_is_a_set_to_measure_on(tmp_path: Path, folder: str) -> None:
    classes(tmp_path / 'src' / folder, each=5)
    prepare.prepare('mine', tmp_path, tmp_path / 'src')
    settings = standins.config('mine', tmp_path, num_classes=2, image_size=8)
    facts = data.check(settings)
    assert (facts.train_size, facts.test_size, facts.class_names) == (0, 10, ('cat', 'dog'))
    test = data.load(settings, 'test')
    assert np.bincount(test.labels).tolist() == [5, 5]
    np.testing.assert_allclose(facts.mean, (test.images / 255).mean((0, 1, 2)), atol=1e-4)
    for fails in (lambda: data.load(settings, 'train'), lambda: data.check(settings, ('train',))):
        with pytest.raises(DataError, match='mine has no training images, which .*kd.* need'):
            fails()


def test_val_and_test_without_train(tmp_path: Path) -> None:
    classes(tmp_path / 'src' / 'val', 'ant cat')
    classes(tmp_path / 'src' / 'test', 'bee cat')
    assert sizes(tmp_path / 'src') == {'validation': 8, 'test': 8}
    assert names(tmp_path / 'src') == ['ant', 'bee', 'cat']


@pytest.mark.parametrize('classes_of', [1000])
def test_imagenet_with_val_alone(tmp_path: Path, classes_of: int) -> None:
    for label in range(classes_of):
        folder = tmp_path / 'src' / 'val' / f'n{label:08d}'
        folder.mkdir(parents=True)
        Image.fromarray(standins.picture(label, 0, 8)).save(folder / '0.JPEG')
    prepare.prepare('imagenet', tmp_path, tmp_path / 'src')
    facts = data.check(standins.config('imagenet', tmp_path, image_size=8, resize='crop'))
    assert (facts.train_size, facts.test_size) == (0, 1000)
    assert facts.mean == data.DATASETS['imagenet'].mean


def test_what_is_not_understood_beside_the_splits_is_named(tmp_path: Path) -> None:
    source = tmp_path / 'src'
    classes(source / 'train')
    classes(source / 'extra')
    refused(source, 'src has extra beside train: expected only folders of splits')
    (source / 'extra').rename(source / 'valid')
    classes(source / 'val')
    refused(source, 'val and valid are both the validation split')
    (source / 'valid').rename(source / '.valid')
    assert sizes(source) == {'train': 8, 'validation': 8}
    (source / 'test.zip').write_bytes(b'PK')
    refused(source, 'src has test.zip beside train, of which no class or split is known: unpack it')


def test_a_split_without_classes_is_told(tmp_path: Path, capsys: Any) -> None:
    """Kaggle's test/, of images alone."""
    source = tmp_path / 'src'
    classes(source / 'train', each=5)
    fill(source / 'test')
    refused(source, 'src/test has no images in class folders, so no accuracy can be measured')
    classes(source / 'val')
    prepare.prepare('mine', tmp_path, source)
    assert 'src/test has images without classes, which are not used' in capsys.readouterr().err


def test_a_fifth_that_is_held_out_is_told(tmp_path: Path, capsys: Any) -> None:
    prepare.prepare('mine', tmp_path, classes(tmp_path / 'src', each=5))
    assert 'a fifth of each class is held out' in capsys.readouterr().err


def test_classes_outside_and_splits_inside_are_refused(tmp_path: Path) -> None:
    for name in ('cat', 'dog'):
        fill(tmp_path / 'src' / name / 'train')
        fill(tmp_path / 'src' / name / 'test')
    refused(tmp_path / 'src', 'src/cat has the splits test, train inside: .*as in test/cat')


# 2. Classes


def test_what_is_hidden_is_no_class_and_no_image(tmp_path: Path) -> None:
    source = classes(tmp_path / 'src')
    fill(source / '.ipynb_checkpoints')
    fill(source / '__MACOSX' / 'cat')
    fill(source / 'cat' / '.thumbnails')
    fill(source / 'cat' / '__MACOSX')
    for name in ('.DS_Store', 'Thumbs.db', 'README', 'notes.txt', '._0.png'):
        (source / name).write_bytes(b'x')
        (source / 'dog' / name).write_bytes(b'x')
    assert names(source) == ['cat', 'dog']
    assert sizes(source) == {'train': 6, 'test': 2}


def test_an_empty_class_is_named(tmp_path: Path) -> None:
    source = classes(tmp_path / 'src', 'ant cat')
    (source / 'bee').mkdir()
    refused(source, 'src/bee has no images .*: fill it or remove it')
    (source / 'bee' / 'a.txt').write_text('no image')
    refused(source, 'src/bee has no images')
    fill(source / 'bee')
    assert names(source) == ['ant', 'bee', 'cat']


def test_an_empty_class_of_a_test_split_changes_no_label(tmp_path: Path) -> None:
    source = tmp_path / 'src'
    classes(source / 'train', 'ant bee cat')
    classes(source / 'test', 'ant cat')
    (source / 'test' / 'bee').mkdir()
    layout = image_folder.understand(source)
    labels = [label for _, label in image_folder.labelled_splits(layout)['test']]
    assert sorted(set(labels)) == [0, 2]


def test_an_archive_of_one_folder_is_looked_into(tmp_path: Path) -> None:
    inner = tmp_path / 'src' / 'my-set-main' / 'data'
    classes(inner / 'train')
    classes(inner / 'val', each=1)
    (tmp_path / 'src' / '__MACOSX').mkdir()
    layout = image_folder.understand(tmp_path / 'src')
    assert layout.top == inner and sizes(tmp_path / 'src') == {'train': 8, 'validation': 2}


def test_an_image_outside_all_classes_is_named(tmp_path: Path) -> None:
    source = classes(tmp_path / 'src')
    fill(source, 1)
    refused(source, 'src has 0.png beside its class folders, of which no class')
    (source / '0.png').unlink()
    classes(source / 'train')
    refused(source, 'src has cat, dog beside train')


def test_files_that_are_no_images_are_named(tmp_path: Path) -> None:
    source = classes(tmp_path / 'src')
    (source / 'cat' / 'photo.heic').write_bytes(b'x')
    refused(source, r'cat/photo.heic is no kind of image that is read \(.png, .*: convert it')


def test_numbers_are_sorted_as_text_and_that_is_told(tmp_path: Path, capsys: Any) -> None:
    """As PyTorch's ImageFolder does."""
    source = classes(tmp_path / 'src', '1 2 10')
    assert names(source) == ['1', '10', '2']
    prepare.prepare('mine', tmp_path, source)
    assert '1 is label 0, 10 is label 1, 2 is label 2' in capsys.readouterr().err


def test_links_are_followed_and_loops_are_named(tmp_path: Path) -> None:
    source = classes(tmp_path / 'src')
    fill(tmp_path / 'elsewhere' / 'more')
    (source / 'eel').symlink_to(tmp_path / 'elsewhere')
    assert names(source) == ['cat', 'dog', 'eel'] and sum(sizes(source).values()) == 12
    (tmp_path / 'elsewhere' / 'again').symlink_to(tmp_path / 'elsewhere')
    refused(source, 'again is a link to a folder that is read already')
    (source / 'eel').unlink()
    (source / 'fox').symlink_to(tmp_path / 'nowhere')
    refused(source, 'src has fox beside its class folders')


# 3. Images


def stored(tmp_path: Path, images: dict[str, Image.Image], channels: int = 3) -> np.ndarray:
    """All images of a set of two classes that have these, [N, 8, 8, C]."""
    for name in ('a', 'b'):
        (tmp_path / 'src' / name).mkdir(parents=True)
        for file, image in images.items():
            image.save(tmp_path / 'src' / name / file)
    prepare.prepare('mine', tmp_path, tmp_path / 'src')
    settings = standins.config(
        'mine', tmp_path, num_classes=2, image_size=8, channels=channels, mean=(0.5,), std=(0.5,)
    )
    return np.concatenate([data.load(settings, split).images for split in ('train', 'test')])


@pytest.mark.parametrize('suffix', ['.png', '.tif', '.pgm'])
def test_sixteen_bits_of_grey_become_the_upper_eight(tmp_path: Path, suffix: str) -> None:
    wide = np.random.default_rng(0).integers(0, 2**16, (8, 8)).astype(np.uint16)
    images = stored(tmp_path, {f'{i}{suffix}': Image.fromarray(wide) for i in range(2)}, channels=1)
    assert len(images) == 4
    for image in images:
        np.testing.assert_array_equal(image[..., 0], wide >> 8)


def test_the_moments_of_sixteen_bits_are_those_of_eight(tmp_path: Path) -> None:
    wide = np.random.default_rng(0).integers(0, 2**16, (8, 8)).astype(np.uint16)
    stored(tmp_path, {f'{i}.png': Image.fromarray(wide) for i in range(2)}, channels=1)
    facts = data.check(standins.config('mine', tmp_path, num_classes=2, image_size=8, channels=1))
    np.testing.assert_allclose(facts.mean, [(wide >> 8).mean() / 255], atol=1e-4)


def png_16(pixels: np.ndarray) -> bytes:
    """A PNG file of 16 bits in each of three channels, which Pillow does not write."""
    import struct
    import zlib

    def chunk(kind: bytes, content: bytes) -> bytes:
        check = struct.pack('>I', zlib.crc32(kind + content))
        return struct.pack('>I', len(content)) + kind + content + check

    height, width = pixels.shape[:2]
    rows = b''.join(b'\0' + row.astype('>u2').tobytes() for row in pixels)
    head = struct.pack('>IIBBBBB', width, height, 16, 2, 0, 0, 0)
    return (
        b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', head) + chunk(b'IDAT', zlib.compress(rows))
        + chunk(b'IEND', b'')
    )  # fmt: skip


def test_sixteen_bits_of_colour_become_the_upper_eight(tmp_path: Path) -> None:
    wide = np.random.default_rng(0).integers(0, 2**16, (8, 8, 3)).astype(np.uint16)
    source = classes(tmp_path / 'src', 'a b', each=1)
    for name in ('a', 'b'):
        (source / name / '0.png').write_bytes(png_16(wide))
        (source / name / '1.png').write_bytes(png_16(wide))
    prepare.prepare('mine', tmp_path, source)
    settings = standins.config('mine', tmp_path, num_classes=2, image_size=8)
    for image in data.load(settings, 'train').images:
        np.testing.assert_array_equal(image, wide >> 8)


def test_thirty_two_bits_are_refused(tmp_path: Path) -> None:
    source = classes(tmp_path / 'src', 'a b')
    Image.fromarray(np.ones((8, 8), np.float32)).save(source / 'a' / 'x.tif')
    refused(source, 'a/x.tif cannot be read as an image .its pixels have 32 bits')


def test_inks_palettes_and_transparency_become_colours(tmp_path: Path) -> None:
    rgb = Image.fromarray(np.full((8, 8, 3), (200, 40, 90), np.uint8))
    kinds = {
        'inks.jpg': rgb.convert('CMYK'), 'inks.tif': rgb.convert('CMYK'),
        'photo.jfif': rgb, 'photo.jpe': rgb, 'PHOTO.JPEG': rgb,
        'alpha.png': rgb.convert('RGBA'), 'palette.png': rgb.quantize(4),
    }  # fmt: skip
    source = tmp_path / 'src'
    for name in ('a', 'b'):
        (source / name).mkdir(parents=True)
        for file, image in kinds.items():
            kind = 'TIFF' if file.endswith('.tif') else 'PNG' if file.endswith('.png') else 'JPEG'
            image.save(source / name / file, kind)
    prepare.prepare('mine', tmp_path, source)
    settings = standins.config('mine', tmp_path, num_classes=2, image_size=8)
    both = [data.load(settings, split).images for split in ('train', 'test')]
    images = np.concatenate(both).astype(int)
    assert len(images) == 2 * len(kinds)
    assert np.abs(images - np.asarray(rgb)).max() < 6


def test_grey_with_transparency_stays_grey(tmp_path: Path) -> None:
    grey = Image.fromarray(np.full((8, 8), 77, np.uint8)).convert('LA')
    images = stored(tmp_path, {'0.png': grey, '1.png': grey}, channels=1)
    assert images.shape[-1] == 1 and (images == 77).all()


def test_a_rotation_in_the_metadata_is_not_applied(tmp_path: Path) -> None:
    """As PyTorch's ImageFolder, with which most teachers were trained."""
    tall = Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8).repeat(3).reshape(8, 8, 3))
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    source = classes(tmp_path / 'src', 'a b', each=1)
    for name in ('a', 'b'):
        for i in range(2):
            tall.save(source / name / f'{i}.png', exif=exif)
    prepare.prepare('mine', tmp_path, source)
    settings = standins.config('mine', tmp_path, num_classes=2, image_size=8)
    np.testing.assert_array_equal(data.load(settings, 'train').images[0], np.asarray(tall))


@pytest.mark.parametrize('content', [b'', b'<html>', 'half'])
def test_damaged_images_are_named(tmp_path: Path, content: Any) -> None:
    source = classes(tmp_path / 'src')
    file = source / 'dog' / '3.png'
    file.write_bytes(file.read_bytes()[:-70] if content == 'half' else content)
    refused(source, 'dog/3.png cannot be read as an image')


def test_a_diffusion_prior_reads_sixteen_bits_too(tmp_path: Path) -> None:
    wide = np.random.default_rng(0).integers(0, 2**16, (8, 8)).astype(np.uint16)
    Image.fromarray(wide).save(tmp_path / 'a.png')
    found = image_folder.read_folder(tmp_path, 8, 1)
    np.testing.assert_array_equal(found[0, ..., 0], wide >> 8)


# 4. CIFAR's python version


def cifar_tables(name: str, each: int) -> dict[str, dict[bytes, Any]]:
    """What the files of the python version hold: the pixels of `standins.cifar_files`."""
    spec = data.DATASETS[name]
    coarse = [f'kind_{i}'.encode() for i in range(standins.COARSE)]
    label_names = [each.encode() for each in spec.class_names]
    rows = [standins.picture(i % spec.num_classes, i, 32) for i in range(each)]
    labels = [i % spec.num_classes for i in range(each)]
    batch: dict[bytes, Any] = {
        b'data': np.stack([row.transpose(2, 0, 1).reshape(-1) for row in rows]),
        b'filenames': [b'a.png'] * each,
    }
    if name == 'cifar10':
        files = [*(f'data_batch_{i}' for i in range(1, 6)), 'test_batch']
        meta = {'batches.meta': {b'label_names': label_names, b'num_vis': 3072}}
        return {file: batch | {b'labels': labels} for file in files} | meta
    fine = batch | {b'fine_labels': labels, b'coarse_labels': [label // 5 for label in labels]}
    meta = {'meta': {b'fine_label_names': label_names, b'coarse_label_names': coarse}}
    return {file: fine for file in ('train', 'test')} | meta


def written(folder: Path, tables: dict[str, Any], protocol: int = 2) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for file, table in tables.items():
        (folder / file).write_bytes(pickle.dumps(table, protocol))
    return folder


def everything(name: str, place: Path) -> list[bytes]:
    settings = standins.config(name, place)
    both = [data.load(settings, split) for split in ('train', 'test')]
    return [x.tobytes() for each in both for x in (each.images, each.labels)]


@pytest.mark.parametrize('name, unpacked', [
    ('cifar10', 'cifar-10-batches-py'), ('cifar100', 'cifar-100-python'),
])  # fmt: skip
def test_both_versions_and_their_archives_make_one_set(
    tmp_path: Path, name: str, unpacked: str
) -> None:
    binary = standins.cifar_files(tmp_path / 'binary' / 'cifar-binary', name)
    pickled = written(tmp_path / 'python' / unpacked, cifar_tables(name, 10))
    for folder in (binary, pickled):
        with tarfile.open(folder.with_suffix('.tar.gz'), 'w:gz') as archive:
            archive.add(folder, folder.name)
    sources = {
        'a': binary, 'b': binary.with_suffix('.tar.gz'),
        'c': pickled, 'd': pickled.with_suffix('.tar.gz'),
        'e': pickled.parent,  # as torchvision leaves it: the archive and what it unpacked to
    }  # fmt: skip
    found = {}
    for key, source in sources.items():
        place = prepare.prepare(name, tmp_path / key, source)
        assert place == tmp_path / key / name / '3.0.2'
        found[key] = everything(name, tmp_path / key)
    assert all(each == found['a'] for each in found.values())
    assert data.check(standins.config(name, tmp_path / 'd')).train_size == (
        50 if name == 'cifar10' else 10
    )


@pytest.mark.parametrize('protocol', [0, 1, 2, 3, 4])
def test_pickles_of_every_age_are_read_and_nothing_is_called(protocol: int) -> None:
    table = cifar_tables('cifar10', 3)['test_batch']
    found = cifar._table(Path('x'), pickle.dumps(table, protocol))
    np.testing.assert_array_equal(cifar._array(found['data']), table[b'data'])
    assert found['labels'] == table[b'labels']


def test_a_pickle_of_python_2_is_read() -> None:
    """As the authors wrote it: texts without encoding."""
    raw = bytes(range(6))
    pickled = (
        b'\x80\x02}q\x01(U\x04dataq\x02cnumpy.core.multiarray\n_reconstruct\nq\x03cnumpy\nndarray\n'
        b'q\x04K\x00\x85q\x05U\x01bq\x06\x87q\x07Rq\x08(K\x01K\x02K\x03\x86q\tcnumpy\ndtype\nq\n'
        b'U\x02u1q\x0bK\x00K\x01\x87q\x0cRq\r(K\x03U\x01|q\x0eNNNJ\xff\xff\xff\xffJ\xff\xff\xff\xff'
        b'K\x00tq\x0fb\x89U\x06' + raw + b'q\x10tq\x11bU\x06labelsq\x12]q\x13(K\x03K\x04eu.'
    )
    found = cifar._table(Path('x'), pickled)
    np.testing.assert_array_equal(cifar._array(found['data']), [[0, 1, 2], [3, 4, 5]])
    assert found['labels'] == [3, 4]


class Hostile:
    """Unpickling it makes a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize('where', ['data_batch_1', 'batches.meta', 'labels', 'extra'])
def test_code_in_the_pickles_is_not_run(tmp_path: Path, where: str) -> None:
    tables: dict[str, Any] = cifar_tables('cifar10', 2)
    trap = Hostile(tmp_path / 'executed')
    if where in tables:
        tables[where] = trap
    else:
        tables['data_batch_1'] = tables['data_batch_1'] | {where.encode(): trap}
    source = written(tmp_path / 'cifar-10-batches-py', tables)
    if where == 'extra':  # beside what is read: inert
        prepare.prepare('cifar10', tmp_path / 'sets', source)
    else:
        with pytest.raises(DataError, match='get it again'):
            prepare.prepare('cifar10', tmp_path / 'sets', source)
    assert not (tmp_path / 'executed').exists()
    path = source / (where if where in tables else 'data_batch_1')
    pickle.loads(path.read_bytes())  # the trap works
    assert (tmp_path / 'executed').exists()


def shared_tuples(depth: int) -> bytes:
    """A pickle of a dict whose key is a tuple of tuples, 2^depth of them to hash."""
    body = b')q\x00' + b''.join(b'h' + bytes([i]) + b'\x86q' + bytes([i + 1]) for i in range(depth))
    return b'\x80\x02}' + body + b'K\x01s.'


@pytest.mark.parametrize(
    'content',
    [
        b'', b'no pickle', pickle.dumps([1]), pickle.dumps({b'a': 1})[:-3], b'\x80\x02Rq\x00.',
        b'\x80\x02}K\x01s.', b'\x80\x02(}u.', b'\x80\x02h\x05.', b'\x80\x02cos\nsystem\n.',
        b'\x80\x02r\xff\xff\xff\x7f.', b'\x80\x02P1\n.', shared_tuples(60),
    ],
)  # fmt: skip
def test_what_is_no_pickle_of_cifar_is_refused(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(DataError, match='is not one of the pickles of CIFAR .*: get it again'):
        cifar._table(tmp_path / 'test_batch', content)


@pytest.mark.parametrize(
    'change, message',
    [
        (dict(data=np.zeros((2, 3071), np.uint8)), 'no images of 3072 bytes under data'),
        (dict(data=np.zeros((2, 3072), np.float32)), 'no images of 3072 bytes under data'),
        (dict(labels=[1]), 'no labels for its 2 images'),
        (dict(labels=[1, 'a']), 'no labels for its 2 images'),
        (dict(labels=[1, 10]), 'labels up to 10: expected 0 to 9'),
        (dict(labels=None), 'no labels for its 2 images'),
    ],
)
def test_damaged_tables_are_named(tmp_path: Path, change: dict, message: str) -> None:
    tables = cifar_tables('cifar10', 2)
    changed = {name.encode(): value for name, value in change.items()}
    tables['data_batch_4'] = tables['data_batch_4'] | changed
    source = written(tmp_path / 'py', tables)
    with pytest.raises(DataError, match=f'data_batch_4.*{message}'):
        prepare.prepare('cifar10', tmp_path / 'sets', source)
    assert not (tmp_path / 'sets').exists()


def test_another_version_or_another_set_is_named(tmp_path: Path) -> None:
    source = written(tmp_path / 'py', cifar_tables('cifar10', 2))
    with pytest.raises(DataError, match='py is the python version of cifar10, not cifar100'):
        prepare.prepare('cifar100', tmp_path / 'sets', source)
    (source / 'data_batch_2').unlink()
    with pytest.raises(DataError, match='py lacks data_batch_2: unpack the whole archive again'):
        prepare.prepare('cifar10', tmp_path / 'sets', source)
    matlab = tmp_path / 'mat'
    matlab.mkdir()
    (matlab / 'test_batch.mat').write_bytes(b'x')
    with pytest.raises(DataError, match='holds the MATLAB version of CIFAR: get the python or'):
        prepare.prepare('cifar10', tmp_path / 'sets', matlab)
    archive = tmp_path / 'cifar-10-python.tar.gz'
    archive.write_bytes(b'\x1f\x8b cut short')
    with pytest.raises(DataError, match='cifar-10-python.tar.gz cannot be unpacked'):
        prepare.prepare('cifar10', tmp_path / 'sets', archive)


def test_the_reader_imports_no_unpickler() -> None:
    source = Path(sys.modules['dfkd_jax.data.cifar'].__file__ or '').read_text()
    assert 'import pickle\n' not in source and 'Unpickler' not in source


# 5. Without images


def nothing(**changes: Any) -> Any:
    fields: dict[str, Any] = dict(num_classes=2, image_size=8, mean=(0.5,), std=(0.25,))
    name, data_dir = changes.pop('name', ''), changes.pop('data_dir', None)
    return standins.config(name, data_dir, **fields | changes)


@pytest.mark.parametrize('name', ['', None, 'None', 'mine'])
def test_the_facts_are_those_of_the_config(name: Any, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv('TFDS_DATA_DIR', str(tmp_path))
    facts = data.check(nothing(name=name))
    assert (facts.train_size, facts.test_size, facts.class_names) == (0, 0, ())
    assert facts.mean == (0.5,) * 3 and facts.std == (0.25,) * 3
    assert facts.image_shape == (8, 8, 3) and facts.num_classes == 2
    with pytest.raises(DataError, match='no real images|unknown data set'):
        data.load(nothing(name=name), 'test')
    with pytest.raises(DataError, match='no real images|unknown data set'):
        data.check(nothing(name=name), ('train',))


def test_a_listed_set_needs_no_images_but_keeps_its_constants(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv('TFDS_DATA_DIR', str(tmp_path))
    facts = data.check(standins.config('cifar10', None))
    spec = data.DATASETS['cifar10']
    assert facts.test_size == 0 and facts.class_names == spec.class_names
    assert (facts.mean, facts.std) == (spec.mean, spec.std)
    with pytest.raises(DataError, match='num_classes is 9, but cifar10 has 10'):
        data.check(standins.config('cifar10', None, num_classes=9))
    with pytest.raises(DataError, match="no data set 'cifar10'"):
        data.check(standins.config('cifar10', None), ('test',))


@pytest.mark.parametrize(
    'changes, message',
    [
        (dict(mean=None), "mean and config.data.std must be .*'.0.485,0.456,0.406.' and .*ImageN"),
        (dict(std=None), 'must be those that the teacher was trained with'),
        (dict(name='mine', std=None), "unknown data set 'mine'(.|\n)*--config.data.name=''"),
        (dict(name='mine', data_dir='/nowhere'), "unknown data set 'mine'(.|\n)*In /nowhere"),
        (dict(name='cifar10', num_classes=10, data_dir='/nowhere'),
         "no data set 'cifar10' in /nowhere(.|\n)*mean='.0.4914,0.4822,0.4465.'"),
        (dict(channels=2), 'channels is 2: expected 1 .grey. or 3 .colour.'),
        (dict(num_classes=1), 'num_classes is 1: expected 2 or more'),
        (dict(mean=(0.5, 0.5)), '2 values: expected one, or one for each of the 3'),
    ],
)  # fmt: skip
def test_what_is_not_known_is_asked_for(changes: dict, message: str) -> None:
    with pytest.raises(DataError, match=message):
        data.check(nothing(**changes))
