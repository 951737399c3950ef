"""What every method promises.

Methods are parametrised over `METHODS`, and over a toy method that trains no generator and keeps a
bank: a contract that only one method can fulfil is none.
"""

from __future__ import annotations

import itertools
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from flax import struct

from dfkd_jax import contract, losses
from dfkd_jax.contract import Batch, Method, State
from dfkd_jax.distributed import sharding
from dfkd_jax.loops.round import make_round
from dfkd_jax.methods import METHODS, cpsc
from dfkd_jax.storage.checkpoints import Checkpoints

MODES = ('jit', 'vmap')


pytestmark = pytest.mark.usefixtures('fast_compilation')


# A method without a generator: it optimises images themselves and remembers them.


@struct.dataclass
class ToyExtra:
    canvas: jax.Array  # [B, H, W, C], the batch in the making; the same on all devices
    label: jax.Array  # [B]
    bank: jax.Array  # [N, H, W, C]
    bank_label: jax.Array  # [N]
    written: jax.Array  # [] int32, images ever written


def make_toy(config: Any, nets: contract.Models, shards: sharding.Shards) -> Method:
    batch, bank, tx = config.synthesis.batch_size, 2 * config.synthesis.batch_size, optax.sgd(0.1)
    shape = nets.image_shape
    shards.check('config.synthesis.batch_size', batch)

    def init(frozen, key):
        variables = nets.student.init(key, jnp.zeros((1, *shape)))
        extra = ToyExtra(
            jnp.zeros((batch, *shape)), jnp.zeros(batch, jnp.int32),
            jnp.zeros((bank, *shape)), jnp.zeros(bank, jnp.int32), jnp.zeros((), jnp.int32),
        )  # fmt: skip
        student = contract.start(variables['params'], variables['batch_stats'], tx)
        return State(contract.first_round(), student, generator=(), extra=extra)

    def begin(frozen, state, key):
        canvas = jax.random.normal(key, (batch, *shape))
        label = jnp.arange(batch) % nets.num_classes
        return state.replace(extra=state.extra.replace(canvas=canvas, label=label)), {}

    def generator_step(frozen, state, key):
        label = shards.share(state.extra.label)

        def loss_fn(canvas):
            logits = nets.teacher.apply(frozen.teacher, canvas).logits
            ce = losses.cross_entropy(logits, label)
            return jnp.sum(ce), jnp.mean(ce)

        mine = shards.share(state.extra.canvas)
        grads, ce = jax.grad(loss_fn, has_aux=True)(mine)
        extra = state.extra.replace(canvas=shards.gather(mine - 0.5 * grads))
        return state.replace(extra=extra), {'g/ce': shards.mean(ce)}

    def finish(frozen, state, key):
        extra = state.extra
        start = extra.written % bank
        place = jax.lax.dynamic_update_slice_in_dim
        extra = extra.replace(
            bank=place(extra.bank, extra.canvas, start, 0),
            bank_label=place(extra.bank_label, extra.label, start, 0),
            written=extra.written + batch,
        )
        return state.replace(extra=extra), {}

    def sample(frozen, state, key):
        extra = state.extra
        index = jax.random.randint(key, (batch,), 0, jnp.clip(extra.written, 1, bank))
        index = shards.share(index)
        return Batch(extra.bank[index], extra.bank_label[index])

    def student_step(frozen, state, key):
        image, _ = sample(frozen, state, key)
        teacher_logits = nets.teacher.apply(frozen.teacher, image).logits

        def loss_fn(params):
            variables = {'params': params, 'batch_stats': state.student.batch_stats}
            out, new = nets.student.apply(variables, image, train=True, mutable=['batch_stats'])
            kd = jnp.mean(losses.kd(out.logits, teacher_logits))
            return kd, (kd, new['batch_stats'])

        (_, (kd, stats)), grads = shards.value_and_grad(loss_fn)(state.student.params)
        student = contract.update(state.student, grads, tx, stats)
        return state.replace(student=student), {'s/kd': shards.mean(kd)}

    return Method(init, generator_step, student_step, sample, begin, finish)


def make_cpsc_with_a_bank(config: Any, nets: contract.Models, shards: sharding.Shards) -> Method:
    config = config.copy_and_resolve_references()
    config.generator.bounded, config.synthesis.bank = True, 2 * config.synthesis.batch_size
    config.generator.darkest = 0.5
    config.synthesis.shade = config.synthesis.cutmix = 0.5
    return cpsc.make(config, nets, shards)


CASES = METHODS | {'cpsc with a bank': make_cpsc_with_a_bank, 'toy': make_toy}


