"""Batches of images that a teacher takes for given classes, and a student that learns from them.

What the methods with a bank share: NAYER, CAE-DFKD, DeepInversion, CMI and Fast-DFKD.

A generator changes its images for some steps; those of the step with the lowest loss go to a bank.
With t, s the teacher's and the student's logits on them, and y the classes asked for, all but
DeepInversion lower

    L_G = bn L_BN + ce CE(t, y) - adversarial E[1(argmax s = argmax t) KL(t || s)]

L_BN compares the teacher's running statistics to a moving average over batches (`bn_momentum`), of
which only the newest share carries a gradient (NAYER's code, arXiv 2310.00258).

The student distils from the bank, with random crops and flips (CAE-DFKD's adds a term):

    L_S = T^2 KL(softmax(t / T) || softmax(s / T))
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import struct

from dfkd_jax import augment, contract, losses
from dfkd_jax.contract import (
    Array,
    Batch,
    Frozen,
    Key,
    Metrics,
    Models,
    Net,
    Params,
    SampleFn,
    State,
    StepFn,
)
from dfkd_jax.distributed.sharding import Shards
from dfkd_jax.methods.shared import image_bank as banks

HIGHEST = jnp.finfo(jnp.float32).max  # of a loss before the first; finite, as a state must be


class Making(struct.PyTreeNode):
    """The batch in the making, and what is remembered of those before; the same on all devices.

    label: [B], the classes of its images.
    source: [B], what else they are made from; 0 if nothing.
    best: [B, H, W, channels] pixels, the images of the step with the lowest loss so far.
    lowest: [] that loss.
    average: the moving average of the teacher's batch statistics, a tree like `batch_stats`.
    latest: the batch statistics of the last step.
    batches: [] int32, batches ever finished.
    """

    label: Array
    source: Array
    best: Array
    lowest: Array
    average: Params
    latest: Params
    batches: Array


def nothing(batch: int, image_shape: tuple[int, int, int], statistics: Params) -> Making:
    """Before the first batch; `statistics` are the teacher's `batch_stats`, for their shapes."""
    zeros = jax.tree.map(jnp.zeros_like, statistics)
    return Making(
        label=jnp.zeros((batch,), jnp.int32),
        source=jnp.zeros((batch,), jnp.int32),
        best=jnp.zeros((batch, *image_shape)),
        lowest=jnp.full((), HIGHEST),
        average=zeros,
        latest=zeros,
        batches=jnp.zeros((), jnp.int32),
    )


def begin(making: Making, label: Array, source: Array | None = None) -> Making:
    """A batch of these classes and sources, [B] each, of which no image is made yet."""
    source = jnp.zeros_like(label) if source is None else source
    return making.replace(label=label, source=source, lowest=jnp.full((), HIGHEST))


def loss(
    weights: Any,
    making: Making,
    teacher: Any,
    student_logits: Array,
    running: Params,
    label: Array,
    adversary: Array,
) -> tuple[Array, Metrics]:
    """L_G and its terms, with the share of images that the teacher takes for their class.

    weights: `config.loss`.  teacher: its output on the images, batch statistics of the whole batch
    among it.  running: its `batch_stats`.  label: [B], this instance's share.  adversary: [] bool,
    whether the student has a say.
    """
    smooth = losses.averaged(
        making.average, teacher.statistics, weights.bn_momentum, making.batches
    )
    terms = {
        'bn': losses.bn_statistics(smooth, running),
        'ce': jnp.mean(losses.cross_entropy(teacher.logits, label)),
        'adversarial': jnp.mean(losses.adversarial(student_logits, teacher.logits)),
    }
    scales = {'bn': weights.bn, 'ce': weights.ce}
    scales['adversarial'] = jnp.where(adversary, weights.adversarial, 0.0)
    total = sum((scales[name] * term for name, term in terms.items()), jnp.zeros(()))
    hit = jnp.mean(jnp.argmax(teacher.logits, -1) == label)
    return total, terms | {'loss': total, 'hit': hit}


def keep(making: Making, total: Array, pixel: Array, statistics: Params) -> Making:
    """After a step: its images (the whole batch's, [B, H, W, channels]) if its loss is lowest."""
    better = total < making.lowest
    return making.replace(
        best=jnp.where(better, pixel, making.best),
        lowest=jnp.where(better, total, making.lowest),
        latest=statistics,
    )


def finish(making: Making, bank: banks.Bank, momentum: float) -> tuple[Making, banks.Bank]:
    """The best images to the bank; the last step's statistics to their average."""
    average = losses.averaged(making.average, making.latest, momentum, making.batches)
    bank = banks.put(bank, making.best, making.label, making.source)
    return making.replace(average=average, batches=making.batches + 1), bank


def life_is_over(number: Array, renewed: Array, life: int, warmup: int) -> Array:
    """Whether a generator that lives for `life` rounds ends at a round, [] bool.

    Rounds count from the start and from the end of the warm-up, as in NAYER's code; a round has one
    end at the most: `renewed` is the round of the last one.
    """
    ends = (number % life == 0) | ((number - warmup) % life == 0)
    return ends & (number != renewed)


