"""Images/s of CPSC-DFKD's or NAYER's steps and rounds beside plain PyTorch's, in one run.

    python experiments/bench/steps.py [--method=cpsc] [--pair=wrn40_2/wrn16_1] [--batch=128]
        [--seconds=20] [--round=6+5] [--dtype=float32] [--devices=1] [--xla] [--compile]
        [--kinds=generator,student,round] [--both]

Both sides start from the same weights.  Before anything is timed, both take a step of each kind
with the same random draws, and every term of both losses must agree.  Then they take turns, a block
of steps each, so that both see the same machine.  Images/s are medians over blocks; the ratio is
the median over turns.  A round is what `dfkd_jax.loops.alternating` runs: a batch of synthesis of
some generator steps, then some student steps: one program on a GPU, a program for each step on a
CPU, and both with --both.  Nothing compiles in a timed block.  See README.md.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import os
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
os.environ.setdefault('XLA_PYTHON_CLIENT_PREALLOCATE', 'false')  # PyTorch wants memory too

if any(arg.startswith(('--threads', '--devices')) for arg in sys.argv):
    # XLA reads the numbers of threads and devices when it starts.
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument('--threads', type=int)
    early.add_argument('--devices', type=int, default=1)
    told = early.parse_known_args()[0]
    os.environ['JAX_NUM_CPU_DEVICES'] = str(told.devices)
    if told.threads:
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: told.threads])

import jax
import jax.numpy as jnp
import numpy as np
import ours
import plain_torch
import torch
import torch.nn.functional as F

from dfkd_jax import build, native
from dfkd_jax.configs import cifar10, digits, fashion_mnist

CONFIGS = {'cifar10': cifar10, 'fashion_mnist': fashion_mnist, 'digits': digits}
# The largest relative difference of any loss term at equal weights and draws; relative to at least
# a hundredth of the loss.
TOLERANCE = 1e-3
# Generator and student steps of a round, in the proportion of the published settings.
ROUNDS = {'cpsc': '6+5', 'nayer': '3+20'}
KINDS = ('generator', 'student', 'round')


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add('--config', choices=CONFIGS, default='cifar10', help='image size, classes, losses, rates')
    add('--method', choices=ROUNDS, default='cpsc')
    add('--round', help=f'generator + student steps of a round, if not {ROUNDS}')
    add('--dtype', choices=build.DTYPES, default='float32', help='of activations, on both sides')
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
    add('--devices', type=int, default=1, help='more: as a side of its own; virtual ones of a CPU')
    add('--parallel', choices=('jit', 'shard_map'), default='shard_map', help='config.parallel')
    add('--xla', action='store_true', help="XLA's convolutions as well, as a side of its own")
    add('--compile', action='store_true', help='torch.compile as well, as a third side')
    add('--kinds', default=','.join(KINDS), help='what is timed, in this order')
    add('--both', action='store_true', help='rounds both fused and step by step')
    add('--output', help='folder for the table (.md) and all that was measured (.json), as it goes')
    args = parser.parse_args()
    if unknown := set(args.kinds.split(',')) - set(KINDS):
        parser.error(f'--kinds: found {", ".join(sorted(unknown))}; expected {", ".join(KINDS)}.')
    teacher, _, student = args.pair.partition('/')
    args.teacher, args.student = args.teacher or teacher, args.student or student
    args.round = args.round or ROUNDS[args.method]
    return args


def make_config(args: argparse.Namespace) -> Any:
    """The method's config for the data set, at the sizes asked for.

    CPSC-DFKD's images are fresh, as in its authors' code; NAYER's bank holds eight batches.
    """
    pair = f'{args.teacher}/{args.student}'
    config = CONFIGS[args.config].get_config(args.method)
    config = ours.resize(config, pair, args.batch, args.round, rounds=1000)
    config.parallel, config.dtype = args.parallel, args.dtype
    if args.width:
        config.generator.width = args.width
    args.width = config.generator.width
    if args.method == 'cpsc':
        config.synthesis.update(bank=0, crop_padding=0, flip=False)
        config.generator.update(bounded=False, darkest=1.0, class_brightness=True, decay=False)
    else:
        config.synthesis.update(bank=8 * args.batch, shade=0.0, cutmix=0.0)
    return config


# 1. The two sides: the same networks, weights and optimisers.


def torch_side(library: ours.Steps, device: str, compiled: bool = False) -> plain_torch.Steps:
    """The other side, with the same weights and bank."""
    if library.config.method == 'cpsc':
        return plain_torch.Cpsc(library.config, library.weights, device, compiled)
    images = np.asarray(library.state.extra.bank.image).transpose(0, 3, 1, 2).copy()
    norm = tuple(np.float32(x) for x in (library.facts.mean, library.facts.std))
    nayer = plain_torch.Nayer(
        library.config, library.weights, library.table, images, norm, device, compiled
    )
    nayer.label = torch.tensor(np.asarray(library.state.extra.batch.label), device=device).long()
    return nayer


def torch_round(steps: plain_torch.Steps, phase: Any, times: int) -> Callable[[], None]:
    """`times` rounds of the plain steps."""

    def block() -> None:
        for _ in range(times):
            steps.begin()
            for _ in range(phase.g_steps):
                steps.generator_step()
            steps.finish()
            for _ in range(phase.s_steps):
                steps.student_step()
        if steps.device == 'cuda':
            torch.cuda.synchronize()

    return block


def torch_block(steps: plain_torch.Steps, kind: str, times: int) -> Callable[[], None]:
    step = getattr(steps, f'{kind}_step')

    def block() -> None:
        for _ in range(times):
            step()
        if steps.device == 'cuda':
            torch.cuda.synchronize()

    return block


def to_torch(x: np.ndarray | None, device: str) -> torch.Tensor | None:
    """A draw as PyTorch takes it, with int64 indices."""
    if x is None:
        return None
    return torch.tensor(x.astype(np.int64) if x.dtype == np.int32 else x, device=device)


def check(library: ours.Steps, theirs: plain_torch.Steps) -> dict[str, float]:
    """Takes two steps of each kind on both sides with equal draws; returns the largest deviations.

    The first step of a kind starts from equal weights; a RuntimeError names the term that differs
    by more than `TOLERANCE`.  The second starts from weights that each side updated itself.  The
    student comes first because it sees the generator's images.  Adam's first step has the size of
    its rate whatever the gradient's, so where that is zero rounding decides.
    """
    worst = {}
    for index in range(2):
        for kind in ('student', 'generator'):
            draws = tuple(to_torch(x, theirs.device) for x in library.draws(kind, index))
            found = library.step(kind, index)
            wanted = {k: float(v) for k, v in getattr(theirs, f'{kind}_step')(draws).items()}
            names = wanted.keys() - {'hit', 'agreement'}
            # The loss of NAYER's student is its one term.
            least = 1e-2 * abs(wanted['loss' if 'loss' in wanted else 'kd'])
            error = {
                name: abs(found[name] - wanted[name]) / max(abs(wanted[name]), least)
                for name in names
            }
            error = {name: math.inf if math.isnan(e) else e for name, e in error.items()}
            name = max(error, key=error.__getitem__)
            worst[f'{kind} step {index + 1}'] = error[name]
            exact = index == 0 and library.config.dtype == 'float32'
            if not error[name] < (TOLERANCE if exact else math.inf):
                raise RuntimeError(
                    f'the {kind} steps differ at equal weights and draws, most in {name!r}: '
                    f'dfkd_jax {found}, PyTorch {wanted}.'
                )
    return worst


# 2. Timing.


def time_steps(
    args: argparse.Namespace,
    libraries: dict[str, ours.Steps],
    sides: dict[str, plain_torch.Steps],
    kind: str,
) -> dict[str, Any]:
    """Times steps of a kind, or rounds, on every side: images/s, and ratios to eager PyTorch."""
    phase, rounds_too = libraries[''].config.phases[0], kind == 'round'
    make_torch = torch_round if rounds_too else torch_block
    what = phase if rounds_too else kind
    times, blocks, compiling = 0, {}, {}
    for side, library in libraries.items():
        make = library.round if rounds_too else functools.partial(library.stepwise, kind)
        warm = make(1)
        first = ours.time_block(warm)
        one = min(ours.time_block(warm) for _ in range(2))
        times = times or max(1, min(100, round(args.block_seconds / one)))
        name = f'dfkd_jax{"" if rounds_too else ", step by step"}{side}'
        blocks[name] = make(times)
        compiling[name] = first - one if rounds_too else library.programs[kind].seconds
        if library.plan.fused and not rounds_too:
            name = f'dfkd_jax, scan of steps{side}'
            blocks[name], compiling[name] = library.fused(kind, times)
        if args.both and rounds_too:
            name = f'dfkd_jax, {"step by step" if library.plan.fused else "fused"}{side}'
            first, second = (ours.time_block(library.round(1, other=True)) for _ in range(2))
            blocks[name], compiling[name] = library.round(times, other=True), first - second
    for name, steps in sides.items():
        blocks[name] = make_torch(steps, what, times)
        first, second = (ours.time_block(make_torch(steps, what, 1)) for _ in range(2))
        compiling[name] = max(first - second, 0.0) if name != 'PyTorch, eager' else 0.0
    for block in blocks.values():
        block()  # compiles the means of the metrics over a block
    taken = ours.interleave(blocks, args.seconds)
    images = args.batch * times * (phase.g_steps + phase.s_steps if rounds_too else 1)
    base = taken['PyTorch, eager']
    return {
        name: {
            'images_per_second': ours.median_and_spread([images / s for s in seconds]),
            'milliseconds_per_step': 1e3 * statistics.median(seconds) / times,
            'ratio_to_pytorch': ours.median_and_spread([b / s for s, b in zip(seconds, base)]),
            'compile_seconds': compiling[name],
            'steps_per_block': times,
        }
        for name, seconds in taken.items()
    }


# 3. Where the time goes: the parts of a step, and the machine's ceilings.


def jax_parts(library: ours.Steps) -> dict[str, tuple[ours.Program, tuple]]:
    """The program and the arguments of each part of CPSC-DFKD's steps."""
    models, state, config = library.models, library.state, library.config
    native.use(config.convolutions)
    image = jax.random.normal(library.key, (config.synthesis.batch_size, *models.image_shape))
    z, label = map(jnp.asarray, library.draws('generator', 0))
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
    of_teacher = (library.teacher['params'], library.teacher['batch_stats'], image)
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
    return {name: (ours.compile_program(jax.jit(fn), *xs), xs) for name, (fn, xs) in parts.items()}


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
        taps = sum(x.sum() for moments in steps.statistics.pop() for x in moments)
        return torch.autograd.grad(logits.sum() + features.sum() + taps, leaf)

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


