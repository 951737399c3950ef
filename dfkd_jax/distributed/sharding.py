"""The one place that compiles: jit, pmap and shard_map, and how a step sees its share of a batch.

Random draws are made for the whole batch on every device and then cut (`Shards.share`), so that a
run does not depend on how many devices share it: the modes and device counts differ by the order
of floating-point sums only.  Draws are latents, labels and noise, small beside the images.

With several processes (`hosts`), all run the same calls in the same order: states are arrays that
every device of every process holds, and of a batch of real images each process passes its rows.
What crosses between devices is sums, and few of them: the gradients of an update together with its
loss in one (`Shards.value_and_grad`), its metrics in one (`Shards.mean`), the moments of each batch
norm, and what a method gathers (`Shards.gather`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
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

    def before(self, x: Array) -> Array:
        """Of this instance's rows [B, ...], the ones before them in the whole batch, cyclically."""
        if self.axis is None:
            return jnp.roll(x, 1, axis=0)
        ring = [(i, (i + 1) % self.size) for i in range(self.size)]
        # One row crosses to the next device.
        return jnp.concatenate([jax.lax.ppermute(x[-1:], self.axis, ring), x[:-1]])

    def mean(self, tree: Any) -> Any:
        """The mean over shards of every leaf, all in one sum."""
        if self.axis is None or not jax.tree.leaves(tree):
            return tree
        flat, unflatten = ravel_pytree(tree)
        return unflatten(jax.lax.pmean(flat, self.axis))

    def value_and_grad(self, loss_fn: Callable) -> Callable:
        """`jax.value_and_grad(loss_fn, has_aux=True)` of the mean loss over shards.

        Every shard differentiates the loss of its share by parameters of its own, and the mean of
        all gradients and of the loss is one sum over the shards.  (By parameters that shard_map
        knows to be equal everywhere, the gradient of each would be summed by itself.)
        """

        def local_loss(params: Any, *args: Any) -> tuple[Array, Any]:
            loss, aux = loss_fn(params, *args)
            # A loss of gathered values alone is the same everywhere: each shard's, all the same.
            return self._own(loss), aux

        def fn(params: Any, *args: Any) -> tuple[tuple[Array, Any], Any]:
            own = jax.tree.map(self._own, params)
            (loss, aux), grads = jax.value_and_grad(local_loss, has_aux=True)(own, *args)
            loss, grads = self.mean((loss, grads))
            return (loss, aux), grads

        return fn

    def _own(self, x: Array) -> Array:
        """`x`, as a value that may differ between shards."""
        if self.axis is None:
            return x
        # A sum, unlike jax.lax.pcast, means the same to shard_map, pmap and vmap.
        return x + (0 * jax.lax.axis_index(self.axis)).astype(jnp.result_type(x))


class Plan(NamedTuple):
    """How a run is compiled.

    compile: turns a pure ``(frozen, state, inputs) -> (state, metrics)`` into a compiled program
        that donates `state` and runs on all shards.
    compile_rows: the same for inputs ``(batch, key)`` whose batch, a tree of arrays [B, ...] on the
        host, is no draw but data: a process passes its `rows`, and a shard sees its share of them.
    rows: which rows of a whole batch of so many this process holds.
    predict: compiles ``(variables, batch) -> outputs`` with the batch's rows spread over devices
        (their number must divide; the variables come from `replicate` or from a step).  A process
        passes its `rows`; of several, all get all outputs.
    call: compiles a function that sees the whole batch, needs no devices but one and runs once (an
        `init`): on the CPU with little optimisation, which saves seconds and changes no draw.
    replicate: places a tree on the devices once, to be passed to every call.
    fused: whether a round runs as one program (GPU, TPU) or as one call per step.  On the CPU XLA
        runs the body of a loop without its thread pool: scanned convolutions are 5 to 30 times
        slower there than one compiled step per call.
    """

    shards: Shards
    compile: Callable[[Callable], Callable]
    compile_rows: Callable[[Callable], Callable]
    rows: Callable[[int], slice]
    predict: Callable[[Callable], Callable]
    call: Callable[[Callable], Callable]
    replicate: Callable[[Any], Any]
    fused: bool


