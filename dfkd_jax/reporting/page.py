"""The page of a run, and the page that compares several: one file each, with nothing to fetch."""

from __future__ import annotations

import base64
import html
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from dfkd_jax.reporting import chart, classes, pictures
from dfkd_jax.reporting.chart import Line
from dfkd_jax.reporting.classes import ByClass
from dfkd_jax.storage import files

PAGE, COMPARISON = 'report.html', 'comparison.html'
PROGRESS = 'progress'  # a folder: strips of synthetic images, by the round after which
WARNINGS = 'warnings'  # name -> sentence
ALL_CLASSES = 20  # of which a matrix has numbers, and of more the lowest are shown first
PAIRS = 15  # the most frequent confusions of many classes
READABLE = 520  # pixels of width at which the names beside synthetic images can still be read
STYLE = (
    """
:root { color-scheme: light dark;
  --page: #fff; --text: #1d2126; --soft: #57606a; --line: #d8dde3; --box: #f4f6f8;
  --warn: #fff4d6; --edge: #b7791f; --heat: #8db9ee; --bar: #4f8fd6; --link: #0a58ca;
  --c0: #1f6fc2; --c1: #c4510c; --c2: #2a7f3b; --c3: #a3207a; --c4: #6d5bd0; --c5: #8a6d00;
  --c6: #0c7c86; --c7: #b3261e; }
@media (prefers-color-scheme: dark) { :root {
  --page: #14171b; --text: #e7eaee; --soft: #a3adb8; --line: #343b44; --box: #1e2329;
  --warn: #3a2f12; --edge: #e0b252; --heat: #1f5596; --bar: #4f8fd6; --link: #7db4ff;
  --c0: #6fb0ff; --c1: #ff9b5c; --c2: #6fd083; --c3: #f08cd0; --c4: #b3a5ff; --c5: #e3c04f;
  --c6: #5fd0da; --c7: #ff8a80; } }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--text); background: var(--page);
       max-width: 1100px; margin: 0 auto; padding: 1rem; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; margin: .6rem 0 .3rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
a { color: var(--link); }
.big { font-size: 1.2rem; margin-top: 0; } small, .soft { color: var(--soft); }
.warning { background: var(--warn); border-left: .3rem solid var(--edge); padding: .5rem .8rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .2rem 1rem .2rem 0; vertical-align: top; text-align: left; }
th { font-weight: 400; color: var(--soft); } thead th { border-bottom: 1px solid var(--line); }
td.n, th.n { text-align: right; white-space: nowrap; }
table.facts td { min-width: 8rem; padding-right: 0; }
.wide { overflow-x: auto; max-width: 100%; overflow-wrap: normal; }
.wide th { white-space: nowrap; }
.runs th, .runs td { white-space: nowrap; border-bottom: 1px solid var(--line); }
.runs tbody th { position: sticky; left: 0; background: var(--page); color: var(--text); }
.matrix td { text-align: center; padding: .15rem .2rem; min-width: min(2.2rem, 5vw);
  border: 1px solid var(--line);
  background: color-mix(in srgb, var(--heat) calc(var(--v) * 100%), transparent); }
.matrix thead th { padding: .2rem; vertical-align: bottom; text-align: center; }
.matrix tbody th { padding-right: .5rem; }
.matrix thead span { writing-mode: vertical-rl; transform: rotate(180deg); }
.bar { display: inline-block; height: .6rem; background: var(--bar); min-width: 1px; }
.track { width: min(30vw, 12rem); }
img { max-width: 100%; height: auto; border-radius: .2rem; } .sharp { image-rendering: pixelated; }
.strips { display: grid; gap: .8rem; } .strips img { width: min(100%, 44rem); }
.strips figcaption { font-weight: 400; font-size: .9rem; color: var(--soft); }
pre { background: var(--box); padding: 1rem; overflow: auto; } summary { cursor: pointer; }
"""
    + chart.STYLE
)
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
    'images_per_second': 'speed, images through the teacher per second',
    'seed': 'seed',
    'device': 'device',
}
PERCENT = {name for name in ROWS if 'accuracy' in name or name.startswith('agreement')}


