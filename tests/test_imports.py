"""Who may import whom, and who may say what, read from the source files.

A room is a folder of the package, or a module beside the folders.  The table is in order: a room
imports only rooms above it, so there are no circles.
"""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = 'dfkd_jax'

# room: (rooms it may import, packages of others it may import)      *: all rooms above, any package
ROOMS = {
    'errors': ('', ''),
    'losses': ('', 'jax optax'),
    'augment': ('', 'jax'),
    'contract': ('errors', 'jax flax optax'),
    'models': ('', 'jax flax'),
    'distributed': ('errors', 'jax numpy'),
    'storage': ('errors distributed', '*'),
    'native': ('errors models distributed storage', 'jax jaxlib numpy platformdirs'),
    'data': ('errors storage', '*'),
    'diffusion': ('errors models storage', 'jax flax numpy safetensors tokenizers'),
    'labels': ('errors diffusion storage', 'jax numpy safetensors scipy tokenizers'),
    'port': ('errors models storage', 'jax flax numpy onnx orbax safetensors'),
    'reporting': ('errors contract distributed storage data port', '*'),
    'methods': ('contract losses augment distributed diffusion', 'jax flax optax'),
    'build': ('*', '*'),
    'evaluate': ('distributed data', '*'),
    'loops': ('*', '*'),
    'transfer': ('*', '*'),
    'deploy': ('*', '*'),
    'audit': ('*', '*'),
}
# Programs: they may import anything, and only programs may import them; so is `command/`.
COMMANDS = {'main.py', 'cli.py', 'teach.py', 'transfer_dense.py', 'diffusion/train.py'}
COMMANDS |= {'export.py', 'predict.py'}
# What `dfkd --help` imports: of the package this, and of others nothing.
QUICK = ('__init__.py', 'errors.py', 'command/__init__.py', 'command/main.py')
QUICK += ('command/arguments.py', 'command/completion.py')
QUICKLY = ('__version__', 'models', 'port')

# Files that stand apart from the rest of their room: nothing of the package, and these packages.
APART = {'distributed/sharding.py': 'jax numpy', 'storage/safe_read.py': ''}

# What only computes, and so needs of the standard library only this.
PURE = ('losses.py', 'augment.py', 'contract.py', 'models/', 'methods/')
PURE += ('distributed/sharding.py',)
PURE_STANDARD = set('__future__ collections dataclasses difflib functools itertools'.split())
PURE_STANDARD |= {'math', 're', 'typing'}

FINDING = {'importlib', 'pathlib'}  # configs find those of the methods by name

# Slow to import, or heavy, or not always installed: only inside functions.
LAZY = set('torch tensorflow tensorflow_datasets matplotlib sklearn PIL tensorboardX'.split())
LAZY |= {'tokenizers', 'onnx', 'onnxruntime', 'litert_converter'}

SHARDING = {'pmap', 'shard_map', 'Mesh', 'make_mesh', 'NamedSharding', 'PartitionSpec'}

# Who may read training images.
READERS = ('loops/supervised.py', 'loops/kd.py', 'loops/diffusion_prior.py', 'transfer/')
READERS += ('audit/measurement.py',)  # to measure what a run reveals of them


def parse(pattern: str) -> dict[str, ast.Module]:
    """The source files that match: path from the folder before the pattern's stars -> tree."""
    folder = ROOT / pattern.partition('/')[0]
    paths = sorted(ROOT.glob(pattern))
    return {path.relative_to(folder).as_posix(): ast.parse(path.read_text()) for path in paths}


FILES = {name: tree for name, tree in parse(f'{PACKAGE}/**/*.py').items() if name[:8] != 'configs/'}
CONFIGS = parse('configs/**/*.py') | parse(f'{PACKAGE}/configs/**/*.py')


def is_command(name: str) -> bool:
    return name in COMMANDS or name.endswith('__main__.py') or name.startswith('command/')


