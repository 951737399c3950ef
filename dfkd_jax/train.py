"""The one alternating loop: restore, rounds, log, evaluate, save, report.  It knows no method."""

from __future__ import annotations

import contextlib
import io
import json
import math
import time
from collections.abc import Callable
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dfkd_jax import build, checkpoint, data, evaluate, metrics, parallel, port, report, teach
from dfkd_jax import workdir as folder
from dfkd_jax.contract import ConfigError, Frozen, Method, NonFiniteError, State, unchanged

SUMMARY = 'summary.json'
TABLE = 'labels.npy'  # the embeddings that a run began with, for the methods that have them


def run(config: Any, workdir: str | Path | None = None) -> dict[str, Any]:
    """Distils as `config` says, in `workdir`, from wherever the last run there stopped.

    Returns the summary, also written to ``summary.json``; ``{}`` for a run that was asked to stop
    (SIGTERM, Ctrl-C) and saved.  Raises one of `build.EXPECTED_ERRORS`: before anything is compiled
    where config, data or teacher do not fit, and when a loss stops being finite.
    """
    run = build.build(config)
    workdir = Path(workdir or folder.default(config))
    test = data.load(config.data, 'test')
    folder.claim(workdir, config)
    print(f'workdir {workdir}', flush=True)
    if (workdir / SUMMARY).exists():
        print('the run there is finished; for another, choose another --workdir', flush=True)
        return json.loads((workdir / SUMMARY).read_text())
    with folder.Interruption() as interrupted:
        teacher = find_teacher(config, workdir, interrupted)
        if not teacher:
            return {}
        # Not before: a folder with nothing but a config can be given another.
        run = run._replace(extra=_kept(workdir, run.extra))
        return _distil(config, workdir, run, test, teacher, interrupted)


def find_teacher(config: Any, workdir: Path, interrupted: Callable[[], bool]) -> dict[str, Any]:
    """The teacher's variables: given, or trained from the config's recipe into ``workdir/teacher``.

    Returns ``{}`` when asked to stop while training it.
    """
    path = config.teacher.checkpoint
    if path is None:
        if not config.teacher.train:
            raise ConfigError(
                f'no teacher: set --config.teacher.checkpoint to a {config.teacher.model} trained '
                f'on {config.data.name} (.pth, .pt, .safetensors, .npz or a model folder), or have '
                'one trained on the real data with --config.teacher.train=True.'
            )
        path = workdir / 'teacher'
        if not teach.run(config, path, 'teacher', interrupted):
            return {}
    return build.load_network(path, config.teacher.model, config)


def _kept(workdir: Path, table: Any) -> Any:
    """The table of embeddings that the run in `workdir` began with; a new run keeps `table` there.

    An encoder on another machine may differ in its last bits, and a continued run must not.
    Raises ConfigError where the two are different tables.
    """
    path = workdir / TABLE
    if not np.size(table):  # a method without
        return table
    if not path.exists():
        content = io.BytesIO()
        np.save(content, table)
        checkpoint.write_bytes(path, content.getvalue())
        return table
    kept = np.load(path, allow_pickle=False)
    if kept.shape != table.shape or not np.allclose(kept, table, atol=1e-3):
        raise ConfigError(
            f'config.labels gives other embeddings than {path}, with which this run began: restore '
            'the table, or choose another --workdir.'
        )
    return kept


def make_round(method: Method, phase: Any, plan: parallel.Plan) -> Callable:
    """One alternation, ``(frozen, state, key) -> (state, metrics)``.

    `phase.loops` batches of synthesis, then `phase.s_steps` updates of the student: one compiled
    program where the plan fuses, else compiled steps called one by one, with the same keys.
    """

    begin, generator_step, finish, student_step = _steps(method, plan)

    def repeat(step: Callable, frozen: Any, state: State, key: Any, times: int) -> Any:
        times = 0 if step is unchanged else times
        return parallel.repeat(step, frozen, state, key, times, plan.fused)

    def synthesis(frozen: Any, state: State, inputs: Any) -> Any:
        key_begin, key_step, key_finish = jax.random.split(jax.random.fold_in(*inputs), 3)
        state, first = repeat(begin, frozen, state, key_begin, 1)
        state, steps = repeat(generator_step, frozen, state, key_step, phase.g_steps)
        state, last = repeat(finish, frozen, state, key_finish, 1)
        return state, first | steps | last

    def round_fn(frozen: Any, state: State, key: Any) -> Any:
        key_synthesis, key_student = jax.random.split(key)
        state, made = repeat(synthesis, frozen, state, key_synthesis, phase.loops)
        state, learnt = repeat(student_step, frozen, state, key_student, phase.s_steps)
        return state.replace(round=state.round + 1), made | learnt

    return plan.compile(round_fn) if plan.fused else round_fn


