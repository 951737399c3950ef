"""NAYER: noisy layers over label-text embeddings (arXiv 2310.00258, CVPR 2024).

A batch of synthesis has every class equally often.  The generator starts from the text embedding of
the class asked for.  What makes two images of a class differ is a *noisy layer*: a linear layer for
each repetition of the class list, drawn anew at every batch and then trained with the rest of the
generator for the `g_steps` of the batch.  With t, s the teacher's and the
student's logits on augmented images:

    L_G = bn L_BN + ce CE(t, y) - adversarial E[1(argmax s = argmax t) KL(t || s)]

L_BN compares the teacher's running statistics to a moving average over batches (`bn_momentum`), of
which only the newest share carries a gradient.  The images of the step with the lowest L_G go to
the bank, before augmentation; the student distils from the bank with random crops and flips:

    L_S = T^2 KL(softmax(t / T) || softmax(s / T))

As in the authors' code, Adam starts anew at every batch, and every `generator.life` rounds, counted
from the start and from the end of the warm-up (the first phase, without a student), the generator
does too (0: it never does).  Differences from that code:

    the student is in eval mode while the generator trains; theirs is in train mode from the second
        batch of a round on, and its running statistics move on synthetic images
    the bank has a size (`synthesis.bank`, the newest images are kept); theirs is a folder that
        grows.  Batches of the student are drawn from it with replacement, theirs without
    pixels are rounded to bytes, theirs truncated
    embeddings are MiniLM's where none are given; theirs are CLIP's (`labels.source='clip'`)
    Tiny-ImageNet is normalised as ImageNet is, as CPSC-DFKD has it; theirs by 0.5 and 0.5
        (`data.mean`, `data.std`), so a teacher must bring the one that it was trained with
    where a batch cannot hold all classes, it takes the next ones of a list of all, as in their code
        for ImageNet, which shuffles it at every round; here whenever it is used up.  That
        code is otherwise left in a debugging state, so its settings for ImageNet are unknown
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct

from dfkd_jax import contract
from dfkd_jax.contract import Array, Frozen, Key, Method, Metrics, Models, Params, State
from dfkd_jax.distributed.sharding import Shards
from dfkd_jax.methods.shared import image_bank as banks
from dfkd_jax.methods.shared import inversion


class Extra(struct.PyTreeNode):
    """NAYER's own state.

    bank: synthetic images and the classes they were made for.
    batch: the batch of synthesis under way.
    last_renewal: [] int32, the round that last renewed the generator.
    order: [C] int32, the order in which classes come where a batch cannot hold all; else None.
    """

    bank: banks.Bank
    batch: inversion.SynthesisBatch
    last_renewal: Array
    order: Array | None


def balanced_classes(key: Key, batch: int, classes: int) -> Array:
    """Every class equally often, in the order of the class list; what is left over at random.

    Returns [batch].  The key is consumed.
    """
    row = jnp.arange(batch, dtype=jnp.int32)
    chosen = jax.random.randint(key, (batch,), 0, classes, jnp.int32)
    return jnp.where(row < batch - batch % classes, row % classes, chosen)


def next_classes(key: Key, order: Array, number: Array, batch: int) -> tuple[Array, Array]:
    """The classes of batch `number` from a list of all [C], C > batch, and the list after it.

    No class comes again before all others came; a list that is used up is shuffled anew.  The key
    is consumed.
    """
    classes = len(order)
    fresh = jax.random.permutation(key, classes).astype(jnp.int32)
    at = (number % classes * batch) % classes + jnp.arange(batch, dtype=jnp.int32)
    label = jnp.where(at < classes, order[at % classes], fresh[at % classes])
    return label, jnp.where(at[-1] + 1 >= classes, fresh, order)


def make(config: Any, models: Models, shards: Shards) -> Method:
    """NAYER for these networks; `frozen.extra` is the table of label embeddings [C, E].

    Raises ValueError where a batch, a bank or a generator does not fit.
    """
    _check(models)
    loss, synthesis, settings = config.loss, config.synthesis, config.generator
    classes, batch_size = models.num_classes, synthesis.batch_size
    warmup = contract.warmup_rounds(config.phases)
    learner = inversion.learner(config, models, shards)
    generator_tx = optax.adam(settings.lr, settings.beta1, settings.beta2)

    def init(frozen: Frozen, key: Key) -> State:
        key_student, key_generator = jax.random.split(key)
        in_parts = batch_size < classes
        return State(
            round=contract.first_round(),
            student=learner.start(key_student),
            generator=new_generator(frozen, key_generator),
            extra=Extra(
                bank=banks.empty(synthesis.bank, models.image_shape),
                batch=inversion.empty_batch(
                    batch_size, models.image_shape, frozen.teacher['batch_stats']
                ),
                last_renewal=jnp.zeros((), jnp.int32),
                order=jnp.arange(classes, dtype=jnp.int32) if in_parts else None,
            ),
        )

    def new_generator(frozen: Frozen, key: Key) -> contract.Net:
        embedding = frozen.extra[jnp.arange(batch_size) % classes]
        whole = models.generator.clone(axis_name=None)
        variables = whole.init(key, embedding)
        return contract.start(variables['params'], variables['batch_stats'], generator_tx)

    def begin(frozen: Frozen, state: State, key: Key) -> tuple[State, Metrics]:
        """A new noisy layer and a new Adam; where its life is over, a new generator."""
        key_generator, key_label = jax.random.split(key)
        fresh = new_generator(frozen, key_generator)
        due = inversion.renewal_due(state.round, state.extra.last_renewal, settings.life, warmup)
        params, batch_stats = jax.tree.map(
            lambda new, old: jnp.where(due, new, old),
            (fresh.params, fresh.batch_stats),
            (state.generator.params, state.generator.batch_stats),
        )
        params |= {name: fresh.params[name] for name in ('noisy_kernel', 'noisy_bias')}
        order, number = state.extra.order, state.extra.batch.batches
        if order is None:
            label = balanced_classes(key_label, batch_size, classes)
        else:
            label, order = next_classes(key_label, order, number, batch_size)
        extra = state.extra.replace(
            batch=inversion.begin(state.extra.batch, label),
            last_renewal=jnp.where(due, state.round, state.extra.last_renewal),
            order=order,
        )
        return state.replace(
            generator=contract.start(params, batch_stats, generator_tx), extra=extra
        ), {}

    def generator_step(
        frozen: Frozen, state: State, key: Key, learning: bool = True
    ) -> tuple[State, Metrics]:
        crop_flip = learner.draw_crop_flip(key, batch_size)
        label = shards.share(state.extra.batch.label)
        embedding = frozen.extra[label]

        def loss_fn(params: Params) -> tuple[Array, tuple]:
            variables = {'params': params, 'batch_stats': state.generator.batch_stats}
            pixel, mutated = models.generator.apply(
                variables, embedding, first=shards.first_row(batch_size), train=True,
                mutable=['batch_stats'],
            )  # fmt: skip
            image = learner.view(pixel, crop_flip)
            total, terms, teacher = learner.generator_loss(frozen, state, image, label, learning)
            return total, (terms, mutated['batch_stats'], teacher.statistics, pixel)

        (total, (terms, batch_stats, statistics, pixel)), grads = shards.value_and_grad(loss_fn)(
            state.generator.params
        )
        batch = inversion.keep_best(state.extra.batch, total, shards.gather(pixel), statistics)
        generator = contract.update(state.generator, grads, generator_tx, batch_stats)
        metrics = shards.mean({'g/' + name: term for name, term in terms.items()})
        extra = state.extra.replace(batch=batch)
        return state.replace(generator=generator, extra=extra), metrics

    def finish(frozen: Frozen, state: State, key: Key) -> tuple[State, Metrics]:
        """The best images to the bank; the last step's statistics to their average."""
        del frozen, key
        extra = state.extra
        batch, bank = inversion.finish(extra.batch, extra.bank, loss.bn_momentum)
        return state.replace(extra=extra.replace(batch=batch, bank=bank)), {}

    return Method(
        init, generator_step, learner.student_step, learner.sample, begin, finish,
        learner.held_out, warmup_step=partial(generator_step, learning=False),
    )  # fmt: skip


def _check(models: Models) -> None:
    if getattr(models.generator, 'conditioning', None) != 'embedding':
        raise ValueError('nayer needs its noisy layer: set config.generator.model=nayer_generator.')
