"""What every method promises, then CPSC-DFKD against the reference implementation and its choices.

Methods are parametrised over `METHODS`, and over a toy method that trains no generator and keeps a
bank: a contract that only one method can fulfil is none.
"""

from __future__ import annotations

import json
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
from reference import Sided, near

from dfkd_jax import contract, losses, models, port
from dfkd_jax.configs import cifar100
from dfkd_jax.contract import Batch, Method, State
from dfkd_jax.distributed import sharding
from dfkd_jax.loops import alternating
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
        plan, whole, frozen, state, alternating.make_round(looped, config.phases[0], stepwise),
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


def equal(a: Any, b: Any) -> bool:
    return all(
        np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


# 1. Every method.

every = pytest.mark.parametrize('name', CASES)
# DiffDFKD's student learns when all images are there, as any network does.
distils = pytest.mark.parametrize('name', [name for name in CASES if name != 'diffdfkd'])
both = pytest.mark.parametrize('mode', MODES)


@distils
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


@every
@both
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


@distils
@both
def test_synthesis_leaves_the_student_alone_and_the_student_the_synthesis(name: str, mode: str):
    p = program(name, mode)
    before = jax.device_get(copy(p))
    state = synthesised(p)
    assert equal(state.student, before.student)
    synthesises = p.whole.generator_step is not contract.unchanged
    assert synthesises != equal((state.generator, state.extra), (before.generator, before.extra))
    before = jax.device_get(state)
    state, _ = p.student_step(p.frozen, state, key_of(1))
    assert equal((state.generator, state.extra), (before.generator, before.extra))
    assert not equal(state.student.params, before.student.params)
    assert not equal(state.student.batch_stats, before.student.batch_stats)


@every
@both
def test_a_round_follows_from_its_key_and_compiles_once(name: str, mode: str):
    p = program(name, mode)
    teacher = jax.device_get(p.frozen)
    ends = []
    for seed in (1, 1, 2):
        state, metrics = p.round(p.frozen, copy(p), jax.random.key(seed))
        state, metrics = p.round(p.frozen, state, jax.random.key(seed + 10))  # see `traced_once`
        ends.append(jax.device_get((state, metrics)))
    assert equal(ends[0], ends[1])
    first, other = ends[0][0], ends[2][0]
    if p.whole.student_step is contract.unchanged:
        assert not equal(first.extra, other.extra)
    else:
        assert not equal(first.student.params, other.student.params)
    assert ends[0][0].round == 2
    assert equal(p.frozen, teacher)


@every
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


@distils
def test_the_student_learns_from_the_teacher(name: str):
    """Its divergence on the synthetic images falls in 20 steps."""
    p = program(name, 'jit')
    state, measured = synthesised(p), []
    for i in range(20):
        state, metrics = p.student_step(p.frozen, state, key_of(i))
        measured.append(float(metrics['s/kd']))
    falls = 0.9 if name == 'noise' else 0.8  # noise tells little, and other noise at every step
    assert np.mean(measured[-5:]) < falls * np.mean(measured[:5]), measured


@every
def test_samples_are_what_the_student_would_see(name: str):
    p = program(name, 'jit')
    batch = p.sample(p.frozen, synthesised(p), jax.random.key(0))
    chex.assert_shape(batch.image, (tiny.BATCH, tiny.SIZE, tiny.SIZE, tiny.CHANNELS))
    chex.assert_shape(batch.label, (tiny.BATCH,))
    assert batch.image.dtype == jnp.float32 and batch.label.dtype == jnp.int32
    assert 0 <= batch.label.min() and batch.label.max() < tiny.CLASSES
    chex.assert_tree_all_finite(batch)


# 2. CPSC-DFKD against the reference implementation: one step, term by term.

TERMS = {'adversarial': 'kd', 'bn': 'bn', 'contrast': 'scl', 'ce': 'ce'}  # theirs: ours
SIZES = dict(latent=32, width=16, image_size=32, channels=3)


# Of the ten million ReLU inputs in the golden step, these are so near the kink that the rounding of
# a machine decides on their side; one such unit changes gradients by up to 1e-2 of their largest
# entry.  ReLU:unit and the side that the reference took.
TEACHER_SIDES = """2:524438- 3:34901+ 4:183634+ 4:268036- 4:370747+ 4:377582- 4:426880- 5:61413+
    6:21222- 6:316468- 7:52767- 8:148355+ 10:117251+ 10:160231+ 11:162613-"""
STUDENT_SIDES = """0:57311+ 0:274957- 1:551014- 2:189352- 2:336217- 2:629484+ 3:142239+ 3:452368-
    4:36707+ 4:251679- 4:538260- 4:598743- 4:600146- 6:38223+ 6:312188- 6:314284+ 6:326695+ 7:21487+
    7:145958+ 7:226230- 8:24409- 8:267729+ 8:272255+ 8:277113- 8:305889+ 9:91195+ 10:49307+
    10:145655+ 10:150008+ 10:158880- 11:13655- 11:100925- 12:15303- 12:106848- 12:126358+"""


class Reference(NamedTuple):
    """The networks of the golden step, and what came out."""

    golden: Any
    config: Any
    nets: contract.Models
    frozen: contract.Frozen
    student: dict
    generator: dict
    z: np.ndarray
    label: np.ndarray


@pytest.fixture(scope='module')
def reference(golden: Path, rule) -> Reference:
    facts = json.loads((golden / 'steps' / 'cpsc_step.json').read_text())
    classes, batch = facts['num_classes'], facts['batch']
    assert {name: facts[name] for name in ('latent', 'width', 'image_size')} == {
        name: SIZES[name] for name in ('latent', 'width', 'image_size')
    }

    def by_rule(name: str, prefix: str, sizes: dict, *inputs: Any) -> tuple[Any, dict]:
        module = models.make(name, num_classes=classes, **sizes)
        shapes = jax.eval_shape(lambda key: module.init(key, *inputs), jax.random.key(0))
        zeros = jax.tree.map(lambda x: np.zeros(x.shape, np.float32), shapes)
        keys = {key: x.shape for key, x in port.to_torch(name, zeros).items()}
        weights = rule.state_dict(keys.items(), prefix)
        return module, port.from_torch(name, weights, num_classes=classes, **sizes)

    image = jnp.zeros((1, 32, 32, 3))
    teacher, teacher_variables = by_rule('wrn16_2', '', {}, image)
    student, student_variables = by_rule('wrn16_2', 'student.', {}, image)
    generator, generator_variables = by_rule(
        'cpsc_generator', 'generator.', SIZES, jnp.zeros((1, SIZES['latent'])), jnp.zeros(1, int)
    )
    config = tiny.config(
        loss__double_softmax=True, synthesis__batch_size=batch, synthesis__student_batch_size=batch,
        student__warmup_steps=0, student__lr=0.1,
    )  # fmt: skip
    nets = contract.Models(
        Sided(teacher, TEACHER_SIDES),
        Sided(student, STUDENT_SIDES),
        generator,
        classes,
        (32, 32, 3),
        (0.5,) * 3,
        (0.25,) * 3,
    )
    return Reference(
        np.load(golden / 'steps' / 'cpsc_step.npz'), config, nets,
        contract.Frozen(teacher_variables), student_variables, generator_variables,
        rule.normal('z:cpsc_step', (batch, SIZES['latent'])), np.arange(batch) % classes,
    )  # fmt: skip


def torch_gradients(name: str, params: Any, variables: dict) -> dict[str, np.ndarray]:
    """Gradients under PyTorch's names, in its layout."""
    return port.to_torch(
        name, {'params': jax.device_get(params), 'batch_stats': variables['batch_stats']}
    )


def test_every_generator_term_and_gradient_equals_the_reference(reference: Reference):
    r, nets = reference, reference.nets

    def terms(params: Any) -> dict[str, jax.Array]:
        variables = r.generator | {'params': params}
        image, _ = nets.generator.apply(variables, r.z, r.label, mutable=['batch_stats'])
        teacher = nets.teacher.apply(r.frozen.teacher, image)
        student, _ = nets.student.apply(r.student, image, train=True, mutable=['batch_stats'])
        views = jnp.stack([losses.normalise(out.features) for out in (student, teacher)])
        given = (
            teacher,
            student,
            views,
            r.frozen.teacher['batch_stats'],
            r.label,
            sharding.Shards(),
        )
        with r.config.unlocked():
            plain = r.config.loss.copy_and_resolve_references()
        plain.update(double_softmax=False)
        logarithm = r.config.loss.copy_and_resolve_references()
        logarithm.update(ikd_form='log')
        once = cpsc.generator_terms(plain, *given)
        other = cpsc.generator_terms(logarithm, *given)
        return {
            'adversarial': once['kd'], 'ikd_mse': once['ikd'], 'ikd_log': other['ikd'],
            'bn': once['bn'], 'contrast': once['scl'], 'ce_on_probabilities': other['ce'],
            'ce': once['ce'],
        }, (image, teacher, student)  # fmt: skip

    @jax.jit
    def measure(params: Any) -> Any:
        value, pullback, aux = jax.vjp(terms, params, has_aux=True)
        names = list(value)
        cotangents = dict(zip(names, jnp.eye(len(names))))
        return value, jax.vmap(lambda c: pullback(c)[0])(cotangents), aux

    value, grads, (image, teacher, student) = measure(r.generator['params'])
    near(np.transpose(image, (0, 3, 1, 2)), r.golden['images'], 'images')
    near(teacher.logits, r.golden['teacher_logits'], 'teacher logits')
    near(losses.normalise(teacher.features), r.golden['teacher_features'], 'teacher features')
    near(student.logits, r.golden['student_logits_train'], 'student logits')
    for i, term in enumerate(value):
        near(value[term], r.golden[f'loss/{term}'], f'loss/{term}')
        own = jax.tree.map(lambda x, i=i: x[i], grads)
        norm = optax.tree_utils.tree_norm(own)
        near(norm, r.golden[f'gradnorm/{term}'], f'gradnorm/{term}')
        theirs = torch_gradients('cpsc_generator', own, r.generator)
        stored = [k for k in r.golden if k.startswith(f'grad/{term}/')]
        assert len(stored) == 3
        for name in stored:
            near(theirs[name.removeprefix(f'grad/{term}/')], r.golden[name], name)


def state_of(r: Reference, method: Method) -> State:
    """The start of the golden step: its networks, with fresh optimisers."""
    state = jax.eval_shape(method.init, r.frozen, jax.random.key(0))
    state = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), state)
    return state.replace(
        student=state.student.replace(**r.student), generator=state.generator.replace(**r.generator)
    )


