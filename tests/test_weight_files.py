"""Weights as people have them, under any key, prefix and ending; or one line that mends it."""

from __future__ import annotations

import argparse
import io
import json
import pickle
import re
import struct
import subprocess
import sys
import tarfile
import zipfile
from collections import OrderedDict
from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from mistakes import Hostile
from reference import identical

from dfkd_jax import models, port
from dfkd_jax.errors import PortError
from dfkd_jax.storage import inert_pickle

ROOT = Path(__file__).resolve().parents[1]
torch = pytest.importorskip('torch', reason='PyTorch writes the files')


@cache
def weights(name: str = 'resnet8', seed: int = 0, num_classes: int = 10) -> dict[str, np.ndarray]:
    """A state dict of random numbers: copy it before changing it."""
    module = models.make(name, num_classes=num_classes)
    shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), jnp.zeros((1, 32, 32, 3))))
    draws = np.random.default_rng(seed)
    variables = jax.tree.map(lambda x: draws.normal(size=x.shape).astype(np.float32), shapes)
    return port.to_torch(name, variables)


def tensors(arrays: dict[str, np.ndarray], prefix: str = '') -> OrderedDict:
    return OrderedDict((prefix + k, torch.from_numpy(v.copy())) for k, v in arrays.items())


def right(source: object, name: str = 'resnet8', seed: int = 0, num_classes: int = 10) -> None:
    """The source gives the variables that the plain state dict gives, and says nothing."""
    expected = port.from_torch(name, weights(name, seed, num_classes), num_classes)
    identical(port.from_torch(name, source, num_classes), expected)


# 1. Wrappers and prefixes.

WRAPPERS = [
    'net', 'model_state_dict', 'state_dict', 'model', 'weights', 'params', 'network', 'model_state',
    'state_dict_ema', 'model_ema', 'ema_state_dict', 'net_G', 'a.key with a dot',
]  # fmt: skip


@pytest.mark.parametrize('wrapper', WRAPPERS)
def test_any_wrapper(tmp_path: Path, wrapper: str):
    optimizer = {'state': {0: {'momentum_buffer': torch.zeros(3)}}, 'param_groups': [{'lr': 0.1}]}
    content = {wrapper: tensors(weights()), 'epoch': 3, 'loss': torch.tensor(0.5),
               'optimizer_state_dict': optimizer}  # fmt: skip
    torch.save(content, tmp_path / 'teacher.pth')
    right(tmp_path / 'teacher.pth')
    right({'outer': content})


@pytest.mark.parametrize('prefix', ['module.', '_orig_mod.module.', 'module._orig_mod.',
                                    'module.module.', 'model._orig_mod.', 'module.student.',
                                    'encoder_q.', 'net.backbone.module.'])  # fmt: skip
def test_any_prefix(prefix: str):
    right({'state_dict': tensors(weights(), prefix)})


def test_head_under_a_prefix_of_its_own():
    """OpenMMLab: `backbone.conv1` and `head.fc`; Lightning modules: `backbone.conv1` and `fc`."""
    for head in ('head.', ''):
        right({(head if key.startswith('fc.') else 'backbone.') + key: value
               for key, value in weights().items()})  # fmt: skip


def test_what_lies_outside_is_named():
    lightning = {
        **tensors(weights(), 'model.'),
        'val_acc.correct': torch.zeros(()),
        'criterion.weight': torch.ones(10),
    }
    with pytest.warns(port.PortWarning, match=r'left out.*val_acc.correct, criterion.weight'):
        right({'state_dict': lightning, 'hyper_parameters': {'lr': 0.1}})


def test_averages_and_profilers_counters_are_left_out_by_name():
    counted = tensors(weights(), 'module.') | {'n_averaged': torch.tensor(7)}
    for layer in ('module.', 'module.conv1.', 'module.layer1.0.bn1.'):
        counted |= {f'{layer}total_ops': torch.zeros(1), f'{layer}total_params': torch.zeros(1)}
    with pytest.warns(port.PortWarning, match='left out.*total_ops') as told:
        right(counted)
    assert 'n_averaged' in str(told[0].message)


def test_an_unused_copy_is_left_out():
    """TRADES and RobustBench: `sub_block1`."""
    spare = {f'sub_{k}': v for k, v in weights('wrn16_1').items() if k.startswith('block1.')}
    with pytest.warns(port.PortWarning, match='left out.*sub_block1.layer.0.bn1.weight'):
        right(weights('wrn16_1') | spare, 'wrn16_1')
    with pytest.raises(PortError, match=r'unexpected .*: sub_block9'):
        right(weights('wrn16_1') | {'sub_block9.x': np.zeros(1)}, 'wrn16_1')


# 2. Several sets of weights.


