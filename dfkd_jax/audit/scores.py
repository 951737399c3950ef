"""What members may be told by: the loss of an image, and its distance to a set of images."""

from __future__ import annotations

import numpy as np

BLOCK = 2**22  # numbers of each side that are compared at once: 16 MB of float32


def true_class_logit(logits: np.ndarray, label: np.ndarray) -> np.ndarray:
    """``log(p / (1 - p))`` for the probability p of the true class, [N] float64.

    It orders images as the cross-entropy does, the lowest loss highest: ``loss = log(1 +
    exp(-this))``.  The loss itself is 0 in float32 for every image of which a network is sure.

    logits: [N, C].  label: [N], the true classes.
    """
    logits = logits.astype(np.float64)
    mine = np.arange(len(label)), label
    true = logits[mine]
    logits[mine] = -np.inf
    return true - np.logaddexp.reduce(logits, axis=1)


def loss(true_logit: np.ndarray) -> np.ndarray:
    """The cross-entropy in nats, of what `true_class_logit` returns."""
    return np.logaddexp(0, -true_logit)


def nearest(points: np.ndarray, others: np.ndarray, itself: bool = False) -> np.ndarray:
    """The Euclidean distance of each of `points` to the nearest of `others`, [N] float64.

    points, others: [N, ...] and [M, ...], of any type, compared in float32.
    itself: `others` are `points`, and none is its own neighbour.
    """
    points, others = (each.reshape(len(each), -1) for each in (points, others))
    rows = max(1, BLOCK // max(1, points.shape[1]))
    least, index = np.full(len(points), np.inf), np.zeros(len(points), np.int64)
    for first in range(0, len(others), rows):
        right = others[first : first + rows].astype(np.float32)
        squares = np.sum(right**2, axis=1)
        for start in range(0, len(points), rows):
            left = points[start : start + rows].astype(np.float32)
            # Without |left|^2, which is the same for all of a point's neighbours.
            apart = squares[None] - 2 * (left @ right.T)
            here = np.arange(start, start + len(left))
            if itself and start == first:
                np.fill_diagonal(apart, np.inf)
            column = np.argmin(apart, axis=1)
            found = apart[np.arange(len(left)), column]
            closer = found < least[here]
            least[here[closer]] = found[closer]
            index[here[closer]] = first + column[closer]
    # From the pair itself: a difference of large squares would not be 0 for a copy.
    distance = [
        np.linalg.norm(
            points[start : start + rows].astype(np.float64) - others[index[start : start + rows]],
            axis=1,
        )
        for start in range(0, len(points), rows)
    ]
    return np.concatenate([*distance, np.zeros(0)])
