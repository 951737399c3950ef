"""The PyTorch and the Flax names of each architecture: tables, read in both directions.

A row is ``(PyTorch module, Flax module, leaves)``.  It says that the two modules are the same, and
which of their leaves are (CONV, LINEAR, NORM, ...).  A placeholder such as ``{s}`` stands for a
number, the same on both sides; one that the Flax side lacks runs over the first axis of the Flax
leaf.  The first row counts that matches the module and has the leaf.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Leaf(NamedTuple):
    """One array: its last name in PyTorch, its place in Flax, and the order of its axes."""

    torch: str
    collection: str  # 'params' / 'batch_stats' / '': not kept in Flax
    flax: str
    axes: tuple[int, ...] | None = None  # the PyTorch array's axes in Flax's order; None: as is
    ones: int = 0  # axes of length 1 that the PyTorch array has behind these


class Row(NamedTuple):
    """A PyTorch module, the same module in Flax, and their leaves; '' is the whole network."""

    torch: str
    flax: str
    leaves: tuple[Leaf, ...]


def images(module: Any, channels: int) -> tuple[jax.ShapeDtypeStruct, ...]:
    """One image; the weights of most classifiers do not depend on its size."""
    del module
    return (jax.ShapeDtypeStruct((1, 32, 32, channels), jnp.float32),)


class Table(NamedTuple):
    """The PyTorch names of one family of architectures, as one code base writes them.

    first: the PyTorch array whose second axis counts input channels.
    last: the PyTorch array whose first axis counts classes.  Both are '' where sizes must be given.
    inputs: the inputs of a module, given the number of input channels.
    block: the side of the pixel blocks that a space-to-depth stem turns into channels.
    unused: modules that the PyTorch network holds and never calls; their arrays are left out.
    """

    rows: tuple[Row, ...]
    first: str
    last: str
    inputs: Callable[[Any, int], tuple[jax.ShapeDtypeStruct, ...]] = images
    block: int = 1
    unused: tuple[str, ...] = ()


BIAS = Leaf('bias', 'params', 'bias')
LINEAR = (Leaf('weight', 'params', 'kernel', (1, 0)), BIAS)
# Transposed convolutions too, with Flax's `transpose_kernel`: in, out, h, w -> h, w, out, in.
CONV = (Leaf('weight', 'params', 'kernel', (2, 3, 1, 0)), BIAS)

STATISTICS = (
    Leaf('running_mean', 'batch_stats', 'mean'),
    Leaf('running_var', 'batch_stats', 'var'),
    # How many batches the running statistics have seen, which matters only where the momentum is
    # None.  It is dropped on the way in, and 0 on the way out.
    Leaf('num_batches_tracked', '', ''),
)
NORM = (Leaf('weight', 'params', 'scale'), BIAS, *STATISTICS)
AFFINE = NORM[:2]  # of a layer or group norm, which keeps no statistics
# The class tables of a conditional batch norm, whose statistics are those of an inner norm.
CLASS_TABLES = (Leaf('weights.weight', 'params', 'scale'), Leaf('biases.weight', 'params', 'bias'))
# NAYER's noisy layers, one linear layer for each repetition of the class list.
NOISY = (
    Leaf('weight', 'params', 'noisy_kernel', (1, 0)),
    Leaf('bias', 'params', 'noisy_bias'),
)
