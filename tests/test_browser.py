"""The pages of runs in a browser, light and dark, on a phone and on a desk: `pytest -m slow`.

Needs Debian's `chromium`.  With ``DFKD_AXE=PATH/axe.min.js``, of npm's axe-core, its rules for
accessibility are run too.
"""

from __future__ import annotations

import html
import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dfkd_jax.reporting import classes, page, pictures

CHROMIUM = shutil.which('chromium') or shutil.which('google-chrome')
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason='no chromium: apt-get install chromium'),
]
WIDTHS = {'phone': 390, 'desk': 1280}


def a_run(workdir: Path, number: int) -> page.Run:
    """A run with all that a page can show, with long names."""
    rng = np.random.default_rng(number)
    x = np.arange(1.0, 41.0)
    history = {
        'round': x, 'seconds': 3 * x + rng.random(40), 'teacher_queries': 1000 * x,
        'student_accuracy': 90 - 60 / x, 'agreement_with_teacher': 92 - 60 / x,
        **{f'g/loss_{i}': 10.0 ** (i - 3) / x for i in range(10)},
        's/kd': 5 / x, 's/a_very_long_name_of_a_loss': -x,
    }  # fmt: skip
    label = np.repeat(np.arange(10), 20)
    student = np.where(rng.random(200) < 0.8, label, rng.integers(0, 10, 200))
    names = [f'a class with a long name {i}' for i in range(10)]
    classes.write(workdir, classes.by_class(classes.Tested(label, student, label), 10, names))
    images = rng.random((30, 32, 32, 3))
    pictures.image_grid(images, np.arange(30) % 10, names, workdir / pictures.IMAGES)
    pictures.strip(images, np.arange(30) % 10, workdir / page.PROGRESS / '00000004.png')
    summary = {
        'method': 'cpsc', 'dataset': 'a_data_set_of_mine', 'teacher': 'resnet34',
        'student': 'resnet18', 'teacher_accuracy': 95.0, 'student_accuracy_last': 88.5,
        'student_accuracy_best': 88.6, 'agreement_with_teacher': 90.1, 'rounds': 40,
        'seconds': 120.0, 'teacher_queries': 40000, 'seed': number, 'device': '1 x cpu',
        'warnings': {'some': f'a warning --config.with.a.long=value{"x" * 60}'},
        'config': {'student': {'lr': 0.1 * number}, 'text': 'y' * 200},
    }  # fmt: skip
    return page.Run(workdir, summary, history, name=f'a_folder_of_runs/run_{number}')


@pytest.fixture(scope='module')
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    place = tmp_path_factory.mktemp('pages')
    runs = [a_run(place / str(number), number) for number in range(3)]
    made = {'run': page.page(runs[0]), 'comparison': page.comparison(runs, place / 'all.html')}
    return {name: path.read_text() for name, path in made.items()}


MEASURE = """
async function measure() {
  const inside = document.getElementById('page').contentWindow, root = inside.document;
  const box = each => each.getBoundingClientRect();
  const charts = [...root.querySelectorAll('.charts figure')].map(box);
  const found = {
    scroll: root.documentElement.scrollWidth, width: inside.innerWidth,
    tops: charts.map(each => Math.round(each.top)),
    widest: Math.max(...charts.map(each => each.right)),
    text: Math.min(...[...root.querySelectorAll('svg text')].map(each => box(each).height)),
    background: inside.getComputedStyle(root.body).backgroundColor,
    dark: inside.matchMedia('(prefers-color-scheme: dark)').matches, axe: null,
  };
  if (inside.axe) {
    const result = await inside.axe.run(root);
    found.axe = result.violations.map(each => [each.impact, each.id, each.nodes[0].html]);
  }
  const out = document.createElement('pre');
  out.id = 'found';
  out.textContent = JSON.stringify(found);
  document.body.append(out);
}
"""


def seen(text: str, width: int, folder: Path, dark: bool = False) -> dict[str, Any]:
    """What a browser makes of a page in a frame of this width, in pixels."""
    axe = os.environ.get('DFKD_AXE')
    if axe:
        text = text.replace('</body>', f'<script>{Path(axe).read_text()}</script></body>')
    (folder / 'frame.html').write_text(
        f'<!doctype html><html lang="en"><body><script>{MEASURE}</script>'
        f'<iframe id="page" style="width:{width}px;height:900px;border:0" onload="measure()" '
        f'srcdoc="{html.escape(text)}"></iframe></body></html>'
    )
    command = [
        str(CHROMIUM), '--headless', '--no-sandbox', '--disable-gpu', '--window-size=1400,1000',
        f'--user-data-dir={folder / "profile"}', '--virtual-time-budget=30000',
        *(['--force-dark-mode'] if dark else []), '--dump-dom', f'file://{folder / "frame.html"}',
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    match = re.search(r'<pre id="found">(.*?)</pre>', done.stdout, re.DOTALL)
    assert match, done.stderr[-2000:]
    found = json.loads(html.unescape(match[1]))
    assert (found['axe'] is not None) == bool(axe), 'axe-core did not run'
    return found


@pytest.mark.parametrize('width', WIDTHS.values(), ids=WIDTHS)
@pytest.mark.parametrize('name', ['run', 'comparison'])
def test_a_page_fits_and_is_accessible(
    pages: dict[str, str], name: str, width: int, tmp_path: Path
) -> None:
    found = seen(pages[name], width, tmp_path)
    assert found['scroll'] <= found['width'] == width, 'it scrolls sideways'
    assert found['widest'] <= width
    assert found['text'] >= 10, 'the text of the curves is too small to read'
    tops = found['tops']
    if width < 600:
        assert len(set(tops)) == len(tops) >= 4, 'curves stack on a phone'
    else:
        assert tops[0] == tops[1], 'curves stand side by side on a desk'
    if found['axe'] is not None:
        assert not [each for each in found['axe'] if each[0] in ('serious', 'critical')]


def test_a_page_is_dark_where_the_reader_wants_it(pages: dict[str, str], tmp_path: Path) -> None:
    light, dark = (seen(pages['run'], 1280, tmp_path, dark=each) for each in (False, True))
    assert light['background'] == 'rgb(255, 255, 255)' and not light['dark']
    assert dark['dark'], 'the browser was asked for dark'
    assert dark['background'] == 'rgb(20, 23, 27)'
    if dark['axe'] is not None:
        assert not [each for each in dark['axe'] if each[0] in ('serious', 'critical')]