def test_weights_that_differ_are_chosen_by_key(tmp_path: Path):
    path = tmp_path / 'teacher.pth'
    torch.save({'state_dict': tensors(weights(seed=1)),
                'state_dict_ema': tensors(weights(), 'module.')}, path)  # fmt: skip
    with pytest.raises(PortError, match=r'2 different sets.*state_dict and state_dict_ema.module'):
        port.from_torch('resnet8', path)
    for key in ('state_dict_ema', 'state_dict_ema.module', 'module'):
        right(f'{path}#{key}')
    right(f'{path}#state_dict', seed=1)
    with pytest.raises(PortError, match=r"under 'ema': expected one of state_dict, state_dict_ema"):
        port.from_torch('resnet8', f'{path}#ema')


def test_one_of_two_prefixes_is_chosen():
    """A distiller that saved its student beside its teacher, of one architecture."""
    both = tensors(weights(), 'module.student.') | tensors(weights(seed=1), 'module.teacher.')
    with pytest.raises(PortError, match=r'module.student and module.teacher: choose one'):
        port.from_torch('resnet8', both)


def test_the_same_weights_twice_are_one(tmp_path: Path):
    right({'state_dict': tensors(weights()), 'best': tensors(weights(), 'module.')})


def test_a_file_with_a_hash_in_its_name(tmp_path: Path):
    torch.save(tensors(weights()), tmp_path / 'run#3.pth')
    right(tmp_path / 'run#3.pth')


def test_twins_are_told():
    with pytest.warns(port.PortWarning, match="'mobilenetv2' and of 'mobilenetv2_cifar'"):
        port.from_torch('mobilenetv2', weights('mobilenetv2'))
    with pytest.warns(port.PortWarning, match="read as 'mobilenetv2_cifar', as asked"):
        port.from_torch('mobilenetv2_cifar', weights('mobilenetv2'))
    right(weights('resnet18'), 'resnet18')  # under names that only one of the two has


# 3. A normalisation layer in front.


@pytest.mark.parametrize(
    ('keys', 'scale'), [(('0.mean', '0.std'), 1), (('normalize.mu', 'normalize.sigma'), 1),
                        (('data_preprocessor.mean', 'data_preprocessor.std'), 255)]
)  # fmt: skip
def test_normalisation_is_read_and_offered(keys: tuple[str, str], scale: float):
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    layer = {
        key: torch.tensor(x).reshape(1, 3, 1, 1) * scale
        for key, x in zip(keys, (mean, std), strict=True)
    }
    ported = port.read('resnet8', {'state_dict': layer | tensors(weights(), '1.')})
    assert (ported.mean, ported.std) == (mean, std)
    assert 'set --config.data.mean="(0.485, 0.456, 0.406)"' in ported.notes[0]


# 4. Files: the bytes tell.

ENDINGS = ['checkpoint.th', 'teacher', 'model.PTH', 'net.t7', 'weights.pkl', 'best.model', 'x.ckpt']


@pytest.mark.parametrize('ending', ENDINGS)
@pytest.mark.parametrize('zipped', [True, False])
def test_any_ending_of_torchs_two_formats(tmp_path: Path, ending: str, zipped: bool):
    torch.save(tensors(weights()), tmp_path / ending, _use_new_zipfile_serialization=zipped)
    right(tmp_path / ending)


def test_other_libraries_files_under_any_name(tmp_path: Path):
    safetensors.numpy.save_file(weights(), tmp_path / 'A.SAFETENSORS')
    np.savez(tmp_path / 'b.npz', **weights())
    (tmp_path / 'b.npz').rename(tmp_path / 'b.weights')
    (tmp_path / 'c.pkl').write_bytes(pickle.dumps({'model': dict(weights())}, 2))
    (tmp_path / 'd.pkl').write_bytes(pickle.dumps(dict(weights()), 5))
    for name in ('A.SAFETENSORS', 'b.weights', 'c.pkl', 'd.pkl'):
        right(tmp_path / name)


@pytest.mark.parametrize('zipped', [True, False])
def test_pickled_extras_are_read_as_inert(tmp_path: Path, zipped: bool):
    extras = {'args': argparse.Namespace(lr=0.1), 'best': np.float64(91.0),
              'when': Path('here'), 'hostile': Hostile(tmp_path)}  # fmt: skip
    path = tmp_path / 'a.pth'
    torch.save({'model': tensors(weights()), **extras}, path, _use_new_zipfile_serialization=zipped)
    right(path)
    assert not (tmp_path / 'executed').exists()
    content = inert_pickle.load(path)
    assert content['args'].name == 'argparse.Namespace'
    assert content['best'] == 91.0