def with_draws(r: Reference, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the method draw the golden latents and classes."""
    normal = jax.random.normal

    def draw(key: jax.Array, shape: Any = (), *args: Any) -> jax.Array:
        # flax asks for the shapes of initial weights in the same way.
        return jnp.asarray(r.z) if tuple(shape) == r.z.shape else normal(key, shape, *args)

    monkeypatch.setattr(jax.random, 'normal', draw)
    monkeypatch.setattr(jax.random, 'randint', lambda *_: jnp.asarray(r.label, jnp.int32))


def test_the_generator_step_takes_the_reference_total(
    reference: Reference, monkeypatch: pytest.MonkeyPatch
):
    r = reference
    method = cpsc.make(r.config, r.nets, sharding.Shards())
    state = state_of(r, method)
    with_draws(r, monkeypatch)

    def gradients_as_params(net, grads, tx, batch_stats=None):
        return net.replace(params=grads)

    monkeypatch.setattr(contract, 'update', gradients_as_params)
    after, metrics = jax.jit(method.generator_step)(r.frozen, state, jax.random.key(0))
    near(metrics['g/loss'], r.golden['generator_total'], 'generator_total')
    weights = {'adversarial': 1, 'ikd_mse': 5, 'bn': 1, 'contrast': 0.7, 'ce_on_probabilities': 0.7}
    for term, ours in (('adversarial', 'kd'), ('ikd_mse', 'ikd'), ('bn', 'bn'), ('contrast', 'scl'),
                       ('ce_on_probabilities', 'ce')):  # fmt: skip
        near(metrics[f'g/{ours}'], r.golden[f'loss/{term}'], term)
    theirs = torch_gradients('cpsc_generator', after.generator.params, r.generator)
    for name in ('conv_blocks3_0.weight', 'conv_blocks0_0.weights.weight', 'l1.0.bias'):
        total = sum(w * r.golden[f'grad/{term}/{name}'] for term, w in weights.items())
        near(theirs[name], total, name)


def test_every_student_term_and_gradient_equals_the_reference(reference: Reference):
    r = reference
    image = np.transpose(r.golden['images'], (0, 2, 3, 1))

    def terms(params: Any) -> dict[str, jax.Array]:
        variables = r.student | {'params': params}
        out, _ = r.nets.student.apply(variables, image, train=True, mutable=['batch_stats'])
        given = (out.logits, r.golden['teacher_logits'], r.label, sharding.Shards())
        once = cpsc.student_terms(r.config.loss, *given)
        logarithm = r.config.loss.copy_and_resolve_references()
        logarithm.update(ikd_form='log')
        other = cpsc.student_terms(logarithm, *given)
        return {
            'kd': once['kd'], 'ikd_mse': once['ikd'], 'ikd_log_norm': other['ikd'],
            'ce_on_probabilities': once['ce'],
        }  # fmt: skip

    @jax.jit
    def measure(params: Any) -> Any:
        return terms(params), jax.jacrev(terms)(params)

    value, grads = measure(r.student['params'])
    for term in value:
        near(value[term], r.golden[f'student_loss/{term}'], term)
        norm = optax.tree_utils.tree_norm(grads[term])
        near(norm, r.golden[f'student_gradnorm/{term}'], f'student_gradnorm/{term}')
        fc = torch_gradients('wrn16_2', grads[term], r.student)['fc.weight']
        near(fc, r.golden[f'student_grad/{term}/fc.weight'], f'student_grad/{term}')


def test_a_student_step_ends_at_the_reference_weights(
    reference: Reference, monkeypatch: pytest.MonkeyPatch
):
    r = reference
    method = cpsc.make(r.config, r.nets, sharding.Shards())
    state = state_of(r, method)
    with_draws(r, monkeypatch)
    after, metrics = jax.jit(method.student_step)(r.frozen, state, jax.random.key(0))
    for term, ours in (('kd', 'kd'), ('ikd_mse', 'ikd'), ('ce_on_probabilities', 'ce')):
        near(metrics[f's/{ours}'], r.golden[f'student_loss/{term}'], term)
    theirs = torch_gradients('wrn16_2', after.student.params, r.student)
    before = torch_gradients('wrn16_2', r.student['params'], r.student)
    for name, golden in (('fc', 'student_fc_after_sgd'), ('conv1', 'student_conv1_after_sgd')):
        weight = f'{name}.weight'
        near(theirs[weight], r.golden[golden], weight)
        near(
            theirs[weight] - before[weight], r.golden[golden] - before[weight], f'step of {weight}'
        )


# 3. CPSC-DFKD's choices.


def shape_of(config: Any, step: str = 'generator_step', **nets_changes: Any) -> Any:
    """What a step would return, traced and not compiled."""
    method = tiny.method(config, sharding.Shards(), **nets_changes)
    key = jax.random.key(0)
    frozen = jax.eval_shape(tiny.frozen)
    state = jax.eval_shape(method.init, frozen, key)
    return jax.eval_shape(getattr(method, step), frozen, state, key)


@pytest.mark.parametrize('term', ['kd', 'ikd', 'bn', 'scl', 'ce'])
def test_a_term_of_weight_zero_is_left_out(term: str):
    _, metrics = shape_of(tiny.config(**{f'loss__{term}': 0.0}))
    assert set(metrics) == {'g/kd', 'g/ikd', 'g/bn', 'g/scl', 'g/ce', 'g/loss', 'g/hit'} - {
        f'g/{term}'
    }
    _, metrics = shape_of(tiny.config(**{f'loss__{term}': 0.0}), 'student_step')
    assert set(metrics) == {'s/kd', 's/ikd', 's/ce', 's/loss', 's/agreement'} - {f's/{term}'}


def test_pseudo_labels_can_be_kept_from_the_student():
    config = tiny.config(loss__student_pseudo_labels=False)
    assert 'g/ce' in shape_of(config)[1]
    assert 's/ce' not in shape_of(config, 'student_step')[1]


def test_bounded_images_stay_within_the_range_of_pixels():
    mean, std = np.float32([[[[0.5, 0.286, 0.1]]]]), np.float32([[[[0.25, 0.353, 0.3]]]])
    x = np.linspace(-30, 30, 601, dtype=np.float32)[:, None, None, None] * np.ones(3, np.float32)
    pixel = np.asarray(cpsc.bound(x, mean, std)) * std + mean
    np.testing.assert_allclose(pixel[0], 0, atol=1e-6)
    np.testing.assert_allclose(pixel[-1], 1, atol=1e-6)
    assert np.all(np.diff(pixel, axis=0) >= -1e-6)
    value, slope = jax.jvp(lambda x: cpsc.bound(x, mean, std), (0 * x[0:1],), (x[0:1] ** 0,))
    np.testing.assert_allclose(value, 0, atol=1e-6)
    np.testing.assert_allclose(slope, 1, rtol=1e-5)


@pytest.mark.parametrize('bounded', [False, True])
def test_bounded_samples(bounded: bool):
    """The networks of `tiny` normalise by mean 0.5 and deviation 0.25: pixels are in [-2, 2]."""
    method = tiny.method(tiny.config(generator__bounded=bounded), sharding.Shards())
    key = jax.random.key(0)
    state = jax.jit(method.init)(None, key)
    bias = state.generator.params['norm3']['bias']
    state.generator.params['norm3']['bias'] = bias + 9.0
    image = method.sample(None, state, key).image
    assert bool(jnp.max(image) <= 2) == bounded


def test_images_are_dimmed_each_by_its_own_factor():
    key = jax.random.key(0)
    full, dim = (
        tiny.method(tiny.config(generator__darkest=darkest), sharding.Shards())
        for darkest in (1.0, 0.25)
    )
    state = jax.jit(full.init)(None, key)
    bright, dark = (0.5 + 0.25 * method.sample(None, state, key).image for method in (full, dim))
    factor = np.asarray(dark / bright)
    per_image = factor.mean((1, 2, 3))
    np.testing.assert_allclose(factor / per_image[:, None, None, None], 1, rtol=1e-3)
    assert 0.25 <= per_image.min() < 0.5 and 0.75 < per_image.max() <= 1


@pytest.mark.parametrize('darkest', [0.0, 1.5])
def test_exposure_out_of_range(darkest: float):
    with pytest.raises(ValueError, match='darkest.*expected above 0'):
        tiny.method(tiny.config(generator__darkest=darkest), sharding.Shards())


def test_the_student_sees_the_images_that_the_generator_trained_on():
    p = program('cpsc with a bank', 'jit')
    state = synthesised(p)
    kept = state.extra.bank
    assert int(kept.written) == tiny.BATCH
    key = jax.random.split(jax.random.fold_in(key_of(0)[0], 0), 3)
    label = jax.random.randint(key[1], (tiny.BATCH,), 0, tiny.CLASSES)
    np.testing.assert_array_equal(kept.label[: tiny.BATCH], label)
    assert np.ptp(kept.image[: tiny.BATCH]) > 100 and not np.any(kept.image[tiny.BATCH :])
    # Nothing but the bank reaches the student: of another one it learns something else.
    other = kept.replace(image=255 - kept.image)
    ends = [
        p.student_step(p.frozen, synthesised(p).replace(extra=state.extra.replace(bank=bank)),
                       key_of(1))[1]['s/kd']
        for bank in jax.tree.map(jnp.copy, (kept, other, kept))
    ]  # fmt: skip
    assert ends[0] != ends[1] and ends[0] == ends[2]


def test_a_bank_needs_bounded_images_in_whole_batches():
    for changes, match in (
        (dict(synthesis__bank=tiny.BATCH), 'bounded=True'),
        (dict(synthesis__bank=tiny.BATCH + 1, generator__bounded=True), 'a positive multiple'),
        (dict(synthesis__shade=0.5), 'set config.synthesis.bank'),
        (
            dict(synthesis__cutmix=1.5, synthesis__bank=tiny.BATCH, generator__bounded=True),
            'cutmix=1.5: expected 0 to 1',
        ),
    ):
        with pytest.raises(ValueError, match=match):
            tiny.method(tiny.config(**changes), sharding.Shards())


class Step(NamedTuple):
    """A method's compiled generator step, and its start."""

    run: Any
    frozen: contract.Frozen
    state: State


@cache
def generator_step(as_published: bool, adapter_normalise: bool = True) -> Step:
    """Of a student narrower than its teacher."""
    config = tiny.config(
        generator__reset_adam=as_published, loss__double_softmax=as_published,
        synthesis__update_student_statistics=as_published,
        loss__adapter_normalise=adapter_normalise,
    )  # fmt: skip
    method = tiny.method(config, sharding.Shards(), student_width=4)
    frozen = tiny.frozen()
    return Step(
        jax.jit(method.generator_step), frozen, jax.jit(method.init)(frozen, jax.random.key(0))
    )


def moves(step: Step, times: int = 3) -> tuple[list[np.ndarray], State, dict]:
    """How far each generator weight moved in each of some steps."""
    state, rows, metrics = step.state, [], {}
    for i in range(times):
        before = jax.device_get(state.generator.params)
        state, metrics = step.run(step.frozen, state, jax.random.key(i))
        after = jax.device_get(state.generator.params)
        rows.append(np.concatenate([np.ravel(a - b) for a, b in zip(
            jax.tree.leaves(after), jax.tree.leaves(before))]))  # fmt: skip
    return rows, state, metrics


def test_a_new_adam_at_every_step_is_sign_descent():
    rate = tiny.config().generator.lr
    published, _, _ = moves(generator_step(True))
    for row in published:
        moved = np.abs(row[row != 0])
        assert np.mean(np.isclose(moved, rate, rtol=1e-2)) > 0.9
    persistent, _, _ = moves(generator_step(False))
    assert np.mean(np.isclose(np.abs(persistent[0]), rate, rtol=1e-2)) > 0.9, (
        'the first is the same'
    )
    assert np.mean(np.isclose(np.abs(persistent[2]), rate, rtol=1e-2)) < 0.5


def test_the_published_student_keeps_statistics_of_synthesis():
    published, other = (generator_step(flag) for flag in (True, False))
    _, state, _ = moves(published, 1)
    assert not equal(state.student.batch_stats, published.state.student.batch_stats)
    assert equal(state.student.params, published.state.student.params)
    assert equal(state.student.opt_state, published.state.student.opt_state)
    _, state, _ = moves(other, 1)
    assert equal(state.student, other.state.student)


def test_the_published_cross_entropy_is_one_nat_wide():
    low, high = np.log((np.e + tiny.CLASSES - 1) / np.e), np.log(np.e + tiny.CLASSES - 1)
    step = generator_step(True)
    for scale in (1e-3, 1.0, 1e3):
        frozen = jax.tree.map(jnp.copy, step.frozen)
        frozen.teacher['params']['fc']['kernel'] *= scale
        _, metrics = step.run(frozen, step.state, jax.random.key(0))
        assert low <= metrics['g/ce'] <= high


def test_narrow_students_meet_the_contrast_through_an_untrained_adapter():
    step = generator_step(False)
    shapes = jax.tree.map(jnp.shape, step.state.extra.adapter)
    assert shapes == {
        'hidden': {'kernel': (4, 4), 'bias': (4,)}, 'out': {'kernel': (4, 8), 'bias': (8,)}
    }  # fmt: skip
    _, state, metrics = moves(step, 1)
    assert equal(state.extra, step.state.extra)
    _, _, published = moves(generator_step(False, adapter_normalise=False), 1)
    assert not np.isclose(metrics['g/scl'], published['g/scl'], rtol=1e-3)
    np.testing.assert_allclose(metrics['g/kd'], published['g/kd'], rtol=1e-5)
    state = jax.eval_shape(
        tiny.method(tiny.config(), sharding.Shards()).init, None, jax.random.key(0)
    )
    assert state.extra.adapter == {}, 'none where widths agree'


def rate_at(config: Any, step: int) -> float:
    """The student's learning rate at an update, read from what the optimiser does."""
    tx = cpsc._student_optimiser(config)
    state = optax.tree_utils.tree_set(tx.init(jnp.zeros(())), count=jnp.asarray(step))
    updates, _ = tx.update(jnp.ones(()), state, jnp.zeros(()))
    return -float(updates)


def test_the_published_schedule_has_the_authors_values():
    config = cifar100.get_config('cpsc,as_published')
    epoch_steps = 50 * config.phases[0].s_steps
    expected = {1: 0.01, 5: 0.05, 10: 0.1, 11: 0.09999, 50: 0.0989, 100: 0.0946, 300: 0.0526,
                500: 0.0081, 600: 6.9e-5}  # fmt: skip
    for epoch, rate in expected.items():
        first, last = (epoch - 1) * epoch_steps, epoch * epoch_steps - 1
        np.testing.assert_allclose(rate_at(config, first), rate, rtol=1e-2, atol=5e-6)
        assert rate_at(config, first) == rate_at(config, last), 'constant within an epoch'


def test_the_default_schedule_warms_up_and_falls_to_zero():
    config = cifar100.get_config('cpsc')
    total, warmup = 150_000, config.student.warmup_steps
    rates = [rate_at(config, step) for step in (0, warmup // 2, warmup, total // 2, total)]
    np.testing.assert_allclose(rates[:3], (0.0, 0.05, 0.1), atol=1e-6)
    assert 0 < rates[3] < 0.06 and abs(rates[4]) < 1e-8


def test_the_generators_rate_is_constant_or_falls_to_zero():
    grads = jnp.ones(())
    for decay in (False, True):
        config = tiny.config(generator__decay=decay)
        tx = cpsc._generator_optimiser(config)
        state = tx.init(grads)
        moved = []
        for _ in range(cpsc._total_steps(config, 'g_steps') + 1):
            updates, state = tx.update(grads, state)
            moved.append(-float(updates))
        np.testing.assert_allclose(moved[0], config.generator.lr, rtol=1e-5)
        assert (moved[-1] < 1e-8) == decay


def test_as_published_sets_every_documented_choice():
    published, ours = (cifar100.get_config(arg) for arg in ('cpsc,as_published', 'cpsc'))
    for field, value in {
        'loss.double_softmax': True, 'generator.reset_adam': True, 'loss.adapter_normalise': False,
        'synthesis.update_student_statistics': True, 'student.schedule': 'published',
        'generator.spread': 0.0, 'generator.decay': False, 'synthesis.crop_padding': 0,
        'synthesis.flip': False, 'loss.temperature': 1.0, 'student.nesterov': False,
        'loss.student_pseudo_labels': True, 'generator.bounded': False,
        'synthesis.bank': 0, 'generator.darkest': 1.0, 'synthesis.shade': 0.0,
        'synthesis.cutmix': 0.0, 'generator.class_brightness': True,
    }.items():  # fmt: skip
        group, name = field.split('.')
        assert published[group][name] == value, field
        assert field in cpsc.__doc__, f'{field} is not told of'
    assert not any((ours.loss.double_softmax, ours.generator.reset_adam))
