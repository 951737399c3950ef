"""The line that says where a run is."""

from __future__ import annotations

import collections
import math
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, TextIO


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
