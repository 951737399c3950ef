"""Ranks finished runs without real data: agreement with the teacher on synthetic images.

    python experiments/rank.py --references RUN [RUN ...] --candidates RUN [RUN ...]

The references' generators make the images, the same for every candidate.  A candidate's score is
the share of images on which its student predicts the teacher's class.  All runs must share one
teacher and have a checkpoint; the last one is read.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dfkd_jax import build
from dfkd_jax.contract import Frozen
from dfkd_jax.storage.checkpoints import Checkpoints

BATCHES = 8  # of each reference


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--references', nargs='+', type=Path, required=True)
    parser.add_argument('--candidates', nargs='+', type=Path, required=True)
    args = parser.parse_args()

    images = []
    for workdir in args.references:
        run, frozen, state = load(workdir)
        sample = jax.jit(run.whole.sample)
        images += [sample(frozen, state, jax.random.key(i)).image for i in range(BATCHES)]
    teacher = jax.jit(run.models.teacher.apply)
    wanted = np.concatenate([np.argmax(teacher(frozen.teacher, x).logits, -1) for x in images])
    shares = np.bincount(wanted, minlength=run.models.num_classes) / len(wanted)
    print(f'{len(wanted)} images; the teacher sees classes in shares {np.round(shares, 3)}')
    for workdir in args.candidates:
        run, _, state = load(workdir)
        student = jax.jit(run.models.student.apply)
        said = [np.argmax(student(state.student.variables, x).logits, -1) for x in images]
        print(f'{workdir}: {100 * np.mean(np.concatenate(said) == wanted):.2f} %', flush=True)


def load(workdir: Path) -> tuple[build.Run, Frozen, Any]:
    """A run's parts, its teacher, and its last state."""
    config = ConfigDict(json.loads((workdir / 'config.json').read_text()))
    config.phases = tuple(ConfigDict(phase) for phase in config.phases)
    run = build.build(config)
    path = config.teacher.checkpoint or workdir / 'teacher'
    frozen = Frozen(build.load_network(path, config.teacher.model, config.data), run.extra)
    with Checkpoints(workdir / 'checkpoints') as checkpoints:
        restored = checkpoints.restore(jax.eval_shape(run.whole.init, frozen, jax.random.key(0)))
    if restored is None:
        raise SystemExit(f'error: {workdir} holds no checkpoint')
    return run, frozen, restored.state


if __name__ == '__main__':
    main()
