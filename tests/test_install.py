"""What `pip install` of a wheel gives: everything a run needs, from any folder."""

from __future__ import annotations

import fnmatch
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

import dfkd_jax

ROOT = Path(__file__).resolve().parents[1]
BUILT_FROM = ('pyproject.toml', 'setup.cfg', 'requirements.txt', 'README.md', 'LICENSE')
BUILT_FROM += ('MANIFEST.in', 'CHANGELOG.md', 'CITATION.cff', 'THIRD_PARTY.md')
FOLDERS = ('dfkd_jax', 'configs')


def ran(command: list[str | Path], folder: Path, **environment: str) -> str:
    """What a command prints in a folder.  Raises AssertionError where it fails."""
    # Nothing may come from the checkout: not the tests' path, and not what a build left there.
    given = {name: value for name, value in os.environ.items() if name != 'PYTHONPATH'}
    done = subprocess.run(
        command, cwd=folder, env=given | environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope='module')
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what of the checkout a distribution is built from."""
    pytest.importorskip('setuptools', minversion='77', reason='it builds the wheel')
    source = tmp_path_factory.mktemp('source')
    for name in BUILT_FROM:
        shutil.copy(ROOT / name, source)
    for name in FOLDERS:
        ignored = shutil.ignore_patterns('__pycache__')
        shutil.copytree(ROOT / name, source / name, ignore=ignored)
    return source


def built(source: Path, kind: str) -> Path:
    """A distribution, `wheel` or `sdist`, of the sources in a folder."""
    build = f'from setuptools.build_meta import build_{kind}; build_{kind}("dist")'
    ran([sys.executable, '-c', build], source)
    (found,) = source.glob({'wheel': 'dist/*.whl', 'sdist': 'dist/*.tar.gz'}[kind])
    return found


@pytest.fixture(scope='module')
def wheel(source: Path) -> Path:
    """A wheel, built from a copy of the checkout."""
    return built(source, 'wheel')


@pytest.fixture(scope='module')
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of a fresh environment with the wheel, and with what runs these tests."""
    environment = tmp_path_factory.mktemp('environment')
    ran([sys.executable, '-m', 'venv', '--without-pip', environment], environment)
    python = environment / 'bin' / 'python'
    install = ['install', '--quiet', '--no-deps', '--no-index', wheel]
    ran([sys.executable, '-m', 'pip', '--python', python, *install], environment)
    where = 'import sysconfig; print(sysconfig.get_path("purelib"))'
    packages = Path(ran([python, '-c', where], environment).strip())
    # Behind its own packages, so that dfkd_jax is the wheel's.
    (packages / 'running.pth').write_text(sysconfig.get_path('purelib'))
    return python


def test_a_wheel_holds_every_file(wheel: Path) -> None:
    """Of the package, and the configs as a package of it; and nothing beside it."""
    expected = set()
    for folder, name in (('dfkd_jax', 'dfkd_jax'), ('configs', 'dfkd_jax/configs')):
        for path in (ROOT / folder).rglob('*'):
            if path.is_file() and '__pycache__' not in path.parts:
                expected.add(f'{name}/{path.relative_to(ROOT / folder).as_posix()}')
    expected.remove('dfkd_jax/configs/__init__.py')  # which is for checkouts
    found = {name for name in zipfile.ZipFile(wheel).namelist() if '.dist-info/' not in name}
    assert found == expected, 'a new folder has a line in setup.cfg'


def test_a_wheel_brings_the_command_and_the_licences(wheel: Path) -> None:
    files = zipfile.ZipFile(wheel)
    apart = {
        name.split('.dist-info/')[1]: name for name in files.namelist() if '.dist-info/' in name
    }
    assert {'licenses/LICENSE', 'licenses/THIRD_PARTY.md'} <= set(apart)
    assert 'dfkd = dfkd_jax.command.main:main' in files.read(apart['entry_points.txt']).decode()
    needs = re.findall(r'^Requires-Dist: ([^;\n]+)$', files.read(apart['METADATA']).decode(), re.M)
    lines = (ROOT / 'requirements.txt').read_text().splitlines()
    listed = [line for line in lines if line and not line.startswith('#')]
    assert {each.split('<')[0].split('>')[0] for each in needs} == {
        each.split('<')[0].split('>')[0] for each in listed
    }


