"""What a run measures: ``metrics.csv``, TensorBoard events, and the progress line.

A row of ``metrics.csv`` belongs to the number of rounds done when it was written.  A run that was
killed and resumed leaves the rows of one that was not, but for columns of time.
"""

from __future__ import annotations

import collections
import csv
import io
import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from dfkd_jax import checkpoint, hosts

FILE = 'metrics.csv'
EVENTS = 'tensorboard'


class Writer:
    """Appends rows to ``metrics.csv`` and TensorBoard events in `workdir`; a context manager.

    resume_round: the round the run continues after.  Rows of later rounds, written by a run that
    was killed before it saved them, are dropped; so write a round's row before its checkpoint.
    Of several processes the first writes, and the others' writers do nothing.
    """

    def __init__(self, workdir: str | os.PathLike[str], resume_round: int = 0):
        workdir = Path(workdir)
        self._columns = ['round']
        self._events: _Events | None = None
        if not hosts.first():
            return
        workdir.mkdir(parents=True, exist_ok=True)
        self._path = workdir / FILE
        rows = [row for row in _read_rows(self._path) if int(row['round']) <= resume_round]
        self._rewrite(rows)
        self._events = _Events(workdir / EVENTS, resume_round)

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        if self._events is not None:
            self._events.close()

    def write(self, round: int, values: Mapping[str, Any]) -> None:
        """Adds the row of `round`; on return it survives a kill of the process.

        values: column -> number (None or absent: an empty cell).  A column not seen before is added
        to the file.
        """
        if self._events is None:
            return
        row = {'round': str(round)} | {name: _cell(value) for name, value in values.items()}
        if row.keys() <= set(self._columns):
            with open(self._path, 'a', newline='') as file:
                file.write(_lines(self._columns, [row]))
        else:
            self._rewrite([*_read_rows(self._path), row])
        numbers = {name: float(cell) for name, cell in row.items() if name != 'round' and cell}
        self._events.write(round, numbers)

    def _rewrite(self, rows: list[dict[str, str]]) -> None:
        """The whole file anew, with the columns of the rows in the order they came up."""
        self._columns = list(dict.fromkeys(['round', *(name for row in rows for name in row)]))
        if rows or self._path.exists():
            text = _lines(self._columns, [{name: name for name in self._columns}, *rows])
            checkpoint.write_bytes(self._path, text.encode())


