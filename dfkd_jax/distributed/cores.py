"""All cores of a CPU for one run, as virtual devices that share every batch."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import jax

from dfkd_jax.distributed.sharding import MODES

# Images of a batch for each device.  With 8 or 32 on small networks, two devices are slower than
# one; with 64 they are 1.0 to 1.3 times as fast (experiments/bench/README.md).
LEAST = 48
OLD_WAY = '--xla_force_host_platform_device_count'


def spread(config: Any) -> int:
    """Gives JAX's CPU backend a device for each core, as far as the batches of `config` go round.

    Call it before the backend starts; afterwards it changes nothing, and neither does it where
    JAX_NUM_CPU_DEVICES has a say, for `config.parallel='jit'`, and in a run of several processes.
    Accelerators are not affected.  Numbers differ between one device and several by the order of
    sums.  Returns the number that it asked for, or 1.
    """
    asked = getattr(jax.config, 'jax_num_cpu_devices', -1)  # which its types leave out
    told = asked != -1 or OLD_WAY in os.environ.get('XLA_FLAGS', '')
    hosts = config.get('distributed', {})
    alone = not (hosts.get('coordinator') or hosts.get('auto'))
    if told or not alone or config.get('parallel') not in MODES[1:]:
        return 1
    every = list(batches(config))
    number = devices(every, list(batches(config.get('synthesis', {}))) or every, cores())
    if number > 1:
        try:
            jax.config.update('jax_num_cpu_devices', number)
        except RuntimeError:  # the backend has started
            return 1
    return number


def devices(sizes: list[int], large: list[int], most: int) -> int:
    """The largest number up to `most` that divides all `sizes` and leaves `LEAST` of all `large`.

    large: the batches of what takes the time.
    """
    if not large:
        return 1
    most = min(most, min(large) // LEAST)
    return next((n for n in range(most, 1, -1) if all(s % n == 0 for s in sizes)), 1)


def batches(config: Any) -> Iterator[int]:
    """The sizes of the batches of training in a config, wherever they stand."""
    for name, value in config.items():
        if hasattr(value, 'items'):
            yield from batches(value)
        elif name in ('batch_size', 'student_batch_size'):
            yield value


def cores() -> int:
    """The cores that this process may use."""
    if hasattr(os, 'sched_getaffinity'):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
