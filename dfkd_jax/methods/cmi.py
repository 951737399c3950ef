"""CMI: contrastive model inversion (arXiv 2105.08584, IJCAI 2021).

Images of one batch should differ from each other and from earlier ones: diversity as a task of
discrimination.  Every batch of synthesis has a new generator, whose latents z are trained with it
for `g_steps`.  With t, s the teacher's and the student's logits on a *global* view of the images
(crop and flip), and y classes drawn at random:

    L_G = bn L_BN + ce CE(t, y) - adversarial E[1(argmax s = argmax t) KL(t || s)] + contrast L_CR

    L_CR = mean_new CE(row i, i) + mean_old CE(row i, i),
    row i = h(local_i) . h(global)^T / contrast_temperature

where the *local* view is a smaller area, resized and flipped; the features of a view are the means
over positions of the teacher's maps; h is a head of two layers with outputs of unit length, trained
throughout the run.  Rows and columns are the images of the batch (new) and `negatives` others from
a memory of features (old).  No gradient passes through h(global).  The images of the step with the
lowest L_G go to the bank; the features of both their views replace the oldest of the memory.

The memory is arrays on the device: 40,960 images with 2 x 960 features of a ResNet-34 take 315 MB.

Differences from the authors' code, beside those of the bank (see `nayer.py`):

    features are those of the last map of each resolution, as the networks return them
        (`Output.stages`); theirs are of the input of every batch norm (2,704 of a WRN-40-2), and
        for ResNet-34 of the inputs of its four stages, which its comment calls outputs
    the memory is on the device, theirs on the host
    CMI's own scripts start from images inverted beforehand, this does not
    the paper's text was not available to us: all is read from the code
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from flax import struct

from dfkd_jax import augment, contract, losses
from dfkd_jax.contract import Array, Frozen, Key, Method, Metrics, Models, Params, State
from dfkd_jax.distributed.sharding import Shards
from dfkd_jax.methods.shared import image_bank as banks
from dfkd_jax.methods.shared import inversion


class Memory(struct.PyTreeNode):
    """What the contrast remembers: F features for each of two views, [local, global].

    head: the network h.
    feature: [M, 2, F], of earlier images.
    best: [B, 2, F], of the images of the step with the lowest loss so far.
    """

    head: contract.Net
    feature: Array
    best: Array


class Extra(struct.PyTreeNode):
    """CMI's own state.

    bank: synthetic images and the classes they were made for.
    batch: the batch of synthesis under way.
    memory: of the contrast; () without one.
    """

    bank: banks.Bank
    batch: inversion.SynthesisBatch
    memory: Any


class Head(nn.Module):
    """Features [N, F] to unit vectors [N, width]."""

    width: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = nn.relu(nn.Dense(x.shape[-1], name='hidden')(x))
        return losses.normalise(nn.Dense(self.width, name='out')(x))


def pooled(stages: tuple[Array, ...]) -> Array:
    """The features of images, [B, F]: means over the positions of their maps [B, h, w, C]."""
    means = [jnp.mean(x.astype(jnp.float32), (1, 2)) for x in stages]
    return jnp.concatenate(means, axis=-1)


def contrastive_loss(
    local_view: Array, global_view: Array, valid: Array, new: int, temperature: float
) -> Array:
    """L_CR, a scalar.

    local_view, global_view: [N, D] unit vectors of the views of N images; the first `new` rows are
        those of the batch.
    valid: [N] bool, which rows hold an image; the first `new` do.
    """
    seen = valid[None, :] | jnp.eye(len(valid), dtype=bool)  # finite rows, even of no image
    similarity = local_view @ jax.lax.stop_gradient(global_view).T / temperature
    loss = -jnp.diagonal(jax.nn.log_softmax(jnp.where(seen, similarity, -jnp.inf), axis=-1))
    old = jnp.where(valid, loss, 0.0)[new:]
    count = jnp.maximum(jnp.sum(valid[new:]), 1).astype(loss.dtype)
    return jnp.mean(loss[:new]) + jnp.sum(old) / count


def draw_negatives(key: Key, feature: Array, written: Array, count: int) -> tuple[Array, Array]:
    """`count` different rows of a memory [M, ...] into which `written` rows were ever written.

    Returns the rows and which of them hold anything, [count] bool.  The key is consumed.
    """
    size = len(feature)
    order = jax.random.uniform(key, (size,))
    order = jnp.where(jnp.arange(size) < written, order, -1.0)
    rank, rows = jax.lax.top_k(order, count)
    return feature[rows], rank >= 0


def reinitialise(key: Key, params: Params) -> Params:
    """A generator's params drawn as CMI initialises them.  The key is consumed.

    Weights from N(0, 0.02), scales of norms from N(1, 0.02), biases zero.
    """
    leaves, tree = jax.tree_util.tree_flatten_with_path(params)

    def draw(name: str, key: Key, like: Array) -> Array:
        if name == 'bias':
            return jnp.zeros_like(like)
        return float(name == 'scale') + 0.02 * jax.random.normal(key, like.shape)

    keys = jax.random.split(key, len(leaves))
    drawn = [draw(path[-1].key, k, x) for (path, x), k in zip(leaves, keys, strict=True)]
    return jax.tree.unflatten(tree, drawn)


def make(config: Any, models: Models, shards: Shards) -> Method:
    """CMI for these networks.

    Raises ValueError where a batch, a bank, the memory or the generator does not fit, and where the
    teacher returns no maps.
    """
    features = _check(config, models)
    loss, synthesis, settings = config.loss, config.synthesis, config.generator
    batch_size = synthesis.batch_size
    learner = inversion.learner(config, models, shards)
    generator_tx = optax.adam(settings.lr, settings.beta1, settings.beta2)
    head, head_tx = Head(config.head.width), optax.adam(config.head.lr)

    def init(frozen: Frozen, key: Key) -> State:
        key_student, key_generator, key_head = jax.random.split(key, 3)
        memory: Any = ()
        if loss.contrast:
            params = head.init(key_head, jnp.zeros((1, features)))['params']
            memory = Memory(
                head=contract.start(params, {}, head_tx),
                feature=jnp.zeros((synthesis.memory, 2, features)),
                best=jnp.zeros((batch_size, 2, features)),
            )
        return State(
            round=contract.first_round(),
            student=learner.start(key_student),
            generator=new_generator(key_generator),
            extra=Extra(
                bank=banks.empty(synthesis.bank, models.image_shape),
                batch=inversion.empty_batch(
                    batch_size, models.image_shape, frozen.teacher.get('batch_stats', {})
                ),
                memory=memory,
            ),
        )

    def new_generator(key: Key) -> contract.Net:
        """A generator and latents, params {'generator': ..., 'latent': [B, latent]}."""
        key_init, key_params, key_latent = jax.random.split(key, 3)
        latent = jax.random.normal(key_latent, (batch_size, models.generator.latent))
        variables = models.generator.clone(axis_name=None).init(key_init, latent)
        params = {'generator': reinitialise(key_params, variables['params']), 'latent': latent}
        return contract.start(params, variables['batch_stats'], generator_tx)

    def begin(frozen: Frozen, state: State, key: Key) -> tuple[State, Metrics]:
        """A new generator, latents, classes and Adam; the head stays."""
        del frozen
        key_label, key_generator = jax.random.split(key)
        label = jax.random.randint(key_label, (batch_size,), 0, models.num_classes, jnp.int32)
        extra = state.extra.replace(batch=inversion.begin(state.extra.batch, label))
        return state.replace(generator=new_generator(key_generator), extra=extra), {}

    def generator_step(
        frozen: Frozen, state: State, key: Key, learning: bool = True
    ) -> tuple[State, Metrics]:
        key_crop_flip, key_area, key_flip, key_negatives = jax.random.split(key, 4)
        batch, memory = state.extra.batch, state.extra.memory
        crop_flip = learner.draw_crop_flip(key_crop_flip, batch_size)
        label = shards.share(batch.label)
        areas = shards.share(augment.draw_areas(key_area, batch_size, synthesis.local_area))
        flips = shards.share(augment.draw_flip(key_flip, batch_size))

        def local_view(pixel: Array) -> Array:
            pixel = augment.resized_crop(pixel, areas, models.image_shape[0])
            return models.normalise(augment.flip(pixel, flips) if synthesis.flip else pixel)

        def loss_fn(params: Params) -> tuple[Array, tuple]:
            variables = {
                'params': params['images']['generator'],
                'batch_stats': state.generator.batch_stats,
            }
            pixel, mutated = models.generator.apply(
                variables, shards.share(params['images']['latent']), train=True,
                mutable=['batch_stats'],
            )  # fmt: skip
            image = learner.view(pixel, crop_flip)
            total, terms, teacher = learner.generator_loss(frozen, state, image, label, learning)
            feature = None
            if loss.contrast:
                local = models.teacher.apply(frozen.teacher, local_view(pixel))
                feature = jnp.stack([pooled(local.stages), pooled(teacher.stages)], axis=1)
                # The whole batch's, on whichever device they are.
                feature = shards.gather(feature)
                terms['contrast'] = contrast(params['head'], feature, state, key_negatives)
                total = total + loss.contrast * terms['contrast']
                terms['loss'] = total
            return total, (terms, mutated['batch_stats'], teacher.statistics, pixel, feature)

        params = {'images': state.generator.params}
        if loss.contrast:
            params |= {'head': memory.head.params}
        (total, aux), grads = shards.value_and_grad(loss_fn)(params)
        terms, batch_stats, statistics, pixel, feature = aux
        if loss.contrast:
            memory = memory.replace(
                head=contract.update(memory.head, grads['head'], head_tx),
                best=jnp.where(total < batch.lowest, feature, memory.best),
            )
        batch = inversion.keep_best(batch, total, shards.gather(pixel), statistics)
        generator = contract.update(state.generator, grads['images'], generator_tx, batch_stats)
        metrics = shards.mean({'g/' + name: term for name, term in terms.items()})
        extra = state.extra.replace(batch=batch, memory=memory)
        return state.replace(generator=generator, extra=extra), metrics

    def contrast(params: Params, feature: Array, state: State, key: Key) -> Array:
        """L_CR of a batch's features [B, 2, F], against `negatives` of the memory."""
        written = state.extra.batch.batches * batch_size
        old, held = draw_negatives(key, state.extra.memory.feature, written, synthesis.negatives)
        both = jnp.concatenate([feature, old])
        valid = jnp.concatenate([jnp.ones(batch_size, bool), held])
        views: Any = head.apply({'params': params}, both)
        temperature = loss.contrast_temperature
        return contrastive_loss(views[:, 0], views[:, 1], valid, batch_size, temperature)

    def finish(frozen: Frozen, state: State, key: Key) -> tuple[State, Metrics]:
        """The best images to the bank, their features to the memory."""
        del frozen, key
        extra, memory = state.extra, state.extra.memory
        if loss.contrast:
            at = extra.batch.batches * batch_size % synthesis.memory
            put = jax.lax.dynamic_update_slice_in_dim
            memory = memory.replace(feature=put(memory.feature, memory.best, at, 0))
        batch, bank = inversion.finish(extra.batch, extra.bank, loss.bn_momentum)
        return state.replace(extra=extra.replace(batch=batch, bank=bank, memory=memory)), {}

    return Method(
        init, generator_step, learner.student_step, learner.sample, begin, finish,
        learner.held_out, warmup_step=partial(generator_step, learning=False),
    )  # fmt: skip


