"""What a run measures: ``metrics.csv``, TensorBoard events, and the progress line.

A row of ``metrics.csv`` belongs to the number of rounds done when it was written.  A run that was
killed and resumed leaves the rows of one that was not, but for columns of time.
"""

from __future__ import annotations

import csv
import io
import os
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dfkd_jax.distributed import processes
from dfkd_jax.storage import files

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
        if not processes.first():
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
            files.write_bytes(self._path, text.encode())


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
