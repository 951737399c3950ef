"""Images/s of CPSC-DFKD's generator step and student step, beside plain PyTorch's, in one run.

    python experiments/bench/steps.py [--pair=wrn40_2/wrn16_1] [--batch=128] [--seconds=20]

Both sides start from the same weights; before anything is timed, both take a step of each kind
with the same latents and classes, and every term of both losses must agree.  Then they take turns,
a block of steps each, so that both see the same machine; images/s are medians over blocks, the
ratio is the median over turns.  Nothing compiles in a timed block.  See README.md.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import os
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
os.environ.setdefault('XLA_PYTHON_CLIENT_PREALLOCATE', 'false')  # PyTorch wants memory too

if '--threads' in ' '.join(sys.argv):  # XLA counts its threads when it starts: cut the cores first
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument('--threads', type=int)
    cores = sorted(os.sched_getaffinity(0))[: early.parse_known_args()[0].threads]
    os.sched_setaffinity(0, cores)

import flax
import jax
import jax.numpy as jnp
import numpy as np
import plain_torch
import torch
import torch.nn.functional as F

from configs import cifar10, digits, fashion_mnist
from dfkd_jax import build, parallel, port
from dfkd_jax.contract import Frozen, State
from dfkd_jax.methods import METHODS

CONFIGS = {'cifar10': cifar10, 'fashion_mnist': fashion_mnist, 'digits': digits}
TOLERANCE = 1e-3  # relative, of every term of both losses at equal weights and draws


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add('--config', choices=CONFIGS, default='cifar10', help='image size, classes, losses, rates')
    add('--pair', default='wrn40_2/wrn16_1', help='TEACHER/STUDENT, e.g. resnet34/resnet18')
    add('--teacher', help='instead of the one of --pair')
    add('--student', help='instead of the one of --pair')
    add('--batch', type=int, default=128, help='images in a step of either kind')
    add('--width', type=int, help="the generator's, if not the config's")
    add('--seconds', type=float, default=20.0, help='timed, for each step of each side')
    add('--block-seconds', type=float, default=1.0, help='of one turn, about')
    add(
        '--part-seconds', type=float, default=2.0, help='timed, for each part of each side; 0: none'
    )
    add('--threads', type=int, help='CPU cores to use; all if not given')
    add('--parallel', choices=('jit', 'shard_map'), default='shard_map', help='config.parallel')
    add('--compile', action='store_true', help='torch.compile as well, as a third side')
    add('--output', help='folder for the table (.md) and all that was measured (.json)')
    args = parser.parse_args()
    teacher, _, student = args.pair.partition('/')
    args.teacher, args.student = args.teacher or teacher, args.student or student
    return args


def make_config(args: argparse.Namespace) -> Any:
    """The data set's configuration with the sizes asked for: fresh images, as they are made."""
    config = CONFIGS[args.config].get_config('cpsc')
    config.parallel = args.parallel
    config.teacher.model, config.student.model = args.teacher, args.student
    if args.width:
        config.generator.width = args.width
    args.width = config.generator.width
    config.synthesis.batch_size = config.synthesis.student_batch_size = args.batch
    config.synthesis.update(bank=0, crop_padding=0, flip=False)
    config.generator.update(bounded=False, darkest=1.0, class_brightness=True, decay=False)
    return config


# 1. The two sides: the same networks, weights and optimisers.


class Program(NamedTuple):
    """A compiled function, what its compilation took, and what XLA counts in it."""

    call: Callable
    seconds: float  # tracing and compiling
    gflop: float
    gbyte: float  # read and written, were nothing kept in cache from one operation to the next


def compile_program(jitted: Any, *args: Any) -> Program:
    started = time.perf_counter()
    compiled = jitted.lower(*args).compile()
    seconds = time.perf_counter() - started
    cost = compiled.cost_analysis() or {}
    return Program(
        compiled, seconds, cost.get('flops', math.nan) / 1e9, cost.get('bytes accessed', 0.0) / 1e9
    )


