"""The loops: what each kind of run does.  One session lets them all be killed and continued.

A config names its loop (`config.loop`).  A new kind of run is a module here and a row in `LOOPS`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from dfkd_jax import build, data
from dfkd_jax.distributed import processes
from dfkd_jax.errors import ConfigError, HostError
from dfkd_jax.loops import alternating, kd, offline, supervised
from dfkd_jax.loops.session import Stopped as Stopped
from dfkd_jax.reporting import artifacts
from dfkd_jax.storage import files
from dfkd_jax.storage import workdir as folder


class Loop(NamedTuple):
    """A kind of run that distils a student.

    prepare: ``config -> prepared``: checks the config and builds what it names, before anything is
      compiled.
    distil: ``(config, workdir, prepared, test images, teacher's variables, interrupted) ->
      summary``: the run, continued from where the last one in `workdir` stopped.  Without test
      images (None), agreement on synthetic ones takes the place of accuracy.
    """

    prepare: Callable[[Any], Any]
    distil: Callable[..., dict[str, Any]]


LOOPS = {
    'alternating': Loop(build.build, alternating.distil),
    'kd': Loop(kd.prepare, kd.distil),
    'offline': Loop(build.build, offline.distil),
}


def run(config: Any, workdir: str | Path | None = None) -> dict[str, Any]:
    """Distils as `config` says, in `workdir`, from where the last run there stopped.

    Returns the summary, which is also in ``summary.json``, or ``{}`` if the run was asked to stop
    (SIGTERM, Ctrl-C) and saved.  Raises a `UserError`: before anything is compiled if config, data
    or teacher do not fit, and later if a number is no longer finite.
    """
    if config.loop not in LOOPS:
        raise ConfigError(f'config.loop={config.loop!r}; expected one of {", ".join(LOOPS)}.')
    loop = LOOPS[config.loop]
    prepared = loop.prepare(config)
    place = files.expanded(processes.broadcast_from_first(str(workdir or folder.default(config))))
    facts = data.check(config.data)
    test = data.load(config.data, 'test') if facts.test_size else None
    _check_same(facts)
    with folder.claim(place, config), folder.Interruption() as interrupted:
        print(f'workdir {place}', flush=True)
        if processes.broadcast_from_first((place / artifacts.SUMMARY).exists()):
            print('the run there is finished; for another, choose another --workdir', flush=True)
            cure = 'Remove it: the same command writes it again.'
            return files.read_json(place / artifacts.SUMMARY, cure)
        folder.keep_inputs(place, data=data.identity(facts))
        try:
            teacher = find_teacher(config, place, interrupted)
            folder.keep_inputs(place, teacher=folder.digest(teacher))
            if test is None:
                instead = f'the agreement with the teacher on {artifacts.SYNTHETIC}'
                absent = data.absence(config.data)
                print(f'{absent}: no accuracy is measured, but {instead}', flush=True)
            return loop.distil(config, place, prepared, test, teacher, interrupted)
        except Stopped:
            return {}


def _check_same(facts: data.Facts) -> None:
    """Raises HostError unless all processes see the same data set, or none."""
    seen = processes.allgather(data.identity(facts))
    for number, other in enumerate(seen):
        if other != seen[0]:
            raise HostError(
                f'process {number} finds the data set {other}, and process 0 finds {seen[0]}: put '
                'the same data set where every host looks (config.data.data_dir).'
            )


def find_teacher(config: Any, workdir: Path, interrupted: Callable[[], bool]) -> dict[str, Any]:
    """The teacher's variables: given, or trained by the config's recipe into ``workdir/teacher``.

    Raises ConfigError if there is neither, DataError if there are no images to train one on, and
    Stopped if its training was asked to stop.
    """
    path = config.teacher.checkpoint
    if path is None:
        if not config.teacher.train:
            raise ConfigError(
                f'no teacher: set --config.teacher.checkpoint to a {config.teacher.model} trained '
                f'on {config.data.name or "your data"} (a file or folder of weights, or a whole '
                'network in a .pt2 or .onnx file: docs/teachers.md), or have one trained on the '
                'real data with --config.teacher.train=True.'
            )
        path = workdir / 'teacher'
        supervised.run(config, path, 'teacher', interrupted)
    return build.load_network(path, config.teacher.model, config.data)
