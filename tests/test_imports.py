"""Who may import whom, and who may say what, read from the source files."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = 'dfkd_jax'
FILES = sorted(ROOT.glob(f'{PACKAGE}/**/*.py'))
CONFIGS = sorted(ROOT.glob('configs/*.py'))

# What each part may import of this package; a part is a module or a folder.
RUN = {'augment', 'build', 'checkpoint', 'contract', 'data', 'evaluate', 'losses', 'methods'}
RUN |= {
    'hosts',
    'metrics',
    'models',
    'parallel',
    'port',
    'report',
    'results',
    'rounds',
    'workdir',
    '',
}
INTERNAL = {
    '': {'models', 'port'},  # dfkd_jax/__init__.py: the public API
    'contract': set(),
    'hosts': {'contract'},
    'parallel': set(),
    'losses': set(),
    'augment': set(),
    'bank': {'parallel'},
    'inversion': {'augment', 'bank', 'contract', 'losses', 'parallel'},
    'generative': {'contract', 'losses', 'parallel'},
    'models': {'models'},
    'methods': {'methods', 'contract', 'losses', 'augment', 'bank', 'inversion', 'parallel'}
    | {'diffusion', 'generative'},
    'untrusted': set(),
    'data': {'data', 'untrusted'},
    'checkpoint': {'hosts', 'untrusted'},
    'metrics': {'checkpoint', 'hosts'},
    'report': {'checkpoint', 'metrics'},
    'workdir': {'', 'checkpoint', 'contract', 'hosts'},
    'evaluate': {'contract', 'data', 'parallel'},
    'port': {'port', 'models', 'untrusted'},
    'labels': {'checkpoint', 'data', 'diffusion', 'untrusted'},
    'diffusion': {'diffusion', 'checkpoint', 'models', 'untrusted'},
    'build': {'checkpoint', 'contract', 'data', 'labels', 'methods', 'models', 'parallel', 'port'}
    | {'diffusion', 'disk_bank'},
    'cli': {'build', 'hosts'},
    'teach': RUN | {'cli'},
    'rounds': {'contract', 'parallel'},
    'results': {'build', 'checkpoint', 'contract', 'data', 'port', 'report', 'workdir'},
    'disk_bank': {'checkpoint', 'data'},
    'offline': RUN | {'disk_bank', 'labels', 'teach'},
    'real': RUN | {'teach'},
    'train': RUN | {'offline', 'real', 'teach'},
    'transfer': RUN | {'teach'},
    'transfer_dense': RUN | {'teach', 'transfer'},
    'diffusion.train': RUN | {'cli', 'diffusion'},  # a program, beside what it trains
    'main': {'cli', 'train'},
}
# What the pure parts may import of others' packages, beside the standard library's types.
EXTERNAL = {
    'contract': {'jax', 'flax', 'optax'},
    'parallel': {'jax', 'numpy'},
    'losses': {'jax', 'optax'},
    'augment': {'jax'},
    'bank': {'jax', 'flax'},
    'untrusted': set(),
    'inversion': {'jax', 'flax', 'optax'},
    'generative': {'jax', 'flax', 'optax'},
    'models': {'jax', 'flax'},
    'methods': {'jax', 'flax', 'optax'},
    'port': {'jax', 'flax', 'numpy', 'safetensors', 'torch'},
    'labels': {'jax', 'numpy', 'safetensors', 'scipy', 'tokenizers'},
    'diffusion': {'jax', 'flax', 'numpy', 'safetensors', 'tokenizers'},
}
PURE = {'contract', 'parallel', 'losses', 'augment', 'bank', 'inversion', 'generative', 'models'}
PURE |= {'methods'}
PURE_STANDARD = {
    '__future__',
    'collections',
    'dataclasses',
    'difflib',
    'functools',
    'math',
    'typing',
}

# Slow to import, or heavy, or absent: only inside functions.
LAZY = {
    'torch',
    'tensorflow',
    'tensorflow_datasets',
    'matplotlib',
    'sklearn',
    'PIL',
    'tensorboardX',
    'tokenizers',
}

SHARDING = {'pmap', 'shard_map', 'Mesh', 'make_mesh', 'NamedSharding', 'PartitionSpec'}


def part(path: Path) -> str:
    """`models/wrn.py` -> 'models', `losses.py` -> 'losses', `__init__.py` -> ''.

    A program in a folder is a part of its own: `diffusion/train.py` -> 'diffusion.train'.
    """
    parts = path.relative_to(ROOT / PACKAGE).with_suffix('').parts
    return name if (name := '.'.join(parts)) in INTERNAL else parts[0].removesuffix('__init__')


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), str(path))


def imports(tree: ast.AST) -> Iterator[str]:
    """The full names that a tree imports: `from a import b` gives 'a.b'."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, 'imports are absolute'
            yield from (f'{node.module}.{alias.name}' for alias in node.names)


def at_import(tree: ast.Module) -> Iterator[str]:
    """The names imported when the module is, and not only when a function is called."""
    for node in tree.body:
        if not isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield from imports(node)


