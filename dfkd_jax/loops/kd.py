"""Ordinary distillation on real data: the reference for data-free distillation.

`--config=NAME:kd` trains as `python -m dfkd_jax.teach --role=kd` does, to the same weights, and
leaves the results of every run.  It is no `Method`, since a method takes a teacher, a state and a
key, but no images.

    workdir/distillation/  the training (`supervised.fit`): a model folder with its checkpoints
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from dfkd_jax import build, data, evaluate
from dfkd_jax.loops import supervised
from dfkd_jax.reporting import artifacts
from dfkd_jax.reporting.classes import Tested
from dfkd_jax.storage import model_folder

METHOD = 'kd'  # a method of the command line, and a role of `teach`


def prepare(config: Any) -> supervised.Training:
    """The training, checked before anything is trained.  Raises ConfigError and DataError."""
    build.check_numbers(config)
    steps = data.check(config.data, ('train', 'test')).train_size // config.teach.batch_size
    return supervised.prepare(config, 'teach', config.student.model, steps, distil=True)


def distil(
    config: Any,
    workdir: Path,
    training: supervised.Training,
    test: data.Dataset,
    teacher: dict[str, Any],
    interrupted: Callable[[], bool],
) -> dict[str, Any]:
    """Trains on the real training images; returns the summary.  Raises Stopped after saving."""
    plan, at = training.plan, workdir / 'distillation'
    on_devices = plan.replicate(teacher)
    module = build.make_classifier(
        config.teacher.model, config.data, config.dtype, checkpoint=config.teacher.checkpoint
    )
    of_teacher = evaluate.teacher(
        config, plan, module, on_devices, test, partial(build.stated_accuracy, config)
    )
    artifacts.warn(of_teacher.warnings)
    train = data.load(config.data, 'train')
    trained = supervised.fit(
        training, at, train, test, METHOD, config.seed, interrupted, on_devices
    )
    student = model_folder.load_model(at)[1]
    classify = evaluate.classifier(plan, training.whole, test.facts)
    predicted, label = classify(plan.replicate(student), test, config.eval_batch_size)
    images = config.teach.epochs * training.epoch_steps * config.teach.batch_size
    return artifacts.finish(
        workdir, config, test.facts, student, None, supervised.curves(at), unit='epochs',
        tested=Tested(label, predicted, of_teacher.predicted),
        **artifacts.scores(
            of_teacher.accuracy, trained['accuracy'], trained['best_accuracy'],
            evaluate.accuracy(predicted, of_teacher.predicted),
        ),
        best_round=trained['best_epoch'],
        seconds=trained['seconds'],
        rounds=config.teach.epochs,
        images_synthesised=0,
        images_distilled=images,
        teacher_queries=images,
        warnings=of_teacher.warnings,
    )  # fmt: skip
