"""Mistakes of a user, and files that are not what they claim: each kind once, with what is said.

    PYTHONPATH=. python tests/mistakes.py [WORD ...]

makes the folder of every case, does what the user did, through the entry that a user has, and
writes what is said to ``experiments/bad_input.md``; with words, only cases that have one of them
or are new.  `test_errors.py` holds every line of it.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import os
import pickle
import struct
import sys
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import numpy as np
import safetensors.numpy

from dfkd_jax import build, cli, diffusion, loops, port, transfer_dense
from dfkd_jax.configs import digits
from dfkd_jax.data import __main__ as data_command
from dfkd_jax.data import synthetic
from dfkd_jax.distributed import processes
from dfkd_jax.errors import UserError
from dfkd_jax.loops import supervised
from dfkd_jax.port import __main__ as port_command
from dfkd_jax.storage import model_folder, safe_read, workdir
from dfkd_jax.transfer import __main__ as transfer_command

TABLE = Path(__file__).resolve().parents[1] / 'experiments' / 'bad_input.md'
Folder = Path
Act = Callable[[Folder], Any]


def config(of: str = 'cpsc', /, **changes: Any) -> Any:
    """The digits run with fields changed, as `group__field=value`."""
    result = digits.get_config(f'{of},smoke')
    for name, value in changes.items():
        *groups, field = name.split('__')
        target = result
        for group in groups:
            target = target[int(group)] if group.isdecimal() else target[group]
        target[field] = value
    return result


def run(of: str = 'cpsc', /, **changes: Any) -> Act:
    """The run with fields changed; a value that starts with DIR is a path in the case's folder."""

    def act(folder: Folder) -> Any:
        here = {
            name: str(folder) + value[3:] if str(value).startswith('DIR') else value
            for name, value in changes.items()
        }
        return loops.run(config(of, **here), folder / 'run')

    return act


def after(make: Callable[[Folder], Any], act: Act) -> Act:
    """What was done in a folder that was made first."""

    def both(folder: Folder) -> Any:
        make(folder)
        return act(folder)

    return both


# 1. Files


def write(name: str, content: bytes | str) -> Callable[[Folder], Any]:
    """A file of this content."""

    def make(folder: Folder) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())

    return make


def arrays(name: str, **values: Any) -> Callable[[Folder], Any]:
    """A .npy, .npz or .safetensors file."""

    def make(folder: Folder) -> None:
        if name.endswith('.npy'):
            np.save(folder / name, values['x'])
        elif name.endswith('.npz'):
            np.savez(folder / name, **values)
        else:
            safetensors.numpy.save_file(values, folder / name)

    return make


def header(declared: dict[str, Any], data: bytes = b'', length: int | None = None) -> bytes:
    """A safetensors file with this header."""
    text = json.dumps(declared).encode()
    return struct.pack('<Q', len(text) if length is None else length) + text + data


def bomb(name: str, member: str = 'fc.weight.npy') -> Callable[[Folder], Any]:
    """An archive of some 300 kB that would unpack to 300 MB."""

    def make(folder: Folder) -> None:
        with zipfile.ZipFile(folder / name, 'w', zipfile.ZIP_DEFLATED) as archive:
            for i in range(3):
                archive.writestr(f'{i}{member}', bytes(10**8))

    return make


class Hostile:
    """Unpickling it would create the file `executed`."""

    def __init__(self, folder: Folder):
        self.command = f'touch {folder / "executed"}'

    def __reduce__(self) -> Any:
        return os.system, (self.command,)


def hostile_pickle(folder: Folder) -> None:
    """A plain pickle under PyTorch's name, as files before PyTorch 1.6 are."""
    (folder / 'weights.pth').write_bytes(pickle.dumps(Hostile(folder), 2))


def hostile_checkpoint(folder: Folder) -> None:
    """A checkpoint of PyTorch with something beside its weights."""
    import torch

    torch.save({'state_dict': {}, 'args': Hostile(folder)}, folder / 'weights.pth')


def hostile_cifar(folder: Folder) -> None:
    """CIFAR-10's python version, with a command in place of its meta data."""
    (folder / 'cifar').mkdir()
    for name in [f'data_batch_{i}' for i in range(1, 6)] + ['test_batch', 'batches.meta']:
        (folder / 'cifar' / name).write_bytes(pickle.dumps(Hostile(folder), 2))