class JaxSteps:
    """dfkd_jax's CPSC-DFKD on one device, compiled as `dfkd_jax.train.make_round` does.

    stepwise: one compiled step per call (what a round is on the CPU); else scans of steps (what it
    is elsewhere).
    """

    def __init__(self, config: Any):
        self.config = config
        self.plan = parallel.make(config.parallel, jax.devices()[:1])
        facts = SimpleNamespace(
            mean=(0.5,) * config.data.channels, std=(0.25,) * config.data.channels
        )
        make = METHODS[config.method]
        self.models = build.make_models(config, facts)
        whole = make(config, self.models, parallel.Shards())
        sharded = build.make_models(config, facts, self.plan.shards.axis)
        method = make(config, sharded, self.plan.shards)
        self.steps = {
            'generator': parallel.numbered(method.generator_step),
            'student': parallel.numbered(method.student_step),
        }
        self.teacher = self._teacher(jax.random.key(1))
        self.state = self._fresh(whole)
        self.frozen = self.plan.replicate(Frozen(self.teacher))
        self.weights = self._torch_weights()
        self.programs = {
            kind: compile_program(
                self.plan.compile(step), self.frozen, self.state, (self.key, np.int32(0))
            )
            for kind, step in self.steps.items()
        }

    key = jax.random.key(3)

    def _fresh(self, whole: Any) -> State:
        return self.plan.replicate(jax.jit(whole.init)(None, jax.random.key(2)))

    def _teacher(self, key: Any) -> dict[str, Any]:
        """Random weights whose batch norms remember the moments of noise.

        So activations keep the size that a trained teacher's have, however deep it is.
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

    def _torch_weights(self) -> dict[str, dict[str, np.ndarray]]:
        config, state = self.config, jax.device_get(self.state)
        weights = {
            'teacher': port.to_torch(config.teacher.model, jax.device_get(self.teacher)),
            'student': port.to_torch(config.student.model, state.student.variables),
            'generator': port.to_torch(config.generator.model, state.generator.variables),
        }
        if state.extra.adapter:
            weights['adapter'] = {
                f'{index}.{name}': array.T
                for index, layer in ((0, 'hidden'), (2, 'out'))
                for name, array in (
                    ('weight', state.extra.adapter[layer]['kernel']),
                    ('bias', state.extra.adapter[layer]['bias']),
                )
            }
        return weights

    def draws(self, kind: str, index: int) -> tuple[np.ndarray, np.ndarray]:
        """The latents and classes of step `index`, drawn as dfkd_jax/methods/cpsc.py draws them."""
        key = jax.random.fold_in(self.key, index)
        if kind == 'student':
            key = jax.random.split(key, 3)[0]
        key_z, key_label = jax.random.split(key)
        batch, classes = self.config.synthesis.batch_size, self.config.data.num_classes
        z = jax.random.normal(key_z, (batch, self.config.generator.latent))
        return np.asarray(z), np.asarray(jax.random.randint(key_label, (batch,), 0, classes))

    def step(self, kind: str, index: int) -> dict[str, float]:
        """One step, for its metrics."""
        self.state, metrics = self.programs[kind].call(
            self.frozen, self.state, (self.key, np.int32(index))
        )
        return {name.partition('/')[2]: float(value) for name, value in metrics.items()}

    def stepwise(self, kind: str, times: int) -> Callable[[], None]:
        def block() -> None:
            out = parallel.repeat(
                self.programs[kind].call, self.frozen, self.state, self.key, times, fused=False
            )
            self.state, _ = jax.block_until_ready(out)

        return block

    def fused(self, kind: str, times: int) -> tuple[Callable[[], None], float]:
        """The same as one program, and what its compilation took."""
        step = functools.partial(parallel.repeat, self.steps[kind], times=times, fused=True)
        program = compile_program(self.plan.compile(step), self.frozen, self.state, self.key)

        def block() -> None:
            self.state, _ = jax.block_until_ready(program.call(self.frozen, self.state, self.key))

        return block, program.seconds


def torch_block(steps: plain_torch.Steps, kind: str, times: int) -> Callable[[], None]:
    step = getattr(steps, f'{kind}_step')

    def block() -> None:
        for _ in range(times):
            step()
        if steps.device == 'cuda':
            torch.cuda.synchronize()

    return block


def check(ours: JaxSteps, theirs: plain_torch.Steps) -> dict[str, float]:
    """Takes two steps of each kind on both sides with equal draws; returns the largest deviations.

    At the first step of a kind weights are equal, and RuntimeError says which term differs by more
    than `TOLERANCE`.  The second starts from weights that each side updated itself.
    """
    worst = {}
    for index in range(2):
        for kind in ('generator', 'student'):
            z, label = (torch.tensor(x, device=theirs.device) for x in ours.draws(kind, index))
            found = ours.step(kind, index)
            wanted = {
                k: float(v) for k, v in getattr(theirs, f'{kind}_step')((z, label.long())).items()
            }
            error = {
                name: abs(found[name] - wanted[name]) / max(abs(wanted[name]), 1e-2)
                for name in wanted.keys() - {'hit', 'agreement'}
            }
            error = {name: math.inf if math.isnan(e) else e for name, e in error.items()}
            name = max(error, key=error.__getitem__)
            worst[f'{kind} step {index + 1}'] = error[name]
            if not error[name] < (TOLERANCE if index == 0 else math.inf):
                raise RuntimeError(
                    f'the {kind} steps differ at equal weights and draws, most in {name!r}: '
                    f'dfkd_jax {found}, PyTorch {wanted}.'
                )
    return worst


# 2. Timing.


def time_block(block: Callable[[], None]) -> float:
    started = time.perf_counter()
    block()
    return time.perf_counter() - started


def interleave(
    blocks: dict[str, Callable[[], None]], seconds: float, least: int = 5
) -> dict[str, list[float]]:
    """Seconds of each block, turn by turn, until each had `seconds` and at least `least` turns.

    Who comes first changes from turn to turn.  Every block has run before.
    """
    taken: dict[str, list[float]] = {name: [] for name in blocks}
    names = list(blocks)
    while min(map(sum, taken.values())) < seconds or len(taken[names[0]]) < least:
        for name in names:
            taken[name].append(time_block(blocks[name]))
        names.reverse()
    return taken


def median_and_spread(values: list[float]) -> dict[str, float]:
    """Median, and the quartiles around it."""
    low, _, high = statistics.quantiles(values, n=4, method='inclusive')
    return {'median': statistics.median(values), 'low': low, 'high': high, 'count': len(values)}


def time_steps(
    args: argparse.Namespace, ours: JaxSteps, sides: dict[str, plain_torch.Steps], kind: str
) -> dict[str, Any]:
    """One kind of step on every side: images/s, and ratios to eager PyTorch."""
    warm = ours.stepwise(kind, 1)
    warm()
    one = min(time_block(warm) for _ in range(2))
    times = max(1, min(100, round(args.block_seconds / one)))
    blocks = {'dfkd_jax, step by step': ours.stepwise(kind, times)}
    compiling = {'dfkd_jax, step by step': ours.programs[kind].seconds}
    if ours.plan.fused:
        name = 'dfkd_jax, fused round'
        blocks[name], compiling[name] = ours.fused(kind, times)
    for name, steps in sides.items():
        blocks[name] = torch_block(steps, kind, times)
        first, second = (time_block(torch_block(steps, kind, 1)) for _ in range(2))
        compiling[name] = max(first - second, 0.0) if name != 'PyTorch, eager' else 0.0
    for block in blocks.values():
        block()  # the means over a block of metrics compile here
    taken = interleave(blocks, args.seconds)
    images, base = args.batch * times, taken['PyTorch, eager']
    return {
        name: {
            'images_per_second': median_and_spread([images / s for s in seconds]),
            'milliseconds_per_step': 1e3 * statistics.median(seconds) / times,
            'ratio_to_pytorch': median_and_spread([b / s for s, b in zip(seconds, base)]),
            'compile_seconds': compiling[name],
            'steps_per_block': times,
        }
        for name, seconds in taken.items()
    }


# 3. Where the time goes: the parts of a step, and what the machine can do.


def jax_parts(ours: JaxSteps) -> dict[str, tuple[Program, tuple]]:
    """Program and arguments of each part."""
    models, state, config = ours.models, ours.state, ours.config
    image = jax.random.normal(ours.key, (config.synthesis.batch_size, *models.image_shape))
    z, label = map(jnp.asarray, ours.draws('generator', 0))
    generator, student = state.generator, state.student

    def classify(model: Any, train: bool) -> Callable:
        def loss(params: Any, stats: Any, image: Any) -> Any:
            variables = {'params': params, 'batch_stats': stats}
            out = model.apply(variables, image, train=train, mutable=['batch_stats'])[0]
            taps = 0.0 if train else sum(map(jnp.sum, jax.tree.leaves(out.statistics)))
            return jnp.sum(out.logits) + jnp.sum(out.features) + taps

        return loss

    def labels(params: Any, stats: Any, image: Any) -> Any:
        return models.teacher.apply({'params': params, 'batch_stats': stats}, image).logits

    def draw(params: Any, stats: Any, z: Any, label: Any) -> Any:
        variables = {'params': params, 'batch_stats': stats}
        return models.generator.apply(variables, z, label, train=True, mutable=['batch_stats'])[0]

    def draw_loss(params: Any, stats: Any, z: Any, label: Any) -> Any:
        return jnp.vdot(draw(params, stats, z, label), image)

    of_generator = (generator.params, generator.batch_stats, z, label)
    of_teacher = (ours.teacher['params'], ours.teacher['batch_stats'], image)
    of_student = (student.params, student.batch_stats, image)
    parts = {
        'generator, forward': (draw, of_generator),
        'generator, forward and weight gradient': (jax.grad(draw_loss), of_generator),
        'teacher, forward': (labels, of_teacher),
        'teacher, forward and image gradient': (
            jax.grad(classify(models.teacher, False), 2), of_teacher),
        'student, forward and image gradient': (
            jax.grad(classify(models.student, True), 2), of_student),
        'student, forward and weight gradient': (
            jax.grad(classify(models.student, True)), of_student),
    }  # fmt: skip
    return {name: (compile_program(jax.jit(fn), *xs), xs) for name, (fn, xs) in parts.items()}


def torch_parts(steps: plain_torch.Steps, config: Any) -> dict[str, Callable[[], Any]]:
    """The same parts of the plain steps."""
    data = config.data
    shape = (config.synthesis.batch_size, data.channels, data.image_size, data.image_size)
    image = torch.randn(shape, device=steps.device)
    leaf = image.clone().requires_grad_(True)
    draws = steps.draw()
    steps.student.train()

    def draw() -> Any:
        with torch.no_grad():
            return steps.generator(*draws)

    def draw_gradient() -> Any:
        loss = torch.sum(steps.generator(*draws) * image)
        return torch.autograd.grad(loss, steps.generator_parameters)

    def label() -> Any:
        with torch.no_grad():
            return steps.teacher(image)

    def teacher_gradient() -> Any:
        logits, features = steps.teacher(leaf)
        return torch.autograd.grad(logits.sum() + features.sum() + steps.distance.pop(), leaf)

    def student_gradient(x: Any, wanted: Any) -> Any:
        logits, features = steps.student(x)
        return torch.autograd.grad(logits.sum() + features.sum(), wanted)

    return {
        'generator, forward': draw,
        'generator, forward and weight gradient': draw_gradient,
        'teacher, forward': label,
        'teacher, forward and image gradient': teacher_gradient,
        'student, forward and image gradient': lambda: student_gradient(leaf, leaf),
        'student, forward and weight gradient': (
            lambda: student_gradient(image, steps.student_parameters)
        ),
    }


# A 3x3 convolution large enough to run at full speed: batch, pixels on a side, channels in and out.
CEILING_CONV = (64, 32, 64)


def ceilings(device: str) -> dict[str, tuple[float, Callable[[], Any], Callable[[], Any]]]:
    """What the machine does at best: name -> GFLOP (for the copy: GB), our side, PyTorch's."""
    size, (batch, side, channels) = 2048, CEILING_CONV
    random = np.random.default_rng(0).standard_normal
    square = random((size, size), np.float32)
    image = random((batch, side, side, channels), np.float32)
    kernel = random((3, 3, channels, channels), np.float32)
    flat = np.ones(2**26, np.float32)

    def conv(x: Any, w: Any) -> Any:
        return jax.lax.conv_general_dilated(
            x, w, (1, 1), 'SAME', dimension_numbers=('NHWC', 'HWIO', 'NHWC')
        )

    def jitted(fn: Callable, *arrays: Any) -> Callable[[], Any]:
        arrays = tuple(map(jnp.asarray, arrays))
        compiled = jax.jit(fn).lower(*arrays).compile()
        return lambda: compiled(*arrays)

    # A sum against fixed numbers, so that gradients are full convolutions.
    def conv_sum(x: Any, w: Any, y: Any) -> Any:
        return jnp.vdot(conv(x, w), y)

    a = torch.tensor(square, device=device)
    x = torch.tensor(image.transpose(0, 3, 1, 2).copy(), device=device)
    w = torch.tensor(kernel.transpose(3, 2, 0, 1).copy(), device=device)
    line = torch.tensor(flat, device=device)
    gradient = functools.partial(
        torch.ops.aten.convolution_backward, x, x, w, None, (1, 1), (1, 1), (1, 1), False, (0, 0), 1
    )
    matmul_gflop = 2e-9 * size**3
    conv_gflop = 2e-9 * batch * side**2 * 9 * channels**2
    of_image, of_kernel = (True, False, False), (False, True, False)
    return {
        'matrix product': (matmul_gflop, jitted(jnp.matmul, square, square), lambda: a @ a),
        'convolution': (conv_gflop, jitted(conv, image, kernel), lambda: F.conv2d(x, w, padding=1)),
        'convolution, image gradient': (
            conv_gflop, jitted(jax.grad(conv_sum), image, kernel, image),
            lambda: gradient(of_image)),
        'convolution, weight gradient': (
            conv_gflop, jitted(jax.grad(conv_sum, 1), image, kernel, image),
            lambda: gradient(of_kernel)),
        'copy (GB/s)': (
            2e-9 * flat.nbytes, jitted(lambda v: v + 1, flat), lambda: line + 1),
    }  # fmt: skip


