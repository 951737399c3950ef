"""Several processes as one run: they join, agree on values, and end together.

JAX joins them (`jax.distributed`) and carries the values (`multihost_utils`).  The `watchdog` tells
which process is missing, gone or hanging.

Process 0 listens at `config.distributed.coordinator`, for the watchdog, and at a free port of the
same address, for JAX's coordination service.  With `config.distributed.auto` JAX chooses the port
of its service and listens on all interfaces (unless JAX_COORDINATOR_BIND_ADDRESS is set); the
watchdog uses the interface that leads to the other hosts.  The collectives of JAX's backends (Gloo,
NCCL) open ports of their own.

Without `join`, and in a run of one process, all functions return at once.
"""

from __future__ import annotations

import json
import math
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from dfkd_jax.distributed import watchdog
from dfkd_jax.errors import ConfigError, HostError

T = TypeVar('T')
GROUP = 'config.distributed'


class _Group:
    """The processes of this run."""

    number, count = 0, 1
    silent_seconds = 0.0


_group = _Group()


# 1. Who is who


def first() -> bool:
    """Whether this is process 0: the one that writes and prints."""
    return _group.number == 0


def several() -> bool:
    """Whether the run has more than one process."""
    return _group.count > 1


def name() -> str:
    """``process 1 of 2``; '' in a run of one process."""
    return f'process {_group.number} of {_group.count}' if several() else ''


# 2. Agreement.  Each call is a collective: all processes make the same calls in the same order, on
# their main thread.


def allgather(value: T) -> list[T]:
    """The values of all processes, by process, on every process.  Values are what JSON holds."""
    if not several():
        return [value]
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = _gather(np.int32(text.size))
    # JAX compiles a program for each size: a power of two, so that they are few.
    padded = np.zeros(max(256, 1 << int(sizes.max() - 1).bit_length()), np.uint8)
    padded[: text.size] = text
    texts = _gather(padded)
    return [json.loads(row[:size].tobytes()) for row, size in zip(texts, sizes, strict=True)]


def _gather(x: Any) -> np.ndarray:
    try:
        return np.asarray(multihost_utils.process_allgather(x))
    except Exception:  # Gloo raises a ValueError
        wait_for_the_end()


def broadcast_from_first(value: T) -> T:
    """The value of process 0."""
    return allgather(value)[0]


def any_process(flag: bool) -> bool:
    """Whether a flag is set on any process."""
    return bool(_gather(np.asarray(flag)).any()) if several() else flag


def by_first(fn: Callable[[], T]) -> T | None:
    """Runs `fn` on process 0 while the others wait.  Returns its result there, None elsewhere.

    If `fn` raises, the others raise a HostError with the same message.  On CPUs XLA ends a run
    whose collective waits for half an hour (`xla_cpu_collective_timeout_seconds`).
    """
    if not several():
        return fn()
    result, error = None, None
    if first():
        try:
            result = fn()
        except Exception as raised:
            error = raised
    message = broadcast_from_first(None if error is None else str(error) or type(error).__name__)
    if error is not None:
        raise error
    if message is not None:
        raise HostError(message)
    return result


# 3. Joining


def check(settings: Any) -> None:
    """Raises ConfigError if `config.distributed` does not describe a group of processes."""
    address, count, number = settings.coordinator, settings.num_processes, settings.process_id
    for field in ('join_seconds', 'silent_seconds'):
        if settings[field] <= 0:
            raise ConfigError(f'{GROUP}.{field}={settings[field]}: expected more than 0.')
    given = {'coordinator': bool(address), 'num_processes': count != 0, 'process_id': number != -1}
    if settings.auto and any(given.values()):
        raise ConfigError(
            f'{GROUP}.auto finds coordinator, num_processes and process_id in the environment: '
            'leave them out, or set auto=False.'
        )
    if not any(given.values()):
        return
    if not all(given.values()):
        missing = ' and '.join(f'{GROUP}.{field}' for field, is_set in given.items() if not is_set)
        raise ConfigError(
            f'{missing} missing: several processes need coordinator=HOST:PORT, the same '
            'num_processes, and a process_id of their own, from 0 on.'
        )
    host, _, port = address.rpartition(':')
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise ConfigError(
            f'{GROUP}.coordinator={address!r}: expected HOST:PORT, a name or address of process '
            "0's host and a free port there, e.g. 10.0.0.1:9876."
        )
    if count < 1:
        raise ConfigError(f'{GROUP}.num_processes={count}: expected 1 or more.')
    if not 0 <= number < count:
        raise ConfigError(
            f'{GROUP}.process_id={number}: expected 0 to {count - 1}, since num_processes={count}.'
        )


