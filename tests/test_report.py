"""The pictures show what they are given, where it should be; the page holds all of it."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dfkd_jax.reporting import artifacts, page


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert('RGB'))


def test_grid_enlarges_pixels_and_puts_each_class_in_its_row(tmp_path: Path) -> None:
    images = np.zeros((3, 8, 8, 3), np.float32)
    images[0] = [1, 0, 0]  # of class 1
    images[1, 3, 5] = [0, 2.0, np.nan]  # of class 0; values beyond [0, 1] are clipped
    images[2] = [0, 0, 1]  # of class 1
    page.image_grid(images, np.array([1, 0, 1]), ['cat', 'dog'], tmp_path / 'a.png')
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
    page.image_grid(images, np.arange(4), None, tmp_path / 'a.png')
    height, width, _ = pixels(tmp_path / 'a.png').shape
    assert 4 * 56 <= height <= 4 * 120 + 60
    assert width < 700


def test_grid_samples_many_classes(tmp_path: Path) -> None:
    images = np.random.default_rng(0).random((150, 8, 8, 1))
    names = [f'class {i}' for i in range(100)]
    page.image_grid(images, np.arange(150) % 75, names, tmp_path / 'a.png')
    height, _, _ = pixels(tmp_path / 'a.png').shape
    assert 20 * 60 <= height < 21 * 60 + 60


def test_grid_refuses_other_shapes(tmp_path: Path) -> None:
    for images, labels in [((2, 8, 8), (2,)), ((2, 8, 8, 2), (2,)), ((2, 8, 8, 1), (3,))]:
        with pytest.raises(ValueError, match='expected images'):
            page.image_grid(np.zeros(images), np.zeros(labels, int), None, tmp_path / 'a.png')
    with pytest.raises(ValueError, match='no images'):
        page.image_grid(np.zeros((0, 8, 8, 1)), np.zeros(0, int), ['a'], tmp_path / 'a.png')
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
    page.curves(columns(rounds), tmp_path / 'curves.png', references)
    picture = pixels(tmp_path / 'curves.png')
    assert picture.shape == (450, 1560, 3)
    assert picture.std() > 0


def test_curves_without_losses(tmp_path: Path) -> None:
    page.curves({'round': np.zeros(0)}, tmp_path / 'curves.png', {'teacher': 50.0})
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


def test_page_holds_everything(tmp_path: Path) -> None:
    page.curves({'round': np.arange(3.0)}, tmp_path / page.CURVES)
    page.image_grid(np.zeros((1, 8, 8, 1)), np.zeros(1, int), ['a'], tmp_path / page.IMAGES)
    path = page.page(tmp_path, SUMMARY)
    text = path.read_text()
    assert path == tmp_path / 'report.html'
    assert 'cpsc on &lt;digits&gt;' in text
    assert 'The student reaches 49.00 % without real data: 50.0 % of the teacher' in text
    for told in (
        '98.00 %',
        '1:02:03',
        '1,234,567',
        '<td>1000</td>',
        '<td>–</td>',
        '&quot;bn&quot;',
    ):
        assert told in text
    assert text.count('data:image/png;base64,') == 2
    assert not re.search(r'(src|href)="(?!data:)', text)  # nothing to fetch


def test_page_shows_warnings(tmp_path: Path) -> None:
    path = page.page(tmp_path, SUMMARY | {'warnings': {'no_such': 'a < b: --config.x=1'}})
    assert '<p>Warning: a &lt; b: --config.x=1</p>' in path.read_text()
    assert 'Warning' not in page.page(tmp_path, SUMMARY | {'warnings': {}}).read_text()


def test_page_says_what_was_measured(tmp_path: Path) -> None:
    kd = {**SUMMARY, 'method': 'anything', 'config': {'loop': 'kd'}}
    assert 'The student reaches 49.00 % on real data: 50.0' in page.page(tmp_path, kd).read_text()
    on_synthetic = artifacts.scores(None, 90.0, 95.0, 90.0)
    text = page.page(tmp_path, {**SUMMARY, 'dataset': '', **on_synthetic}).read_text()
    assert 'cpsc on no data set' in text
    assert 'The student agrees with the teacher on 90.00 % of synthetic images held out' in text
    assert 'There were no real images, so its accuracy is not known.' in text
    assert 'The student reaches' not in text and '95.00 %' in text
    assert artifacts.scores(98.0, 49.0, 50.0, 40.0) == {
        'teacher_accuracy': 98.0, 'student_accuracy_last': 49.0, 'student_accuracy_best': 50.0,
        'agreement_with_teacher': 40.0,
    }  # fmt: skip


def test_page_without_pictures(tmp_path: Path) -> None:
    assert '<img' not in page.page(tmp_path, {}).read_text()
