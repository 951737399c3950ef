"""Several processes are one run: in numbers, in what they write, and in how they end."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny
from ml_collections import ConfigDict
from processes import BATCHES, ROUNDS, SMALL, at_row
from together import ROOT, slurm, together

from dfkd_jax import build
from dfkd_jax.configs import common, digits
from dfkd_jax.distributed import processes
from dfkd_jax.distributed.watchdog import free_port
from dfkd_jax.errors import ConfigError, HostError
from dfkd_jax.reporting import metrics
from dfkd_jax.storage import files, model_folder
from dfkd_jax.storage import workdir as folder

pytestmark = pytest.mark.usefixtures('fast_runs')
LENGTH = 24
RUN = [
    '--config=configs/digits.py:noise,smoke', '--config.data.image_size=32',
    '--config.teacher.model=lenet5', '--config.student.model=lenet5_half',
    '--config.synthesis.batch_size=16', '--config.synthesis.student_batch_size=16',
    f'--config.phases[0].rounds={LENGTH}', '--config.phases[0].s_steps=2',
    '--config.log_every_rounds=2', '--config.eval_every_rounds=12',
    '--config.save_every_rounds=4',
]  # fmt: skip


@pytest.fixture(scope='module')
def arguments(tmp_path_factory) -> list[str]:
    """Of a run of seconds, whose teacher has never learnt anything."""
    config = digits.get_config('noise,smoke')
    config.data.image_size, config.teacher.model = 32, 'lenet5'
    module = build.make_classifier('lenet5', config.data, config.dtype)
    variables = jax.jit(module.init)(jax.random.key(0), np.zeros((1, 32, 32, 1), np.float32))
    place = tmp_path_factory.mktemp('teacher')
    model_folder.save_classifier(place, 'lenet5', variables, config.data)
    return [*RUN, f'--config.teacher.checkpoint={place}']


@pytest.fixture(scope='module')
def ended(arguments: list[str], tmp_path_factory) -> Callable[..., Path]:
    """The folder of a run that nothing disturbed, of so many processes of so many devices."""
    made: dict[tuple[int, int, str, int], Path] = {}

    def run(processes: int, devices: int, mode: str = 'shard_map', length: int = LENGTH) -> Path:
        if (processes, devices, mode, length) not in made:
            workdir = tmp_path_factory.mktemp('whole') / f'{processes}x{devices}'
            given = [*arguments, f'--config.parallel={mode}', f'--config.phases[0].rounds={length}']
            with together(given, workdir, processes, devices) as group:
                assert group.wait() == [0] * processes, group.said()
                if processes > 1:
                    assert f'{processes} processes, {processes * devices} devices' in group.said(0)
                    assert 'workdir' in group.said(0) and 'workdir' not in group.said(1)
            made[processes, devices, mode, length] = workdir
        return made[processes, devices, mode, length]

    return run


def student(workdir: Path) -> dict[str, np.ndarray]:
    return files.load_arrays(workdir / 'student.safetensors')


def assert_equal(workdir: Path, other: Path, tolerance: float = 0.0) -> None:
    """In weights and in every measured number, relative to each one's size."""
    tiny.close(student(workdir), student(other), tolerance)
    rows, wanted = metrics.read(workdir), metrics.read(other)
    for name in wanted.keys() - {'seconds'}:
        # A divergence of 1e-4 is what is left of logits of size one.
        loose = dict(rtol=100 * tolerance, atol=tolerance)
        np.testing.assert_allclose(rows[name], wanted[name], **loose, err_msg=name)