@pytest.mark.slow
def test_an_sdist_is_enough_for_the_same_wheel(source: Path, wheel: Path, tmp_path: Path) -> None:
    with tarfile.open(built(source, 'sdist')) as archive:
        archive.extractall(tmp_path, filter='data')
    (place,) = tmp_path.iterdir()
    there = {path.relative_to(place).as_posix() for path in place.rglob('*') if path.is_file()}
    assert {
        'LICENSE',
        'THIRD_PARTY.md',
        'CITATION.cff',
        'CHANGELOG.md',
        'configs/digits.py',
    } <= there
    assert not {name for name in there if name.startswith(('tests/', 'experiments/', 'docs/'))}
    again = zipfile.ZipFile(built(place, 'wheel'))
    first = zipfile.ZipFile(wheel)
    contents = [
        {name: file.read(name) for name in file.namelist() if '.dist-info/' not in name}
        for file in (first, again)
    ]
    assert contents[0] == contents[1]


def test_what_others_made_is_listed_with_its_licence() -> None:
    """Every file of the package that is no code."""
    rows = re.findall(r'^\| `([^`]+)` \|(.*)\|$', (ROOT / 'THIRD_PARTY.md').read_text(), re.M)
    shipped = [
        path.relative_to(ROOT).as_posix() for path in (ROOT / 'dfkd_jax').rglob('*')
        if path.is_file() and path.suffix not in ('.py', '.cc', '.pyc')
    ]  # fmt: skip
    assert len(shipped) > 10
    for name in shipped:
        found = [about for pattern, about in rows if fnmatch.fnmatch(name, pattern)]
        assert len(found) == 1 and found[0].strip().split(' | ')[-1], name
    for pattern, _ in rows:
        assert fnmatch.filter(shipped, pattern), f'{pattern} is not there'


def test_the_citation_is_of_this_version() -> None:
    text = (ROOT / 'CITATION.cff').read_text()
    assert f'\nversion: {dfkd_jax.__version__}\n' in text
    for field in ('cff-version', 'message', 'title', 'authors', 'license'):  # what readers need
        assert re.search(rf'^{field}:', text, re.MULTILINE), field


def test_configs_are_found_where_the_wheel_is_installed(python: Path, tmp_path: Path) -> None:
    """By name, by path, and in a file of the user's own."""
    (tmp_path / 'mine.py').write_text(
        'from dfkd_jax.configs import digits\n'
        'def get_config(arg=None):\n'
        '    return digits.get_config(arg)\n'
    )
    code = (
        'import dfkd_jax\n'
        'from dfkd_jax import cli\n'
        'for name in cli.config_names():\n'
        '    assert cli.load_config(name) == cli.load_config(f"configs/{name}.py")\n'
        'assert cli.load_config("mine.py:nayer,smoke").method == "nayer"\n'
        'print(dfkd_jax.__file__, *cli.config_names())\n'
    )
    place, *names = ran([python, '-c', code], tmp_path, JAX_PLATFORMS='cpu').split()
    assert Path(place).is_relative_to(python.parents[1])
    shared = ('common', '__init__')
    assert names == sorted(
        path.stem for path in (ROOT / 'configs').glob('*.py') if not path.stem.startswith(shared)
    )


@pytest.mark.slow
def test_an_installed_wheel_runs_outside_the_repository(python: Path, tmp_path: Path) -> None:
    command = [python, '-m', 'dfkd_jax.main', '--config=digits:nayer,smoke', '--workdir=run']
    said = ran(command, tmp_path, JAX_PLATFORMS='cpu', JAX_DISABLE_MOST_OPTIMIZATIONS='1')
    assert 'student resnet8_half: last ' in said
    assert json.loads((tmp_path / 'run' / 'summary.json').read_text())['method'] == 'nayer'
