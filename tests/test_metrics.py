"""Rows survive kills and resumes; the progress shows what is known and no more."""

from __future__ import annotations

import io
import os
import pty
import struct
import sys
import termios
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from tensorboardX.proto import event_pb2

from dfkd_jax.reporting import metrics
from dfkd_jax.reporting.progress import Progress, say


def rows(path: Path) -> list[str]:
    return (path / metrics.FILE).read_text().splitlines()


def test_rows_are_on_disk_when_written(tmp_path: Path) -> None:
    with metrics.Writer(tmp_path) as writer:
        assert not (tmp_path / metrics.FILE).exists()
        writer.write(1, {'g/loss': jnp.float32(0.1), 'images': 300, 'student': None})
        assert rows(tmp_path) == ['round,g/loss,images,student', '1,0.1,300,']
        writer.write(2, {'g/loss': np.float32('nan'), 'student': 91.25})
        assert rows(tmp_path)[2] == '2,nan,,91.25'
        writer.write(2, {'a,b': 1e-12})
        assert rows(tmp_path) == [
            'round,g/loss,images,student,"a,b"',
            '1,0.1,300,,',
            '2,nan,,91.25,',
            '2,,,,1e-12',
        ]


def test_read(tmp_path: Path) -> None:
    assert metrics.read(tmp_path)['round'].shape == (0,)
    with metrics.Writer(tmp_path) as writer:
        writer.write(1, {'loss': 0.5})
        writer.write(5, {'loss': 0.25, 'student': 90.0})
    columns = metrics.read(tmp_path)
    assert list(columns) == ['round', 'loss', 'student']
    np.testing.assert_array_equal(columns['round'], [1, 5])
    np.testing.assert_array_equal(columns['loss'], [0.5, 0.25])
    np.testing.assert_array_equal(columns['student'], [np.nan, 90.0])


def run(workdir: Path, start: int, end: int) -> None:
    with metrics.Writer(workdir, start=start) as writer:
        for done in range(start + 1, end + 1):
            late = {'student': 10.0 * done} if done % 3 == 0 else {}
            writer.write(done, {'loss': 1 / done, **late})


@pytest.mark.parametrize('killed_at', range(1, 8))
def test_a_resumed_run_leaves_the_same_file(tmp_path: Path, killed_at: int) -> None:
    run(tmp_path / 'whole', 0, 8)
    run(tmp_path / 'killed', 0, killed_at)
    path = tmp_path / 'killed' / metrics.FILE
    with open(path, 'a') as file:
        file.write('8,0.1')  # killed while writing
    run(tmp_path / 'killed', 2 * (killed_at // 2), 8)  # the checkpoint was of an even round
    assert rows(tmp_path / 'killed') == rows(tmp_path / 'whole')


def events(path: Path) -> list[Any]:
    """The records of an event file: length, its checksum, an event, its checksum."""
    data, found = path.read_bytes(), []
    while data:
        (size,) = struct.unpack('<Q', data[:8])
        found.append(event_pb2.Event.FromString(data[12 : 12 + size]))
        data = data[12 + size + 4 :]
    return found


def test_damaged_rows_are_left_out(tmp_path: Path) -> None:
    with metrics.Writer(tmp_path) as writer:
        for number in range(1, 5):
            writer.write(number, {'loss': number / 2})
    path = tmp_path / metrics.FILE
    path.write_bytes(path.read_bytes().replace(b'2,1\n', b'2,\xff\n').replace(b'3,1.5', b'3'))
    assert metrics.read(tmp_path)['round'].tolist() == [1, 4]
    with metrics.Writer(tmp_path, 4) as writer:
        writer.write(5, {'loss': 2.5})
    assert metrics.read(tmp_path)['loss'].tolist() == [0.5, 2, 2.5]
    path.write_bytes(b'\x00' + path.read_bytes())  # the header: nothing is known of the cells
    assert metrics.read(tmp_path)['round'].tolist() == []


def test_tensorboard_events_and_where_a_resumed_run_took_over(tmp_path: Path) -> None:
    with metrics.Writer(tmp_path) as writer:
        writer.write(1, {'g/loss': 0.5, 'student': None})
        (path,) = (tmp_path / metrics.EVENTS).iterdir()
        assert [v.tag for e in events(path) for v in e.summary.value] == ['g/loss']  # not at exit
    with metrics.Writer(tmp_path, start=1) as writer:
        writer.write(2, {'g/loss': 0.25})
    (path,) = (tmp_path / metrics.EVENTS).glob('*after-1')
    _, start, scalar = events(path)
    assert (start.step, start.session_log.status) == (2, event_pb2.SessionLog.START)
    assert (scalar.step, scalar.summary.value[0].simple_value) == (2, 0.25)


# Progress


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_plain_lines_are_few_and_complete() -> None:
    clock, stream = Clock(), io.StringIO()
    line = Progress(100, stream=stream, clock=clock)
    for done in range(1, 101):
        clock.now += 20.0 if done == 1 else 1.0  # the first round compiles
        accuracy = 50.0 + done / 4
        line.update(done, {'last': accuracy, 'best': 80.0, 'images_synthesised': 600 * done})
    line.close()
    lines = stream.getvalue().splitlines()
    assert lines[0] == 'round   1/100  student 50.25 % (best 80.00)'
    assert lines[5] == 'round  51/100  student 62.75 % (best 80.00)  600 images/s  ETA 00:49'
    assert lines[-1] == 'round 100/100  student 75.00 % (best 80.00)  600 images/s'
    assert len(lines) == 11  # one in ten seconds, and the last
    assert '\r' not in stream.getvalue()


@pytest.mark.parametrize('columns', [40, 80, 120])
def test_a_bar_is_redrawn_in_one_line_of_a_terminal(columns: int) -> None:
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, columns))
    with open(theirs, 'w', encoding='utf-8') as stream:
        line = Progress(2, stream=stream)
        for done in (1, 2):
            line.update(done, {'last': 12.5, 'best': 12.5, 'images_synthesised': done})
        line.close()
        data = b''
        while not data.endswith(b'\n'):  # the bar's one line, at its end
            data += os.read(ours, 1000)
    os.close(ours)
    text = data.decode()
    assert text.count('\n') == 1
    first, *_, last = text.strip().split('\r')
    assert first.startswith('round 0/2 |  ')  # at once: the first round may take a minute
    assert last.startswith('round 2/2 |█')
    assert columns == 40 or '█| student 12.50 % (best 12.50)' in last
    assert columns - 1 <= len(first) == len(last) <= columns


