"""Checkpoints of a run, by orbax: a state comes back bit for bit, or not at all.

A process that is killed at any moment leaves the last complete checkpoint readable.  Arrays are
copied to the host before they are saved, and restored on the host.  So a run may continue on
another number of devices, and a state may be donated as soon as `Checkpoints.save` returns.

With several processes, every process holds the complete state.  The first one saves it, and all
read it from the folder that they share.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from absl import logging

from dfkd_jax.distributed import processes
from dfkd_jax.errors import CheckpointError, HostError
from dfkd_jax.storage import safe_read
from dfkd_jax.storage.files import write_json

T = TypeVar('T')
FILES = 'files.json'  # in the folder of a checkpoint: the size and CRC-32 of its files
FORMAT = 2  # the version of what is in a checkpoint's record and files


class Restored(NamedTuple):
    """A checkpoint that was read."""

    done: int  # rounds done
    state: Any  # of the structure, shapes and dtypes that were asked for
    progress: dict[str, Any]  # as it was saved


class Checkpoints:
    """The last `keep` checkpoints in `directory`; a context manager.

    >>> with Checkpoints(workdir / 'checkpoints') as checkpoints:
    ...     restored = checkpoints.restore(jax.eval_shape(make_state))
    ...     checkpoints.save(12, state, {'best_accuracy': 0.91})
    """

    def __init__(self, directory: str | os.PathLike[str], keep: int = 2):
        logging.get_absl_logger().addFilter(_quiet_orbax)
        self.directory = Path(directory).absolute()
        options = ocp.CheckpointManagerOptions(
            preservation_policy=ocp.checkpoint_managers.LatestN(keep),
            # Remove what a process left behind that was killed while it saved.
            cleanup_tmp_directories=processes.first(),
            # When `save` returns, the state is on disk and may be donated.
            enable_async_checkpointing=False,
            # Otherwise one unreadable checkpoint would make the whole directory unreadable.
            lightweight_initialize=True,
            # By default orbax makes all processes save and wait for one another.  Here one process
            # acts alone, and `processes` decides when.
            multiprocessing_options=_alone() if processes.several() else _TOGETHER,
            create=not processes.several(),
        )
        if processes.several():
            processes.by_first(lambda: self.directory.mkdir(parents=True, exist_ok=True))
        self._manager = ocp.CheckpointManager(self.directory, options=options)

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        self._manager.close()

    def save(self, done: int, state: Any, progress: Mapping[str, Any]) -> None:
        """Saves the state after `done` rounds, with `progress`, values that JSON can hold.

        Returns when the checkpoint is complete on disk.  A round that is already saved is left as
        it is, since a run repeats its rounds bit for bit.

        Raises CheckpointError when a later round is already saved, which means that the run did
        not continue from it; and when the disk cannot be written, which leaves the earlier
        checkpoints as they were.
        """
        processes.by_first(lambda: self._save(done, state, progress))
        _return_free_memory()

    def _save(self, done: int, state: Any, progress: Mapping[str, Any]) -> None:
        latest = self._manager.latest_step()
        if latest == done:
            return
        if latest is not None and latest > done:
            raise CheckpointError(
                f'cannot save round {done}: {self.directory} already holds round {latest}. '
                'Continue from that one, or choose another --workdir.'
            )
        host = jax.tree.map(np.asarray, jax.device_get(state))
        record = {'format': FORMAT, 'progress': dict(progress), 'layout': _layout(host)}
        args = ocp.args.Composite(
            state=ocp.args.StandardSave(host), record=ocp.args.JsonSave(record)
        )
        folder = self.directory / str(done)
        try:
            self._manager.save(done, args=args)
            # Orbax has renamed a complete folder into place.  The sums reveal later damage.  A
            # process killed before this line leaves a complete checkpoint without them.
            write_json(folder / FILES, _file_sums(folder))
        except (OSError, RuntimeError, ValueError) as error:  # tensorstore's errors of the disk
            before = f'that of round {latest}' if latest is not None else 'none'
            raise CheckpointError(
                f'the checkpoint of round {done} cannot be written to {self.directory} '
                f'({_reason(error)}). The last whole one is {before}: make room there, or make it '
                'writable, and the same command continues.'
            ) from error

    def restore(self, like: T) -> Restored | None:
        """The newest complete checkpoint, or None if there is none.

        like: the wanted state, as arrays or as shapes (``jax.eval_shape``).  The restored state has
            exactly this structure, these shapes and dtypes, as arrays on the default device.

        A damaged checkpoint is reported and set aside (``<round>.broken``), and the one before it
        is used.

        Raises CheckpointError for an undamaged checkpoint of another layout or another version,
        which stays where it is; and when there are checkpoints but all are damaged.  Raises
        HostError when this process cannot read what the first one reads.
        """
        found = processes.by_first(lambda: self._newest(like))
        done = processes.broadcast_from_first(found.done if found else None)
        if done is None or processes.first():
            return found
        try:
            state, record = self._state(done, like), self._record(done)
        except Exception as error:  # of orbax or tensorstore
            raise HostError(
                f'{processes.name()} cannot read {self.directory / str(done)}, which process 0 can '
                f'({_reason(error)}): put --workdir where all hosts see the same folder.'
            ) from error
        return Restored(done, state, record['progress'])

    def _newest(self, like: T) -> Restored | None:
        broken = []
        for done in sorted(self._manager.all_steps(), reverse=True):
            intact = False
            try:
                # First, since a read that fails inside orbax floods the terminal with tracebacks.
                intact = _check_files(self.directory / str(done))
                record = self._record(done)
                version = record.get('format', 1)  # the first format had no number
                if version != FORMAT:
                    raise ValueError(f'its format is {version}, here {FORMAT}')
                self._check_layout(done, record['layout'], _layout(like))
                state = self._state(done, like)
            except CheckpointError:
                raise
            except Exception as error:  # whatever the damage provokes in orbax or tensorstore
                if intact:
                    raise CheckpointError(
                        f'the checkpoint of round {done} in {self.directory} has all the bytes '
                        f'that were saved, and cannot be read ({_reason(error)}): another version '
                        'of dfkd_jax made it. Continue with that one, or choose another --workdir.'
                    ) from error
                broken.append(self._set_aside(done, error))
            else:
                return Restored(done, state, record['progress'])
        if broken:
            raise CheckpointError(
                f'no checkpoint in {self.directory} can be read; they are kept there as '
                f'{", ".join(broken)}. Put back a whole copy of one to continue from it, or start '
                'again with the same command to begin anew.'
            )
        return None

    def _record(self, done: int) -> Any:
        args = ocp.args.Composite(record=ocp.args.JsonRestore())
        return self._manager.restore(done, args=args).record

    def _state(self, done: int, like: T) -> T:
        # Zeros broadcast from one scalar: the shapes take no memory.
        empty = jax.tree.map(lambda x: np.broadcast_to(np.zeros((), x.dtype), x.shape), like)
        args = ocp.args.Composite(state=ocp.args.StandardRestore(empty))
        host = self._manager.restore(done, args=args).state
        # A copy, since jax may otherwise share NumPy's memory, which must not be donated.
        return jax.tree.map(lambda x: jnp.array(x, copy=True), host)

    def _check_layout(self, done: int, saved: dict[str, str], wanted: dict[str, str]) -> None:
        """Raises CheckpointError, naming arrays, unless a checkpoint has the wanted layout."""
        if saved == wanted:
            return
        differ = [f'{name}: {saved[name]}, not part of this run' for name in saved.keys() - wanted]
        differ += [f'{name}: missing there, {wanted[name]} here' for name in wanted.keys() - saved]
        differ += [
            f'{name}: {saved[name]} there, {wanted[name]} here'
            for name in saved.keys() & wanted.keys()
            if saved[name] != wanted[name]
        ]
        # Parameters first: they say more than what the optimiser derives from them.
        differ.sort(key=lambda text: ('/params/' not in text, text))
        more = f'; and {len(differ) - 8} more' if len(differ) > 8 else ''
        raise CheckpointError(
            f'the checkpoint of round {done} in {self.directory} was made by another config or '
            f'method; its arrays are not those of this run: {"; ".join(differ[:8])}{more}. '
            'Use the config that made it, or choose another --workdir.'
        )

    def _set_aside(self, done: int, error: Exception) -> str:
        """Renames a damaged checkpoint; returns the new name."""
        source = self.directory / str(done)
        names = (f'{done}.broken{number or ""}' for number in itertools.count())
        target = next(path for path in map(source.with_name, names) if not path.exists())
        # Under its own name it would count as one of the last, and stop its round from being saved.
        os.replace(source, target)
        self._manager.reload()
        logging.warning(
            'the checkpoint of round %d cannot be read (%s); it is set aside as %s, and the last '
            'complete one before it is used.',
            done,
            _reason(error),
            target,
        )
        return target.name


def _return_free_memory() -> None:
    """Returns freed memory to the system: glibc may keep what compilation freed for minutes."""
    with contextlib.suppress(AttributeError, OSError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


_TOGETHER = ocp.options.MultiprocessingOptions()


def _alone() -> ocp.options.MultiprocessingOptions:
    me = jax.process_index()
    return ocp.options.MultiprocessingOptions(
        primary_host=me, active_processes={me}, barrier_sync_key_prefix=f'process_{me}'
    )


def _reason(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def _quiet_orbax(record: Any) -> bool:
    """Whether a log record is shown: of orbax, only warnings and errors without a traceback.

    Orbax logs thirty lines per save at the level that absl's app shows.  The tracebacks come from
    its threads, whose errors are raised here and reported in our words.
    """
    important = record.levelname not in ('DEBUG', 'INFO') and not record.exc_info
    return important or 'orbax' not in record.pathname


def _layout(tree: Any) -> dict[str, str]:
    """Names, dtypes and shapes: ``{'student/params/conv1/kernel': 'float32[3,3,1,8]'}``."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {
        jax.tree_util.keystr(path, simple=True, separator='/'): (
            f'{np.dtype(leaf.dtype)}[{",".join(map(str, leaf.shape))}]'
        )
        for path, leaf in leaves
    }


def _file_sums(folder: Path) -> dict[str, list[int]]:
    """The size and CRC-32 of every file: orbax notices a truncated array, but no changed value."""
    sums = {}
    for path in sorted(folder.rglob('*')):
        if path.is_file() and path.name != FILES:
            data = path.read_bytes()
            sums[path.relative_to(folder).as_posix()] = [len(data), zlib.crc32(data)]
    return sums


def _check_files(folder: Path) -> bool:
    """Whether the folder has its list of files, and all are as they were saved.

    Raises ValueError naming a file that is not.
    """
    if not (folder / FILES).exists():
        return False
    saved, found = safe_read.read_json(folder / FILES), _file_sums(folder)
    for name, (size, crc) in saved.items():
        if name not in found:
            raise ValueError(f'{name} is missing')
        if found[name][0] != size:
            raise ValueError(f'{name} has {found[name][0]} bytes instead of {size}')
        if found[name][1] != crc:
            raise ValueError(f'{name} has changed since it was saved')
    return True
