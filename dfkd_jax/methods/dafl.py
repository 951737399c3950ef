"""DAFL: data-free learning of student networks (arXiv 1904.01186, ICCV 2019).

The teacher is a fixed discriminator: images are good if it is sure of a class, if its features are
strongly activated, and if all classes are equally frequent.  The student has no part in them.  With
t the teacher's logits on G(z), z ~ N(0, I), f its features, the input of its last linear layer (of
LeNet-5: of its first), and p the mean of softmax(t) over the batch:

    L_G = one_hot E[CE(t, argmax t)] - activation E[|f|] + balance sum_c p_c log p_c
    L_S = T^2 KL(softmax(t / T) || softmax(s / T)),     T = 1

E[|f|] is the mean over features too.  The logarithm is natural; in the authors' code it has base
10, so that a weight of 5 there is 5 / ln 10 = 2.17 here.  Other differences from that code:

    generator and student step in turns, each on latents of its own; theirs share a batch of images
        made before the generator's update.  `synthesis.fresh=False` shares the latents
    the generator's two inner batch norms have the usual epsilon, theirs 0.8 (where a momentum was
        meant), and its inner convolutions have no bias, which a batch norm would cancel

The paper's text was not available to us beyond its abstract: the losses are those of the code.
The benchmark of CMI and Fast-DFKD (the flag `benchmark`) has other weights and rates and a
generator that ends in a sigmoid; its code distils at T = 1 too, whatever its `--T 20` says.
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


def activation(features: Array) -> Array:
    """Minus the mean magnitude of the features [B, F] of each image, [B]."""
    return -jnp.mean(jnp.abs(features), axis=-1)


def make(config: Any, models: Models, shards: Shards) -> Method:
    """DAFL for these networks.  Raises ValueError where a batch or a generator does not fit."""

    def one_hot(out: Outputs) -> Array:
        return jnp.mean(losses.one_hot(out.teacher.logits))

    def active(out: Outputs) -> Array:
        return jnp.mean(activation(out.teacher.features))

    def balance(out: Outputs) -> Array:
        share = jnp.mean(jax.nn.softmax(out.teacher.logits), axis=0)
        return losses.class_balance(out.shards.mean(share))

    def kd(out: Outputs) -> Array:
        temperature = config.loss.temperature
        return jnp.mean(losses.kd(out.student.logits, out.teacher.logits, temperature))

    return generator_only.make(
        config, models, shards,
        generator_terms={'one_hot': one_hot, 'activation': active, 'balance': balance},
        student_terms={'kd': kd},
    )  # fmt: skip
