"""What a person looks at after a run: a grid of synthetic images, curves, and a report page."""

from __future__ import annotations

import base64
import html
import io
import itertools
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from dfkd_jax.storage import files

IMAGES = 'images.png'
CURVES = 'curves.png'
PAGE = 'report.html'
ACCURACY = 'Accuracy on the real test set'
MAX_CLASSES = 20  # rows of the grid
MAX_COLUMNS = 10
DPI = 100
BACKGROUND = (0.85, 0.88, 0.93)  # unlike the black or white borders of many images


def _figure(width: float, height: float) -> Any:
    """An empty figure; width and height in inches.

    It is not made by pyplot, whose global state may belong to the user's notebook.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=DPI, layout='constrained', facecolor='white')
    FigureCanvasAgg(figure)
    return figure


def _save(figure: Any, path: str | os.PathLike[str]) -> None:
    data = io.BytesIO()
    figure.savefig(data, format='png')
    files.write_bytes(path, data.getvalue())


def image_grid(
    images: np.ndarray,
    labels: np.ndarray,
    class_names: Sequence[str] | None,
    path: str | os.PathLike[str],
    title: str = 'Synthetic images by intended class',
) -> None:
    """Writes a PNG with one row of images per class.

    Of more than 20 classes, 20 are shown, spread evenly over those that have images.

    images: [N, H, W, C] in [0, 1] (values outside are clipped), C 1 or 3.
    labels: [N] integers.
    class_names: the name of each label; None shows the number.

    Raises ValueError for other shapes, and when there are no images.
    """
    images, labels = np.asarray(images, np.float32), np.asarray(labels)
    if images.ndim != 4 or images.shape[-1] not in (1, 3) or labels.shape != images.shape[:1]:
        raise ValueError(
            f'expected images [N, H, W, 1 or 3] and labels [N]; found {images.shape} and '
            f'{labels.shape}.'
        )
    present = np.unique(labels)
    count = len(class_names) if class_names is not None else int(present.max(initial=-1)) + 1
    classes = np.arange(count) if count <= MAX_CLASSES else present
    if len(classes) > MAX_CLASSES:
        classes = classes[np.linspace(0, len(classes) - 1, MAX_CLASSES).round().astype(int)]
    rows = [images[labels == label][:MAX_COLUMNS] for label in classes]
    columns = max((len(row) for row in rows), default=0)
    if not columns:
        raise ValueError('there are no images to show.')

    cell, gap = _cell_size(*images.shape[1:3]), 4
    canvas = np.empty((len(rows) * (cell[0] + gap) - gap, columns * (cell[1] + gap) - gap, 3))
    canvas[:] = BACKGROUND
    for i, row in enumerate(rows):
        for j, image in enumerate(row):
            y, x = i * (cell[0] + gap), j * (cell[1] + gap)
            canvas[y : y + cell[0], x : x + cell[1]] = _scaled(image, cell)

    names = [
        str(class_names[int(label)]) if class_names is not None else str(label) for label in classes
    ]
    names = [name if len(row) else f'{name} (none)' for name, row in zip(names, rows)]
    names = [name if len(name) <= 24 else name[:23] + '…' for name in names]
    _draw_grid(canvas, names, cell[0], gap, title, path)


def _draw_grid(
    canvas: np.ndarray,
    names: list[str],
    cell: int,
    gap: int,
    title: str,
    path: str | os.PathLike[str],
) -> None:
    """Saves the canvas, pixel by pixel, with the names on its left and the title above."""
    height, width = canvas.shape[:2]
    left, top, margin = 24 + 8 * max(map(len, names)), 44, 12
    full_width = max(left + width + margin, 11 * len(title) + 2 * margin)
    full_height = top + height + margin
    figure = _figure(full_width / DPI, full_height / DPI)
    figure.set_layout_engine('none')
    axes = figure.add_axes(
        (left / full_width, margin / full_height, width / full_width, height / full_height)
    )
    axes.imshow(canvas, interpolation='none', aspect='auto')
    axes.set_xticks([])
    axes.set_yticks([i * (cell + gap) + (cell - 1) / 2 for i in range(len(names))], names)
    axes.tick_params(length=0, labelsize=11)
    axes.spines[:].set_visible(False)
    figure.text(
        margin / full_width, 1 - 16 / full_height, title, fontsize=13, va='center', weight='bold'
    )
    _save(figure, path)


def _cell_size(height: int, width: int) -> tuple[int, int]:
    """The size at which an image is shown, [height, width] in pixels.

    Small images are enlarged by an integer factor to 56 pixels or more, large ones shrunk to 112.
    """
    side = max(height, width)
    if side > 112:
        return max(round(height * 112 / side), 1), max(round(width * 112 / side), 1)
    factor = math.ceil(56 / side)
    return height * factor, width * factor


def _scaled(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """An image [H, W, 1 or 3] as [*size, 3] in [0, 1]; sharp pixels where it is enlarged."""
    from PIL import Image

    pixels = (np.nan_to_num(image).clip(0, 1) * 255).round().astype(np.uint8)
    pixels = np.broadcast_to(pixels, (*pixels.shape[:2], 3))
    method = Image.Resampling.NEAREST if size[0] >= image.shape[0] else Image.Resampling.LANCZOS
    return np.asarray(Image.fromarray(pixels).resize(size[::-1], method)) / 255


def curves(
    metrics: Mapping[str, np.ndarray],
    path: str | os.PathLike[str],
    references: Mapping[str, float] | None = None,
    unit: str = 'rounds',
    title: str = ACCURACY,
) -> None:
    """Writes a PNG with the curves of a run: accuracy, losses of synthesis, losses of the student.

    metrics: what `dfkd_jax.reporting.metrics.read` returns.  Shown are ``student_accuracy`` and
        ``agreement_with_teacher``, in per cent, and the columns ``g/...`` and ``s/...``.
    references: name -> accuracy in per cent, drawn as a horizontal line; ``{'teacher': 91.5}``.
    unit: what the column ``round`` counts.
    title: of the first panel, what was measured.
    """
    panels = [
        ('Synthesis: losses and metrics', [name for name in metrics if name.startswith('g/')]),
        ('Student: losses and metrics', [name for name in metrics if name.startswith('s/')]),
    ]
    panels = [(title, names) for title, names in panels if names]
    figure = _figure(5.2 * (1 + len(panels)), 4.5)
    axes, *others = figure.subplots(1, 1 + len(panels), squeeze=False)[0]
    _draw_accuracy(axes, metrics, references or {}, unit)
    axes.set_title(title)
    for axes, (heading, names) in zip(others, panels):
        for name in names:
            _line(axes, metrics['round'], metrics[name], label=name[2:])
        _scale(axes, np.concatenate([metrics[name] for name in names]))
        axes.set_title(heading)
        axes.set_ylabel('mean since the last point, unweighted')
        _dress(axes, metrics['round'], 4, unit)
    _save(figure, path)


def _draw_accuracy(
    axes: Any, metrics: Mapping[str, np.ndarray], references: Mapping[str, float], unit: str
) -> None:
    for (name, value), style in zip(references.items(), itertools.cycle(('--', '-.', ':'))):
        axes.axhline(value, color='0.35', ls=style, lw=1.2, label=f'{name} {value:.2f}')
    rounds = metrics['round']
    agreement = metrics.get('agreement_with_teacher')
    if agreement is not None:
        _line(axes, rounds, agreement, color='0.65', label='agreement with the teacher')
    student = metrics.get('student_accuracy')
    if student is not None and np.isfinite(student).any():
        known = student[np.isfinite(student)]
        label = f'student: last {known[-1]:.2f}, best {known.max():.2f}'
        _line(axes, rounds, student, color='C0', label=label, lw=2)
        best = int(np.nanargmax(student))
        axes.plot(rounds[best], student[best], 'o', color='C0', ms=6)
    axes.set_ylabel('per cent')
    _dress(axes, rounds, 2, unit)


def _line(axes: Any, x: np.ndarray, y: np.ndarray, **style: Any) -> None:
    known = np.isfinite(y)
    if not known.any():
        return
    few = np.count_nonzero(known) < 15  # a line through a single point would be invisible
    axes.plot(x[known], y[known], **{'lw': 1.4, 'marker': '.' if few else None} | style)


def _scale(axes: Any, values: np.ndarray) -> None:
    """Makes the axis logarithmic if the curves are too far apart for a linear one."""
    sizes = np.abs(values[np.isfinite(values) & (values != 0)])
    if sizes.size and sizes.max() > 30 * np.median(sizes):
        if np.nanmin(values) > 0:
            axes.set_yscale('log')
        else:
            axes.set_yscale('symlog', linthresh=10 ** math.floor(math.log10(np.median(sizes))))


def _dress(axes: Any, rounds: np.ndarray, columns: int, unit: str) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel(unit)
    axes.set_xlim(0, 1.02 * max(rounds.max(initial=0), 1))
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.grid(alpha=0.25)
    axes.spines[['top', 'right']].set_visible(False)
    if axes.get_legend_handles_labels()[0]:
        below = {'loc': 'upper center', 'bbox_to_anchor': (0.5, -0.13)}
        axes.legend(fontsize=9, ncols=columns, frameon=False, **below)


STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #222; background: #fff;
       max-width: 1100px; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; margin-bottom: .3rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
table { border-collapse: collapse; } td { padding: .2rem 1.2rem .2rem 0; vertical-align: top; }
td:first-child { color: #666; } td:last-child { font-variant-numeric: tabular-nums; }
img { max-width: 100%; } pre { background: #f5f5f5; padding: 1rem; overflow: auto; }
.big { font-size: 1.2rem; }
"""
ROWS = {
    'method': 'method',
    'dataset': 'data set',
    'teacher': 'teacher',
    'student': 'student',
    'teacher_accuracy': 'teacher accuracy',
    'student_accuracy_last': 'student accuracy, last',
    'student_accuracy_best': 'student accuracy, best',
    'best_round': 'best after round',
    'agreement_with_teacher': 'agreement with the teacher',
    'agreement_with_teacher_best': 'agreement with the teacher, best',
    'measured_on': 'measured on',
    'rounds': 'rounds',
    'images_synthesised': 'images synthesised',
    'images_distilled': 'images in student updates',
    'teacher_queries': 'teacher queries (images)',
    'seconds': 'time',
    'seed': 'seed',
    'device': 'device',
}
WARNINGS = 'warnings'  # name -> sentence
PERCENT = {name for name in ROWS if 'accuracy' in name or name.startswith('agreement')}