def read(workdir: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """The columns of ``metrics.csv``: name -> [rows] float64, NaN where a cell is empty.

    A run that wrote no row yet has the column ``round`` alone, empty.
    """
    rows = _read_rows(Path(workdir) / FILE)
    names = dict.fromkeys(['round', *(name for row in rows for name in row)])
    return {name: np.array([float(row.get(name) or 'nan') for row in rows]) for name in names}


def _read_rows(path: Path) -> list[dict[str, str]]:
    """Rows in the order written, without what a kill cut short or damage spoilt."""
    try:
        text = path.read_text(errors='replace')
    except FileNotFoundError:
        return []
    whole = text[: text.rfind('\n') + 1]
    rows = csv.DictReader(io.StringIO(whole))
    return [row for row in rows if _is_whole(row)]


def _is_whole(row: Mapping[Any, Any]) -> bool:
    if None in row or None in row.values() or not row.get('round', '').isdecimal():
        return False
    try:
        [float(cell or 0) for cell in row.values()]
    except ValueError:
        return False
    return True


def _lines(columns: Iterable[str], rows: Iterable[Mapping[str, str]]) -> str:
    file = io.StringIO()
    writer = csv.writer(file, lineterminator='\n')
    writer.writerows([row.get(name, '') for name in columns] for row in rows)
    return file.getvalue()


def _cell(value: Any) -> str:
    if value is None:
        return ''
    value = np.asarray(value).item()
    return str(int(value)) if isinstance(value, bool | int) else f'{value:.7g}'  # float32's digits


class _Events:
    """A TensorBoard event file, written at once: a kill loses nothing that the CSV file has.

    (tensorboardX's SummaryWriter hands events to a thread, and its flush does not wait for it.)
    """

    def __init__(self, directory: Path, resume_round: int):
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto import event_pb2, summary_pb2

        self._event, self._summary = event_pb2.Event, summary_pb2.Summary
        directory.mkdir(exist_ok=True)
        # The suffix: two starts within a second would write over each other.
        self._writer = EventsWriter(str(directory / 'events'), f'.after-{resume_round}')
        if resume_round:
            # TensorBoard then leaves out what earlier files say of this round and later ones.
            log = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
            self._add(self._event(step=resume_round + 1, session_log=log))

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        values = [self._summary.Value(tag=tag, simple_value=x) for tag, x in numbers.items()]
        self._add(self._event(step=step, summary=self._summary(value=values)))

    def _add(self, event: Any) -> None:
        event.wall_time = time.time()
        self._writer.write_event(event)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


# The progress line


class Progress:
    """One line that says where a run is, redrawn in place on a terminal.

    Elsewhere it is a plain line, at most one in `every` seconds besides the last.

    total: rounds of the run.  start: rounds done before this process.
    unit, subject: what a round and the network in training are called.
    """

    def __init__(
        self,
        total: int,
        start: int = 0,
        unit: str = 'round',
        subject: str = 'student',
        stream: TextIO | None = None,
        every: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._total = total
        self._unit, self._subject = unit, subject
        self._stream = stream or sys.stdout
        self._terminal = self._stream.isatty()
        self._every = every if every is not None else 0.1 if self._terminal else 10.0
        self._clock = clock
        # (time, round, images) of late: the speed of the present phase.
        self._past: collections.deque[tuple[float, int, int | None]] = collections.deque(maxlen=20)
        self._begin = (clock(), start, None if start else 0)
        self._past.append(self._begin)
        self._text = self._losses = ''  # the line as it should stand
        self._shown = ''
        self._shown_at = -math.inf
        self._note = ''

    def note(self, text: str) -> None:
        """Sets the remark at the end of the line ('' for none), and shows it at once."""
        if text != self._note:
            self._note = text
            if self._whole():
                self._show()

    def update(self, round: int, values: Mapping[str, Any], progress: Mapping[str, Any]) -> None:
        """Tells that `round` rounds are done.

        values: the round's metrics, of which ``g/...``, ``s/...`` and ``loss`` are shown.
        progress: the run's `last` and `best` accuracy in per cent (0 before the first measurement)
            and `images_synthesised` so far; each may be absent.
        """
        images = progress.get('images_synthesised')
        self._past.append((self._clock(), round, images))
        if len(self._past) > 2 and self._past[0] is self._begin:
            self._past.popleft()  # what came before the first update is mostly compilation
        then, first, images_then = self._past[0]
        seconds = max(self._past[-1][0] - then, 1e-9)
        parts = [f'{self._unit} {round:>{len(str(self._total))}}/{self._total}']
        if progress.get('last'):
            parts.append(f'{self._subject} {progress["last"]:.2f} % (best {progress["best"]:.2f})')
        if images is not None and images_then is not None and images > images_then:
            parts.append(f'{(images - images_then) / seconds:,.0f} images/s')
        if first + 1 < round < self._total:
            parts.append(f'ETA {duration((self._total - round) * seconds / (round - first))}')
        # Last, so that a narrow terminal cuts these: their number is the method's.
        self._losses = '  '.join(
            f'{name} {float(v):.3g}'
            for name, v in values.items()
            if name[:2] in ('g/', 's/') or name == 'loss'
        )
        self._text = '  '.join(parts)
        if self._clock() - self._shown_at >= self._every or round >= self._total:
            self._shown_at = self._clock()
            self._show()

    def close(self) -> None:
        """Leaves the last state standing and ends the line."""
        self._note = ''
        if self._text and self._shown != self._whole():
            self._show()
        if self._terminal and self._shown:
            self._stream.write('\n')
            self._stream.flush()

    def _whole(self) -> str:
        note = self._note and f'[{self._note}]'
        return '  '.join(part for part in (self._text, note, self._losses) if part)

    def _show(self) -> None:
        self._shown = text = self._whole()
        if self._terminal:
            columns = shutil.get_terminal_size().columns - 1
            self._stream.write(f'\r\x1b[2K{text[:columns]}')
        else:
            self._stream.write(text + '\n')
        self._stream.flush()


def duration(seconds: float) -> str:
    """``0:07``, ``12:34`` or ``1:02:03``; days are hours."""
    if not math.isfinite(seconds):
        return '?'
    minutes, second = divmod(max(round(seconds), 0), 60)
    hours, minute = divmod(minutes, 60)
    return f'{hours}:{minute:02}:{second:02}' if hours else f'{minute}:{second:02}'
