"""The driver of the authors' programs: what it asks of them, and how it starts one.

Their code is not here: a program of a few lines stands in for it.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import reference

from dfkd_jax import models, port
from dfkd_jax.errors import ConfigError

FOLDER = Path(__file__).resolve().parents[1] / 'experiments' / 'reference'


@pytest.fixture(scope='module')
def run() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(FOLDER)
        yield importlib.import_module('run')
    sys.modules.pop('run', None)


def settings(run: Any, config: str, *changes: str) -> Any:
    args = argparse.Namespace(config=config, set=list(changes), teacher='t.th', data_dir=None)
    return run.make_config(args)


def given(arguments: list[str]) -> dict[str, str]:
    return dict(argument.removeprefix('--').partition('=')[::2] for argument in arguments)


def test_nayers_arguments_are_those_of_its_script(run: Any) -> None:
    """What the authors' nayer_100.sh gives for CIFAR-10."""
    told = given(run.translate(settings(run, 'cifar10:nayer,resnet56-resnet20')))
    script = {
        'batch_size': 512, 'synthesis_batch_size': 400, 'lr': 0.2, 'warmup': 20, 'epochs': 120,
        'lr_g': 4e-3, 'adv': 1.33, 'bn': 10.0, 'oh': 0.5, 'g_steps': 30, 'g_life': 10, 'g_loops': 2,
        'gwp_loops': 10, 'T': 20, 'kd_steps': 400, 'wd': 1e-4, 'eta_min': 2e-4, 'le_emb_size': 1000,
        'bn_mmt': 0.9,
    }  # fmt: skip
    assert {name: float(told[name]) for name in script} == script


def test_cpscs_arguments_are_those_of_its_readme(run: Any) -> None:
    told = given(run.translate(settings(run, 'cifar100:cpsc,as_published')))
    assert told['dataset'] == 'cifar100'
    page = {
        'epochs': 600, 'batch_size': 512, 'G_steps': 6, 'S_steps': 5, 'co_alpha': 5, 'co_beta': 1,
        'co_gamma': 0.7, 'co_eta': 0.7, 'nz': 256, 'epoch_itrs': 50, 'num_classes': 100,
    }  # fmt: skip
    assert {name: float(told[name]) for name in page} == page
    assert {'loss_IKD', 'loss_BN', 'loss_SCL', 'loss_CE'} <= set(told)
    told = given(run.translate(settings(run, 'cifar10:cpsc,as_published', 'loss.scl=0.0')))
    assert told['dataset'] == 'cifar10'  # there the imitation term is a logarithm
    assert 'loss_SCL' not in told


def test_what_their_code_cannot_do_is_told(run: Any) -> None:
    with pytest.raises(ConfigError, match='--set=synthesis.shade=0.0 .*--set=data.channels=3'):
        settings(run, 'fashion_mnist:nayer')
    with pytest.raises(ConfigError, match='--set=generator.reset_adam=True'):
        settings(run, 'cifar10:cpsc')
    with pytest.raises(ConfigError, match='expected one of nayer and cpsc'):
        settings(run, 'cifar10:fast')
    with pytest.raises(ConfigError, match='studnet'):
        settings(run, 'cifar10:nayer', 'studnet.lr=0.1')
    life = settings(run, 'cifar10:nayer', 'generator.life=0')
    with pytest.raises(ConfigError, match='generator.life=10'):
        run.translate(life)
    odd = settings(run, 'cifar10:cpsc,as_published', 'phases[0].rounds=77')
    with pytest.raises(ConfigError, match='multiple of 50'):
        run.translate(odd)


def test_a_missing_clone_is_told(run: Any, tmp_path: Path) -> None:
    command = [sys.executable, str(FOLDER / 'run.py'), 'run', '--config=cifar10:nayer',
               '--teacher=t.th', f'--folder={tmp_path}', f'--output={tmp_path}']  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith(f'error: --folder={tmp_path} has no datafree_kd.py')


@pytest.mark.parametrize('name', ['resnet8_option_a', 'resnet8', 'resnet8_half'])
def test_networks_are_ours(name: str, rule: Any) -> None:
    """With the weights of ours, they answer as ours does."""
    torch = pytest.importorskip('torch', reason='the networks are PyTorch ones')
    from experiments.bench import plain_torch

    module = models.make(name, num_classes=10)
    image = np.random.default_rng(0).standard_normal((3, 16, 16, 3), np.float32)
    arrays = reference.weights(rule, name, image)
    variables = port.from_torch(name, arrays)
    inner = plain_torch.classifier(name, 10, 3)
    inner.load_state_dict({key: torch.tensor(value) for key, value in arrays.items()})
    wanted = jax.jit(module.apply)(variables, image)
    found = inner.eval()(torch.tensor(image.transpose(0, 3, 1, 2)))
    reference.near(wanted.logits, found[0].detach().numpy(), f'{name}, logits')
    reference.near(wanted.features, found[1].detach().numpy(), f'{name}, features')


