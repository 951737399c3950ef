"""Measures banks of synthetic images with the teacher, and what students learn from them.

    python experiments/banks.py --output=DIR NAME=RUN[,RUN...] [NAME=RUN[,RUN...] ...]

RUNs are finished runs of DiffDFKD (`configs/...:diffdfkd`).  The first made the bank; the others
took it (`--config.synthesis.bank`) for students of other seeds.  NAME labels their row.  Every bank
contributes as many images of each class as the smallest has.  The run's teacher measures

    confidence  the probability of the class asked for
    hit         the share of images taken for that class
    coverage    the share of classes of which most images are hits
    statistics  the distance of batch statistics, for mixed batches of 256 (so many images are
                needed, of the teacher's size)
    diversity   the distance between features of two images of a class, in units of that between any
                two real test images

The output folder gets ``rows.csv`` (a line for each student, with its bank's measures),
``table.md`` and a picture of each bank.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict
from table import save, spread

from dfkd_jax import build, data, losses
from dfkd_jax.data import synthetic
from dfkd_jax.methods.shared import trajectories
from dfkd_jax.reporting import pictures

BATCH = 256


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--output', type=Path, required=True)
    parser.add_argument('runs', nargs='+', metavar='NAME=RUN[,RUN...]')
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    runs = {}
    for each in args.runs:
        name, _, paths = each.partition('=')
        runs[name] = [Path(path) for path in paths.split(',')]
    banks = {name: images_of(first) for name, (first, *_) in runs.items()}
    per_class = min(int(np.bincount(label).min()) for _, _, label in banks.values())
    results, lines = [], []
    for name, (config, image, label) in banks.items():
        chosen = np.concatenate(
            [np.flatnonzero(label == each)[:per_class] for each in np.unique(label)]
        )
        image, label = image[chosen], label[chosen]
        measured = judge(config, image, label)
        students = [student(path) for path in runs[name]]
        results += [{'row': name} | each | {'images': len(label)} | measured for each in students]
        grid = args.output / f'{name.replace(" ", "_")}.png'
        pictures.image_grid(
            image / 255, label, data.check(config.data).class_names, grid, title=name
        )
        cells = [str(len(label)), *(f'{value:.3g}' for value in measured.values())]
        cells.append(spread([each['last'] for each in students]))
        cells.append(f'{students[0]["seconds_synthesis"]:.0f}')
        lines.append(f'| {name} | {" | ".join(cells)} |')
    names = ['', 'images', *measured, 'student, last, %', 'seconds of synthesis']
    lines = [f'| {" | ".join(names)} |', '|---' * len(names) + '|', *lines]
    save(args.output, results, lines)
    print('\n'.join(lines))


def student(run: Path) -> dict[str, Any]:
    """The results of a finished run, and where it ran."""
    summary = json.loads((run / 'summary.json').read_text())
    versions = ' '.join(f'{package} {version}' for package, version in summary['versions'].items())
    return {
        'seed': summary['seed'],
        'last': summary['student_accuracy_last'],
        'best': summary['student_accuracy_best'],
        'agreement': summary['agreement_with_teacher'],
        'seconds_synthesis': summary['seconds_synthesis'],
        'seconds_distillation': summary['seconds_distillation'],
        'run': run,
        'device': summary['device'],
        'versions': versions,
    }


def images_of(run: Path) -> tuple[Any, np.ndarray, np.ndarray]:
    """The config of a finished run, and the images and labels of its bank."""
    summary = json.loads((run / 'summary.json').read_text())
    config = ConfigDict(summary['config'])
    if config.teacher.checkpoint is None:
        config.teacher.checkpoint = str(run / 'teacher')
    total = trajectories.count(config.synthesis, config.data.num_classes)
    arrays = [synthetic.read(Path(summary['bank']), number) for number in range(total)]
    return config, *(np.concatenate([each[key] for each in arrays]) for key in ('image', 'label'))


def judge(config: Any, image: np.ndarray, label: np.ndarray) -> dict[str, float]:
    """The teacher's measures of images [N, S, S, channels] uint8 made for labels [N]."""
    facts = data.check(config.data)
    module = build.make_classifier(config.teacher.model, config.data, config.dtype)
    variables = build.load_network(config.teacher.checkpoint, config.teacher.model, config.data)
    apply = jax.jit(lambda x: module.apply(variables, data.normalise(x, facts.mean, facts.std)))
    order = np.random.default_rng(0).permutation(len(label))
    order = order[: len(order) - len(order) % BATCH]
    outs = [apply(image[order[i : i + BATCH]]) for i in range(0, len(order), BATCH)]
    running = variables['batch_stats']
    distance = [float(losses.bn_statistics(out.statistics, running)) for out in outs]
    logits, features = (
        np.concatenate([np.asarray(getattr(out, name)) for out in outs])
        for name in ('logits', 'features')
    )
    wanted = label[order]
    probability = np.asarray(jax.nn.softmax(logits))[np.arange(len(wanted)), wanted]
    hit = logits.argmax(1) == wanted
    coverage = [hit[wanted == each].mean() > 0.5 for each in np.unique(label)]
    test = data.load(config.data, 'test').fetch(np.arange(1024))[0]
    real = np.concatenate([apply(test[i : i + BATCH]).features for i in range(0, 1024, BATCH)])
    within = np.mean([apart(features[wanted == each]) for each in np.unique(label)])
    return {
        'confidence': float(probability.mean()),
        'hit': float(hit.mean()),
        'coverage': float(np.mean(coverage)),
        'statistics': float(np.mean(distance)),
        'diversity': float(within / apart(real)),
    }


def apart(features: np.ndarray) -> float:
    """The mean distance between two rows."""
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, len(features), (2, 4000))
    return float(np.linalg.norm(features[a] - features[b], axis=1)[a != b].mean())


if __name__ == '__main__':
    main()
