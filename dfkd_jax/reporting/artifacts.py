"""What a run leaves behind, and how it ends when a loss stops being finite."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dfkd_jax import build, data, port
from dfkd_jax.contract import Batch
from dfkd_jax.errors import NonFiniteError
from dfkd_jax.reporting import page
from dfkd_jax.storage import files, model_folder
from dfkd_jax.storage import workdir as folder

SUMMARY = 'summary.json'


def summary(config: Any, **measured: Any) -> dict[str, Any]:
    """What ``summary.json`` holds: what ran, what was `measured`, where and by which versions."""
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


def leave(
    workdir: Path,
    config: Any,
    facts: data.Facts,
    student: Any,
    samples: Batch | None,
    history: Mapping[str, np.ndarray],
    summary: dict[str, Any],
    unit: str = 'rounds',
) -> None:
    """Writes the student in three formats, pictures, the page and, last, ``summary.json``.

    student: its variables, on the host.  samples: synthetic images to show; None: there are none.
    history: what `metrics.read` returns; a row is a `unit`.
    """
    name, accuracy = config.student.model, summary['student_accuracy_last']
    files.save_arrays(workdir / 'student.safetensors', model_folder.flatten(student))
    files.save_arrays(workdir / 'student_torch.safetensors', port.to_torch(name, student))
    build.save_network(workdir / 'student', name, student, config, accuracy=accuracy)
    if samples is not None:
        pixels = np.asarray(data.denormalise(samples.image, facts.mean, facts.std))
        labels = np.asarray(samples.label)
        page.image_grid(pixels, labels, facts.class_names, workdir / page.IMAGES)
    references = {'teacher': summary['teacher_accuracy']}
    page.curves(history, workdir / page.CURVES, references, unit)
    page.page(workdir, summary)
    files.write_json(workdir / SUMMARY, summary)  # with it, a run is finished


def check_weights(state: Any, done: int, advice: str, unit: str = 'round') -> None:
    """Raises NonFiniteError naming the first array of a state that is not finite.

    A round's last update can spoil the weights after its losses were still finite.
    """
    for path, x in jax.tree_util.tree_leaves_with_path(jax.device_get(state)):
        if not np.all(np.isfinite(x)):
            name = jax.tree_util.keystr(path, simple=True, separator='/')
            raise NonFiniteError(f'{name} is not finite after {unit} {done}. {advice}')


def finite(rows: list[Any], done: int, advice: str) -> list[dict[str, float]]:
    """Waits for the rounds up to `done`: their metrics, on the host.

    advice: what to do if they diverged.

    Raises NonFiniteError naming the first round and metric that are not finite.
    """
    rows = jax.device_get(rows)
    for number, row in enumerate(rows, start=done - len(rows) + 1):
        for name, value in row.items():
            if not math.isfinite(value):
                raise NonFiniteError(f'{name} is {value} at round {number}. {advice}')
    return [{name: float(value) for name, value in row.items()} for row in rows]
