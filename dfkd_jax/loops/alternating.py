"""The alternating loop: batches of synthesis, then student steps, round by round.

It knows no method: `loops.round` makes a round of any.
"""

from __future__ import annotations

import io
import itertools
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from dfkd_jax import build, contract, data, evaluate, labels
from dfkd_jax.contract import Frozen, Phase, State
from dfkd_jax.distributed import processes
from dfkd_jax.errors import ConfigError
from dfkd_jax.loops import collapse, session
from dfkd_jax.loops.round import make_round
from dfkd_jax.reporting import artifacts, metrics
from dfkd_jax.reporting.classes import Tested
from dfkd_jax.storage import files

TABLE = 'labels.npy'  # the label embeddings that a run began with, if its method has any
HELD_OUT = 2**31 - 1  # of the seed's key: the child for held-out images; others have small numbers
# Per cent of the rounds, after which synthetic images are shown; those at the end are too.
SHOWN = (1, 10, 30)
ADVICE = (
    'Lower config.student.lr or config.generator.lr (config.pixels.lr), or the weight of the term, '
    'in a new --workdir.'
)


def distil(
    config: Any,
    workdir: Path,
    run: build.Run,
    test: data.Dataset | None,
    teacher: dict[str, Any],
    interrupted: Callable[[], bool],
) -> dict[str, Any]:
    """Runs all phases and leaves the results of every run.

    test: None: agreement is measured on held-out synthetic images, in place of accuracy.
    Returns the summary.  Raises Stopped, NonFiniteError, and ConfigError if the embeddings are not
    those that the run began with.
    """
    plan, models = run.plan, run.models
    frozen = plan.replicate(Frozen(teacher=teacher, extra=_kept(workdir, run.extra)))
    of_teacher = evaluate.teacher(
        config, plan, models.teacher, frozen.teacher, test, partial(build.stated_accuracy, config)
    )
    artifacts.warn(warnings := run.warnings | of_teacher.warnings)
    phases = [phase for phase in config.phases for _ in range(phase.rounds)]  # one per round
    queries = _queries(config, run, frozen)
    predict = _predictor(config, run, test) if test else None
    sample = plan.call(run.whole.sample)
    work = session.Work(
        plan=plan,
        total=len(phases),
        init=run.whole.init,
        inputs=(frozen, _keys(config).init),
        advance=_rounds(config, workdir, run, frozen, phases, sample),
        every=session.Every(
            config.log_every_rounds, config.eval_every_rounds, config.save_every_rounds
        ),
        measure=_measure(config, run, frozen, predict, of_teacher),
        score='student_accuracy' if test else 'agreement_with_teacher',
        subject='student' if test else 'agreement',
        totals=lambda done: {'teacher_queries': queries[done - 1]},
        images=lambda done: _images(config.synthesis, phases[:done])[0],
        advice=f'{session.kept(workdir)} {ADVICE}',
        signs=_signs(config, run, frozen),
        patience=config.collapse_patience,
        keep=config.keep_checkpoints,
    )
    state, record = session.run(work, workdir, interrupted)
    samples = sample(frozen, state, _keys(config).images)
    student, samples = jax.device_get((state.student.variables, samples))
    tested = Tested(*predict(state), of_teacher.predicted) if predict else None
    synthesised, distilled = _images(config.synthesis, phases)
    return artifacts.finish(
        workdir, config, run.facts, student, samples, metrics.read(workdir), tested=tested,
        **_scores(of_teacher, record), rounds=len(phases), images_synthesised=synthesised,
        images_distilled=distilled, teacher_queries=queries[-1], warnings=warnings,
        **_label_texts(config, run.facts),
    )  # fmt: skip


class _Keys(NamedTuple):
    init: jax.Array
    rounds: jax.Array
    images: jax.Array  # of the synthetic images that are shown


def _keys(config: Any) -> _Keys:
    return _Keys(*jax.random.split(jax.random.key(config.seed), 3))