PROGRAM = """
import argparse, network, torch

def get_dataloader(args):
    raise RuntimeError('not patched')

def test(args, student, generator, device, loader, epoch, log):
    right = sum((student(x).argmax(1) == y).sum().item() for x, y in loader)
    return right / len(loader.dataset)

def main():
    parser = argparse.ArgumentParser()
    for name in ('ckpt', 'seed', 'epochs', 'num_classes', 'nz'):
        parser.add_argument('--' + name)
    parser.add_argument('--teacher', choices=['resnet34'])
    parser.add_argument('--student', choices=['resnet18'])
    args, _ = parser.parse_known_args()
    teacher = network.resnet.resnet34(num_classes=10)
    teacher.load_state_dict(torch.load(args.ckpt))
    student = network.resnet.resnet18(num_classes=10).cuda()
    generator = network.gan.GeneratorD(nz=int(args.nz), nc=3, img_size=32, num_classes=10)
    _, loader = get_dataloader(args)
    sgd = torch.optim.SGD(student.parameters(), 0.1)
    adam = torch.optim.Adam(generator.parameters(), 0.1)
    for epoch in range(int(args.epochs)):
        image, _ = next(iter(loader))
        for i in range(3):
            feature, logits = student(image[:4], out_feature=True)
            assert torch.allclose(feature.norm(dim=1), torch.ones(4))
            logits.sum().backward()
            sgd.step()
            if i < 2:
                adam.step()
        test(args, student, generator, 'cpu', loader, epoch, None)
"""
NETWORKS = """
import types, torch

class GeneratorD(torch.nn.Module):
    def __init__(self, nz, ngf, nc, img_size, num_classes):
        super().__init__()
        assert (nz, ngf, img_size, num_classes) == (8, 4, 16, 10)
        self.fc = torch.nn.Linear(nz, ngf)

gan = types.SimpleNamespace(GeneratorD=GeneratorD)
resnet, wresnet = types.SimpleNamespace(), types.SimpleNamespace()
"""


@pytest.mark.slow
def test_a_program_is_started_with_our_networks_and_images(
    run: Any, rule: Any, tmp_path: Path
) -> None:
    """Its accuracies and steps are recorded, with choices and the GPU out of the way."""
    pytest.importorskip('torch', reason='the program is a PyTorch one')
    place, clone = tmp_path / 'theirs', tmp_path / 'clone'
    for folder in (place, clone):
        folder.mkdir()
    (clone / 'CPSC_DFKD.py').write_text(PROGRAM)
    (clone / 'network.py').write_text(NETWORKS)
    for name in ('torchvision', 'warmup_scheduler'):  # which stand-ins need not
        (clone / f'{name}.py').write_text('')
    arrays = reference.weights(rule, 'resnet8', np.zeros((1, 16, 16, 3), np.float32))
    for name in ('teacher', 'student'):
        run.files.save_arrays(place / f'{name}.safetensors', arrays)
    random = np.random.default_rng(0)
    np.savez(place / 'test.npz', labels=np.arange(20) % 10,
             images=random.integers(0, 256, (20, 16, 16, 3), dtype=np.uint8))  # fmt: skip
    task = {
        'method': 'cpsc', 'program': 'CPSC_DFKD.py', 'folder': str(clone), 'teacher': 'resnet8',
        'student': 'resnet8', 'classes': 10, 'size': 16, 'width': 4, 'mean': [0.5] * 3,
        'std': [0.25] * 3,
        'arguments': ['--ckpt=teacher.pt', '--seed=0', '--epochs=2', '--nz=8', '--co_alpha=1'],
    }  # fmt: skip
    (place / 'task.json').write_text(json.dumps(task))
    command = [sys.executable, str(FOLDER / 'theirs.py'), str(place)]
    path = os.pathsep.join([str(clone), os.environ.get('PYTHONPATH', '')])
    done = subprocess.run(command, capture_output=True, text=True,
                          env=os.environ | {'PYTHONPATH': path})  # fmt: skip
    assert done.returncode == 0, done.stderr
    head, *rows = (place / 'rows.csv').read_text().split()
    assert head == 'epoch,accuracy,student_steps,generator_steps,seconds'
    assert [row.split(',')[2:4] for row in rows] == [['3', '2'], ['6', '4']]
    assert all(0 <= float(row.split(',')[1]) <= 100 for row in rows)


def test_the_table_is_of_means(run: Any) -> None:
    row = {'side': 'theirs', 'student_steps': 1280, 'generator_steps': 64, 'seconds': 10.0}
    runs = [row | {'seed': i, 'last': 70.0 + i, 'best': 80.0} for i in (0, 2)]
    text = run.table([{'config': 'cifar10:nayer', 'set': ['a.b=1'], 'runs': runs}])
    assert text.splitlines()[2] == (
        '| `cifar10:nayer` a.b=1 | theirs | 71.00 ± 1.41 | 80.00 ± 0.00 | 0, 2 | 1,280 | 64 | 10 |'
    )
