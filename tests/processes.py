"""Runs as processes of their own, to be killed and started again."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax

from dfkd_jax import metrics

ROOT = Path(__file__).resolve().parents[1]
TIMEOUT = 400.0  # seconds; a run takes a twentieth of it where nothing else does


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
