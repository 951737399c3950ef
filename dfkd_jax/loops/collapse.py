"""Signs that a generator has collapsed: it makes one image, or images of a few classes alone.

They are read when a run measures anyway, from one batch that the student would see and from the
metrics of synthesis: a draw, and no query of a teacher beside it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from dfkd_jax import contract
from dfkd_jax.distributed.sharding import Plan

# Each sign, what it is, and the share of its best value below which a generator is ill.
SIGNS = {
    'classes': ('the classes among them (effective number)', 0.2),
    'hit': ('the share that the teacher takes for the class asked for', 0.2),
    'variation': ('the share of their variance that lies between images', 0.02),
}
KEY = 2**31 - 2  # of the seed's key: the child for these images; others have other numbers


def watcher(
    plan: Plan, whole: contract.Method, frozen: contract.Frozen, seed: int
) -> Callable[[Any, dict[str, float]], dict[str, float]]:
    """``(state, row of metrics) -> signs``; all of them are high where a generator is well."""
    draw, key = plan.call(whole.sample), jax.random.fold_in(jax.random.key(seed), KEY)

    def signs(state: Any, row: dict[str, float]) -> dict[str, float]:
        batch = draw(frozen, state, key)
        found = {
            'classes': effective_number(np.asarray(batch.label)),
            'variation': variation(np.asarray(batch.image, np.float64)),
        }
        return found | ({'hit': row['g/hit']} if 'g/hit' in row else {})

    return signs


def effective_number(label: np.ndarray) -> float:
    """How many classes labels [B] are spread over: the exponential of their entropy."""
    _, counts = np.unique(label, return_counts=True)
    share = counts / counts.sum()
    return float(np.exp(-np.sum(share * np.log(share))))


def variation(image: np.ndarray) -> float:
    """The share of the variance of images [B, H, W, C] that lies between them, 0 to 1."""
    total = np.var(image)
    return float(np.mean(np.var(image, axis=0)) / total) if total else 0.0


def ill(signs: dict[str, float], best: dict[str, float]) -> str:
    """What has fallen to a small share of its best value; '' if nothing has."""
    fallen = [
        f'{SIGNS[name][0]} fell from {best[name]:.3g} to {value:.3g}'
        for name, value in signs.items()
        if value < SIGNS[name][1] * best.get(name, 0.0)
    ]
    return ', and '.join(fallen)
