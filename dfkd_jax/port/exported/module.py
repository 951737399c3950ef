"""A program as a network: what the modules of the zoo offer, as far as a teacher needs it."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dfkd_jax.errors import PortError
from dfkd_jax.models.layers import Output, wide
from dfkd_jax.port.exported import layers
from dfkd_jax.port.exported import program as programs
from dfkd_jax.port.exported.program import Node, Program, Type, Value

Array = jax.Array
Variables = dict[str, Any]


class Head(NamedTuple):
    """A last layer: its input, and whether it is a convolution."""

    input: str
    convolution: bool


@dataclass(frozen=True)
class Exported:
    """A classifier that a file holds.  It always runs as in evaluation.

    num_classes: None if the file leaves the size of images open.
    image_shape: (height, width, channels), None where the file leaves one open.
    heads: its last layers, one but for networks with several heads.
    norms: the key in `batch_stats` of each node that is a batch norm, by its place in the program.
    axis_name, dtype: as of the zoo's modules.
    """

    digest: str
    program: Program = field(compare=False, repr=False)
    heads: tuple[Head, ...] = field(compare=False, repr=False)
    norms: dict[int, str] = field(compare=False, repr=False)
    shapes: Variables = field(compare=False, repr=False)
    num_classes: int | None = None
    axis_name: str | None = None
    dtype: Any = jnp.float32

    @property
    def image_shape(self) -> tuple[int | None, int | None, int | None]:
        channels, height, width = self.program.image_shape
        return height, width, channels

    def clone(self, **changes: Any) -> Exported:
        """The module with other fields, such as `axis_name`."""
        return dataclasses.replace(self, **changes)

    def init(self, key: Array, images: Array) -> Variables:
        """Variables of the right shapes, all zero: the weights are the file's, and none are drawn.

        Raises PortError if the network cannot take such images.
        """
        del key
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), self.shapes)
        self.apply(zeros, images)
        return zeros

    def apply(self, variables: Variables, images: Array, train: bool = False) -> Output:
        """Classifies images [B, H, W, channels].

        variables: ``{'params': ..., 'batch_stats': ...}``, as `load_exported` returns them.

        Raises ValueError with `train`, and PortError if the network cannot take such images.
        """
        if train:
            raise ValueError('an exported network runs as in evaluation: it cannot train.')
        if images.ndim != 4:
            raise PortError(f'images of shape {images.shape}; expected [B, H, W, channels].')
        program = self.program
        values: dict[str, Any] = dict(program.constants)
        values |= {
            name: jnp.asarray(x).astype(self.dtype) for name, x in variables['params'].items()
        }
        for key, running in variables.get('batch_stats', {}).items():
            values |= {f'{key}/{moment}': jnp.asarray(x) for moment, x in running.items()}
        images = jnp.asarray(images).astype(self.dtype)
        values[program.image] = images if program.channels_last else images.transpose(0, 3, 1, 2)

        statistics: dict[str, Any] = {}
        stages: dict[tuple[int, ...], Array] = {}
        for place, node in enumerate(program.nodes):
            x = self._run(node, values)
            if place in self.norms:
                statistics[self.norms[place]] = layers.moments(x, self.axis_name)
            if program.dialect.base(node.operator) in program.dialect.resizing:
                result = values[node.results[0]]
                if _shrinks(x, result) and x.shape[1] > images.shape[-1]:
                    stages[x.shape[2:]] = x
        logits = values[program.result]
        if logits.ndim != 2 or len(logits) != len(images):
            raise PortError(
                f'{program.source} returns {list(logits.shape)} for {len(images)} images; expected '
                'logits [B, num_classes]. Export a network that returns them alone.'
            )
        features = [_pooled(values[head.input], head.convolution) for head in self.heads]
        maps = sorted(stages.values(), key=lambda x: -x.shape[2] * x.shape[3])
        return Output(
            wide(logits),
            wide(jnp.concatenate(features, -1)),
            statistics,
            tuple(x.transpose(0, 2, 3, 1) for x in maps),
        )

    def _run(self, node: Node, values: dict[str, Any]) -> Any:
        """Computes a node's results into `values`; returns its first argument."""
        dialect = self.program.dialect

        def argument(given: Any) -> Any:
            if isinstance(given, Value):
                return values[given.name]
            if isinstance(given, Type):
                kind = jnp.dtype(given.name)
                if jnp.issubdtype(kind, jnp.floating):
                    return jnp.dtype(self.dtype)
                return kind
            if isinstance(given, list):
                return [argument(each) for each in given]
            return given

        arguments = [argument(each) for each in node.arguments]
        keywords = {name: argument(each) for name, each in node.keywords.items()}
        try:
            found = dialect.operators[dialect.base(node.operator)](*arguments, **keywords)
            several = node.listed or isinstance(found, tuple)
            results = list(found) if several else [found]
            for name, result in zip(node.results, results):
                for array in result if isinstance(result, list) else [result]:
                    layers.sized(np.shape(array), layers.on_host(array))
                if name:
                    values[name] = result
        except PortError:
            raise
        except Exception as error:  # operators raise anything at an impossible shape
            raise PortError(
                f'{self.program.source}: {node.operator} at {node.place}: {error}'
            ) from error
        return arguments[0] if arguments else None


