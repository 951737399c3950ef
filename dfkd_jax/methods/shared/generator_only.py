"""A generator of latents and a student in turns: what DAFL, ZSKT, DFAD and DFQ share.

No class is asked for and no image is kept.  A step of the generator G draws z ~ N(0, I) and
minimises a weighted sum of terms, functions of what the networks make of G(z); a step of the
student draws G(z) anew and minimises a sum of its own.  A method is two tables of terms, named as
their weights in `config.loss`.  Besides, the config chooses

    synthesis.fresh       latents are drawn at every step; False: once a batch of synthesis, for
                          the steps of generator and student alike
    synthesis.adversary   what the generator plays against: 'train', the student as it trains, its
                          batch norms on the batch's own moments (which it does not remember);
                          'eval', on their running ones; 'teacher', the teacher itself
    student.optimiser     'sgd' or 'adam'; its rate falls by a cosine to `final_lr`, or to a tenth
                          after each of `milestones`, shares of the run
    student.clip          the largest norm of a gradient, the generator's too; 0: any
    generator.decay       whether the generator's rate falls as the student's does

    loss.student          'msarc': the loss of `msarc.py` in place of the student's term 'kd'

Where a term named 'bn' has a weight and the teacher has no batch norms, see `image_prior.py`.

'teacher' is a mistake of the Fast-DFKD benchmark's code (Fast-Datafree, issue 11), which hands the
teacher over as the student: the adversarial term is then zero and so is its gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import struct

from dfkd_jax import contract, losses
from dfkd_jax.contract import Array, Batch, Frozen, Key, Method, Metrics, Models, Params, State
from dfkd_jax.distributed.sharding import Shards
from dfkd_jax.methods.shared import image_prior
from dfkd_jax.methods.shared import msarc as imitation

CHOICES = {
    'synthesis.adversary': ('train', 'eval', 'teacher'),
    'student.optimiser': ('sgd', 'adam'),
    'generator.ending': ('pixels', 'norm', 'affine'),
}


class Outputs(NamedTuple):
    """What the networks make of a batch of synthetic images; a term is a function of it.

    teacher, student: their `Output`s; the student is None where a generator has no adversary.
    running: the teacher's running statistics.
    shards: to average what is a property of the whole batch.
    """

    teacher: Any
    student: Any
    running: Params
    shards: Shards


Term = Callable[[Outputs], Array]  # a scalar, the mean over this instance's share of the batch


class Latents(struct.PyTreeNode):
    """The method's own state where a round has one batch: z [B, latent], the same everywhere."""

    z: Array


