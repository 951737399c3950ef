"""Pictures of a run, as PNG: a grid of synthetic images, a strip of them, and curves."""

from __future__ import annotations

import io
import itertools
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dfkd_jax.storage import files

IMAGES = 'images.png'
CURVES = 'curves.png'
ACCURACY = 'Accuracy on the real test set'
MAX_CLASSES = 20  # rows of the grid
MAX_COLUMNS = 10
STRIP = (10, 64)  # the most images of a strip, and the most pixels of a side
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


def strip(images: np.ndarray, labels: np.ndarray, path: str | os.PathLike[str]) -> None:
    """Writes a PNG of one row: an image of each of up to ten classes, spread evenly over them.

    Quick enough to be made during a training.  Images are as large as they are, up to 64 pixels.

    images: [N, H, W, C] in [0, 1] (values outside are clipped), C 1 or 3.
    labels: [N] integers.
    """
    from PIL import Image

    most, side = STRIP
    classes = np.unique(labels)
    if len(classes) > most:
        classes = classes[np.linspace(0, len(classes) - 1, most).round().astype(int)]
    height, width = images.shape[1:3]
    scale = min(1.0, side / max(height, width))
    size = max(round(height * scale), 1), max(round(width * scale), 1)
    row = [_scaled(np.asarray(images[int(np.argmax(labels == label))], np.float32), size)
           for label in classes]  # fmt: skip
    gap = np.full((size[0], max(1, size[1] // 16), 3), BACKGROUND)
    parts = [part for image in row for part in (gap, image)][1:]
    pixels = (np.concatenate(parts, axis=1) * 255).round().astype(np.uint8)
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, format='png')
    files.write_bytes(path, content.getvalue())


def heat(shares: np.ndarray) -> bytes:
    """A PNG of a matrix, one pixel for each entry: 0 is white, 1 is dark blue.

    shares: [N, M] in [0, 1].
    """
    from PIL import Image

    white, blue = np.array([255.0, 255, 255]), np.array([12.0, 62, 140])
    shade = np.nan_to_num(shares)[..., None].clip(0, 1) ** 0.5  # so that rare ones are seen
    content = io.BytesIO()
    Image.fromarray((white + shade * (blue - white)).round().astype(np.uint8)).save(content, 'png')
    return content.getvalue()