def room(name: str) -> str:
    """`models/wrn.py` -> 'models', `losses.py` -> 'losses', `__init__.py` -> '__init__'."""
    return name.partition('/')[0].removesuffix('.py')


def imports(tree: ast.AST) -> Iterator[str]:
    """The full names that a tree imports: `from a import b` gives 'a.b'."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, 'imports are absolute'
            yield from (f'{node.module}.{alias.name}' for alias in node.names)


def tops(names: Iterable[str]) -> set[str]:
    """The packages of imported names."""
    return {name.partition('.')[0] for name in names}


def inside(tree: ast.AST) -> list[str]:
    """What a tree imports of this package, without the package's name or its version."""
    names = [name for name in imports(tree) if name.partition('.')[0] == PACKAGE]
    return [name[len(PACKAGE) + 1 :] for name in names if name != f'{PACKAGE}.__version__']


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


def allowed(where: str) -> set[str]:
    """The rooms that a room may import, itself included."""
    above = list(ROOMS)[: list(ROOMS).index(where)]
    found = ROOMS[where][0]
    return {where, *(above if found == '*' else found.split())}


def test_the_table_names_every_room_and_has_no_circles() -> None:
    rooms = {room(name) for name in FILES if not is_command(name)} - {'__init__'}
    assert rooms == set(ROOMS), 'a new room has a row here and a line in CONTRIBUTING'
    order = list(ROOMS)
    for where in order:
        assert allowed(where) <= set(order[: order.index(where) + 1]), f'{where}: a room below it'


@pytest.mark.parametrize('where', ROOMS)
def test_a_room_imports_what_its_row_allows(where: str) -> None:
    packages = ROOMS[where][1]
    for name, tree in FILES.items():
        if room(name) != where or is_command(name):
            continue
        found = {each.partition('.')[0] for each in inside(tree)}
        assert found <= allowed(where), f'{name} imports {found - allowed(where)}'
        others = tops(imports(tree)) - {PACKAGE} - set(sys.stdlib_module_names)
        if packages != '*':
            assert others <= set(packages.split()), f'{name} imports {others}'


def test_the_package_itself_offers_models_and_port() -> None:
    assert set(inside(FILES['__init__.py'])) == {'models', 'port'}


def test_only_commands_import_commands_and_nobody_imports_experiments() -> None:
    commands = {name.removesuffix('.py').replace('/', '.') for name in COMMANDS} | {'command'}
    for name, tree in FILES.items():
        assert not tops(imports(tree)) & {'experiments', 'tests'}, name
        if is_command(name):
            continue
        assert 'configs' not in tops(imports(tree)) | tops(inside(tree)), name
        for each in inside(tree):
            parts = each.split('.')
            heads = {'.'.join(parts[:i]) for i in (1, 2)}
            assert not heads & commands and '__main__' not in parts, f'{name} imports {each}'


@pytest.mark.parametrize('name', APART)
def test_files_that_stand_apart(name: str) -> None:
    others = tops(imports(FILES[name])) - set(sys.stdlib_module_names)
    assert others <= set(APART[name].split())


def test_what_computes_knows_no_files_clocks_or_processes() -> None:
    pure = [name for name in FILES if name.startswith(PURE)]
    assert len(pure) > 20
    for name in pure:
        standard = tops(imports(FILES[name])) & set(sys.stdlib_module_names)
        assert standard <= PURE_STANDARD, f'{name} imports {standard - PURE_STANDARD}'


def test_heavy_packages_are_imported_in_functions() -> None:
    for name, tree in FILES.items():
        assert not tops(at_import(tree)) & LAZY, name


def test_one_file_says_how_programs_are_compiled_and_sharded() -> None:
    assert {'jit', 'pmap', 'shard_map'} <= said(FILES['distributed/sharding.py'])
    for name, tree in FILES.items():
        if name != 'distributed/sharding.py':
            assert not said(tree) & (SHARDING | {'jit'}), name
        assert not said(tree) & {'jax_utils', 'tree_map', 'PRNGKey'}, f'{name}: deprecated'