def make(
    config: Any,
    models: Models,
    shards: Shards,
    generator_terms: Mapping[str, Term],
    student_terms: Mapping[str, Term],
) -> Method:
    """A method from the terms that its generator and its student minimise.

    A term of weight 0 is left out of the program; 'adversarial' is the one that sees the student.
    Raises ValueError where a batch, a choice or the generator does not fit.
    """
    _check(config, models, shards)
    loss, synthesis = config.loss, config.synthesis
    student_tx, generator_tx = optimisers(config)
    generator_terms = {name: term for name, term in generator_terms.items() if loss[name]}
    student_terms = {name: term for name, term in student_terms.items() if loss[name]}
    msarc = imitation.make(config, models.teacher, models.student, models.image_shape, shards)
    if msarc is not None:
        student_terms.pop('kd', None)

    def init(frozen: Frozen, key: Key) -> State:
        del frozen
        key_student, key_generator = jax.random.split(key)
        student = models.student.init(key_student, jnp.zeros((1, *models.image_shape)))
        latent = models.generator.latent
        generator = models.generator.init(key_generator, jnp.zeros((1, latent)))
        return State(
            round=contract.first_round(),
            student=contract.start(student['params'], student.get('batch_stats', {}), student_tx),
            generator=contract.start(generator['params'], generator['batch_stats'], generator_tx),
            extra=() if synthesis.fresh else Latents(jnp.zeros((synthesis.batch_size, latent))),
        )

    def begin(frozen: Frozen, state: State, key: Key) -> tuple[State, Metrics]:
        """The latents of a batch."""
        del frozen
        z = jax.random.normal(key, (synthesis.batch_size, models.generator.latent))
        return state.replace(extra=Latents(z)), {}

    def latents(state: State, key: Key, batch_size: int) -> Array:
        """This instance's share of the latents of a step."""
        if synthesis.fresh:
            return shards.share(jax.random.normal(key, (batch_size, models.generator.latent)))
        return shards.share(state.extra.z)

    def generator_step(frozen: Frozen, state: State, key: Key) -> tuple[State, Metrics]:
        z = latents(state, key, synthesis.batch_size)

        def generator_loss(params: Params) -> tuple[Array, tuple]:
            variables = {'params': params, 'batch_stats': state.generator.batch_stats}
            image, batch_stats = generate(models, variables, z)
            teacher = models.teacher.apply(frozen.teacher, image)
            student = None
            if 'adversarial' in generator_terms:
                student = adversary(synthesis.adversary, models, frozen, state, image)
            running = frozen.teacher.get('batch_stats', {})
            terms = {name: f for name, f in generator_terms.items() if name != 'bn' or running}
            total, values = weighted_sum(loss, terms, Outputs(teacher, student, running, shards))
            prior, prior_terms = image_prior.loss(config, frozen, image)
            total = total + prior
            return total, (values | prior_terms | {'loss': total}, batch_stats)

        (_, (values, batch_stats)), grads = shards.value_and_grad(generator_loss)(
            state.generator.params
        )
        generator = contract.update(state.generator, grads, generator_tx, batch_stats)
        metrics = shards.mean({'g/' + name: value for name, value in values.items()})
        return state.replace(generator=generator), metrics

    def sample(frozen: Frozen, state: State, key: Key) -> Batch:
        """A batch as the student would see it, labelled by the teacher."""
        return labelled(frozen, state, latents(state, key, synthesis.student_batch_size))

    def held_out(frozen: Frozen, state: State, key: Key) -> Batch:
        """As `sample`, of latents drawn for it alone."""
        shape = (synthesis.student_batch_size, models.generator.latent)
        return labelled(frozen, state, shards.share(jax.random.normal(key, shape)))

    def labelled(frozen: Frozen, state: State, z: Array) -> Batch:
        image, _ = generate(models, state.generator.variables, z)
        logits = models.teacher.apply(frozen.teacher, image).logits
        return Batch(image, jnp.argmax(logits, -1).astype(jnp.int32))

    def student_step(frozen: Frozen, state: State, key: Key) -> tuple[State, Metrics]:
        z = latents(state, key, synthesis.student_batch_size)
        image, _ = generate(models, state.generator.variables, z)
        teacher = models.teacher.apply(frozen.teacher, image)
        aim = msarc and msarc.aim(frozen.teacher, state.student.variables, image, teacher)

        def student_loss(params: Params) -> tuple[Array, tuple]:
            variables = {'params': params, 'batch_stats': state.student.batch_stats}
            student, batch_stats = apply_in_train_mode(models.student, variables, image)
            running = frozen.teacher.get('batch_stats', {})
            total, values = weighted_sum(
                loss, student_terms, Outputs(teacher, student, running, shards)
            )
            if aim is not None:
                imitated, more = aim(student)
                total = total + imitated
                values |= more | {'loss': total}
            agreement = jnp.mean(losses.agreement(student.logits, teacher.logits))
            return total, (values | {'agreement': agreement}, batch_stats)

        (_, (values, batch_stats)), grads = shards.value_and_grad(student_loss)(
            state.student.params
        )
        student = contract.update(state.student, grads, student_tx, batch_stats)
        metrics = shards.mean({'s/' + name: value for name, value in values.items()})
        return state.replace(student=student), metrics

    return Method(
        init, generator_step, student_step, sample,
        begin=contract.unchanged if synthesis.fresh else begin, held_out=held_out,
    )  # fmt: skip