def _shrinks(x: Any, result: Any) -> bool:
    """Whether maps x [B, C, H, W] became smaller ones, or their means."""
    if np.ndim(x) != 4 or np.ndim(result) not in (2, 4) or np.shape(result)[0] != x.shape[0]:
        return False
    if np.ndim(result) == 2:
        return result.shape[1] == x.shape[1] and math.prod(x.shape[2:]) > 1
    return result.shape[2] < x.shape[2] or result.shape[3] < x.shape[3]


def _pooled(x: Array, convolution: bool) -> Array:
    """[B, F]: the mean over pixels [B, F, H, W], or over tokens [B, ..., F]."""
    axes = tuple(range(2, x.ndim)) if convolution else tuple(range(1, x.ndim - 1))
    return jnp.mean(wide(x), axes) if axes else x


def build(program: Program) -> tuple[Exported, Variables]:
    """The network of a program and its variables.

    Raises PortError where an operator, an argument, an array or the end of the network is not what
    an image classifier has.
    """
    program = programs.checked(program)
    program = _without_softmax(program)
    nodes = programs.needed(program.nodes, program.result)
    program = dataclasses.replace(program, nodes=nodes)
    program, norms, running = _norms(program)
    read = {name for node in program.nodes for name in programs.reads(node)}
    parameters = {name: x for name, x in program.parameters.items() if name in read}
    constants = {name: x for name, x in program.constants.items() if name in read}
    variables = {
        'params': programs.floats(parameters, program.source),
        'batch_stats': {
            key: programs.floats(moments, program.source) for key, moments in running.items()
        },
    }
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32), variables)
    program = dataclasses.replace(program, parameters={}, constants=constants)
    module = Exported(program.digest, program, _heads(program), norms, shapes)
    if None not in module.image_shape:
        images = jax.ShapeDtypeStruct((3, *module.image_shape), jnp.float32)
        out = jax.eval_shape(module.apply, shapes, images)
        module = module.clone(num_classes=out.logits.shape[1])
    return module, variables


def _without_softmax(program: Program) -> Program:
    """The program without a softmax at its end: what goes into it are the logits."""
    last = program.nodes[-1] if program.nodes else None
    makes = {name: node for node in program.nodes for name in node.results}
    last = makes.get(program.result)
    if last is None or program.dialect.base(last.operator) not in program.dialect.softmaxes:
        return program
    logits = last.arguments[0]
    logging.warning('%s ends in a softmax: its logits are what goes into it.', program.source)
    return dataclasses.replace(program, result=logits.name)


def _norms(program: Program) -> tuple[Program, dict[int, str], Variables]:
    """The program with its batch norms' running moments under their own names.

    Returns also the key of each norm, by its place, and their running moments by key.
    """
    dialect, active = program.dialect, programs.of_images(program)
    nodes = list(program.nodes)
    norms: dict[int, str] = {}
    running: Variables = {}
    for place, node in enumerate(program.nodes):
        operator = dialect.base(node.operator)
        on_images = bool(active.intersection(programs.values(node.arguments[:1])))
        if operator in dialect.batch_norms and on_images:
            raise PortError(
                f"{program.source}: {node.operator} at {node.place} normalises with each batch's "
                'own moments, as in training: call model.eval() and export the network again.'
            )
        if operator not in dialect.norms or not on_images:
            continue
        moments = {}
        for moment, argument in zip(('mean', 'var'), node.arguments[3:5]):
            name = argument.name if isinstance(argument, Value) else ''
            array = program.parameters.get(name, program.constants.get(name))
            if array is None:
                raise PortError(
                    f'{program.source}: {node.operator} at {node.place} has no running {moment}: '
                    'call model.eval() and export the network again.'
                )
            moments[moment] = np.asarray(array)
        key = _key(node, running)
        running[key], norms[place] = moments, key
        arguments = list(node.arguments)
        arguments[3:5] = [Value(f'{key}/{moment}') for moment in moments]
        nodes[place] = node._replace(arguments=tuple(arguments))
    return dataclasses.replace(program, nodes=tuple(nodes)), norms, running


def _key(node: Node, taken: Iterable[str]) -> str:
    """The name of a batch norm; one that is called several times has a number after it."""
    name = node.arguments[3].name
    name = name.removeprefix('b_').removesuffix('running_mean').rstrip('._') or node.place
    number = sum(each == name or each.startswith(f'{name}#') for each in taken)
    return f'{name}#{number + 1}' if number else name


def _heads(program: Program) -> tuple[Head, ...]:
    """The last linear layers or convolutions before the logits."""
    dialect, active = program.dialect, programs.of_images(program)
    makes = {name: node for node in program.nodes for name in node.results}
    found: dict[Head, None] = {}
    waiting, seen = [program.result], set()
    while waiting:
        name = waiting.pop(0)
        if name in seen:
            continue
        seen.add(name)
        node = makes.get(name)
        operator = dialect.base(node.operator) if node else 'an input'
        inputs = [each for each in programs.reads(node) if each in active] if node else []
        if operator in dialect.layers and len(inputs) == 1:
            found[Head(inputs[0], operator in dialect.convolutions)] = None
        elif operator in dialect.passing and inputs:
            waiting += inputs
        else:
            raise PortError(
                f'{program.source} ends in {operator}: expected logits, from a linear layer or a '
                'convolution. Export the network without what follows them.'
            )
    return tuple(found)
