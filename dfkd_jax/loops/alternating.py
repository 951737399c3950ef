"""The one alternating loop: restore, rounds, log, evaluate, save, report.  It knows no method."""

from __future__ import annotations

import contextlib
import io
import itertools
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dfkd_jax import build, data, evaluate
from dfkd_jax.contract import Frozen
from dfkd_jax.distributed import processes
from dfkd_jax.errors import ConfigError
from dfkd_jax.loops import kd, offline, supervised
from dfkd_jax.loops.round import make_round
from dfkd_jax.reporting import artifacts, metrics
from dfkd_jax.reporting.progress import Progress
from dfkd_jax.storage import files
from dfkd_jax.storage import workdir as folder
from dfkd_jax.storage.checkpoints import Checkpoints

TABLE = 'labels.npy'  # the embeddings that a run began with, for the methods that have them


def run(config: Any, workdir: str | Path | None = None) -> dict[str, Any]:
    """Distils as `config` says, in `workdir`, from wherever the last run there stopped.

    Returns the summary, also written to ``summary.json``; ``{}`` for a run that was asked to stop
    (SIGTERM, Ctrl-C) and saved.  Raises one of `build.EXPECTED_ERRORS`: before anything is compiled
    where config, data or teacher do not fit, and when a loss stops being finite.
    """
    run = kd.prepare(config) if config.method == kd.METHOD else build.build(config)
    workdir = Path(processes.broadcast_from_first(str(workdir or folder.default(config))))
    test = data.load(config.data, 'test')
    with folder.claim(workdir, config), folder.Interruption() as interrupted:
        print(f'workdir {workdir}', flush=True)
        if processes.broadcast_from_first((workdir / artifacts.SUMMARY).exists()):
            print('the run there is finished; for another, choose another --workdir', flush=True)
            cure = 'Remove it: the same command writes it again.'
            return files.read_json(workdir / artifacts.SUMMARY, cure)
        teacher = find_teacher(config, workdir, interrupted)
        if not teacher:
            return {}
        if isinstance(run, supervised.Training):
            return kd.distil(config, workdir, run, test, teacher, interrupted)
        if 'prior' in config:
            return offline.distil(config, workdir, run, test, teacher, interrupted)
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
        if not supervised.run(config, path, 'teacher', interrupted):
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
    if not processes.broadcast_from_first(path.exists()):
        content = io.BytesIO()
        np.save(content, table)
        processes.by_first(lambda: files.write_bytes(path, content.getvalue()))
        # An encoder elsewhere may differ in its last bits: with several processes, all read it.
        if not processes.several():
            return table
    try:
        kept = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise ConfigError(
            f'{path}, with which this run began, cannot be read ({error}): put a copy back, or '
            'choose another --workdir.'
        ) from error
    if kept.shape != table.shape or not np.allclose(kept, table, atol=1e-3):
        raise ConfigError(
            f'config.labels gives other embeddings than {path}, with which this run began: restore '
            'the table, or choose another --workdir.'
        )
    return kept


def _distil(
    config: Any,
    workdir: Path,
    run: build.Run,
    test: Any,
    teacher: dict[str, Any],
    interrupted: Callable[[], bool],
) -> dict[str, Any]:
    frozen = run.plan.replicate(Frozen(teacher=teacher, extra=run.extra))
    classify = evaluate.classifier(run.plan, run.models.student, run.facts)
    by_teacher, label, teacher_accuracy = evaluate.teacher(
        config, run.plan, run.models.teacher, frozen.teacher, test
    )

    each = build.queries(config, run.models, frozen, config.phases)
    queries = list(itertools.accumulate(
        n for n, phase in zip(each, config.phases) for _ in range(phase.rounds)
    ))  # fmt: skip
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

    with Checkpoints(workdir / 'checkpoints', config.keep_checkpoints) as checkpoints:
        restored = checkpoints.restore(jax.eval_shape(run.whole.init, frozen, key_init))
        if restored is None:
            state = run.plan.call(run.whole.init)(frozen, key_init)
        else:
            done, state, progress = restored
            pending = progress.pop('pending')
            print(f'continuing after round {done} of {total}', flush=True)
        state = run.plan.replicate(state)
        started = time.monotonic() - progress['seconds']
        line = Progress(total, done)
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
                    pending = artifacts.finite(pending, done, _advice(workdir))
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
                    spent = {'seconds': progress['seconds'], 'teacher_queries': queries[done - 1]}
                    writer.write(done, spent | row)
                    images = _images(config, phases[:done])
                    line.update(done, row, progress | {'images_synthesised': sum(images)})
                    pending = []
                if save:
                    artifacts.check_weights(state, done, _advice(workdir))
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
    summary = artifacts.summary(
        config,
        teacher_accuracy=teacher_accuracy,
        student_accuracy_last=progress['last'],
        student_accuracy_best=progress['best'],
        best_round=progress['best_round'],
        agreement_with_teacher=progress['agreement'],
        seconds=round(progress['seconds'], 2),
        rounds=total,
        images_synthesised=synthesised,
        images_distilled=distilled,
        teacher_queries=queries[-1],
    )
    student, samples = jax.device_get((state.student.variables, samples))
    processes.by_first(
        lambda: artifacts.leave(
            workdir, config, run.facts, student, samples, metrics.read(workdir), summary
        )
    )
    print(
        f'student {config.student.model}: last {progress["last"]:.2f} %, best '
        f'{progress["best"]:.2f} %, agreement with the teacher {progress["agreement"]:.2f} %, '
        f'{progress["seconds"]:.0f} s; see {workdir / "report.html"}',
        flush=True,
    )
    return summary


def _images(config: Any, rounds: list[Any]) -> tuple[int, int]:
    """How many images passed through synthesis updates, and how many the student trained on."""
    synthesis = config.synthesis
    return (
        sum(phase.loops * phase.g_steps for phase in rounds) * synthesis.batch_size,
        sum(phase.s_steps for phase in rounds) * synthesis.student_batch_size,
    )


def _advice(workdir: Path) -> str:
    return (
        f'The last good checkpoint is kept in {workdir / "checkpoints"}. Lower config.student.lr '
        'or config.generator.lr (config.pixels.lr), or the weight of the term, in a new --workdir.'
    )
