"""KD on noise: what a student learns from the teacher without any search for images.

The lower bound of every comparison, and the smallest method.  There is no generator: every step
draws x ~ N(0, 1) in the normalised space that the networks see.  With t, s the teacher's and the
student's logits on x, the student minimises

    L_S = T^2 KL(softmax(t / T) || softmax(s / T))

It is not a published method: papers use it as a control, each with its own settings.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from dfkd_jax import contract, losses
from dfkd_jax.contract import Array, Batch, Frozen, Key, Method, Metrics, Models, Params, State
from dfkd_jax.distributed.sharding import Shards
from dfkd_jax.methods.shared import msarc as imitation


def make(config: Any, models: Models, shards: Shards) -> Method:
    """Noise for these networks.  Raises ValueError where batch or phases do not fit."""
    batch_size = config.synthesis.student_batch_size
    shards.check('config.synthesis.student_batch_size', batch_size)
    shape = (batch_size, *models.image_shape)
    tx = contract.sgd_by_round(config.student, config.phases)
    msarc = imitation.make(config, models.teacher, models.student, models.image_shape, shards)

    def init(frozen: Frozen, key: Key) -> State:
        del frozen
        student = models.student.init(key, jnp.zeros((1, *models.image_shape)))
        net = contract.start(student['params'], student.get('batch_stats', {}), tx)
        return State(round=contract.first_round(), student=net, generator=())

    def sample(frozen: Frozen, state: State, key: Key) -> Batch:
        """Noise, with the classes that the teacher predicts for it."""
        del state
        # Every device draws the whole batch and takes its share: see `sharding`.
        image = shards.share(jax.random.normal(key, shape))
        logits = models.teacher.apply(frozen.teacher, image).logits
        return Batch(image, jnp.argmax(logits, -1).astype(jnp.int32))

    def student_step(frozen: Frozen, state: State, key: Key) -> tuple[State, Metrics]:
        image = shards.share(jax.random.normal(key, shape))
        teacher = models.teacher.apply(frozen.teacher, image)
        aim = msarc and msarc.aim(frozen.teacher, state.student.variables, image, teacher)

        def student_loss(params: Params) -> tuple[Array, tuple]:
            variables = {'params': params, 'batch_stats': state.student.batch_stats}
            out, new = models.student.apply(variables, image, train=True, mutable=['batch_stats'])
            if aim is None:
                total = jnp.mean(losses.kd(out.logits, teacher.logits, config.loss.temperature))
                terms = {'kd': total}
            else:
                total, terms = aim(out)
            terms['agreement'] = jnp.mean(losses.agreement(out.logits, teacher.logits))
            metrics = {'s/' + name: term for name, term in terms.items()}
            return total, (metrics, new.get('batch_stats', {}))

        (_, (metrics, batch_stats)), grads = shards.value_and_grad(student_loss)(
            state.student.params
        )
        student = contract.update(state.student, grads, tx, batch_stats)
        return state.replace(student=student), shards.mean(metrics)

    return Method(init, contract.unchanged, student_step, sample)
