"""The one place that compiles: jit, pmap and shard_map, and how a step sees its share of a batch.

Random draws are made for the whole batch on every device and then cut (`Shards.share`), so that a
run does not depend on how many devices share it: the modes and device counts differ by the order
of floating-point sums only.  Draws are latents, labels and noise, small beside the images.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

Array = jax.Array
AXIS = 'shards'
MODES = ('jit', 'pmap', 'shard_map')  # and 'vmap', which checks the sharded code on one device


class Shards(NamedTuple):
    """How a step sees the batch: the name of its mapped axis (None: it sees all) and its size."""

    axis: str | None = None
    size: int = 1

    def check(self, name: str, batch_size: int) -> None:
        """Raises ValueError unless a batch divides over the shards."""
        if batch_size % self.size:
            low = batch_size - batch_size % self.size
            raise ValueError(
                f'{name}={batch_size} does not divide over {self.size} devices: use a multiple of '
                f'{self.size} such as {low or self.size} or {low + self.size}.'
            )

    def share(self, x: Array) -> Array:
        """This instance's rows of a whole batch: [B * size, ...] -> [B, ...]."""
        if self.axis is None:
            return x
        size = x.shape[0]
        return jax.lax.dynamic_slice_in_dim(x, self.first_row(size), size // self.size)

    def first_row(self, batch_size: int) -> Array | int:
        """Where in a whole batch this instance's share begins."""
        if self.axis is None:
            return 0
        return jax.lax.axis_index(self.axis) * (batch_size // self.size)

    def gather(self, x: Array) -> Array:
        """The whole batch from the shares, the same everywhere: [B, ...] -> [B * size, ...].

        Placed into zeros and summed: unlike of an all_gather, shard_map can tell that the result is
        replicated.
        """
        if self.axis is None:
            return x
        whole = jnp.zeros((self.size, *x.shape), x.dtype)
        whole = jax.lax.dynamic_update_index_in_dim(whole, x, jax.lax.axis_index(self.axis), 0)
        return jax.lax.psum(whole, self.axis).reshape(-1, *x.shape[1:])

    def mean(self, tree: Any) -> Any:
        """The mean over shards of every leaf."""
        return tree if self.axis is None else jax.lax.pmean(tree, self.axis)

    def value_and_grad(self, loss_fn: Callable) -> Callable:
        """`jax.value_and_grad(loss_fn, has_aux=True)` of the mean loss over shards.

        The mean is taken of the loss inside and of the gradients outside: the one combination that
        has the right scale under jit, pmap, vmap and shard_map alike (shard_map has already summed
        the gradients of replicated parameters; pmap has not).
        """

        def mean_loss(params: Any, *args: Any) -> tuple[Array, Any]:
            loss, aux = loss_fn(params, *args)
            return self.mean(loss), aux

        def fn(params: Any, *args: Any) -> tuple[tuple[Array, Any], Any]:
            out, grads = jax.value_and_grad(mean_loss, has_aux=True)(params, *args)
            return out, self.mean(grads)

        return fn


class Plan(NamedTuple):
    """How a run is compiled.

    compile: turns a pure ``(frozen, state, inputs) -> (state, metrics)`` into a compiled program
        that donates `state` and runs on all shards.
    predict: compiles ``(variables, batch) -> outputs`` with the batch's rows spread over devices
        (their number must divide; the variables come from `replicate` or from a step).
    call: compiles a function that sees the whole batch, needs no devices but one and runs once (an
        `init`): on the CPU with little optimisation, which saves seconds and changes no draw.
    replicate: places a tree on the devices once, to be passed to every call.
    fused: whether a round runs as one program (GPU, TPU) or as one call per step.  On the CPU XLA
        runs the body of a loop without its thread pool: scanned convolutions are 5 to 30 times
        slower there than one compiled step per call.
    """

    shards: Shards
    compile: Callable[[Callable], Callable]
    predict: Callable[[Callable], Callable]
    call: Callable[[Callable], Callable]
    replicate: Callable[[Any], Any]
    fused: bool


def make(
    mode: str = 'jit', devices: Sequence[jax.Device] | None = None, fused: bool | None = None
) -> Plan:
    """The plan for `config.parallel`, over all devices unless some are given.

    Raises ValueError for an unknown mode.
    """
    devices = list(devices or jax.devices())
    count = 1 if mode == 'jit' else len(devices)
    if mode in ('jit', 'vmap'):
        devices = devices[:1]
    mesh = Mesh(np.asarray(devices), (AXIS,))
    replicated, split = PartitionSpec(), PartitionSpec(AXIS)
    shards = Shards() if mode == 'jit' else Shards(AXIS, count)
    on_cpu = devices[0].platform == 'cpu'

    def compile_jit(step: Callable) -> Callable:
        return jax.jit(step, donate_argnums=1)

    def compile_pmap(step: Callable) -> Callable:
        # A data-free step has no batch to map over: the shares are told apart by their index, and
        # pmap asks for one mapped argument all the same.
        mapped = jax.pmap(
            lambda frozen, state, inputs, _: step(frozen, state, inputs),
            axis_name=AXIS,
            in_axes=(None, None, None, 0),
            out_axes=None,
            donate_argnums=1,
            devices=devices,
        )
        return lambda frozen, state, inputs: mapped(frozen, state, inputs, np.arange(count))

    def compile_shard_map(step: Callable) -> Callable:
        mapped = jax.shard_map(
            step, mesh=mesh, in_specs=(replicated, replicated, replicated), out_specs=replicated
        )
        return jax.jit(mapped, donate_argnums=1)

    def compile_vmap(step: Callable) -> Callable:
        mapped = jax.vmap(
            lambda frozen, state, inputs, _: step(frozen, state, inputs),
            axis_name=AXIS,
            in_axes=(None, None, None, 0),
            out_axes=None,
        )
        return jax.jit(
            lambda frozen, state, inputs: mapped(frozen, state, inputs, jnp.arange(count)),
            donate_argnums=1,
        )

    def predict(fn: Callable) -> Callable:
        compiled = jax.jit(fn)
        rows = NamedSharding(mesh, split)
        return lambda variables, batch: compiled(variables, jax.device_put(batch, rows))

    compilers = {
        'jit': compile_jit,
        'pmap': compile_pmap,
        'shard_map': compile_shard_map,
        'vmap': compile_vmap,
    }
    if mode not in compilers:
        raise ValueError(f'unknown config.parallel {mode!r}; expected one of {", ".join(MODES)}.')
    return Plan(
        shards=shards,
        compile=compilers[mode],
        predict=predict,
        call=partial(
            jax.jit,
            compiler_options={'xla_backend_optimization_level': 1} if on_cpu else None,
        ),
        replicate=lambda tree: jax.device_put(tree, NamedSharding(mesh, replicated)),
        fused=not on_cpu if fused is None else fused,
    )


def repeat(step: Callable, frozen: Any, state: Any, key: Array, times: int, fused: bool) -> Any:
    """Runs `step` `times` times with keys ``fold_in(key, i)``; metrics are averaged over the calls.

    fused: as a scan, inside a compiled program; else as calls of an already compiled `step`, whose
    inputs are ``(key, i)`` in both cases (see `numbered`).
    """
    if times == 0:
        return state, {}  # the mean of no metrics would be nan
    if fused:
        state, metrics = jax.lax.scan(
            lambda state, i: step(frozen, state, (key, i)), state, np.arange(times)
        )
        return state, jax.tree.map(lambda m: jnp.mean(m, axis=0), metrics)
    collected = []
    for i in np.arange(times, dtype=np.int32):
        state, metrics = step(frozen, state, (key, i))
        collected.append(metrics)
    return state, _average(collected)


def numbered(step: Callable) -> Callable:
    """A step of ``(frozen, state, (key, i))`` from one of ``(frozen, state, key)``."""
    return lambda frozen, state, inputs: step(frozen, state, jax.random.fold_in(*inputs))


@jax.jit
def _average(collected: list[Any]) -> Any:
    return jax.tree.map(lambda *leaves: jnp.mean(jnp.stack(leaves), axis=0), *collected)
