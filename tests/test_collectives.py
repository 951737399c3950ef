"""What crosses between devices, read from the compiled programs: few sums and gathers."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
import tiny

from dfkd_jax.distributed import sharding
from dfkd_jax.models import layers

pytestmark = pytest.mark.usefixtures('fast_compilation')
BYTES = {'f32': 4, 's32': 4, 'u32': 4, 'u8': 1, 'pred': 1, 'bf16': 2}


class Program(NamedTuple):
    flops: float  # of one device
    sums: list[int]  # elements of each all-reduce
    gathers: list[int]  # elements of the result of each all-gather
    text: str


def program(name: str, step: str, devices: int, **changes: Any) -> Program:
    """A step of a method as one device of so many runs it."""
    config = tiny.config(name, **changes)
    plan = sharding.make('shard_map', jax.devices()[:devices], fused=False)
    method, whole = tiny.method(config, plan.shards), tiny.method(config, sharding.Shards())
    frozen = plan.replicate(tiny.frozen(method=name))
    key = jax.random.key(0)
    state = jax.eval_shape(whole.init, frozen, key)
    compiled = plan.compile(getattr(method, step)).lower(frozen, state, key).compile()
    text = compiled.as_text()
    sums, gathers = sizes('all-reduce', text), sizes('all-gather', text)
    return Program(compiled.cost_analysis()['flops'], sums, gathers, text)


def sizes(operation: str, text: str) -> list[int]:
    """The elements of the result of every such operation of a program."""
    found = []
    for line in text.splitlines():
        match = re.search(rf'= (.*?) {operation}(?:-start)?\(', line)
        if match:
            shapes = re.findall(r'\b\w+\[([\d,]*)\]', match[1])
            found.append(sum(int(np.prod([int(n) for n in s.split(',') if n])) for s in shapes))
    return found


def parameters(name: str, net: str) -> int:
    method = tiny.method(tiny.config(name), sharding.Shards())
    state = jax.eval_shape(method.init, tiny.frozen(method=name), jax.random.key(0))
    return sum(x.size for x in jax.tree.leaves(getattr(state, net).params))


STEPS = [
    ('noise', 'student_step', 'student'),
    ('cpsc', 'generator_step', 'generator'),
    ('cpsc', 'student_step', 'student'),
    ('dafl', 'generator_step', 'generator'),
    ('nayer', 'student_step', 'student'),
]


@pytest.mark.parametrize(('name', 'step', 'net'), tiny.quick(STEPS, STEPS[3], STEPS[4]))
def test_gradients_cross_in_one_sum_with_the_loss(name: str, step: str, net: str) -> None:
    found = program(name, step, 4)
    number = parameters(name, net)
    carrying = [size for size in found.sums if size >= number]
    assert len(carrying) == 1
    assert 1 <= carrying[0] - number <= 16, 'the loss and, where XLA joins the two, the metrics'
    # The rest: of each batch norm two moments, and their gradients; for the
    # contrast of CPSC the features of the batch's views.  Nothing has the size of an image batch.
    rest = sum(found.sums) - carrying[0] + sum(found.gathers)
    assert rest < tiny.BATCH * tiny.SIZE**2, (found.sums, found.gathers)
    assert bool(found.gathers) == (name == 'cpsc')
    for other in ('all-to-all', 'collective-permute', 'reduce-scatter'):
        assert f' {other}(' not in found.text and f' {other}-start(' not in found.text


@pytest.mark.slow
def test_work_falls_with_the_number_of_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    """But for what all do alike: the draws of the whole batch, and the optimiser's update."""
    # Products of patches count for as much as XLA computes twice in them.
    monkeypatch.setattr(layers, 'convolve_small', layers.convolve_parts)
    size = {'synthesis__batch_size': 64, 'synthesis__student_batch_size': 64}
    one, two, four = (program('dafl', 'student_step', n, **size).flops for n in (1, 2, 4))
    alike = (4 * four - one) / 3  # if flops are shared / n + alike
    assert alike < 0.05 * one
    assert two == pytest.approx((one - alike) / 2 + alike, rel=0.01)


def test_a_bank_gathers_the_images_of_a_batch() -> None:
    """NAYER's devices all have the whole bank: each image of a batch crosses once."""
    found = program('nayer', 'generator_step', 4)
    assert found.gathers == [tiny.BATCH * tiny.SIZE**2 * tiny.CHANNELS]
    rest = sum(found.sums) - parameters('nayer', 'generator')
    assert 0 < rest < 300, found.sums