def claims(folder: Folder) -> None:
    """A tensor of one number that claims to be a trillion."""
    import torch

    whole = lenet()
    whole = {name: torch.from_numpy(x) for name, x in whole.items()}
    whole['fc.0.weight'] = torch.zeros(1).expand(10**6, 10**6)
    torch.save(whole, folder / 'weights.pth')


def sparse(folder: Folder) -> None:
    import torch

    whole = {name: torch.from_numpy(x) for name, x in lenet().items()}
    first = next(name for name, x in whole.items() if x.ndim == 2)
    whole[first] = whole[first].to_sparse()
    torch.save(whole, folder / 'weights.pth')


def outside(folder: Folder) -> None:
    """An archive with a member that would unpack beside the folder."""
    with zipfile.ZipFile(folder / 'weights.npz', 'w') as archive:
        file = io.BytesIO()
        np.save(file, np.zeros(3, np.float32))
        archive.writestr('../../outside.npy', file.getvalue())


def tape(folder: Folder) -> None:
    """An archive in PyTorch's first format, with a member that would unpack beside the folder."""
    with tarfile.open(folder / 'weights.tar', 'w') as archive:
        for name in ('storages', 'tensors', 'pickle', '../../outside'):
            member = tarfile.TarInfo(name)
            member.size = 3
            archive.addfile(member, io.BytesIO(b'abc'))


def lenet() -> dict[str, np.ndarray]:
    """A state dict of lenet5."""
    return port.to_torch('lenet5', teacher_variables('lenet5', 32, 3))


def teacher_variables(name: str = 'resnet8', size: int = 16, channels: int = 1) -> Any:
    settings = config(data__image_size=size, data__channels=channels)
    module = build.make_classifier(name, settings.data, settings.dtype)
    image = jax.ShapeDtypeStruct((1, size, size, channels), np.float32)
    shapes = jax.eval_shape(lambda x: module.init(jax.random.key(0), x), image)
    return jax.tree.map(lambda x: np.ones(x.shape, np.float32), shapes)


def teacher(change: Callable[[Any], None] = lambda variables: None) -> Callable[[Folder], Any]:
    """A model folder DIR/teacher of resnet8, changed."""

    def make(folder: Folder) -> None:
        variables = teacher_variables()
        change(variables)
        model_folder.save_classifier(folder / 'teacher', 'resnet8', variables, config().data)

    return make


def facts(**changes: Any) -> Callable[[Folder], Any]:
    """The model folder DIR/teacher with other facts; None: without them."""

    def make(folder: Folder) -> None:
        teacher()(folder)
        path = folder / 'teacher' / model_folder.CARD
        found = json.loads(path.read_text()) | changes
        path.write_text(json.dumps({k: v for k, v in found.items() if v is not None}))

    return make


def prior(**changes: Any) -> Callable[[Folder], Any]:
    """The folder DIR/prior of a diffusion model that ships, its configuration changed."""

    def make(folder: Folder) -> None:
        shipped = diffusion.prior.SHIPPED / 'strokes16'
        (folder / 'prior').mkdir()
        for path in shipped.iterdir():
            (folder / 'prior' / path.name).write_bytes(path.read_bytes())
        found = json.loads((shipped / 'config.json').read_text()) | changes
        (folder / 'prior' / 'config.json').write_text(json.dumps(found))

    return make


