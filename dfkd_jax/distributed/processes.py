"""Several processes as one run: how they find each other, agree, and end together.

Process 0 holds a line (a TCP connection) to each of the others.  Over the lines they meet before
JAX is started, which aborts where a process is missing; agree on what they must do alike
(`broadcast_from_first`, `any_process`); and learn within seconds that one is gone, whose sums the
others would wait for for ever.  Numbers cross in the programs that `sharding` compiles.

Without `join`, or in a run of one process, everything here returns at once.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import jax

from dfkd_jax.errors import ConfigError, HostError

T = TypeVar('T')
CONTINUES = 'What was saved is whole: the same command, given to all processes, continues from it.'


class _Line:
    """A connection over which whole JSON values go, with the time of the last."""

    def __init__(self, connection: socket.socket):
        self.connection, self.writing = connection, threading.Lock()
        self.reader = connection.makefile('rb')
        self.heard = time.monotonic()
        self.values: queue.Queue[Any] = queue.Queue()

    def send(self, **message: Any) -> None:
        with self.writing:
            self.connection.sendall(json.dumps(message).encode() + b'\n')

    def close(self) -> None:
        self.reader.close()
        self.connection.close()

    def receive(self) -> dict[str, Any]:
        """The next message.  Raises OSError where the line is cut."""
        text = self.reader.readline()
        if not text.endswith(b'\n'):
            raise ConnectionError('the line was cut')
        self.heard = time.monotonic()
        message: dict[str, Any] = json.loads(text)
        return message


class _Group:
    """The processes of this run, as this one sees them."""

    number, count = 0, 1
    lines: dict[int, _Line] = {}  # by process: process 0 has all, the others one, to process 0
    silent = 0.0
    leaving = False


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


# 2. Agreement.  All processes make these calls in the same order.


def allgather(value: T) -> list[T]:
    """The values of all processes, in their order, on every process; they are JSON's types."""
    if not several():
        return [value]
    try:
        if not first():
            _group.lines[0].send(value=value)
            return list(_group.lines[0].values.get())
        values = [value, *(_group.lines[i].values.get() for i in range(1, _group.count))]
        for line in _group.lines.values():
            line.send(value=values)
        return values
    except OSError:
        wait_for_the_end()


def broadcast_from_first(value: T) -> T:
    """The value of process 0."""
    return allgather(value)[0]


def any_process(flag: bool) -> bool:
    """Whether a flag is set on any process."""
    return any(allgather(bool(flag)))