class Run(NamedTuple):
    """What the pages show of a finished run.

    name: what it is called beside others.
    summary: the content of ``summary.json``.
    history: what `metrics.read` returns.
    unit: what its column ``round`` counts.
    """

    workdir: Path
    summary: Mapping[str, Any]
    history: Mapping[str, np.ndarray] = {}
    unit: str = 'rounds'
    name: str = ''


# 1. A run


def page(run: Run, output: str | os.PathLike[str] | None = None) -> Path:
    """Writes the page of a run and returns its path, ``report.html`` in its workdir by default.

    Beside summary and history it shows, if the workdir has them, ``images.png``, the strips in
    ``progress/`` and the tables of `classes`.
    """
    summary = run.summary
    title = f'{summary.get("method", "?")} on {summary.get("dataset", "?") or "no data set"}'
    known = dict(summary) | {'images_per_second': speed(summary)}
    rows = [(ROWS[name], _shown(name, known[name])) for name in ROWS if name in summary
            or known.get(name) and name == 'images_per_second']  # fmt: skip
    details = {name: x for name, x in summary.items() if name not in (*ROWS, WARNINGS)}
    body = [
        f'<p class="big">{html.escape(_headline(summary))}</p>',
        *(f'<p class="warning">Warning: {html.escape(text)}</p>'
          for text in summary.get(WARNINGS, {}).values()),
        '<table class="facts"><tbody>',
        *(f'<tr><th scope="row">{html.escape(k)}</th><td>{html.escape(v)}</td></tr>'
          for k, v in rows),
        '</tbody></table>',
        *_section('Curves', _charts(run)),
        *_section('Classes', _classes(classes.read(run.workdir))),
        *_section('Synthetic images through training', _strips(run)),
        *_section('Synthetic images', _images(run)),
        *_section('Everything', map(_detail, details.items())),
    ]  # fmt: skip
    path = Path(output or run.workdir / PAGE)
    files.write_bytes(path, _document(title, body).encode())
    return path


def speed(summary: Mapping[str, Any]) -> float | None:
    """Images through the teacher per second, over the whole run; None: not known."""
    images, seconds = summary.get('teacher_queries'), summary.get('seconds')
    return round(images / seconds, 1) if images and seconds else None


def _document(title: str, body: Sequence[str]) -> str:
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<title>{html.escape(title)}</title><style>{STYLE}</style></head>\n<body><main>\n'
        f'<h1>{html.escape(title)}</h1>\n' + '\n'.join(body) + '\n</main></body></html>\n'
    )


def _section(heading: str, parts: Iterator[str]) -> list[str]:
    """A heading and what is under it; nothing where that is nothing."""
    found = [part for part in parts if part]
    return [f'<h2>{html.escape(heading)}</h2>', *found] if found else []


def _charts(run: Run) -> Iterator[str]:
    """One axis for each group of curves: accuracies, losses of each side, speed."""
    history = run.history
    if not history or not len(history['round']):
        return
    rounds = history['round']
    measured = {'student accuracy': 'student_accuracy',
                'agreement with the teacher': 'agreement_with_teacher'}  # fmt: skip
    lines = [Line(label, rounds, history[name]) for label, name in measured.items()
             if name in history]  # fmt: skip
    teacher = run.summary.get('teacher_accuracy')
    references = {} if teacher is None else {'teacher accuracy': teacher}
    groups = [('Accuracy' if references else 'Agreement', lines, 'per cent', references)]
    for prefix, title in (('g/', 'Losses of synthesis'), ('s/', 'Losses of the student')):
        names = [name for name in history if name.startswith(prefix)]
        groups.append(
            (title, [Line(name[2:], rounds, history[name]) for name in names], 'unweighted', {})
        )
    shown = [chart.figure(title, lines, run.unit, y_label, references)
             for title, lines, y_label, references in groups]  # fmt: skip
    shown.append(chart.figure('Speed', list(_speeds(run)), run.unit, 'per second', from_zero=True))
    yield f'<div class="charts">{"".join(shown)}</div>' if any(shown) else ''


