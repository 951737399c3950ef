"""What a teacher says of banks of synthetic images: the rows of the guidance table.

    python experiments/banks.py --output=DIR NAME=RUN [NAME=RUN ...]

RUN is a finished run of DiffDFKD (`configs/...:diffdfkd`); NAME is what its row is called.  As many
images of each class are taken of every bank as the smallest has.  Measured with the teacher of the
run: the probability of the class asked for, the share of images taken for it, the classes of which
most images are (coverage), the distance of batch statistics of mixed batches of 256 (so that many
images are needed, of the teacher's size), and the
distance between features of two images of a class, in units of that between any two real test
images (diversity).  The output folder gets ``rows.csv``, ``table.md`` and a picture of each bank.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict
from table import save

from dfkd_jax import build, data, disk_bank, losses, report
from dfkd_jax.methods import diffdfkd

BATCH = 256


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--output', type=Path, required=True)
    parser.add_argument('runs', nargs='+', metavar='NAME=RUN')
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    runs = {name: Path(run) for name, _, run in (each.partition('=') for each in args.runs)}
    banks = {name: images_of(run) for name, run in runs.items()}
    per_class = min(int(np.bincount(label).min()) for _, _, label in banks.values())
    results = []
    for name, (config, image, label) in banks.items():
        chosen = np.concatenate(
            [np.flatnonzero(label == each)[:per_class] for each in np.unique(label)]
        )
        image, label = image[chosen], label[chosen]
        results.append({'row': name, 'images': len(label)} | judge(config, image, label))
        facts = data.check(config.data)
        grid = args.output / f'{name.replace(" ", "_")}.png'
        report.image_grid(image / 255, label, facts.class_names, grid, title=name)
    names = list(results[0])[1:]
    lines = [f'| | {" | ".join(names)} |', '|---' * (1 + len(names)) + '|']
    for result in results:
        cells = [f'{result[name]:.3g}' if name != 'images' else str(result[name]) for name in names]
        lines.append(f'| {result["row"]} | {" | ".join(cells)} |')
    save(args.output, results, lines)
    print('\n'.join(lines))


def images_of(run: Path) -> tuple[Any, np.ndarray, np.ndarray]:
    """The config of a finished run, and the images and labels of its bank."""
    summary = json.loads((run / 'summary.json').read_text())
    config = ConfigDict(summary['config'])
    if config.teacher.checkpoint is None:
        config.teacher.checkpoint = str(run / 'teacher')
    total = diffdfkd.trajectories(config)
    arrays = [disk_bank.read(Path(summary['bank']), number) for number in range(total)]
    return config, *(np.concatenate([each[key] for each in arrays]) for key in ('image', 'label'))


def judge(config: Any, image: np.ndarray, label: np.ndarray) -> dict[str, float]:
    """What the teacher of a config measures of images [N, S, S, channels] uint8 and labels [N]."""
    facts = data.check(config.data)
    module = build.make_classifier(config, config.teacher.model)
    variables = build.load_network(config.teacher.checkpoint, config.teacher.model, config)
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
    within = np.mean([spread(features[wanted == each]) for each in np.unique(label)])
    return {
        'confidence': float(probability.mean()),
        'hit': float(hit.mean()),
        'coverage': float(np.mean(coverage)),
        'statistics': float(np.mean(distance)),
        'diversity': float(within / spread(real)),
    }


def spread(features: np.ndarray) -> float:
    """The mean distance between two rows."""
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, len(features), (2, 4000))
    return float(np.linalg.norm(features[a] - features[b], axis=1)[a != b].mean())


if __name__ == '__main__':
    main()
