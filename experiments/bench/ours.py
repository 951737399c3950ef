"""dfkd_jax's side of a benchmark: a method's compiled steps and rounds, and their timing."""

from __future__ import annotations

import functools
import math
import os
import platform
import re
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import flax
import jax
import jax.numpy as jnp
import numpy as np

from dfkd_jax import augment, build, native, port
from dfkd_jax.configs import common
from dfkd_jax.contract import Frozen, State, unchanged
from dfkd_jax.distributed import sharding
from dfkd_jax.loops import round
from dfkd_jax.methods import METHODS
from dfkd_jax.methods.shared import image_bank


class Program(NamedTuple):
    """A compiled function, the time of its compilation, and XLA's counts."""

    call: Callable
    seconds: float  # tracing and compiling
    gflop: float
    gbyte: float  # read and written, if no cache kept anything between operations
    megabytes: float  # arguments, results and temporaries; donated memory counts once


def compile_program(jitted: Any, *args: Any) -> Program:
    started = time.perf_counter()
    compiled = jitted.lower(*args).compile()
    seconds = time.perf_counter() - started
    cost, memory = compiled.cost_analysis() or {}, compiled.memory_analysis()
    held = (
        memory.argument_size_in_bytes + memory.output_size_in_bytes
        + memory.temp_size_in_bytes - memory.alias_size_in_bytes
    )  # fmt: skip
    gflop, gbyte = (cost.get(name, math.nan) / 1e9 for name in ('flops', 'bytes accessed'))
    return Program(compiled, seconds, gflop + winograd_gflop(compiled), gbyte, held / 1e6)


def winograd_gflop(compiled: Any) -> float:
    """What XLA does not count: the calls of `native`, as if they were plain convolutions."""
    total = 0.0
    for line in compiled.as_text().splitlines():
        if 'custom_call_target="dfkd_winograd' in line:
            shapes = [tuple(map(int, x.split(','))) for x in re.findall(r'f32\[([\d,]+)\]', line)]
            made, given, other = shapes
            kernel = made if 'dfkd_winograd_kernel' in line else other
            total += 2e-9 * math.prod(given[:3]) * math.prod(kernel)
    return total