def _speeds(run: Run) -> Iterator[Line]:
    """Images through the teacher per second, between the rows of the history; or rounds."""
    history = run.history
    if 'seconds' not in history:
        return
    counted = 'teacher_queries' if 'teacher_queries' in history else 'round'
    seconds, images, rounds = (history[name] for name in ('seconds', counted, 'round'))
    took = np.diff(seconds, prepend=0.0)
    done = np.diff(images, prepend=0.0)
    label = 'images through the teacher' if counted != 'round' else run.unit
    # The first row has the time of the compilation in it.
    usable = (took > 0) & (np.arange(len(took)) > 0)
    yield Line(label, rounds, np.divide(done, took, np.full(len(took), np.nan), where=usable))


def _classes(found: ByClass | None) -> Iterator[str]:
    """The accuracy of each class, and which classes are taken for which."""
    if found is None:
        return
    order = np.argsort(np.where(np.isfinite(found.student), found.student, np.inf), kind='stable')
    rows = [_class_row(found, int(i)) for i in order]
    head = (
        '<thead><tr><th scope="col">class</th><th scope="colgroup" colspan="2">student</th>'
        '<th scope="col" class="n">teacher</th><th scope="col" class="n">images</th>'
        '</tr></thead>'
    )
    yield (
        '<p class="soft">Per cent of the test images of each class, the lowest first.</p>'
        + _wide(f'<table>{head}<tbody>{"".join(rows[:ALL_CLASSES])}</tbody></table>',
                'accuracy of each class')
    )  # fmt: skip
    if len(rows) > ALL_CLASSES:
        rest = f'<table>{head}<tbody>{"".join(rows[ALL_CLASSES:])}</tbody></table>'
        yield (
            f'<details><summary>the other {len(rows) - ALL_CLASSES} classes</summary>'
            f'{_wide(rest, "accuracy of the other classes")}</details>'
        )
    yield from _confusion(found)


def _class_row(found: ByClass, i: int) -> str:
    student, teacher = (each[i] for each in (found.student, found.teacher))
    shares = [f'{x:.1f} %' if np.isfinite(x) else '–' for x in (student, teacher)]
    length = student if np.isfinite(student) else 0
    return (
        f'<tr><th scope="row">{html.escape(found.names[i])}</th><td class="n">{shares[0]}</td>'
        f'<td class="track"><span class="bar" style="width:{length:.0f}%"></span></td>'
        f'<td class="n">{shares[1]}</td><td class="n">{found.images[i]:,}</td></tr>'
    )


def _confusion(found: ByClass) -> Iterator[str]:
    """The matrix of a few classes as a table; of many as a picture, with the worst pairs."""
    number = np.maximum(found.images, 1)[:, None]
    shares = found.confusion / number
    yield '<h3>Confusions</h3><p class="soft">A row for each true class, a column for each class '\
          'that the student predicts.</p>'  # fmt: skip
    if len(found.names) <= ALL_CLASSES:
        head = ''.join(f'<th scope="col"><span>{html.escape(name)}</span></th>'
                       for name in found.names)  # fmt: skip
        rows = ''.join(
            f'<tr><th scope="row">{html.escape(name)}</th>' + ''.join(
                f'<td style="--v:{share:.2f}">{count or ""}</td>'
                for count, share in zip(counts, of_row)
            ) + '</tr>'
            for name, counts, of_row in zip(found.names, found.confusion, shares)
        )  # fmt: skip
        table = (
            f'<table class="matrix"><thead><tr><td></td>{head}</tr></thead><tbody>{rows}</tbody>'
            '</table>'
        )
        yield _wide(table, 'confusions')
        return
    picture = _embedded(pictures.heat(shares))
    yield f'<img class="sharp" width="600" alt="The matrix of confusions" src="{picture}">'
    wrong = np.where(np.eye(len(found.names), dtype=bool), 0, found.confusion)
    pairs = [np.unravel_index(i, wrong.shape) for i in np.argsort(-wrong, axis=None)[:PAIRS]]
    rows = ''.join(
        f'<tr><td>{html.escape(found.names[a])}</td><td>{html.escape(found.names[b])}</td>'
        f'<td class="n">{wrong[a, b]}</td></tr>'
        for a, b in pairs if wrong[a, b]
    )  # fmt: skip
    head = (
        '<tr><th scope="col">class</th><th scope="col">taken for</th>'
        '<th scope="col" class="n">images</th></tr>'
    )
    yield _wide(f'<table><thead>{head}</thead><tbody>{rows}</tbody></table>', 'the worst pairs')


