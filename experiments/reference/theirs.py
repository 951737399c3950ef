"""Starts the authors' program of NAYER or CPSC-DFKD on what `run.py` prepared.

    python experiments/reference/theirs.py FOLDER

Everything of theirs stays in their folder and is imported from there as it is.  What is changed, in
this process alone:

* networks: teacher and student are plain PyTorch ones with the weights of ours, so that any pair
  runs; the generator has the width and the image size of the config;
* data: the test set is ours, and so is the normalisation;
* label embeddings (NAYER): ours;
* arguments: the lists of choices are dropped (NAYER's lacks its own name);
* packages that only log or draw (wandb, xlsxwriter, pandas, seaborn) may be missing;
* without a GPU, `.cuda()` stays where it is.

Accuracies, steps and seconds of each epoch go to ``FOLDER/rows.csv``.
"""

from __future__ import annotations

import argparse
import csv
import importlib
import importlib.machinery
import importlib.util
import json
import os
import pickle
import sys
import time
import types
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / 'bench'))
import plain_torch

LOGGING = {'nayer': ('wandb', 'xlsxwriter', 'pandas', 'seaborn'), 'cpsc': ()}
NEEDED = {'nayer': ('torchvision', 'kornia', 'termcolor'),
          'cpsc': ('torchvision', 'warmup_scheduler', 'matplotlib')}  # fmt: skip


class Network(nn.Module):
    """A plain classifier that answers as NAYER's and as CPSC-DFKD's networks do."""

    def __init__(self, inner: nn.Module, width: int):
        super().__init__()
        self.inner = inner
        self.fc = types.SimpleNamespace(in_features=width)  # read by CPSC-DFKD's adapter

    def forward(self, x: Tensor, return_features: bool = False, out_feature: bool = False) -> Any:
        logits, features = self.inner(x)
        if out_feature:
            return F.normalize(features, dim=1), logits
        return (logits, features) if return_features else logits


class Record:
    """Rows of accuracy by epoch, with the steps that optimisers have taken and the seconds."""

    def __init__(self, path: Path):
        self.path, self.started = path, time.monotonic()
        self.rows: list[dict[str, float]] = []
        self.steps = {'SGD': 0, 'Adam': 0}
        register_optimizer_step_post_hook(self.count)

    def count(self, optimiser: Any, *_: Any) -> None:
        self.steps[type(optimiser).__name__] += 1

    def add(self, accuracy: float) -> None:
        self.rows.append({
            'epoch': len(self.rows) + 1, 'accuracy': round(accuracy, 4),
            'student_steps': self.steps['SGD'], 'generator_steps': self.steps['Adam'],
            'seconds': round(time.monotonic() - self.started, 2),
        })  # fmt: skip
        with open(self.path, 'w', newline='') as file:
            writer = csv.DictWriter(file, list(self.rows[0]), lineterminator='\n')
            writer.writeheader()
            writer.writerows(self.rows)


def main() -> None:
    place = Path(sys.argv[1]).resolve()
    task = json.loads((place / 'task.json').read_text())
    missing = [name for name in NEEDED[task['method']] if importlib.util.find_spec(name) is None]
    if missing:
        sys.exit(f'error: the authors\' code needs {", ".join(missing)}: pip install '
                 f'{" ".join(missing).replace("_", "-")}')  # fmt: skip
    os.chdir(place)  # their program writes beside itself
    sys.path.insert(0, task['folder'])
    for name in LOGGING[task['method']]:
        if importlib.util.find_spec(name) is None:
            sys.modules[name] = silent(name)
    if not torch.cuda.is_available():
        nn.Module.cuda = Tensor.cuda = lambda self, *_, **__: self
    without_choices()
    sys.argv = [task['program'], *task['arguments']]
    {'nayer': nayer, 'cpsc': cpsc}[task['method']](task, Record(place / 'rows.csv'))


def silent(name: str) -> types.ModuleType:
    """A package whose every function does nothing."""

    def anything(attribute: str) -> Any:
        if attribute.startswith('__'):  # asked of any module, by `inspect` say
            raise AttributeError(attribute)
        return lambda *_, **__: None

    module = types.ModuleType(name)
    module.__spec__ = importlib.machinery.ModuleSpec(name, None)
    module.__getattr__ = anything  # type: ignore[method-assign]
    return module


def without_choices() -> None:
    """Arguments take any value; NAYER's number of the GPU, the name of a device."""
    add = argparse.ArgumentParser.add_argument

    def patched(self: Any, *names: str, **options: Any) -> Any:
        options.pop('choices', None)
        if '--gpu' in names and not torch.cuda.is_available():
            options |= {'type': str, 'default': 'cpu'}
        return add(self, *names, **options)

    argparse.ArgumentParser.add_argument = patched  # type: ignore[method-assign, assignment]


