"""The one place that compiles: jit, pmap and shard_map, and how a step sees its share of a batch.

Every device makes the random draws of the whole batch and takes its share (`Shards.share`), so a
run does not depend on the number of devices: modes and numbers of devices differ only by the order
of floating-point sums.  Draws are latents, labels and noise, small beside the images.

Several processes (`processes`) make the same calls in the same order.  A state is arrays that every
device of every process holds; of a batch of real images, each process passes its rows.  Little
crosses between devices: the gradients of an update and its loss in one sum
(`Shards.value_and_grad`), its metrics in one (`Shards.mean`), the moments of each batch norm, and
what a method gathers, each row once (`Shards.gather`).
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
REPLICATED, SPLIT = PartitionSpec(), PartitionSpec(AXIS)  # equal everywhere; rows over the devices
MODES = ('jit', 'pmap', 'shard_map')  # and 'vmap', which checks the sharded code on one device


class Shards(NamedTuple):
    """How a step sees the batch.

    axis: the name of its mapped axis; None: a step sees the whole batch.
    size: the number of shards.
    tracked: whether the axis is one of shard_map, which tracks which values are equal everywhere.
    """

    axis: str | None = None
    size: int = 1
    tracked: bool = False

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

        Each row crosses once.
        """
        if self.axis is None:
            return x
        # To pmap and vmap every value is one that varies.
        to = 'invarying' if self.tracked else 'varying'
        return jax.lax.all_gather(x, self.axis, tiled=True, to=to)

    def before(self, x: Array) -> Array:
        """The row before each of this instance's rows [B, ...] in the whole batch, cyclically."""
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

        Every shard differentiates the loss of its share with respect to a copy of the parameters,
        and the mean of all gradients and of the loss is one sum over the shards.  (With respect to
        parameters that shard_map knows to be equal everywhere, it would sum each gradient alone.)
        """

        def local_loss(params: Any, *args: Any) -> tuple[Array, Any]:
            loss, aux = loss_fn(params, *args)
            # A loss of gathered values alone is equal everywhere, and the mean needs one per shard.
            return self._varying(loss), aux

        def fn(params: Any, *args: Any) -> tuple[tuple[Array, Any], Any]:
            copy = jax.tree.map(self._varying, params)
            (loss, aux), grads = jax.value_and_grad(local_loss, has_aux=True)(copy, *args)
            loss, grads = self.mean((loss, grads))
            return (loss, aux), grads

        return fn

    def _varying(self, x: Array) -> Array:
        """`x`, as a value that may differ between shards."""
        if self.axis is None:
            return x
        # A sum, unlike jax.lax.pcast, means the same to shard_map, pmap and vmap.
        return x + (0 * jax.lax.axis_index(self.axis)).astype(jnp.result_type(x))


class Plan(NamedTuple):
    """How a run is compiled.

    compile: compiles a pure ``(constants, state, inputs) -> (state, metrics)`` for all shards.  The
        program donates `state`; `constants` and `inputs` are the same everywhere.
    compile_rows: as `compile`, for ``inputs = (batch, key)`` with a batch of real data, a tree of
        arrays [B, ...] on the host.  A process passes its `rows`, and a shard sees its share.
    rows: the rows of a batch of so many images that this process holds.
    predict: compiles ``(variables, batch) -> outputs`` with the rows of the batch spread over the
        devices.  Their number must divide; the variables come from `replicate` or from a step.  A
        process passes its `rows`.  Of several processes, each gets all outputs.
    call: compiles a function of the whole batch that needs one device and runs once (an `init`).
        On the CPU it is compiled with little optimisation, which saves seconds and changes no draw.
    replicate: places a tree on all devices once, to be passed to every call.
    fused: whether a round runs as one program (GPU, TPU) or as one call per step.  On the CPU, XLA
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

    fused: None: fused on accelerators, one call per step on the CPU.
    Raises ValueError for an unknown mode, and for a mode of one device in a run of several
    processes.
    """
    if mode not in COMPILERS:
        raise ValueError(f'unknown config.parallel {mode!r}; expected one of {", ".join(MODES)}.')
    one_device = mode in ('jit', 'vmap')
    if one_device and jax.process_count() > 1:
        raise ValueError(
            f'config.parallel={mode} is for one device, and there are {jax.process_count()} '
            'processes: expected shard_map or pmap.'
        )
    # The devices of a process side by side, so that its rows are.
    devices = sorted(devices or jax.devices(), key=lambda device: (device.process_index, device.id))
    shards = Shards() if mode == 'jit' else Shards(AXIS, len(devices), mode == 'shard_map')
    placement = Placement.on(devices[:1] if one_device else devices)
    compile_step, compile_rows = COMPILERS[mode](placement, shards.size)
    on_cpu = devices[0].platform == 'cpu'
    options = {'xla_backend_optimization_level': 1} if on_cpu else None
    return Plan(
        shards=shards,
        compile=compile_step,
        compile_rows=compile_rows,
        rows=placement.rows,
        predict=placement.predict,
        call=partial(jax.jit, compiler_options=options),
        replicate=placement.replicate,
        fused=not on_cpu if fused is None else fused,
    )


# 1. Where arrays lie.


class Placement(NamedTuple):
    """The devices of a run, in the order of the rows of a batch, and how arrays lie on them.

    local: those of this process.
    replicated, split: the shardings of an array that every device holds, and of one whose rows are
        spread over the devices.
    """

    devices: tuple[jax.Device, ...]
    local: tuple[jax.Device, ...]
    replicated: NamedSharding
    split: NamedSharding

    @classmethod
    def on(cls, devices: Sequence[jax.Device]) -> Placement:
        """The placement on these devices."""
        mesh = Mesh(np.asarray(devices), (AXIS,))
        local = [device for device in devices if device.process_index == jax.process_index()]
        shardings = (NamedSharding(mesh, spec) for spec in (REPLICATED, SPLIT))
        return cls(tuple(devices), tuple(local), *shardings)

    @property
    def several_processes(self) -> bool:
        """Whether some devices belong to other processes."""
        return len(self.local) < len(self.devices)

    def replicate(self, tree: Any) -> Any:
        """See `Plan.replicate`."""
        if not self.several_processes:
            return jax.device_put(tree, self.replicated)

        def place(x: Any) -> jax.Array:
            if isinstance(x, jax.Array) and not x.is_fully_addressable:
                return x  # It lies on all devices already.
            return self.assemble(np.shape(x), [jax.device_put(x, device) for device in self.local])

        return jax.tree.map(place, tree)

    def assemble(self, shape: tuple[int, ...], copies: list[jax.Array]) -> jax.Array:
        """One array on all devices from the copies on those of this process."""
        return jax.make_array_from_single_device_arrays(shape, self.replicated, copies)

    def rows(self, batch_size: int) -> slice:
        """See `Plan.rows`."""
        if not self.several_processes:
            return slice(0, batch_size)
        size = batch_size // len(self.devices)
        start = self.devices.index(self.local[0]) * size
        return slice(start, start + len(self.local) * size)

    def spread(self, batch: Any) -> Any:
        """A batch, of which this process has its `rows`, with its rows spread over all devices."""
        if not self.several_processes:
            return jax.device_put(batch, self.split)
        return jax.tree.map(lambda x: jax.make_array_from_process_local_data(self.split, x), batch)

    def predict(self, fn: Callable) -> Callable:
        """See `Plan.predict`."""
        # What other processes computed can be read here only if it is brought here.
        several = self.several_processes
        compiled = jax.jit(fn, out_shardings=self.replicated) if several else jax.jit(fn)
        return lambda variables, batch: compiled(variables, self.spread(batch))


# 2. A compiler for each mode: `Plan.compile` and `Plan.compile_rows`.

Compilers = tuple[Callable[[Callable], Callable], Callable[[Callable], Callable]]


def jit_compilers(placement: Placement, count: int) -> Compilers:
    """One device, which sees the whole batch."""
    del placement, count
    compile_step = partial(jax.jit, donate_argnums=1)
    return compile_step, compile_step


def pmap_compilers(placement: Placement, count: int) -> Compilers:
    """One program for each device, which sees its share of the batch."""
    del count
    local = len(placement.local)
    pmap = partial(
        jax.pmap, axis_name=AXIS, out_axes=None, donate_argnums=1, devices=placement.devices
    )

    def one_array(x: jax.Array) -> jax.Array:
        # pmap returns arrays of this process alone.
        return placement.assemble(x.shape, [shard.data for shard in x.addressable_shards])

    def joined(tree: Any) -> Any:
        return jax.tree.map(one_array, tree) if placement.several_processes else tree

    def compile_step(step: Callable) -> Callable:
        # A data-free step has no batch to map over: the shares are told apart by their index, and
        # pmap asks for one mapped argument all the same.
        mapped = pmap(
            lambda constants, state, inputs, _: step(constants, state, inputs),
            in_axes=(None, None, None, 0),
        )
        index = np.arange(local)
        return lambda constants, state, inputs: joined(mapped(constants, state, inputs, index))

    def compile_rows(step: Callable) -> Callable:
        mapped = pmap(step, in_axes=(None, None, (0, None)))

        def call(constants: Any, state: Any, inputs: Any) -> Any:
            batch, key = inputs
            return joined(mapped(constants, state, (_shares(batch, local), key)))

        return call

    return compile_step, compile_rows


def shard_map_compilers(placement: Placement, count: int) -> Compilers:
    """One program over all devices; JAX checks that its results are the same everywhere."""
    del count
    mesh = placement.replicated.mesh

    def compile_for(step: Callable, inputs_spec: Any) -> Callable:
        mapped = jax.shard_map(
            step, mesh=mesh, in_specs=(REPLICATED, REPLICATED, inputs_spec), out_specs=REPLICATED
        )
        return jax.jit(mapped, donate_argnums=1)

    def compile_rows(step: Callable) -> Callable:
        compiled = compile_for(step, (SPLIT, REPLICATED))

        def call(constants: Any, state: Any, inputs: Any) -> Any:
            batch, key = inputs
            return compiled(constants, state, (placement.spread(batch), key))

        return call

    return partial(compile_for, inputs_spec=REPLICATED), compile_rows


def vmap_compilers(placement: Placement, count: int) -> Compilers:
    """As many shares on one device: a check of the sharded code."""
    del placement

    def compile_step(step: Callable) -> Callable:
        mapped = jax.vmap(
            lambda constants, state, inputs, _: step(constants, state, inputs),
            axis_name=AXIS,
            in_axes=(None, None, None, 0),
            out_axes=None,
        )
        return jax.jit(
            lambda constants, state, inputs: mapped(constants, state, inputs, jnp.arange(count)),
            donate_argnums=1,
        )

    def compile_rows(step: Callable) -> Callable:
        mapped = jax.vmap(
            step, axis_name=AXIS, in_axes=(None, None, (0, None)), out_axes=None, axis_size=count
        )
        compiled = jax.jit(mapped, donate_argnums=1)

        def call(constants: Any, state: Any, inputs: Any) -> Any:
            batch, key = inputs
            return compiled(constants, state, (_shares(batch, count), key))

        return call

    return compile_step, compile_rows


COMPILERS = {
    'jit': jit_compilers,
    'pmap': pmap_compilers,
    'shard_map': shard_map_compilers,
    'vmap': vmap_compilers,
}


def _shares(batch: Any, count: int) -> Any:
    """[B, ...] -> [count, B / count, ...], leaf by leaf."""
    return jax.tree.map(lambda x: x.reshape(count, -1, *x.shape[1:]), batch)


# 3. Steps one after the other.


def repeat(step: Callable, constants: Any, state: Any, key: Array, times: int, fused: bool) -> Any:
    """Runs `step` `times` times with the inputs ``(key, i)``, i = 0, 1, ... (see `numbered`).

    fused: as a scan, inside a compiled program; else as calls of a compiled `step`.
    Returns the state and the means of the metrics over the calls.
    """
    if times == 0:
        return state, {}  # the mean of no metrics would be nan
    if fused:
        state, metrics = jax.lax.scan(
            lambda state, i: step(constants, state, (key, i)), state, np.arange(times)
        )
        return state, jax.tree.map(lambda m: jnp.mean(m, axis=0), metrics)
    collected = []
    for i in np.arange(times, dtype=np.int32):
        state, metrics = step(constants, state, (key, i))
        collected.append(metrics)
    return state, _average(collected)


def numbered(step: Callable) -> Callable:
    """A step of the inputs ``(key, i)`` from one of a key: it gets ``fold_in(key, i)``."""

    def numbered_step(constants: Any, state: Any, inputs: Any) -> Any:
        key, i = inputs
        return step(constants, state, jax.random.fold_in(key, i))

    return numbered_step


@jax.jit
def _average(collected: list[Any]) -> Any:
    return jax.tree.map(lambda *leaves: jnp.mean(jnp.stack(leaves), axis=0), *collected)
