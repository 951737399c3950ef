"""DeepInversion, with its adaptive term (arXiv 1912.08795, CVPR 2020).

There is no generator: the images themselves are optimised from noise for `g_steps`.  With t, s the
teacher's and the student's logits on the images, randomly rolled and mirrored, and y classes drawn
at random:

    L = bn [L_BN(teacher) - student_bn L_BN(student)] + ce CE(t, y)
        - adversarial JSD(softmax(s / tau), softmax(t / tau)) + tv R_TV + l2 ||x||_2

JSD = [KL(m || p) + KL(m || q)] / 2 of the two distributions and their mean m, each clamped to
[0.01, 0.99] as in the code, seeks images on which the two networks disagree; so does the term of
the student's batch statistics.  Both wait for the end of the warm-up, the first phase without a
student.  R_TV is the sum, over four neighbours, of the mean absolute difference to them.
For a teacher without batch norms see `shared/image_prior.py`.
Images start as normalised noise and stay within the range of pixels.  Those of the step with the
lowest L go to the bank.

The paper's text was not available to us beyond its abstract: losses and numbers are those of the
code with which CMI and Fast-DFKD compare it.  Differences from that code, beside those of the bank
(see `nayer.py`):

    pixels.keep       'best', as it intends; 'last', as it does and as its published numbers were
                      made: its best images share the memory of the current ones
    warm-up           it has none: one phase
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct

from dfkd_jax import contract, losses
from dfkd_jax.contract import Array, Frozen, Key, Method, Metrics, Models, State
from dfkd_jax.distributed.sharding import Shards
from dfkd_jax.methods.shared import image_bank as banks
from dfkd_jax.methods.shared import image_prior, inversion

KEEP = ('best', 'last')


class Extra(struct.PyTreeNode):
    """DeepInversion's own state.

    bank: synthetic images and the classes they were made for.
    batch: the batch of synthesis under way.
    image: [B, H, W, channels], its images after the last step, normalised.
    opt_state: of their Adam.
    """

    bank: banks.Bank
    batch: inversion.SynthesisBatch
    image: Array
    opt_state: optax.OptState


def jensen_shannon(student_logits: Array, teacher_logits: Array, temperature: float) -> Array:
    """The divergence of two classifications from their mean, [B]; of logits [B, C]."""
    p = jax.nn.softmax(student_logits / temperature)
    q = jax.nn.softmax(teacher_logits / temperature)
    p, q, mean = (jnp.clip(x, 0.01, 0.99) for x in (p, q, (p + q) / 2))
    apart = jnp.log(mean / p) + jnp.log(mean / q)
    return 0.5 * jnp.sum(mean * apart, axis=-1)


def jitter(key: Key, image: Array, most: int, flips: bool) -> Array:
    """Images [B, H, W, C] rolled by up to `most` pixels and, if `flips`, perhaps mirrored.

    All of them alike.  The key is consumed.
    """
    key_roll, key_flip = jax.random.split(key)
    image = jnp.roll(image, jax.random.randint(key_roll, (2,), -most, most + 1), axis=(1, 2))
    return jnp.where(flips & jax.random.bernoulli(key_flip), image[:, :, ::-1], image)


def make(config: Any, models: Models, shards: Shards) -> Method:
    """DeepInversion for these networks.

    Raises ValueError where a batch, a bank or a choice does not fit.
    """
    _check(config, models)
    loss, synthesis, settings = config.loss, config.synthesis, config.pixels
    batch_size = synthesis.batch_size
    shape = (batch_size, *models.image_shape)
    learner = inversion.learner(config, models, shards)
    tx = optax.adam(settings.lr, settings.beta1, settings.beta2)

    def init(frozen: Frozen, key: Key) -> State:
        del frozen
        image = jnp.zeros(shape)
        return State(
            round=contract.first_round(),
            student=learner.start(key),
            generator=(),
            extra=Extra(
                bank=banks.empty(synthesis.bank, models.image_shape),
                batch=inversion.empty_batch(batch_size, models.image_shape, {}),
                image=image,
                opt_state=tx.init(image),
            ),
        )

    def begin(frozen: Frozen, state: State, key: Key) -> tuple[State, Metrics]:
        """New noise, classes and Adam."""
        del frozen
        key_label, key_image = jax.random.split(key)
        label = jax.random.randint(key_label, (batch_size,), 0, models.num_classes, jnp.int32)
        image = jax.random.normal(key_image, shape)
        extra = state.extra.replace(
            batch=inversion.begin(state.extra.batch, label),
            image=image,
            opt_state=tx.init(image),
        )
        return state.replace(extra=extra), {}

    def norm(x: Array) -> Array:
        """Of the whole batch, whatever share of it this is."""
        return jnp.sqrt(shards.size * shards.mean(jnp.sum(jnp.square(x))) + 1e-12)

    def generator_step(
        frozen: Frozen, state: State, key: Key, learning: bool = True
    ) -> tuple[State, Metrics]:
        """One step of the images."""
        extra = state.extra
        label = shards.share(extra.batch.label)

        def loss_fn(whole: Array) -> tuple[Array, Metrics]:
            share = shards.share(whole)
            image = jitter(key, share, settings.jitter, synthesis.flip)
            teacher = models.teacher.apply(frozen.teacher, image)
            weights = {name: loss[name] for name in ('bn', 'ce', 'adversarial', 'tv', 'l2')}
            weights['student_bn'] = -loss.bn * loss.student_bn
            terms = {}
            running = frozen.teacher.get('batch_stats', {})
            if running and loss.bn:
                terms['bn'] = losses.bn_statistics(teacher.statistics, running, loss.bn_form)
            if loss.ce:
                terms['ce'] = jnp.mean(losses.cross_entropy(teacher.logits, label))
            if learning and (loss.adversarial or weights['student_bn']):
                student = models.student.apply(state.student.variables, image)
                if loss.adversarial:
                    temperature = loss.adversarial_temperature
                    divergence = jensen_shannon(student.logits, teacher.logits, temperature)
                    terms['adversarial'] = -jnp.mean(divergence)
                if weights['student_bn']:
                    terms['student_bn'] = losses.bn_statistics(
                        student.statistics, state.student.batch_stats, loss.bn_form
                    )
            if loss.tv:
                differences = image_prior.neighbour_differences(share)
                means = (jnp.mean(jnp.abs(x)) for x in differences)
                terms['tv'] = sum(means, jnp.zeros(()))
            if loss.l2:
                terms['l2'] = norm(share)
            prior, prior_terms = image_prior.loss(config, frozen, share)
            total = sum((weights[name] * term for name, term in terms.items()), prior)
            hit = jnp.mean(jnp.argmax(teacher.logits, -1) == label)
            return total, terms | prior_terms | {'loss': total, 'hit': hit}

        (total, terms), grads = shards.value_and_grad(loss_fn)(extra.image)
        batch = inversion.keep_best(extra.batch, total, models.pixels(extra.image), {})
        updates, opt_state = tx.update(grads, extra.opt_state)
        black, white = (models.normalise(jnp.full((1, 1, 1, 1), x)) for x in (0.0, 1.0))
        image = jnp.clip(extra.image + updates, black, white)
        extra = extra.replace(batch=batch, image=image, opt_state=opt_state)
        metrics = shards.mean({'g/' + name: term for name, term in terms.items()})
        return state.replace(extra=extra), metrics

    def finish(frozen: Frozen, state: State, key: Key) -> tuple[State, Metrics]:
        """The images to the bank."""
        del frozen, key
        extra, batch = state.extra, state.extra.batch
        if settings.keep == 'last':
            batch = batch.replace(best=models.pixels(extra.image))
        batch, bank = inversion.finish(batch, extra.bank, 0.0)
        return state.replace(extra=extra.replace(batch=batch, bank=bank)), {}

    return Method(
        init, generator_step, learner.student_step, learner.sample, begin, finish,
        learner.held_out, warmup_step=partial(generator_step, learning=False),
    )  # fmt: skip


def _check(config: Any, models: Models) -> None:
    settings = config.pixels
    if models.generator is not None:
        raise ValueError('deepinversion trains no generator: leave out config.generator.')
    if settings.keep not in KEEP:
        raise ValueError(f'config.pixels.keep={settings.keep!r}; expected one of {KEEP}.')
    if not 0 <= settings.jitter < min(models.image_shape[:2]):
        raise ValueError(
            f'config.pixels.jitter={settings.jitter}: expected 0 or more pixels, and fewer than '
            f'an image has, {min(models.image_shape[:2])}.'
        )