def _wide(inside: str, label: str) -> str:
    """What may be wider than a phone: it scrolls, also by the keyboard."""
    return (
        f'<div class="wide" role="region" tabindex="0" aria-label="{html.escape(label)}">{inside}'
        '</div>'
    )


def _strips(run: Run) -> Iterator[str]:
    """Synthetic images at some rounds of the training, the first ones first."""
    found = sorted((int(path.stem), path) for path in (run.workdir / PROGRESS).glob('*.png')
                   if path.stem.isdecimal())  # fmt: skip
    rows = []
    for number, path in found:
        when = f'after {number:,} {run.unit if number > 1 else run.unit.removesuffix("s")}'
        rows.append(
            f'<figure><img class="sharp" alt="Synthetic images {when}" '
            f'src="{_embedded(path.read_bytes())}"><figcaption>{when}</figcaption></figure>'
        )
    yield f'<div class="strips">{"".join(rows)}</div>' if rows else ''


def _images(run: Run) -> Iterator[str]:
    path = run.workdir / pictures.IMAGES
    if path.exists():
        png = path.read_bytes()
        width = int.from_bytes(png[16:20])  # of its header
        picture = (
            f'<img style="min-width:{min(width, READABLE)}px" '
            f'alt="Synthetic images, a row for each class" src="{_embedded(png)}">'
        )
        yield _wide(picture, f'synthetic images of {run.name or "the run"}')


def _embedded(png: bytes) -> str:
    return f'data:image/png;base64,{base64.b64encode(png).decode()}'


def _detail(entry: tuple[str, Any]) -> str:
    name, value = entry
    text = json.dumps(files.plain(value), indent=2, ensure_ascii=False)
    return (
        f'<details><summary>{html.escape(name)}</summary>'
        f'<pre tabindex="0">{html.escape(text)}</pre></details>'
    )


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
    return f'{value:,}' if isinstance(value, int | float) and name != 'seed' else str(value)


# 2. Several runs


COLUMNS = (  # the first ones are what a phone shows
    'student_accuracy_last', 'agreement_with_teacher', 'teacher_accuracy', 'student_accuracy_best',
    'method', 'dataset', 'teacher', 'student', 'seconds', 'rounds', 'images_synthesised',
    'teacher_queries', 'images_per_second', 'seed', 'device',
)  # fmt: skip


def numbers(run: Run) -> dict[str, Any]:
    """What a comparison shows of a run, by name: accuracies in per cent, seconds, counts."""
    known = dict(run.summary) | {'images_per_second': speed(run.summary)}
    found = {name: known.get(name) for name in COLUMNS}
    found['warnings'] = dict(run.summary.get(WARNINGS) or {})
    per_class = classes.read(run.workdir)
    if per_class is not None:
        found['per_class'] = dict(zip(per_class.names, files.plain(per_class.student)))
    return {'run': run.name, 'workdir': str(run.workdir), **found}


def comparison(runs: Sequence[Run], output: str | os.PathLike[str]) -> Path:
    """Writes a page with runs side by side: numbers, curves, classes, configs and images."""
    title = f'{len(runs)} runs'
    warned = [
        f'<p class="warning">{html.escape(run.name)}: {html.escape(text)}</p>'
        for run in runs for text in (run.summary.get(WARNINGS) or {}).values()
    ]  # fmt: skip
    body = [
        *warned,
        _table_of_runs(runs),
        *_section('Curves', _common_charts(runs)),
        *_section('Classes', _common_classes(runs)),
        *_section('Synthetic images', _side_by_side(runs)),
        *_section('Configs', _differences(runs)),
    ]
    path = Path(output)
    files.write_bytes(path, _document(title, body).encode())
    return path


def _table_of_runs(runs: Sequence[Run]) -> str:
    found = [numbers(run) for run in runs]
    used = [name for name in COLUMNS if any(each[name] is not None for each in found)]
    rows = [(each['run'], [_shown(name, each[name]) for name in used]) for each in found]
    return _table('run', [ROWS[name] for name in used], rows, 'the numbers of each run')


