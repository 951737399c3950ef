"""Fast-DFKD: a generator that is quick to adapt to the next batch (arXiv 2112.15278, AAAI 2022).

A batch of synthesis starts from a *meta-generator*: a copy of it, the fast generator, and the
batch's latents z ~ N(0, I) are trained for `g_steps`, each at a rate of its own.  With t, s the
teacher's and the student's logits on augmented images, and y classes drawn at random:

    L_G = bn L_BN + ce CE(t, y) - adversarial E[1(argmax s = argmax t) KL(t || s)]

(`inversion.py`).  The images of the step with the lowest L_G go to the bank, before augmentation.
The meta-generator theta then takes one step of an Adam that lasts the whole run (`meta_lr`), along

    generator.meta='fomaml'    the sum of the gradients of the fast generator's steps
    generator.meta='reptile'   67 (theta - theta_fast)
    generator.meta='none'      no gradient: it becomes the fast one, which thus goes on from
                               batch to batch (the ablation without meta-learning)

The Adam of the fast generator and of the latents starts anew at every batch.  Before batch number
`generator.reset_batch`, counted from 1, the first linear layer and norm of the meta-generator are
drawn anew from N(0, 0.02), which its authors found to help diversity late in a run.  The first
phase, without a student, is the warm-up: its images do not depend on the student.

Differences from the authors' code, beside those of the bank (see `nayer.py`):

    the student takes part from the first round after the warm-up; theirs from the last one of it
    the paper's text was not available to us: all is read from the code
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

META = ('fomaml', 'reptile', 'none')
REPTILE = 67.0  # Adam takes it out again, up to its epsilon


class Extra(struct.PyTreeNode):
    """Fast-DFKD's own state; the meta-generator is the state's `generator`.

    bank: synthetic images and the classes they were made for.
    batch: the batch of synthesis under way.
    fast: its generator and latents, params {'generator': ..., 'latent': [B, latent]}.
    gradient: the sum of the fast generator's gradients over the batch's steps; () unless 'fomaml'.
    """

    bank: banks.Bank
    batch: inversion.SynthesisBatch
    fast: contract.Net
    gradient: Any


def make(config: Any, models: Models, shards: Shards) -> Method:
    """Fast-DFKD for these networks.

    Raises ValueError where a batch, a bank, a choice or the generator does not fit.
    """
    _check(config, models)
    loss, synthesis, settings = config.loss, config.synthesis, config.generator
    batch_size, latent_shape = synthesis.batch_size, (synthesis.batch_size, models.generator.latent)
    learner = inversion.learner(config, models, shards)
    fast_tx = two_rates(settings)
    meta_tx = optax.adam(settings.meta_lr, settings.beta1, settings.beta2)

    def init(frozen: Frozen, key: Key) -> State:
        key_student, key_generator = jax.random.split(key)
        latent = jnp.zeros(latent_shape)
        whole = models.generator.clone(axis_name=None)
        variables = whole.init(key_generator, latent)
        params, batch_stats = variables['params'], variables['batch_stats']
        copy = jax.tree.map(jnp.zeros_like, {'generator': params, 'latent': latent})
        return State(
            round=contract.first_round(),
            student=learner.start(key_student),
            generator=contract.start(params, batch_stats, meta_tx),
            extra=Extra(
                bank=banks.empty(synthesis.bank, models.image_shape),
                batch=inversion.empty_batch(
                    batch_size, models.image_shape, frozen.teacher.get('batch_stats', {})
                ),
                fast=contract.start(copy, jax.tree.map(jnp.zeros_like, batch_stats), fast_tx),
                gradient=copy['generator'] if settings.meta == 'fomaml' else (),
            ),
        )

    def begin(frozen: Frozen, state: State, key: Key) -> tuple[State, Metrics]:
        """A copy of the meta-generator, new latents, classes and a new Adam."""
        del frozen
        key_label, key_latent, key_reset = jax.random.split(key, 3)
        generator, extra = state.generator, state.extra
        if settings.reset_batch:
            now = extra.batch.batches + 1 == settings.reset_batch
            fresh = reset_first_layer(key_reset, generator.params)
            params = jax.tree.map(lambda a, b: jnp.where(now, a, b), fresh, generator.params)
            generator = generator.replace(params=params)
        latent = jax.random.normal(key_latent, latent_shape)
        params = {'generator': generator.params, 'latent': latent}
        label = jax.random.randint(key_label, (batch_size,), 0, models.num_classes, jnp.int32)
        extra = extra.replace(
            batch=inversion.begin(extra.batch, label),
            fast=contract.start(params, generator.batch_stats, fast_tx),
            gradient=jax.tree.map(jnp.zeros_like, extra.gradient),
        )
        return state.replace(generator=generator, extra=extra), {}

    def generator_step(
        frozen: Frozen, state: State, key: Key, learning: bool = True
    ) -> tuple[State, Metrics]:
        """One step of the fast generator and of the latents."""
        crop_flip = learner.draw_crop_flip(key, batch_size)
        extra, label = state.extra, shards.share(state.extra.batch.label)

        def loss_fn(params: Params) -> tuple[Array, tuple]:
            variables = {'params': params['generator'], 'batch_stats': extra.fast.batch_stats}
            pixel, mutated = models.generator.apply(
                variables, shards.share(params['latent']), train=True, mutable=['batch_stats']
            )
            image = learner.view(pixel, crop_flip)
            total, terms, teacher = learner.generator_loss(frozen, state, image, label, learning)
            return total, (terms, mutated['batch_stats'], teacher.statistics, pixel)

        (total, (terms, batch_stats, statistics, pixel)), grads = shards.value_and_grad(loss_fn)(
            extra.fast.params
        )
        gradient = extra.gradient
        if settings.meta == 'fomaml':
            gradient = jax.tree.map(jnp.add, gradient, grads['generator'])
        extra = extra.replace(
            batch=inversion.keep_best(extra.batch, total, shards.gather(pixel), statistics),
            fast=contract.update(extra.fast, grads, fast_tx, batch_stats),
            gradient=gradient,
        )
        metrics = shards.mean({'g/' + name: term for name, term in terms.items()})
        return state.replace(extra=extra), metrics

    def finish(frozen: Frozen, state: State, key: Key) -> tuple[State, Metrics]:
        """The meta-generator's step; the best images to the bank."""
        del frozen, key
        generator, extra = state.generator, state.extra
        learnt = extra.fast.params['generator']
        if settings.meta == 'none':
            generator = generator.replace(params=learnt, batch_stats=extra.fast.batch_stats)
        elif settings.meta == 'fomaml':
            generator = contract.update(generator, extra.gradient, meta_tx)
        else:
            gap = jax.tree.map(lambda a, b: REPTILE * (a - b), generator.params, learnt)
            generator = contract.update(generator, gap, meta_tx)
        batch, bank = inversion.finish(extra.batch, extra.bank, loss.bn_momentum)
        extra = extra.replace(batch=batch, bank=bank)
        return state.replace(generator=generator, extra=extra), {}

    return Method(
        init, generator_step, learner.student_step, learner.sample, begin, finish,
        learner.held_out, warmup_step=partial(generator_step, learning=False),
    )  # fmt: skip