def torch_ceilings(device: str) -> dict[str, Callable[[], Any]]:
    """PyTorch's side of `ours.ceilings`."""
    batch, side, channels = ours.CEILING_CONV
    a = torch.randn(ours.SQUARE, ours.SQUARE, device=device)
    half = a.bfloat16()
    x = torch.randn(batch, channels, side, side, device=device)
    w = torch.randn(channels, channels, 3, 3, device=device)
    line = torch.ones(ours.LINE, device=device)
    gradient = functools.partial(
        torch.ops.aten.convolution_backward, x, x, w, None, (1, 1), (1, 1), (1, 1), False, (0, 0), 1
    )
    return {
        'matrix product': lambda: a @ a,
        'matrix product, bfloat16': lambda: half @ half,
        'convolution': lambda: F.conv2d(x, w, padding=1),
        'convolution, image gradient': lambda: gradient((True, False, False)),
        'convolution, weight gradient': lambda: gradient((False, True, False)),
        'copy (GB/s)': lambda: line + 1,
    }


def time_pair(call: Callable, theirs: Callable, device: str, seconds: float) -> dict[str, Any]:
    """Median milliseconds of one call on each side."""
    # A GPU runs its queue in order; XLA on the CPU would run calls side by side.
    calls = 20 if device == 'cuda' else 1

    def jax_block() -> None:
        jax.block_until_ready([call() for _ in range(calls)][-1])

    def torch_block() -> None:
        for _ in range(calls):
            theirs()
        if device == 'cuda':
            torch.cuda.synchronize()

    blocks = {'jax': jax_block, 'torch': torch_block}
    for block in blocks.values():
        block()
        block()
    taken = ours.interleave(blocks, seconds)
    return {side: 1e3 * statistics.median(values) / calls for side, values in taken.items()}