def time_pair(ours: Callable, theirs: Callable, device: str, seconds: float) -> dict[str, Any]:
    """Median milliseconds of one call on each side."""
    # A GPU works through its queue in order; XLA on the CPU would run calls side by side.
    calls = 20 if device == 'cuda' else 1

    def jax_block() -> None:
        jax.block_until_ready([ours() for _ in range(calls)][-1])

    def torch_block() -> None:
        for _ in range(calls):
            theirs()
        if device == 'cuda':
            torch.cuda.synchronize()

    blocks = {'jax': jax_block, 'torch': torch_block}
    for block in blocks.values():
        block()
        block()
    taken = interleave(blocks, seconds)
    return {side: 1e3 * statistics.median(values) / calls for side, values in taken.items()}


def time_parts(
    args: argparse.Namespace, ours: JaxSteps, theirs: plain_torch.Steps
) -> tuple[dict[str, Any], dict[str, Any]]:
    torch_side = torch_parts(theirs, ours.config)
    parts = {}
    for name, (program, xs) in jax_parts(ours).items():
        call = functools.partial(program.call, *xs)
        taken = time_pair(call, torch_side[name], theirs.device, args.part_seconds)
        parts[name] = taken | {'gflop': program.gflop, 'gbyte': program.gbyte}
    limits = {}
    for name, (work, jax_call, torch_call) in ceilings(theirs.device).items():
        taken = time_pair(jax_call, torch_call, theirs.device, args.part_seconds)
        limits[name] = {side: 1e3 * work / taken[side] for side in taken}
    return parts, limits