def two_rates(settings: Any) -> optax.GradientTransformation:
    """Adam of {'generator': ..., 'latent': ...}: the one at `lr`, the other at `latent_lr`.

    settings: `config.generator`.
    """
    rates = {'generator': settings.lr, 'latent': settings.latent_lr}
    return optax.partition(
        {name: optax.adam(rate, settings.beta1, settings.beta2) for name, rate in rates.items()},
        param_labels={name: name for name in rates},
    )


def reset_first_layer(key: Key, params: Params) -> Params:
    """A generator's params with a new first linear layer and norm.  The key is consumed.

    Weights and scales are drawn from N(0, 0.02); biases are zero.
    """
    key_kernel, key_scale = jax.random.split(key)
    project, norm = params['project'], params['norm0']

    def normal(key: Key, like: Array) -> Array:
        return 0.02 * jax.random.normal(key, like.shape)

    return params | {
        'project': {
            'kernel': normal(key_kernel, project['kernel']),
            'bias': jnp.zeros_like(project['bias']),
        },
        'norm0': {
            'scale': normal(key_scale, norm['scale']),
            'bias': jnp.zeros_like(norm['bias']),
        },
    }


def _check(config: Any, models: Models) -> None:
    inversion.check_generator(config, models)
    if config.generator.meta not in META:
        raise ValueError(
            f'config.generator.meta={config.generator.meta!r}; expected one of {META}.'
        )
    if config.generator.reset_batch < 0:
        raise ValueError(
            f'config.generator.reset_batch={config.generator.reset_batch}: expected the number of '
            'a batch, counted from 1, or 0 for never.'
        )
