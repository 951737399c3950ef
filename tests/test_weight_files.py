"""Weights as people have them, under any key, prefix and ending; or one line that mends it."""

from __future__ import annotations

import argparse
import io
import json
import pickle
import re
import subprocess
import sys
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
    'keras.h5': (b'\x89HDF\r\n\x1a\n' + bytes(64), 'an HDF5 file'),
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