# 4. The report.


def facts(args: argparse.Namespace, device: str) -> dict[str, Any]:
    """What was run, where, with what."""
    processor = platform.processor() or platform.machine()
    if Path('/proc/cpuinfo').exists():
        lines = Path('/proc/cpuinfo').read_text().splitlines()
        names = [line.partition(': ')[2] for line in lines if line.startswith('model name')]
        processor = names[0] if names else processor
    return {
        'command': shlex.join(['python', *sys.argv]),
        'arguments': vars(args),
        'device': torch.cuda.get_device_name() if device == 'cuda' else processor,
        'platform': jax.devices()[0].platform,
        'cores': len(os.sched_getaffinity(0)),
        'torch_threads': torch.get_num_threads(),
        'load_before': os.getloadavg(),
        'versions': {
            'python': platform.python_version(),
            'jax': jax.__version__,
            'flax': flax.__version__,
            'torch': torch.__version__,
        },
    }


def table(head: list[str], rows: list[list[Any]]) -> str:
    lines = [head, ['---', *['---:'] * (len(head) - 1)], *rows]
    return '\n'.join('| ' + ' | '.join(map(str, line)) + ' |' for line in lines)


def report(result: dict[str, Any]) -> str:
    """The Markdown of a result."""
    args, where = result['arguments'], result
    versions = ', '.join(f'{name} {version}' for name, version in where['versions'].items())
    load = ' -> '.join(f'{where[f"load_{when}"][0]:.1f}' for when in ('before', 'after'))
    out = [
        f'## {args["teacher"]} -> {args["student"]}, batch {args["batch"]}, generator width '
        f'{args["width"]}, {args["config"]}',
        f'`{where["command"]}`',
        f'{where["device"]}, {where["cores"]} cores, {where["torch_threads"]} PyTorch threads; '
        f'{versions}; float32; load average {load}.',
        'Largest relative difference of any loss term at equal weights and draws, then after an '
        'update: ' + ', '.join(f'{k} {v:.0e}' for k, v in where['deviation'].items()) + '.',
    ]
    rows = [
        [f'{kind} step', side, f'{x["images_per_second"]["median"]:.1f}',
         f'{x["images_per_second"]["low"]:.1f} to {x["images_per_second"]["high"]:.1f}',
         f'{x["milliseconds_per_step"]:.1f}',
         f'{x["ratio_to_pytorch"]["median"]:.2f} '
         f'({x["ratio_to_pytorch"]["low"]:.2f} to {x["ratio_to_pytorch"]["high"]:.2f})',
         f'{x["compile_seconds"]:.1f}']
        for kind, sides in where['steps'].items() for side, x in sides.items()
    ]  # fmt: skip
    head = ['', '', 'images/s', 'quartiles', 'ms/step', 'times eager PyTorch', 'compilation, s']
    out.append(table(head, rows))
    if where['parts']:
        best = where['ceilings']['convolution']
        parts = dict(where['parts'])
        parts |= {f'**whole {kind} step**': x for kind, x in where['whole'].items()}
        rows = []
        for name, x in parts.items():
            ours = 1e3 * x['gflop'] / x['jax']
            rows.append(
                [name, f'{x["jax"]:.1f}', f'{x["torch"]:.1f}', f'{x["torch"] / x["jax"]:.2f}',
                 f'{x["gflop"]:.1f}', f'{ours:.0f}', f'{1e3 * x["gflop"] / x["torch"]:.0f}',
                 f'{100 * ours / best["jax"]:.0f} %', f'{1e3 * x["gbyte"] / x["jax"]:.0f}']
            )  # fmt: skip
        head = ['part', 'dfkd_jax, ms', 'PyTorch, ms', 'ratio', 'GFLOP', 'GFLOP/s', "PyTorch's",
                "of XLA's convolution", 'GB/s, uncached']  # fmt: skip
        out.append(table(head, rows))
        rows = [
            [name, f'{x["jax"]:.0f}', f'{x["torch"]:.0f}', f'{x["jax"] / x["torch"]:.2f}']
            for name, x in where['ceilings'].items()
        ]
        out.append(table(['ceiling, GFLOP/s', 'XLA', 'PyTorch', 'ratio'], rows))
    return '\n\n'.join(out) + '\n'


