"""The pictures show what they are given, where it should be; the page holds all of it."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dfkd_jax.command.main import main
from dfkd_jax.reporting import artifacts, chart, classes, page, pictures
from dfkd_jax.storage import files


def pixels(path: Any) -> np.ndarray:
    return np.asarray(Image.open(path).convert('RGB'))


def test_grid_enlarges_pixels_and_puts_each_class_in_its_row(tmp_path: Path) -> None:
    images = np.zeros((3, 8, 8, 3), np.float32)
    images[0] = [1, 0, 0]  # of class 1
    images[1, 3, 5] = [0, 2.0, np.nan]  # of class 0; values beyond [0, 1] are clipped
    images[2] = [0, 0, 1]  # of class 1
    pictures.image_grid(images, np.array([1, 0, 1]), ['cat', 'dog'], tmp_path / 'a.png')
    picture = pixels(tmp_path / 'a.png')
    red, green, blue = (
        np.argwhere((picture == color).all(-1)) for color in ([255, 0, 0], [0, 255, 0], [0, 0, 255])
    )
    assert len(red) == len(blue) == 56 * 56  # seven times 8 pixels, exactly
    assert len(green) == 7 * 7
    top, left = red.min(0)
    assert (blue.min(0) == [top, left + 56 + 4]).all()
    assert (green.min(0) == [top - 60 + 3 * 7, left + 5 * 7]).all()


@pytest.mark.parametrize(('size', 'channels'), [(8, 1), (32, 3), (224, 3)])
def test_grid_is_legible_at_any_size(tmp_path: Path, size: int, channels: int) -> None:
    images = np.random.default_rng(0).random((4, size, size, channels))
    pictures.image_grid(images, np.arange(4), None, tmp_path / 'a.png')
    height, width, _ = pixels(tmp_path / 'a.png').shape
    assert 4 * 56 <= height <= 4 * 120 + 60
    assert width < 700


def test_grid_samples_many_classes(tmp_path: Path) -> None:
    images = np.random.default_rng(0).random((150, 8, 8, 1))
    names = [f'class {i}' for i in range(100)]
    pictures.image_grid(images, np.arange(150) % 75, names, tmp_path / 'a.png')
    height, _, _ = pixels(tmp_path / 'a.png').shape
    assert 20 * 60 <= height < 21 * 60 + 60


def test_grid_refuses_other_shapes(tmp_path: Path) -> None:
    for images, labels in [((2, 8, 8), (2,)), ((2, 8, 8, 2), (2,)), ((2, 8, 8, 1), (3,))]:
        with pytest.raises(ValueError, match='expected images'):
            pictures.image_grid(np.zeros(images), np.zeros(labels, int), None, tmp_path / 'a.png')
    with pytest.raises(ValueError, match='no images'):
        pictures.image_grid(np.zeros((0, 8, 8, 1)), np.zeros(0, int), ['a'], tmp_path / 'a.png')
    assert not (tmp_path / 'a.png').exists()


def columns(rounds: int) -> dict[str, np.ndarray]:
    x = np.arange(1, rounds + 1.0)
    accuracy = np.where(x % 2 == 0, 90 - 50 / x, np.nan)
    return {
        'round': x,
        'seconds': 2 * x,
        'g/ce': 1 / x,
        'g/bn': np.where(x > 3, np.inf, 1e3),
        's/kd': -x,
        'student_accuracy': accuracy,
        'agreement_with_teacher': accuracy,
    }


@pytest.mark.parametrize('rounds', [0, 1, 40])
def test_curves_of_any_length(tmp_path: Path, rounds: int) -> None:
    references = {'teacher': 91.5, 'real data': 90.25}
    pictures.curves(columns(rounds), tmp_path / 'curves.png', references)
    picture = pixels(tmp_path / 'curves.png')
    assert picture.shape == (450, 1560, 3)
    assert picture.std() > 0


def test_curves_without_losses(tmp_path: Path) -> None:
    pictures.curves({'round': np.zeros(0)}, tmp_path / 'curves.png', {'teacher': 50.0})
    assert pixels(tmp_path / 'curves.png').shape == (450, 520, 3)


SUMMARY = {
    'method': 'cpsc',
    'dataset': '<digits>',
    'seed': 1000,
    'teacher_accuracy': 98.0,
    'student_accuracy_last': 49.0,
    'agreement_with_teacher': None,
    'seconds': 3723.0,
    'images_synthesised': 1234567,
    'config': {'loss': {'bn': 0.5, 'weights': np.ones(2)}},
}


def run_of(workdir: Path, summary: Any = SUMMARY, **more: Any) -> page.Run:
    return page.Run(workdir, summary, **more)


def text_of(workdir: Path, summary: Any = SUMMARY, **more: Any) -> str:
    """The page of a run."""
    path = page.page(run_of(workdir, summary, **more))
    assert path == workdir / 'report.html'
    return path.read_text()


def test_page_holds_everything(tmp_path: Path) -> None:
    pictures.image_grid(np.zeros((1, 8, 8, 1)), np.zeros(1, int), ['a'], tmp_path / pictures.IMAGES)
    pictures.strip(np.zeros((3, 8, 8, 1)), np.arange(3), tmp_path / page.PROGRESS / '00000012.png')
    text = text_of(tmp_path, history=columns(40))
    assert 'cpsc on &lt;digits&gt;' in text
    assert 'The student reaches 49.00 % without real data: 50.0 % of the teacher' in text
    for told in (
        '98.00 %', '1:02:03', '1,234,567', '<td>1000</td>', '<td>–</td>', '&quot;bn&quot;',
        'after 12 rounds',
    ):  # fmt: skip
        assert told in text, told
    assert text.count('data:image/png;base64,') == 2
    assert f'<img style="min-width:{pixels(tmp_path / pictures.IMAGES).shape[1]}px"' in text
    for title in ('Accuracy', 'Losses of synthesis', 'Losses of the student', 'Speed'):
        assert text.count(f'<figcaption>{title} <small>') == 1  # one axis for each group
    assert not re.search(r'(src|href)="(?!data:)', text)  # nothing to fetch
    assert 'prefers-color-scheme: dark' in text and 'width=device-width' in text


def test_page_shows_warnings(tmp_path: Path) -> None:
    told = text_of(tmp_path, SUMMARY | {'warnings': {'no_such': 'a < b: --config.x=1'}})
    assert '<p class="warning">Warning: a &lt; b: --config.x=1</p>' in told
    assert 'Warning' not in text_of(tmp_path, SUMMARY | {'warnings': {}})


def test_page_says_what_was_measured(tmp_path: Path) -> None:
    kd = {**SUMMARY, 'method': 'anything', 'config': {'loop': 'kd'}}
    assert 'The student reaches 49.00 % on real data: 50.0' in text_of(tmp_path, kd)
    on_synthetic = artifacts.scores(None, 90.0, 95.0, 90.0)
    text = text_of(tmp_path, {**SUMMARY, 'dataset': '', **on_synthetic}, history=columns(4))
    assert 'cpsc on no data set' in text
    assert 'The student agrees with the teacher on 90.00 % of synthetic images held out' in text
    assert 'There were no real images, so its accuracy is not known.' in text
    assert 'The student reaches' not in text and '95.00 %' in text
    assert '<figcaption>Agreement <small>' in text
    assert artifacts.scores(98.0, 49.0, 50.0, 40.0) == {
        'teacher_accuracy': 98.0, 'student_accuracy_last': 49.0, 'student_accuracy_best': 50.0,
        'agreement_with_teacher': 40.0,
    }  # fmt: skip


@pytest.mark.parametrize('rounds', [0, 1])
def test_page_without_pictures(tmp_path: Path, rounds: int) -> None:
    text = text_of(tmp_path, {}, history=columns(rounds))
    assert '<img' not in text and ('<svg' in text) == (rounds > 0)


# Curves


def places(figure: str) -> list[list[tuple[float, float]]]:
    """The points of each line of a figure."""
    found = re.findall(r'<polyline class="[^"]+" points="([^"]+)"', figure)
    return [[tuple(map(float, point.split(','))) for point in line.split()] for line in found]


def test_a_curve_is_where_its_numbers_are() -> None:
    x = np.arange(11.0)
    figure = chart.figure('A', [chart.Line('a', x, x), chart.Line('b', x, 10 - x)], 'rounds', '%')
    up, down = places(figure)
    assert [a for a, _ in up] == [a for a, _ in down] and up[5] == down[5]
    assert up[0][0] == chart.LEFT and up[-1][0] == chart.WIDTH - chart.RIGHT
    assert up[0][1] == down[-1][1] > up[-1][1] == down[0][1]  # up is less in SVG
    steps = np.diff([height for _, height in up])
    assert np.allclose(steps, steps[0], atol=0.11)
    assert '>10</text>' in figure and 'aria-label="A: a, b, by rounds"' in figure


def test_an_axis_may_begin_at_zero() -> None:
    line = chart.Line('a', np.arange(3.0), np.array([100.0, 101.0, 102.0]))
    for from_zero in (False, True):
        figure = chart.figure('A', [line], 'rounds', '', from_zero=from_zero)
        assert (figure.count('>0</text>') == 2) == from_zero  # of both axes
        heights = [height for _, height in places(figure)[0]]
        assert (heights[0] - heights[-1] < 10) == from_zero


def test_an_axis_bends_where_numbers_are_far_apart() -> None:
    x = np.arange(5.0)
    y = np.array([1e-3, 1e-2, 1e-1, 1.0, 100.0])
    [line] = places(chart.figure('A', [chart.Line('a', x, y)], 'rounds', ''))
    heights = [height for _, height in line]
    assert heights == sorted(heights, reverse=True) and heights[0] - heights[1] > 15
    [line] = places(chart.figure('A', [chart.Line('a', x, -y)], 'rounds', ''))
    assert [height for _, height in line] == sorted(height for _, height in line)


def test_what_is_not_known_is_no_point() -> None:
    x = np.arange(4.0)
    y = np.array([np.nan, 1.0, np.inf, 2.0])
    [line] = places(chart.figure('A', [chart.Line('a', x, y)], 'rounds', ''))
    assert len(line) == 2
    assert chart.figure('A', [chart.Line('a', x, x * np.nan)], 'rounds', '') == ''
    [line] = places(chart.figure('A', [chart.Line('a', x[:1], x[:1])], 'rounds', ''))
    assert line[0][0] < line[1][0]  # a single point is seen
    many = chart.Line('a', np.arange(5000.0), np.arange(5000.0))
    assert len(places(chart.figure('A', [many], 'rounds', ''))[0]) == chart.POINTS


def test_names_of_curves_are_text() -> None:
    figure = chart.figure('<A>', [chart.Line('<b>', np.arange(2.0), np.arange(2.0))], 'x', 'y')
    assert '<b>' not in figure and '&lt;b&gt;' in figure and '&lt;A&gt;' in figure


# Classes


TESTED = classes.Tested(
    label=np.array([0, 0, 1, 1, 1, 1]),
    student=np.array([0, 1, 0, 0, 0, 0]),
    teacher=np.array([0, 0, 1, 1, 1, 0]),
)


def test_classes_are_counted() -> None:
    found = classes.by_class(TESTED, 3, ('cat', 'dog', 'none'))
    assert found.confusion.tolist() == [[1, 1, 0], [4, 0, 0], [0, 0, 0]]
    assert found.images.tolist() == [2, 4, 0]
    np.testing.assert_array_equal(found.student, [50, 0, np.nan])
    np.testing.assert_array_equal(found.teacher, [100, 75, np.nan])
    assert classes.collapsed(found) == ['dog']
    warning = artifacts.of_classes(found)['collapsed_classes']
    assert 'hardly any image of dog, which the teacher knows' in warning
    both = classes.by_class(TESTED._replace(teacher=TESTED.student), 3, ())
    assert classes.collapsed(both) == [] and artifacts.of_classes(both) == {}
    assert both.names == ('0', '1', '2') and artifacts.of_classes(None) == {}


def test_tables_of_classes_are_files(tmp_path: Path) -> None:
    found = classes.by_class(TESTED, 3, ('cat, tom', 'dog', 'none'))
    classes.write(tmp_path, found)
    again = classes.read(tmp_path)
    assert again is not None and again.names == found.names
    for one, other in zip(found[1:], again[1:]):
        np.testing.assert_array_equal(one, other)
    (tmp_path / classes.CONFUSION).write_text('class,a\na,b\n')
    assert classes.read(tmp_path) is None and classes.read(tmp_path / 'none') is None


def test_page_shows_classes_and_confusions(tmp_path: Path) -> None:
    classes.write(tmp_path, classes.by_class(TESTED, 3, ('<cat>', 'dog', 'none')))
    text = text_of(tmp_path)
    rows = re.findall(r'<th scope="row">([^<]+)</th><td class="n">([^<]+)</td>', text)
    assert rows == [('dog', '0.0 %'), ('&lt;cat&gt;', '50.0 %'), ('none', '–')]
    assert '<td style="--v:1.00">4</td>' in text and '<td style="--v:0.50">1</td>' in text


def test_page_of_many_classes_shows_the_worst_pairs(tmp_path: Path) -> None:
    label = np.repeat(np.arange(30), 10)
    student = label.copy()
    student[:9] = 7  # of class 0
    tested = classes.Tested(label, student, label)
    classes.write(tmp_path, classes.by_class(tested, 30, ()))
    text = text_of(tmp_path)
    assert '<tr><td>0</td><td>7</td><td class="n">9</td></tr>' in text
    assert 'the other 10 classes' in text and 'The matrix of confusions' in text
    assert text.index('<th scope="row">0</th>') < text.index('<th scope="row">1</th>')


def test_heat_is_dark_where_shares_are_high() -> None:
    picture = pixels(io.BytesIO(pictures.heat(np.array([[0.0, 0.5], [1.0, np.nan]]))))
    assert picture.shape == (2, 2, 3) and (picture[0, 0] == 255).all()
    assert (picture[1, 0] < picture[0, 1]).all() and (picture[1, 1] == 255).all()


def test_a_strip_has_an_image_of_each_class(tmp_path: Path) -> None:
    images = np.zeros((4, 8, 8, 3), np.float32)
    images[0], images[1], images[3] = [1, 0, 0], [0, 1, 0], [0, 0, 1]
    pictures.strip(images, np.array([5, 2, 5, 9]), tmp_path / 'a.png')
    picture = pixels(tmp_path / 'a.png')
    assert picture.shape == (8, 3 * 8 + 2, 3)
    assert (picture[:, :8] == [0, 255, 0]).all() and (picture[:, 9:17] == [255, 0, 0]).all()
    assert (picture[:, 18:] == [0, 0, 255]).all()
    pictures.strip(np.zeros((40, 128, 96, 1)), np.arange(40), tmp_path / 'b.png')
    assert pixels(tmp_path / 'b.png').shape == (64, 10 * 48 + 9 * 3, 3)


# Several runs


def two_runs(tmp_path: Path) -> list[page.Run]:
    runs = []
    for i, name in enumerate(('a', 'b')):
        summary = {**SUMMARY, 'student_accuracy_last': 49.0 + i, 'seed': i,
                   'teacher_queries': 10 * int(SUMMARY['seconds']),
                   'config': {'student': {'lr': 0.1 + i}, 'seed': i}}  # fmt: skip
        place = tmp_path / name / 'run'
        classes.write(place, classes.by_class(TESTED, 3, ()))
        files.write_json(place / 'summary.json', summary)
        runs.append(page.Run(place, summary, columns(9 + i), name=f'{name}/<run>'))
    return runs


def test_a_comparison_shows_runs_side_by_side(tmp_path: Path) -> None:
    path = page.comparison(two_runs(tmp_path), tmp_path / 'both.html')
    text = path.read_text()
    assert not re.search(r'(src|href)="(?!data:)', text) and '<run>' not in text
    for run, accuracy in (('a/&lt;run&gt;', '49.00 %'), ('b/&lt;run&gt;', '50.00 %')):
        row = re.search(rf'<tr><th scope="row">{run}</th>(.*?)</tr>', text)
        assert row and accuracy in row[1] and '<td>10.0</td>' in row[1]
    differ = re.findall(r'<th scope="row">([\w.]+)</th><td>([^<]+)</td><td>([^<]+)</td>', text)
    assert differ == [('student.lr', '0.1', '1.1'), ('seed', '0', '1')]
    assert '<figcaption>Student accuracy by seconds' in text
    assert text.count('<polyline') == 2 * 2 * 2 + 2  # two measures by two axes, and the speed


def test_the_command_makes_both_pages(tmp_path: Path, capsys: Any) -> None:
    places = [str(run.workdir) for run in two_runs(tmp_path)]
    assert main(['report', *places, f'--output={tmp_path / "c.html"}']) == 0
    text = (tmp_path / 'c.html').read_text()
    assert '>a/run<' in text and '>b/run<' in text
    assert main(['report', places[0]]) == 0
    assert (tmp_path / 'a' / 'run' / 'report.html').exists()
    capsys.readouterr()
    assert main(['report', '--json', *places]) == 0
    first, second = json.loads(capsys.readouterr().out)
    assert (first['run'], second['student_accuracy_last']) == ('a/run', 50.0)
    assert first['per_class'] == {'0': 50.0, '1': 0.0, '2': None}
    assert first['images_per_second'] == pytest.approx(10, abs=0.1)
    assert main(['report', str(tmp_path)]) == 1
    assert 'holds no finished run' in capsys.readouterr().err
