"""SpaceshipNet: channel-wise exchange of features inside the generator (Yu et al., CVPR 2023).

A batch of synthesis has every class equally often and latents z ~ N(0, I) of its own; one generator
for the whole run is trained for `g_steps` on them, with t the teacher's logits on cropped and
flipped images and y the classes:

    L_G = bn L_BN + ce CE(t, y)

Of the step with the lowest L_G, the maps of the generator at all its levels are kept (0: the input
of its first upsampling; then what follows each upsampling).  Every step of the student draws one
level and a batch of the maps kept of it.  With the probability `synthesis.exchange` its images are
paired, the first with the last, and each gives half of its channels, drawn anew, for those of the
other (CFE).  The generator as it is now, in evaluation mode, makes images of the maps; the student
minimises `shared/msarc.py`'s loss on them (mSARC), at T = 30.

The paper's text was not available to us beyond its abstract.  What is done follows from its
authors' code, which has no licence: the description, and all that is here, are our own.
Differences from that code:

    maps are kept as float16, theirs as float32 on disk; batches of the student are drawn from them
        with replacement, theirs without
    the bank has a size (`synthesis.bank`, the newest are kept); theirs keeps all
    every level of a row of the bank is of the same image, theirs come from a shuffle each
"""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from flax import struct

from dfkd_jax import contract
from dfkd_jax.contract import Array, Batch, Frozen, Key, Method, Metrics, Models, Params, State
from dfkd_jax.distributed.sharding import Shards
from dfkd_jax.methods.shared import image_bank as banks
from dfkd_jax.methods.shared import inversion

Maps = tuple[Array, ...]  # [N, h, w, C] of each level


class Extra(struct.PyTreeNode):
    """SpaceshipNet's own state.

    bank: synthetic images and the classes they were made for.
    maps: [N, h, w, C] float16 of each level, the generator's maps of the images in the bank.
    batch: the batch of synthesis under way.
    latent: [B, latent], its latents.
    best: its maps at the step with the lowest loss so far, float16.
    """

    bank: banks.Bank
    maps: Maps
    batch: inversion.SynthesisBatch
    latent: Array
    best: Maps


def balanced(batch: int, classes: int) -> Array:
    """The classes of a batch, [batch]: the list of all, again and again."""
    return jnp.arange(batch, dtype=jnp.int32) % classes


