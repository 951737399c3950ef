"""CONTRIBUTING links the smallest method; registry, configs and README name the same methods."""

from __future__ import annotations

import importlib
import inspect
from pathlib import Path

import pytest

from dfkd_jax.configs import common
from dfkd_jax.methods import METHODS

ROOT = Path(__file__).resolve().parents[1]
REFERENCES = {'kd'}  # runs of real data: a config, and no method


def test_contributing_links_the_smallest_method() -> None:
    text = (ROOT / 'CONTRIBUTING.md').read_text()
    for path in ('dfkd_jax/methods/noise.py', 'configs/methods/noise.py'):
        assert f'({path})' in text and 0 < len((ROOT / path).read_text().splitlines()) < 80
    assert 'def make(' not in text, 'a copy goes out of date'


def test_a_method_is_in_the_registry_and_has_a_config_file() -> None:
    assert set(METHODS) == set(common.METHODS) - REFERENCES
    for name, make in METHODS.items():
        assert list(inspect.signature(make).parameters) == ['config', 'models', 'shards'], name


@pytest.mark.parametrize('method', common.METHODS)
def test_a_config_file_has_what_common_asks_for(method: str) -> None:
    file = importlib.import_module(f'dfkd_jax.configs.methods.{method}')
    assert isinstance(file.LOOP, str) and isinstance(file.FLAGS, tuple)
    assert list(inspect.signature(file.published).parameters) == ['config']
    assert list(inspect.signature(file.adapt).parameters) == ['config', 'flags']
    assert file.__doc__ and file.published.__doc__ and file.adapt.__doc__


def test_every_method_and_flag_is_told_in_the_readme() -> None:
    text = (ROOT / 'README.md').read_text()
    assert all(f'`{method}`' in text for method in common.METHODS)
    files = [importlib.import_module(f'dfkd_jax.configs.methods.{m}') for m in common.METHODS]
    assert all(f'`{flag}`' in text for flag in {'smoke'}.union(*(file.FLAGS for file in files)))