def _rounds(
    config: Any,
    workdir: Path,
    run: build.Run,
    frozen: Frozen,
    phases: list[Phase],
    sample: Callable,
) -> Callable[[State, int], tuple[State, Any]]:
    """The rounds by number; after some of them, `SHOWN`, synthetic images are shown."""
    keys, warmup = _keys(config), len(contract.warmup(config.phases))
    shown = {max(1, len(phases) * share // 100) for share in SHOWN} - {len(phases)}

    @cache
    def round_of(at: int) -> Callable:
        return make_round(run.method, config.phases[at], run.plan, at < warmup)

    def advance(state: State, done: int) -> tuple[State, Any]:
        round_fn = round_of(config.phases.index(phases[done]))
        state, row = round_fn(frozen, state, jax.random.fold_in(keys.rounds, done))
        if done + 1 in shown:
            samples = jax.device_get(sample(frozen, state, keys.images))
            processes.by_first(lambda: artifacts.strip(workdir, done + 1, samples, run.facts))
        return state, row

    return advance


def _scores(of_teacher: evaluate.OfTeacher, record: session.Record) -> dict[str, Any]:
    """The results that a run measured, and how long it took."""
    agreement = record.measured['agreement_with_teacher']
    scores = artifacts.scores(of_teacher.accuracy, record.last, record.best, agreement)
    return scores | {'best_round': record.best_at, 'seconds': round(record.seconds, 2)}


def _label_texts(config: Any, facts: data.Facts) -> dict[str, str]:
    """What label embeddings are of where it is not what the config says; nothing elsewhere."""
    if 'labels' not in config:
        return {}
    known = config.data.name, facts.class_names, facts.num_classes
    settled = labels.settled(config.labels, *known)
    return {} if settled is config.labels else {'label_embeddings_of': build.unnamed(settled)}


def _signs(config: Any, run: build.Run, frozen: Frozen) -> Any:
    """Watches a generator that trains; None where there is none."""
    if not config.collapse_patience or 'generator' not in config:
        return None
    return collapse.watcher(run.plan, run.whole, frozen, config.seed)


Predict = Callable[[State], tuple[np.ndarray, np.ndarray]]


def _predictor(config: Any, run: build.Run, test: data.Dataset) -> Predict:
    """The true classes of the test images, and the student's; once for each round."""
    classify = evaluate.classifier(run.plan, run.models.student, run.facts)
    last: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def predict(state: State) -> tuple[np.ndarray, np.ndarray]:
        number = int(state.round)
        if number not in last:
            last.clear()
            predicted, label = classify(state.student.variables, test, config.eval_batch_size)
            last[number] = label, predicted
        return last[number]

    return predict


def _measure(
    config: Any,
    run: build.Run,
    frozen: Frozen,
    predict: Predict | None,
    of_teacher: evaluate.OfTeacher,
) -> Callable[[State], session.Row]:
    """Measures a state: the student on test images, whose classes serve nothing else."""
    if predict is None:
        return _measure_without_images(config, run, frozen)

    def measure(state: State) -> session.Row:
        label, predicted = predict(state)
        return {
            'student_accuracy': evaluate.accuracy(predicted, label),
            'agreement_with_teacher': evaluate.accuracy(predicted, of_teacher.predicted),
        }

    return measure


def _measure_without_images(
    config: Any, run: build.Run, frozen: Frozen
) -> Callable[[State], session.Row]:
    """Measures a state: the student's agreement with the teacher on held-out synthetic images.

    They are drawn with keys that nothing else uses, the same at every measurement.
    """
    draw = run.plan.call(run.whole.held_out or run.whole.sample)
    same = evaluate.on_synthetic(run.plan, run.models.teacher, run.models.student)
    key = jax.random.fold_in(jax.random.key(config.seed), HELD_OUT)
    batches = -(-evaluate.HELD_OUT // config.synthesis.student_batch_size)

    def measure(state: State) -> session.Row:
        agree = []
        for number in range(batches):
            batch = draw(frozen, state, jax.random.fold_in(key, number))
            images = np.asarray(batch.image)
            agree.append(same(frozen.teacher, state.student.variables, images))
        return {'agreement_with_teacher': 100 * float(np.mean(np.concatenate(agree)))}

    return measure


def _queries(config: Any, run: build.Run, frozen: Frozen) -> list[int]:
    """Images through the teacher so far, after each round."""
    each = build.queries(config, run.models, frozen, config.phases)
    rounds = [n for n, phase in zip(each, config.phases) for _ in range(phase.rounds)]
    return list(itertools.accumulate(rounds))


def _images(synthesis: Any, rounds: list[Phase]) -> tuple[int, int]:
    """How many images generator steps worked on, and how many the student trained on."""
    return (
        sum(phase.loops * phase.g_steps for phase in rounds) * synthesis.batch_size,
        sum(phase.s_steps for phase in rounds) * synthesis.student_batch_size,
    )


def _kept(workdir: Path, table: Any) -> Any:
    """The table of embeddings that the run in `workdir` began with; a new run stores `table`.

    An encoder may differ in its last bits on another machine, but a continued run must not.
    Raises ConfigError if the two tables differ by more.
    """
    path = workdir / TABLE
    if not np.size(table):  # the method has none
        return table
    if not processes.broadcast_from_first(path.exists()):
        content = io.BytesIO()
        np.save(content, table)
        processes.by_first(lambda: files.write_bytes(path, content.getvalue()))
        # Several processes all read the file, since their own encoders may differ.
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