def test_a_resumed_run_counts_its_own_time_and_images_without_compilation() -> None:
    clock, stream = Clock(), io.StringIO()
    line = Progress(100, start=50, stream=stream, clock=clock, every=0.0)
    clock.now = 30.0
    line.update(52, {'last': 0.0, 'best': 0.0, 'images_synthesised': 52_000})
    clock.now = 32.0
    line.update(54, {'images_synthesised': 54_000})
    line.close()
    first, second = stream.getvalue().splitlines()
    assert first == 'round  52/100  ETA 12:00'
    assert second == 'round  54/100  1,000 images/s  ETA 00:46'


def test_a_new_phase_has_a_speed_of_its_own() -> None:
    clock, stream = Clock(), io.StringIO()
    line = Progress(200, stream=stream, clock=clock, every=0.0)
    for done in range(1, 101):
        clock.now += 1.0 if done <= 60 else 10.0
        line.update(done, {'images_synthesised': 100 * done})
    assert stream.getvalue().splitlines()[59].endswith('100 images/s  ETA 02:20')
    assert stream.getvalue().splitlines()[-1].endswith('10 images/s  ETA 16:40')


def test_other_trainings_have_other_words() -> None:
    stream = io.StringIO()
    line = Progress(3, unit='epoch', subject='teacher', stream=stream)
    line.update(1, {'last': 91.0, 'best': 92.0, 'seconds': 2.0})
    line.close()
    assert stream.getvalue() == 'epoch 1/3  teacher 91.00 % (best 92.00)\n'


def test_what_is_said_stands_above_the_bar(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    say('before')
    monkeypatch.setattr(sys.stdout, 'isatty', lambda: True)
    line = Progress(2)
    say('in between')
    line.close()
    before, bar, cleared, *rest = capsys.readouterr().out.split('\r')
    assert before == 'before\n' and bar.startswith('round 0/2 |') and not cleared.strip()
    assert rest[0] == 'in between\n' and rest[1].startswith('round 0/2 |')


def test_close_without_a_round_is_silent() -> None:
    stream = io.StringIO()
    Progress(10, stream=stream).close()
    assert stream.getvalue() == ''
