"""Losses of data-free distillation.

A loss returns one value per example, [B], for the caller to reduce.  A loss of the whole batch says
so and returns a scalar.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

Array = jax.Array


def kd(student_logits: Array, teacher_logits: Array, temperature: float = 1.0) -> Array:
    """Distillation: T^2 KL(softmax(teacher / T) || softmax(student / T)), [B] (Hinton et al. 2015).

    Both logits are [B, C]; gradients reach both.
    """
    student = jax.nn.log_softmax(student_logits / temperature)
    teacher = jax.nn.log_softmax(teacher_logits / temperature)
    return temperature**2 * optax.losses.kl_divergence_with_log_targets(student, teacher)


def cross_entropy(logits: Array, label: Array) -> Array:
    """-log softmax(logits)[label], [B], for logits [B, C] and labels [B]."""
    return optax.losses.softmax_cross_entropy_with_integer_labels(logits, label)


def cross_entropy_of_probabilities(logits: Array, label: Array) -> Array:
    """Cross entropy with the softmax taken twice, [B], as CPSC-DFKD's code has it.

    Its range is one nat wide, [log((e + C - 1) / e), log(e + C - 1)], and its gradient vanishes
    where the first softmax saturates.
    """
    return cross_entropy(jax.nn.softmax(logits), label)


def one_hot(logits: Array) -> Array:
    """Cross entropy of logits [B, C] with their own argmax, [B] (DAFL).

    Near zero where the network is sure; no gradient passes through the argmax.
    """
    return cross_entropy(logits, jnp.argmax(logits, axis=-1))


def class_balance(probability: Array) -> Array:
    """sum_c p_c log p_c, minus the entropy of a distribution [C] over classes, in nats; a scalar.

    Lowest, -log C, when all classes are equally likely.  As DAFL's information entropy it takes the
    mean of a network's probabilities over the whole batch.
    """
    safe = jnp.maximum(probability, jnp.finfo(probability.dtype).tiny)
    return jnp.sum(probability * jnp.log(safe), axis=-1)


def squared_error(student_logits: Array, teacher_logits: Array) -> Array:
    """Mean over classes of the squared difference of logits, [B]."""
    return jnp.mean(jnp.square(student_logits - teacher_logits), axis=-1)


def agreement(student_logits: Array, teacher_logits: Array) -> Array:
    """1 where both predict the same class, else 0, [B]; no gradient."""
    same = jnp.argmax(student_logits, axis=-1) == jnp.argmax(teacher_logits, axis=-1)
    return same.astype(jnp.float32)


def adversarial(student_logits: Array, teacher_logits: Array) -> Array:
    """-KL(softmax(teacher) || softmax(student)) where both predict the same class, else 0, [B].

    A generator that minimises it seeks images on which the student is uncertain, not wrong
    (DeepInversion's competition, as in Fast-DFKD's and NAYER's code).  Gradients reach both.
    """
    return -agreement(student_logits, teacher_logits) * kd(student_logits, teacher_logits)


BN_FORMS = ('sum', 'normalised')


def bn_statistics(statistics: Any, batch_stats: Any, form: str = 'sum') -> Array:
    """Distance of a batch's statistics to a network's running ones; a scalar for the batch.

    With the form 'sum', the sum over layers of ||var - running var||_2 + ||mean - running mean||_2,
    not squared (DeepInversion, Yin et al. 2020, as CMI's and CPSC-DFKD's code computes it).  It
    grows with depth, width and the scale of the activations.

    With the form 'normalised' (ours) it has no units and is of about one size for any network: the
    mean over layers of the root mean square over channels of (mean - running mean) / deviation,
    plus that of (var - running var) / running var, with a batch norm's own running deviation.

    statistics: `Output.statistics`, the moments of the batch.
    batch_stats: the network's running statistics, a tree of the same structure.
    """
    if form not in BN_FORMS:
        raise ValueError(f'form={form!r}; expected one of {BN_FORMS}.')

    def norm(x: Array) -> Array:
        # safe_norm: at distance zero the gradient is zero, not nan.
        return optax.safe_norm(x, 1e-12)

    def relative(layer: Any, running: Any) -> Array:
        var = running['var'] + 1e-5  # as the layer itself divides
        of_mean = (layer['mean'] - running['mean']) / jnp.sqrt(var)
        of_var = (layer['var'] - running['var']) / var
        return (norm(of_mean) + norm(of_var)) / var.size**0.5

    if form == 'sum':
        each = jax.tree.map(lambda a, b: norm(a - b), statistics, batch_stats)
        return sum(jax.tree.leaves(each), jnp.zeros(()))
    layers = jax.tree.map(relative, statistics, batch_stats, is_leaf=lambda x: 'var' in x)
    distances = jax.tree.leaves(layers)
    return sum(distances, jnp.zeros(())) / max(len(distances), 1)


def moving_average(average: Any, statistics: Any, momentum: float, batches: Array) -> Any:
    """The moving average of batch statistics, a tree, after one more batch.

    batches: [] int32, how many came before; the first one is its own average.
    """
    return jax.tree.map(
        lambda old, new: jnp.where(batches > 0, momentum * old + (1 - momentum) * new, new),
        average,
        statistics,
    )


def contrastive(
    features: Array, positive: Array, temperature: float, ignored: Array | None = None
) -> Array:
    """Minus the mean log probability of an entry's positives among all other entries, [B].

    The probabilities are a softmax over the similarities to all other entries (Khosla et al. 2020,
    eq. 2).  An entry without positives gives 0.

    features: [B, F], L2-normalised by the caller.
    positive: [B, B] bool, the pairs to draw together; the diagonal is ignored.
    ignored: [B, B] bool, the pairs that are neither drawn together nor pushed apart; None: none.
    """
    others = ~jnp.eye(len(features), dtype=bool)
    if ignored is not None:
        others &= ~ignored
    positive = positive & others
    similarity = jnp.where(others, features @ features.T / temperature, -jnp.inf)
    log_prob = jax.nn.log_softmax(similarity, axis=-1)
    total = jnp.sum(jnp.where(positive, log_prob, 0.0), axis=-1)
    return -total / jnp.maximum(jnp.sum(positive, axis=-1), 1).astype(total.dtype)


def supervised_contrastive(views: Array, label: Array, temperature: float) -> Array:
    """Supervised contrast over several views of a batch (Khosla et al. 2020, eq. 2), [V, B].

    `contrastive`, where positives are all other entries, of any view, with the anchor's label.

    views: [V, B, F] features, L2-normalised by the caller.
    label: [B] labels, shared by the views.
    """
    num_views, batch, _ = views.shape
    labels = jnp.tile(label, num_views)
    positive = labels[:, None] == labels[None, :]
    entries = views.reshape(num_views * batch, -1)
    return contrastive(entries, positive, temperature).reshape(num_views, batch)


def normalise(features: Array) -> Array:
    """Features scaled to unit L2 norm, [..., F]; as torch.nn.functional.normalize."""
    return features / optax.safe_norm(features, 1e-12, axis=-1, keepdims=True)
