"""Forks runs from one process that has imported everything, so that a start takes no seconds.

    python tests/launcher.py

reads requests, a line of JSON each, and answers with the process id, then with the exit status (of
a signal: its negative number).  The forked process is the command itself, ``python -m MODULE``, but
for what the request plants in it:

    module, argv  what runs
    log           where its output goes, appended
    jax           fields of jax.config
    marks         two named pipes: before it enters a phase, the run writes the phase's name to the
                  first and waits for a byte from the second, so that another process may hurt it
                  there; [] for an undisturbed run
    plant         {'poison': [part of the state, round], 'clock': seconds that it jumps,
                  'lazy': true, to read data as it is used,
                  'file_size': the save from which on files stay below 1 kB}

JAX forbids forks once it runs; this process never runs it.
"""

from __future__ import annotations

import json
import os
import resource
import runpy
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import tensorboardX  # noqa: F401, and the next: what a run imports in its functions
import tensorflow_datasets  # noqa: F401
from sklearn import model_selection  # noqa: F401

from dfkd_jax import build, data, evaluate
from dfkd_jax.data import synthetic
from dfkd_jax.loops import alternating, round
from dfkd_jax.reporting import artifacts
from dfkd_jax.storage import checkpoints


def serve() -> None:
    for line in sys.stdin:
        request = json.loads(line)
        child = os.fork()
        if not child:
            os._exit(run(request))
        print(child, flush=True)
        status = os.waitpid(child, 0)[1]
        print(os.waitstatus_to_exitcode(status), flush=True)


def run(request: dict[str, Any]) -> int:
    """What the forked process does; returns its status."""
    log = os.open(request['log'], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for number in (1, 2):
        os.dup2(log, number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for name, value in request['jax'].items():
        jax.config.update(name, value)
    if request['marks']:
        told, asked = (os.open(path, os.O_RDWR) for path in request['marks'])

        def mark(phase: str) -> None:
            os.write(told, f'{phase}\n'.encode())
            os.read(asked, 1)

        plant_marks(mark)
    plant(**request['plant'])
    sys.argv = [request['module'], *request['argv']]
    status = 0
    try:
        runpy.run_module(request['module'], run_name='__main__', alter_sys=True)
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else int(error.code is not None)
        if isinstance(error.code, str):
            print(error.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    return status


def before(owner: Any, name: str, act: Callable[[], None]) -> None:
    """Acts before every call of a function."""
    function = getattr(owner, name)

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        act()
        return function(*args, **kwargs)

    setattr(owner, name, wrapped)


def plant_marks(mark: Callable[[str], None]) -> None:
    before(jax._src.compiler, 'compile_or_get_cached', lambda: mark('compile'))
    before(checkpoints.Checkpoints, 'save', lambda: mark('checkpoint write'))
    before(synthetic, 'write', lambda: mark('bank write'))
    before(artifacts, 'leave', lambda: mark('results'))
    steps, over, make_plan = round._steps, evaluate.over, build.make_plan

    def marked(step: Any, phase: str) -> Any:
        if step is round.unchanged:
            return step

        def call(*args: Any) -> Any:
            mark(phase)
            return step(*args)

        return call

    def marked_steps(*args: Any) -> Any:
        *synthesis, distillation = steps(*args)
        made = [marked(step, 'synthesis') for step in synthesis]
        return (*made, marked(distillation, 'distillation'))

    def planned(config: Any) -> Any:
        plan = make_plan(config)

        def compiled(step: Any) -> Any:
            done = plan.compile_rows(step)
            return marked(done, 'training') if 'make_step' in step.__qualname__ else done

        return plan._replace(compile_rows=compiled)

    # Where `teach` is the command, its own functions are not those of the module.
    round._steps, build.make_plan = marked_steps, planned
    evaluate.over = lambda *args: marked(over(*args), 'evaluation')


def plant(poison: Any = None, clock: float = 0.0, lazy: bool = False, file_size: int = 0) -> None:
    if file_size:
        saves = iter(range(file_size - 1))

        def limit() -> None:
            if next(saves, None) is None:
                resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))

        before(checkpoints.Checkpoints, 'save', limit)
    if poison:
        name, number = poison
        make_round = alternating.make_round

        def poisoned(*args: Any) -> Any:
            round_fn = make_round(*args)

            def call(frozen: Any, state: Any, key: Any) -> Any:
                if int(state.round) == number:
                    state = spoilt(state, name)
                return round_fn(frozen, state, key)

            return call

        alternating.make_round = poisoned
    if clock:
        now, calls = time.time, 0

        def jumping() -> float:
            nonlocal calls
            calls += 1
            return now() + clock * (calls % 2)

        time.time = jumping
    if lazy:
        load = data.load
        data.load = lambda config, split: load(config, split, in_memory_bytes=0)


def spoilt(state: Any, name: str) -> Any:
    """The state with NaN in the floats of a part of it: 'student/params', say."""

    def spoil(path: Any, x: Any) -> Any:
        at = jax.tree_util.keystr(path, simple=True, separator='/')
        floats = jnp.issubdtype(x.dtype, jnp.floating)
        return x * jnp.nan if floats and at.startswith(name) else x

    return jax.tree_util.tree_map_with_path(spoil, state)


if __name__ == '__main__':
    serve()
