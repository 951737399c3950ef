"""CAE-DFKD: category-aware embeddings and a contrast without image operations (arXiv 2504.21478).

Where NAYER draws a new noisy layer for every batch, CAE-DFKD adds noise to the frozen embedding of
the class, from several sources, and trains one generator throughout.  Of source n,

    e_n = e + M_n q_n,     q_n ~ source n, of zero mean and unit variance           (CEND)

With t, s the teacher's and the student's logits, f the student's features of unit length, c and n
the class and the source that an image was made from:

    L_G = bn L_BN + ce CE(t, c) - adversarial E[1(argmax s = argmax t) KL(t || s)]
          + diversity L_DIV
    L_S = T^2 KL(softmax(t / T) || softmax(s / T)) + contrast L_CNCL
    L_CNCL = - mean_i mean_{p in P(i)} log exp(f_i f_p / tau) / sum_{a in A(i)} exp(f_i f_a / tau)

where P(i) are the images of i's class from another source, and A(i) are these and the images of
other classes: the noise of a category should not change its features (CNCL).  The images of i's
class and source are left alone.  The mean is over the images that have a positive.  No image is
transformed for it.

One generator learns throughout, so fresh noise has to matter to it: it could make one image of a
class and ignore the rest.  L_DIV (ours) is how alike the images of a class are to the teacher, with
g its features of unit length and D(i) the other images of i's class:

    L_DIV = mean_i tau log mean_{j in D(i)} exp(g_i g_j / tau)

What is known of the paper: the equation of e_n; that the sources are different distributions and
that four of them did best; that the generator's losses are cross entropy, batch statistics and an
adversarial term; that the student's are a divergence and CNCL; and that CNCL contrasts categories
under different noise.  Everything else is ours, and a field: distributions and magnitudes
(`noise`), the weights (NAYER's), embeddings standardised over the classes so that a magnitude has a
meaning, noise that stays for the `g_steps` of a batch or is drawn anew at each (`noise.fresh`), one
generator for the whole run with a new Adam at every batch (`generator.life`, `reset_adam`), the
feature of the contrast (penultimate, without a head), its weight and temperature.

Controls are fields too: `loss.contrast_of='images'` contrasts two augmentations of each image
instead of sources, `synthesis.mixup` blends the student's images, and `loss.contrast=0` or
magnitudes of 0 leave out CNCL or CEND.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct

from dfkd_jax import contract, losses
from dfkd_jax.contract import Array, Frozen, Key, Method, Metrics, Models, Params, State
from dfkd_jax.distributed.sharding import Shards
from dfkd_jax.methods.shared import image_bank as banks
from dfkd_jax.methods.shared import inversion

SOURCES = {
    'normal': jax.random.normal,
    'uniform': lambda key, shape: jax.random.uniform(key, shape, minval=-(3**0.5), maxval=3**0.5),
    'laplace': lambda key, shape: jax.random.laplace(key, shape) / 2**0.5,
    'sign': lambda key, shape: jax.random.rademacher(key, shape, jnp.float32),
}


class Extra(struct.PyTreeNode):
    """CAE's own state.

    bank: synthetic images, the classes and the sources they were made from.
    batch: the batch of synthesis under way.
    noise: [B, E], its diffusion M_n q_n; () where every step draws its own.
    last_renewal: [] int32, the round that last renewed the generator.
    """

    bank: banks.Bank
    batch: inversion.SynthesisBatch
    noise: Any
    last_renewal: Array


def classes_and_sources(key: Key, batch: int, classes: int, sources: int) -> tuple[Array, Array]:
    """Classes and sources of a batch, [B] each: every class in it comes with every source.

    A class is a group of one image per source.  Groups repeat the class list, and those left over
    are of random classes; a batch that cannot hold all classes is of distinct random ones.
    """
    groups = batch // sources
    order = jax.random.permutation(key, classes)
    whole = groups - groups % classes
    slot = jnp.arange(groups, dtype=jnp.int32)
    label = jnp.where(slot < whole, slot % classes, order[slot % classes])
    return jnp.repeat(label, sources), jnp.tile(jnp.arange(sources, dtype=jnp.int32), groups)


def diffuse(key: Key, source: Array, width: int, noise: Any) -> Array:
    """M_n q_n for each image, [B, width], n = source [B].  The key is consumed.

    noise: `config.noise`.
    """
    shape = (len(source), width)
    drawn = [
        magnitude * SOURCES[name](jax.random.fold_in(key, n), shape)
        for n, (name, magnitude) in enumerate(zip(noise.sources, noise.magnitudes, strict=True))
    ]
    chosen = jax.nn.one_hot(source, len(drawn))
    noise_of = jnp.einsum('bn,nbe->be', chosen, jnp.stack(drawn), precision='highest')
    if noise.subspaces:  # of equal energy: each source has one dimension of N, N times as strong
        of_source = jnp.arange(width, dtype=jnp.int32) % len(drawn)
        own = of_source[None, :] == source[:, None]
        noise_of = jnp.where(own, noise_of * len(drawn) ** 0.5, 0.0)
    return noise_of


def cncl(config: Any, shards: Shards, features: Array, label: Array, source: Array) -> Array:
    """L_CNCL of this instance's features [B, F], classes and sources [B].

    Every image of the whole batch is contrasted with every other, on whichever device they are.
    """
    entries, label = shards.gather(losses.normalise(features)), shards.gather(label)
    source = shards.gather(source)
    same_class = label[:, None] == label[None, :]
    same_source = source[:, None] == source[None, :]
    positive = same_class & ~same_source
    each = losses.contrastive(
        entries, positive, config.loss.contrast_temperature, ignored=same_class & same_source
    )
    anchors = jnp.sum(jnp.any(positive, axis=-1), dtype=jnp.float32)
    return jnp.sum(each) / jnp.maximum(anchors, 1.0)


def diversity(config: Any, shards: Shards, features: Array, label: Array) -> Array:
    """L_DIV of this instance's images, by the teacher's features [B, F] and classes [B].

    Every image of the whole batch is compared with all others of its class.
    """
    entries, label = shards.gather(losses.normalise(features)), shards.gather(label)
    temperature = config.loss.diversity_temperature
    others = (label[:, None] == label[None, :]) & ~jnp.eye(len(label), dtype=bool)
    similarity = jnp.where(others, entries @ entries.T / temperature, -jnp.inf)
    count = jnp.sum(others, axis=-1)
    # Of an image that is alone in its class, a row of its own that has no gradient.
    similarity = jnp.where(count[:, None] > 0, similarity, 0.0)
    each = jax.nn.logsumexp(similarity, axis=-1) - jnp.log(jnp.maximum(count, 1).astype('float32'))
    anchors = jnp.sum(count > 0, dtype=jnp.float32)
    return temperature * jnp.sum(jnp.where(count > 0, each, 0.0)) / jnp.maximum(anchors, 1.0)


# Controls.


def image_contrast(config: Any, shards: Shards, features: Array, other: Array) -> Array:
    """The contrast of images in place of CNCL: of the features [B, F] of two augmentations each.

    Every image is a class of its own, and its augmentations are the sources.
    """
    count = len(features)
    label = shards.first_row(count * shards.size) + jnp.arange(count, dtype=jnp.int32)
    source = jnp.repeat(jnp.arange(2, dtype=jnp.int32), count)
    views = jnp.concatenate([features, other])
    return cncl(config, shards, views, jnp.concatenate([label, label]), source)


def mixup(key: Key, learner: inversion.Learner, state: State, pixel: Array) -> Array:
    """This instance's pixels, blended with other images of the bank (Zhang et al. 2018).

    The teacher labels the blends.  The key is consumed.
    """
    synthesis = learner.config.synthesis
    key_other, key_weight = jax.random.split(key)
    other, _, _ = learner.from_bank(state, key_other)
    alpha, size = synthesis.mixup, synthesis.student_batch_size
    weight = learner.shards.share(jax.random.beta(key_weight, alpha, alpha, (size,)))
    weight = weight[:, None, None, None]
    return weight * pixel + (1 - weight) * other


def make(config: Any, models: Models, shards: Shards) -> Method:
    """CAE-DFKD for these networks; `frozen.extra` is the table of label embeddings [C, E].

    Raises ValueError where a batch, a bank, the sources or a generator do not fit.
    """
    _check(config, models)
    loss, synthesis, settings, noise = config.loss, config.synthesis, config.generator, config.noise
    batch_size, width = synthesis.batch_size, models.generator.latent
    warmup = contract.warmup_rounds(config.phases)
    learner = inversion.learner(config, models, shards)
    generator_tx = optax.adam(settings.lr, settings.beta1, settings.beta2)

    def init(frozen: Frozen, key: Key) -> State:
        key_student, key_generator = jax.random.split(key)
        return State(
            round=contract.first_round(),
            student=learner.start(key_student),
            generator=new_generator(frozen, key_generator),
            extra=Extra(
                bank=banks.empty(synthesis.bank, models.image_shape),
                batch=inversion.empty_batch(
                    batch_size, models.image_shape, frozen.teacher['batch_stats']
                ),
                noise=() if noise.fresh else jnp.zeros((batch_size, width)),
                last_renewal=jnp.zeros((), jnp.int32),
            ),
        )

    def new_generator(frozen: Frozen, key: Key) -> contract.Net:
        whole = models.generator.clone(axis_name=None)
        variables = whole.init(key, frozen.extra)
        return contract.start(variables['params'], variables['batch_stats'], generator_tx)

    def begin(frozen: Frozen, state: State, key: Key) -> tuple[State, Metrics]:
        """The batch's classes and sources; a new generator and Adam where the config says so."""
        key_label, key_noise, key_generator = jax.random.split(key, 3)
        label, source = classes_and_sources(
            key_label, batch_size, models.num_classes, len(noise.sources)
        )
        generator, last_renewal = state.generator, state.extra.last_renewal
        if settings.life:
            due = inversion.renewal_due(state.round, last_renewal, settings.life, warmup)
            fresh = new_generator(frozen, key_generator)
            generator = jax.tree.map(lambda new, old: jnp.where(due, new, old), fresh, generator)
            last_renewal = jnp.where(due, state.round, last_renewal)
        if settings.reset_adam:
            generator = generator.replace(opt_state=generator_tx.init(generator.params))
        extra = state.extra.replace(
            batch=inversion.begin(state.extra.batch, label, source),
            noise=() if noise.fresh else diffuse(key_noise, source, width, noise),
            last_renewal=last_renewal,
        )
        return state.replace(generator=generator, extra=extra), {}

    def generator_step(
        frozen: Frozen, state: State, key: Key, learning: bool = True
    ) -> tuple[State, Metrics]:
        key_crop_flip, key_noise = jax.random.split(key)
        crop_flip = learner.draw_crop_flip(key_crop_flip, batch_size)
        label, source = state.extra.batch.label, state.extra.batch.source
        diffusion = diffuse(key_noise, source, width, noise) if noise.fresh else state.extra.noise
        embedding = shards.share(frozen.extra[label] + diffusion)
        label = shards.share(label)

        def loss_fn(params: Params) -> tuple[Array, tuple]:
            variables = {'params': params, 'batch_stats': state.generator.batch_stats}
            pixel, mutated = models.generator.apply(
                variables, embedding, train=True, mutable=['batch_stats']
            )
            image = learner.view(pixel, crop_flip)
            total, terms, teacher = learner.generator_loss(frozen, state, image, label, learning)
            if loss.diversity:
                terms['diversity'] = diversity(config, shards, teacher.features, label)
                total += loss.diversity * terms['diversity']
                terms['loss'] = total
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

    def student_step(frozen: Frozen, state: State, key: Key) -> tuple[State, Metrics]:
        key_bank, key_crop_flip, key_mixup, key_again, key_other, key_mix = jax.random.split(key, 6)
        size = synthesis.student_batch_size
        pixel, label, source = learner.from_bank(state, key_bank)
        if synthesis.mixup:
            pixel = mixup(key_mixup, learner, state, pixel)
        pixel = learner.mix(state, pixel, key_other, key_mix)
        image = learner.view(pixel, learner.draw_crop_flip(key_crop_flip, size))
        teacher = models.teacher.apply(frozen.teacher, image)
        aim = learner.aim(frozen, state, image, teacher)

        def loss_fn(params: Params) -> tuple[Array, tuple]:
            variables = {'params': params, 'batch_stats': state.student.batch_stats}

            def apply(image: Array) -> tuple[Any, Any]:
                return models.student.apply(variables, image, train=True, mutable=['batch_stats'])

            student, mutated = apply(image)
            total, terms = aim(student)
            terms |= {'agreement': jnp.mean(losses.agreement(student.logits, teacher.logits))}
            if loss.contrast and loss.contrast_of == 'sources':
                terms['contrast'] = cncl(config, shards, student.features, label, source)
            elif loss.contrast:
                again = learner.view(pixel, learner.draw_crop_flip(key_again, size))
                other = apply(again)[0].features
                terms['contrast'] = image_contrast(config, shards, student.features, other)
            total = total + loss.contrast * terms.get('contrast', jnp.zeros(()))
            return total, (terms | {'loss': total}, mutated.get('batch_stats', {}))

        (_, (terms, batch_stats)), grads = shards.value_and_grad(loss_fn)(state.student.params)
        student = contract.update(state.student, grads, learner.tx, batch_stats)
        metrics = shards.mean({'s/' + name: term for name, term in terms.items()})
        return state.replace(student=student), metrics

    return Method(
        init, generator_step, student_step, learner.sample, begin, finish,
        learner.held_out, warmup_step=partial(generator_step, learning=False),
    )  # fmt: skip


def _check(config: Any, models: Models) -> None:
    synthesis = config.synthesis
    sources, magnitudes = tuple(config.noise.sources), tuple(config.noise.magnitudes)
    unknown = [name for name in sources if name not in SOURCES]
    if unknown or not sources:
        raise ValueError(
            f'config.noise.sources={sources}: expected one or more of {", ".join(SOURCES)}; a '
            'source may come again with another magnitude.'
        )
    if len(sources) != len(magnitudes) or min(magnitudes) < 0:
        raise ValueError(
            f'config.noise.magnitudes={magnitudes}: expected {len(sources)} numbers of 0 or more, '
            'one for each of config.noise.sources.'
        )
    if synthesis.batch_size % len(sources):
        raise ValueError(
            f'config.synthesis.batch_size={synthesis.batch_size} does not divide over '
            f'{len(sources)} sources of noise (config.noise.sources): every class of a batch meets '
            'each of them once. Use a multiple.'
        )
    if config.loss.contrast_of not in ('sources', 'images'):
        raise ValueError(
            f"config.loss.contrast_of={config.loss.contrast_of!r}; expected 'sources' or 'images'."
        )
    inversion.check_generator(config, models)