def png(width: int, height: int) -> bytes:
    """A picture that claims this size and holds nothing."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        sum_ = zlib.crc32(kind + content)
        return struct.pack('>I', len(content)) + kind + content + struct.pack('>I', sum_)

    size = struct.pack('>IIBBBBB', width, height, 8, 0, 0, 0, 0)
    packed = zlib.compress(b'')
    start = b'\x89PNG\r\n\x1a\n'
    return start + chunk(b'IHDR', size) + chunk(b'IDAT', packed) + chunk(b'IEND', b'')


def pictures(image: bytes) -> Callable[[Folder], Any]:
    """Folders of two classes, two images each, one of which is this."""

    def make(folder: Folder) -> None:
        from PIL import Image

        for name in ('ant/0', 'ant/1', 'bee/0', 'bee/1'):
            path = folder / 'pictures' / f'{name}.png'
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.full((8, 8), 9, np.uint8)).save(path)
        path.write_bytes(image)

    return make


def data_set(features: Any = None, cut: bool = False) -> Callable[[Folder], Any]:
    """The data set DIR/data/mine of four images, with other features or a file cut short."""

    def make(folder: Folder) -> None:
        from PIL import Image

        file = io.BytesIO()
        Image.fromarray(np.full((8, 8), 9, np.uint8)).save(file, 'png')
        pictures(file.getvalue())(folder)
        with contextlib.redirect_stderr(io.StringIO()):
            place = data_command.prepare.prepare('mine', folder / 'data', folder / 'pictures')
        if features is not None:
            (place / 'features.json').write_text(json.dumps(features))
        if cut:
            for path in place.glob('*array_record*'):
                path.write_bytes(path.read_bytes()[:20])

    return make


MINE = dict(data__name='mine', data__data_dir='DIR/data', data__num_classes=2, data__mean=(0.5,),
            data__std=(0.5,))  # fmt: skip


def started(**changes: Any) -> Callable[[Folder], Any]:
    """The workdir DIR/run of another run."""

    def make(folder: Folder) -> None:
        with workdir.claim(folder / 'run', config(**changes)):
            (folder / 'run' / 'checkpoints').mkdir()

    return make


def bank(**changes: Any) -> Callable[[Folder], Any]:
    """A bank DIR/bank of one batch, of another run where facts are changed."""

    def make(folder: Folder) -> None:
        from dfkd_jax.loops import offline

        synthetic.describe(folder / 'bank', offline.description(config('diffdfkd')) | changes)
        image = np.zeros((2, 16, 16, 1), np.uint8)
        synthetic.write(folder / 'bank', 0, image, np.zeros(2, int), 0, {})

    return make


# 2. Commands


def porting(*arguments: str, model: str = 'lenet5', source: str = 'weights.pth') -> Act:
    """`python -m dfkd_jax.port`."""

    def act(folder: Folder) -> Any:
        paths = [f'--source={folder / source}', f'--output={folder / "out"}']
        return port_command.main([f'--model={model}', *paths, *arguments])

    return act


def command(main: Callable[[list[str]], Any], *arguments: str) -> Act:
    return lambda folder: main([each.replace('DIR', str(folder)) for each in arguments])


def shell(*arguments: str) -> Act:
    """`python -m dfkd_jax.main`, its flags read anew."""

    def act(folder: Folder) -> Any:
        given = [each.replace('DIR', str(folder)) for each in arguments]
        argv = ['dfkd_jax.main', f'--workdir={folder / "run"}', *given]
        with mock.patch.object(sys, 'argv', argv):
            cli.launch(loops.run)

    return act


def join(**fields: Any) -> Act:
    """A process of several, whose `config.distributed` has these fields."""

    def act(folder: Folder) -> Any:
        settings = digits.get_config().distributed
        settings.update(fields)
        return processes.join(settings)

    return act


def of_two(act: Act) -> Act:
    """The same as one of two processes."""

    def as_one(folder: Folder) -> Any:
        with mock.patch.object(jax, 'process_count', lambda: 2):
            return act(folder)

    return as_one


def preparing(*arguments: str) -> Act:
    return command(data_command.main, 'prepare', *arguments)


NESTED = '[' * 100_000 + ']' * 100_000
DEEP = '{"a":' * 100_000 + '1' + '}' * 100_000
KIND = {'_class_name': 'UNet2DModel'}

CASES: dict[str, dict[str, Act]] = {
    'the command line': {
        'no config': shell(),
        'a config that is not there': shell('--config=digitz'),
        'a config file that is not there': shell('--config=DIR/mine.py'),
        'a config file that fails': after(
            write('mine.py', 'def get_config():\n    return one\n'), shell('--config=DIR/mine.py')
        ),
        'a config file that gives none': after(write('mine.py', ''), shell('--config=DIR/mine.py')),
        'neither a method nor a flag': shell('--config=digits:cpsk'),
        'two methods': shell('--config=digits:cpsc,nayer'),
        'a flag of another method': shell('--config=digits:nayer,as_published'),
        'a flag of a prior': shell('--config=prior_strokes:smok'),
        'a misspelt field': shell('--config=digits', '--config.student.lrr=1'),
        'a word for a number': shell('--config=digits', '--config.student.lr=fast'),
        'a fraction for a count': shell('--config=digits', '--config.seed=0.5'),
        'an unknown flag': shell('--config=digits', '--wrkdir=here'),
        'a stray word': shell('--config=digits', 'stray'),
    },
    'fields of the config': {
        'an unknown method': run(method='cpsk'),
        'an unknown teacher': run(teacher__model='resnet9'),
        'an unknown student': run(student__model='wrn16'),
        'an unknown generator': run(generator__model='cpsc_gen'),
        'a classifier for a generator': run(generator__model='resnet8'),
        'an image size that is none': run(data__image_size=0),
        'images too small for the network': run(teacher__model='lenet5'),
        'an unknown way to use devices': run(parallel='pmapp'),
        'an unknown precision': run(dtype='float16'),
        'a batch that devices cannot share': run(synthesis__batch_size=18, synthesis__bank=36),
        'a batch of nothing': run(synthesis__student_batch_size=0),
        'a student batch that devices cannot share': run(synthesis__student_batch_size=6),
        'a bank of no whole batches': run(synthesis__bank=40),
        'a bank of unbounded images': run(generator__bounded=False),
        'an unknown form of a loss': run(loss__ikd_form='l1'),
        'an unknown schedule': run(student__schedule='step'),
        'a cadence of zero': run(eval_every_rounds=0),
        'no checkpoint kept': run(keep_checkpoints=0),
        'a negative seed': run(seed=-1),
        'a negative number of steps': run(phases__0__s_steps=-2),
        'a phase without rounds': run(phases__0__rounds=0),
        'a teacher neither given nor trained': run(teacher__train=False),
        'distilling on real data, without a teacher': lambda folder: supervised.run(
            config(), folder / 'run', 'kd'
        ),
        'a batch of real images that devices cannot share': lambda folder: supervised.run(
            config(teach__batch_size=30), folder / 'run'
        ),
        'a batch of no real images': lambda folder: supervised.run(
            config(teach__batch_size=0), folder / 'run'
        ),
        'mixing images of a training by labels': run('kd', teach__cutmix=0.5),
    },
    'data': {
        'an unknown data set': run(data__name='digitz', data__data_dir='DIR'),
        'a data set that is not there': run(
            data__name='cifar10', data__data_dir='DIR', data__channels=3
        ),
        'another number of classes': run(data__num_classes=9),
        'an impossible number of channels': run(data__channels=2),
        'an unknown way to resize': run(data__resize='resise'),
        'two constants for one channel': run(data__mean=(0.5, 0.5)),
        'a deviation of zero': run(data__std=(0.0,)),
        'neither images nor a normalisation': run(data__name='', teacher__train=False),
        'images to train a teacher on, of none': run(
            data__name='', data__mean=(0.5,), data__std=(0.5,)
        ),
        'a data set cut short': after(data_set(cut=True), run(**MINE)),
        'a description that names code': after(
            data_set({'pythonClassName': 'antigravity.Feature'}), run(**MINE)
        ),
        'a description that is no JSON': after(
            after(data_set(), lambda folder: write('data/mine/1.0.0/features.json', '{')(folder)),
            run(**MINE),
        ),
        'a name that no folder can have': preparing('My set', '--data_dir=DIR', '--source=DIR'),
        'a source that is not there': preparing('mine', '--data_dir=DIR/d', '--source=DIR/nowhere'),
        'a source without images': preparing('mine', '--data_dir=DIR/d', '--source=DIR'),
        'a file that is no image': after(
            pictures(b'no image'), preparing('mine', '--data_dir=DIR/d', '--source=DIR/pictures')
        ),
        'an image cut short': after(
            pictures(png(8, 8)), preparing('mine', '--data_dir=DIR/d', '--source=DIR/pictures')
        ),
        'an image of billions of pixels': after(
            pictures(png(100_000, 100_000)),
            preparing('mine', '--data_dir=DIR/d', '--source=DIR/pictures'),
        ),
        'a class without an image': after(
            pictures(png(8, 8)),
            after(
                lambda folder: (folder / 'pictures' / 'cow').mkdir(),
                preparing('mine', '--data_dir=DIR/d', '--source=DIR/pictures'),
            ),
        ),
        'a folder beside train that is no split': after(
            after(write('src/train/ant/a.png', ''), write('src/more/ant/a.png', '')),
            preparing('mine', '--data_dir=DIR/d', '--source=DIR/src'),
        ),
        'a pickle of CIFAR that runs a command': after(
            hostile_cifar, preparing('cifar10', '--data_dir=DIR/d', '--source=DIR/cifar')
        ),
        'the other CIFAR': after(
            after(write('cifar/test', ''), write('cifar/meta', '')),
            preparing('cifar10', '--data_dir=DIR/d', '--source=DIR/cifar'),
        ),
        'packed images that do not unpack': after(
            write('idx/train-images-idx3-ubyte.gz', gzip.compress(bytes(100))[:-9]),
            preparing('fashion_mnist', '--data_dir=DIR/d', '--source=DIR/idx'),
        ),
    },
    'class names and embeddings': {
        'an unknown source': run('nayer', labels__source='word2vec'),
        'an unknown kind of text': run('nayer', labels__text='numbers'),
        'a prompt without a place for the name': run('cae', labels__prompt='a photo'),
        'a prompt that nothing ships for': run('cae', labels__prompt='a drawing of {}'),
        'a table that is not there': run('nayer', labels__path='DIR/table.npy'),
        'CLIP without a folder': run('nayer', labels__source='clip'),
        'an encoder that is not there': run(
            'nayer', labels__source='minilm', labels__path='DIR/encoder'
        ),
        'a table of another number of classes': after(
            arrays('table.npy', x=np.ones((9, 4))), run('cae', labels__path='DIR/table.npy')
        ),
        'a table with a number that is none': after(
            arrays('table.npy', x=np.full((10, 4), np.nan)),
            run('cae', labels__path='DIR/table.npy'),
        ),
        'a table of text': after(
            arrays('table.npy', x=np.array([['a']] * 10)), run('cae', labels__path='DIR/table.npy')
        ),
        'a table of objects': after(
            lambda folder: np.save(folder / 'table.npy', np.array([[Hostile(folder)]] * 10)),
            run('cae', labels__path='DIR/table.npy'),
        ),
        'a table that is a zip bomb': after(
            bomb('table.npz'), run('cae', labels__path='DIR/table.npz')
        ),
        'a table of several arrays': after(
            arrays('table.npz', a=np.eye(10), b=np.eye(10)),
            run('cae', labels__path='DIR/table.npz'),
        ),
    },
    'weights of a teacher': {
        'a file that is not there': run(teacher__checkpoint='DIR/teacher.pth'),
        'a folder that is no model': run(teacher__checkpoint='DIR'),
        'a file of no known format': after(
            write('weights.h5', b''), porting(source='weights.h5')
        ),
        'a file that is no weights': after(
            write('teacher.safetensors', 'none'), run(teacher__checkpoint='DIR/teacher.safetensors')
        ),
        'a pickle that runs a command': after(hostile_pickle, porting()),
        'a command beside the weights': after(hostile_checkpoint, porting()),
        'objects for arrays': after(
            lambda folder: np.savez(folder / 'w.npz', x=np.array([Hostile(folder)], object)),
            porting(source='w.npz'),
        ),
        'a zip bomb of PyTorch': after(bomb('weights.pth', 'archive/data.pkl'), porting()),
        'a zip bomb of NumPy': after(bomb('w.npz'), porting(source='w.npz')),
        'a member that lies outside': after(outside, porting(source='weights.npz')),
        'an archive of the first PyTorch': after(tape, porting(source='weights.tar')),
        'a tensor that claims a trillion numbers': after(claims, porting()),
        'a sparse tensor': after(sparse, porting()),
        'a header longer than the file': after(
            write('w.safetensors', header({}, length=2**62)), porting(source='w.safetensors')
        ),
        'a header of an array larger than the file': after(
            write('w.safetensors', header({'x': {
                'dtype': 'F32', 'shape': [10**6, 10**6], 'data_offsets': [0, 4 * 10**12]}})),
            porting(source='w.safetensors'),
        ),
        'arrays that overlap': after(
            write('w.safetensors', header({name: {
                'dtype': 'F32', 'shape': [1], 'data_offsets': [0, 4]} for name in 'ab'}, bytes(4))),
            porting(source='w.safetensors'),
        ),
        'weights of another network': after(
            lambda folder: safetensors.numpy.save_file(lenet(), folder / 'w.safetensors'),
            porting(model='lenet5_half', source='w.safetensors'),
        ),
        'weights with a number that is none': after(
            lambda folder: safetensors.numpy.save_file(
                lenet() | {'fc.2.bias': np.full(10, np.nan, np.float32)}, folder / 'w.safetensors'
            ),
            porting(source='w.safetensors'),
        ),
        'an unknown model': porting(model='lenet'),
        'a size that is no number': porting('--size=latent=many'),
        'a model folder of another network': after(
            teacher(), run(teacher__checkpoint='DIR/teacher', teacher__model='resnet20')
        ),
        'a model folder of other classes': after(
            facts(num_classes=100), run(teacher__checkpoint='DIR/teacher')
        ),
        'a model folder with other weights than it says': after(
            facts(variables_sha256='0'), run(teacher__checkpoint='DIR/teacher')
        ),
        'a model folder that lacks a fact': after(
            facts(model=None), run(teacher__checkpoint='DIR/teacher')
        ),
        'a model folder of a truncated JSON': after(
            after(teacher(), write('teacher/model.json', '{"model": ')),
            run(teacher__checkpoint='DIR/teacher'),
        ),
        'a model folder of a nested JSON': after(
            after(teacher(), write('teacher/model.json', DEEP)),
            run(teacher__checkpoint='DIR/teacher'),
        ),
        'a model folder that lacks an array': after(
            teacher(lambda variables: variables['params'].pop('fc')),
            run(teacher__checkpoint='DIR/teacher'),
        ),
        'a model folder of infinite weights': after(
            teacher(lambda variables: variables['params']['fc']['bias'].fill(np.inf)),
            run(teacher__checkpoint='DIR/teacher'),
        ),
    },
    'diffusion models': {
        'none named': run('diffdfkd', prior__path=None),
        'a folder that is not there': run('diffdfkd', prior__path='DIR/nowhere'),
        'an empty folder': run('diffdfkd', prior__path='DIR'),
        'an unknown precision': run('diffdfkd', prior__dtype='float16'),
        'too few steps': run('diffdfkd', prior__steps=1),
        'more steps than the model has': run('diffdfkd', prior__steps=2000),
        'an unknown source of images': run('diffdfkd', synthesis__source='guided!'),
        'images stored at another size': run('diffdfkd', synthesis__stored_size=5),
        'no images of a class': run('diffdfkd', synthesis__per_class=0),
        'a configuration nested without end': after(
            after(prior(), write('prior/config.json', DEEP)),
            run('diffdfkd', prior__path='DIR/prior'),
        ),
        'a configuration that is a list': after(
            after(prior(), write('prior/config.json', '[]')),
            run('diffdfkd', prior__path='DIR/prior'),
        ),
        'a layer of billions of channels': after(
            prior(block_out_channels=[2**40, 2**40]), run('diffdfkd', prior__path='DIR/prior')
        ),
        'a million layers': after(
            prior(layers_per_block=10**6), run('diffdfkd', prior__path='DIR/prior')
        ),
        'another architecture': after(
            prior(_class_name='PriorTransformer'), run('diffdfkd', prior__path='DIR/prior')
        ),
        'weights of another architecture': after(
            prior(layers_per_block=3), run('diffdfkd', prior__path='DIR/prior')
        ),
        'weights that are a pickle': after(
            after(prior(), lambda folder: (
                folder / 'prior' / 'diffusion_pytorch_model.safetensors'
            ).rename(folder / 'prior' / 'diffusion_pytorch_model.bin')),
            run('diffdfkd', prior__path='DIR/prior'),
        ),
        'a header longer than the weights': after(
            after(prior(), write('prior/diffusion_pytorch_model.safetensors',
                                 header({}, length=2**62))),
            run('diffdfkd', prior__path='DIR/prior'),
        ),
    },
    'workdirs': {
        'a folder of something else': after(
            write('run/thesis.tex', 'years of work'), run()
        ),
        'a file': after(write('run', ''), run()),
        'another config': after(started(student__lr=0.3), run()),
        'a config that cannot be read': after(
            after(started(), write('run/config.json', '{')), run()
        ),
        'a summary that cannot be read': after(
            after(started(), write('run/summary.json', NESTED)), run()
        ),
    },
    'several processes': {
        'fields missing': join(coordinator='HOST0:9876'),
        'an address without a port': join(coordinator='HOST0', num_processes=2, process_id=0),
        'a port that is none': join(coordinator='HOST0:99999', num_processes=2, process_id=0),
        'a process_id too large': join(coordinator='HOST0:9876', num_processes=2, process_id=2),
        'fields beside auto': join(auto=True, num_processes=2),
        'no time to join': join(join_seconds=0.0),
        'process 0 that is not there': join(
            coordinator='127.0.0.1:1', num_processes=2, process_id=1, join_seconds=0.2
        ),
        'one device for all': of_two(run(parallel='jit')),
    },
    'transfer': {
        'an unknown protocol': command(
            transfer_command.main, '--student=DIR', '--dataset=digits', '--protocol=prob'
        ),
        'a folder that is no run': command(
            transfer_command.main, '--student=DIR', '--dataset=digits', '--protocol=probe'
        ),
        'an unknown data set': after(teacher(), command(
            transfer_command.main, '--student=DIR/teacher', '--dataset=digitz', '--protocol=probe',
            '--data_dir=DIR',
        )),
        'no epochs': after(teacher(), command(
            transfer_command.main, '--student=DIR/teacher', '--dataset=digits',
            '--protocol=finetune', '--epochs=0',
        )),
        'a batch larger than the data set': after(teacher(), command(
            transfer_command.main, '--student=DIR/teacher', '--dataset=digits',
            '--protocol=finetune', '--batch_size=2000',
        )),
        'an output that is there': after(write('out.json', ''), command(
            transfer_command.main, '--student=DIR', '--dataset=digits', '--protocol=probe',
            '--output=DIR/out.json',
        )),
        'a rate that is no number': command(
            transfer_command.main, '--student=DIR', '--dataset=digits', '--protocol=probe',
            '--lr=fast',
        ),
        'scenes that are not there': after(teacher(), command(
            transfer_dense.main, '--student=DIR/teacher', '--scenes=DIR/nowhere'
        )),
    },
}  # fmt: skip


def said(act: Act, folder: Folder) -> str:
    """The message, in which the case's folder is DIR and what other libraries say is `...`.

    Raises AssertionError where there was none.
    """
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed):
            act(folder)
    except UserError as error:
        text, cause = f'error: {error}', error.__cause__
    except SystemExit as end:
        lines = printed.getvalue().strip().splitlines()
        text = end.code if isinstance(end.code, str) else '\n'.join(lines)
        cause = end.__context__
    else:
        raise AssertionError('nothing was said')
    if not text.startswith('error: '):
        text = text[text.index('error: ') :]
    while cause is not None and not isinstance(cause, safe_read.Refused):
        for foreign in (str(cause), str(cause).strip().split('\n')[0]):
            if foreign and f'({foreign})' in text and foreign not in ('None',):
                text = text.replace(f'({foreign})', '(...)')
        cause = cause.__cause__ or cause.__context__
    assert not (folder / 'executed').exists(), 'a file was executed'
    package = str(Path(build.__file__).parent)
    return ' '.join(text.replace(str(folder), 'DIR').replace(package, 'dfkd_jax').split())


def rows() -> dict[tuple[str, str], str]:
    """What the table says, by kind and mistake."""
    lines = [line for line in TABLE.read_text().splitlines() if line.startswith('| ')]
    cells = [line.strip('| ').split(' | ', 2) for line in lines]
    return {(kind, wrong): text for kind, wrong, text in cells if kind != 'in'}


def cell(text: str) -> str:
    """The beginning of a message, which may list hundreds of arrays, as a cell of a table."""
    return (text if len(text) <= 400 else f'{text[:400]} ...').replace('|', '/')


TITLE = """# Bad input

Every kind of mistake that is known, and what is said about it: before anything is compiled, without
a traceback, with a status that is not zero. DIR is the user's folder, and (...) what another
library says. `PYTHONPATH=. python tests/mistakes.py` writes this page, of which
`tests/test_errors.py` holds every line.

| in | what was wrong | what is said |
|---|---|---|"""


def main() -> None:
    jax.config.update('jax_platforms', 'cpu')
    jax.config.update('jax_num_cpu_devices', 4)  # as the tests' conftest.py has it
    words, lines = sys.argv[1:], [TITLE]
    before = rows() if words else {}
    for kind, cases in CASES.items():
        for wrong, act in cases.items():
            text = before.get((kind, wrong))
            if text is None or any(word in wrong for word in words):
                with tempfile.TemporaryDirectory() as folder:
                    text = cell(said(act, Path(folder)))
                print(f'{kind}, {wrong}: {text}', flush=True)
            lines.append(f'| {kind} | {wrong} | {text} |')
    TABLE.write_text('\n'.join([*lines, '']))


if __name__ == '__main__':
    main()
