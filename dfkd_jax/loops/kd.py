"""Ordinary distillation on real data as a run: what data-free distillation is measured against.

`--config=FILE:kd` trains as `python -m dfkd_jax.teach --role=kd` does, to the same weights, and
leaves what every run leaves.  It is no `Method`: methods are functions of a teacher, a state and a
key, and images have no way into them.

    workdir/distillation/  the training (`teach.fit`): a model folder with its checkpoints
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from dfkd_jax import build, data, evaluate
from dfkd_jax.distributed import processes
from dfkd_jax.loops import supervised
from dfkd_jax.reporting import artifacts, metrics, page
from dfkd_jax.storage import model_folder

METHOD = 'kd'  # as a method of the command line, and as a role of `teach`


def prepare(config: Any) -> supervised.Training:
    """The training, checked before anything is trained.  Raises ConfigError and DataError."""
    build.check_numbers(config)
    steps = data.check(config.data).train_size // config.teach.batch_size
    return supervised.prepare(config, 'teach', config.student.model, steps, distil=True)


def distil(
    config: Any,
    workdir: Path,
    training: supervised.Training,
    test: data.Dataset,
    teacher: dict[str, Any],
    interrupted: Callable[[], bool],
) -> dict[str, Any]:
    """Trains on the real training images; returns the summary, ``{}`` when asked to stop."""
    plan, at = training.plan, workdir / 'distillation'
    on_devices = plan.replicate(teacher)
    module = build.make_classifier(config, config.teacher.model)
    by_teacher, _, teacher_accuracy = evaluate.teacher(config, plan, module, on_devices, test)
    train = data.load(config.data, 'train')
    facts = supervised.fit(training, config, at, train, test, METHOD, interrupted, on_devices)
    if not facts:
        return {}
    student = model_folder.load_model(at)[1]
    classify = evaluate.classifier(plan, training.whole, test.facts)
    predicted, _ = classify(plan.replicate(student), test, config.eval_batch_size)
    history = metrics.read(at)
    images = config.teach.epochs * training.epoch_steps * config.teach.batch_size
    summary = artifacts.summary(
        config,
        teacher_accuracy=teacher_accuracy,
        student_accuracy_last=facts['accuracy'],
        student_accuracy_best=facts['best_accuracy'],
        best_round=int(history['round'][np.nanargmax(history['test_accuracy'])]),
        agreement_with_teacher=evaluate.accuracy(predicted, by_teacher),
        seconds=facts['seconds'],
        rounds=config.teach.epochs,
        images_synthesised=0,
        images_distilled=images,
        teacher_queries=images,
    )
    curves = {'round': history['round'], 's/kd': history['loss']}
    curves['student_accuracy'] = history['test_accuracy']
    processes.by_first(
        lambda: artifacts.leave(
            workdir, config, test.facts, student, None, curves, summary, unit='epochs'
        )
    )
    print(
        f'student {config.student.model}: last {facts["accuracy"]:.2f} %, best '
        f'{facts["best_accuracy"]:.2f} %, agreement with the teacher '
        f'{summary["agreement_with_teacher"]:.2f} %, {facts["seconds"]:.0f} s; see '
        f'{workdir / page.PAGE}',
        flush=True,
    )
    return summary