@lru_cache(maxsize=1)  # the phases of a run share their steps: compiled once for all of them
def _steps(method: Method, plan: parallel.Plan) -> tuple[Callable, ...]:
    """The steps of a batch in their order, numbered; compiled where a round is no program."""

    def prepare(step: Callable) -> Callable:
        numbered = parallel.numbered(step)
        return numbered if plan.fused else plan.compile(numbered)

    steps = (method.begin, method.generator_step, method.finish, method.student_step)
    return tuple(unchanged if step is unchanged else prepare(step) for step in steps)


def _distil(
    config: Any,
    workdir: Path,
    run: build.Run,
    test: Any,
    teacher: dict[str, Any],
    interrupted: Callable[[], bool],
) -> dict[str, Any]:
    frozen = run.plan.replicate(Frozen(teacher=teacher, extra=run.extra))
    classify_teacher = evaluate.classifier(run.plan, run.models.teacher, run.facts)
    classify = evaluate.classifier(run.plan, run.models.student, run.facts)
    # First of all, so that a wrong port or normalisation shows within seconds.
    by_teacher, label = classify_teacher(frozen.teacher, test, config.eval_batch_size)
    teacher_accuracy = evaluate.accuracy(by_teacher, label)
    print(
        f'teacher {config.teacher.model}: {teacher_accuracy:.2f} % of the {test.size} test '
        f'images of {config.data.name}',
        flush=True,
    )

    key_init, key_rounds, key_images = jax.random.split(jax.random.key(config.seed), 3)
    phases = [phase for phase in config.phases for _ in range(phase.rounds)]  # one for each round
    total = len(phases)
    round_of = cache(lambda index: make_round(run.method, config.phases[index], run.plan))
    progress: dict[str, Any] = {
        'best': 0.0,
        'best_round': 0,
        'last': 0.0,
        'agreement': 0.0,
        'seconds': 0.0,
    }
    # Rounds finished, and the metrics of those since the last row of metrics.csv.
    done, stop = 0, False
    pending: list[Any] = []

    with checkpoint.Checkpoints(workdir / 'checkpoints', config.keep_checkpoints) as checkpoints:
        restored = checkpoints.restore(jax.eval_shape(run.whole.init, frozen, key_init))
        if restored is None:
            state = run.plan.call(run.whole.init)(frozen, key_init)
        else:
            done, state, progress = restored
            pending = progress.pop('pending')
            print(f'continuing after round {done} of {total}', flush=True)
        state = run.plan.replicate(state)
        started = time.monotonic() - progress['seconds']
        line = metrics.Progress(total, done)
        with metrics.Writer(workdir, done) as writer, contextlib.closing(line):
            while done < total and not stop:
                phase = phases[done]
                round_fn = round_of(config.phases.index(phase))
                state, row = round_fn(frozen, state, jax.random.fold_in(key_rounds, done))
                done += 1
                pending.append(row)

                stop = interrupted()
                measure = done == total or done % config.eval_every_rounds == 0
                log = measure or done % config.log_every_rounds == 0
                save = stop or done == total or done % config.save_every_rounds == 0
                if log or save:
                    pending = _finite(pending, done, workdir)
                    progress['seconds'] = time.monotonic() - started
                if measure:
                    predicted, _ = classify(state.student.variables, test, config.eval_batch_size)
                    progress['last'] = evaluate.accuracy(predicted, label)
                    progress['agreement'] = evaluate.accuracy(predicted, by_teacher)
                    if progress['last'] > progress['best']:
                        progress |= {'best': progress['last'], 'best_round': done}
                if log:
                    row = {name: float(np.mean([r[name] for r in pending])) for name in pending[0]}
                    if measure:
                        row['student_accuracy'] = progress['last']
                        row['agreement_with_teacher'] = progress['agreement']
                    writer.write(done, {'seconds': progress['seconds'], **row})
                    images = _images(config, phases[:done])
                    line.update(done, row, progress | {'images_synthesised': sum(images)})
                    pending = []
                if save:
                    _check_weights(state, done, workdir)
                    checkpoints.save(done, state, progress | {'pending': pending})
    if done < total:
        print(
            f'stopped and saved after round {done} of {total}; continue with the same command and '
            f'--workdir={workdir}',
            flush=True,
        )
        return {}

    samples = run.plan.call(run.whole.sample)(frozen, state, key_images)
    synthesised, distilled = _images(config, phases)
    summary = {
        'method': config.method,
        'teacher': config.teacher.model,
        'student': config.student.model,
        'dataset': config.data.name,
        'seed': config.seed,
        'teacher_accuracy': teacher_accuracy,
        'student_accuracy_last': progress['last'],
        'student_accuracy_best': progress['best'],
        'best_round': progress['best_round'],
        'agreement_with_teacher': progress['agreement'],
        'seconds': round(progress['seconds'], 2),
        'rounds': total,
        'images_synthesised': synthesised,
        'images_distilled': distilled,
        'device': folder.device(),
        'versions': folder.versions(),
        'config': checkpoint.plain(config),
    }
    _leave(workdir, config, run, jax.device_get(state.student.variables), samples, summary)
    print(
        f'student {config.student.model}: last {progress["last"]:.2f} %, best '
        f'{progress["best"]:.2f} %, agreement with the teacher {progress["agreement"]:.2f} %, '
        f'{progress["seconds"]:.0f} s; see {workdir / "report.html"}',
        flush=True,
    )
    return summary


