"""The versions that a release is tested with and lists."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

import dfkd_jax

ROOT = Path(__file__).resolve().parents[1]
EXTRAS = ('onnx', 'labels', 'diffusion', 'deploy')  # those of users, as .ci/versions has them
FROZEN = sorted((ROOT / 'requirements').glob('*.txt'))


@pytest.fixture(scope='module')
def pins() -> Any:
    """The module that .ci/versions and .ci/freeze call."""
    spec = importlib.util.spec_from_file_location('pins', ROOT / '.ci' / 'pins.py')
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_oldest_versions_are_the_lower_bounds(pins: Any) -> None:
    lines = pins.requirements(extras=EXTRAS)
    assert len(lines) > 15 and f'users=({" ".join(EXTRAS)})' in (ROOT / '.ci/versions').read_text()
    found = pins.oldest(lines)
    for line in lines:
        requirement = Requirement(line)
        lower = [each.version for each in requirement.specifier if each.operator in ('>=', '==')]
        assert [found[requirement.name]] == lower, 'every requirement has one lower bound'
        assert found[requirement.name] in requirement.specifier


def test_a_bound_is_read_from_any_line(pins: Any) -> None:
    lines = [
        'a>=1.2,<2',
        'b==3.0',
        'c[extra] >= 4 ; python_version < "3.12"',
        'd<5',
        'e-f.g<=2,>=1',
    ]
    assert pins.oldest(lines) == {'a': '1.2', 'b': '3.0', 'c': '4', 'e-f.g': '1'}


def test_a_report_of_pip_becomes_pins_without_the_package_itself(pins: Any) -> None:
    def entry(name: str, version: str, info: dict[str, Any]) -> dict[str, Any]:
        return {'metadata': {'name': name, 'version': version}, 'download_info': info}

    report = {
        'install': [
            entry('dfkd_jax', '0.0.0', {'url': 'file:///here', 'dir_info': {}}),
            entry('numpy', '2.4.6', {'url': 'https://there', 'archive_info': {}}),
            entry('absl-py', '2.3.1', {'url': 'https://there', 'archive_info': {}}),
        ]
    }
    assert list(pins.frozen(report).items()) == [('absl-py', '2.3.1'), ('numpy', '2.4.6')]


@pytest.mark.parametrize('path', FROZEN, ids=lambda path: path.stem)
def test_frozen_versions_are_whole(pins: Any, path: Path) -> None:
    lines = path.read_text().splitlines()
    versions = dict(line.split('==') for line in lines)
    assert len(versions) == len(lines) > 20
    version, python = re.fullmatch(r'(\d+\.\d+\.\d+)-(python3\.\d+)', path.stem).groups()
    assert path.with_name(f'{version}-python3.{23 - int(python[-2:])}.txt').is_file(), 'for both'
    if version != dfkd_jax.__version__:
        return  # of an older release, whose requirements were others
    listed = {re.sub(r'[-_.]+', '-', name).lower(): each for name, each in versions.items()}
    for line in pins.requirements():
        requirement = Requirement(line)
        name = re.sub(r'[-_.]+', '-', requirement.name).lower()
        assert listed[name] in requirement.specifier, line