def main() -> None:
    args = arguments()
    if args.threads:
        torch.set_num_threads(args.threads)
    device = 'cuda' if jax.devices()[0].platform == 'gpu' else 'cpu'
    if device == 'cuda' and not torch.cuda.is_available():
        sys.exit('jax sees a GPU and PyTorch does not: install a CUDA build of PyTorch, or set '
                 'JAX_PLATFORMS=cpu.')  # fmt: skip
    # On a GPU XLA multiplies in TF32 unless told not to, and searches for the fastest convolution.
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = True

    result = facts(args, device)
    if device == 'cpu' and result['load_before'][0] > 0.5 * result['cores']:
        print(f'warning: load average {result["load_before"][0]:.1f} on {result["cores"]} cores; '
              'wait for an idle machine to report numbers.', file=sys.stderr)  # fmt: skip
    config = make_config(args)
    ours = JaxSteps(config)
    sides = {'PyTorch, eager': plain_torch.Steps(config, ours.weights, device)}
    if args.compile:
        name = 'PyTorch, torch.compile'
        sides[name] = plain_torch.Steps(config, ours.weights, device, compiled=True)
    eager = sides['PyTorch, eager']
    result['deviation'] = check(ours, eager)
    result['steps'] = {
        kind: time_steps(args, ours, sides, kind) for kind in ('generator', 'student')
    }
    result['whole'] = {
        kind: {
            'jax': min(x['milliseconds_per_step'] for name, x in timed.items() if 'jax' in name),
            'torch': timed['PyTorch, eager']['milliseconds_per_step'],
            'gflop': ours.programs[kind].gflop,
            'gbyte': ours.programs[kind].gbyte,
        }
        for kind, timed in result['steps'].items()
    }
    result['parts'], result['ceilings'] = {}, {}
    if args.part_seconds:
        result['parts'], result['ceilings'] = time_parts(args, ours, eager)
    result['load_after'] = os.getloadavg()
    text = report(result)
    print(text)
    if args.output:
        folder = Path(args.output)
        folder.mkdir(parents=True, exist_ok=True)
        name = f'{args.config}-{args.teacher}-{args.student}-{result["platform"]}'
        (folder / f'{name}.md').write_text(text)
        (folder / f'{name}.json').write_text(json.dumps(result, indent=2) + '\n')
        print(f'written to {folder / name}.md and .json')


if __name__ == '__main__':
    main()
