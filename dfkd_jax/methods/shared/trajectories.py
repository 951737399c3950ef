"""The trajectories of a diffusion model that fill a bank: how many, of what class, what is kept.

Trajectory n makes images of class n mod C.  Shared by the method that makes the images, DiffDFKD,
and the loop that keeps them on disk.
"""

from __future__ import annotations

from typing import Any

from flax import struct

from dfkd_jax.contract import Params

PARTS = 5  # of a trajectory; images may be kept at the end of each


class FrozenPrior(struct.PyTreeNode):
    """`Frozen.extra` of DiffDFKD: what is constant of the diffusion model and its conditions.

    text: [P, L, D], the text embedding of each class, or one for all classes; the last one is that
      of the negative prompt.  () for a model without text.
    """

    params: Params
    text: Any


def images_each(synthesis: Any) -> int:
    """Images that one trajectory makes; synthesis: `config.synthesis`."""
    return synthesis.batch_size * (PARTS if synthesis.intermediate else 1)


def count(synthesis: Any, num_classes: int) -> int:
    """Trajectories of a run: as many of every class as its images need."""
    return num_classes * -(-synthesis.per_class // images_each(synthesis))


def kept_images(synthesis: Any, num_classes: int, number: int) -> int:
    """Images that are kept of trajectory `number`: the last one of a class may make too many."""
    before = number // num_classes * images_each(synthesis)
    return min(images_each(synthesis), synthesis.per_class - before)


def in_loop_trainings(
    synthesis: Any, in_loop: Any, adversarial: float, num_classes: int
) -> list[int]:
    """The numbers of trajectories after which the student in the loop trains.

    It trains whenever there are `in_loop.every` more images of every class, if they fill a batch
    and more trajectories follow.

    synthesis, in_loop: groups of the config.  adversarial: the weight of the student's loss in the
    guidance; without it no student is needed.
    """
    if not (in_loop.every and adversarial and synthesis.source == 'guided'):
        return []
    chosen, made = [], images_each(synthesis)
    for done in range(num_classes, count(synthesis, num_classes), num_classes):
        images = done // num_classes * made  # of every class
        crossed = images // in_loop.every > (images - made) // in_loop.every
        if crossed and images * num_classes >= in_loop.batch_size:
            chosen.append(done)
    return chosen
