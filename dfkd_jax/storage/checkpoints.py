"""Checkpoints of a run (orbax), model folders (safetensors), and files that are whole or absent.

A run's state is saved whole and restored bit for bit; a process killed at any moment leaves the
last whole checkpoint readable.  What is on disk does not depend on devices: arrays are copied to
the host before saving and restored there, so a run may continue on another number of devices, and
a state may be donated as soon as `Checkpoints.save` returns.  Of several processes, which all have
the whole state, the first saves it; all read it, from the folder that they share.

A model folder holds one network's weights, a teacher's for instance: ``variables.safetensors``
(names like ``params/conv1/kernel``) and ``model.json`` (what the weights are).
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
FILES = 'files.json'  # in a checkpoint's folder
FORMAT = 2  # of a checkpoint: what its record says, and how its files are laid out


class Restored(NamedTuple):
    """What `Checkpoints.restore` found."""

    round: int
    state: Any  # same structure, shapes and dtypes as what was asked for
    progress: dict[str, Any]


class Checkpoints:
    """The last `keep` checkpoints under `directory`; use it as a context manager.

    >>> with Checkpoints(workdir / 'checkpoints') as checkpoints:
    ...     restored = checkpoints.restore(jax.eval_shape(make_state))
    ...     checkpoints.save(12, state, {'best_accuracy': 0.91})
    """

    def __init__(self, directory: str | os.PathLike[str], keep: int = 2):
        logging.get_absl_logger().addFilter(_quiet_orbax)
        self.directory = Path(directory).absolute()
        options = ocp.CheckpointManagerOptions(
            preservation_policy=ocp.checkpoint_managers.LatestN(keep),
            # What a process killed while saving left behind.
            cleanup_tmp_directories=processes.first(),
            # Synchronous: after `save` returns the state may be donated, and is on disk.
            enable_async_checkpointing=False,
            # Otherwise one unreadable step would fail the opening of the whole directory.
            lightweight_initialize=True,
            # By itself orbax would have all processes save and wait for one another; only what
            # `hosts` agrees on is done here, by this process alone.
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

    def save(self, round: int, state: Any, progress: Mapping[str, Any]) -> None:
        """Saves a state after `round` rounds, and the JSON-able facts that go with it.

        Returns when the checkpoint is whole on disk.  Saving a round again replaces nothing: the
        round is already there, and a run repeats its rounds bit for bit.
        Raises CheckpointError when a later round is already saved: the run was not resumed from it;
        and where it cannot be written, with the checkpoints before it as they were.
        """
        processes.by_first(lambda: self._save(round, state, progress))
        _give_back()

    def _save(self, round: int, state: Any, progress: Mapping[str, Any]) -> None:
        latest = self._manager.latest_step()
        if latest == round:
            return
        if latest is not None and latest > round:
            raise CheckpointError(
                f'cannot save round {round}: {self.directory} already holds round {latest}. '
                'Continue from it, or use another --workdir.'
            )
        host = jax.tree.map(np.asarray, jax.device_get(state))
        record = {'format': FORMAT, 'progress': dict(progress), 'layout': _layout(host)}
        args = ocp.args.Composite(
            state=ocp.args.StandardSave(host), record=ocp.args.JsonSave(record)
        )
        folder = self.directory / str(round)
        try:
            self._manager.save(round, args=args)
            # Orbax renamed a whole folder into place.  This tells later damage from what was saved;
            # a process killed before this line leaves a whole checkpoint without the list.
            write_json(folder / FILES, _file_sums(folder))
        except (OSError, RuntimeError, ValueError) as error:  # the disk's, as tensorstore tells it
            before = f'that of round {latest}' if latest is not None else 'none'
            raise CheckpointError(
                f'the checkpoint of round {round} cannot be written to {self.directory} '
                f'({_reason(error)}). The last whole one is {before}: make room there, or make it '
                'writable, and the same command continues.'
            ) from error

    def restore(self, like: T) -> Restored | None:
        """The newest whole checkpoint, or None if there is none.

        like: the state wanted, as arrays or shapes (``jax.eval_shape``).  The state comes back as
        device arrays of exactly this structure, these shapes and dtypes, with the bits saved.

        A checkpoint that cannot be read back is reported, set aside (``<round>.broken``) and the
        one before it is taken.  Raises CheckpointError for a whole checkpoint of another layout or
        another version's, which stays, and where there are checkpoints but none can be read.
        """
        found = processes.by_first(lambda: self._newest(like))
        step = processes.broadcast_from_first(found.round if found else None)
        if step is None or processes.first():
            return found
        try:
            state, record = self._state(step, like), self._record(step)
        except Exception as error:  # of orbax or tensorstore
            raise HostError(
                f'{processes.name()} cannot read {self.directory / str(step)}, which process 0 '
                f'reads ({_reason(error)}): put --workdir where all hosts see one folder.'
            ) from error
        return Restored(step, state, record['progress'])

    def _newest(self, like: T) -> Restored | None:
        broken = []
        for step in sorted(self._manager.all_steps(), reverse=True):
            intact = False
            try:
                # First, since a read that fails inside orbax floods the terminal with tracebacks.
                intact = _check_files(self.directory / str(step))
                record = self._record(step)
                if record.get('format', 1) != FORMAT:
                    raise ValueError(f'its format is {record["format"]}, here {FORMAT}')
                self._check_layout(step, record['layout'], _layout(like))
                state = self._state(step, like)
            except CheckpointError:
                raise
            except Exception as error:  # whatever the damage provokes in orbax or tensorstore
                if intact:
                    raise CheckpointError(
                        f'the checkpoint of round {step} in {self.directory} has all the bytes '
                        f'that were saved, and cannot be read ({_reason(error)}): another version '
                        'of dfkd_jax made it. Continue with that one, or choose another --workdir.'
                    ) from error
                broken.append(self._set_aside(step, error))
            else:
                return Restored(step, state, record['progress'])
        if broken:
            raise CheckpointError(
                f'no checkpoint in {self.directory} can be read; they are kept there as '
                f'{", ".join(broken)}. Put back a whole copy of one to continue from it, or start '
                'again with the same command to begin anew.'
            )
        return None

    def _record(self, step: int) -> Any:
        args = ocp.args.Composite(record=ocp.args.JsonRestore())
        return self._manager.restore(step, args=args).record

    def _state(self, step: int, like: T) -> T:
        # Zeros broadcast from one scalar: the shapes cost no memory.
        empty = jax.tree.map(lambda x: np.broadcast_to(np.zeros((), x.dtype), x.shape), like)
        args = ocp.args.Composite(state=ocp.args.StandardRestore(empty))
        host = self._manager.restore(step, args=args).state
        # A copy, since jax may otherwise share numpy's memory, which must not be donated.
        return jax.tree.map(lambda x: jnp.array(x, copy=True), host)

    def _check_layout(self, step: int, saved: dict[str, str], wanted: dict[str, str]) -> None:
        if saved == wanted:
            return
        lines = [f'  {name}: {saved[name]}, not part of this run' for name in saved.keys() - wanted]
        lines += [f'  {name}: missing there, {wanted[name]} here' for name in wanted.keys() - saved]
        lines += [
            f'  {name}: {saved[name]} there, {wanted[name]} here'
            for name in saved.keys() & wanted.keys()
            if saved[name] != wanted[name]
        ]
        lines.sort(key=lambda line: ('/params/' not in line, line))  # the telling ones first
        more = f'\n  ... and {len(lines) - 8} more' if len(lines) > 8 else ''
        raise CheckpointError(
            f'the checkpoint of round {step} in {self.directory} was made by another config '
            'or method; its arrays are not those of this run:\n'
            + '\n'.join(lines[:8])
            + more
            + '\nRun it with the config it was made with, or choose another --workdir.'
        )

    def _set_aside(self, step: int, error: Exception) -> str:
        source = self.directory / str(step)
        names = (f'{step}.broken{number or ""}' for number in itertools.count())
        target = next(path for path in map(source.with_name, names) if not path.exists())
        # Out of the way, since it would count as one of the last, and its round is saved anew.
        os.replace(source, target)
        self._manager.reload()
        logging.warning(
            'the checkpoint of round %d cannot be read (%s); it is set aside as %s, and the last '
            'whole one before it is used.',
            step,
            _reason(error),
            target,
        )
        return target.name


def _give_back() -> None:
    """Hands free memory back to the system: glibc may keep what compiling freed for minutes."""
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
    """Orbax tells thirty lines of a save at the info level that absl's app shows.

    And tracebacks of its threads, whose errors are raised to us and told by us.
    """
    told = record.levelname not in ('DEBUG', 'INFO') and not record.exc_info
    return told or 'orbax' not in record.pathname


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
    """Size and CRC-32 of every file: orbax notices a truncated array, not a changed value."""
    sums = {}
    for path in sorted(folder.rglob('*')):
        if path.is_file() and path.name != FILES:
            data = path.read_bytes()
            sums[path.relative_to(folder).as_posix()] = [len(data), zlib.crc32(data)]
    return sums


def _check_files(folder: Path) -> bool:
    """Whether all files are known to be as they were saved.  Raises ValueError if one is not."""
    if not (folder / FILES).exists():
        return False
    saved, found = safe_read.read_json(folder / FILES), _file_sums(folder)
    for name, (size, crc) in saved.items():
        if name not in found:
            raise ValueError(f'{name} is missing')
        if found[name][0] != size:
            raise ValueError(f'{name} has {found[name][0]} bytes instead of {size}')
        if found[name][1] != crc:
            raise ValueError(f'{name} is not what was saved')
    return True