class Program(NamedTuple):
    """A method compiled in one mode, each of its steps traced at most once, and its start."""

    plan: sharding.Plan
    whole: Method
    frozen: contract.Frozen
    state: State
    round: Any  # (frozen, state, key) -> (state, metrics): begin, 2 syntheses, finish, 2 students
    begin: Any
    generator_step: Any
    finish: Any
    student_step: Any
    sample: Any  # the whole batch


def traced_once(step: Any) -> Any:
    """Fails when a compiled step is compiled again.

    (`chex.assert_max_traces` counts by where a function is defined: two methods' steps as one.)
    """
    traces = []

    def counted(*args: Any) -> Any:
        traces.append(args)
        assert len(traces) == 1, 'the step is traced again: its state or key changed its type'
        return step(*args)

    return counted


@cache
def program(name: str, mode: str) -> Program:
    config = tiny.config(name if name in METHODS else 'cpsc')
    if 'scl_temperature' in config.loss:
        config.loss.scl_temperature = 0.5
    if name in ('nayer', 'cae'):  # whose every step is tested elsewhere without
        config.synthesis.shade = config.synthesis.cutmix = 0.5
    plan = sharding.make(mode)
    make = CASES[name]
    whole = make(config, tiny.nets(config), sharding.Shards())
    method = make(config, tiny.nets(config, plan.shards.axis), plan.shards)
    once = {
        field: traced_once(getattr(method, field))
        for field in ('begin', 'generator_step', 'finish', 'student_step')
        if getattr(method, field) is not contract.unchanged
    }
    # One set of compiled steps: the round calls those that the tests call.
    steps = {field: plan.compile(sharding.numbered(step)) for field, step in once.items()}
    stepwise = plan._replace(compile=lambda step: step, fused=False)
    looped = method._replace(
        **{f: lambda fr, st, key, s=step: s(fr, st, (key, 0)) for f, step in steps.items()}
    )
    frozen = plan.replicate(tiny.frozen(method=name))
    state = plan.call(whole.init)(frozen, jax.random.key(0))
    return Program(
        plan, whole, frozen, state, make_round(looped, config.phases[0], stepwise),
        *(steps.get(f, lambda fr, st, _: (st, {}))
          for f in ('begin', 'generator_step', 'finish', 'student_step')),
        plan.call(whole.sample),
    )  # fmt: skip


def copy(p: Program) -> State:
    """The start, in memory that a step may take over."""
    return p.plan.replicate(jax.tree.map(jnp.copy, p.state))


def key_of(i: int) -> tuple[jax.Array, int]:
    return jax.random.key(7), i


def synthesised(p: Program) -> State:
    """The state after one batch of synthesis, for a student to train on."""
    state = copy(p)
    for step in (p.begin, p.generator_step, p.finish):
        state, _ = step(p.frozen, state, key_of(0))
    return state


# DiffDFKD's student learns when all images are there, as any network does.
DISTILLING = [name for name in CASES if name != 'diffdfkd']
# A method in each mode is a set of programs; on shares, these differ most.
ON_SHARES = ('nayer', 'diffdfkd', 'toy')
QUICK = [
    (name, mode) for name in CASES for mode in MODES
    if (name in ON_SHARES and name != 'nayer') or (mode == 'jit' and name in ('nayer', 'zskt'))
]  # fmt: skip
every_in_both = pytest.mark.parametrize(
    ('name', 'mode'), tiny.quick(itertools.product(CASES, MODES), *QUICK)
)


WITH_FORMS = [name for name in METHODS if 'bn_form' in tiny.config(name).loss]


@pytest.mark.parametrize('name', tiny.quick(WITH_FORMS, 'nayer', 'cpsc'))
def test_batch_statistics_are_compared_in_either_form(name: str):
    """Traced: the normalised one divides by running moments, which the published sum never does."""

    def program_of(form: str) -> str:
        method = tiny.method(tiny.config(name, loss__bn_form=form), sharding.Shards())
        frozen = jax.eval_shape(lambda: tiny.frozen(method=name))
        state = jax.eval_shape(method.init, frozen, jax.random.key(0))
        return str(jax.make_jaxpr(method.generator_step)(frozen, state, jax.random.key(0)))

    assert program_of('normalised').count(' div ') > program_of('sum').count(' div ')


# The kinds of `extra`: nothing, a bank, embeddings and a bank, a network of its own.
@pytest.mark.parametrize('name', tiny.quick(DISTILLING, 'cpsc', 'cmi', 'nayer', 'toy'))
def test_a_state_survives_a_checkpoint(name: str, tmp_path: Path):
    """Whatever a method's `extra` holds."""
    state = program(name, 'jit').state
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state, {})
        restored = checkpoints.restore(jax.eval_shape(lambda: state))
    assert restored is not None
    assert jax.tree.structure(restored[1]) == jax.tree.structure(state)
    for ours, theirs in zip(jax.tree.leaves(restored[1]), jax.tree.leaves(state), strict=True):
        np.testing.assert_array_equal(ours, theirs)