def test_tensors_of_every_kind(tmp_path: Path):
    """Views, half precision, parameters, scalars: as PyTorch has them."""
    whole = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    kinds = {
        'turned': whole.T, 'part': whole[1:, ::2], 'one': torch.tensor(3.5), 'none': whole[:0],
        'half': whole.half(), 'brain': whole.bfloat16(), 'whole': whole.long(),
        'parameter': torch.nn.Parameter(whole), 'wide': whole.double(),
        'spread': whole[:1].expand(4, 6),
    }  # fmt: skip
    for zipped in (True, False):
        torch.save(kinds, tmp_path / 'kinds.pth', _use_new_zipfile_serialization=zipped)
        found = inert_pickle.load(tmp_path / 'kinds.pth')
        for name, tensor in kinds.items():
            assert found[name].shape == tuple(tensor.shape)
            expected = tensor.detach().float().numpy()
            np.testing.assert_array_equal(np.asarray(found[name]).astype(np.float32), expected)


def test_a_tensor_beyond_its_storage_is_refused(tmp_path: Path):
    torch.save({'x': torch.zeros(4)}, tmp_path / 'a.pth')
    with zipfile.ZipFile(tmp_path / 'a.pth') as old, zipfile.ZipFile(tmp_path / 'b', 'w') as new:
        for name in old.namelist():
            data = old.read(name)
            new.writestr(name, data.replace(b'K\x04', b'K\x09') if name.endswith('.pkl') else data)
    with pytest.raises(ValueError, match='beyond its storage'):
        np.asarray(inert_pickle.load(tmp_path / 'b')['x'])


@pytest.mark.parametrize('program', [
    b'\x80\x02}r\xff\xff\xff\x7f.',  # an index that would need gigabytes
    b'\x80\x02' + b'(l' * 100 + b'.',
    b'\x80\x02' + b']' * 100_000 + b'a' * 99_999 + b'.',  # deep
    b'\x80\x02cos\nsystem\n(Vtouch executed\ntR}(b.',  # state set on what a call returns
    b'\x80\x02cos\nsystem\n}(V__call__\nI1\nub.',  # state set on a class
    b'\x80\x02})q\x00' + b''.join(b'h%c\x86q%c' % (i, i + 1) for i in range(60)) + b'K\x01s.',
])  # fmt: skip
def test_hostile_pickles_make_data_or_an_error(tmp_path: Path, program: bytes):
    (tmp_path / 'x.pth').write_bytes(program)
    with pytest.raises(PortError):
        port.from_torch('resnet8', tmp_path / 'x.pth')
    assert not Path('executed').exists()


def test_parts_with_an_index(tmp_path: Path):
    """Hugging Face: in parts, named by an index; the folder is enough."""
    items = list(weights().items())
    parts = {'model-00001-of-2.safetensors': items[:20], 'model-00002-of-2.safetensors': items[20:]}
    for name, part in parts.items():
        safetensors.numpy.save_file(dict(part), tmp_path / name)
    index = {key: name for name, part in parts.items() for key, _ in part}
    path = tmp_path / 'model.safetensors.index.json'
    path.write_text(json.dumps({'metadata': {}, 'weight_map': index}))
    right(path)
    right(tmp_path)
    (tmp_path / 'model-00002-of-2.safetensors').unlink()
    with pytest.raises(PortError, match='lacks model-00002-of-2.safetensors beside it: download'):
        port.from_torch('resnet8', path)
    path.write_text(json.dumps({'weight_map': {'x': '../elsewhere.safetensors'}}))
    with pytest.raises(PortError, match='expected files beside it'):
        port.from_torch('resnet8', path)


def test_folders(tmp_path: Path):
    with pytest.raises(PortError, match=r'is a folder without weights \(it holds nothing\)'):
        port.from_torch('resnet8', tmp_path)
    torch.save(tensors(weights()), tmp_path / 'a.pth')
    right(tmp_path)
    torch.save(tensors(weights()), tmp_path / 'b.pth')
    with pytest.raises(PortError, match='several files of weights, a.pth, b.pth: name one'):
        port.from_torch('resnet8', tmp_path)


def test_flax_variables_of_our_modules(tmp_path: Path):
    import orbax.checkpoint as ocp
    from flax import serialization

    variables = port.from_torch('resnet8', weights())
    (tmp_path / 'teacher.msgpack').write_bytes(serialization.to_bytes(variables))
    state = {'step': np.array(3), **variables}
    (tmp_path / 'state.bin').write_bytes(serialization.to_bytes({'state': state}))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / 'orbax', variables)
    for name in ('teacher.msgpack', 'state.bin', 'orbax'):
        right(tmp_path / name)
    del variables['params']['fc']
    with pytest.raises(PortError, match=r'missing \(2\): params/fc/bias, params/fc/kernel.*Flax'):
        port.from_torch('resnet8', variables)


