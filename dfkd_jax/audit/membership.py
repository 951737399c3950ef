"""How well a score tells members, which a network was trained on, from non-members.

The attack is a threshold: who scores at least so much is called a member.  A member is a positive.
`auc` and `balanced_accuracy` are averages, which a few exposed images do not move.  The true
positive rate at a low false positive rate tells of those (Carlini et al., "Membership Inference
Attacks From First Principles", 2022): how many members can be named almost without a mistake.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

RATES = (0.01, 0.001)  # false positive rates at which the true positive rate is reported
REPLICATES = 1000  # of the bootstrap
CONFIDENCE = 0.95
LEAST = 100  # images of each kind: with fewer, not even 1 % of them is one image
CHANCE = {'auc': 0.5, 'balanced_accuracy': 0.5, **{f'tpr_at_fpr_{rate:g}': rate for rate in RATES}}


class Estimate(NamedTuple):
    """A figure with its confidence interval.

    None: it cannot be told with so few images.
    """

    value: float | None
    low: float | None = None
    high: float | None = None


def figures(
    members: np.ndarray, others: np.ndarray, seed: int, replicates: int = REPLICATES
) -> dict[str, Estimate]:
    """What the attack achieves, in shares from 0 to 1; what chance achieves is in `CHANCE`.

    members, others: scores [M] and [N], higher where a member is expected.
    seed: of the halves and of the bootstrap.

    auc: the probability that a member scores higher than a non-member; a tie counts a half.
    balanced_accuracy: of the threshold that is best on one half of the images, on the other half.
    tpr_at_fpr_R: of the lowest threshold at which no more than R of the non-members are called
      members; None with fewer than 1 / R of them.

    Intervals are percentiles of a bootstrap: members and non-members are drawn anew, each from
    their own.  The threshold of `balanced_accuracy` is not chosen anew, so its interval is that of
    one given attack.
    """
    rng = np.random.default_rng(seed)
    levels = np.unique(np.concatenate([members, others]))
    # Each score by the rank of its level, 0 for the highest: all that the figures depend on.
    ranks = [len(levels) - 1 - np.searchsorted(levels, scores) for scores in (members, others)]
    halves = [rng.permutation(len(each)) < len(each) // 2 for each in ranks]
    chosen = [each[half] for each, half in zip(ranks, halves, strict=True)]
    measured = [each[~half] for each, half in zip(ranks, halves, strict=True)]
    tpr, fpr = curve(chosen[0], chosen[1], len(levels))
    best = int(np.argmax(tpr - fpr))

    def compute(all_of: list[np.ndarray], half: list[np.ndarray]) -> list[float]:
        tpr, fpr = curve(all_of[0], all_of[1], len(levels))
        tpr_half, fpr_half = curve(half[0], half[1], len(levels))
        return [
            float(np.trapezoid(tpr, fpr)),
            float(1 + tpr_half[best] - fpr_half[best]) / 2,
            *(at_rate(tpr, fpr, rate) for rate in RATES),
        ]

    values = compute(ranks, measured)
    drawn = [
        compute(*([rng.choice(each, len(each)) for each in parts] for parts in (ranks, measured)))
        for _ in range(replicates)
    ]
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(drawn, (tail, 1 - tail), axis=0).tolist()
    found = dict(zip(CHANCE, map(Estimate, values, low, high), strict=True))
    unknown = [name for name, rate in zip([*CHANCE][2:], RATES) if len(others) * rate < 1]
    return found | dict.fromkeys(unknown, Estimate(None))


def curve(members: np.ndarray, others: np.ndarray, levels: int) -> tuple[np.ndarray, np.ndarray]:
    """The true and the false positive rate, [levels + 1] each, for thresholds from none to all.

    members, others: ranks of scores, 0 for the highest of `levels`.  Entry k is of the threshold
    that calls ranks below k members.
    """
    tpr, fpr = (
        np.concatenate([[0], np.cumsum(np.bincount(each, minlength=levels))]) / len(each)
        for each in (members, others)
    )
    return tpr, fpr


def at_rate(tpr: np.ndarray, fpr: np.ndarray, rate: float) -> float:
    """The true positive rate of the lowest threshold with a false positive rate up to `rate`."""
    return float(tpr[np.searchsorted(fpr, rate, side='right') - 1])
