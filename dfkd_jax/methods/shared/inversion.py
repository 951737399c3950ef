"""Batches of images that a teacher takes for given classes, and a student that learns from them.

What the methods with a bank share: NAYER, CAE-DFKD, DeepInversion, CMI and Fast-DFKD.

A generator changes its images for some steps; the images of the step with the lowest loss go to a
bank.  With t, s the teacher's and the student's logits on them, and y the classes asked for, all
methods but DeepInversion minimise

    L_G = bn L_BN + ce CE(t, y) - adversarial E[1(argmax s = argmax t) KL(t || s)]

L_BN compares the teacher's running statistics to a moving average over batches (`bn_momentum`), of
which only the newest share carries a gradient (NAYER's code, arXiv 2310.00258).  For a teacher
without batch norms see `image_prior.py`.

The student distils from the bank, with random crops and flips (CAE-DFKD's adds a term):

    L_S = T^2 KL(softmax(t / T) || softmax(s / T)), or that of `msarc.py`
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import struct

from dfkd_jax import augment, contract, losses
from dfkd_jax.contract import Array, Batch, Frozen, Key, Metrics, Models, Net, Params, State
from dfkd_jax.distributed.sharding import Shards
from dfkd_jax.methods.shared import image_bank as banks
from dfkd_jax.methods.shared import image_prior
from dfkd_jax.methods.shared import msarc as imitation

HIGHEST = jnp.finfo(jnp.float32).max  # of a loss before the first; finite, as a state must be


# 1. A batch of synthesis.


class SynthesisBatch(struct.PyTreeNode):
    """The batch under way, and what is remembered of earlier ones; the same on all devices.

    label: [B], the classes of its images.
    source: [B], what else they are made from; 0 if nothing.
    best: [B, H, W, channels] pixels, the images of the step with the lowest loss so far.
    lowest: [] that loss.
    average: the moving average of the teacher's batch statistics, a tree like `batch_stats`.
    latest: the batch statistics of the last step.
    batches: [] int32, batches finished so far.
    """

    label: Array
    source: Array
    best: Array
    lowest: Array
    average: Params
    latest: Params
    batches: Array


def empty_batch(
    batch_size: int, image_shape: tuple[int, int, int], statistics: Params
) -> SynthesisBatch:
    """The state before the first batch; `statistics` is a tree like the teacher's `batch_stats`."""
    zeros = jax.tree.map(jnp.zeros_like, statistics)
    return SynthesisBatch(
        label=jnp.zeros((batch_size,), jnp.int32),
        source=jnp.zeros((batch_size,), jnp.int32),
        best=jnp.zeros((batch_size, *image_shape)),
        lowest=jnp.full((), HIGHEST),
        average=zeros,
        latest=zeros,
        batches=jnp.zeros((), jnp.int32),
    )


def begin(batch: SynthesisBatch, label: Array, source: Array | None = None) -> SynthesisBatch:
    """A batch of these classes and sources, [B] each, without an image yet."""
    source = jnp.zeros_like(label) if source is None else source
    return batch.replace(label=label, source=source, lowest=jnp.full((), HIGHEST))


def keep_best(
    batch: SynthesisBatch, total: Array, pixel: Array, statistics: Params
) -> SynthesisBatch:
    """The batch after a step with the loss `total`, whose images are kept if it is the lowest.

    pixel: [B, H, W, channels], the images of the whole batch.  statistics: the teacher's of them.
    """
    better = total < batch.lowest
    return batch.replace(
        best=jnp.where(better, pixel, batch.best),
        lowest=jnp.where(better, total, batch.lowest),
        latest=statistics,
    )


def finish(
    batch: SynthesisBatch, bank: banks.Bank, momentum: float
) -> tuple[SynthesisBatch, banks.Bank]:
    """Puts the best images into the bank, and the last step's statistics into their average."""
    average = losses.moving_average(batch.average, batch.latest, momentum, batch.batches)
    bank = banks.put(bank, batch.best, batch.label, batch.source)
    return batch.replace(average=average, batches=batch.batches + 1), bank