def test_pickled_tensors_and_arrays_of_jax(tmp_path: Path):
    """`pickle.dump` of a state dict, and of variables, frozen or not."""
    from flax.core import freeze

    variables = jax.tree.map(jnp.asarray, port.from_torch('resnet8', weights()))
    for content in (tensors(weights()), {'model': dict(tensors(weights()))}, variables,
                    freeze(variables), {'step': 3, 'target': freeze(variables)}):  # fmt: skip
        for protocol in (2, 4, 5):
            (tmp_path / 'x.pkl').write_bytes(pickle.dumps(content, protocol))
            right(tmp_path / 'x.pkl')


# 4b. Weights in parts, and those of other libraries.


class Layers(torch.nn.Module):
    """A network whose names are those of resnet8, each array in a layer of its own."""

    def __init__(self) -> None:
        super().__init__()
        for key, value in weights().items():
            *path, last = key.split('.')
            place = self
            for name in path:
                if not hasattr(place, name):
                    place.add_module(name, torch.nn.Module())
                place = getattr(place, name)
            kept = torch.from_numpy(value.copy())
            if last == 'weight' and value.ndim > 1:
                place.register_parameter(last, torch.nn.Parameter(kept))
            else:
                place.register_buffer(last, kept)

    def kernels(self) -> dict[str, torch.nn.Module]:
        return {name: layer for name, layer in self.named_modules()
                if getattr(layer, 'weight', torch.ones(())).ndim > 1}  # fmt: skip


def in_parts(way: str) -> tuple[dict, dict]:
    """A state dict with its kernels in parts, and PyTorch's own kernels, by name."""
    from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

    torch.manual_seed(0)
    net = Layers()
    split = {
        'pruned': lambda layer: prune.random_unstructured(layer, 'weight', 0.3),
        'weight_norm': weight_norm,
        'spectral_norm': spectral_norm,
        'parametrized weight_norm': parametrizations.weight_norm,
        'parametrized spectral_norm': parametrizations.spectral_norm,
    }[way]
    kernels = net.kernels()
    for layer in kernels.values():
        split(layer)
    source = {key: value.clone() for key, value in net.eval().state_dict().items()}
    net.double()  # so that the kernels are exact
    for layer in kernels.values():
        for hook in layer._forward_pre_hooks.values():  # they put `weight` together
            hook(layer, ())
    return source, {f'{name}.weight': layer.weight.detach().numpy()
                    for name, layer in kernels.items()}  # fmt: skip


WAYS = ['pruned', 'weight_norm', 'spectral_norm', 'parametrized weight_norm',
        'parametrized spectral_norm']  # fmt: skip


@pytest.mark.filterwarnings('ignore:.*weight_norm.*:FutureWarning')
@pytest.mark.parametrize('way', WAYS)
def test_weights_in_parts_are_put_together(tmp_path: Path, way: str):
    source, kernels = in_parts(way)
    assert not set(kernels) & set(source)
    torch.save({'net': {f'module.{key}': value for key, value in source.items()}}, tmp_path / 'a')
    found = port.to_torch('resnet8', port.from_torch('resnet8', tmp_path / 'a'))
    for key, kernel in kernels.items():
        np.testing.assert_allclose(found[key], kernel, rtol=2e-7)
    for key in set(found) - set(kernels):
        np.testing.assert_array_equal(found[key], weights()[key])


def test_a_first_layer_that_is_missing_is_told():
    """Although each block has a layer of its name."""
    source = tensors(weights(), 'net.')
    del source['net.conv1.weight']
    with pytest.raises(PortError, match=r'46 of 47 arrays fit.* missing \(1\): conv1.weight'):
        port.from_torch('resnet8', source)


def test_parts_that_do_not_fit_are_left():
    source, _ = in_parts('pruned')
    del source['conv1.weight_mask']
    with pytest.raises(
        PortError, match=r'missing \(1\): conv1.weight; unexpected .*conv1.weight_orig'
    ):
        port.from_torch('resnet8', source)


