"""CONTRIBUTING shows a method as it is, and says where its name must stand."""

from __future__ import annotations

from pathlib import Path

from configs import common
from dfkd_jax.methods import METHODS, noise

ROOT = Path(__file__).resolve().parents[1]


def test_the_worked_example_is_the_file() -> None:
    text = Path(noise.__file__).read_text()
    assert f'```python\n{text}```' in (ROOT / 'CONTRIBUTING.md').read_text()
    assert len(text.splitlines()) < 80


def test_a_method_is_in_the_registry_and_in_the_configs() -> None:
    assert METHODS['noise'] is noise.make
    assert set(METHODS) == set(common.METHODS) - {'kd'}


def test_every_method_is_told_in_the_readme() -> None:
    text = (ROOT / 'README.md').read_text()
    assert all(f'`{method}`' in text for method in common.METHODS)
