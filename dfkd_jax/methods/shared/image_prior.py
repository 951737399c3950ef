"""What takes the place of L_BN where a teacher has no batch norms: a prior of natural images.

A network with layer or group norms keeps no statistics for images to match.  In its place,

    L_P = tv R_TV + l2 R_2

R_TV is the sum, over an image's right, lower and two diagonal neighbours, of the root mean square
of its differences to them, and R_2 the root mean square of the normalised image itself.
DeepInversion's code has both as norms of the whole batch (`loss.tv`, `loss.l2` in
`deepinversion.py`); here neither depends on the size of a batch or of an image, so that one weight
serves all methods.  The weights (`config.image_prior`) are 0 by default: on Fashion-MNIST students
learned as much or more without it (experiments/no_batch_norm).
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from dfkd_jax.contract import Array, Frozen, Metrics


def neighbour_differences(image: Array) -> list[Array]:
    """Differences of images [B, H, W, C] to their neighbours: right, down and both diagonals."""
    return [
        image[:, :, :-1] - image[:, :, 1:],
        image[:, :-1] - image[:, 1:],
        image[:, 1:, :-1] - image[:, :-1, 1:],
        image[:, :-1, :-1] - image[:, 1:, 1:],
    ]


def root_mean_square(x: Array) -> Array:
    """Of each entry of [B, ...], [B]; its gradient at zero is zero."""
    return jnp.sqrt(jnp.mean(jnp.square(x), tuple(range(1, x.ndim))) + 1e-12)


def total_variation(image: Array) -> Array:
    """R_TV of images [B, H, W, C], [B]."""
    return sum(map(root_mean_square, neighbour_differences(image)), jnp.zeros(len(image)))


def needed(config: Any, frozen: Frozen) -> bool:
    """Whether a method would compare batch statistics, and its teacher has none."""
    return bool(config.loss.get('bn')) and not frozen.teacher.get('batch_stats')


def loss(config: Any, frozen: Frozen, image: Array) -> tuple[Array, Metrics]:
    """L_P of this instance's normalised images [B, H, W, C], a scalar, and its terms.

    Zero and without a term where the teacher has batch norms, or where `config.loss.bn` is 0.
    """
    terms: Metrics = {}
    weights = config.image_prior
    if needed(config, frozen):
        if weights.tv:
            terms['prior_tv'] = jnp.mean(total_variation(image))
        if weights.l2:
            terms['prior_l2'] = jnp.mean(root_mean_square(image))
    weighted = (weights[name.removeprefix('prior_')] * term for name, term in terms.items())
    return sum(weighted, jnp.zeros(())), terms
