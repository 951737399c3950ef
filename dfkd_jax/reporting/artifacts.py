"""What a finished run leaves in its workdir: the student, pictures, the page, ``summary.json``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dfkd_jax import data, port
from dfkd_jax.contract import Batch
from dfkd_jax.distributed import processes
from dfkd_jax.errors import UserError
from dfkd_jax.port import weight_files
from dfkd_jax.reporting import classes, model_card, page, pictures
from dfkd_jax.reporting.classes import Tested
from dfkd_jax.storage import files, model_folder
from dfkd_jax.storage import workdir as folder

SUMMARY = 'summary.json'
SYNTHETIC = 'synthetic images held out from the student'  # what is measured on without real ones


def warn(warnings: Mapping[str, str]) -> None:
    """Prints warnings, each a sentence by its name: once, at the start of a run."""
    for name, text in warnings.items() if processes.first() else ():
        print(f'warning ({name}): {text}', flush=True)


def of_classes(found: classes.ByClass | None) -> dict[str, str]:
    """A warning, by its name, where the student does not know classes that its teacher knows."""
    lost = classes.collapsed(found) if found else []
    if not lost:
        return {}
    more = f' and {len(lost) - 10} more' if len(lost) > 10 else ''
    return {
        'collapsed_classes': (
            f'the student knows hardly any image of {", ".join(lost[:10])}{more}, which the '
            'teacher knows: look at the synthetic images of these classes.'
        )
    }


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
    tested: Tested | None = None,
    **measured: Any,
) -> dict[str, Any]:
    """Writes what every finished run leaves, prints the result and returns the summary.

    about: the data set.
    student: its variables, on the host.
    samples: synthetic images to show, normalised; None if there are none.
    history: what `metrics.read` returns.
    unit: what its column ``round`` counts.
    tested: classes of the test images, if there are any.
    measured: the numbers of the summary, and its `warnings`, if there are any.
    """
    by_class = tested and classes.by_class(tested, about.num_classes, about.class_names)
    lost = of_classes(by_class)
    warn(lost)
    measured['warnings'] = {**measured.get('warnings', {}), **lost}
    found = summary(config, **measured)
    processes.by_first(
        lambda: leave(workdir, config, about, student, samples, history, found, unit, by_class)
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
    by_class: classes.ByClass | None = None,
) -> None:
    """Writes the student, the tables, the pictures, the page and, last, ``summary.json``."""
    name, accuracy = config.student.model, summary['student_accuracy_last']
    measured = {'accuracy': accuracy}
    if accuracy is None:
        names = ('measured_on', 'agreement_with_teacher')
        measured = {each: summary[each] for each in names}
    files.save_arrays(workdir / 'student.safetensors', model_folder.flatten(student))
    files.save_arrays(workdir / 'student_torch.safetensors', port.to_torch(name, student))
    model_folder.save_classifier(
        workdir / 'student', name, student, config.data, **measured,
        method=config.method, seed=config.seed, **_origin(workdir, config, summary),
        **model_folder.preparation(config.data, about),
    )  # fmt: skip
    model_card.write(workdir / 'student')
    if by_class:
        classes.write(workdir, by_class)
    if samples is not None:
        pixels = np.asarray(data.denormalise(samples.image, about.mean, about.std))
        labels = np.asarray(samples.label)
        pictures.image_grid(pixels, labels, about.class_names or None, workdir / pictures.IMAGES)
    references = {} if accuracy is None else {'teacher': summary['teacher_accuracy']}
    title = pictures.ACCURACY if accuracy is not None else f'Agreement on {SYNTHETIC}'
    pictures.curves(history, workdir / pictures.CURVES, references, unit, title)
    page.page(page.Run(workdir, summary, history, unit))
    files.write_json(workdir / SUMMARY, summary)  # last: it marks the run as finished


def _origin(workdir: Path, config: Any, summary: Mapping[str, Any]) -> dict[str, Any]:
    """Entries of the student's card: its teacher, and what it learnt from."""
    given = config.teacher.checkpoint
    place = files.expanded(given) if given else workdir / 'teacher'
    found: dict[str, Any] = {'teacher': config.teacher.model, 'teacher_file': place.name}
    try:
        weights = place / model_folder.VARIABLES
        found['teacher_sha256'] = weight_files.digest(weights if weights.is_file() else place)
        found['teacher_accuracy_stated'] = port.accuracy_in(place)
    except (UserError, OSError):  # it has moved since the run began, or states nothing
        pass
    if summary['teacher_accuracy'] is not None:
        found['teacher_accuracy'] = summary['teacher_accuracy']
    labels_of = summary.get('label_embeddings_of', '')
    return {**found, 'saw': model_card.saw(config, summary.get('prior'), labels_of)}


def strip(workdir: Path, done: int, samples: Batch, about: data.Facts) -> None:
    """Writes a picture of the synthetic images after `done` rounds, for the page."""
    pixels = np.asarray(data.denormalise(samples.image, about.mean, about.std))
    path = workdir / page.PROGRESS / f'{done:08d}.png'
    pictures.strip(pixels, np.asarray(samples.label), path)