def time_parts(
    args: argparse.Namespace, library: ours.Steps, theirs: plain_torch.Steps
) -> tuple[dict[str, Any], dict[str, Any]]:
    cpsc = library.config.method == 'cpsc'  # NAYER's parts are the same networks
    torch_side = torch_parts(theirs, library.config) if cpsc else {}
    parts = {}
    for name, (program, xs) in (jax_parts(library) if cpsc else {}).items():
        call = functools.partial(program.call, *xs)
        taken = time_pair(call, torch_side[name], theirs.device, args.part_seconds)
        parts[name] = taken | {'gflop': program.gflop, 'gbyte': program.gbyte}
    limits = {}
    theirs_best = torch_ceilings(theirs.device)
    for name, (work, call) in ours.ceilings().items():
        taken = time_pair(call, theirs_best[name], theirs.device, args.part_seconds)
        limits[name] = {side: 1e3 * work / taken[side] for side in taken}
    return parts, limits


# 4. The report.


def report(result: dict[str, Any]) -> str:
    """A result as Markdown."""
    args, where = result['arguments'], result
    versions = ', '.join(f'{name} {version}' for name, version in where['versions'].items())
    load = ' -> '.join(f'{where[f"load_{when}"][0]:.1f}' for when in ('before', 'after'))
    out = [
        f'## {args["method"]}, {args["teacher"]} -> {args["student"]}, batch {args["batch"]}, '
        f'generator width {args["width"]}, {args["config"]}',
        f'`{where["command"]}`',
        f'{where["device"]}, {where["cores"]} cores, {where["torch_threads"]} PyTorch threads; '
        f'{versions}; {args["dtype"]}; load average {load}.',
        'Largest relative difference of any loss term at equal weights and draws, then after an '
        'update: ' + ', '.join(f'{k} {v:.0e}' for k, v in where['deviation'].items()) + '.',
    ]
    rows = [
        [f'round of {args["round"]} steps' if kind == 'round' else f'{kind} step', side,
         f'{x["images_per_second"]["median"]:.1f}',
         f'{x["images_per_second"]["low"]:.1f} to {x["images_per_second"]["high"]:.1f}',
         f'{x["milliseconds_per_step"]:.1f}',
         f'{x["ratio_to_pytorch"]["median"]:.2f} '
         f'({x["ratio_to_pytorch"]["low"]:.2f} to {x["ratio_to_pytorch"]["high"]:.2f})',
         f'{x["compile_seconds"]:.1f}']
        for kind, sides in where['steps'].items() for side, x in sides.items()
    ]  # fmt: skip
    head = ['', '', 'images/s', 'quartiles', 'ms', 'times eager PyTorch', 'compilation, s']
    out.append(ours.table(head, rows))
    if where['ceilings']:
        best = where['ceilings']['convolution']
        parts = dict(where['parts'])
        parts |= {f'**whole {kind} step**': x for kind, x in where['whole'].items()}
        rows = []
        for name, x in parts.items():
            speed = 1e3 * x['gflop'] / x['jax']
            rows.append(
                [name, f'{x["jax"]:.1f}', f'{x["torch"]:.1f}', f'{x["torch"] / x["jax"]:.2f}',
                 f'{x["gflop"]:.1f}', f'{speed:.0f}', f'{1e3 * x["gflop"] / x["torch"]:.0f}',
                 f'{100 * speed / best["jax"]:.0f} %', f'{1e3 * x["gbyte"] / x["jax"]:.0f}']
            )  # fmt: skip
        head = ['part', 'dfkd_jax, ms', 'PyTorch, ms', 'ratio', 'GFLOP', 'GFLOP/s', "PyTorch's",
                "of XLA's convolution", 'GB/s, uncached']  # fmt: skip
        out.append(ours.table(head, rows))
        rows = [
            [name, f'{x["jax"]:.0f}', f'{x["torch"]:.0f}', f'{x["jax"] / x["torch"]:.2f}']
            for name, x in where['ceilings'].items()
        ]
        out.append(ours.table(['ceiling, GFLOP/s', 'XLA', 'PyTorch', 'ratio'], rows))
    return '\n\n'.join(out) + '\n'


