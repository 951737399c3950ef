"""CPSC-DFKD: conditional pseudo-supervised contrast (arXiv 2510.03375, Pattern Recognition 143).

A generator conditioned on the class through its batch norms plays against the student: it seeks
images on which student and teacher disagree, that the teacher takes for the class asked for, that
match the teacher's batch statistics, and whose features, the teacher's and the student's, cluster
by class.  With t, s the teacher's and student's logits and D the mean KL(t || s):

    L_G = - kd D(t, s) - ikd I(s, sg[t]) + bn L_BN + scl L_SCL + ce L_CE(t, y)
    L_S =   kd D(t, s) + ikd I(s, t)     + ce L_CE(s, y)

I is the mean squared difference of logits (`ikd_form='mse'`; CIFAR-100, Tiny-ImageNet) or its log
(`'log'`; CIFAR-10, where the student's is the log of the batch's Frobenius norm, half the slope).
L_SCL is the supervised contrast over the two views; gradients reach the generator through both
networks.  For a teacher without batch norms see `shared/image_prior.py`.  Every step draws new
latents z ~ N(0, I) and classes y ~ U{0..C-1}; the authors' code has no image bank and no
augmentation.

The paper's text was not available to us: the losses are those of the authors' published code.
Where the code departs from its equations, a config field chooses.  The default follows the
equations; `as_published` follows the code in all of them:

    loss.double_softmax        the code feeds probabilities to a cross entropy that takes a softmax
    generator.reset_adam       the code makes a new Adam at every step, which turns it into
                               sign descent at a constant rate; else Adam persists
    loss.adapter_normalise     the code's adapter (below) leaves its output un-normalised: False
    generator.epsilon          of four norms of `cpsc_deep_generator`: the code hands them the 0.8
                               that was meant for a momentum as their epsilon
    synthesis.update_student_statistics
                               the code's student is in train mode while the generator trains, so
                               its running statistics move there too: True
    student.schedule           'published': linear over ten epochs of 50 rounds, then cosine, both
                               constant within an epoch; 'cosine': the same, step by step

Not reproduced: float16 without loss scaling (we run float32 or bfloat16); the optimisation of z
(which the code then draws anew, so that it has no effect); the generator's learning-rate schedule
(which acts there on an optimiser that never takes a step).

Ours, for short budgets, and all off in `as_published`:

    generator.spread           starts the classes apart (see `ConditionalBatchNorm`)
    generator.bounded          keeps images within the range of pixels (see `bound`): the published
                               generator ends in a norm, and its pixels may be darker than black
    generator.darkest          dims every image by a factor drawn from U(darkest, 1)
    generator.class_brightness False: all classes share the last norm's scale and shift.  Else the
                               quickest way to a class is a brightness of its own, from which a
                               student learns little about shapes
    generator.decay            anneals the generator's rate to zero over the run
    synthesis.bank             how many of the images that the generator last trained on are kept
                               for the student; 0: every batch of the student is drawn anew
    synthesis.crop_padding, synthesis.flip
                               augment the student's images
    synthesis.shade            how deeply an image of the bank may be shaded by another
    synthesis.cutmix           the probability that a box of it shows another; the teacher labels it
    loss.temperature           softens the student's distillation
    loss.student_pseudo_labels False: no L_CE in L_S.  Early on the generator misses the class asked
                               for, and the label contradicts the teacher
    student.nesterov           Nesterov's momentum

A student whose features are narrower than its teacher's (WRN-40-1, WRN-16-1) takes part in the
contrast through an adapter, a random two-layer projection that is never trained, as in the code.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from flax import struct

from dfkd_jax import augment, contract, losses
from dfkd_jax.contract import Array, Batch, Frozen, Key, Method, Metrics, Models, Params, State
from dfkd_jax.distributed.sharding import Shards
from dfkd_jax.methods.shared import image_bank as banks
from dfkd_jax.methods.shared import image_prior
from dfkd_jax.methods.shared import msarc as imitation


class Extra(struct.PyTreeNode):
    """CPSC's own state.

    adapter: its weights, never trained; ``{}`` where widths agree.
    bank: the last images that the generator trained on; None if the student sees fresh ones.
    """

    adapter: Params
    bank: banks.Bank | None


class Inputs(struct.PyTreeNode):
    """What a batch of images is made from: latents [B, latent], classes [B], exposures [B]."""

    z: Array
    label: Array
    exposure: Array


class Adapter(nn.Module):
    """Student features [B, F_s] to the teacher's width [B, F_t].

    It is never trained, so where it starts is all that it is: as PyTorch's linear layers do.
    """

    features: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        def linear(x: Array, features: int, name: str) -> Array:
            bound = x.shape[-1] ** -0.5

            def init(key: Key, shape: tuple[int, ...], dtype: Any = jnp.float32) -> Array:
                return jax.random.uniform(key, shape, dtype, -bound, bound)

            return nn.Dense(features, kernel_init=init, bias_init=init, name=name)(x)

        return linear(nn.relu(linear(x, x.shape[-1], 'hidden')), self.features, 'out')


def bound(image: Array, mean: Array, std: Array) -> Array:
    """Brings normalised images [B, H, W, channels] smoothly into the range of pixels.

    mean, std: of pixels in [0, 1], [1, 1, 1, channels].  The pixels are a sigmoid with the value
    and the slope of ``mean + std * image`` at image 0, and are normalised again: an image of zero
    mean and unit variance nearly keeps both.
    """
    pixel = nn.sigmoid(jnp.log(mean / (1 - mean)) + image * std / (mean * (1 - mean)))
    return (pixel - mean) / std


def generator_terms(
    loss: Any, teacher: Any, student: Any, views: Array | None, running: Params, label: Array,
    shards: Shards,
) -> dict[str, Array]:  # fmt: skip
    """The terms of L_G, unweighted and signed so that the generator minimises each.

    loss: config.loss; a term of weight 0 is left out, of the dictionary and of the program.
    teacher, student: `Output`s on the synthetic batch; views: [2, B, F] unit features of the
    student and the teacher; running: the teacher's running statistics; label: [B].
    """
    terms = {}
    if loss.kd:
        terms['kd'] = -jnp.mean(losses.kd(student.logits, teacher.logits))
    if loss.ikd:
        fixed = jax.lax.stop_gradient(teacher.logits)
        error = jnp.mean(losses.squared_error(student.logits, fixed))
        terms['ikd'] = -jnp.log(shards.mean(error)) if loss.ikd_form == 'log' else -error
    if loss.bn and running:
        terms['bn'] = losses.bn_statistics(teacher.statistics, running, loss.bn_form)
    if loss.scl and views is not None:
        # The contrast compares every image with every other, on whichever device it is.
        views = jnp.stack([shards.gather(view) for view in views])
        whole_label = shards.gather(label)
        terms['scl'] = jnp.mean(
            losses.supervised_contrastive(views, whole_label, loss.scl_temperature)
        )
    if loss.ce:
        terms['ce'] = jnp.mean(_cross_entropy(loss)(teacher.logits, label))
    return terms


def student_terms(
    loss: Any, student_logits: Array, teacher_logits: Array, label: Array, shards: Shards
) -> dict[str, Array]:
    """The terms of L_S, unweighted; logits [B, C], label [B].

    Without D where `loss.student` is another distillation.
    """
    terms = {}
    if loss.kd and loss.student == 'kd':
        terms['kd'] = jnp.mean(losses.kd(student_logits, teacher_logits, loss.temperature))
    if loss.ikd:
        error = jnp.mean(losses.squared_error(student_logits, teacher_logits))
        if loss.ikd_form == 'log':
            # log of the Frobenius norm over the whole batch: sqrt of the sum, not of the mean.
            count = student_logits.size * shards.size
            terms['ikd'] = 0.5 * jnp.log(shards.mean(error) * count)
        else:
            terms['ikd'] = error
    if loss.ce and loss.student_pseudo_labels:
        terms['ce'] = jnp.mean(_cross_entropy(loss)(student_logits, label))
    return terms


def make(config: Any, models: Models, shards: Shards) -> Method:
    """CPSC-DFKD for these networks.

    Raises ValueError where a batch does not divide over the shards or a choice is unknown.
    """
    _check(config, models, shards)
    loss, synthesis = config.loss, config.synthesis
    shape, classes = models.image_shape, models.num_classes
    msarc = imitation.make(config, models.teacher, models.student, shape, shards)
    student_tx = _student_optimiser(config)
    generator_tx = _generator_optimiser(config)
    blank = jax.ShapeDtypeStruct((1, *shape), jnp.float32)
    widths = [
        jax.eval_shape(lambda x, m=module: m.init_with_output(jax.random.key(0), x)[0], blank)
        .features.shape[-1]
        for module in (models.teacher, models.student)
    ]  # fmt: skip
    adapter = Adapter(widths[0]) if widths[0] != widths[1] else None
    # Padding is black: zero before normalising, -mean / std after it.
    black = [-m / s for m, s in zip(models.mean, models.std)]

    def init(frozen: Frozen, key: Key) -> State:
        del frozen
        key_student, key_generator, key_adapter = jax.random.split(key, 3)
        student = models.student.init(key_student, jnp.zeros(blank.shape))
        generator = models.generator.init(
            key_generator, jnp.zeros((1, models.generator.latent)), jnp.zeros((1,), jnp.int32)
        )
        adapter_params: Params = {}
        if adapter is not None:
            adapter_params = adapter.init(key_adapter, jnp.zeros((1, widths[1])))['params']
        return State(
            round=contract.first_round(),
            student=contract.start(student['params'], student.get('batch_stats', {}), student_tx),
            generator=contract.start(generator['params'], generator['batch_stats'], generator_tx),
            extra=Extra(
                adapter=adapter_params,
                bank=banks.empty(synthesis.bank, shape) if synthesis.bank else None,
            ),
        )

    def draw_inputs(key: Key, batch_size: int) -> Inputs:
        """This instance's share of the inputs of a batch."""
        key_z, key_label, key_exposure = jax.random.split(key, 3)
        whole = Inputs(
            z=jax.random.normal(key_z, (batch_size, models.generator.latent)),
            label=jax.random.randint(key_label, (batch_size,), 0, classes),
            exposure=jax.random.uniform(
                key_exposure, (batch_size,), minval=config.generator.darkest
            ),
        )
        return jax.tree.map(shards.share, whole)

    def generate(variables: Any, inputs: Inputs) -> tuple[Array, Params]:
        """Images [B, H, W, channels] and the generator's new running statistics."""
        image, mutated = models.generator.apply(
            variables, inputs.z, inputs.label, train=True, mutable=['batch_stats']
        )
        if config.generator.bounded:
            image = bound(image, *map(contract.per_channel, (models.mean, models.std)))
        if config.generator.darkest < 1:
            exposure = inputs.exposure[:, None, None, None]
            image = models.normalise(exposure * models.pixels(image))
        return image, mutated['batch_stats']

    def apply_student(variables: Any, image: Array) -> tuple[Any, Params]:
        """The student in train mode, and its new running statistics."""
        out, mutated = models.student.apply(variables, image, train=True, mutable=['batch_stats'])
        return out, mutated.get('batch_stats', {})

    def contrast_views(student: Any, teacher: Any, adapter_params: Params) -> Array:
        """The two views of the contrast, [2, B, F], of unit length."""
        view = losses.normalise(student.features)
        if adapter is not None:
            adapted: Any = adapter.apply({'params': adapter_params}, view)
            view = losses.normalise(adapted) if loss.adapter_normalise else adapted
        return jnp.stack([view, losses.normalise(teacher.features)])

    def generator_step(frozen: Frozen, state: State, key: Key) -> tuple[State, Metrics]:
        inputs = draw_inputs(key, synthesis.batch_size)

        def generator_loss(params: Params) -> tuple[Array, tuple]:
            variables = {'params': params, 'batch_stats': state.generator.batch_stats}
            image, generator_stats = generate(variables, inputs)
            teacher = models.teacher.apply(frozen.teacher, image)
            student, student_stats = apply_student(state.student.variables, image)
            views = contrast_views(student, teacher, state.extra.adapter) if loss.scl else None
            terms = generator_terms(
                loss, teacher, student, views, frozen.teacher['batch_stats'], inputs.label, shards
            )
            prior, prior_terms = image_prior.loss(config, frozen, image)
            total = _weighted(loss, terms) + prior
            hit = jnp.mean(jnp.argmax(teacher.logits, -1) == inputs.label)
            return total, (
                terms | prior_terms | {'loss': total, 'hit': hit},
                generator_stats,
                student_stats,
                image,
            )

        if config.generator.reset_adam:
            state = state.replace(
                generator=state.generator.replace(
                    opt_state=generator_tx.init(state.generator.params)
                )
            )
        (_, (terms, generator_stats, student_stats, image)), grads = shards.value_and_grad(
            generator_loss
        )(state.generator.params)
        student = state.student
        if synthesis.update_student_statistics:
            student = student.replace(batch_stats=student_stats)
        generator = contract.update(state.generator, grads, generator_tx, generator_stats)
        extra = state.extra
        if synthesis.bank:
            pixel = models.pixels(shards.gather(image))
            extra = extra.replace(bank=banks.put(extra.bank, pixel, shards.gather(inputs.label)))
        state = state.replace(generator=generator, student=student, extra=extra)
        return state, _named('g/', terms, shards)

    def sample(frozen: Frozen, state: State, key: Key) -> Batch:
        """A fresh batch as the student would see it, before augmentation."""
        del frozen
        inputs = draw_inputs(key, synthesis.student_batch_size)
        return Batch(generate(state.generator.variables, inputs)[0], inputs.label)

    def from_bank(state: State, key: Key) -> tuple[Array, Array]:
        """This instance's share of a batch of the bank: pixels and labels."""
        rows = banks.draw(state.extra.bank, key, synthesis.student_batch_size)
        return banks.take(state.extra.bank, shards.share(rows))

    def student_step(frozen: Frozen, state: State, key: Key) -> tuple[State, Metrics]:
        key_sample, key_crop, key_flip, key_other, key_mix = jax.random.split(key, 5)
        size = synthesis.student_batch_size
        if synthesis.bank:
            pixel, label = from_bank(state, key_sample)
            if synthesis.shade or synthesis.cutmix:
                other = from_bank(state, key_other)[0]
                whole = augment.draw_mixture(
                    key_mix, (size, *shape), synthesis.shade, synthesis.cutmix
                )
                pixel = augment.mix(pixel, other, jax.tree.map(shards.share, whole))
            image = models.normalise(pixel)
        else:
            image, label = sample(frozen, state, key_sample)
        if synthesis.crop_padding:
            padding = synthesis.crop_padding
            offsets = augment.draw_crop(key_crop, size, padding)
            image = augment.crop(image, shards.share(offsets), padding, black)
        if synthesis.flip:
            mask = augment.draw_flip(key_flip, size)
            image = augment.flip(image, shards.share(mask))
        teacher = models.teacher.apply(frozen.teacher, image)
        aim = msarc and msarc.aim(frozen.teacher, state.student.variables, image, teacher)

        def student_loss(params: Params) -> tuple[Array, tuple]:
            variables = {'params': params, 'batch_stats': state.student.batch_stats}
            out, batch_stats = apply_student(variables, image)
            terms = student_terms(loss, out.logits, teacher.logits, label, shards)
            total = _weighted(loss, terms)
            if aim is not None:  # in place of D
                imitated, more = aim(out)
                total, terms = total + imitated, terms | more
            same = jnp.mean(losses.agreement(out.logits, teacher.logits))
            return total, (terms | {'loss': total, 'agreement': same}, batch_stats)

        (_, (terms, batch_stats)), grads = shards.value_and_grad(student_loss)(state.student.params)
        student = contract.update(state.student, grads, student_tx, batch_stats)
        return state.replace(student=student), _named('s/', terms, shards)

    return Method(
        init=init, generator_step=generator_step, student_step=student_step, sample=sample
    )


