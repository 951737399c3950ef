"""A batch of images that a teacher takes for given classes: what NAYER and CAE-DFKD share.

A generator changes its images for some steps; those of the step with the lowest loss go to a bank.
With t, s the teacher's and the student's logits on them, and y the classes asked for:

    L_G = bn L_BN + ce CE(t, y) - adversarial E[1(argmax s = argmax t) KL(t || s)]

L_BN compares the teacher's running statistics to a moving average over batches (`bn_momentum`), of
which only the newest share carries a gradient (NAYER's code, arXiv 2310.00258).
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from dfkd_jax import bank as banks
from dfkd_jax import losses
from dfkd_jax.contract import Array, Metrics, Params

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