def test_a_method_knows_no_other_and_nothing_of_its_surroundings() -> None:
    for name, tree in FILES.items():
        if room(name) != 'methods' or name == 'methods/__init__.py':
            continue
        for each in inside(tree):
            assert not each.startswith('methods') or each.startswith('methods.shared'), name
            if each.startswith('distributed'):
                assert each == 'distributed.sharding.Shards', 'only for the type of an argument'
        assert not said(tree) & {'open', 'print', 'devices', 'device_count', 'flags', 'logging'}


def test_nothing_outside_methods_knows_one_by_name() -> None:
    """They are found in the registry, by `build`; loops may use what several methods share."""
    for name, tree in FILES.items():
        known = {
            each for each in inside(tree) if room(name) != 'methods' and tops([each]) == {'methods'}
        }
        shared = {each for each in known if each.startswith('methods.shared')}
        assert known - shared <= {'methods.METHODS'}, name


NETWORKS = ('fields', 'layers', 'unet', 'vae', 'clip_text', 'resize', 'schedule')


@pytest.mark.parametrize('name', NETWORKS)
def test_what_a_diffusion_model_computes_knows_no_files(name: str) -> None:
    """Of the room, `folder`, `tokenizer` and `prior` read files; the others only compute."""
    tree = FILES[f'diffusion/{name}.py']
    assert tops(imports(tree)) & set(sys.stdlib_module_names) <= PURE_STANDARD
    networks = {f'diffusion.{each}' for each in NETWORKS}
    for each in inside(tree):
        if tops([each]) != {'errors'} and tops([each]) != {'models'}:
            assert '.'.join(each.split('.')[:2]) in networks, f'{name} imports {each}'


def test_configs_are_self_contained() -> None:
    """They are read before anything else is: of the package, they know its errors alone."""
    assert len(CONFIGS) > 20
    for name, tree in CONFIGS.items():
        found = tops(inside(tree)) | tops(imports(tree)) - {PACKAGE}
        assert found <= {'configs', 'errors', 'ml_collections'} | PURE_STANDARD | FINDING, name
        assert 'configs' not in tops(imports(tree)), f'{name}: as dfkd_jax.configs'


def test_training_images_are_read_where_real_data_is_the_point() -> None:
    """A data-free run loads the test split alone, by its name."""
    for name, tree in FILES.items():
        if name.startswith(READERS):
            continue
        if room(name) != 'data':
            assert not any(each.startswith('data.load') for each in inside(tree)), 'as data.load'
        splits = {
            ast.unparse(node.args[1])
            for node in ast.walk(tree)
            if isinstance(node, ast.Call) and ast.unparse(node.func) == 'data.load'
        }
        assert splits <= {"'test'"}, name


@pytest.mark.parametrize('name', QUICK)
def test_help_and_completion_import_nothing_heavy(name: str) -> None:
    # The package itself offers rooms, which it imports when they are asked for.
    found = set(at_import(FILES[name])) - {f'{PACKAGE}.{each}' for each in QUICKLY}
    others = tops(found) - {PACKAGE} - set(sys.stdlib_module_names)
    assert not others, f'{name} imports {others}'
    quick = {f'{PACKAGE}.{each.removesuffix(".py").replace("/", ".")}' for each in QUICK}
    for each in found:
        if tops([each]) == {PACKAGE}:
            assert any(each == one or each.startswith(f'{one}.') for one in quick), each


def test_the_entry_point_has_no_ideas() -> None:
    assert len((ROOT / PACKAGE / 'main.py').read_text().splitlines()) <= 50


def test_main_starts_light() -> None:
    """A mistake in a config should not wait for matplotlib, nor anything need PyTorch."""
    heavy = sorted(LAZY)
    code = f'import sys, {PACKAGE}.main; print([m for m in {heavy} if m in sys.modules])'
    env = {**os.environ, 'JAX_PLATFORMS': 'cpu', 'PYTHONPATH': str(ROOT)}
    command = [sys.executable, '-W', 'error', '-c', code]
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == '[]'
