"""Where a training stands: a bar on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import collections
import math
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, TextIO

from tqdm import tqdm


def say(text: str) -> None:
    """Prints a line, above the bars that are on the terminal."""
    with tqdm.external_write_mode():
        print(text, flush=True)


class Progress:
    """Shows the rounds done, the accuracy, the speed and the time left; `close` it at the end.

    On a terminal, tqdm draws a bar in place.  Elsewhere (a file, a pipe), a line is written at most
    every `every` seconds, and at the end:

        round  51/100  student 62.75 % (best 80.00)  600 images/s  ETA 00:49

    total: rounds of the training.
    start: rounds done before this process.
    unit: the name of what is counted.
    subject: the name of the network whose accuracy is shown.
    """

    def __init__(
        self,
        total: int,
        start: int = 0,
        unit: str = 'round',
        subject: str = 'student',
        stream: TextIO | None = None,
        every: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._total, self._unit, self._subject = total, unit, subject
        self._stream, self._clock, self._every = stream or sys.stdout, clock, every
        self._line, self._written, self._written_at = '', '', -math.inf
        # (time, rounds done, images) at the last updates, from which the speed is computed.
        self._past: collections.deque[tuple[float, int, int | None]] = collections.deque(maxlen=20)
        self._begin = (clock(), start, None if start else 0)
        self._past.append(self._begin)
        self._bar = tqdm(
            total=total,
            initial=start,
            file=self._stream,
            disable=not self._stream.isatty(),
            bar_format=f'{self._count(start)} |{{bar}}|',
            dynamic_ncols=True,
            miniters=1,  # redraw by time alone: rounds differ in length from phase to phase
        )

    def update(self, done: int, progress: Mapping[str, Any]) -> None:
        """Shows that `done` rounds are done.

        progress: `last` and `best`, accuracies in per cent (0 before the first measurement), and
            `images_synthesised`, the number of images made so far.  Each may be absent.
        """
        self._past.append((self._clock(), done, progress.get('images_synthesised')))
        if len(self._past) > 2 and self._past[0] is self._begin:
            self._past.popleft()  # the time before the first update is mostly compilation
        count, status = self._count(done), self._status(done, progress)
        self._bar.bar_format = f'{count} |{{bar}}| {status}'
        self._bar.update(done - self._bar.n)
        self._line = f'{count}  {status}'.rstrip()
        if self._clock() - self._written_at >= self._every or done >= self._total:
            self._write()

    def close(self) -> None:
        """Leaves the last state on the screen or in the file."""
        self._write()
        self._bar.close()

    def _write(self) -> None:
        if self._bar.disable and self._line != self._written:
            self._stream.write(f'{self._line}\n')
            self._stream.flush()
            self._written, self._written_at = self._line, self._clock()

    def _count(self, done: int) -> str:
        return f'{self._unit} {done:>{len(str(self._total))}}/{self._total}'

    def _status(self, done: int, progress: Mapping[str, Any]) -> str:
        """Accuracy, speed and time left, as far as they are known."""
        (then, first, images_then), (now, _, images) = self._past[0], self._past[-1]
        seconds = max(now - then, 1e-9)
        parts = []
        if progress.get('last'):
            parts.append(f'{self._subject} {progress["last"]:.2f} % (best {progress["best"]:.2f})')
        if done <= first + 1:  # the time of a single round may be mostly compilation
            return '  '.join(parts)
        if images is not None and images_then is not None and images > images_then:
            parts.append(f'{(images - images_then) / seconds:,.0f} images/s')
        if done < self._total:
            left = (self._total - done) * seconds / (done - first)
            parts.append(f'ETA {tqdm.format_interval(left)}')
        return '  '.join(parts)