def _leave(
    workdir: Path, config: Any, run: build.Run, student: Any, samples: Any, summary: dict[str, Any]
) -> None:
    """What a finished run leaves beside its checkpoints and metrics."""
    name, accuracy = config.student.model, summary['student_accuracy_last']
    checkpoint.save_arrays(workdir / 'student.safetensors', checkpoint.flatten(student))
    checkpoint.save_arrays(workdir / 'student_torch.safetensors', port.to_torch(name, student))
    build.save_network(workdir / 'student', name, student, config, accuracy=accuracy)
    pixels = np.asarray(data.denormalise(samples.image, run.facts.mean, run.facts.std))
    labels = np.asarray(samples.label)
    report.image_grid(pixels, labels, run.facts.class_names, workdir / 'images.png')
    report.curves(
        metrics.read(workdir), workdir / 'curves.png', {'teacher': summary['teacher_accuracy']}
    )
    report.page(workdir, summary)
    checkpoint.write_json(workdir / SUMMARY, summary)  # last: with it, a run is finished


def _images(config: Any, rounds: list[Any]) -> tuple[int, int]:
    """How many images passed through synthesis updates, and how many the student trained on."""
    synthesis = config.synthesis
    return (
        sum(phase.loops * phase.g_steps for phase in rounds) * synthesis.batch_size,
        sum(phase.s_steps for phase in rounds) * synthesis.student_batch_size,
    )


def _finite(rows: list[Any], done: int, workdir: Path) -> list[dict[str, float]]:
    """Waits for the rounds up to `done`: their metrics, on the host.

    Raises NonFiniteError naming the first round and metric that are not finite.
    """
    rows = jax.device_get(rows)
    for number, row in enumerate(rows, start=done - len(rows) + 1):
        for name, value in row.items():
            if not math.isfinite(value):
                raise _diverged(f'{name} is {value} at round {number}', workdir)
    return [{name: float(value) for name, value in row.items()} for row in rows]


def _check_weights(state: State, done: int, workdir: Path) -> None:
    """Raises NonFiniteError naming the first array of a state that is not finite.

    A round's last update can spoil the weights after its losses were still finite.
    """
    for path, x in jax.tree_util.tree_leaves_with_path(jax.device_get(state)):
        if not np.all(np.isfinite(x)):
            name = jax.tree_util.keystr(path, simple=True, separator='/')
            raise _diverged(f'{name} is not finite after round {done}', workdir)


def _diverged(what: str, workdir: Path) -> NonFiniteError:
    return NonFiniteError(
        f'{what}. The last good checkpoint is kept in {workdir / "checkpoints"}. Lower '
        'config.student.lr or config.generator.lr, or the weight of the term, in a new --workdir.'
    )
