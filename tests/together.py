"""Several processes as one run, on virtual devices of this machine."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from dfkd_jax.distributed.watchdog import free_port

ROOT = Path(__file__).resolve().parents[1]
TIMEOUT = 300.0  # seconds


class Group:
    """Processes that were started as one run."""

    def __init__(self, processes: list[subprocess.Popen], logs: list[Path]):
        self.processes, self.logs = processes, logs

    def wait(self) -> list[int]:
        """The statuses of all at their end."""
        deadline = time.monotonic() + TIMEOUT
        try:
            return [each.wait(max(deadline - time.monotonic(), 0.1)) for each in self.processes]
        except subprocess.TimeoutExpired:
            raise AssertionError(f'it hangs:\n{self.said()}') from None

    def until(self, reached: Callable[[], bool]) -> None:
        """Waits until a run got somewhere; none of it may have ended before."""
        deadline = time.monotonic() + TIMEOUT
        while not reached():
            assert all(each.poll() is None for each in self.processes), self.said()
            assert time.monotonic() < deadline, self.said()
            time.sleep(0.005)

    def said(self, number: int | None = None) -> str:
        """What one of them printed, or all."""
        logs = self.logs if number is None else [self.logs[number]]
        return '\n'.join(log.read_text(errors='replace') for log in logs)


def slurm(number: int, count: int, port: int) -> dict[str, str]:
    """The environment of a task of Slurm on this host."""
    return {
        'SLURM_JOB_ID': '1', 'SLURM_STEP_NODELIST': 'localhost', 'JAX_COORDINATOR_PORT': str(port),
        'SLURM_NTASKS': str(count), 'SLURM_PROCID': str(number), 'SLURM_LOCALID': str(number),
    }  # fmt: skip


@contextlib.contextmanager
def together(
    arguments: list[str],
    workdir: Path,
    processes: int = 1,
    devices: int = 2,
    each: list[list[str]] | None = None,
    seconds: float = 60.0,
    module: str = 'dfkd_jax.main',
    cluster: bool = False,
) -> Iterator[Group]:
    """Starts a run as so many processes of so many devices, which do not outlive the block.

    each: further arguments of every process.  seconds: `join_seconds`; `silent_seconds` is 10.
    cluster: as Slurm would start them, which find one another in the environment.
    """
    environment = os.environ | {
        'JAX_PLATFORMS': 'cpu', 'JAX_NUM_CPU_DEVICES': str(devices),
        'JAX_DISABLE_MOST_OPTIMIZATIONS': 'True', 'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
    }  # fmt: skip
    port, started, logs = free_port('127.0.0.1'), [], []
    try:
        for number in range(processes):
            mine = [*arguments, f'--workdir={workdir}', *(each[number] if each else [])]
            if processes > 1:
                group = {
                    'coordinator': f'127.0.0.1:{port}', 'num_processes': processes,
                    'process_id': number,
                }  # fmt: skip
                if cluster:
                    group = {'auto': True}
                    environment |= slurm(number, processes, port)
                group |= {'join_seconds': seconds, 'silent_seconds': 10.0}
                # Before the others, which may say otherwise.
                mine = [f'--config.distributed.{k}={v}' for k, v in group.items()] + mine
                mine.sort(key=lambda argument: argument.startswith('--config.'))
            log = workdir.with_name(f'{workdir.name}-{number}-{time.monotonic_ns()}.log')
            logs.append(log)
            with open(log, 'wb') as file:
                command = [sys.executable, '-m', module, *mine]
                started.append(
                    subprocess.Popen(
                        command, stdout=file, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
                        cwd=ROOT, env=environment,
                    )
                )  # fmt: skip
        yield Group(started, logs)
    finally:
        for running in started:
            running.kill()
        for running in started:
            running.wait()
