"""Tells which process of a run is missing, gone or hanging, and ends the others.

A collective waits for such a process without end.  JAX notices it late, and aborts with a stack
trace.  Here process 0 holds a TCP connection, a line, to each other process.  Messages are lines of
text: an empty one says that the sender is alive, any other says why the sender ended.
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import threading
import time
from typing import NoReturn

from dfkd_jax.errors import ConfigError, HostError

GROUP = 'config.distributed'
CONTINUES = 'What was saved is whole: the same command, given to all processes, continues from it.'


class _Watch:
    """What this process watches."""

    number, count = 0, 1
    lines: dict[int, socket.socket] = {}  # process 0 has one to each, the others one to process 0
    silent_seconds = 0.0
    keeper: subprocess.Popen[bytes] | None = None
    over = False


_watch, _ending = _Watch(), threading.Lock()


# 1. All come together


def accept(host: str, port: int, count: int, seconds: float) -> int:
    """On process 0: waits for the others and tells them a free port of its host.  Returns it.

    Raises ConfigError if it cannot listen, and HostError, here and where `call` waits, if not all
    come within `seconds` or two contradict each other.
    """
    try:
        free, server = free_port(host), _listening(host, port)
    except OSError as error:
        raise ConfigError(
            f'process 0 cannot listen on port {port} of {host} ({error.strerror}): expected '
            f'{GROUP}.coordinator to be an address of its host and a free port.'
        ) from error
    lines: dict[int, socket.socket] = {}
    why, deadline = '', time.monotonic() + seconds
    while len(lines) < count - 1 and not why:
        server.settimeout(max(deadline - time.monotonic(), 0.01))
        try:
            line, _ = server.accept()
        except TimeoutError:
            absent = ' and '.join(str(i) for i in range(1, count) if i not in lines)
            why = (
                f'process {absent} of {count} did not come within {seconds:g} seconds '
                f'({GROUP}.join_seconds) to {server.getsockname()[0]}'
            )
            break
        try:
            number, of = map(int, _read(line, 5).split())
        except (OSError, ValueError):
            line.close()  # a stranger
            continue
        if of != count:
            why = f'process {number} says that there are {of} processes, process 0 {count}'
        elif number in lines:
            why = f'two processes have {GROUP}.process_id={number}'
        lines[-1 if why else number] = line
    server.close()
    if why:
        why += ': all need the same coordinator and num_processes, and a process_id each.'
    for line in lines.values():
        _write(line, why or str(free))
        if why:
            line.close()
    if why:
        raise HostError(why)
    _watch.lines = lines
    return free


def call(host: str, port: int, number: int, count: int, seconds: float) -> int:
    """On another process: calls process 0 and waits for the others.  Returns the port it tells.

    Raises HostError if process 0 does not answer within `seconds`, or says what is wrong.
    """
    deadline = time.monotonic() + seconds
    while True:
        try:
            line = socket.create_connection((host, port), timeout=seconds)
            break
        except OSError as error:
            if time.monotonic() >= deadline:
                raise HostError(
                    f'process {number} waited {seconds:g} seconds for process 0 at {host}:{port} '
                    f'({error.strerror or error}): start it, or set {GROUP}.coordinator to where '
                    'it is.'
                ) from error
            time.sleep(0.1)
    _write(line, f'{number} {count}')
    try:
        answer = _read(line, seconds + 5)  # process 0 ends the waiting
    except OSError as error:
        answer = f'process 0 at {host}:{port} does not answer ({error}).'
    if not answer.isdecimal():
        line.close()
        raise HostError(answer)
    _watch.lines = {0: line}
    return int(answer)


def reachable(hosts: list[str]) -> tuple[str, int]:
    """On the first of these hosts: its address for the others, and a free port.

    Raises HostError if it cannot find the others.
    """
    address = '127.0.0.1'
    for other in set(hosts) - {hosts[0]}:
        try:
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as way:
                way.connect((other, 9))  # sends nothing, but chooses an interface
                address = way.getsockname()[0]
        except OSError as error:
            raise HostError(
                f'process 0 does not find the host {other} ({error.strerror}): set coordinator, '
                f'num_processes and process_id instead of {GROUP}.auto.'
            ) from error
    return address, free_port(address)


def free_port(host: str) -> int:
    """A port of this host on which nobody listens."""
    with _listening(host, 0) as server:
        port: int = server.getsockname()[1]
        return port


def _listening(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ':' in host else socket.AF_INET
    return socket.create_server((host, port), family=family)


# 2. They watch each other


def start(number: int, count: int, silent_seconds: float) -> None:
    """From now on this process ends if another is gone or says nothing for so long."""
    _watch.number, _watch.count, _watch.silent_seconds = number, count, silent_seconds
    for other, line in _watch.lines.items():
        threading.Thread(target=_listen, args=(other, line), daemon=True).start()
    threading.Thread(target=_say_alive, daemon=True).start()


def stop() -> None:
    """From now on the others may end."""
    _watch.over = True
    if _watch.keeper:
        _watch.keeper.kill()
        _watch.keeper.communicate()


def end(why: str, others: str = '') -> NoReturn:
    """Ends this process, from any of its threads, with ``error: why``, and tells the others.

    others: what the others are told, if it is not the same.
    """
    if not _ending.acquire(blocking=False):
        time.sleep(60)  # another thread is ending the process
    for line in _watch.lines.values():
        _write(line, others or why)
    who = f'process {_watch.number} of {_watch.count}: ' if _watch.lines else ''
    sys.stderr.write(f'\nerror: {who}{why}\n')
    sys.stderr.flush()
    os._exit(1)


def outlive() -> None:
    """On process 0: keeps JAX's connections open until some seconds after its end.

    JAX aborts a process with a stack trace at the moment when its connection to the coordination
    service in process 0 breaks.  A child process shares these connections, but not the lines.  So
    the lines break first, and `_listen` tells what happened.
    """
    lines, shared = {line.fileno() for line in _watch.lines.values()}, []
    for number in set(map(int, os.listdir('/dev/fd'))) - {0, 1, 2} - lines:
        with contextlib.suppress(OSError), socket.fromfd(number, socket.AF_INET, 0) as file:
            if not file.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                shared.append(number)
    _watch.keeper = subprocess.Popen(
        [sys.executable, '-ISc', 'import sys, time; sys.stdin.read(); time.sleep(5)'],
        stdin=subprocess.PIPE,  # closes when this process ends
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        pass_fds=shared,
        start_new_session=True,  # not for Ctrl-C
    )


def _listen(other: int, line: socket.socket) -> None:
    why = ''
    try:
        while not why:
            why = _read(line, _watch.silent_seconds)
    except TimeoutError:
        why = (
            f'process {other} of {_watch.count} has said nothing for {_watch.silent_seconds:g} '
            f'seconds ({GROUP}.silent_seconds). {CONTINUES}'
        )
    except OSError:
        why = f'process {other} of {_watch.count} is gone. {CONTINUES}'
    if not _watch.over:
        end(why)


def _say_alive() -> None:
    while not _watch.over:
        for line in _watch.lines.values():
            _write(line, '')
        time.sleep(min(1.0, _watch.silent_seconds / 4))


def _read(line: socket.socket, seconds: float) -> str:
    line.settimeout(seconds)
    with line.makefile('rb', buffering=0) as file:
        text = file.readline(10_000)
    if not text.endswith(b'\n'):
        raise ConnectionError('it hung up')
    return text.decode(errors='replace').strip()


def _write(line: socket.socket, text: str) -> None:
    with contextlib.suppress(OSError):  # reading tells that the line is cut
        line.sendall(' '.join(text.split()).encode() + b'\n')
