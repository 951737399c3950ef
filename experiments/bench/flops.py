"""FLOPs of every method's steps beside the least that the method needs: counted, never run.

    python experiments/bench/flops.py [--pair=wrn40_2/wrn16_1] [--output=experiments/bench/flops.md]

A pass is one network forward for one image.  The least of a step counts the passes that its losses
need: forward 1, and 1 each for the gradients of the input and of the weights.  XLA counts a step's
FLOPs from its program before optimisation, so nothing has to compile.  What is over the least is
augmentation, the losses themselves, batch norms' statistics and the optimiser.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import jax
import jax.numpy as jnp
import numpy as np
import ours

from dfkd_jax import build, contract
from dfkd_jax.configs import cifar10
from dfkd_jax.contract import Frozen
from dfkd_jax.data import loading
from dfkd_jax.distributed import sharding
from dfkd_jax.methods import METHODS
from dfkd_jax.models import layers

LATENT = 256  # inputs of a generator without label embeddings


class Passes(NamedTuple):
    """Of each network, for one image of a step."""

    generator: float
    teacher: float
    student: float


# An image that a generator makes for the student's step costs it one pass; images of a bank, none.
FRESH, STORED = Passes(1, 1, 3), Passes(0, 1, 3)
ADVERSARIAL = Passes(3, 2, 2)  # image gradients of teacher and student, after the warm-up
LEAST = {
    'cae': (ADVERSARIAL, STORED),
    'cmi': (Passes(3, 4, 2), STORED),  # and the teacher of an augmented view, with its gradient
    'cpsc': (ADVERSARIAL, FRESH),
    'dafl': (Passes(3, 2, 0), FRESH),
    'deepinversion': (Passes(0, 2, 2), STORED),
    'dfad': (ADVERSARIAL, FRESH),
    'dfq': (ADVERSARIAL, FRESH),
    'fast': (ADVERSARIAL, STORED),
    'nayer': (ADVERSARIAL, STORED),
    'noise': (None, STORED),
    # Its student's step compares gradients at several stages of both networks (mSARC): not stated.
    'spaceshipnet': (Passes(3, 2, 0), None),
    'zskt': (ADVERSARIAL, FRESH),
}  # fmt: skip


def flops(fn: Callable[..., Any], *args: Any) -> float:
    return jax.jit(fn).lower(*args).cost_analysis()['flops']


def measure(name: str, teacher: str, student: str) -> list[tuple[str, int, float, float | None]]:
    """Step, batch, GFLOP an image, and the least of it (None: not stated)."""
    config = cifar10.get_config(name)
    config.teacher.model, config.student.model = teacher, student
    table = None
    if 'labels' in config:
        table = np.zeros((config.data.num_classes, 384), np.float32)
    models = build.make_models(config, loading.check(config.data), None, table)
    method = METHODS[name](config, models, sharding.Shards())
    batch = config.synthesis.batch_size
    key = jax.random.key(0)
    image = jax.ShapeDtypeStruct((batch, *models.image_shape), jnp.float32)
    variables = jax.eval_shape(lambda x: models.teacher.init(key, x), image)
    frozen = Frozen({'batch_stats': {}} | dict(variables), () if table is None else table)
    state = jax.eval_shape(method.init, frozen, key)
    one = {
        'teacher': flops(lambda v, x: models.teacher.apply(v, x).logits, variables, image) / batch,
        'student': flops(lambda v, x: models.student.apply(v, x).logits, state.student.variables,
                         image) / batch,
        'generator': generator_flops(models, batch, table),
    }  # fmt: skip
    rows = []
    for step, need in zip(('generator_step', 'student_step'), LEAST[name], strict=True):
        fn = getattr(method, step)
        if fn is contract.unchanged:
            continue
        size = batch
        if step == 'student_step':
            size = config.synthesis.get('student_batch_size', batch)
        least = None
        if need is not None:
            least = sum(number * one[net] for net, number in need._asdict().items()) / 1e9
        rows.append((step, size, flops(fn, frozen, state, key) / size / 1e9, least))
    return rows


def generator_flops(models: Any, batch: int, table: np.ndarray | None) -> float:
    """Of one image; 0 without a generator."""
    if models.generator is None:
        return 0.0
    inputs = [jax.ShapeDtypeStruct((batch, LATENT), jnp.float32)]
    if models.generator.conditioning == 'label':
        inputs.append(jax.ShapeDtypeStruct((batch,), jnp.int32))
    if table is not None:
        inputs = [jax.ShapeDtypeStruct((batch, table.shape[1]), jnp.float32)]

    def make(variables: Any, *inputs: Any) -> Any:
        return models.generator.apply(variables, *inputs, train=True, mutable=['batch_stats'])

    variables = jax.eval_shape(
        lambda *inputs: models.generator.init(jax.random.key(0), *inputs), *inputs
    )
    return flops(make, variables, *inputs) / batch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--pair', default='wrn40_2/wrn16_1', help='TEACHER/STUDENT')
    parser.add_argument('--output', type=Path, default=Path(__file__).with_suffix('.md'))
    args = parser.parse_args()
    jax.config.update('jax_platforms', 'cpu')
    layers.PART = 2**62  # one part: XLA counts the body of a loop once
    rows = []
    for name in METHODS:
        if name in LEAST:
            for step, batch, found, least in measure(name, *args.pair.split('/')):
                row = [name, step.replace('_', ' '), batch, f'{found:.3f}']
                row += ['', ''] if least is None else [f'{least:.3f}', f'{found / least:.2f}']
                rows.append(row)
                print(*row, flush=True)
    head = ['', 'step', 'batch', 'GFLOP an image', 'the least', 'times the least']
    text = f'# FLOPs of a step, {args.pair.replace("/", " -> ")}, 32 px\n\n'
    text += '`python experiments/bench/flops.py`, counted by XLA, the warm-up over.\n\n'
    args.output.write_text(text + ours.table(head, rows) + '\n')


if __name__ == '__main__':
    main()
