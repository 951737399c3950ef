"""An ONNX graph in the making, and how its tensors lie."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

Constant = np.ndarray | np.generic
Order = tuple[int, ...]


class Tensor(NamedTuple):
    """A result of the graph that stands for a JAX array.

    order: axis k of the tensor is axis ``order[k]`` of the array.
    shape: of the array; the batch is symbolic.
    """

    name: str
    order: Order
    shape: tuple[Any, ...]


@dataclass
class Node:
    """One operator."""

    op: str
    inputs: list[str]
    outputs: list[str]
    name: str = ''
    attributes: dict[str, Any] = field(default_factory=dict)


@dataclass
class Graph:
    """The operators so far, in order.

    batch: the symbolic size of a batch.
    input: the name of the images.
    scope: the module whose operators are being added, for their names.
    """

    batch: Any
    input: str
    nodes: list[Node] = field(default_factory=list)
    constants: dict[str, np.ndarray] = field(default_factory=dict)
    scope: str = ''
    numbers: dict[str, int] = field(default_factory=dict)  # how often a name was given
    sizes: str = ''  # the tensor that holds the batch's size, once one is needed

    def node(self, op: str, inputs: Sequence[str], outputs: int = 1, **attributes: Any) -> str:
        """Adds an operator; returns the name of its (first) result."""
        name = self._fresh(f'{self.scope}/{op}' if self.scope else op)
        results = [name] + [f'{name}:{i}' for i in range(1, outputs)]
        self.nodes.append(Node(op, list(inputs), results, name, attributes))
        return name

    def constant(self, array: Any, name: str = 'constant') -> str:
        """Adds a constant; returns its name."""
        name = self._fresh(name)
        self.constants[name] = np.asarray(array)
        return name

    def integers(self, values: Sequence[int]) -> str:
        """A constant vector of int64, as axes and sizes are."""
        return self.constant(np.asarray(values, np.int64))

    def name_of(self, value: Tensor | Constant, order: Order | None = None) -> str:
        """The tensor that holds a value with its axes in `order`, as in JAX if none is given."""
        rank = len(value.shape)
        order = tuple(range(rank)) if order is None else order
        if not isinstance(value, Tensor):
            return self.constant(np.transpose(value, order))
        if value.order == order:
            return value.name
        permutation = [value.order.index(axis) for axis in order]
        return self.node('Transpose', [value.name], perm=permutation)

    def shape(self, sizes: Sequence[Any]) -> str:
        """A shape for Reshape: the batch, if it is there, is what the other sizes leave."""
        symbolic = [size for size in sizes if not isinstance(size, int)]
        if len(symbolic) > 1 or 0 in sizes:
            return self.exact_shape(sizes)
        return self.integers([size if isinstance(size, int) else -1 for size in sizes])

    def exact_shape(self, sizes: Sequence[Any]) -> str:
        """A shape with the batch's size read from the images: multiples of it are known."""
        if not self.sizes:
            whole = self.node('Shape', [self.input])
            self.sizes = self.node('Slice', [whole, self.integers([0]), self.integers([1])])
        parts = []
        for size in sizes:
            if isinstance(size, int):
                parts.append(self.integers([size]))
            else:
                times = self.integers([int(size // self.batch)])
                parts.append(self.node('Mul', [self.sizes, times]))
        return self.node('Concat', parts, axis=0)

    def _fresh(self, name: str) -> str:
        number = self.numbers[name] = self.numbers.get(name, 0) + 1
        return name if number == 1 else f'{name}_{number}'