def _check(config: Any, models: Models) -> int:
    """The number of features of a view."""
    inversion.check_generator(config, models)
    synthesis = config.synthesis
    if not config.loss.contrast:
        return 0
    if synthesis.memory <= 0 or synthesis.memory % synthesis.batch_size:
        raise ValueError(
            f'config.synthesis.memory={synthesis.memory} must be a positive multiple of '
            f'config.synthesis.batch_size={synthesis.batch_size}.'
        )
    if not 0 < synthesis.negatives <= synthesis.memory:
        raise ValueError(
            f'config.synthesis.negatives={synthesis.negatives}: expected 1 to config.synthesis.'
            f'memory={synthesis.memory}.'
        )
    if not 0 < synthesis.local_area <= 1:
        raise ValueError(
            f'config.synthesis.local_area={synthesis.local_area}: expected above 0, up to 1.'
        )
    blank = jax.ShapeDtypeStruct((1, *models.image_shape), jnp.float32)
    out, _ = jax.eval_shape(lambda x: models.teacher.init_with_output(jax.random.key(0), x), blank)
    if not out.stages:
        raise ValueError(
            'the teacher returns no maps for CMI to contrast: choose another, or set '
            'config.loss.contrast=0.'
        )
    return sum(x.shape[-1] for x in out.stages)