def _table(
    corner: str,
    heads: Sequence[str],
    rows: Sequence[tuple[str, Sequence[str]]],
    label: str,
    kind: str = '',
) -> str:
    """A table of texts under heads, each row with its name.  kind: the class of a cell."""
    attribute = f' class="{kind}"' if kind else ''
    head = ''.join(f'<th scope="col"{attribute}>{html.escape(each)}</th>' for each in heads)
    body = ''.join(
        f'<tr><th scope="row">{html.escape(name)}</th>'
        + ''.join(f'<td{attribute}>{html.escape(cell)}</td>' for cell in cells) + '</tr>'
        for name, cells in rows
    )  # fmt: skip
    table = (
        f'<table class="runs"><thead><tr><th scope="col">{corner}</th>{head}</tr></thead>'
        f'<tbody>{body}</tbody></table>'
    )
    return _wide(table, label)


def _common_charts(runs: Sequence[Run]) -> Iterator[str]:
    """What was measured, of all runs on one axis, by rounds and by seconds."""
    shown = []
    for name, title in (('student_accuracy', 'Student accuracy'),
                        ('agreement_with_teacher', 'Agreement with the teacher')):  # fmt: skip
        for by, label in (('round', 'rounds'), ('seconds', 'seconds')):
            lines = [Line(run.name, run.history[by], run.history[name]) for run in runs
                     if name in run.history and by in run.history]  # fmt: skip
            shown.append(chart.figure(f'{title} by {label}', lines, label, 'per cent'))
    speeds = [line._replace(label=f'{run.name}, {line.label}') for run in runs
              for line in _speeds(run)]  # fmt: skip
    shown.append(chart.figure('Speed', speeds, 'rounds', 'per second', from_zero=True))
    yield f'<div class="charts">{"".join(shown)}</div>' if any(shown) else ''


def _common_classes(runs: Sequence[Run]) -> Iterator[str]:
    """The students' accuracies by class, for the runs of the same classes as the first."""
    found = [(run.name, classes.read(run.workdir)) for run in runs]
    known = [(name, each) for name, each in found if each is not None]
    same = [(name, each) for name, each in known if each.names == known[0][1].names]
    if not same:
        return
    rows = [
        (label, [_shown('accuracy', _finite(each.student[i])) for _, each in same])
        for i, label in enumerate(same[0][1].names)
    ]
    yield _table(
        'class', [name for name, _ in same], rows, 'accuracy of each class in each run', 'n'
    )


def _finite(value: float) -> str | None:
    return f'{value:.1f} %' if np.isfinite(value) else None


def _differences(runs: Sequence[Run]) -> Iterator[str]:
    """The fields of the configs that are not the same in all runs."""
    flat = [dict(_fields(run.summary.get('config') or {})) for run in runs]
    names = list(dict.fromkeys(name for each in flat for name in each))
    differ = [name for name in names if len({repr(each.get(name, '–')) for each in flat}) > 1]
    if not differ:
        return
    rows = [(name, [str(each.get(name, '–')) for each in flat]) for name in differ]
    table = _table('field', [run.name for run in runs], rows, 'what differs')
    yield f'<details><summary>what differs: {len(differ)} fields</summary>{table}</details>'


def _fields(tree: Any, prefix: str = '') -> Iterator[tuple[str, Any]]:
    """Nested names and values as ``('student.lr', 0.1)``."""
    items = enumerate(tree) if isinstance(tree, list | tuple) else tree.items()
    for name, value in items:
        if isinstance(value, dict) or isinstance(value, list) and value[:1] and isinstance(
            value[0], dict
        ):  # fmt: skip
            yield from _fields(value, f'{prefix}{name}.')
        else:
            yield f'{prefix}{name}', value


def _side_by_side(runs: Sequence[Run]) -> Iterator[str]:
    shown = [
        f'<figure><figcaption>{html.escape(run.name)}</figcaption>{picture}</figure>'
        for run in runs for picture in _images(run)
    ]  # fmt: skip
    yield f'<div class="charts">{"".join(shown)}</div>' if shown else ''