def page(workdir: str | os.PathLike[str], summary: Mapping[str, Any]) -> Path:
    """Writes ``report.html`` in `workdir` and returns its path.

    The page is one file: the pictures ``curves.png`` and ``images.png`` of `workdir`, if they
    exist, are embedded.

    summary: the content of ``summary.json``.
    """
    workdir = Path(workdir)
    title = f'{summary.get("method", "?")} on {summary.get("dataset", "?") or "no data set"}'
    rows = [(ROWS[name], _shown(name, summary[name])) for name in ROWS if name in summary]
    details = {name: x for name, x in summary.items() if name not in (*ROWS, WARNINGS)}
    parts = [
        f'<h1>{html.escape(title)}</h1>',
        f'<p class="big">{html.escape(_headline(summary))}</p>',
        *(f'<p>Warning: {html.escape(text)}</p>' for text in summary.get(WARNINGS, {}).values()),
        '<table>',
        *(f'<tr><td>{html.escape(k)}</td><td>{html.escape(v)}</td></tr>' for k, v in rows),
        '</table>',
    ]
    for heading, name in (('Curves', CURVES), ('Synthetic images', IMAGES)):
        if (workdir / name).exists():
            data = base64.b64encode((workdir / name).read_bytes()).decode()
            parts.append(f'<h2>{heading}</h2>')
            parts.append(f'<img alt="{heading}" src="data:image/png;base64,{data}">')
    for name, value in details.items():
        text = json.dumps(files.plain(value), indent=2, ensure_ascii=False)
        parts.append(f'<details><summary>{html.escape(name)}</summary>')
        parts.append(f'<pre>{html.escape(text)}</pre></details>')
    text = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<title>{html.escape(title)}</title><style>{STYLE}</style></head>\n<body>\n'
        + '\n'.join(parts)
        + '\n</body></html>\n'
    )
    files.write_bytes(workdir / PAGE, text.encode())
    return workdir / PAGE


def _headline(summary: Mapping[str, Any]) -> str:
    student, teacher = summary.get('student_accuracy_last'), summary.get('teacher_accuracy')
    if summary.get('measured_on'):
        return (
            f'The student agrees with the teacher on {summary["agreement_with_teacher"]:.2f} % of '
            f'{summary["measured_on"]}. There were no real images, so its accuracy is not known.'
        )
    if student is None or teacher is None:
        return ''
    share = f": {100 * student / teacher:.1f} % of the teacher's {teacher:.2f} %" if teacher else ''
    loop = (summary.get('config') or {}).get('loop')
    how = 'on real data' if loop == 'kd' else 'without real data'
    return f'The student reaches {student:.2f} % {how}{share}.'


def _shown(name: str, value: Any) -> str:
    if value is None:
        return '–'
    if name in PERCENT:
        return f'{value:.2f} %'
    if name == 'seconds':
        return str(tqdm.format_interval(value))
    return f'{value:,}' if isinstance(value, int) and name != 'seed' else str(value)
