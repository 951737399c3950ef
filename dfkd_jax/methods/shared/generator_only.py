"""A generator of latents and a student in turns: what DAFL, ZSKT, DFAD and DFQ share.

No class is asked for and no image is kept.  A step of the generator G draws z ~ N(0, I) and lowers
a weighted sum of terms of what the networks make of G(z); a step of the student draws G(z) anew and
lowers a sum of its own.  A method is two tables of terms, whose names are those of their weights in
`config.loss`.  Besides, the config chooses

    synthesis.fresh       latents are drawn at every step; False: once a batch of synthesis, for
                          the steps of generator and student alike
    synthesis.adversary   whom the generator plays against: 'train', the student as it trains, its
                          batch norms on the batch's own moments (which it does not remember);
                          'eval', on their running ones; 'teacher', the teacher itself
    student.optimiser     'sgd' or 'adam'; its rate falls by a cosine to `final_lr`, or to a tenth
                          after each of `milestones`, shares of the run
    student.clip          the largest norm of a gradient, the generator's too; 0: any
    generator.decay       whether the generator's rate falls as the student's does

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

CHOICES = {
    'synthesis.adversary': ('train', 'eval', 'teacher'),
    'student.optimiser': ('sgd', 'adam'),
    'generator.ending': ('pixels', 'norm'),
}


class Seen(NamedTuple):
    """A batch of synthetic images in the networks' eyes: what a term is a function of.

    teacher, student: their `Output`s; the student is None where a generator has no adversary.
    running: the teacher's running statistics.
    shards: to average what is a property of the whole batch.
    """

    teacher: Any
    student: Any
    running: Params
    shards: Shards


Term = Callable[[Seen], Array]  # a scalar, the mean over this instance's share of the batch


class Latents(struct.PyTreeNode):
    """The method's own state where a round has one batch: z [B, latent], the same everywhere."""

    z: Array


def make(
    config: Any,
    models: Models,
    shards: Shards,
    of_generator: Mapping[str, Term],
    of_student: Mapping[str, Term],
) -> Method:
    """A method from the terms that its generator and its student lower.

    A term of weight 0 is left out of the program; 'adversarial' is the one that sees the student.
    Raises ValueError where a batch, a choice or the generator does not fit.
    """
    _check(config, models, shards)
    loss, synthesis = config.loss, config.synthesis
    shape, latent = models.image_shape, models.generator.latent
    student_tx, generator_tx = optimisers(config)
    of_generator = {name: term for name, term in of_generator.items() if loss[name]}
    of_student = {name: term for name, term in of_student.items() if loss[name]}

    def init(frozen: Frozen, key: Key) -> State:
        del frozen
        key_student, key_generator = jax.random.split(key)
        student = models.student.init(key_student, jnp.zeros((1, *shape)))
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
        z = jax.random.normal(key, (synthesis.batch_size, latent))
        return state.replace(extra=Latents(z)), {}

    def latents(state: State, key: Key, batch_size: int) -> Array:
        """This instance's share of a step's latents."""
        if synthesis.fresh:
            return shards.share(jax.random.normal(key, (batch_size, latent)))
        return shards.share(state.extra.z)

    def generate(variables: Any, z: Array) -> tuple[Array, Params]:
        """Images [B, H, W, channels] as the networks see them; G's new running statistics."""
        image, mutated = models.generator.apply(variables, z, train=True, mutable=['batch_stats'])
        if models.generator.ending == 'pixels':
            image = models.normalise(image)
        return image, mutated['batch_stats']

    def train_student(variables: Any, image: Array) -> tuple[Any, Params]:
        """The student in train mode, and its new running statistics."""
        out, mutated = models.student.apply(variables, image, train=True, mutable=['batch_stats'])
        return out, mutated.get('batch_stats', {})

    def adversary(frozen: Frozen, state: State, image: Array) -> Any:
        """The output of whom the generator plays against."""
        if synthesis.adversary == 'teacher':
            return models.teacher.apply(frozen.teacher, image)
        if synthesis.adversary == 'eval':
            return models.student.apply(state.student.variables, image)
        return train_student(state.student.variables, image)[0]

    def total(terms: Mapping[str, Term], seen: Seen) -> tuple[Array, Metrics]:
        """The weighted sum of the terms, and each."""
        values = {name: term(seen) for name, term in terms.items()}
        whole = sum((loss[name] * value for name, value in values.items()), jnp.zeros(()))
        return whole, values | {'loss': whole}

    def generator_step(frozen: Frozen, state: State, key: Key) -> tuple[State, Metrics]:
        z = latents(state, key, synthesis.batch_size)

        def generator_loss(params: Params) -> tuple[Array, tuple]:
            variables = {'params': params, 'batch_stats': state.generator.batch_stats}
            image, batch_stats = generate(variables, z)
            teacher = models.teacher.apply(frozen.teacher, image)
            student = adversary(frozen, state, image) if 'adversarial' in of_generator else None
            seen = Seen(teacher, student, frozen.teacher.get('batch_stats', {}), shards)
            whole, values = total(of_generator, seen)
            return whole, (values, batch_stats)

        (_, (values, batch_stats)), grads = shards.value_and_grad(generator_loss)(
            state.generator.params
        )
        generator = contract.update(state.generator, grads, generator_tx, batch_stats)
        return state.replace(generator=generator), _named('g/', values, shards)

    def sample(frozen: Frozen, state: State, key: Key) -> Batch:
        """A batch in the student's eyes, labelled by the teacher."""
        z = latents(state, key, synthesis.student_batch_size)
        image, _ = generate(state.generator.variables, z)
        logits = models.teacher.apply(frozen.teacher, image).logits
        return Batch(image, jnp.argmax(logits, -1).astype(jnp.int32))

    def student_step(frozen: Frozen, state: State, key: Key) -> tuple[State, Metrics]:
        z = latents(state, key, synthesis.student_batch_size)
        image, _ = generate(state.generator.variables, z)
        teacher = models.teacher.apply(frozen.teacher, image)

        def student_loss(params: Params) -> tuple[Array, tuple]:
            variables = {'params': params, 'batch_stats': state.student.batch_stats}
            out, batch_stats = train_student(variables, image)
            seen = Seen(teacher, out, frozen.teacher.get('batch_stats', {}), shards)
            whole, values = total(of_student, seen)
            agreement = jnp.mean(losses.agreement(out.logits, teacher.logits))
            return whole, (values | {'agreement': agreement}, batch_stats)

        (_, (values, batch_stats)), grads = shards.value_and_grad(student_loss)(
            state.student.params
        )
        student = contract.update(state.student, grads, student_tx, batch_stats)
        return state.replace(student=student), _named('s/', values, shards)

    return Method(
        init, generator_step, student_step, sample,
        begin=contract.unchanged if synthesis.fresh else begin,
    )  # fmt: skip


def optimisers(config: Any) -> tuple[optax.GradientTransformation, optax.GradientTransformation]:
    """The student's and the generator's."""
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
    if not hasattr(models.generator, 'ending'):
        raise ValueError(
            f'{config.method} needs a generator of plain latents: set config.generator.model to '
            'dcgan_generator or dcgan_deep_generator.'
        )


def _named(prefix: str, values: Metrics, shards: Shards) -> Metrics:
    return shards.mean({prefix + name: value for name, value in values.items()})