@every_in_both
def test_steps_keep_the_structure_and_stay_finite(name: str, mode: str):
    p = program(name, mode)
    state = copy(p)
    # XLA of jax 0.11.2 crashes on arrays without numbers in a sharded program.
    assert all(leaf.size for leaf in jax.tree.leaves((p.frozen, state)))
    for step in (p.begin, p.generator_step, p.finish, p.student_step):
        state, metrics = step(p.frozen, state, key_of(0))
        chex.assert_trees_all_equal_shapes_and_dtypes(state, p.state)
        chex.assert_tree_all_finite((state, metrics))
        chex.assert_rank(jax.tree.leaves(metrics), 0)
        assert all(metric[:2] in ('g/', 's/') for metric in metrics)


@every_in_both
def test_synthesis_leaves_the_student_alone_and_the_student_the_synthesis(name: str, mode: str):
    p = program(name, mode)
    if p.whole.student_step is contract.unchanged:
        return  # DiffDFKD's student learns elsewhere
    before = jax.device_get(copy(p))
    state = synthesised(p)
    assert tiny.equal(state.student, before.student)
    synthesises = p.whole.generator_step is not contract.unchanged
    assert synthesises != tiny.equal(
        (state.generator, state.extra), (before.generator, before.extra)
    )
    before = jax.device_get(state)
    state, _ = p.student_step(p.frozen, state, key_of(1))
    assert tiny.equal((state.generator, state.extra), (before.generator, before.extra))
    assert not tiny.equal(state.student.params, before.student.params)
    assert not tiny.equal(state.student.batch_stats, before.student.batch_stats)


@every_in_both
def test_a_round_follows_from_its_key_and_compiles_once(name: str, mode: str):
    p = program(name, mode)
    teacher = jax.device_get(p.frozen)
    ends = []
    for seed in (1, 1, 2):
        state, metrics = p.round(p.frozen, copy(p), jax.random.key(seed))
        state, metrics = p.round(p.frozen, state, jax.random.key(seed + 10))  # see `traced_once`
        ends.append(jax.device_get((state, metrics)))
    assert tiny.equal(ends[0], ends[1])
    first, other = ends[0][0], ends[2][0]
    if p.whole.student_step is contract.unchanged:
        assert not tiny.equal(first.extra, other.extra)
    else:
        assert not tiny.equal(first.student.params, other.student.params)
    assert ends[0][0].round == 2
    assert tiny.equal(p.frozen, teacher)


@pytest.mark.parametrize('name', tiny.quick(CASES, *ON_SHARES))
def test_shares_of_a_batch_do_what_the_whole_batch_does(name: str):
    """Above all, gradients have the right scale for SGD."""
    ends = []
    for mode in MODES:
        p = program(name, mode)
        state, metrics = p.round(p.frozen, copy(p), jax.random.key(3))
        ends.append((state.student.params, state.student.batch_stats, metrics))
        if name == 'diffdfkd':
            ends[-1] += (state.extra.x, state.extra.eps)
    tiny.close(ends[1], ends[0], 1e-4)


@pytest.mark.parametrize('name', tiny.quick(DISTILLING, 'cpsc', 'nayer', 'dfq', 'noise'))
def test_the_student_learns_from_the_teacher(name: str):
    """Its divergence on the synthetic images falls in 20 steps."""
    p = program(name, 'jit')
    state, measured = synthesised(p), []
    for i in range(20):
        state, metrics = p.student_step(p.frozen, state, key_of(i))
        measured.append(float(metrics['s/kd']))
    falls = 0.9 if name == 'noise' else 0.8  # noise tells little, and other noise at every step
    assert np.mean(measured[-5:]) < falls * np.mean(measured[:5]), measured


@pytest.mark.parametrize('name', tiny.quick(CASES, 'nayer', 'toy'))
def test_samples_are_what_the_student_would_see(name: str):
    p = program(name, 'jit')
    batch = p.sample(p.frozen, synthesised(p), jax.random.key(0))
    chex.assert_shape(batch.image, (tiny.BATCH, tiny.SIZE, tiny.SIZE, tiny.CHANNELS))
    chex.assert_shape(batch.label, (tiny.BATCH,))
    assert batch.image.dtype == jnp.float32 and batch.label.dtype == jnp.int32
    assert 0 <= batch.label.min() and batch.label.max() < tiny.CLASSES
    chex.assert_tree_all_finite(batch)
