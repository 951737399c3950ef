"""What a run measures, round by round: ``metrics.csv`` and TensorBoard events.

The column ``round`` counts the rounds done when a row was written (epochs or steps in other
trainings).  A run that was killed and resumed leaves the same rows as a run that was not, except
for the time.
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

    start: the round after which the run continues.  Rows of later rounds are removed: the process
        that wrote them was killed before it saved a checkpoint.  So write the row of a round before
        its checkpoint.

    With several processes, only the first one writes.
    """

    def __init__(self, workdir: str | os.PathLike[str], start: int = 0):
        workdir = Path(workdir)
        self._columns = ['round']
        self._events: _Events | None = None
        if not processes.first():
            return
        workdir.mkdir(parents=True, exist_ok=True)
        self._path = workdir / FILE
        rows = [row for row in _read_rows(self._path) if int(row['round']) <= start]
        self._rewrite(rows)
        self._events = _Events(workdir / EVENTS, start)

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        if self._events is not None:
            self._events.close()

    def write(self, done: int, values: Mapping[str, Any]) -> None:
        """Adds the row of the moment when `done` rounds are done.

        Once this returns, the row survives a kill of the process.

        values: column -> number.  None or a missing column leaves an empty cell; a new column is
            added to the file.
        """
        if self._events is None:
            return
        row = {'round': str(done)} | {name: _cell(value) for name, value in values.items()}
        if row.keys() <= set(self._columns):
            with open(self._path, 'a', newline='') as file:
                file.write(_lines(self._columns, [row]))
        else:
            self._rewrite([*_read_rows(self._path), row])
        numbers = {name: float(cell) for name, cell in row.items() if name != 'round' and cell}
        self._events.write(done, numbers)

    def _rewrite(self, rows: list[dict[str, str]]) -> None:
        """Replaces the file.  Columns stand in the order in which they first appeared."""
        self._columns = list(dict.fromkeys(['round', *(name for row in rows for name in row)]))
        if rows or self._path.exists():
            text = _lines(self._columns, [{name: name for name in self._columns}, *rows])
            files.write_bytes(self._path, text.encode())


def read(workdir: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """The columns of ``metrics.csv``: name -> [rows] float64, NaN for an empty cell.

    Before the first row there is one column, ``round``, without entries.
    """
    rows = _read_rows(Path(workdir) / FILE)
    names = dict.fromkeys(['round', *(name for row in rows for name in row)])
    return {name: np.array([float(row.get(name) or 'nan') for row in rows]) for name in names}


def _read_rows(path: Path) -> list[dict[str, str]]:
    """The rows in file order, without those that a kill cut short or that are damaged."""
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
    return str(int(value)) if isinstance(value, bool | int) else f'{value:.7g}'  # as float32 has


class _Events:
    """A TensorBoard event file that is written at once: it has every row that the CSV file has.

    tensorboardX's SummaryWriter would hand the events to a thread, and its flush does not wait for
    that thread: a kill would lose them.
    """

    def __init__(self, directory: Path, start: int):
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto import event_pb2, summary_pb2

        self._event, self._summary = event_pb2.Event, summary_pb2.Summary
        directory.mkdir(exist_ok=True)
        # Without the suffix, two starts within a second would share one file.
        self._writer = EventsWriter(str(directory / 'events'), f'.after-{start}')
        if start:
            # Tells TensorBoard to ignore this round and later ones in the earlier files.
            log = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
            self._add(self._event(step=start + 1, session_log=log))

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        values = [self._summary.Value(tag=tag, simple_value=x) for tag, x in numbers.items()]
        self._add(self._event(step=step, summary=self._summary(value=values)))

    def _add(self, event: Any) -> None:
        event.wall_time = time.time()
        self._writer.write_event(event)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()