class Steps:
    """dfkd_jax's method on `devices` devices, compiled as `dfkd_jax.loops.round.make_round` does.

    `stepwise` calls one compiled step at a time, as a round does on the CPU; `fused` scans over
    steps, as a round does elsewhere.
    """

    key = jax.random.key(3)

    def __init__(self, config: Any, devices: int = 1):
        self.config = config
        native.use(config.convolutions)
        self.plan = sharding.make(config.parallel, jax.devices()[:devices])
        self.facts = SimpleNamespace(
            mean=(0.5,) * config.data.channels, std=(0.25,) * config.data.channels,
            class_names=tuple(map(str, range(config.data.num_classes))), test_size=1,
        )  # fmt: skip
        # An embedding's content does not matter here: random ones have the size of a text's.
        self.table = None
        if 'labels' in config:
            shape = (config.data.num_classes, 384)
            self.table = np.random.default_rng(0).standard_normal(shape, np.float32)
        make = METHODS[config.method]
        self.models, sharded = (
            build.make_models(config, self.facts, axis, self.table)
            for axis in (None, self.plan.shards.axis)
        )
        whole = make(config, self.models, sharding.Shards())
        self.method = make(config, sharded, self.plan.shards)
        self.steps = {
            'generator': sharding.numbered(self.method.generator_step),
            'student': sharding.numbered(self.method.student_step),
        }
        self.teacher = self._teacher(jax.random.key(1))
        self.frozen = self.plan.replicate(
            Frozen(self.teacher, () if self.table is None else self.table)
        )
        self.state = self._fresh(whole)
        if self.method.begin is not unchanged:
            begin = self.plan.compile(sharding.numbered(self.method.begin))
            self.state, _ = begin(self.frozen, self.state, (self.key, np.int32(0)))
        self.programs = {
            kind: compile_program(
                self.plan.compile(step), self.frozen, self.state, (self.key, np.int32(0))
            )
            for kind, step in self.steps.items()
        }

    def _fresh(self, whole: Any) -> State:
        """A new state; a bank holds random images."""
        state = jax.jit(whole.init)(self.frozen, jax.random.key(2))
        if getattr(state.extra, 'bank', None) is not None:
            shape = state.extra.bank.image.shape
            image = jax.random.randint(jax.random.key(4), shape, 0, 256, jnp.uint8)
            full = state.extra.bank.replace(image=image, written=jnp.int32(len(image)))
            state = state.replace(extra=state.extra.replace(bank=full))
        return self.plan.replicate(state)

    def _teacher(self, key: Any) -> dict[str, Any]:
        """Random weights, with the moments of noise as batch statistics.

        So activations have the size of a trained teacher's, at any depth.
        """

        @jax.jit
        def init(key: Any) -> dict[str, Any]:
            noise = jax.random.normal(key, (64, *self.models.image_shape))
            variables = self.models.teacher.init(key, noise)
            out, _ = self.models.teacher.apply(
                variables, noise, train=True, mutable=['batch_stats']
            )
            return {'params': variables['params'], 'batch_stats': out.statistics}

        return init(key)

    @functools.cached_property
    def weights(self) -> dict[str, dict[str, np.ndarray]]:
        """The present weights with PyTorch's names and layouts; ask for them before any step."""
        config, state = self.config, jax.device_get(self.state)
        weights = {
            'teacher': port.to_torch(config.teacher.model, jax.device_get(self.teacher)),
            'student': port.to_torch(config.student.model, state.student.variables),
            'generator': port.to_torch(config.generator.model, state.generator.variables),
        }
        if getattr(state.extra, 'adapter', None):
            weights['adapter'] = {
                f'{index}.{name}': array.T
                for index, layer in ((0, 'hidden'), (2, 'out'))
                for name, array in (
                    ('weight', state.extra.adapter[layer]['kernel']),
                    ('bias', state.extra.adapter[layer]['bias']),
                )
            }
        return weights

    def draws(self, kind: str, index: int) -> tuple[np.ndarray | None, ...]:
        """The random draws of step `index`, as the method's own file makes them."""
        key = jax.random.fold_in(self.key, index)
        batch, classes = self.config.synthesis.batch_size, self.config.data.num_classes
        if self.config.method == 'cpsc':  # latents and classes
            if kind == 'student':
                key = jax.random.split(key, 3)[0]
            key_z, key_label = jax.random.split(key)
            z = jax.random.normal(key_z, (batch, self.config.generator.latent))
            draws = z, jax.random.randint(key_label, (batch,), 0, classes)
        else:  # crops and flips, and first rows of the bank
            padding, rows = self.config.synthesis.crop_padding, ()
            if kind == 'student':
                key_bank, key = jax.random.split(key, 4)[:2]
                rows = (image_bank.draw(self.state.extra.bank, key_bank, batch),)
            draws = (
                *rows,
                *augment.draw_crop_flip(key, batch, padding, self.config.synthesis.flip),
            )
        return jax.device_get(draws)

    def step(self, kind: str, index: int) -> dict[str, float]:
        """Takes one step; returns its metrics."""
        self.state, metrics = self.programs[kind].call(
            self.frozen, self.state, (self.key, np.int32(index))
        )
        return {name.partition('/')[2]: float(value) for name, value in metrics.items()}

    def stepwise(self, kind: str, times: int) -> Callable[[], None]:
        def block() -> None:
            out = sharding.repeat(
                self.programs[kind].call, self.frozen, self.state, self.key, times, fused=False
            )
            self.state, _ = jax.block_until_ready(out)

        return block

    def fused(self, kind: str, times: int) -> tuple[Callable[[], None], float]:
        """The same as one program, and the seconds of its compilation."""
        step = functools.partial(sharding.repeat, self.steps[kind], times=times, fused=True)
        program = compile_program(self.plan.compile(step), self.frozen, self.state, self.key)

        def block() -> None:
            self.state, _ = jax.block_until_ready(program.call(self.frozen, self.state, self.key))

        return block, program.seconds

    @functools.cached_property
    def whole_round(self) -> Callable:
        """A round, ``(frozen, state, key) -> (state, metrics)``."""
        return round.make_round(self.method, self.config.phases[0], self.plan)

    @functools.cached_property
    def other_round(self) -> Callable:
        """The same step by step where a run fuses its rounds, and fused where it does not."""
        plan = self.plan._replace(fused=not self.plan.fused)
        return round.make_round(self.method, self.config.phases[0], plan)

    def round(self, times: int, other: bool = False) -> Callable[[], None]:
        """`times` rounds as a run makes them, or the other way."""
        native.use(self.config.convolutions)
        call = self.other_round if other else self.whole_round

        def block() -> None:
            for i in range(times):
                self.state, _ = call(self.frozen, self.state, jax.random.fold_in(self.key, i))
            jax.block_until_ready(self.state)

        return block