def main() -> None:
    args = arguments()
    if args.threads:
        torch.set_num_threads(args.threads)
    device = 'cuda' if jax.devices()[0].platform == 'gpu' else 'cpu'
    if device == 'cuda' and not torch.cuda.is_available():
        sys.exit('jax sees a GPU and PyTorch does not: install a CUDA build of PyTorch, or set '
                 'JAX_PLATFORMS=cpu.')  # fmt: skip
    # As XLA on a GPU does by default: TF32 products, and a search for the fastest convolution.
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = True

    result = ours.facts(args)
    result['torch_threads'] = torch.get_num_threads()
    result['versions']['torch'] = torch.__version__
    if device == 'cpu' and result['load_before'][0] > 0.5 * result['cores']:
        print(f'warning: load average {result["load_before"][0]:.1f} on {result["cores"]} cores; '
              'wait for an idle machine to report numbers.', file=sys.stderr)  # fmt: skip
    config = make_config(args)
    libraries = {'': ours.Steps(config)}
    if args.devices > 1:
        libraries[f', {args.devices} devices'] = ours.Steps(config, args.devices)
    if args.xla:
        plain = config.copy_and_resolve_references()
        plain.convolutions = 'xla'
        libraries[", XLA's convolutions"] = ours.Steps(plain)
    library = libraries['']
    sides = {'PyTorch, eager': torch_side(library, device)}
    if args.compile:
        sides['PyTorch, torch.compile'] = torch_side(library, device, compiled=True)
    eager = sides['PyTorch, eager']
    result['deviation'] = check(library, eager)
    result['steps'] = {}
    result['parts'], result['ceilings'], result['whole'] = {}, {}, {}
    for kind in args.kinds.split(','):
        result['steps'][kind] = time_steps(args, libraries, sides, kind)
        print(kind, json.dumps(result['steps'][kind]), flush=True)
        write(args, result)
    result['whole'] = {
        kind: {
            'jax': min(
                x['milliseconds_per_step']
                for name, x in timed.items()
                if name in ('dfkd_jax, step by step', 'dfkd_jax, scan of steps')
            ),
            'torch': timed['PyTorch, eager']['milliseconds_per_step'],
            'gflop': library.programs[kind].gflop,
            'gbyte': library.programs[kind].gbyte,
        }
        for kind, timed in result['steps'].items()
        if kind in library.programs
    }
    if args.part_seconds:
        result['parts'], result['ceilings'] = time_parts(args, library, eager)
    print(write(args, result))


def write(args: argparse.Namespace, result: dict[str, Any]) -> str:
    """Writes what was measured so far, if there is a folder for it; returns the table."""
    result['load_after'] = os.getloadavg()
    text = report(result)
    if args.output:
        folder = Path(args.output)
        folder.mkdir(parents=True, exist_ok=True)
        parts = (args.config, args.method, args.teacher, args.student, args.batch, args.dtype)
        last = ('compile',) if args.compile else ()
        name = '-'.join(map(str, (*parts, result['platform'], *last)))
        (folder / f'{name}.md').write_text(text)
        (folder / f'{name}.json').write_text(json.dumps(result, indent=2) + '\n')
        print(f'written to {folder / name}.md and .json')
    return text


if __name__ == '__main__':
    main()
