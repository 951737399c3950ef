"""A network as a file holds it: a list of nodes, in order, and the arrays that they read.

Both formats, `.pt2` and `.onnx`, become a `Program`.  `module.py` runs it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, NoReturn

import numpy as np

from dfkd_jax.errors import PortError

MOST_NODES = 100_000  # the largest networks of timm have some 5,000
LISTED = 20  # the most operators or places that an error lists


class Value(NamedTuple):
    """An argument that is the result of a node, an array of the file, or the images."""

    name: str


class Type(NamedTuple):
    """An argument that is a type of numbers; a floating one is that which a run computes in."""

    name: str  # NumPy's


class Node(NamedTuple):
    """One call of an operator.

    arguments, keywords: numbers, strings, None, `Value`s, `Type`s, and lists of them.
    results: names, one for each result; '' for one that nobody reads.
    listed: the operator returns a list, of as many results.
    place: where in the network, for messages.
    """

    operator: str
    arguments: tuple[Any, ...]
    keywords: dict[str, Any]
    results: tuple[str, ...]
    place: str = ''
    listed: bool = False


class Dialect(NamedTuple):
    """What the operators of a format are called.

    operators: a function for each name.  An overload of PyTorch's, 'aten.max.dim', that has no row
      of its own is computed as 'aten.max'.
    norms: batch norms in evaluation; arguments 3 and 4 are the running mean and variance.
    batch_norms: those that use the batch's own moments.
    other_norms: what normalises without running statistics.
    layers: linear layers and convolutions, where one operand does not depend on the images.
    convolutions: of these, the convolutions.
    passing: what may lie between the last layer and the logits.
    softmaxes: what makes probabilities of logits.
    resizing: what may make maps smaller.
    measuring: what reads the shape of an array and not its values.
    """

    operators: Mapping[str, Callable[..., Any]]
    norms: frozenset[str]
    batch_norms: frozenset[str]
    other_norms: frozenset[str]
    layers: frozenset[str]
    convolutions: frozenset[str]
    passing: frozenset[str]
    softmaxes: frozenset[str]
    resizing: frozenset[str]
    measuring: frozenset[str]

    def base(self, operator: str) -> str:
        """The name in the tables: that of the operator, or without its overload."""
        shorter = operator.rpartition('.')[0]
        return shorter if operator not in self.operators and shorter in self.operators else operator


@dataclass(frozen=True, eq=False)
class Program:
    """A network's nodes and arrays.

    source: the file, for messages.
    digest: the file's sha256.
    image, result: the names of the images and of the logits [B, num_classes].
    image_shape: what the file says of the images, (channels, height, width); None: any.
    channels_last: whether it takes them as [B, H, W, C] and not as [B, C, H, W].
    parameters: floating-point arrays, in float32.
    constants: integers, truth values, and single floating-point numbers (in float64).
    """

    source: str
    digest: str
    dialect: Dialect
    nodes: tuple[Node, ...]
    image: str
    result: str
    image_shape: tuple[int | None, int | None, int | None]
    channels_last: bool
    parameters: dict[str, np.ndarray]
    constants: dict[str, Any]


def values(argument: Any) -> Iterator[str]:
    """The names of the `Value`s in an argument or a tree of arguments."""
    if isinstance(argument, Value):
        yield argument.name
    elif isinstance(argument, list | tuple) and not isinstance(argument, Type):
        for each in argument:
            yield from values(each)
    elif isinstance(argument, dict):
        for each in argument.values():
            yield from values(each)


def reads(node: Node) -> list[str]:
    """The names of what a node reads, in order."""
    return [*values(node.arguments), *values(node.keywords)]


def checked(program: Program) -> Program:
    """The program, its arguments in the order of its operators' parameters.

    Raises PortError unless every node has an operator, and reads what is there before it.
    """
    where, table = program.source, program.dialect.operators
    if len(program.nodes) > MOST_NODES:
        raise PortError(
            f'{where} has {len(program.nodes):,} nodes, and no more than {MOST_NODES:,} are read.'
        )
    unknown: dict[str, list[str]] = {}
    for node in program.nodes:
        if program.dialect.base(node.operator) not in table:
            unknown.setdefault(node.operator, []).append(node.place)
    if unknown:
        names = [f'{name} at {_places(places)}' for name, places in sorted(unknown.items())]
        raise PortError(
            f'{where} has {len(unknown)} operators that are not read: {_listing(names)}. Replace '
            'these layers and export the network again.'
        )
    known, nodes = {program.image, *program.parameters, *program.constants}, []
    for node in program.nodes:
        for name in reads(node):
            if name not in known:
                _damaged(
                    program,
                    f'{node.operator} at {node.place} reads {name!r}, which nothing '
                    'before it makes',
                )
        for name in filter(None, node.results):
            if name in known:
                _damaged(program, f'{node.operator} at {node.place} makes {name!r} again')
            known.add(name)
        operator = table[program.dialect.base(node.operator)]
        try:
            bound = inspect.signature(operator).bind(*node.arguments, **node.keywords)
        except TypeError as error:
            raise PortError(
                f'{where} has an operator that is not read: {node.operator} at {node.place} '
                f'({error}). Replace this layer and export the network again.'
            ) from error
        nodes.append(node._replace(arguments=bound.args, keywords=bound.kwargs))
    if program.result not in known:
        _damaged(program, f'nothing makes its result {program.result!r}')
    return replace(program, nodes=tuple(nodes))


def _damaged(program: Program, why: str) -> NoReturn:
    raise PortError(f'{program.source} is no network: {why}. Export the network again.')


def _places(places: list[str]) -> str:
    more = f' and {len(places) - 1} more' if len(places) > 1 else ''
    return f'{places[0]}{more}'


def _listing(names: list[str]) -> str:
    more = f', and {len(names) - LISTED} more' if len(names) > LISTED else ''
    return ', '.join(names[:LISTED]) + more


def of_images(program: Program) -> set[str]:
    """The names of what depends on the images' values."""
    found = {program.image}
    for node in program.nodes:
        measured = program.dialect.base(node.operator) in program.dialect.measuring
        if not measured and found.intersection(reads(node)):
            found.update(node.results)
    return found - {''}


def needed(nodes: tuple[Node, ...], result: str) -> tuple[Node, ...]:
    """The nodes that `result` needs, in order."""
    wanted, kept = {result}, []
    for node in reversed(nodes):
        if wanted.intersection(node.results):
            wanted.update(reads(node))
            kept.append(node)
    return tuple(reversed(kept))


def floats(arrays: Mapping[str, np.ndarray], source: str) -> dict[str, np.ndarray]:
    """Floating-point arrays in float32.

    Raises PortError for one that holds what no weight is, nan or infinity; masks may hold minus
    infinity.
    """
    found = {}
    for name, array in arrays.items():
        with np.errstate(over='ignore'):  # becomes infinite
            found[name] = np.array(array, np.float32, order='C')
        if not (found[name] < np.inf).all():
            raise PortError(f'{source}: {name} is not finite. Export a network with sound weights.')
    return found