def renewal_due(number: Array, last_renewal: Array, life: int, warmup: int) -> Array:
    """Whether round `number` renews a generator that lives for `life` rounds (0: for all), [] bool.

    As in NAYER's code, lives are counted from the start and from the end of the warm-up.  A round
    renews it once at most; last_renewal: [] int32, the round that did so last.
    """
    if not life:
        return jnp.zeros((), bool)
    due = (number % life == 0) | ((number - warmup) % life == 0)
    return due & (number != last_renewal)


def check_generator(config: Any, models: Models) -> None:
    """Raises ValueError unless the generator makes pixels of latents alone."""
    generator = models.generator
    if getattr(generator, 'conditioning', None) != 'none' or generator.ending != 'pixels':
        raise ValueError(
            f'{config.method} needs a generator of pixels from latents alone: set '
            'config.generator.model to dcgan_generator or dcgan_deep_generator, and '
            "config.generator.ending='pixels'."
        )


# 2. The two losses, and how networks see images.


class Learner(NamedTuple):
    """What a method with a bank does with its networks; its state has `extra.bank` and `.batch`.

    tx: the student's optimiser.
    msarc: the student's loss in place of the divergence, if any.
    """

    config: Any
    models: Models
    shards: Shards
    tx: optax.GradientTransformation
    msarc: imitation.Msarc | None

    def start(self, key: Key) -> Net:
        """The student before its first step.  The key is consumed."""
        variables = self.models.student.init(key, jnp.zeros((1, *self.models.image_shape)))
        return contract.start(variables['params'], variables.get('batch_stats', {}), self.tx)

    def draw_crop_flip(self, key: Key, batch_size: int) -> augment.CropFlip:
        """This instance's share of the crops and flips of a batch.  The key is consumed."""
        synthesis = self.config.synthesis
        whole = augment.draw_crop_flip(key, batch_size, synthesis.crop_padding, synthesis.flip)
        return jax.tree.map(self.shards.share, whole)

    def view(self, pixel: Array, drawn: augment.CropFlip) -> Array:
        """Pixels [B, H, W, channels] as a network sees them: cropped, flipped and normalised."""
        cropped = augment.crop_flip(pixel, drawn, self.config.synthesis.crop_padding)
        return self.models.normalise(cropped)

    def from_bank(self, state: State, key: Key) -> tuple[Array, Array, Array]:
        """This instance's share of a batch of the bank: pixels, labels and sources.

        The key is consumed.
        """
        bank, rows = state.extra.bank, self.shards.share(self.rows(state, key))
        return *banks.take(bank, rows), bank.source[rows]

    def rows(self, state: State, key: Key, apart: bool = False) -> Array:
        """Rows of the bank for a whole batch of the student, [B]; or of what it keeps apart.

        The key is consumed.
        """
        bank, synthesis = state.extra.bank, self.config.synthesis
        size, made = synthesis.student_batch_size, synthesis.batch_size
        if apart or self.models.hold_out:
            return banks.draw_part(bank, key, size, made, apart)
        return banks.draw(bank, key, size)

    def mix(self, state: State, pixel: Array, key_other: Key, key_mix: Key) -> Array:
        """Pixels shaded and partly covered by other images of the bank, which key_other draws."""
        synthesis = self.config.synthesis
        if not synthesis.shade and not synthesis.cutmix:
            return pixel
        other, _, _ = self.from_bank(state, key_other)
        shape = (synthesis.student_batch_size, *self.models.image_shape)
        whole = augment.draw_mixture(key_mix, shape, synthesis.shade, synthesis.cutmix)
        return augment.mix(pixel, other, jax.tree.map(self.shards.share, whole))

    def generator_loss(
        self, frozen: Frozen, state: State, image: Array, label: Array, learning: bool = True
    ) -> tuple[Array, Metrics, Any]:
        """L_G of this instance's images [B, H, W, channels] and labels [B], and its terms.

        The terms come with `hit`, the share of images that the teacher takes for their class.  A
        term of weight 0 is left out, and so is the student's while it is not `learning`, in the
        warm-up.  The third result is the teacher's output.
        """
        loss, batch = self.config.loss, state.extra.batch
        teacher = self.models.teacher.apply(frozen.teacher, image)
        running = frozen.teacher.get('batch_stats', {})
        terms = {}
        if running and loss.bn:
            smooth = losses.moving_average(
                batch.average, teacher.statistics, loss.bn_momentum, batch.batches
            )
            terms['bn'] = losses.bn_statistics(smooth, running, loss.bn_form)
        if loss.ce:
            terms['ce'] = jnp.mean(losses.cross_entropy(teacher.logits, label))
        if loss.adversarial and learning:
            student = self.models.student.apply(state.student.variables, image)
            terms['adversarial'] = jnp.mean(losses.adversarial(student.logits, teacher.logits))
        prior, prior_terms = image_prior.loss(self.config, frozen, image)
        total = sum((loss[name] * term for name, term in terms.items()), prior)
        hit = jnp.mean(jnp.argmax(teacher.logits, -1) == label)
        return total, terms | prior_terms | {'loss': total, 'hit': hit}, teacher

    def sample(self, frozen: Frozen, state: State, key: Key) -> Batch:
        """See `contract.Method`: a batch of the bank, before augmentation."""
        del frozen
        pixel, label, _ = self.from_bank(state, key)
        return Batch(self.models.normalise(pixel), label)

    def held_out(self, frozen: Frozen, state: State, key: Key) -> Batch:
        """See `contract.Method`: a batch of what the bank keeps from the student."""
        del frozen
        rows = self.shards.share(self.rows(state, key, apart=True))
        pixel, label = banks.take(state.extra.bank, rows)
        return Batch(self.models.normalise(pixel), label)

    def student_step(self, frozen: Frozen, state: State, key: Key) -> tuple[State, Metrics]:
        """See `contract.Method`: a step down L_S."""
        key_bank, key_crop_flip, key_other, key_mix = jax.random.split(key, 4)
        pixel = self.mix(state, self.from_bank(state, key_bank)[0], key_other, key_mix)
        drawn = self.draw_crop_flip(key_crop_flip, self.config.synthesis.student_batch_size)
        return self.distil(frozen, state, self.view(pixel, drawn))

    def aim(self, frozen: Frozen, state: State, image: Array, teacher: Any) -> imitation.Loss:
        """What this instance's student minimises on images [B, H, W, channels], of its output.

        teacher: the teacher's output on them.
        """
        if self.msarc is not None:
            student = state.student.variables
            return self.msarc.aim(frozen.teacher, student, image, teacher)

        def divergence(student: Any) -> tuple[Array, Metrics]:
            temperature = self.config.loss.temperature
            kd = jnp.mean(losses.kd(student.logits, teacher.logits, temperature))
            return kd, {'kd': kd}

        return divergence

    def distil(self, frozen: Frozen, state: State, image: Array) -> tuple[State, Metrics]:
        """A step down L_S of this instance's images [B, H, W, channels]."""
        teacher = self.models.teacher.apply(frozen.teacher, image)
        aim = self.aim(frozen, state, image, teacher)

        def loss_fn(params: Params) -> tuple[Array, tuple]:
            variables = {'params': params, 'batch_stats': state.student.batch_stats}
            student, mutated = self.models.student.apply(
                variables, image, train=True, mutable=['batch_stats']
            )
            total, terms = aim(student)
            agreement = jnp.mean(losses.agreement(student.logits, teacher.logits))
            return total, (terms | {'agreement': agreement}, mutated.get('batch_stats', {}))

        (_, (terms, batch_stats)), grads = self.shards.value_and_grad(loss_fn)(state.student.params)
        student = contract.update(state.student, grads, self.tx, batch_stats)
        metrics = self.shards.mean({'s/' + name: term for name, term in terms.items()})
        return state.replace(student=student), metrics


def learner(config: Any, models: Models, shards: Shards) -> Learner:
    """The learner of a config.  Raises ValueError where its batches, bank or phases do not fit."""
    shards.check('config.synthesis.batch_size', config.synthesis.batch_size)
    shards.check('config.synthesis.student_batch_size', config.synthesis.student_batch_size)
    banks.check(config.synthesis)
    if models.hold_out:
        banks.kept_apart(config.synthesis.batch_size)
    tx = contract.sgd_by_round(config.student, config.phases)
    pair = models.teacher, models.student
    return Learner(
        config, models, shards, tx, imitation.make(config, *pair, models.image_shape, shards)
    )
