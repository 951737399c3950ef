"""Runs as processes of their own, to be killed and started again."""

from __future__ import annotations

import contextlib
import json
import os
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax

from dfkd_jax.reporting import metrics

ROOT = Path(__file__).resolve().parents[1]
TIMEOUT = 400.0  # seconds; a run takes a twentieth of it where nothing else does

# What makes a run on the digits take seconds, of any method; of those with rounds; of a bank.
SMALL = [
    '--config.data.image_size=4', '--config.teacher.model=resnet8_half',
    '--config.teach.batch_size=128', '--config.log_every_rounds=2',
]  # fmt: skip
ROUNDS = [
    '--config.generator.width=4', '--config.synthesis.batch_size=8',
    '--config.synthesis.student_batch_size=8',
]  # fmt: skip
BATCHES = [
    '--config.synthesis.stored_size=4', '--config.synthesis.batch_size=2',
    '--config.distil.batch_size=8',
]  # fmt: skip


@contextlib.contextmanager
def process(arguments: list[str], workdir: Path) -> Iterator[subprocess.Popen]:
    """A run of the main job in this workdir, which never outlives the block."""
    names = ('jax_disable_most_optimizations', 'jax_persistent_cache_min_compile_time_secs')
    fast = {name.upper(): str(jax.config.values[name]) for name in names}
    environment = os.environ | {'JAX_PLATFORMS': 'cpu'} | fast
    with open(workdir.with_suffix('.log'), 'ab') as log:
        running = subprocess.Popen(
            [sys.executable, '-m', 'dfkd_jax.main', *arguments, f'--workdir={workdir}'],
            stdout=log,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
            env=environment,
        )
    try:
        yield running
    finally:
        running.kill()
        running.wait()


def output(workdir: Path) -> str:
    """What all processes of a workdir printed."""
    return workdir.with_suffix('.log').read_text(errors='replace')


def to_the_end(arguments: list[str], workdir: Path) -> None:
    """Runs, or continues, until it is done."""
    with process(arguments, workdir) as running:
        assert running.wait(TIMEOUT) == 0, output(workdir)


def wait_for(reached: Callable[[], bool], running: subprocess.Popen, workdir: Path) -> None:
    """Waits until a run got somewhere; it must not have ended before."""
    deadline = time.monotonic() + TIMEOUT
    while not reached():
        assert running.poll() is None, output(workdir)
        assert time.monotonic() < deadline, output(workdir)
        time.sleep(0.005)


def at_row(folder: Path, number: int) -> Callable[[], bool]:
    """Whether ``metrics.csv`` holds a row of this round, or a later one."""

    def reached() -> bool:
        with contextlib.suppress(FileNotFoundError):
            rounds = re.findall(r'^(\d+),.*\n', (folder / metrics.FILE).read_text(), re.MULTILINE)
            return any(int(found) >= number for found in rounds)
        return False

    return reached


def killed_at(
    arguments: list[str], workdir: Path, moments: list[tuple[Callable[[], bool], float]]
) -> None:
    """Starts the run again and again, each time killed so many seconds after a moment."""
    for reached, delay in moments:
        with process(arguments, workdir) as running:
            wait_for(reached, running, workdir)
            time.sleep(delay)
            assert running.poll() is None, 'it ended before it could be killed'
            running.send_signal(signal.SIGKILL)
            assert running.wait(TIMEOUT) == -signal.SIGKILL


# Forked, to be hurt at a given moment


class Forked:
    """A run that the launcher forked; with marks, it waits before each phase until it may go on."""

    def __init__(self, server: subprocess.Popen, pipes: list[Path], request: dict[str, Any]):
        self.log, self.told, self.asked = Path(request['log']), -1, -1
        self.start = self.log.stat().st_size if self.log.exists() else 0
        if pipes:
            self.told, self.asked = (os.open(path, os.O_RDWR | os.O_NONBLOCK) for path in pipes)
        assert server.stdin is not None and server.stdout is not None
        server.stdin.write(json.dumps(request).encode() + b'\n')
        self.answers, self.status = server.stdout, None
        self.pid = int(self.answers.readline())

    def next(self, seconds: float = TIMEOUT) -> str | None:
        """The phase it is about to enter; '' if it reaches none in time, None if it has ended."""
        if self.status is not None:
            return None
        pipes = [self.answers.fileno(), *([self.told] if self.told >= 0 else [])]
        ready, _, _ = select.select(pipes, [], [], seconds)
        if self.told in ready:
            return os.read(self.told, 100).decode().strip()
        if ready:
            self.status = int(self.answers.readline())
            for pipe in {self.told, self.asked} - {-1}:
                os.close(pipe)
            return None
        return ''

    def go(self) -> None:
        """Lets it enter the phase."""
        os.write(self.asked, b'.')

    def wait(self, seconds: float = TIMEOUT) -> int | None:
        """Lets it run through all phases; returns its status, None if it has not ended in time."""
        deadline = time.monotonic() + seconds
        while (phase := self.next(max(deadline - time.monotonic(), 0))) is not None:
            if not phase:
                return None
            self.go()
        return self.status

    def reach(self, phase: str, number: int) -> bool:
        """Runs to the so many-th entry of a phase, and holds it there; False if it ended before."""
        while (now := self.next()) is not None:
            assert now, 'it hangs: ' + self.said()
            number -= now == phase
            if not number:
                return True
            self.go()
        return False

    def strike(self, delay: float, how: signal.Signals) -> int | None:
        """Lets it go, sends the signal so many seconds later; returns the status at its end."""
        self.go()
        if self.wait(delay) is None:
            os.kill(self.pid, how)
        status = self.wait()
        assert status is not None, 'it hangs: ' + self.said()
        return status

    def said(self) -> str:
        """What it printed."""
        with open(self.log, 'rb') as file:
            file.seek(self.start)
            return file.read().decode(errors='replace')


@contextlib.contextmanager
def launcher(folder: Path) -> Iterator[Callable[..., Forked]]:
    """A function that starts runs within tenths of a second, one at a time.

    ``start(module, arguments, log, marks=False, jax={}, **plant)``; see `launcher.py` for the last.
    """
    pipes = [folder / 'told', folder / 'asked']
    for path in pipes:
        os.mkfifo(path)
    environment = os.environ | {'JAX_PLATFORMS': 'cpu', 'PYTHONPATH': str(ROOT)}
    server = subprocess.Popen(
        [sys.executable, str(ROOT / 'tests' / 'launcher.py')],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0, cwd=ROOT, env=environment,
    )  # fmt: skip
    forked: list[Forked] = []

    def start(
        module: str,
        arguments: list[str],
        log: Path,
        marks: bool = False,
        options: dict[str, Any] | None = None,
        **plant: Any,
    ) -> Forked:
        assert all(run.status is not None for run in forked), 'one at a time'
        fast = {
            'jax_disable_most_optimizations': True,
            'jax_persistent_cache_min_compile_time_secs': 0.0,
        }
        request = {
            'module': module, 'argv': arguments, 'log': str(log), 'jax': fast | (options or {}),
            'marks': list(map(str, pipes)) if marks else [], 'plant': plant,
        }  # fmt: skip
        forked.append(Forked(server, pipes if marks else [], request))
        return forked[-1]

    try:
        yield start
    finally:
        for run in forked:
            if run.status is None:
                os.kill(run.pid, signal.SIGKILL)
        server.kill()
        server.wait()
        server.stdin.close()
        server.stdout.close()