def resize(config: Any, pair: str, batch: int, steps: str, rounds: int = 1) -> Any:
    """The config with other networks, batches and steps, in one phase.

    pair: TEACHER/STUDENT.
    batch: images in a step of either kind.
    steps: of the generator and of the student in a round, e.g. 2+3.
    """
    config.teacher.model, config.student.model = pair.split('/')
    config.synthesis.batch_size = config.synthesis.student_batch_size = batch
    g_steps, s_steps = map(int, steps.split('+'))
    config.phases = (common.phase(rounds=rounds, g_steps=g_steps, s_steps=s_steps),)
    return config


def time_block(block: Callable[[], None]) -> float:
    started = time.perf_counter()
    block()
    return time.perf_counter() - started


def interleave(
    blocks: dict[str, Callable[[], None]], seconds: float, least: int = 5
) -> dict[str, list[float]]:
    """Seconds of each block, turn by turn, until each has had `seconds` and `least` turns.

    The order reverses with every turn.  Every block has run before.
    """
    taken: dict[str, list[float]] = {name: [] for name in blocks}
    names = list(blocks)
    while min(map(sum, taken.values())) < seconds or len(taken[names[0]]) < least:
        for name in names:
            taken[name].append(time_block(blocks[name]))
        names.reverse()
    return taken


def median_and_spread(values: list[float]) -> dict[str, float]:
    """The median and the quartiles."""
    low, _, high = statistics.quantiles(values, n=4, method='inclusive')
    return {'median': statistics.median(values), 'low': low, 'high': high, 'count': len(values)}


# A 3x3 convolution large enough to run at full speed: batch, pixels on a side, channels in and out.
CEILING_CONV = (64, 32, 64)
SQUARE, LINE = 2048, 2**26  # side of the matrix product; numbers in the copy


def ceilings() -> dict[str, tuple[float, Callable[[], Any]]]:
    """The machine's best under XLA, by name: GFLOP of the work (for the copy: GB), and a call."""
    batch, side, channels = CEILING_CONV
    random = np.random.default_rng(0).standard_normal
    square = random((SQUARE, SQUARE), np.float32)
    image = random((batch, side, side, channels), np.float32)
    kernel = random((3, 3, channels, channels), np.float32)
    flat = np.ones(LINE, np.float32)

    def conv(x: Any, w: Any) -> Any:
        return jax.lax.conv_general_dilated(
            x, w, (1, 1), 'SAME', dimension_numbers=('NHWC', 'HWIO', 'NHWC')
        )

    def jitted(fn: Callable, *arrays: Any) -> Callable[[], Any]:
        arrays = tuple(map(jnp.asarray, arrays))
        compiled = jax.jit(fn).lower(*arrays).compile()
        return lambda: compiled(*arrays)

    # Fixed weights in the sum make the gradients full convolutions.
    def conv_sum(x: Any, w: Any, y: Any) -> Any:
        return jnp.vdot(conv(x, w), y)

    matmul, conv_work = 2e-9 * SQUARE**3, 2e-9 * batch * side**2 * 9 * channels**2
    half = jnp.asarray(square, jnp.bfloat16)
    return {
        'matrix product': (matmul, jitted(jnp.matmul, square, square)),
        'matrix product, bfloat16': (matmul, jitted(jnp.matmul, half, half)),
        'convolution': (conv_work, jitted(conv, image, kernel)),
        'convolution, image gradient': (
            conv_work, jitted(jax.grad(conv_sum), image, kernel, image)),
        'convolution, weight gradient': (
            conv_work, jitted(jax.grad(conv_sum, 1), image, kernel, image)),
        'copy (GB/s)': (2e-9 * flat.nbytes, jitted(lambda v: v + 1, flat)),
    }  # fmt: skip


def facts(args: Any) -> dict[str, Any]:
    """What ran, where, and with which versions."""
    device = jax.devices()[0]
    processor = platform.processor() or platform.machine()
    if Path('/proc/cpuinfo').exists():
        lines = Path('/proc/cpuinfo').read_text().splitlines()
        names = [line.partition(': ')[2] for line in lines if line.startswith('model name')]
        processor = names[0] if names else processor
    return {
        'command': shlex.join(['python', *sys.argv]),
        'arguments': vars(args),
        'device': device.device_kind if device.platform != 'cpu' else processor,
        'platform': device.platform,
        'cores': len(os.sched_getaffinity(0)),
        'load_before': os.getloadavg(),
        'versions': {
            'python': platform.python_version(),
            'jax': jax.__version__,
            'flax': flax.__version__,
        },
    }


def table(head: list[str], rows: list[list[Any]]) -> str:
    lines = [head, ['---', *['---:'] * (len(head) - 1)], *rows]
    return '\n'.join('| ' + ' | '.join(map(str, line)) + ' |' for line in lines)