def paddle(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """As PaddlePaddle has them: other names of statistics, and transposed linear layers."""
    names = (('running_mean', '_mean'), ('running_var', '_variance'))
    source = renamed({k: v for k, v in arrays.items() if 'num_batches' not in k}, *names)
    return {key: value.T if value.ndim == 2 else value for key, value in source.items()}


class Named(np.ndarray):
    """How PaddlePaddle pickles a tensor: as a tuple of its name and its numbers."""

    def __reduce__(self):
        return tuple, (('linear_0.w_0', np.asarray(self)),)


def test_paddles_names_and_order_of_axes(tmp_path: Path):
    source = paddle(weights(num_classes=64))  # whose linear layer is square
    assert source['fc.weight'].shape == (64, 64)
    named = {key: value.view(Named) for key, value in source.items()}
    table = {'StructuredToParameterName@@': {key: key for key in source}}
    for content in (source | table, {'model': named, 'epoch': 3}):
        (tmp_path / 'x.pdparams').write_bytes(pickle.dumps(content, 2))
        right(tmp_path / 'x.pdparams', num_classes=64)


# 5. Names of other code bases, for the same module: each by rules of its own here.


def renamed(arrays: dict, *rules: tuple[str, str]) -> dict[str, np.ndarray]:
    names = {}
    for key in arrays:
        new = key
        for pattern, by in rules:
            new = re.sub(pattern, by, new)
        names[key] = new
    assert len(set(names.values())) == len(arrays)
    return {names[key]: value for key, value in arrays.items()}


def test_weiaicunzais_names():
    place = {'conv1': 0, 'bn1': 1, 'conv2': 3, 'bn2': 4}
    source = {}
    for key, value in weights('resnet18', num_classes=100).items():
        stage = re.match(r'layer(\d)\.(\d)\.', key)
        last = key.rpartition('.')[2]
        if stage:
            rest = key[stage.end() :]
            inner = f'shortcut.{rest.split(".")[1]}' if rest.startswith('shortcut') else (
                f'residual_function.{place[rest.split(".")[0]]}')  # fmt: skip
            key = f'conv{int(stage[1]) + 1}_x.{stage[2]}.{inner}.{last}'
        elif key.startswith(('conv1', 'bn1')):
            key = f'conv1.{int(key.startswith("bn1"))}.{last}'
        source[key.replace('linear', 'fc')] = value
    right(source, 'resnet18', num_classes=100)


def test_projections_under_kuanglius_names():
    """Option B of akamaster's classes: a thin network with `shortcut` and `linear`."""
    source = renamed(weights('resnet20'), ('downsample', 'shortcut'), ('^fc', 'linear'))
    right(source, 'resnet20')
    with pytest.raises(PortError, match="of 'resnet20' with num_classes=10, channels=3.$"):
        port.from_torch('resnet32', source)


def test_hugging_faces_names():
    source = {}
    for key, value in weights('resnet18_imagenet').items():
        kind = 'normalization' if re.search(r'bn|downsample\.1', key) else 'convolution'
        last = key.rpartition('.')[2]
        if stage := re.match(r'layer(\d)\.(\d)\.(conv|bn|downsample)\.?(\d)', key):
            part = 'shortcut' if stage[3] == 'downsample' else f'layer.{int(stage[4]) - 1}'
            key = (
                f'resnet.encoder.stages.{int(stage[1]) - 1}.layers.{stage[2]}.{part}.{kind}.{last}'
            )
        elif key.startswith('fc'):
            key = f'classifier.1.{last}'
        else:
            key = f'resnet.embedder.embedder.{kind}.{last}'
        source[key] = value
    right(source, 'resnet18_imagenet')


def test_torchvisions_names_behind_a_small_stem():
    source = renamed(weights('resnet18'), ('shortcut', 'downsample'), ('linear', 'fc'))
    with pytest.warns(port.PortWarning, match="'resnet18' and of 'resnet18_pool'"):
        right(source, 'resnet18')


def test_hint_names_all_that_fit():
    source = renamed(weights('resnet18'), ('shortcut', 'downsample'), ('linear', 'fc'))
    both = r"names and shapes of 'resnet18' .* or of 'resnet18_pool'"
    with pytest.raises(PortError, match=both):
        port.from_torch('resnet34', source)
    with pytest.raises(PortError, match="of 'wrn28_2' with num_classes=10"):
        port.from_torch('wrn16_1', weights('wrn28_2'))
    with pytest.raises(PortError, match="of 'resnet44' with num_classes=10"):
        port.from_torch('resnet8', weights('resnet44'))


# 6. What is no weights: one line that names it and what mends it.


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = torch.nn.Conv2d(3, 16, 3)

    def forward(self, x):
        return self.conv1(x)


def html() -> bytes:
    return b'\n<!DOCTYPE html><html><head><title>Quota exceeded</title></head></html>'


STRANGE = {
    'lfs.pth': (b'version https://git-lfs.github.com/spec/v1\noid sha256:0\n', 'git lfs pull'),
    'page.pth': (html(), 'a web page, not weights: open its address in a browser'),
    'empty.pth': (b'', 'is empty: copy or download it again'),
    'keras.h5': (b'\x89HDF\r\n\x1a\n' + bytes(64), r'HDF5.*tf2onnx.convert --keras .*keras.h5'),
    'x.npy': (b'\x93NUMPY\x01\0', r"an?.*\.npy.*np.load\('.*x.npy', allow_pickle=True\)"),
    'lua.t7': (b'\x04\0\0\0\x01\0\0\0\x03\0\0\0V 1', 'a file of Lua Torch: .* torchfile'),
    'caffe.caffemodel': (b'\n\x05LeNet\xa2\x06\x50\n\x05mnist', 'a network of Caffe'),
    'ms.ckpt': (b'\n\xc0\x0d\n\x0cconv1.weight\x12\xaf\x0d\x08\x10\x12\x07Float32', 'MindSpore'),
    'frozen.pb': (b'\n\x28\n\x05input\x12\x0bPlaceholder', 'a frozen graph of TensorFlow'),
    'saved_model.pb': (b'\x08\x01\x12\xd0\x8f\x08', 'a TensorFlow SavedModel: pass its folder'),
    'm.index': (bytes(40) + bytes.fromhex('57fb808b247547db'), r"load_checkpoint\('.*/m'\)"),
    'm.data-00000-of-00001': (bytes(64), r"part of a TensorFlow.*load_checkpoint\('.*/m'\)"),
    'graph': (b'\x08\x07\x12\x07pytorch', 'an exported program'),
    'job.pkl': (b'\x80\x04\x95}\x94\x8c\x13joblib.numpy_pickle', r'of joblib: .*joblib.load'),
    'a.tar.bz2': (b'BZh9', 'a bzip2 archive'),
    'a.zst': (b'\x28\xb5\x2f\xfd', 'a Zstandard archive'),
    'a.tar.gz': (b'\x1f\x8b' + bytes(64), 'a gzip archive: unpack it first'),
    'b.tar': (bytes(257) + b'ustar' + bytes(250), 'a tar archive: unpack it first'),
    'lite.tflite': (b'\x1c\0\0\0TFL3' + bytes(64), 'a LiteRT model'),
    'config.json': (b'{"model_type": "resnet"}', 'JSON without a weight_map'),
    'noise.pth': (b'\x00\x01\x02' + bytes(64), 'damaged, cut short, or of another format'),
}  # fmt: skip


@pytest.mark.parametrize('name', STRANGE)
def test_strangers_are_named(tmp_path: Path, name: str):
    content, message = STRANGE[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(PortError, match=message) as error:
        port.from_torch('resnet8', tmp_path / name)
    assert '\n' not in str(error.value)
    assert 'weights_only set to False' not in str(error.value)


def test_bytes_of_no_kind_are_not_named(tmp_path: Path):
    for content in (b'\n', b'\n\x80\x80', b'\n\x05\xff\xfe\xfd\xfc\xfb', b'\x08', b'\x08\x01'):
        (tmp_path / 'x').write_bytes(content)
        with pytest.raises(PortError, match='of another format'):
            port.from_torch('resnet8', tmp_path / 'x')


@pytest.mark.parametrize(
    ('held', 'message'),
    [
        ('__0_0.distcp', r'format_utils dcp_to_torch .*folder weights.pth'),
        ('zero_to_fp32.py', r'DeepSpeed.*python .*folder/zero_to_fp32.py .*folder weights'),
        ('saved_model.pb', r'SavedModel.*tf2onnx.convert --saved-model .*folder --output'),
        (
            'model.ckpt-7.index',
            r"a TensorFlow checkpoint.*load_checkpoint\('.*folder/model.ckpt-7'\)",
        ),
    ],
)
def test_folders_of_other_libraries(tmp_path: Path, held: str, message: str):
    folder = tmp_path / 'folder'
    folder.mkdir()
    (folder / held).write_bytes(b'x')
    (folder / 'extra.bin').write_bytes(b'x')
    with pytest.raises(PortError, match=message):
        port.from_torch('resnet8', folder)
    if held.endswith('.distcp'):  # and so is a part of it
        with pytest.raises(PortError, match=message):
            port.from_torch('resnet8', folder / held)
    if held.endswith('.index'):  # and so is the name that TensorFlow gives it
        with pytest.raises(PortError, match=message):
            port.from_torch('resnet8', folder / 'model.ckpt-7')


def test_distributed_checkpoints_are_put_together_by_the_command(tmp_path: Path):
    import torch.distributed.checkpoint as distributed
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    with pytest.warns(UserWarning, match='process'):
        distributed.save({'model': tensors(weights())}, checkpoint_id=tmp_path / 'parts')
    with pytest.raises(PortError, match='dcp_to_torch'):
        port.from_torch('resnet8', tmp_path / 'parts')
    dcp_to_torch_save(tmp_path / 'parts', tmp_path / 'weights.pth')  # what the command calls
    right(tmp_path / 'weights.pth')


@pytest.mark.filterwarnings('ignore:TypedStorage is deprecated')
def test_packages_are_refused_with_the_command_that_saves_their_weights(tmp_path: Path):
    from torch.package import PackageExporter

    with PackageExporter(tmp_path / 'a.pt') as exporter:
        exporter.save_pickle('nets.small', 'model.pkl', tensors(weights()))
    with pytest.raises(PortError, match='a torch.package, a program') as error:
        port.from_torch('resnet8', tmp_path / 'a.pt')
    command = re.search(r'python -c "(.*)"`', str(error.value))
    assert command
    subprocess.run([sys.executable, '-c', command[1]], cwd=tmp_path, check=True)
    right(tmp_path / 'weights.pth')


def old_tar(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """A file as PyTorch wrote it before 0.2: a tar archive of storages, tensors and a pickle."""

    class Pickler(pickle.Pickler):
        def persistent_id(self, obj: object) -> object:
            return str(id(obj)) if isinstance(obj, torch.Tensor) else None

    storages, parts, held, whole = io.BytesIO(), io.BytesIO(), tensors(arrays), io.BytesIO()
    for file in (storages, parts):
        pickle.dump(len(held), file, 2)
    for number, tensor in enumerate(held.values()):
        pickle.dump((number, 'cpu', torch.FloatStorage), storages, 2)
        storages.write(struct.pack('<q', tensor.numel()) + tensor.numpy().tobytes())
        pickle.dump((id(tensor), number, torch.FloatTensor), parts, 2)
        parts.write(struct.pack('<ii', tensor.ndim, 0))
        parts.write(struct.pack(f'<{2 * tensor.ndim}q', *tensor.shape, *tensor.stride()))
        parts.write(struct.pack('<q', 0))
    pickle.dump([], storages, 2)
    Pickler(whole, 2).dump(held)
    with tarfile.open(path, 'w') as archive:
        for name, file in (('storages', storages), ('tensors', parts), ('pickle', whole)):
            member = tarfile.TarInfo(name)
            member.size = len(file.getvalue())
            archive.addfile(member, io.BytesIO(file.getvalue()))


@pytest.mark.filterwarnings('ignore:TypedStorage is deprecated')
def test_files_from_before_pytorch_0_2_are_saved_again_by_the_command(tmp_path: Path):
    arrays = {key: value for key, value in weights().items() if value.ndim}
    old_tar(tmp_path / 'old.pth', arrays)
    with pytest.raises(PortError, match='a PyTorch file from before 0.2') as error:
        port.from_torch('resnet8', tmp_path / 'old.pth')
    command = re.search(r'python -c "(.*)"`', str(error.value))
    assert command
    done = subprocess.run([sys.executable, '-W', 'ignore', '-c', command[1]], cwd=tmp_path,
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, done.stderr
    right(tmp_path / 'weights.pth')


@pytest.mark.filterwarnings('ignore:.*quantize_per_tensor.*:UserWarning')
def test_quantised_weights_are_named(tmp_path: Path):
    whole = torch.quantize_per_tensor(torch.ones(4, 3, 3, 3), 0.1, 0, torch.qint8)
    torch.save({'conv1.weight': whole, 'conv1.bias': torch.zeros(4)}, tmp_path / 'static.pth')
    torch.save({'fc._packed_params._packed_params': (whole, None), 'fc.scale': torch.ones(())},
               tmp_path / 'dynamic.pth')  # fmt: skip
    for name in ('static.pth', 'dynamic.pth'):
        with pytest.raises(PortError, match='a quantised network, whose weights are integers'):
            port.from_torch('resnet8', tmp_path / name)


def test_an_optimisers_state_is_named(tmp_path: Path):
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([parameter], 0.1, momentum=0.9)
    parameter.sum().backward()
    optimizer.step()
    for content in (optimizer.state_dict(), {'optimizer': optimizer.state_dict(), 'epoch': 3}):
        torch.save(content, tmp_path / 'optimizer.pt')
        with pytest.raises(PortError, match="holds an optimiser's state alone"):
            port.from_torch('resnet8', tmp_path / 'optimizer.pt')
    torch.save(tensors(weights()), tmp_path / 'model.pt')
    right(tmp_path)  # of both, the weights are meant


def test_one_tensor_is_named(tmp_path: Path):
    torch.save(torch.zeros(1, 1, 28, 28), tmp_path / 'image.pt')
    with pytest.raises(PortError, match='holds a Tensor, not names and arrays'):
        port.from_torch('resnet8', tmp_path / 'image.pt')


def test_another_classifier_is_told():
    with pytest.raises(PortError, match="of 'resnet8' with num_classes=7, channels=3.$"):
        port.from_torch('resnet8', weights('resnet8', 0, 7))
    backbone = {key: value for key, value in weights().items() if not key.startswith('fc.')}
    with pytest.raises(PortError, match='missing .*a backbone without its classifier'):
        port.from_torch('resnet8', {'state_dict': backbone})
    two = {'fc.0.weight': np.ones((32, 64)), 'fc.2.weight': np.ones((10, 32))}
    with pytest.raises(PortError, match=r'Its last layers, fc.0.weight, fc.2.weight, are others'):
        port.from_torch('resnet8', backbone | two)


def test_another_network_is_told_in_few_words():
    """Blocks with a `conv1` of their own, as all networks have them: none of it is counted."""
    block = {key: value for key, value in weights().items() if 'layer' not in key}
    source = {f'features.{i}.{key}': value for i in range(9) for key, value in block.items()}
    with pytest.raises(PortError) as error:
        port.from_torch('resnet8', source)
    message = str(error.value)
    assert 'arrays fit' not in message
    assert 'channels=3' in message
    assert re.search(r'unexpected \(\d+\): ([^,]+, ){2}[^,]+ and \d+ more', message)
    assert 'torch.onnx.export(model.eval()' in message


def test_zip_archives_of_other_things(tmp_path: Path):
    for inside, message in (('images/1.png', 'a zip archive of images/1.png: unpack it first'),
                            ('model.weights.h5', 'a Keras model'),
                            ('models/model.json', 'teacher.model=exported')):  # fmt: skip
        with zipfile.ZipFile(tmp_path / 'x.pt', 'w') as archive:
            archive.writestr(inside, b'x')
        with pytest.raises(PortError, match=message):
            port.from_torch('resnet8', tmp_path / 'x.pt')


def test_whole_modules_are_refused_with_the_command_that_saves_their_weights(tmp_path: Path):
    for content, keys in ((Net(), ''), ({'net': Net(), 'acc': 1.0}, r"\['net'\]")):
        for zipped in (True, False):
            torch.save(content, tmp_path / 't.pth', _use_new_zipfile_serialization=zipped)
            command = rf"torch.load\('.*t.pth', weights_only=False\){keys}.state_dict\(\)"
            with pytest.raises(PortError, match=f'a whole pickled model.*{command}'):
                port.from_torch('resnet8', tmp_path / 't.pth')


@pytest.mark.filterwarnings('ignore:.*torch.jit:DeprecationWarning')
def test_torchscript_is_refused_with_the_command_that_saves_its_weights(tmp_path: Path):
    torch.jit.trace(Net(), torch.zeros(1, 3, 8, 8)).save(str(tmp_path / 'teacher.pt'))
    with pytest.raises(PortError, match=r"TorchScript archive.*torch.jit.load\('.*teacher.pt'\)"):
        port.from_torch('resnet8', tmp_path / 'teacher.pt')


def test_errors_are_one_short_line():
    source = dict(weights('resnet110'))
    del source['fc.bias']
    with pytest.raises(PortError) as error:
        port.from_torch('resnet110', source)
    total = len([k for k in weights('resnet110') if 'num_batches' not in k])
    assert f'{total - 1} of {total} arrays fit, all but these: missing (1): fc.bias' in str(
        error.value
    )
    with pytest.raises(PortError) as error:
        port.from_torch('resnet110', weights('lenet5'))
    assert '\n' not in str(error.value)
    assert len(str(error.value)) < 1000
    assert re.search(r'missing \(\d+\): .* and \d+ more', str(error.value))


def test_training_reads_pytorch_files_without_pytorch(tmp_path: Path):
    torch.save({'net': tensors(weights())}, tmp_path / 't.pth')
    script = f"""
import sys
sys.modules['torch'] = None
from dfkd_jax import port
port.from_torch('resnet8', {str(tmp_path / 't.pth')!r})
"""
    subprocess.run([sys.executable, '-c', script], cwd=ROOT, check=True)


def test_published_files_of_two_ages(shared: Path):
    """A zip file by PyTorch 1.6 or later and the row of pickles of the years before."""
    for name, model in (('cifar10_resnet20.th', 'resnet20_option_a'),
                        ('cifar10_resnet56.th', 'resnet56_option_a'),
                        ('fashion_mnist_wrn16_1.pth', 'wrn16_1')):  # fmt: skip
        path = shared / 'teachers' / name
        content = torch.load(path, map_location='cpu', weights_only=False)['state_dict']
        expected = port.from_torch(model, {k: v.numpy() for k, v in content.items()})
        identical(port.from_torch(model, path), expected)


def test_numbers_of_bytes_that_are_not_there(tmp_path: Path):
    """A file cut short inside its tensors, in the old format."""
    file = io.BytesIO()
    torch.save({'net': tensors(weights())}, file, _use_new_zipfile_serialization=False)
    (tmp_path / 't.pth').write_bytes(file.getvalue()[:-100])
    with pytest.raises(PortError, match='damaged, cut short'):
        port.from_torch('resnet8', tmp_path / 't.pth')