def join(settings: Any) -> None:
    """Makes this process one of those of `config.distributed`, if there are several.

    Call it before JAX runs anything.  From then on only process 0 prints.
    Raises ConfigError if the settings do not fit or process 0 cannot listen, and HostError if
    processes do not come within `join_seconds` or contradict each other.
    """
    check(settings)
    number, count = settings.process_id, settings.num_processes
    host, _, port = settings.coordinator.rpartition(':')
    if settings.auto:
        number, count, host, port = _join_cluster(settings)
    if count <= 1:
        return
    where = host.strip('[]'), int(port)
    if number == 0:
        free = watchdog.accept(*where, count, settings.join_seconds)
    else:
        free = watchdog.call(*where, number, count, settings.join_seconds)
        sys.stdout = open(os.devnull, 'w')  # noqa: SIM115, until the process ends
    _group.number, _group.count = number, count
    _group.silent_seconds = settings.silent_seconds
    watchdog.start(number, count, settings.silent_seconds)
    if not settings.auto:
        _start_jax(settings, f'{host}:{free}', count, number)
    if number == 0:
        watchdog.outlive()
    print(f'{count} processes, {jax.device_count()} devices', flush=True)


def _start_jax(
    settings: Any, service: str | None = None, count: int | None = None, number: int | None = None
) -> None:
    jax.config.update('jax_enable_preemption_service', False)  # it would take SIGTERM for itself
    jax.config.update('jax_cpu_collectives_implementation', 'gloo')
    jax.distributed.initialize(
        service,
        count,
        number,
        coordinator_bind_address=service,
        cluster_detection_method='deactivate' if service else None,
        # Longer than the watchdog's, which tells in words what JAX tells with a stack trace.
        initialization_timeout=math.ceil(settings.join_seconds) + 60,
        heartbeat_timeout_seconds=max(math.ceil(10 * settings.silent_seconds), 100),
    )


def _join_cluster(settings: Any) -> tuple[int, int, str, int]:
    """Starts JAX with what it finds in the environment.

    Returns the number of this process, the number of processes, and where process 0 can listen.
    """
    why = f'not all processes came within {settings.join_seconds:g} seconds ({GROUP}.join_seconds)'
    late = threading.Timer(settings.join_seconds, watchdog.end, [why])
    late.daemon = True
    late.start()
    try:
        _start_jax(settings)
    except Exception as error:  # a half-set environment can raise anything
        raise ConfigError(
            f'{GROUP}.auto: JAX finds no Slurm, Cloud TPU or other cluster in the environment '
            f'({error}): set coordinator, num_processes and process_id.'
        ) from error
    finally:
        late.cancel()
    _group.number, _group.count = jax.process_index(), jax.process_count()
    hosts = allgather(socket.gethostname())
    where = by_first(lambda: watchdog.reachable(hosts))
    return _group.number, _group.count, *broadcast_from_first(where or ('', 0))


# 4. The end


def fail(why: str) -> NoReturn:
    """Ends all processes, this one with ``error: ...``, for a reason that it alone knows."""
    watchdog.end(why, f'process {_group.number} ended: {why}')


def wait_for_the_end() -> NoReturn:
    """Call it where a collective raised: the watchdog most often finds soon that one is gone."""
    error = sys.exc_info()[1]
    time.sleep(2 * _group.silent_seconds)
    watchdog.end(f'a collective broke, and all processes are there ({error}). {watchdog.CONTINUES}')


def leave() -> None:
    """Ends a run that all processes have finished."""
    allgather(None)
    watchdog.stop()
    jax.distributed.shutdown()
