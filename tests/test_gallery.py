"""The gallery: a classifier inverted, resumed to the same pictures; a sheet of runs."""

from __future__ import annotations

import csv
import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import reference
from PIL import Image

from dfkd_jax.errors import ConfigError
from dfkd_jax.labels import names

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope='module')
def gallery() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / 'experiments')
        yield importlib.import_module('gallery')


def test_classes_are_found_by_any_of_their_names(gallery: Any) -> None:
    words = names.class_names('imagenet')
    found = gallery.find_classes(list(gallery.CLASSES), words)
    assert len(set(found)) == 16
    assert found[:2] == [1, 130]  # goldfish and flamingo
    assert gallery.find_classes(['Carassius auratus'], words) == [1]
    with pytest.raises(ConfigError, match="has 'gold fish'"):
        gallery.find_classes(['gold fish'], words)


def test_a_folder_of_other_settings_is_refused(gallery: Any, tmp_path: Path) -> None:
    gallery.own(tmp_path, {'seed': 0, 'size': 224})
    gallery.own(tmp_path, {'seed': 0, 'size': 224})
    with pytest.raises(ConfigError, match='was begun with another size'):
        gallery.own(tmp_path, {'seed': 0, 'size': 32})


@pytest.mark.slow
def test_a_stopped_inversion_continues_to_the_same_pictures(
    gallery: Any, rule: Any, tmp_path: Path
) -> None:
    image = np.zeros((1, 32, 32, 3), np.float32)
    weights = reference.weights(rule, gallery.MODEL, image, num_classes=1000)
    np.savez(tmp_path / 't.npz', **weights)

    def invert(folder: str, steps: int) -> Path:
        command = ['gallery', 'invert', f'--output={tmp_path / folder}', '--classes=goldfish,daisy',
                   f'--steps={steps}', '--every=2', '--size=32', '--set=loss.bn=0.1',
                   f'--teacher={tmp_path / "t.npz"}']  # fmt: skip
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, 'argv', command)
            with jax.numpy_dtype_promotion('standard'), jax.numpy_rank_promotion('allow'):
                gallery.main()
        return tmp_path / folder

    whole = invert('whole', 4)
    invert('parts', 2)
    parts = invert('parts', 4)
    for name in ('00-goldfish.png', '01-daisy.png'):
        pictures = [np.asarray(Image.open(f / 'pictures' / name)) for f in (whole, parts)]
        assert pictures[0].shape == (32, 32, 3)
        assert np.array_equal(*pictures)
    curves = [list(csv.DictReader(open(folder / 'curve.csv'))) for folder in (whole, parts)]
    assert [row['step'] for row in curves[0]] == ['1', '2', '3', '4']
    assert curves[0] == curves[1]
    receipt = json.loads((parts / 'gallery.json').read_text())
    assert (receipt['steps'], receipt['loss']['bn']) == (4, 0.1)
    assert [each['asked'] for each in receipt['pictures']] == ['goldfish', 'daisy']
    assert all(len(each['teacher_says']) == 5 for each in receipt['pictures'])
    assert Image.open(parts / 'gallery.png').size[0] > 300


@pytest.mark.slow
def test_a_sheet_of_runs(gallery: Any, tmp_path: Path) -> None:
    for seed in (0, 1):
        subprocess.run(
            [sys.executable, '-m', 'dfkd_jax.main', '--config=digits:cpsc,smoke',
             f'--workdir={tmp_path / str(seed)}', f'--config.seed={seed}'],
            cwd=ROOT, check=True, capture_output=True,
        )  # fmt: skip
    command = ['gallery', 'page', f'first={tmp_path / "0"}', f'second={tmp_path / "1"}',
               f'--output={tmp_path / "sheet.png"}', '--draw=64', '--each=2']  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, 'argv', command)
        with jax.numpy_dtype_promotion('standard'), jax.numpy_rank_promotion('allow'):
            gallery.main()
    told = json.loads((tmp_path / 'sheet.json').read_text())['rows']
    assert list(told) == ['first', 'second']
    for row in told.values():
        assert row['images'] == 64
        assert abs(sum(row['share_of_classes']) - 1) < 1e-3
    assert Image.open(tmp_path / 'sheet.png').size[0] > 300
