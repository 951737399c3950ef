"""ZSKT and DFAD: a generator seeks images on which teacher and student disagree.

ZSKT, zero-shot knowledge transfer by adversarial belief matching (arXiv 1905.09768, NeurIPS 2019),
measures their disagreement by the divergence of their classes and lets the student follow the
teacher's attention too.  DFAD, data-free adversarial distillation (arXiv 1912.11006), measures it
by the distance of their logits and leaves attention out.  With t, s the teacher's and the student's
logits on G(z), z ~ N(0, I), and a_l an image's attention over the positions of the last map of
resolution l, the mean of its squares over channels scaled to unit length:

    L_G = - adversarial E[D(t, s)]
    L_S =   kd E[D(t, s)] + attention sum_l E[(a_l(teacher) - a_l(student))^2]

    D = KL(softmax(t) || softmax(s))     `loss.discrepancy='kl'`, ZSKT
    D = mean_c |t_c - s_c|               `loss.discrepancy='l1'`, DFAD

The last mean is over positions, as in ZSKT's code.  A map is what a stage of a network returns;
maps are compared where both networks have one of that size, and the student may be narrower.

ZSKT takes several steps of the student on the latents that the generator was trained on
(`synthesis.fresh=False`); DFAD draws new ones.  Differences from the authors' code:

    the student is in train mode while the generator trains, as theirs, but its running statistics
        move in its own steps only
    their divergence for ZSKT is a mean over classes: here its weights are 1 / classes
    generators have no biases that a batch norm would cancel.  ZSKT's is that of its repository's
        last version (8 x 8 pixels at first, a last norm with scale and shift, no tanh:
        `generator.ending='affine'`); an earlier one starts at 10 x 10

The benchmark code of CMI and Fast-DFKD (the flag `benchmark`) has no attention; on its adversary
see `shared/generator_only.py`, on its temperature `dafl.py`.
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


def discrepancy(loss: Any, student_logits: Array, teacher_logits: Array) -> Array:
    """D of logits [B, C], [B]; at `loss.temperature` where it is a divergence."""
    if loss.discrepancy == 'l1':
        return jnp.mean(jnp.abs(student_logits - teacher_logits), axis=-1)
    return losses.kd(student_logits, teacher_logits, loss.temperature)


def attention(x: Array) -> Array:
    """Where an image's map [B, h, w, C] is active: [B, h * w] of unit length."""
    energy = jnp.mean(jnp.square(x.astype(jnp.float32)), axis=-1)
    return losses.normalise(energy.reshape(len(x), -1))


def attention_transfer(student: Any, teacher: Any) -> Array:
    """The squared difference of two networks' attention, [B]: mean over positions, sum over maps.

    student, teacher: their `Output.stages`; a map of a size that the other lacks is left out.
    """
    same_size = {x.shape[1:3]: x for x in teacher}
    pairs = [(x, same_size[x.shape[1:3]]) for x in student if x.shape[1:3] in same_size]
    squares = [jnp.square(attention(s) - attention(t)) for s, t in pairs]
    return sum((jnp.mean(x, axis=-1) for x in squares), jnp.zeros(()))


def make(config: Any, models: Models, shards: Shards) -> Method:
    """ZSKT or DFAD for these networks.

    Raises ValueError where a batch, a choice or a generator does not fit, and where the networks
    have no maps of equal size for attention to be compared.
    """
    loss = config.loss
    if loss.discrepancy not in ('kl', 'l1'):
        raise ValueError(f"config.loss.discrepancy={loss.discrepancy!r}; expected 'kl' or 'l1'.")
    if loss.attention:
        _check_stages(models)

    def adversarial(out: Outputs) -> Array:
        return -jnp.mean(discrepancy(loss, out.student.logits, out.teacher.logits))

    def kd(out: Outputs) -> Array:
        return jnp.mean(discrepancy(loss, out.student.logits, out.teacher.logits))

    def transfer(out: Outputs) -> Array:
        return jnp.mean(attention_transfer(out.student.stages, out.teacher.stages))

    return generator_only.make(
        config, models, shards,
        generator_terms={'adversarial': adversarial},
        student_terms={'kd': kd, 'attention': transfer},
    )  # fmt: skip


def _check_stages(models: Models) -> None:
    blank = jax.ShapeDtypeStruct((1, *models.image_shape), jnp.float32)
    sizes = [
        {x.shape[1:3] for x in
         jax.eval_shape(lambda x, m=module: m.init_with_output(jax.random.key(0), x)[0], blank)
         .stages}
        for module in (models.teacher, models.student)
    ]  # fmt: skip
    if not sizes[0] & sizes[1] - {(1, 1)}:
        raise ValueError(
            f'the teacher has maps of {sorted(sizes[0])} pixels and the student of '
            f'{sorted(sizes[1])}: none can be compared. Choose another pair, or set '
            'config.loss.attention=0.'
        )
