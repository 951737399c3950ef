"""DFQ: data-free adversarial distillation with batch statistics (arXiv 2005.04136, CVPRW 2020).

Proposed for quantised students, and compared since as a method of distillation: an adversarial
generator, whose images match the statistics of the teacher's batch norms and its classes.  With t,
s the teacher's and the student's logits on G(z), z ~ N(0, I), and p the mean of softmax(t) over the
batch:

    L_G = - adversarial E[KL(t || s)] + bn L_BN + one_hot E[CE(t, argmax t)]
          + balance sum_c p_c log p_c
    L_S = T^2 KL(softmax(t / T) || softmax(s / T)),     T = 1

L_BN is the sum over batch norms of the distances of the batch's mean and variance to the running
ones.  Gradients reach the generator through both networks.

The paper's text was not available to us beyond its abstract, which names adversarial samples,
matched statistics, and several generators and students; its authors publish no code.  Losses,
weights and schedule are those of the benchmark code of CMI and Fast-DFKD, with one generator and
one student, no quantisation.  What differs from that code:

    the generator plays against the student; the benchmark passes the teacher in its place, so that
        the adversarial term and its gradient are zero (`synthesis.adversary='teacher'`)
    the student is distilled at the temperature of the config; the benchmark's code at 1, whatever
        its `--T 20` says
    the student's rate falls step by step, theirs by the epoch
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from dfkd_jax import losses
from dfkd_jax.contract import Array, Method, Models
from dfkd_jax.distributed.sharding import Shards
from dfkd_jax.methods.shared import generator_only
from dfkd_jax.methods.shared.generator_only import Outputs


def make(config: Any, models: Models, shards: Shards) -> Method:
    """DFQ for these networks.  Raises ValueError where a batch or a generator does not fit."""

    def adversarial(out: Outputs) -> Array:
        return -jnp.mean(losses.kd(out.student.logits, out.teacher.logits))

    def bn(out: Outputs) -> Array:
        return losses.bn_statistics(out.teacher.statistics, out.running, config.loss.bn_form)

    def one_hot(out: Outputs) -> Array:
        return jnp.mean(losses.one_hot(out.teacher.logits))

    def balance(out: Outputs) -> Array:
        share = jnp.mean(jax.nn.softmax(out.teacher.logits), axis=0)
        return losses.class_balance(out.shards.mean(share))

    def kd(out: Outputs) -> Array:
        temperature = config.loss.temperature
        return jnp.mean(losses.kd(out.student.logits, out.teacher.logits, temperature))

    generator_terms = {'adversarial': adversarial, 'bn': bn, 'one_hot': one_hot, 'balance': balance}
    return generator_only.make(config, models, shards, generator_terms, student_terms={'kd': kd})