def by_first(fn: Callable[[], T]) -> T | None:
    """Runs `fn` on process 0 while the others wait; its result there, None elsewhere.

    What it raises there is a HostError with the same message elsewhere.
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


def check_shared(folder: Path) -> None:
    """Raises HostError on all processes unless all see the folder that process 0 writes."""
    if not several():
        return
    mark = folder / '.shared.tmp'
    token = broadcast_from_first(os.urandom(8).hex())
    by_first(lambda: mark.write_text(token))
    deadline = time.monotonic() + 10  # a network's file system may show a new file late
    seen = False
    while not seen and time.monotonic() < deadline:
        with contextlib.suppress(OSError):
            seen = mark.read_text() == token
        if not seen:
            time.sleep(0.2)
    blind = [number for number, sees in enumerate(allgather(seen)) if not sees]
    if first():
        mark.unlink(missing_ok=True)
    if blind:
        raise HostError(
            f'process {" and ".join(map(str, blind))} does not see {folder}, which process 0 '
            'writes: put --workdir where all hosts see one folder.'
        )


# 3. Beginning


def check(settings: Any) -> None:
    """Raises ConfigError where `config.distributed` is not a group of processes."""
    address, count, number = settings.coordinator, settings.num_processes, settings.process_id
    group = 'config.distributed'
    for field in ('join_seconds', 'silent_seconds'):
        if settings[field] <= 0:
            raise ConfigError(f'{group}.{field}={settings[field]}: expected more than 0.')
    if settings.auto:
        if address or count or number >= 0:
            raise ConfigError(
                f'{group}.auto finds coordinator, num_processes and process_id in the environment: '
                'leave them out, or set auto=False.'
            )
        return
    missing = [
        f'{group}.{field}'
        for field, absent in (
            ('coordinator', not address),
            ('num_processes', not count),
            ('process_id', number == -1),
        )
        if absent
    ]
    if len(missing) == 3:
        return
    if missing:
        raise ConfigError(
            f'{" and ".join(missing)} missing: several processes need coordinator=HOST:PORT, the '
            'same num_processes, and a process_id of their own, from 0 on.'
        )
    host, _, port = address.rpartition(':')
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise ConfigError(
            f'{group}.coordinator={address!r}: expected HOST:PORT, a name or address of process '
            "0's host and a free port there, e.g. 10.0.0.1:9876."
        )
    if count < 1:
        raise ConfigError(f'{group}.num_processes={count}: expected 1 or more.')
    if not 0 <= number < count:
        raise ConfigError(
            f'{group}.process_id={number}: expected 0 to {count - 1}, since num_processes={count}.'
        )


def join(settings: Any) -> None:
    """Makes this process one of those of `config.distributed`, if it names several.

    Before anything of JAX runs.  Prints of other processes than 0 go nowhere from here on.
    Raises ConfigError for settings that do not fit, here or to those of another process, and
    HostError where not all processes come within `join_seconds`.
    """
    check(settings)
    address, count, number = settings.coordinator, settings.num_processes, settings.process_id
    devices = None
    if settings.auto:
        address, count, number, devices = _found(settings.join_seconds)
    if count <= 1:
        return
    host, _, port = address.rpartition(':')
    host = host.strip('[]')
    if number == 0:
        lines = _called(int(port), count, settings)
        # The port that was told is of the lines; JAX's own service takes a free one.
        service = f'127.0.0.1:{free_port()}'
        for line in lines.values():
            line.send(service=service.rpartition(':')[2])
    else:
        line = _call((host, int(port)), number, count, settings)
        lines = {0: line}
        service = f'127.0.0.1:{_relayed(host, int(line.receive()["service"]))}'
        sys.stdout = open(os.devnull, 'w')  # noqa: SIM115, until the process ends
    _group.number, _group.count, _group.lines = number, count, lines
    _group.silent = settings.silent_seconds
    for other, line in lines.items():
        line.connection.settimeout(None)
        threading.Thread(target=_listen, args=(other, line), daemon=True).start()
    threading.Thread(target=_watch, daemon=True).start()
    _start_jax(service, count, number, devices, settings)
    # All are there, or JAX would not have returned.
    print(f'{count} processes, {jax.device_count()} devices', flush=True)


def _start_jax(service: str, count: int, number: int, devices: Any, settings: Any) -> None:
    # The lines tell who is gone, in words; JAX alone would abort with a stack trace, or stay
    # quiet.  And it would take SIGTERM for itself.
    jax.config.update('jax_enable_recoverability', True)
    jax.config.update('jax_enable_preemption_service', False)
    jax.config.update('jax_cpu_collectives_implementation', 'gloo')  # of CPUs alone
    jax.distributed.initialize(
        service,
        count,
        number,
        local_device_ids=devices,
        cluster_detection_method='deactivate',
        initialization_timeout=round(settings.join_seconds) + 1,
        heartbeat_timeout_seconds=max(round(10 * settings.silent_seconds), 100),
    )


def _found(seconds: float) -> tuple[str, int, int, Any]:
    """Coordinator, number of processes, number of this one and its devices, as JAX finds them."""
    # The detection that jax.distributed.initialize does, whose results it does not hand out.
    from jax._src import clusters

    try:
        found = clusters.ClusterEnv.auto_detect_unset_distributed_params(
            None, None, None, None, None, round(seconds)
        )
    except Exception as error:  # whatever a half set environment provokes
        raise ConfigError(
            f'config.distributed.auto: the environment is no cluster ({error}).'
        ) from error
    address, count, number, devices = found
    if address is None or count is None or number is None:
        raise ConfigError(
            'config.distributed.auto: no Slurm, Cloud TPU or other cluster that JAX knows is found '
            'in the environment: set coordinator, num_processes and process_id.'
        )
    return address, count, number, devices


def _called(port: int, count: int, settings: Any) -> dict[int, _Line]:
    """Process 0 waits until all others have called."""
    lines: dict[int, _Line] = {}
    deadline = time.monotonic() + settings.join_seconds
    try:
        server = socket.create_server(('', port), backlog=count)
    except OSError as error:
        raise ConfigError(
            f'process 0 cannot listen on port {port} ({error.strerror}): choose a free one for '
            'config.distributed.coordinator.'
        ) from error
    with server:
        while len(lines) < count - 1:
            try:
                server.settimeout(max(deadline - time.monotonic(), 0.01))
                connection, _ = server.accept()
            except TimeoutError:
                absent = ' and '.join(str(i) for i in range(1, count) if i not in lines)
                _refuse(
                    lines,
                    f'process {absent} of {count} did not come within {settings.join_seconds:g} '
                    'seconds (config.distributed.join_seconds): start all with the same '
                    'coordinator and num_processes.',
                )
            line = _Line(connection)
            try:
                connection.settimeout(5)
                call = line.receive()
                number, number_of = int(call['process']), int(call['of'])
            except (OSError, ValueError, KeyError, TypeError):
                line.close()  # a stranger
                continue
            if number_of != count or number in lines or not 0 < number < count:
                what = (
                    f'process {number} says that there are {number_of} processes, process 0 {count}'
                    if number_of != count
                    else f'two processes have config.distributed.process_id={number}'
                )
                _refuse({**lines, -1: line}, f'{what}: they need the same num_processes and a '
                        'process_id each.')  # fmt: skip
            lines[number] = line
    return lines


def _refuse(lines: dict[int, _Line], why: str) -> NoReturn:
    """Tells all that have called that the run does not begin."""
    for line in lines.values():
        with contextlib.suppress(OSError):
            line.send(refused=why)
        line.close()
    raise HostError(why)


def _call(address: tuple[str, int], number: int, count: int, settings: Any) -> _Line:
    """Another process calls process 0, and waits until all have."""
    where = f'{address[0]}:{address[1]}'
    deadline = time.monotonic() + settings.join_seconds
    while True:
        try:
            left = max(deadline - time.monotonic(), 0.01)
            line = _Line(socket.create_connection(address, timeout=left))
            line.connection.settimeout(left + 5)  # process 0 ends the waiting
            line.send(process=number, of=count)
            reply = line.reader.peek(1)
            if not reply:
                line.close()
                raise ConnectionError('it hung up')
            if reply.startswith(b'{"refused'):
                why = str(line.receive()['refused'])
                line.close()
                raise HostError(why)
            return line
        except OSError as error:
            if time.monotonic() >= deadline:
                raise HostError(
                    f'process {number} waited {settings.join_seconds:g} seconds for process 0 at '
                    f'{where} ({error.strerror or error or "no answer"}): start it, or set '
                    'config.distributed.coordinator to where it is.'
                ) from error
            time.sleep(0.1)


def free_port() -> int:
    """A port of this host that nobody listens on."""
    with socket.create_server(('', 0)) as server:
        port: int = server.getsockname()[1]
        return port


def _relayed(host: str, port: int) -> int:
    """A port of this host that leads to one of process 0's, and stays open when that is gone.

    JAX's client, which talks to its service through it, aborts the process with a stack trace the
    moment the connection ends; here the line tells that process 0 is gone.
    """
    server = socket.create_server(('127.0.0.1', 0))

    def pump(source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                sink.sendall(data)
        if _group.leaving:
            with contextlib.suppress(OSError):
                sink.shutdown(socket.SHUT_WR)

    def serve() -> None:
        while True:
            near, _ = server.accept()
            with contextlib.suppress(OSError):
                far = socket.create_connection((host, port))
                for ends in ((near, far), (far, near)):
                    threading.Thread(target=pump, args=ends, daemon=True).start()

    threading.Thread(target=serve, daemon=True).start()
    bound: int = server.getsockname()[1]
    return bound


# 4. The end


def _listen(other: int, line: _Line) -> None:
    """What comes over a line, until it is cut."""
    try:
        while True:
            message = line.receive()
            if 'value' in message:
                line.values.put(message['value'])
            elif 'ended' in message:
                _end(message['ended'])
    except (OSError, ValueError):
        if not _group.leaving:
            _end(f'process {other} of {_group.count} is gone. {CONTINUES}')
        line.values.put([])  # for who waits in `leave`


def _watch() -> None:
    """Says that this process lives, and ends it when another has long said nothing."""
    while not _group.leaving:
        time.sleep(min(1.0, _group.silent / 4))
        for other, line in _group.lines.items():
            with contextlib.suppress(OSError):  # the listener knows
                line.send(alive=True)
            if time.monotonic() - line.heard > _group.silent and not _group.leaving:
                _end(
                    f'process {other} of {_group.count} has said nothing for {_group.silent:g} '
                    f'seconds (config.distributed.silent_seconds). {CONTINUES}'
                )


def _end(why: str, status: int = 1) -> NoReturn:
    """Ends this process from any of its threads, wherever the others are, and tells the others."""
    if not _ending.acquire(blocking=False):
        time.sleep(60)  # another thread is ending the process
    for line in _group.lines.values():
        with contextlib.suppress(OSError):
            line.send(ended=why)
    sys.stderr.write(f'\nerror: {name()}: {why}\n')
    sys.stderr.flush()
    if first():
        time.sleep(0.2)  # the word before the cut
    os._exit(status)


_ending = threading.Lock()


def fail(why: str) -> NoReturn:
    """Ends all processes, this one with ``error: ...``: what it ran into, it ran into alone."""
    for line in _group.lines.values():
        with contextlib.suppress(OSError):
            line.send(ended=f'process {_group.number} ended: {why}')
    _group.lines = {}
    _end(why)


def wait_for_the_end() -> NoReturn:
    """For a sum that broke: the line will have told why, or soon does."""
    time.sleep(2 * _group.silent)
    _end(f'a sum over the devices broke, and all processes are there. {CONTINUES}')


def leave() -> None:
    """The end of a run that all processes have come to."""
    if several():
        _group.leaving = True
        allgather(None)
        if not first():
            jax.distributed.shutdown()
        allgather(None)  # process 0, whose service the others' clients need, after them
        if first():
            jax.distributed.shutdown()