def own_channels(key: Key, batch: int, channels: int) -> Array:
    """Which channels each image keeps: half of them, rounded down, [batch, channels] bool.

    The key is consumed.
    """
    half = jnp.broadcast_to(jnp.arange(channels) < channels // 2, (batch, channels))
    return jax.random.permutation(key, half, axis=1, independent=True)


def exchange(x: Array, other: Array, keep: Array) -> Array:
    """Maps [B, h, w, C] with the channels of `other` where `keep` [B, C] is False."""
    return jnp.where(keep[:, None, None, :], x, other)


def reinitialise(key: Key, params: Params, mode: Literal['fan_in', 'fan_avg']) -> Params:
    """Params drawn as its authors' code draws them.  The key is consumed.

    Kernels from N(0, sqrt(2 / fan)), scales of norms from N(1, 0.02), biases zero; others stay.
    mode: which fan, 'fan_in' (the generator's) or 'fan_avg' (the student's).
    """
    leaves, tree = jax.tree_util.tree_flatten_with_path(params)
    normal = jax.nn.initializers.variance_scaling(2.0, mode, 'normal')

    def draw(name: str, key: Key, like: Array) -> Array:
        if name == 'kernel':
            return normal(key, like.shape)
        if name == 'scale':
            return 1 + 0.02 * jax.random.normal(key, like.shape)
        return jnp.zeros_like(like) if name == 'bias' else like

    keys = jax.random.split(key, len(leaves))
    drawn = [draw(path[-1].key, k, x) for (path, x), k in zip(leaves, keys, strict=True)]
    return jax.tree.unflatten(tree, drawn)


def make(config: Any, models: Models, shards: Shards) -> Method:
    """SpaceshipNet for these networks.

    Raises ValueError where a batch, a bank, the exchange or the generator does not fit.
    """
    inversion.check_generator(config, models)
    shapes = _shapes(models)
    _check(config.synthesis, len(shapes))
    loss, synthesis, settings = config.loss, config.synthesis, config.generator
    batch_size, latent = synthesis.batch_size, models.generator.latent
    learner = inversion.learner(config, models, shards)
    generator_tx = optax.adam(settings.lr, settings.beta1, settings.beta2)

    def init(frozen: Frozen, key: Key) -> State:
        keys = jax.random.split(key, 4)
        whole = models.generator.clone(axis_name=None)
        variables = whole.init(keys[1], jnp.zeros((1, latent)))
        params = reinitialise(keys[2], variables['params'], 'fan_in')
        student = learner.start(keys[0])

        def blank(count: int) -> Maps:
            return tuple(jnp.zeros((count, *shape), jnp.float16) for shape in shapes)

        return State(
            round=contract.first_round(),
            student=student.replace(params=reinitialise(keys[3], student.params, 'fan_avg')),
            generator=contract.start(params, variables['batch_stats'], generator_tx),
            extra=Extra(
                bank=banks.empty(synthesis.bank, models.image_shape),
                maps=blank(synthesis.bank),
                batch=inversion.empty_batch(
                    batch_size, models.image_shape, frozen.teacher.get('batch_stats', {})
                ),
                latent=jnp.zeros((batch_size, latent)),
                best=blank(batch_size),
            ),
        )

    def begin(frozen: Frozen, state: State, key: Key) -> tuple[State, Metrics]:
        """New latents and a new Adam; the generator goes on."""
        del frozen
        label = balanced(batch_size, models.num_classes)
        extra = state.extra.replace(
            batch=inversion.begin(state.extra.batch, label),
            latent=jax.random.normal(key, (batch_size, latent)),
        )
        generator = state.generator
        generator = generator.replace(opt_state=generator_tx.init(generator.params))
        return state.replace(generator=generator, extra=extra), {}

    def generator_step(
        frozen: Frozen, state: State, key: Key, learning: bool = True
    ) -> tuple[State, Metrics]:
        crop_flip = learner.draw_crop_flip(key, batch_size)
        extra, label = state.extra, shards.share(state.extra.batch.label)

        def loss_fn(params: Params) -> tuple[Array, tuple]:
            variables = {'params': params, 'batch_stats': state.generator.batch_stats}
            maps: list[Array] = []

            def tap(level: int, x: Array) -> Array:
                del level
                maps.append(x)
                return x

            pixel, mutated = models.generator.apply(
                variables, shards.share(extra.latent), train=True, tap=tap, mutable=['batch_stats']
            )
            image = learner.view(pixel, crop_flip)
            total, terms, teacher = learner.generator_loss(frozen, state, image, label, learning)
            return total, (terms, mutated['batch_stats'], teacher.statistics, pixel, tuple(maps))

        (total, aux), grads = shards.value_and_grad(loss_fn)(state.generator.params)
        terms, batch_stats, statistics, pixel, maps = aux
        better = total < extra.batch.lowest
        best = tuple(
            jnp.where(better, shards.gather(new.astype(jnp.float16)), old)
            for new, old in zip(maps, extra.best, strict=True)
        )
        batch = inversion.keep_best(extra.batch, total, shards.gather(pixel), statistics)
        generator = contract.update(state.generator, grads, generator_tx, batch_stats)
        metrics = shards.mean({'g/' + name: term for name, term in terms.items()})
        return state.replace(
            generator=generator, extra=extra.replace(batch=batch, best=best)
        ), metrics

    def finish(frozen: Frozen, state: State, key: Key) -> tuple[State, Metrics]:
        """The best images to the bank, and their maps."""
        del frozen, key
        extra, put = state.extra, jax.lax.dynamic_update_slice_in_dim
        at = extra.bank.written % synthesis.bank
        maps = tuple(put(x, new, at, 0) for x, new in zip(extra.maps, extra.best, strict=True))
        batch, bank = inversion.finish(extra.batch, extra.bank, loss.bn_momentum)
        return state.replace(extra=extra.replace(batch=batch, bank=bank, maps=maps)), {}

    def render(state: State, key: Key, rows: Array) -> Array:
        """This instance's share of the images that the generator makes of kept maps, in [0, 1].

        rows: [B] of the bank, of the whole batch.  The key is consumed.
        """
        key_level, key_coin, key_channels = jax.random.split(key, 3)
        which = jax.random.randint(key_level, (), 0, len(synthesis.levels))
        chosen = jnp.asarray(tuple(synthesis.levels), jnp.int32)[which]
        mixes = jax.random.bernoulli(key_coin, synthesis.exchange)
        own, other = shards.share(rows), shards.share(rows[::-1])

        def tap(level: int, x: Array) -> Array:
            if level not in synthesis.levels:
                return x
            keep = own_channels(jax.random.fold_in(key_channels, level), len(rows), x.shape[-1])
            kept = state.extra.maps[level]
            mixed = exchange(kept[own], kept[other], shards.share(keep) | ~mixes)
            return jnp.where(chosen == level, mixed.astype(x.dtype), x)

        blank = jnp.zeros((len(own), latent))  # what is before the chosen level does not count
        return models.generator.apply(state.generator.variables, blank, train=False, tap=tap)

    def images(state: State, key: Key, apart: bool = False) -> Batch:
        key_rows, key_render = jax.random.split(key)
        rows = learner.rows(state, key_rows, apart)
        label = state.extra.bank.label[shards.share(rows)]
        return Batch(models.normalise(render(state, key_render, rows)), label)

    def sample(frozen: Frozen, state: State, key: Key) -> Batch:
        """Images of kept maps, exchanged or not, with the class that each half was made for."""
        del frozen
        return images(state, key)

    def held_out(frozen: Frozen, state: State, key: Key) -> Batch:
        """As `sample`, of maps that the student sees none of."""
        del frozen
        return images(state, key, apart=True)

    def student_step(frozen: Frozen, state: State, key: Key) -> tuple[State, Metrics]:
        key_rows, key_render, key_crop_flip, key_other, key_mix = jax.random.split(key, 5)
        pixel = render(state, key_render, learner.rows(state, key_rows))
        pixel = learner.mix(state, pixel, key_other, key_mix)
        drawn = learner.draw_crop_flip(key_crop_flip, synthesis.student_batch_size)
        return learner.distil(frozen, state, learner.view(pixel, drawn))

    return Method(
        init, generator_step, student_step, sample, begin, finish, held_out,
        warmup_step=partial(generator_step, learning=False),
    )  # fmt: skip


def _shapes(models: Models) -> list[tuple[int, ...]]:
    """The shapes [h, w, C] of a generator's maps, from level 0 on."""
    shapes: list[tuple[int, ...]] = []

    def tap(level: int, x: Array) -> Array:
        del level
        shapes.append(x.shape[1:])
        return x

    whole = models.generator.clone(axis_name=None)
    blank = jax.ShapeDtypeStruct((1, models.generator.latent), jnp.float32)
    jax.eval_shape(lambda z: whole.init_with_output(jax.random.key(0), z, tap=tap), blank)
    return shapes


def _check(synthesis: Any, levels: int) -> None:
    if not 0 <= synthesis.exchange <= 1:
        raise ValueError(
            f'config.synthesis.exchange={synthesis.exchange}: expected a probability, 0 to 1.'
        )
    known = range(levels)
    if not synthesis.levels or not set(synthesis.levels) <= set(known):
        raise ValueError(
            f'config.synthesis.levels={tuple(synthesis.levels)}: expected one or more of the '
            f'levels of this generator, {", ".join(map(str, known))}.'
        )
