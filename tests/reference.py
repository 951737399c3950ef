"""For comparisons with golden steps: closeness, and ReLUs that take the reference's side."""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn


def near(actual: Any, expected: np.ndarray, what: str, tolerance: float = 1e-4) -> None:
    """Relative to the largest value expected."""
    atol = tolerance * np.abs(expected).max()
    np.testing.assert_allclose(actual, expected, rtol=0, atol=atol, err_msg=what)


def last(x: np.ndarray) -> np.ndarray:
    """Channels last."""
    return np.ascontiguousarray(x.transpose(0, 2, 3, 1))


class Sided(NamedTuple):
    """A module whose ReLUs take given sides at given units."""

    module: Any
    sides: str

    def apply(self, *args: Any, **kwargs: Any) -> Any:
        number = itertools.count()
        sides = [(*map(int, side[:-1].split(':')), side[-1] == '+') for side in self.sides.split()]

        def relu(x: jax.Array) -> jax.Array:
            active, layer = (x > 0).ravel(), next(number)
            units = [unit for of, unit, _ in sides if of == layer]
            wanted = [side for of, _, side in sides if of == layer]
            if units:
                active = active.at[np.array(units)].set(np.array(wanted))
            return jnp.where(active.reshape(x.shape), x, 0.0)

        with mock.patch.object(nn, 'relu', relu):
            return self.module.apply(*args, **kwargs)

    def init(self, *args: Any) -> Any:
        return self.module.init(*args)

    def init_with_output(self, *args: Any) -> Any:
        return self.module.init_with_output(*args)
