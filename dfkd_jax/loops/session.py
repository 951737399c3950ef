"""The session under every loop: a run that is killed at any moment continues to the same numbers.

A loop describes one unit of its work (a round, an epoch, a trajectory, a step) in a `Work`.  `run`
does the rest for all loops: it restores the last checkpoint, repeats the unit, writes rows of
metrics, measures, saves, remembers the best score and stops when asked to.  It never saves a number
that is not finite.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np

from dfkd_jax.distributed.sharding import Plan
from dfkd_jax.errors import CollapseError, NonFiniteError
from dfkd_jax.loops import collapse
from dfkd_jax.reporting import metrics, progress
from dfkd_jax.storage.checkpoints import Checkpoints, Restored

Row = dict[str, float]


class Stopped(Exception):  # noqa: N818, not an error
    """The run was asked to stop and has saved; the same command continues it."""


class Every(NamedTuple):
    """How many units of work lie between two of each.  All three follow the last unit."""

    log: int = 1  # a row of ``metrics.csv``, the mean of the units since the last one
    measure: int = 1
    save: int = 1


class Store(Protocol):
    """Where states are stored: `Checkpoints`, or files that the work itself leaves."""

    def restore(self, like: Any) -> Restored | None: ...

    def save(self, done: int, state: Any, progress: dict[str, Any]) -> None: ...


def nothing(at: Any) -> Row:
    """The `measure` of a loop that measures nothing."""
    del at
    return {}


class Work(NamedTuple):
    """What a loop does, apart from being interrupted.

    init, inputs: ``init(*inputs)`` is the first state; pure, since it is compiled.
    advance: ``(state, done) -> (state, metrics)``: the next unit, after `done` units.
    measure: ``state -> numbers`` on the host, added to the row.
    score: the name of the measured number, in per cent, whose best value is remembered.
    totals: ``done -> numbers`` that only grow, added to the row.
    images: ``done -> images synthesised``, for the progress line; None if there are none.
    unit, subject: the names of a unit and of the network in training.
    advice: what a user can do when a number is no longer finite.
    signs: ``(state, row) -> numbers`` of `collapse`, taken with every measurement; None: none.
    patience: after so many measurements in a row of an ill generator the run ends.
    store: None for checkpoints in ``workdir/checkpoints``, of which the last `keep` remain.
    """

    plan: Plan
    total: int
    init: Callable[..., Any]
    inputs: tuple[Any, ...]
    advance: Callable[[Any, int], tuple[Any, Any]]
    every: Every = Every()
    measure: Callable[[Any], Row] = nothing
    score: str = ''
    totals: Callable[[int], Row] = nothing
    images: Callable[[int], int] | None = None
    unit: str = 'round'
    subject: str = 'student'
    advice: str = ''
    signs: Callable[[Any, Row], Row] | None = None
    patience: int = 3
    store: Store | None = None
    keep: int = 2


@dataclass
class Record:
    """What a session saves beside the state.

    pending: the metrics of the units since the last row.  measured: the last measurement.
    well: the best signs of the generator.  ill: measurements in a row at which it was ill.
    """

    seconds: float = 0.0
    last: float = 0.0
    best: float = 0.0
    best_at: int = 0
    measured: Row = field(default_factory=dict)
    pending: list[Any] = field(default_factory=list)
    well: Row = field(default_factory=dict)
    ill: int = 0


def run(work: Work, workdir: Path, interrupted: Callable[[], bool]) -> tuple[Any, Record]:
    """Does the work from where the last session in `workdir` stopped; returns the last state.

    interrupted: asked after every unit.
    Raises Stopped if it returned True, after saving; NonFiniteError if a metric or an array of the
    state is not finite, before that is saved; and CollapseError if the generator stays ill.  While
    it is, nothing is saved but at a stop, so that the last state in which it was well remains.
    """
    with contextlib.ExitStack() as stack:
        store = work.store or stack.enter_context(Checkpoints(workdir / 'checkpoints', work.keep))
        restored = store.restore(jax.eval_shape(work.init, *work.inputs))
        done = restored.done if restored else 0
        record = Record(**restored.progress) if restored else Record()
        state = restored.state if restored else work.plan.call(work.init)(*work.inputs)
        state = work.plan.replicate(state)
        if done:
            progress.say(f'continuing after {work.unit} {done} of {work.total}')
        started, stop = time.monotonic() - record.seconds, False
        writer = stack.enter_context(metrics.Writer(workdir, done))
        line = progress.Progress(work.total, done, unit=work.unit, subject=work.subject)
        stack.enter_context(contextlib.closing(line))
        while done < work.total and not stop:
            state, row = work.advance(state, done)
            done += 1
            record.pending.append(row)
            stop = interrupted()
            log, measure, save = (done == work.total or done % every == 0 for every in work.every)
            if log or measure or save or stop:
                record.pending = finite(record.pending, done, work)
                record.seconds = time.monotonic() - started
            if measure:
                _measure(work, state, done, record)
                _examine(work, state, done, record)
            if log or measure:
                row = mean(record.pending) | (record.measured if measure else {})
                totals = {'seconds': record.seconds} | work.totals(done)
                writer.write(done, totals | row)
                images = {'images_synthesised': work.images(done)} if work.images else {}
                line.update(done, asdict(record) | images)
                record.pending = []
            if (save and not record.ill) or stop or done == work.total:
                host = jax.device_get(state)
                check_state(host, done, work)
                store.save(done, host, asdict(record))
    if done < work.total:
        progress.say(
            f'stopped and saved after {work.unit} {done} of {work.total}; continue with the same '
            'command and the same --workdir'
        )
        raise Stopped
    return state, record


def _measure(work: Work, state: Any, done: int, record: Record) -> None:
    record.measured = work.measure(state)
    if work.score in record.measured:
        record.last = record.measured[work.score]
        if record.last > record.best:
            record.best, record.best_at = record.last, done


def _examine(work: Work, state: Any, done: int, record: Record) -> None:
    """Raises CollapseError where a generator has been ill for too long."""
    if work.signs is None:
        return
    signs = work.signs(state, mean(record.pending))
    fallen = collapse.ill(signs, record.well)
    record.ill = record.ill + 1 if fallen else 0
    if record.ill >= work.patience:
        raise CollapseError(
            f'the generator has collapsed by {work.unit} {done}: of its images, {fallen}. '
            f'{work.advice} --config.collapse_patience=0 goes on all the same.'
        )
    record.well = {name: max(value, record.well.get(name, value)) for name, value in signs.items()}


def mean(rows: list[Row]) -> Row:
    """The mean of each number over rows of the same names."""
    return {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}


def finite(rows: list[Any], done: int, work: Work) -> list[Row]:
    """Waits for the units up to `done`; returns their metrics on the host.

    Raises NonFiniteError naming the first unit and metric that are not finite.
    """
    rows = jax.device_get(rows)
    for number, row in enumerate(rows, start=done - len(rows) + 1):
        for name, value in row.items():
            if not math.isfinite(value):
                raise NonFiniteError(f'{name} is {value} at {work.unit} {number}. {work.advice}')
    return [{name: float(value) for name, value in row.items()} for row in rows]


def check_state(state: Any, done: int, work: Work) -> None:
    """Raises NonFiniteError naming the first array of a state, on the host, that is not finite.

    The last update before a save can spoil the weights although its losses are finite.
    """
    for path, x in jax.tree_util.tree_leaves_with_path(state):
        if not np.all(np.isfinite(x)):
            name = jax.tree_util.keystr(path, simple=True, separator='/')
            raise NonFiniteError(f'{name} is not finite after {work.unit} {done}. {work.advice}')


def kept(workdir: Path) -> str:
    """A sentence for a message: where the last good state is."""
    return f'The last good checkpoint is kept in {workdir / "checkpoints"}.'