@pytest.mark.parametrize('mode', tiny.quick(['shard_map', 'pmap'], 'shard_map'))
def test_two_processes_of_two_devices_compute_what_one_of_four_does(ended, mode: str) -> None:
    assert_equal(ended(2, 2, mode, length=12), ended(1, 4, length=12), 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize('name', ['kd', 'diffdfkd', 'cpsc', 'nayer'])
def test_whatever_is_run_is_one_run(name: str, tmp_path: Path) -> None:
    """With its teacher, which the processes train together: two of one device as one of two."""
    given = [f'--config=configs/digits.py:{name},smoke', *SMALL, '--config.teach.epochs=2']
    if name == 'diffdfkd':
        fields = ('synthesis.per_class=4', 'distil.epochs=2', 'distil.lr=0.01')
        given += [*BATCHES, *(f'--config.{field}' for field in fields)]
        given.append(f'--config.prior.path={tiny.saved_prior(tmp_path / "prior")}')
    elif name != 'kd':
        given += [*ROUNDS, '--config.phases[0].rounds=3']
    if name == 'nayer':
        given.append('--config.synthesis.bank=16')
    for count in (1, 2):
        workdir = tmp_path / str(count)
        with together(given, workdir, count, 2 // count) as group:
            assert group.wait() == [0] * count, group.said()
    # A sum of two is the same whoever adds it.
    tiny.close(student(tmp_path / '2'), student(tmp_path / '1'), 1e-5)


@pytest.mark.slow
def test_a_process_that_hangs_ends_the_others(arguments: list[str], tmp_path: Path) -> None:
    workdir = tmp_path / 'run'
    with together(arguments, workdir, 2) as group:
        group.until(at_row(workdir, 4))
        group.processes[1].send_signal(signal.SIGSTOP)
        assert group.processes[0].wait(120) == 1, group.said()
    assert 'error: process 0 of 2: process 1 of 2 has said nothing for 10 seconds' in group.said(0)
    assert 'the same command' in group.said(0) and 'Traceback' not in group.said(0)


@pytest.mark.parametrize('victim', [0, 1])
@pytest.mark.slow
def test_a_process_that_is_killed_ends_the_others_and_nothing_is_lost(
    arguments: list[str], ended, tmp_path: Path, victim: int
) -> None:
    workdir, other = tmp_path / 'run', 1 - victim
    with together(arguments, workdir, 2) as group:
        group.until(at_row(workdir, 6))
        group.processes[victim].kill()
        assert group.wait()[other] == 1, group.said()
        said = group.said(other)
        assert said.count('error:') == 1 and 'Traceback' not in said and '    @ ' not in said
        assert f'error: process {other} of 2: process {victim} of 2 is gone. What was' in said
        assert 'the same command' in said
    with together(arguments, workdir, 2) as group:
        assert group.wait() == [0, 0], group.said()
        assert 'continuing after round' in group.said(0)
    assert_equal(workdir, ended(2, 2))


@pytest.mark.slow
def test_processes_that_slurm_starts_are_one_run_and_end_together(
    arguments: list[str], tmp_path: Path
) -> None:
    workdir = tmp_path / 'run'
    with together(arguments, workdir, 2, cluster=True) as group:
        group.until(at_row(workdir, 2))
        assert '2 processes, 4 devices' in group.said(0)
        group.processes[0].kill()
        assert group.wait()[1] == 1, group.said()
    assert 'error: process 1 of 2: process 0 of 2 is gone. What was' in group.said(1)
    assert '    @ ' not in group.said(1)


@pytest.mark.slow
def test_a_word_to_one_process_stops_all_and_any_number_of_devices_continues(
    arguments: list[str], ended, tmp_path: Path
) -> None:
    workdir = tmp_path / 'run'
    with together(arguments, workdir, 2) as group:
        group.until(at_row(workdir, 4))
        group.processes[1].send_signal(signal.SIGTERM)
        assert group.wait() == [0, 0], group.said()
        assert 'stopped and saved after round' in group.said(0)
    for devices in (1, 2, 8):
        copy = tmp_path / f'on{devices}'
        subprocess.run(['cp', '-r', workdir, copy], check=True)
        with together(arguments, copy, 1, devices) as group:
            assert group.wait() == [0], group.said()
            assert 'continuing after round' in group.said()
        assert_equal(copy, ended(2, 2), 1e-5)


@pytest.mark.slow
def test_a_workdir_in_use_ends_all_processes_with_the_reason(
    arguments: list[str], tmp_path: Path
) -> None:
    workdir = tmp_path / 'run'
    config = digits.get_config('noise,smoke')
    with folder.claim(workdir, config), together(arguments, workdir, 2) as group:
        assert group.wait() == [1, 1], group.said()
        for number in range(2):
            assert f'another process is running in {workdir}' in group.said(number)
            assert 'Traceback' not in group.said(number)


@pytest.mark.parametrize(
    ('fields', 'message'),
    [
        (dict(coordinator='a:1'), 'num_processes and config.distributed.process_id missing'),
        (dict(num_processes=2, process_id=0), r'config\.distributed\.coordinator missing'),
        (dict(coordinator='a', num_processes=2, process_id=0), "coordinator='a': expected HOST:P"),
        (dict(coordinator='a:0', num_processes=2, process_id=0), 'expected HOST:PORT'),
        (dict(coordinator='a:99999', num_processes=2, process_id=0), 'expected HOST:PORT'),
        (dict(coordinator='a:1', num_processes=2, process_id=2), 'process_id=2: expected 0 to 1'),
        (dict(coordinator='a:1', num_processes=-1, process_id=0), 'num_processes=-1: expected 1'),
        (dict(auto=True, num_processes=2), 'auto finds coordinator'),
        (dict(auto=True), 'auto: .*environment'),
        (dict(silent_seconds=0.0), 'silent_seconds=0.0: expected more'),
    ],
)
def test_mistakes_are_told_before_anything_starts(fields: dict, message: str) -> None:
    settings = common.distributed()
    settings.update(fields)
    with pytest.raises(ConfigError, match=message):
        processes.join(settings)
    assert not processes.several()


def group_of(count: int, number: int, port: int, seconds: float = 0.3) -> ConfigDict:
    settings = common.distributed()
    settings.update(
        coordinator=f'127.0.0.1:{port}', num_processes=count, process_id=number,
        join_seconds=seconds,
    )  # fmt: skip
    return settings


def test_who_does_not_come_is_named() -> None:
    with pytest.raises(HostError, match='process 1 and 2 of 3 did not come within 0.3 sec'):
        processes.join(group_of(3, 0, free_port('127.0.0.1')))
    port = free_port('127.0.0.1')
    with pytest.raises(HostError, match=f'process 1 waited 0.3 .* at 127.0.0.1:{port}'):
        processes.join(group_of(3, 1, port))
    assert not processes.several()


def test_a_port_in_use_is_told() -> None:
    with socket.create_server(('127.0.0.1', 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f'cannot listen on port {port} of 127.0.0.1'):
            processes.join(group_of(2, 0, port))


@pytest.mark.parametrize(
    ('count', 'others', 'message'),
    [
        (2, [(1, 3)], 'process 1 says that there are 3 processes, process 0 2: all need'),
        (3, [(1, 3), (1, 3)], r'two processes have config\.distributed\.process_id=1: all need'),
    ],
)
def test_processes_that_contradict_each_other_are_told(
    count: int, others: list[tuple[int, int]], message: str
) -> None:
    port, told = free_port('127.0.0.1'), []

    def call(number: int, of: int) -> None:
        with pytest.raises(HostError, match=message):
            processes.join(group_of(of, number, port, 20))
        told.append(number)

    threads = [threading.Thread(target=call, args=other) for other in others]
    for thread in threads:
        thread.start()
    with pytest.raises(HostError, match=message):
        processes.join(group_of(count, 0, port, 20))
    for thread in threads:
        thread.join()
    assert told == [number for number, _ in others]


def python(code: str, *environments: dict[str, str]) -> list[tuple[int, str, str]]:
    """What processes of this code return, print and complain of."""
    started = [
        subprocess.Popen(
            [sys.executable, '-c', code], env=os.environ | environment, cwd=ROOT, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for environment in environments
    ]  # fmt: skip
    said = [each.communicate(timeout=120) for each in started]
    return [(each.returncode, *texts) for each, texts in zip(started, said, strict=True)]


def test_values_of_any_length_cross() -> None:
    code = """if True:
        from configs import common
        from dfkd_jax.distributed import processes
        from dfkd_jax.errors import HostError
        settings = common.distributed()
        settings.update(dict(auto=True, join_seconds=60.0))
        processes.join(settings)
        number = int(not processes.first())
        for length in (0, 1, 254, 255, 2000):
            mine = {'text': 'é' * length * number, 'n': [number, None, 0.1]}
            first, second = processes.allgather(mine)
            assert first == {'text': '', 'n': [0, None, 0.1]}, first
            assert second == {'text': 'é' * length, 'n': [1, None, 0.1]}, second
        assert processes.broadcast_from_first(number) == 0
        assert processes.any_process(number == 1) and not processes.any_process(False)
        assert processes.by_first(lambda: 'done') == (None if number else 'done')
        try:
            processes.by_first(lambda: 1 / 0)
        except (ZeroDivisionError if not number else HostError) as error:
            assert str(error) == 'division by zero'
        processes.leave()
    """
    port = free_port('127.0.0.1')
    for status, _, complaints in python(code, slurm(0, 2, port), slurm(1, 2, port)):
        assert status == 0, complaints


def test_a_cluster_that_is_not_complete_is_told() -> None:
    code = """if True:
        from configs import common
        from dfkd_jax.distributed import processes
        settings = common.distributed()
        settings.update(dict(auto=True, join_seconds=1.0))
        processes.join(settings)
    """
    ((status, _, complaints),) = python(code, slurm(0, 2, free_port('127.0.0.1')))
    assert status == 1
    assert 'error: not all processes came within 1 seconds (config.distributed.' in complaints


def test_hosts_without_a_shared_folder_are_told(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(processes, 'several', lambda: True)
    monkeypatch.setattr(processes, 'by_first', lambda fn: fn())
    monkeypatch.setattr(
        processes, 'allgather', lambda value: [value, False if value is True else value]
    )
    with pytest.raises(HostError, match='process 1 does not see .*put --workdir where all'):
        folder._check_shared(tmp_path)
    assert not list(tmp_path.iterdir())