def _check(config: Any, models: Models, shards: Shards) -> None:
    shards.check('config.synthesis.batch_size', config.synthesis.batch_size)
    shards.check('config.synthesis.student_batch_size', config.synthesis.student_batch_size)
    if config.synthesis.bank:
        banks.check(config.synthesis)
        if not config.generator.bounded:
            raise ValueError(
                'config.synthesis.bank keeps pixels: set config.generator.bounded=True, or the '
                'student would see other images than the generator made.'
            )
    elif config.synthesis.shade or config.synthesis.cutmix:
        raise ValueError(
            'config.synthesis.shade and cutmix mix images of a bank: set config.synthesis.bank.'
        )
    if not 0 < config.generator.darkest <= 1:
        raise ValueError(
            f'config.generator.darkest={config.generator.darkest}: expected above 0, up to 1.'
        )
    for name, choices in {'loss.ikd_form': ('mse', 'log'),
                          'student.schedule': ('cosine', 'published')}.items():  # fmt: skip
        group, field = name.split('.')
        if config[group][field] not in choices:
            raise ValueError(f'config.{name}={config[group][field]!r}; expected one of {choices}.')
    if getattr(models.generator, 'conditioning', None) != 'label':
        raise ValueError(
            'cpsc needs a conditional generator: set config.generator.model to cpsc_generator '
            'or cpsc_deep_generator.'
        )


