"""The folder of a run: which process and which config own it; and how a run is asked to stop."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from importlib import metadata
from pathlib import Path
from types import FrameType
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from dfkd_jax import __version__
from dfkd_jax.distributed import processes
from dfkd_jax.errors import ConfigError, HostError
from dfkd_jax.storage import files

CONFIG, LOCK, INPUTS = 'config.json', 'lock', 'inputs.json'
# Where a run finds what it reads.  What lies there is known by its content (`INPUTS`), so a run
# continues after a move.
PLACES = (
    'data.data_dir', 'data.folder', 'teacher.checkpoint', 'prior.path', 'synthesis.bank',
    'labels.path',
)  # fmt: skip
# What changes no weight: how often a run logs, measures and saves, and on which hosts it is.
FREE = ('log_every_', 'eval_every_', 'save_every_', 'keep_checkpoints')
PACKAGES = ('jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'numpy')


def default(config: Any) -> Path:
    """The folder of a run without --workdir.

    ``runs/<data>-<method>-<teacher>-<student>-seed<n>-<time>``, <data> none without a data set.
    """
    names = (config.data.name or 'none', config.method, config.teacher.model, config.student.model)
    return Path('runs') / f'{"-".join(names)}-seed{config.seed}-{datetime.now():%Y%m%d-%H%M%S}'


def read_config(path: Path) -> ConfigDict:
    """The config in a run's ``config.json``, as it was before it was JSON.

    Raises CheckpointError for a file that cannot be read.
    """
    return _revived(files.read_json(path))


def _revived(value: Any, name: str = '') -> Any:
    """Groups, and tuples in place of lists; what is not set stays typed, so a flag can set it."""
    if isinstance(value, dict):
        return ConfigDict({key: _revived(each, key) for key, each in value.items()})
    if isinstance(value, list):
        return tuple(_revived(each) for each in value)
    return placeholder(tuple if name in ('mean', 'std') else str) if value is None else value


@contextlib.contextmanager
def claim(workdir: Path, config: Any) -> Iterator[None]:
    """Holds the folder of a run while the block runs, and saves the config in it.

    A folder where nothing has run yet is taken over: if a run ended because of a mistake in its
    config, the corrected config can use the same folder.  With several processes, the first one
    holds the folder for all.

    Raises:
      ConfigError: if another process holds the folder; if it belongs to another config, naming the
        fields that differ; if it holds something that is not a run; if it cannot be written.
      CheckpointError: if the config saved there cannot be read.
      HostError: if a process does not see the folder.
    """
    with contextlib.ExitStack() as held:
        processes.by_first(lambda: held.enter_context(_hold(workdir, config)))
        _check_shared(workdir)
        yield


@contextlib.contextmanager
def _hold(workdir: Path, config: Any) -> Iterator[None]:
    try:
        # A killed process may have left a `.tmp` file that it was writing.
        contents = (
            {p.name for p in workdir.iterdir() if p.suffix != '.tmp'} if workdir.exists() else set()
        )
        if contents - {LOCK} and CONFIG not in contents:
            raise ConfigError(
                f'{workdir} is not empty and not a run (it has no {CONFIG}). Nothing there was '
                'touched; choose another --workdir.'
            )
        workdir.mkdir(parents=True, exist_ok=True)
        lock = open(workdir / LOCK, 'ab')  # noqa: SIM115, closed below
    except OSError as error:
        raise ConfigError(
            f'{workdir} cannot be written ({error.strerror}): choose another --workdir.'
        ) from error
    with lock:
        try:
            # The system releases the lock, however the process ends.
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(
                f'another process is running in {workdir}: wait for its end, or choose another '
                '--workdir.'
            ) from error
        _own(workdir, files.plain(config), fresh=not contents - {LOCK, CONFIG, INPUTS})
        yield


def _own(workdir: Path, wanted: dict[str, Any], fresh: bool) -> None:
    """Writes the config into a folder where nothing has run, or compares it with the one there."""
    path = workdir / CONFIG
    if fresh:
        (workdir / INPUTS).unlink(missing_ok=True)
        files.write_json(path, wanted)
        return
    there = files.read_json(path, 'Put a copy back, or choose another --workdir.')
    # A run of a version that wrote no contents is known by its places alone.
    known = (workdir / INPUTS).exists()
    found, here = (
        _identity(_flat(tree), known)
        for tree in (there, json.loads(json.dumps(wanted)))  # JSON makes lists of tuples
    )
    differ = [
        f'config.{name} was {found.get(name, "absent")!r}, now {here.get(name, "absent")!r}'
        for name in sorted(found.keys() | here.keys())
        if found.get(name, ...) != here.get(name, ...)
    ]
    if differ:
        raise ConfigError(
            f'{workdir} belongs to another config: {"; ".join(differ)}. Use the config that '
            'started it, or choose another --workdir.'
        )


def _identity(fields: dict[str, Any], places_may_change: bool) -> dict[str, Any]:
    """The fields by which a run is known, of all of its config, ``{'data.name': 'digits'}``."""
    kept = {
        name: value
        for name, value in fields.items()
        # Without the processes: a run may continue on other hosts.
        if not name.startswith('distributed.') and not name.rpartition('.')[2].startswith(FREE)
    }
    if not places_may_change:
        return kept
    # A place that is named or not is no move, but for the folder of data sets, which has a default.
    named = {name: kept[name] is not None for name in PLACES[1:] if name in kept}
    return {name: value for name, value in kept.items() if name not in PLACES} | named


def keep_inputs(workdir: Path, **found: Any) -> None:
    """Writes what a run reads, by its content, or compares it with what it began with.

    found: what `files.plain` takes, such as a `digest`, by name.  What is not written yet is added.
    Raises ConfigError for something else than before, on all processes.
    """
    processes.by_first(lambda: _keep_inputs(workdir / INPUTS, files.plain(found)))


def _keep_inputs(path: Path, found: dict[str, Any]) -> None:
    cure = 'Put a copy back, or choose another --workdir.'
    there = files.read_json(path, cure) if path.exists() else {}
    differ = [
        f'{name} was {_short(there[name])}, now {_short(value)}'
        for name, value in found.items()
        if there.get(name, value) != value
    ]
    if differ:
        raise ConfigError(
            f'{path.parent} began with something else: {"; ".join(differ)}. Give it what it began '
            'with, wherever that lies now, or choose another --workdir.'
        )
    if found.keys() - there.keys():
        files.write_json(path, found | there)


def _short(value: Any) -> str:
    """A digest by its beginning."""
    if isinstance(value, dict):
        return ' '.join(f'{name}={_short(x)}' for name, x in value.items())
    return value[:12] if isinstance(value, str) and len(value) == 64 else str(value)


def digest(tree: Any) -> str:
    """The sha256 of the arrays of a tree, their names, shapes and dtypes."""
    total = hashlib.sha256()
    leaves = {jax.tree_util.keystr(at): x for at, x in jax.tree_util.tree_leaves_with_path(tree)}
    for name in sorted(leaves):
        array = np.asarray(leaves[name], order='C')
        total.update(f'{name} {array.dtype} {array.shape}\n'.encode())
        total.update(array.reshape(-1).view(np.uint8).data)
    return total.hexdigest()


def _check_shared(folder: Path) -> None:
    """Raises HostError on all processes unless all see the folder that process 0 writes."""
    if not processes.several():
        return
    mark = folder / '.shared.tmp'
    token = processes.broadcast_from_first(os.urandom(8).hex())
    processes.by_first(lambda: mark.write_text(token))
    deadline = time.monotonic() + 10  # a network's file system may show a new file late
    seen = False
    while not seen and time.monotonic() < deadline:
        with contextlib.suppress(OSError):
            seen = mark.read_text() == token
        if not seen:
            time.sleep(0.2)
    blind = [number for number, sees in enumerate(processes.allgather(seen)) if not sees]
    if processes.first():
        mark.unlink(missing_ok=True)
    if blind:
        raise HostError(
            f'process {" and ".join(map(str, blind))} does not see {folder}, which process 0 '
            'writes: put --workdir where all hosts see one folder.'
        )


def _flat(tree: Any, prefix: str = '') -> dict[str, Any]:
    """Nested dicts and lists as ``{'phases.0.rounds': 5}``."""
    if isinstance(tree, dict):
        items = [(str(name), value) for name, value in tree.items()]
    elif isinstance(tree, list):
        items = [(str(i), value) for i, value in enumerate(tree)]
    else:
        return {prefix[:-1]: tree}
    return {k: v for name, value in items for k, v in _flat(value, f'{prefix}{name}.').items()}


def versions() -> dict[str, str]:
    """The versions of dfkd_jax and of the packages that determine its results."""
    return {'dfkd_jax': __version__} | {name: metadata.version(name) for name in PACKAGES}


def device() -> str:
    """The devices of all processes, e.g. ``1 x cpu`` or ``8 x NVIDIA H200``."""
    return f'{jax.device_count()} x {jax.devices()[0].device_kind}'


class Interruption:
    """Turns the first SIGTERM or Ctrl-C into a flag that a loop reads between rounds.

    >>> with Interruption() as interrupted:
    ...     while not interrupted(): ...

    A second signal has its usual effect.  With several processes, all must call `interrupted` at
    the same moments, and it is true for all if one of them had the signal.
    """

    def __enter__(self) -> Callable[[], bool]:
        self.asked = False
        self.previous = {
            number: signal.signal(number, self._handle)
            for number in (signal.SIGTERM, signal.SIGINT)
        }
        return lambda: processes.any_process(self.asked)

    def __exit__(self, *error: object) -> None:
        self._restore()

    def _restore(self) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        del number, frame
        self.asked = True
        self._restore()
