"""DiffDFKD: images of a pretrained diffusion model, guided by the teacher (arXiv 2504.00870).

A batch of synthesis is a trajectory of the diffusion model from noise to images of one class y.  At
timestep t, what is optimised is the noised images x_t [B, h, w, c] (latents, or pixels).  With eps
the model's noise (with a text, eps_u + s (eps_c - eps_u)), a_t the image's share of the variance, D
the decoder, R resizing and normalising, and t, s the logits of the teacher and of a student so far:

    x_0 = (x_t - sqrt(1 - a_t) eps) / sqrt(a_t)      image = R(D(x_0))
    L = bn L_BN(image) + ce CE(t, y) - adversarial E[1(argmax s = argmax t) KL(t || s)]
    x_t <- x_t - dL/dx_t                             through the decoder and the U-Net
    x_t <- Latent CutMix of x_t                      at every fifth of the trajectory
    x_t-1: an ancestral step (DDPM) with the noise predicted at the new x_t

The images of the last timestep are kept on disk (`data.synthetic`), and a student is distilled from
them by ordinary KD at temperature 30 (`loops.supervised`); so there is no student step here.

Only the front of the paper could be read.  The terms, their weights and the order of the steps are
those of its first figure and of the authors' repository, which they re-created after the original
was lost and which does not run as published.  Where the two leave a choice, a field makes it:

    prior.prompt  a text without a class (the figure), or with '{}' for its name (the repository)
    through_unet  the gradient passes the U-Net (the figure's arrows, and the code base of the
                  repository); False: through x_0's own x_t and the decoder only
    per_image     each image's step is as long as in a batch of its own, the repository's size of a
                  batch; False: as its code would do with larger ones, steps shrink with them
    final         'fresh': the last images are of the noise predicted for them; 'stale': of the
                  noise and the timestep of the step before, as in the repository
    cutmix_ratio  the part that stays is 'uniform', or 'double_beta' as drawn in the repository
    intermediate  keep the images at each fifth of the trajectory too, as the repository does
    four_taps     the teacher's guidance sees images resized without antialiasing, as older PyTorch
                  does; stored images, and what a student sees of them, are resized as by Pillow

`source` makes the controls: 'unguided' leaves out the guidance, 'noise' the diffusion model as well
(ours).
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from dfkd_jax import contract, losses
from dfkd_jax.contract import Array, Batch, Frozen, Key, Method, Metrics, Models, State
from dfkd_jax.diffusion import resize_bicubic
from dfkd_jax.diffusion import schedule as schedules
from dfkd_jax.distributed.sharding import Shards
from dfkd_jax.methods.shared import image_prior, trajectories
from dfkd_jax.methods.shared.trajectories import PARTS

SOURCES = ('guided', 'unguided', 'noise')


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


# 1. The steps of the paper.


def predict_noise(
    models: Models, scale: float, frozen: Frozen, x: Array, t: Array, label: Array
) -> Array:
    """The noise eps in x [B, h, w, c] at timestep t [], as the diffusion model predicts it.

    With text, under classifier-free guidance of this scale (Ho & Salimans 2022).
    """
    eps, prior = models.prior.pure.eps, frozen.extra
    times = jnp.broadcast_to(t, (len(x),))
    if isinstance(prior.text, tuple):
        return eps(prior.params, x, times, None)
    one_for_each_class = len(prior.text) == models.num_classes + 1
    prompt = prior.text[label if one_for_each_class else jnp.zeros_like(label)]
    negative = jnp.broadcast_to(prior.text[-1], prompt.shape)
    both = eps(
        prior.params,
        jnp.concatenate([x, x]),
        jnp.concatenate([times, times]),
        jnp.concatenate([prompt, negative]),
    )
    conditional, unconditional = jnp.split(both, 2)
    return unconditional + scale * (conditional - unconditional)


def predict_pixels(models: Models, frozen: Frozen, x: Array, eps: Array, t: Array) -> Array:
    """The decoded images of x without its noise eps, in [0, 1] but for what the decoder does."""
    x0 = schedules.to_x0(models.prior.schedule, eps, x, t)
    return models.prior.pure.decode(frozen.extra.params, x0)


def resize(models: Models, pixel: Array, size: int, four_taps: bool = False) -> Array:
    """Decoded images [B, size, size, channels]; a little beyond [0, 1] where resizing rings."""
    channels = models.image_shape[-1]
    pixel = resize_bicubic(pixel, size, antialias=not four_taps)
    if pixel.shape[-1] > channels:
        pixel = jnp.mean(pixel, axis=-1, keepdims=True)
    return jnp.broadcast_to(pixel, (*pixel.shape[:3], channels))


def image_loss(
    config: Any,
    models: Models,
    frozen: Frozen,
    state: State,
    pixel: Array,
    label: Array,
    adversary_from: int | None,
) -> tuple[Array, Metrics]:
    """L of this instance's pixels [B, H, W, channels] and its terms.

    adversary_from: what `adversary_round` returns.
    """
    loss, running = config.loss, frozen.teacher['batch_stats']
    image = models.normalise(pixel)
    teacher = models.teacher.apply(frozen.teacher, image)
    total, terms = image_prior.loss(config, frozen, image)
    if running:
        terms['bn'] = losses.bn_statistics(teacher.statistics, running, loss.bn_form)
    terms['ce'] = jnp.mean(losses.cross_entropy(teacher.logits, label))
    for name, weight in (('bn', loss.bn), ('ce', loss.ce)):
        total = total + weight * terms[name] if weight and name in terms else total
    if adversary_from is not None:
        student = models.student.apply(state.student.variables, image)
        target = jax.lax.stop_gradient(teacher.logits)
        terms['adversarial'] = jnp.mean(losses.adversarial(student.logits, target))
        weight = jnp.where(state.round >= adversary_from, loss.adversarial, 0.0)
        total = total + weight * terms['adversarial']
    confidence = jax.nn.softmax(teacher.logits)[jnp.arange(len(label)), label]
    return total, terms | {'loss': total, 'confidence': jnp.mean(confidence)}


def adversary_round(config: Any) -> int | None:
    """The round from which on the student takes part in the guidance; None: never.

    By then it has been trained, and there are `in_loop.start` images of every class.
    """
    classes, batch_size = config.data.num_classes, config.synthesis.batch_size
    trainings = trajectories.in_loop_trainings(
        config.synthesis, config.in_loop, config.loss.adversarial, classes
    )
    if not trainings:
        return None
    return max(trainings[0], -(-config.in_loop.start // batch_size) * classes)


def guidance_loss(
    config: Any,
    models: Models,
    frozen: Frozen,
    state: State,
    x: Array,
    t: Array,
    label: Array,
    adversary_from: int | None,
) -> tuple[Array, tuple[Metrics, Array]]:
    """L of this instance's noised images x [B, h, w, c] at timestep t: what guides them.

    Returns it with its terms and the pixels predicted at x.
    """
    eps = predict_noise(models, config.prior.scale, frozen, x, t, label)
    if not config.synthesis.through_unet:
        eps = jax.lax.stop_gradient(eps)
    pixel = predict_pixels(models, frozen, x, eps, t)
    seen = resize(models, pixel, models.image_shape[0], config.synthesis.four_taps)
    total, terms = image_loss(config, models, frozen, state, seen, label, adversary_from)
    return total, (terms, pixel)


def latent_cutmix(key: Key, x: Array, ratio: str = 'uniform') -> Array:
    """Latent CutMix: one box of all images [B, h, w, c] shows another image of the batch instead.

    The batch has one class, so labels stay.  The box has a uniform centre and sides of
    sqrt(1 - part that stays), is clipped at the borders and rounded, as in the function that the
    repository's augmentation number 3 calls (another one there, for pixels, has whole centres).
    ratio: of the part that stays, 'uniform' in [0, 1], or 'double_beta': Beta(a, a) with a uniform.
    The key is consumed.
    """
    _, height, width, _ = x.shape
    key_other, key_ratio, key_centre, key_beta = jax.random.split(key, 4)
    stays = jax.random.uniform(key_ratio)
    if ratio == 'double_beta':
        a = jnp.maximum(stays, 1e-3)
        stays = jax.random.beta(key_beta, a, a)
    sides = jnp.asarray([height, width], jnp.float32)
    centre, half = jax.random.uniform(key_centre, (2,)) * sides, sides * jnp.sqrt(1 - stays) / 2
    first = jnp.round(jnp.maximum(centre - half, 0))
    end = jnp.round(jnp.minimum(centre + half, sides))

    def inside(length: int, i: int) -> Array:
        at = jnp.arange(length, dtype=jnp.float32)
        return (at >= first[i]) & (at < end[i])

    box = inside(height, 0)[:, None] & inside(width, 1)[None, :]
    return jnp.where(box[None, :, :, None], jax.random.permutation(key_other, x), x)


def ancestral_step(
    config: Any,
    models: Models,
    shards: Shards,
    frozen: Frozen,
    x: Array,
    t: Array,
    t_next: Array,
    label: Array,
    key: Key,
) -> tuple[Array, Array]:
    """The whole batch x [B, h, w, c] at t_next < t, and the noise predicted at x (DDPM).

    label: [B], this instance's share.  The key is consumed.
    """
    eps = predict_noise(models, config.prior.scale, frozen, shards.share(x), t, label)
    eps, noise = shards.gather(eps), jax.random.normal(key, x.shape)
    return schedules.ddpm_step(models.prior.schedule, x, eps, t, t_next, noise), eps


# 2. The method.


def make(config: Any, models: Models, shards: Shards) -> Method:
    """DiffDFKD's synthesis; `frozen.extra` is a `FrozenPrior`.  One round is one trajectory.

    Round r makes class r mod C.  Raises ValueError where config, prior and batch do not fit.
    """
    _check(config, models, shards)
    synthesis, prior, steps = config.synthesis, models.prior, config.prior.steps
    batch_size, (size, _, channels) = synthesis.batch_size, models.image_shape
    x_shape = (batch_size, *prior_shape(config, models))
    stored_shape = (batch_size, synthesis.stored_size, synthesis.stored_size, channels)
    timesteps: Any = () if prior is None else schedules.timesteps(prior.schedule, steps)
    following: Any = () if prior is None else schedules.previous(prior.schedule, steps)
    part = max(steps // PARTS, 1)  # steps
    adversary_from = adversary_round(config)

    def init(frozen: Frozen, key: Key) -> State:
        del frozen
        student = models.student.init(key, jnp.zeros((1, *models.image_shape)))
        intermediate = None
        if synthesis.intermediate:
            intermediate = jnp.zeros((PARTS - 1, *stored_shape), jnp.uint8)
        return State(
            round=contract.first_round(),
            student=contract.Net(student['params'], student.get('batch_stats', {}), ()),
            generator=(),
            extra=Extra(
                label=jnp.zeros((batch_size,), jnp.int32),
                x=jnp.zeros(x_shape),
                eps=jnp.zeros(x_shape),
                step=jnp.zeros((), jnp.int32),
                image=jnp.zeros(stored_shape, jnp.uint8),
                intermediate=intermediate,
            ),
        )

    def begin(frozen: Frozen, state: State, key: Key) -> tuple[State, Metrics]:
        """Noise, and the class of the round."""
        del frozen
        x = jax.random.normal(key, x_shape)
        label = jnp.broadcast_to(state.round % models.num_classes, (batch_size,))
        extra = state.extra.replace(label=label, x=x, step=jnp.zeros((), jnp.int32))
        return state.replace(extra=extra), {}

    def generator_step(frozen: Frozen, state: State, key: Key) -> tuple[State, Metrics]:
        """One guided step of denoising."""
        key_cutmix, key_noise = jax.random.split(key)
        extra, label = state.extra, shards.share(state.extra.label)
        t, t_next = jnp.asarray(timesteps)[extra.step], jnp.asarray(following)[extra.step]
        step, x, intermediate = extra.step + 1, extra.x, extra.intermediate
        metrics: Metrics = {}

        def loss_fn(x: Array) -> tuple[Array, tuple[Metrics, Array]]:
            share = shards.share(x)
            return guidance_loss(config, models, frozen, state, share, t, label, adversary_from)

        if synthesis.source == 'guided':
            (_, (metrics, pixel)), grad = shards.value_and_grad(loss_fn)(x)
            x = x - (batch_size if synthesis.per_image else 1) * grad
            if intermediate is not None:
                now = (jnp.arange(PARTS - 1) == step // part - 1) & (step % part == 0)
                image = to_bytes(shards.gather(resize(models, pixel, synthesis.stored_size)))
                now = now[:, None, None, None, None]
                intermediate = jnp.where(now, image[None], intermediate)
        if synthesis.cutmix:
            # Not after the last part: what follows repairs the seams.
            now = (step % part == 0) & (step < part * PARTS)
            x = jnp.where(now, latent_cutmix(key_cutmix, x, synthesis.cutmix_ratio), x)
        x, eps = ancestral_step(config, models, shards, frozen, x, t, t_next, label, key_noise)
        extra = extra.replace(x=x, eps=eps, step=step, intermediate=intermediate)
        metrics = shards.mean({'g/' + name: term for name, term in metrics.items()})
        return state.replace(extra=extra), metrics

    def finish(frozen: Frozen, state: State, key: Key) -> tuple[State, Metrics]:
        """The images of the last timestep as bytes, and the teacher's loss of them."""
        extra, label = state.extra, shards.share(state.extra.label)
        if synthesis.source == 'noise':
            pixel = shards.share(models.pixels(jax.random.normal(key, stored_shape)))
        else:
            x = shards.share(extra.x)
            if synthesis.final == 'fresh':
                t = timesteps[-1]
                eps = predict_noise(models, config.prior.scale, frozen, x, t, label)
            else:
                t, eps = timesteps[-2], shards.share(extra.eps)
            pixel = predict_pixels(models, frozen, x, eps, t)
            pixel = resize(models, pixel, synthesis.stored_size)
        seen = jnp.clip(resize_bicubic(pixel, size), 0, 1)
        _, terms = image_loss(config, models, frozen, state, seen, label, adversary_from)
        image = shards.gather(to_bytes(pixel))
        metrics = shards.mean({'g/final_' + name: term for name, term in terms.items()})
        return state.replace(extra=extra.replace(image=image)), metrics

    def sample(frozen: Frozen, state: State, key: Key) -> Batch:
        """The batch that was finished last."""
        del frozen, key
        pixel = state.extra.image.astype(jnp.float32) / 255
        return Batch(models.normalise(resize_bicubic(pixel, size)), state.extra.label)

    return Method(init, generator_step, contract.unchanged, sample, begin, finish)


def to_bytes(pixel: Array) -> Array:
    """Pixels in [0, 1], clipped, as uint8."""
    return jnp.round(255 * jnp.clip(pixel, 0, 1)).astype(jnp.uint8)


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
    for group in ('distil', 'in_loop') if adversary_round(config) is not None else ('distil',):
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
