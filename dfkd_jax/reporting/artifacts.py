"""What a finished run leaves in its workdir: the student, pictures, the page, ``summary.json``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dfkd_jax import data, port
from dfkd_jax.contract import Batch
from dfkd_jax.distributed import processes
from dfkd_jax.reporting import page
from dfkd_jax.storage import files, model_folder
from dfkd_jax.storage import workdir as folder

SUMMARY = 'summary.json'
SYNTHETIC = 'synthetic images held out from the student'  # what is measured on without real ones


def warn(warnings: Mapping[str, str]) -> None:
    """Prints warnings, each a sentence by its name: once, at the start of a run."""
    for name, text in warnings.items() if processes.first() else ():
        print(f'warning ({name}): {text}', flush=True)


def summary(config: Any, **measured: Any) -> dict[str, Any]:
    """The content of ``summary.json``: what ran, what was measured, on which device.

    measured: accuracies in per cent, seconds, numbers of images and of rounds.
    """
    return {
        'method': config.method,
        'teacher': config.teacher.model,
        'student': config.student.model,
        'dataset': config.data.name,
        'seed': config.seed,
        **measured,
        'device': folder.device(),
        'versions': folder.versions(),
        'config': files.plain(config),
    }


def scores(teacher: float | None, last: float, best: float, agreement: float) -> dict[str, Any]:
    """What was measured, for the summary; all in per cent.

    teacher: its accuracy; None: there were no real images, so that `last` and `best` are agreements
      on held-out synthetic ones, and accuracies are None.
    """
    if teacher is None:
        return {
            'measured_on': SYNTHETIC,
            'teacher_accuracy': None,
            'student_accuracy_last': None,
            'student_accuracy_best': None,
            'agreement_with_teacher': last,
            'agreement_with_teacher_best': best,
        }
    return {
        'teacher_accuracy': teacher,
        'student_accuracy_last': last,
        'student_accuracy_best': best,
        'agreement_with_teacher': agreement,
    }


def _said(found: Mapping[str, Any]) -> str:
    """The scores of a summary in a line."""
    if found['student_accuracy_last'] is None:
        return (
            f'agreement with the teacher on {SYNTHETIC}: last '
            f'{found["agreement_with_teacher"]:.2f} %, best '
            f'{found["agreement_with_teacher_best"]:.2f} % (no accuracy: there are no real images)'
        )
    return (
        f'last {found["student_accuracy_last"]:.2f} %, best '
        f'{found["student_accuracy_best"]:.2f} %, agreement with the teacher '
        f'{found["agreement_with_teacher"]:.2f} %'
    )


def finish(
    workdir: Path,
    config: Any,
    about: data.Facts,
    student: Any,
    samples: Batch | None,
    history: Mapping[str, np.ndarray],
    unit: str = 'rounds',
    **measured: Any,
) -> dict[str, Any]:
    """Writes what every finished run leaves, prints the result and returns the summary.

    about: the data set.
    student: its variables, on the host.
    samples: synthetic images to show, normalised; None if there are none.
    history: what `metrics.read` returns.
    unit: what its column ``round`` counts.
    measured: the numbers of the summary, and its `warnings`, if there are any.
    """
    found = summary(config, **measured)
    processes.by_first(
        lambda: leave(workdir, config, about, student, samples, history, found, unit)
    )
    print(
        f'student {config.student.model}: {_said(found)}, {found["seconds"]:.0f} s; see '
        f'{workdir / page.PAGE}',
        flush=True,
    )
    return found


def leave(
    workdir: Path,
    config: Any,
    about: data.Facts,
    student: Any,
    samples: Batch | None,
    history: Mapping[str, np.ndarray],
    summary: dict[str, Any],
    unit: str,
) -> None:
    """Writes the student in three formats, the pictures, the page and, last, ``summary.json``."""
    name, accuracy = config.student.model, summary['student_accuracy_last']
    measured = {'accuracy': accuracy}
    if accuracy is None:
        names = ('measured_on', 'agreement_with_teacher')
        measured = {each: summary[each] for each in names}
    files.save_arrays(workdir / 'student.safetensors', model_folder.flatten(student))
    files.save_arrays(workdir / 'student_torch.safetensors', port.to_torch(name, student))
    model_folder.save_classifier(
        workdir / 'student', name, student, config.data, **measured,
        method=config.method, teacher=config.teacher.model,
        **model_folder.preparation(config.data, about),
    )  # fmt: skip
    if samples is not None:
        pixels = np.asarray(data.denormalise(samples.image, about.mean, about.std))
        labels = np.asarray(samples.label)
        page.image_grid(pixels, labels, about.class_names or None, workdir / page.IMAGES)
    references = {} if accuracy is None else {'teacher': summary['teacher_accuracy']}
    title = page.ACCURACY if accuracy is not None else f'Agreement on {SYNTHETIC}'
    page.curves(history, workdir / page.CURVES, references, unit, title)
    page.page(workdir, summary)
    files.write_json(workdir / SUMMARY, summary)  # last: it marks the run as finished