def make(
    mode: str = 'jit', devices: Sequence[jax.Device] | None = None, fused: bool | None = None
) -> Plan:
    """The plan for `config.parallel`, over all devices of all processes unless some are given.

    Raises ValueError for an unknown mode, and for one of a single device where there are several
    processes.
    """
    # A process's devices side by side, so that its rows are.
    devices = sorted(devices or jax.devices(), key=lambda device: (device.process_index, device.id))
    if mode in ('jit', 'vmap') and jax.process_count() > 1:
        raise ValueError(
            f'config.parallel={mode} is for one device, and there are {jax.process_count()} '
            'processes: expected shard_map or pmap.'
        )
    count = 1 if mode == 'jit' else len(devices)
    if mode in ('jit', 'vmap'):
        devices = devices[:1]
    mesh = Mesh(np.asarray(devices), (AXIS,))
    replicated, split = PartitionSpec(), PartitionSpec(AXIS)
    shards = Shards() if mode == 'jit' else Shards(AXIS, count)
    on_cpu = devices[0].platform == 'cpu'
    everywhere, by_rows = NamedSharding(mesh, replicated), NamedSharding(mesh, split)
    local = [device for device in devices if device.process_index == jax.process_index()]
    # A program may run on devices of this process alone, beside others.
    several = len(local) < len(devices)

    def whole(shape: tuple[int, ...], shards: list[jax.Array]) -> jax.Array:
        return jax.make_array_from_single_device_arrays(shape, everywhere, shards)

    def replicate(tree: Any) -> Any:
        if not several:
            return jax.device_put(tree, everywhere)

        def place(x: Any) -> jax.Array:
            if isinstance(x, jax.Array) and not x.is_fully_addressable:
                return x
            return whole(np.shape(x), [jax.device_put(x, device) for device in local])

        return jax.tree.map(place, tree)

    def rows(batch_size: int) -> slice:
        if not several:
            return slice(0, batch_size)
        size = batch_size // len(devices)
        start = devices.index(local[0]) * size
        return slice(start, start + len(local) * size)

    def spread(batch: Any) -> Any:
        if not several:
            return jax.device_put(batch, by_rows)
        return jax.tree.map(lambda x: jax.make_array_from_process_local_data(by_rows, x), batch)

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
        number = np.arange(len(local))
        return lambda frozen, state, inputs: joined(mapped(frozen, state, inputs, number))

    def compile_rows_pmap(step: Callable) -> Callable:
        mapped = jax.pmap(
            step,
            axis_name=AXIS,
            in_axes=(None, None, (0, None)),
            out_axes=None,
            donate_argnums=1,
            devices=devices,
        )

        def call(frozen: Any, state: Any, inputs: Any) -> Any:
            return joined(mapped(frozen, state, (cut(inputs[0], len(local)), inputs[1])))

        return call

    def joined(tree: Any) -> Any:
        """What pmap returns is each process's own; the same arrays as those of all."""
        if not several:
            return tree
        return jax.tree.map(lambda x: whole(x.shape, [s.data for s in x.addressable_shards]), tree)

    def cut(batch: Any, parts: int) -> Any:
        return jax.tree.map(lambda x: x.reshape(parts, -1, *x.shape[1:]), batch)

    def compile_shard_map(step: Callable) -> Callable:
        mapped = jax.shard_map(
            step, mesh=mesh, in_specs=(replicated, replicated, replicated), out_specs=replicated
        )
        return jax.jit(mapped, donate_argnums=1)

    def compile_rows_shard_map(step: Callable) -> Callable:
        mapped = jax.shard_map(
            step,
            mesh=mesh,
            in_specs=(replicated, replicated, (split, replicated)),
            out_specs=replicated,
        )
        compiled = jax.jit(mapped, donate_argnums=1)
        return lambda frozen, state, inputs: compiled(frozen, state, (spread(inputs[0]), inputs[1]))

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

    def compile_rows_vmap(step: Callable) -> Callable:
        mapped = jax.vmap(
            step, axis_name=AXIS, in_axes=(None, None, (0, None)), out_axes=None, axis_size=count
        )
        compiled = jax.jit(mapped, donate_argnums=1)
        return lambda frozen, state, inputs: compiled(
            frozen, state, (cut(inputs[0], count), inputs[1])
        )

    def predict(fn: Callable) -> Callable:
        # What other processes computed can be read here only if it is brought here.
        compiled = jax.jit(fn, out_shardings=everywhere) if several else jax.jit(fn)
        return lambda variables, batch: compiled(variables, spread(batch))

    compilers = {
        'jit': (compile_jit, compile_jit),
        'pmap': (compile_pmap, compile_rows_pmap),
        'shard_map': (compile_shard_map, compile_rows_shard_map),
        'vmap': (compile_vmap, compile_rows_vmap),
    }
    if mode not in compilers:
        raise ValueError(f'unknown config.parallel {mode!r}; expected one of {", ".join(MODES)}.')
    return Plan(
        shards=shards,
        compile=compilers[mode][0],
        compile_rows=compilers[mode][1],
        rows=rows,
        predict=predict,
        call=partial(
            jax.jit,
            compiler_options={'xla_backend_optimization_level': 1} if on_cpu else None,
        ),
        replicate=replicate,
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