def generate(models: Models, variables: Any, z: Array) -> tuple[Array, Params]:
    """Images [B, H, W, channels] as the networks see them; the generator's new running statistics.

    z: [B, latent].
    """
    image, batch_stats = apply_in_train_mode(models.generator, variables, z)
    if models.generator.ending == 'pixels':
        image = models.normalise(image)
    return image, batch_stats


def apply_in_train_mode(module: Any, variables: Any, x: Array) -> tuple[Any, Params]:
    """What a network returns with the moments of the batch, and its new running statistics."""
    out, mutated = module.apply(variables, x, train=True, mutable=['batch_stats'])
    return out, mutated.get('batch_stats', {})


def adversary(kind: str, models: Models, frozen: Frozen, state: State, image: Array) -> Any:
    """The output of the network that the generator plays against.

    kind: `config.synthesis.adversary`.
    """
    if kind == 'teacher':
        return models.teacher.apply(frozen.teacher, image)
    if kind == 'eval':
        return models.student.apply(state.student.variables, image)
    return apply_in_train_mode(models.student, state.student.variables, image)[0]


def weighted_sum(
    weights: Any, terms: Mapping[str, Term], outputs: Outputs
) -> tuple[Array, Metrics]:
    """The sum of the terms, each times its weight in `config.loss`; and the terms themselves."""
    values = {name: term(outputs) for name, term in terms.items()}
    total = sum((weights[name] * value for name, value in values.items()), jnp.zeros(()))
    return total, values | {'loss': total}


def optimisers(config: Any) -> tuple[optax.GradientTransformation, optax.GradientTransformation]:
    """The student's and the generator's, with their learning rates over the whole run."""
    student, generator, phases = config.student, config.generator, config.phases

    def rate(start: float, steps: int, falls: bool = True) -> Any:
        if not falls:
            return start
        if student.milestones:
            drops = {round(share * steps): 0.1 for share in student.milestones}
            return optax.schedules.piecewise_constant_schedule(start, drops)
        final = student.final_lr / student.lr
        return optax.schedules.cosine_decay_schedule(start, max(steps, 1), final)

    clip = optax.clip_by_global_norm(student.clip) if student.clip else optax.identity()
    student_rate = rate(student.lr, sum(phase.rounds * phase.s_steps for phase in phases))
    student_tx = (
        optax.adam(student_rate, student.momentum)
        if student.optimiser == 'adam'
        else optax.sgd(student_rate, student.momentum)
    )
    steps = sum(phase.rounds * phase.loops * phase.g_steps for phase in phases)
    generator_tx = optax.adam(
        rate(generator.lr, steps, generator.decay), generator.beta1, generator.beta2
    )
    decay = optax.add_decayed_weights(student.weight_decay)
    return optax.chain(clip, decay, student_tx), optax.chain(clip, generator_tx)


def _check(config: Any, models: Models, shards: Shards) -> None:
    synthesis = config.synthesis
    shards.check('config.synthesis.batch_size', synthesis.batch_size)
    shards.check('config.synthesis.student_batch_size', synthesis.student_batch_size)
    if not synthesis.fresh and synthesis.batch_size != synthesis.student_batch_size:
        raise ValueError(
            f'config.synthesis.batch_size={synthesis.batch_size} and student_batch_size='
            f'{synthesis.student_batch_size} differ: make them equal, or set '
            'config.synthesis.fresh=True, since without it both train on one batch.'
        )
    for name, choices in CHOICES.items():
        group, field = name.split('.')
        if config[group][field] not in choices:
            raise ValueError(f'config.{name}={config[group][field]!r}; expected one of {choices}.')
    if not all(0 < share < 1 for share in config.student.milestones):
        raise ValueError(
            f'config.student.milestones={tuple(config.student.milestones)}: expected shares of the '
            'run, above 0 and below 1.'
        )
    if getattr(models.generator, 'conditioning', None) != 'none':
        raise ValueError(
            f'{config.method} needs a generator of latents alone: set config.generator.model to '
            'dcgan_generator or dcgan_deep_generator.'
        )
