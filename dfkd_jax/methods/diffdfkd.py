"""DiffDFKD: images of a pretrained diffusion model, guided by the teacher (arXiv 2504.00870).

A batch of synthesis is a trajectory of the model from noise to images of one class y.  At timestep
t the noised images z_t [B, h, w, c] (latents, or pixels) are what is optimised.  With eps the
model's noise (with a text, eps_u + s (eps_c - eps_u)), a_t the image's share of the variance, D the
decoder, R resizing and normalising, and t, s the logits of the teacher and of a student so far:

    z_0 = (z_t - sqrt(1 - a_t) eps) / sqrt(a_t)      x = R(D(z_0))
    L = bn L_BN(x) + ce CE(t(x), y) - adversarial E[1(argmax s = argmax t) KL(t || s)]
    z_t <- z_t - dL/dz_t                             through the decoder and the U-Net
    z_t <- Latent CutMix of z_t                      at every fifth of the trajectory
    z_t-1: a step of DDPM with the noise predicted at the new z_t

The images of the last timestep are kept, on disk (`disk_bank`), and a student is distilled from
them by ordinary KD at temperature 30 (`teach`); so there is no student step here.

Only the front of the paper could be read.  The terms, their weights and the order of things are its
first figure's and those of the authors' repository, which they re-created after the original was
lost and which does not run as published.  Where the two leave a choice, a field makes it:

    prior.prompt  a text without a class (the figure), or with '{}' for its name (the repository)
    through_unet  the gradient passes the U-Net (the figure's arrows, and the code base of the
                  repository); False: through z_0's own z_t and the decoder only
    per_image     each image's step is as long as in a batch of its own, the repository's size of a
                  batch; False: as its code would do with larger ones, steps shrink with them
    final         'fresh': the last images are of the noise predicted for them; 'stale': of the step
                  before, as in the repository
    cutmix_ratio  the part that stays is 'uniform', or 'double_beta' as drawn in the repository
    intermediate  keep the images at each fifth of the trajectory too, as the repository does

`source` makes the controls: 'unguided' leaves the guidance out, 'noise' the diffusion model as well
(ours).
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from dfkd_jax import contract, losses
from dfkd_jax.contract import Array, Batch, Frozen, Key, Method, Metrics, Models, Params, State
from dfkd_jax.diffusion import resize_bicubic
from dfkd_jax.diffusion import schedule as schedules
from dfkd_jax.distributed.sharding import Shards

SOURCES = ('guided', 'unguided', 'noise')
PARTS = 5  # of a trajectory: at the ends of the first four, Latent CutMix


class Prior(struct.PyTreeNode):
    """`Frozen.extra`: the diffusion model's parameters, and the texts it is conditioned on.

    text: [P, L, D], that of each class, or one for all of them; the last is the negative prompt's.
      () for a model that sees no text.
    """

    params: Params
    text: Any


class Extra(struct.PyTreeNode):
    """The trajectory under way; the same on all devices.

    label: [B] int32, the class of its images.
    x: [B, h, w, c], the noised images.
    eps: the noise last predicted in them.
    step: [] int32, steps done.
    image: [B, S, S, channels] uint8, the batch that was finished last.
    intermediate: [K, B, S, S, channels] uint8, those on its way; None unless asked for (an array
    without numbers in a sharded program ends jax 0.11.2).
    """

    label: Array
    x: Array
    eps: Array
    step: Array
    image: Array
    intermediate: Array | None


def make(config: Any, models: Models, shards: Shards) -> Method:
    """DiffDFKD's synthesis; `frozen.extra` is a `Prior`.  One round is one trajectory.

    Round r makes class r mod C.  Raises ValueError where config, prior and batch do not fit.
    """
    _check(config, models, shards)
    loss, synthesis, settings, prior = config.loss, config.synthesis, config.prior, models.prior
    batch, stored = synthesis.batch_size, synthesis.stored_size
    classes, (size, _, channels) = models.num_classes, models.image_shape
    noised = (batch, *prior_shape(config, models))
    timesteps: Any = ()
    following: Any = ()
    if prior is not None:
        timesteps = schedules.timesteps(prior.schedule, settings.steps)
        following = schedules.previous(prior.schedule, settings.steps)
    part = max(settings.steps // PARTS, 1)
    on_the_way = PARTS - 1  # where images are kept
    learns = sessions(config)
    # Trajectories until a student has learnt from images of every class, and may have a say.
    silent = max(*learns[:1], -(-config.in_loop.start // batch) * classes, 0)

    def init(frozen: Frozen, key: Key) -> State:
        del frozen
        student = models.student.init(key, jnp.zeros((1, *models.image_shape)))
        image = (batch, stored, stored, channels)
        return State(
            round=contract.first_round(),
            student=contract.Net(student['params'], student.get('batch_stats', {}), ()),
            generator=(),
            extra=Extra(
                label=jnp.zeros((batch,), jnp.int32),
                x=jnp.zeros(noised),
                eps=jnp.zeros(noised),
                step=jnp.zeros((), jnp.int32),
                image=jnp.zeros(image, jnp.uint8),
                intermediate=(
                    jnp.zeros((on_the_way, *image), jnp.uint8) if synthesis.intermediate else None
                ),
            ),
        )

    def begin(frozen: Frozen, state: State, key: Key) -> tuple[State, Metrics]:
        del frozen
        x = jax.random.normal(key, noised)
        label = jnp.broadcast_to(state.round % classes, (batch,))
        extra = state.extra.replace(label=label, x=x, step=jnp.zeros((), jnp.int32))
        return state.replace(extra=extra), {}

    def predict(frozen: Frozen, x: Array, t: Array, label: Array) -> Array:
        """The noise in this instance's images; with text, under classifier-free guidance."""
        text = frozen.extra.text
        times = jnp.broadcast_to(t, (len(x),))
        if isinstance(text, tuple):
            return prior.pure.eps(frozen.extra.params, x, times, None)
        wanted = text[label if len(text) == classes + 1 else jnp.zeros_like(label)]
        nothing = jnp.broadcast_to(text[-1], wanted.shape)
        both = prior.pure.eps(
            frozen.extra.params,
            jnp.concatenate([x, x]),
            jnp.concatenate([times, times]),
            jnp.concatenate([wanted, nothing]),
        )
        with_text, without = jnp.split(both, 2)
        return without + settings.scale * (with_text - without)

    def resized(pixel: Array, side: int) -> Array:
        """Decoded images [B, side, side, channels]; a little beyond [0, 1] where resizing rings."""
        pixel = resize_bicubic(pixel, side)
        if pixel.shape[-1] > channels:
            pixel = jnp.mean(pixel, axis=-1, keepdims=True)
        return jnp.broadcast_to(pixel, (*pixel.shape[:3], channels))

    def judged(frozen: Frozen, state: State, pixel: Array, label: Array) -> tuple[Array, Metrics]:
        """The loss of this instance's pixels, and its terms."""
        image = models.normalise(pixel)
        teacher = models.teacher.apply(frozen.teacher, image)
        statistics = frozen.teacher['batch_stats']
        terms = {
            'bn': losses.bn_statistics(teacher.statistics, statistics),
            'ce': jnp.mean(losses.cross_entropy(teacher.logits, label)),
        }
        total = jnp.zeros(())
        for name, weight in (('bn', loss.bn), ('ce', loss.ce)):
            total = total + weight * terms[name] if weight else total
        if learns:
            student = models.student.apply(state.student.variables, image)
            fixed = jax.lax.stop_gradient(teacher.logits)
            terms['adversarial'] = jnp.mean(losses.adversarial(student.logits, fixed))
            scale = jnp.where(state.round >= silent, loss.adversarial, 0.0)
            total = total + scale * terms['adversarial']
        wanted = jax.nn.softmax(teacher.logits)[jnp.arange(len(label)), label]
        return total, terms | {'loss': total, 'confidence': jnp.mean(wanted)}

    def generator_step(frozen: Frozen, state: State, key: Key) -> tuple[State, Metrics]:
        """One guided step of denoising."""
        key_cutmix, key_noise = jax.random.split(key)
        extra, label = state.extra, shards.share(state.extra.label)
        t, t_next = jnp.asarray(timesteps)[extra.step], jnp.asarray(following)[extra.step]

        def guidance(x: Array) -> tuple[Array, tuple[Metrics, Array]]:
            x = shards.share(x)
            eps = predict(frozen, x, t, label)
            if not synthesis.through_unet:
                eps = jax.lax.stop_gradient(eps)
            z0 = schedules.to_x0(prior.schedule, eps, x, t)
            pixel = prior.pure.decode(frozen.extra.params, z0)
            total, terms = judged(frozen, state, resized(pixel, size), label)
            return total, (terms, pixel)

        x, metrics, intermediate = extra.x, {}, extra.intermediate
        if synthesis.source == 'guided':
            (_, (metrics, pixel)), grad = shards.value_and_grad(guidance)(x)
            x = x - (batch if synthesis.per_image else 1) * grad
            if intermediate is not None:
                number = extra.step + 1
                now = (jnp.arange(on_the_way) == number // part - 1) & (number % part == 0)
                image = to_bytes(shards.gather(resized(pixel, stored)))
                now = now[:, None, None, None, None]
                intermediate = jnp.where(now, image[None], intermediate)
        if synthesis.cutmix:
            # Not after the last part: what follows repairs the seams.
            number = extra.step + 1
            now = (number % part == 0) & (number < part * PARTS)
            x = jnp.where(now, cutmix(key_cutmix, x, synthesis.cutmix_ratio), x)
        eps = shards.gather(predict(frozen, shards.share(x), t, label))
        noise = jax.random.normal(key_noise, x.shape)
        x = schedules.ddpm_step(prior.schedule, x, eps, t, t_next, noise)
        extra = extra.replace(x=x, eps=eps, step=extra.step + 1, intermediate=intermediate)
        metrics = shards.mean({'g/' + name: term for name, term in metrics.items()})
        return state.replace(extra=extra), metrics

    def finish(frozen: Frozen, state: State, key: Key) -> tuple[State, Metrics]:
        """The images of the last timestep, as bytes, and what the teacher says of them."""
        extra, label = state.extra, shards.share(state.extra.label)
        if synthesis.source == 'noise':
            shape = (batch, stored, stored, channels)
            pixel = shards.share(models.pixels(jax.random.normal(key, shape)))
        else:
            t, x = timesteps[-1], shards.share(extra.x)
            eps = shards.share(extra.eps)
            if synthesis.final == 'fresh':
                eps = predict(frozen, x, t, label)
            z0 = schedules.to_x0(prior.schedule, eps, x, t)
            pixel = resized(prior.pure.decode(frozen.extra.params, z0), stored)
        seen = pixel if stored == size else resize_bicubic(pixel, size)
        _, terms = judged(frozen, state, jnp.clip(seen, 0, 1), label)
        image = shards.gather(to_bytes(pixel))
        metrics = shards.mean({'g/final_' + name: term for name, term in terms.items()})
        return state.replace(extra=extra.replace(image=image)), metrics

    def sample(frozen: Frozen, state: State, key: Key) -> Batch:
        """The batch that was finished last."""
        del frozen, key
        pixel = state.extra.image.astype(jnp.float32) / 255
        return Batch(models.normalise(resize_bicubic(pixel, size)), state.extra.label)

    return Method(init, generator_step, contract.unchanged, sample, begin, finish)


def per_trajectory(synthesis: Any) -> int:
    """Images that a trajectory makes."""
    return synthesis.batch_size * (PARTS if synthesis.intermediate else 1)


def trajectories(config: Any) -> int:
    """Trajectories of a run: of every class, as many as its images need."""
    synthesis = config.synthesis
    return config.data.num_classes * -(-synthesis.per_class // per_trajectory(synthesis))


def kept(config: Any, number: int) -> int:
    """Images of a trajectory that are kept: the last of a class may make more than are wanted."""
    made = per_trajectory(config.synthesis)
    before = number // config.data.num_classes * made
    return min(made, config.synthesis.per_class - before)


def sessions(config: Any) -> list[int]:
    """The numbers of trajectories after which the in-loop student learns.

    Whenever there are `in_loop.every` more images of every class, once they fill a batch, and
    unless none are to follow.
    """
    every, classes = config.in_loop.every, config.data.num_classes
    if not (every and config.loss.adversarial and config.synthesis.source == 'guided'):
        return []
    chosen, made = [], per_trajectory(config.synthesis)
    for done in range(classes, trajectories(config), classes):
        images = done // classes * made
        crossed = images // every > (images - made) // every
        if crossed and images * classes >= config.in_loop.batch_size:
            chosen.append(done)
    return chosen


def to_bytes(pixel: Array) -> Array:
    """Pixels in [0, 1], clipped, as uint8."""
    return jnp.round(255 * jnp.clip(pixel, 0, 1)).astype(jnp.uint8)


def cutmix(key: Key, x: Array, ratio: str = 'uniform') -> Array:
    """Latent CutMix: one box of all images [B, h, w, c] shows another image of the batch instead.

    The batch has one class, so labels stay.  ratio: of the part that stays, 'uniform' in [0, 1], or
    'double_beta': Beta(a, a) with a uniform.  The key is consumed.
    """
    batch, height, width, _ = x.shape
    key_other, key_ratio, key_centre, key_beta = jax.random.split(key, 4)
    stays = jax.random.uniform(key_ratio)
    if ratio == 'double_beta':
        a = jnp.maximum(stays, 1e-3)
        stays = jax.random.beta(key_beta, a, a)
    sides = jnp.asarray([height, width], jnp.float32)
    centre = jnp.floor(jax.random.uniform(key_centre, (2,)) * sides)
    half = jnp.floor(jnp.floor(sides * jnp.sqrt(1 - stays)) / 2)

    def inside(length: int, i: int) -> Array:
        at = jnp.arange(length, dtype=jnp.float32)
        return (at >= centre[i] - half[i]) & (at < centre[i] + half[i])

    box = inside(height, 0)[:, None] & inside(width, 1)[None, :]
    return jnp.where(box[None, :, :, None], jax.random.permutation(key_other, x), x)


def prior_shape(config: Any, models: Models) -> tuple[int, int, int]:
    """[h, w, c] of what is diffused: the size that the prior was trained at; nothing of none."""
    if models.prior is None:
        return 1, 1, 1
    height, width, channels = models.prior.shape
    if not height:
        size = models.image_shape[0]
        height = width = size // models.prior.factor
    return height, width, channels


def _check(config: Any, models: Models, shards: Shards) -> None:
    synthesis, prior = config.synthesis, models.prior
    if synthesis.cutmix and synthesis.batch_size < 2 and synthesis.source != 'noise':
        raise ValueError(
            'config.synthesis.cutmix mixes the images of a batch: set config.synthesis.batch_size '
            'to 2 or more, or cutmix=False.'
        )
    shards.check('config.synthesis.batch_size', synthesis.batch_size)
    for name, known in (
        ('source', SOURCES),
        ('final', ('fresh', 'stale')),
        ('cutmix_ratio', ('uniform', 'double_beta')),
    ):
        if synthesis[name] not in known:
            raise ValueError(
                f'config.synthesis.{name}={synthesis[name]!r}: expected {" or ".join(known)}.'
            )
    for name in ('per_class', 'batch_size', 'stored_size'):
        if synthesis[name] < 1:
            raise ValueError(f'config.synthesis.{name}={synthesis[name]}: expected 1 or more.')
    _check_distillation(config, models, shards)
    if synthesis.intermediate and (synthesis.source != 'guided' or config.prior.steps < PARTS):
        raise ValueError(
            'config.synthesis.intermediate keeps images of guided steps: it needs '
            f"source='guided' and config.prior.steps of {PARTS} or more."
        )
    if config.prior.steps < 2:
        raise ValueError(f'config.prior.steps={config.prior.steps}: expected 2 or more.')
    if prior is not None:
        schedules.timesteps(prior.schedule, config.prior.steps)  # raises DiffusionError
    elif synthesis.source != 'noise' and not synthesis.bank:
        raise ValueError('diffdfkd needs a diffusion model: set config.prior.path.')
    if set('{}') & set(config.prior.prompt.replace('{}', '')):
        raise ValueError(
            f'config.prior.prompt={config.prior.prompt!r}: expected a text, with {{}} where the '
            "class's name goes, or without one."
        )


def _check_distillation(config: Any, models: Models, shards: Shards) -> None:
    """Whether a student can learn from the images, before hours go into making them."""
    synthesis, size = config.synthesis, models.image_shape[0]
    if config.in_loop.every < 0:
        raise ValueError(f'config.in_loop.every={config.in_loop.every}: expected 0 or more.')
    for group in ('distil', 'in_loop') if sessions(config) else ('distil',):
        recipe = config[group]
        if not recipe.random_resized_crop and synthesis.stored_size != size:
            raise ValueError(
                f'config.synthesis.stored_size={synthesis.stored_size} and config.data.image_size='
                f'{size} differ: make them equal, or set config.{group}.random_resized_crop=True, '
                'which cuts images to size.'
            )
        shards.check(f'config.{group}.batch_size', recipe.batch_size)
    images = synthesis.per_class * models.num_classes
    if images < config.distil.batch_size:
        raise ValueError(
            f'config.distil.batch_size={config.distil.batch_size} is more than the {images} images '
            'of config.synthesis: lower it, or raise config.synthesis.per_class.'
        )