def network(task: dict[str, Any], which: str) -> Network:
    """The teacher or the student, with its first weights."""
    inner = plain_torch.classifier(task[which], task['classes'], 3)
    arrays = safetensors.numpy.load_file(f'{which}.safetensors')
    inner.load_state_dict({name: torch.from_numpy(array) for name, array in arrays.items()})
    width = inner(torch.zeros(2, 3, task['size'], task['size']))[1].shape[1]
    inner.load_state_dict({name: torch.from_numpy(array) for name, array in arrays.items()})
    return Network(inner, width)


def test_set(task: dict[str, Any]) -> torch.utils.data.TensorDataset:
    """Our test images, normalised, and their labels."""
    arrays = np.load('test.npz')
    mean, std = (np.float32(task[name]) for name in ('mean', 'std'))
    images = (arrays['images'].astype(np.float32) / 255 - mean) / std
    return torch.utils.data.TensorDataset(
        torch.from_numpy(images.transpose(0, 3, 1, 2).copy()),
        torch.from_numpy(arrays['labels'].astype(np.int64)),
    )


def nayer(task: dict[str, Any], record: Record) -> None:
    """NAYER's program: ``datafree_kd.py``."""
    import datafree
    import registry
    from torchvision import transforms

    norm = {'mean': tuple(task['mean']), 'std': tuple(task['std'])}
    registry.NORMALIZE_DICT['cifar10'] = norm
    Path('checkpoints/pretrained').mkdir(parents=True, exist_ok=True)
    Path('label_embedding').mkdir(exist_ok=True)
    torch.save({'state_dict': network(task, 'teacher').state_dict()},
               'checkpoints/pretrained/cifar10_teacher.pth')  # fmt: skip
    with open('label_embedding/cifar10_le.pickle', 'wb') as file:
        pickle.dump(torch.from_numpy(np.load('labels.npy')), file)
    size, test = task['size'], test_set(task)
    augment = transforms.Compose([  # of the student's images, as theirs is for CIFAR-10
        transforms.RandomCrop(size, padding=4), transforms.RandomHorizontalFlip(),
        transforms.ToTensor(), transforms.Normalize(**norm),
    ])  # fmt: skip
    own = types.SimpleNamespace(transform=augment)
    registry.get_dataset = lambda **_: (task['classes'], own, test)
    registry.get_model = lambda name, **_: network(task, name)

    generator = datafree.models.generator.NLGenerator
    begin = generator.__init__

    def sized(
        self: Any, ngf: int = 0, img_size: int = 0, nc: int = 3, nl: int = 0, label_emb: Any = None,
        le_emb_size: int = 0, le_size: int = 0, sbz: int = 0,
    ) -> None:  # fmt: skip
        table = label_emb.shape[1]
        begin(self, task['width'], size, nc, nl, label_emb, le_emb_size, table, sbz)

    generator.__init__ = sized
    synthesis = datafree.synthesis.NAYER
    datafree.synthesis.NAYER = lambda *args, **options: synthesis(
        *args, **options | {'img_size': (3, size, size)}
    )
    evaluator = datafree.evaluators.classification_evaluator

    def recording(loader: Any) -> Any:
        evaluate = evaluator(loader)

        def call(model: Any, device: Any = None) -> Any:
            found = evaluate(model, device=device)
            record.add(float(found['Acc'][0]))
            return found

        return call

    datafree.evaluators.classification_evaluator = recording
    importlib.import_module('datafree_kd').main()


def cpsc(task: dict[str, Any], record: Record) -> None:
    """CPSC-DFKD's program: ``CPSC_DFKD.py``."""
    program = importlib.import_module('CPSC_DFKD')
    teacher, student = network(task, 'teacher'), network(task, 'student')
    torch.save(teacher.state_dict(), 'teacher.pt')
    program.network.resnet.resnet34 = lambda **_: teacher
    sys.argv += ['--teacher=resnet34', '--student=resnet18']
    program.network.resnet.resnet18 = lambda **_: student
    if teacher.fc.in_features != student.fc.in_features:  # then theirs puts an adapter behind it
        sys.argv[-1] = '--student=wrn_16_1'
        program.network.wresnet.wrn_16_1 = lambda **_: student

    generator = program.network.gan.GeneratorD
    begin = generator.__init__

    def sized(self: Any, nz: int, nc: int, img_size: int, num_classes: int) -> None:
        del img_size, num_classes
        begin(self, nz=nz, ngf=task['width'], nc=nc, img_size=task['size'],
              num_classes=task['classes'])  # fmt: skip

    generator.__init__ = sized
    loader = torch.utils.data.DataLoader(test_set(task), batch_size=500)
    program.get_dataloader = lambda args: (None, loader)
    evaluate = program.test

    def recording(*args: Any) -> float:
        accuracy = evaluate(*args)
        record.add(100 * accuracy)
        return accuracy

    program.test = recording
    program.main()


if __name__ == '__main__':
    main()