def said(tree: ast.AST) -> set[str]:
    """The identifiers that code uses (words in docstrings and comments do not count)."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            names.add(node.id)
        elif isinstance(node, ast.Attribute):
            names.add(node.attr)
        elif isinstance(node, ast.alias):
            names |= set(node.name.split('.'))
    return names


def modules(names: Iterator[str]) -> set[str]:
    """The parts of this package among imported names."""
    parts = set()
    for name in names:
        top, _, rest = name.partition('.')
        if top == PACKAGE:
            second = rest.partition('.')[0]
            known = (ROOT / PACKAGE / second).is_dir() or (ROOT / PACKAGE / f'{second}.py').exists()
            parts.add(second if known else '')  # a name of dfkd_jax/__init__.py
    return parts


def ids(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize('path', FILES, ids=ids)
def test_parts_import_what_the_layout_allows(path: Path) -> None:
    where, names = part(path), list(imports(parse(path)))
    assert where in INTERNAL, f'{ids(path)} is new: give it a row in this file and in CONTRIBUTING'
    found = modules(iter(names))
    if path.name == '__main__.py':  # a folder's command may use what the folder may not
        found -= {'checkpoint'}
    assert found <= INTERNAL[where], f'{ids(path)} imports {found - INTERNAL[where]}'
    others = {name.partition('.')[0] for name in names} - {PACKAGE}
    assert 'experiments' not in others and 'configs' not in others
    if where in EXTERNAL:
        third_party = others - set(sys.stdlib_module_names)
        assert third_party <= EXTERNAL[where], third_party - EXTERNAL[where]
    if where in PURE:
        standard = others & set(sys.stdlib_module_names)
        assert standard <= PURE_STANDARD, f'{ids(path)} imports {standard - PURE_STANDARD}'


@pytest.mark.parametrize('path', FILES, ids=ids)
def test_heavy_packages_are_imported_in_functions(path: Path) -> None:
    found = {name.partition('.')[0] for name in at_import(parse(path))}
    assert not found & LAZY


@pytest.mark.parametrize('path', FILES, ids=ids)
def test_one_file_says_how_programs_are_compiled_and_sharded(path: Path) -> None:
    names = said(parse(path))
    if part(path) == 'parallel':
        assert {'jit', 'pmap', 'shard_map'} <= names
    else:
        assert not names & (SHARDING | {'jit'})
    assert not names & {'jax_utils', 'tree_map', 'PRNGKey'}, 'deprecated'


@pytest.mark.parametrize(
    'path', [p for p in FILES if part(p) == 'methods' and p.name != '__init__.py'], ids=ids
)
def test_a_method_knows_no_other_and_nothing_of_its_surroundings(path: Path) -> None:
    tree = parse(path)
    for name in imports(tree):
        assert not name.startswith(f'{PACKAGE}.methods'), f'{ids(path)} imports {name}'
        if name.startswith(f'{PACKAGE}.parallel'):
            assert name == f'{PACKAGE}.parallel.Shards', 'only for the type of an argument'
    assert not said(tree) & {'open', 'print', 'devices', 'device_count', 'flags', 'logging'}


@pytest.mark.parametrize('name', ['errors', 'layers', 'unet', 'vae', 'clip_text', 'resize'])
def test_what_a_prior_computes_knows_no_files(name: str) -> None:
    """Of the diffusion models, `folder`, `tokenizer` and `prior` read; networks only compute."""
    tree = parse(ROOT / PACKAGE / 'diffusion' / f'{name}.py')
    others = {each.partition('.')[0] for each in imports(tree)} & set(sys.stdlib_module_names)
    assert others <= PURE_STANDARD
    assert modules(imports(tree)) <= {'diffusion', 'models'}
    readers = {f'{PACKAGE}.diffusion.{reader}' for reader in ('folder', 'tokenizer', 'prior')}
    assert not any(each.startswith(tuple(readers)) for each in imports(tree))


@pytest.mark.parametrize('path', CONFIGS, ids=ids)
def test_configs_are_self_contained(path: Path) -> None:
    found = {name.partition('.')[0] for name in imports(parse(path))}
    assert found <= {'__future__', 'ml_collections', 'configs'}


@pytest.mark.parametrize('path', FILES, ids=ids)
def test_training_images_are_read_where_real_data_is_the_point(path: Path) -> None:
    """A data-free run loads the test split alone, by its name."""
    splits = {
        ast.unparse(node.args[1])
        for node in ast.walk(parse(path))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == 'data.load'
    }
    allowed = {'teach', 'real', 'transfer', 'diffusion.train'}
    assert splits <= {"'test'"} or part(path) in allowed


def test_the_entry_point_has_no_ideas() -> None:
    path = ROOT / PACKAGE / 'main.py'
    assert len(path.read_text().splitlines()) <= 50


def test_main_starts_light() -> None:
    """A mistake in a config should not wait for matplotlib, nor anything need PyTorch."""
    if not (ROOT / PACKAGE / 'train.py').exists():
        pytest.skip('there is no loop yet')
    heavy = sorted(LAZY)
    code = f'import sys, {PACKAGE}.main; print([m for m in {heavy} if m in sys.modules])'
    env = {**os.environ, 'JAX_PLATFORMS': 'cpu', 'PYTHONPATH': str(ROOT)}
    command = [sys.executable, '-W', 'error', '-c', code]
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == '[]'