def check_latents(config: Any, models: Models) -> None:
    """Raises ValueError unless the generator makes pixels of plain latents."""
    if getattr(models.generator, 'ending', None) != 'pixels':
        raise ValueError(
            f'{config.method} needs a generator of pixels from plain latents: set '
            'config.generator.model to dcgan_generator or dcgan_deep_generator.'
        )


class Learner(NamedTuple):
    """A student and how it sees images: functions for a method whose state has `extra.bank`.

    tx: its optimiser.  start: it before its first step; the key is consumed.
    draw: this instance's crops and flips of a whole batch of a size; the key is consumed.
    view: pixels [B, H, W, channels] as a network sees them: cropped and flipped so, normalised.
    from_bank: this instance's share of a batch of the bank: pixels, labels and sources; the key is
        consumed.
    mix: pixels that other images of the bank, by the first key, lent their shades and parts.
    judge: L_G of this instance's images and labels, as `loss` has it, with the teacher's output;
        the student has a say once the warm-up is over.
    sample, step: as `contract.Method` has them.
    """

    tx: optax.GradientTransformation
    start: Callable[[Key], Net]
    draw: Callable[[Key, int], augment.Moves]
    view: Callable[[Array, augment.Moves], Array]
    from_bank: Callable[[State, Key], tuple[Array, Array, Array]]
    mix: Callable[[State, Array, Key, Key], Array]
    judge: Callable[[Frozen, State, Array, Array], tuple[Array, Metrics, Any]]
    sample: SampleFn
    step: StepFn


def learner(config: Any, models: Models, shards: Shards) -> Learner:
    """The student of a config.  Raises ValueError where its batch, bank or phases do not fit."""
    synthesis, temperature, shape = config.synthesis, config.loss.temperature, models.image_shape
    shards.check('config.synthesis.batch_size', synthesis.batch_size)
    shards.check('config.synthesis.student_batch_size', synthesis.student_batch_size)
    banks.check(synthesis)
    size, warmup = synthesis.student_batch_size, contract.warmup_rounds(config.phases)
    tx = contract.sgd_by_round(config.student, config.phases)

    def start(key: Key) -> Net:
        variables = models.student.init(key, jnp.zeros((1, *shape)))
        return contract.start(variables['params'], variables.get('batch_stats', {}), tx)

    def draw(key: Key, batch_size: int) -> augment.Moves:
        whole = augment.draw_moves(key, batch_size, synthesis.crop_padding, synthesis.flip)
        return jax.tree.map(shards.share, whole)

    def view(pixel: Array, moves: augment.Moves) -> Array:
        return models.normalise(augment.move(pixel, moves, synthesis.crop_padding))

    def from_bank(state: State, key: Key) -> tuple[Array, Array, Array]:
        rows = shards.share(banks.draw(state.extra.bank, key, size))
        return *banks.take(state.extra.bank, rows), state.extra.bank.source[rows]

    def mix(state: State, pixel: Array, key_other: Key, key_mix: Key) -> Array:
        if not synthesis.shade and not synthesis.cutmix:
            return pixel
        other, _, _ = from_bank(state, key_other)
        whole = augment.draw_mixture(key_mix, (size, *shape), synthesis.shade, synthesis.cutmix)
        return augment.mix(pixel, other, jax.tree.map(shards.share, whole))

    def judge(
        frozen: Frozen, state: State, image: Array, label: Array
    ) -> tuple[Array, Metrics, Any]:
        teacher = models.teacher.apply(frozen.teacher, image)
        student = models.student.apply(state.student.variables, image)
        running = frozen.teacher.get('batch_stats', {})
        total, terms = loss(
            config.loss,
            state.extra.making,
            teacher,
            student.logits,
            running,
            label,
            state.round >= warmup,
        )
        return total, terms, teacher

    def sample(frozen: Frozen, state: State, key: Key) -> Batch:
        del frozen
        pixel, label, _ = from_bank(state, key)
        return Batch(models.normalise(pixel), label)

    def step(frozen: Frozen, state: State, key: Key) -> tuple[State, Metrics]:
        key_bank, key_moves, key_other, key_mix = jax.random.split(key, 4)
        pixel = mix(state, from_bank(state, key_bank)[0], key_other, key_mix)
        image = view(pixel, draw(key_moves, size))
        teacher = models.teacher.apply(frozen.teacher, image)

        def student_loss(params: Params) -> tuple[Array, tuple]:
            variables = {'params': params, 'batch_stats': state.student.batch_stats}
            student, mutated = models.student.apply(
                variables, image, train=True, mutable=['batch_stats']
            )
            kd = jnp.mean(losses.kd(student.logits, teacher.logits, temperature))
            agreement = jnp.mean(losses.agreement(student.logits, teacher.logits))
            return kd, ({'kd': kd, 'agreement': agreement}, mutated.get('batch_stats', {}))

        (_, (terms, batch_stats)), grads = shards.value_and_grad(student_loss)(state.student.params)
        student = contract.update(state.student, grads, tx, batch_stats)
        metrics = shards.mean({'s/' + name: term for name, term in terms.items()})
        return state.replace(student=student), metrics

    return Learner(tx, start, draw, view, from_bank, mix, judge, sample, step)