def _weighted(loss: Any, terms: dict[str, Array]) -> Array:
    return sum((loss[name] * term for name, term in terms.items()), jnp.zeros(()))


def _named(prefix: str, terms: dict[str, Array], shards: Shards) -> Metrics:
    return shards.mean({prefix + name: term for name, term in terms.items()})


def _cross_entropy(loss: Any) -> Any:
    return losses.cross_entropy_of_probabilities if loss.double_softmax else losses.cross_entropy


def _total_steps(config: Any, kind: str) -> int:
    """Student ('s_steps') or generator ('g_steps') updates in the whole run."""
    loops = {'s_steps': lambda phase: 1, 'g_steps': lambda phase: phase.loops}[kind]
    return sum(phase.rounds * phase[kind] * loops(phase) for phase in config.phases)


def _student_optimiser(config: Any) -> optax.GradientTransformation:
    """SGD with momentum; a linear warm-up, then half a cosine."""
    student = config.student
    total, warmup = _total_steps(config, 's_steps'), student.warmup_steps
    if student.schedule == 'published':
        # Constant within an epoch of 50 rounds; epochs count from 1, the warm-up lasts ten, and
        # the cosine starts from the tenth over the full number of epochs.
        epoch_steps = 50 * config.phases[-1].s_steps
        epochs = max(total // epoch_steps, 1)

        def schedule(step: Array) -> Array:
            epoch = 1 + step // epoch_steps
            cosine = 0.5 * (1 + jnp.cos(jnp.pi * (epoch - 10) / epochs))
            return student.lr * jnp.where(epoch <= 10, epoch / 10, cosine)
    else:
        schedule = optax.schedules.warmup_cosine_decay_schedule(
            0.0, student.lr, warmup, max(total, warmup + 1)
        )
    return optax.chain(
        optax.add_decayed_weights(student.weight_decay),
        optax.sgd(schedule, momentum=student.momentum, nesterov=student.nesterov),
    )


def _generator_optimiser(config: Any) -> optax.GradientTransformation:
    """Adam, at a constant rate or annealed to zero over the run."""
    generator = config.generator
    total = max(_total_steps(config, 'g_steps'), 1)
    rate = (
        optax.schedules.cosine_decay_schedule(generator.lr, total)
        if generator.decay
        else generator.lr
    )
    return optax.adam(rate, b1=generator.beta1, b2=generator.beta2)
