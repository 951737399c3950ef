"""README and the pages: every link, command, number and block of code in them is true.

    python -m pytest tests/test_docs.py              links and anchors; commands are parsed, not run
    python -m pytest tests/test_docs.py -m slow -s   the commands are run, with what is left out

A command is run in a folder of its page's, in the page's order, each config in its `smoke` form.
One that cannot run here says why: ``<!-- not run: REASON -->`` before its block.
"""

from __future__ import annotations

import argparse
import ast
import configparser
import importlib.util
import json
import os
import re
import runpy
import shlex
import statistics
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from absl import flags

from dfkd_jax import cli
from dfkd_jax.command import arguments
from dfkd_jax.configs import common
from dfkd_jax.loops import supervised
from dfkd_jax.methods import METHODS

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted({ROOT / 'README.md', *(ROOT / 'docs').rglob('*.md')})
LINKED = [*PAGES, ROOT / 'CONTRIBUTING.md', *sorted((ROOT / 'experiments').rglob('*.md'))]


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


# 1. Reading pages


class Block(NamedTuple):
    """A fenced block of a page."""

    page: Path
    line: int  # of its fence, from 1
    language: str
    title: str  # of the file that it is, if it is one
    reason: str  # why it cannot be run here, if so
    text: str

    def __str__(self) -> str:
        return f'{name(self.page)}:{self.line}'


FENCE = re.compile(r'^(?P<indent> *)```(?P<language>\w*)(?: title="(?P<title>[^"]+)")?$')


def blocks(page: Path) -> Iterator[Block]:
    """The fenced blocks of a page, in order."""
    lines = page.read_text().splitlines()
    number = 0
    while number < len(lines):
        start = FENCE.match(lines[number])
        if start is None:
            assert not lines[number].lstrip().startswith('```'), f'{name(page)}:{number + 1}'
            number += 1
            continue
        mark = re.fullmatch(r' *<!-- not run: (.+) -->', lines[number - 1])
        end = lines.index(f'{start["indent"]}```', number + 1)
        text = '\n'.join(line[len(start['indent']) :] for line in lines[number + 1 : end])
        yield Block(
            page, number + 1, start['language'], start['title'] or '', mark[1] if mark else '', text
        )
        number = end + 1


def prose(page: Path) -> str:
    """A page without its fenced blocks."""
    kept, inside = [], False
    for line in page.read_text().splitlines():
        if line.lstrip().startswith('```'):
            inside = not inside
        elif not inside:
            kept.append(line)
    return '\n'.join(kept)


def of(*languages: str) -> list[Any]:
    """The blocks of all pages in these languages, as cases."""
    found = [block for page in PAGES for block in blocks(page) if block.language in languages]
    return [pytest.param(block, id=str(block)) for block in found]


def test_a_block_is_of_a_kind_that_is_checked() -> None:
    kinds = {block.language for page in PAGES for block in blocks(page)}
    assert kinds <= {'sh', 'python', 'text'}, 'a new language has a test here'
    marked = [block for page in PAGES for block in blocks(page) if block.reason]
    assert all(block.language in ('sh', 'python') for block in marked)
    assert sum(path.read_text().count('<!-- not run: ') for path in PAGES) == len(marked)


# 2. Links


def slug(heading: str) -> str:
    """The anchor of a heading, as GitHub and the site make it."""
    plain = re.sub(r'\[([^\]]*)\]\([^)]*\)', r'\1', heading).replace('`', '').replace('*', '')
    return re.sub(r'[^\w\- ]', '', plain.strip().lower()).replace(' ', '-')


def anchors(page: Path) -> set[str]:
    return {slug(found) for found in re.findall(r'^#+ (.+)$', prose(page), re.MULTILINE)}


@pytest.mark.parametrize('page', LINKED, ids=name)
def test_links_and_anchors_are_there(page: Path) -> None:
    text = re.sub(r'`[^`\n]*`', '', prose(page))
    for target in re.findall(r'\]\(([^)\s]+)\)', text):
        if target.startswith('https://'):
            continue
        path, _, anchor = target.partition('#')
        place = (page.parent / path).resolve() if path else page
        assert place.is_relative_to(ROOT) and place.exists(), f'{name(page)} links {target}'
        if anchor:
            assert anchor in anchors(place), f'{name(page)} links {target}'


def test_the_readme_fits_a_screen_and_links_every_page() -> None:
    text = (ROOT / 'README.md').read_text()
    assert len(text.splitlines()) <= 150
    linked = {(ROOT / path).resolve() for path in re.findall(r'\]\(([\w./]+)[)#]', text)}
    apart = {page for page in PAGES if page.parent == ROOT / 'docs' / 'api'}
    assert set(PAGES) - apart - {ROOT / 'README.md'} <= linked
    for method in common.METHODS:
        assert ROOT / 'docs' / 'methods' / f'{method}.md' in linked


def test_every_page_is_in_the_navigation_and_every_room_in_the_api() -> None:
    site = (ROOT / 'mkdocs.yml').read_text()
    listed = {ROOT / 'docs' / path for path in re.findall(r'[\w/]+\.md', site.split('nav:')[-1])}
    apart = {page for page in PAGES if page.parent == ROOT / 'docs' / 'api'}
    assert set(PAGES) - apart - {ROOT / 'README.md'} <= listed
    index = (ROOT / 'docs' / 'api' / 'index.md').read_text()
    assert all(f'({page.name})' in index for page in apart if page.name != 'index.md')
    table = re.search(
        r'^ROOMS = (\{.*?^\})', (ROOT / 'tests/test_imports.py').read_text(), re.M | re.S
    )
    assert table
    rooms = set(ast.literal_eval(table[1]))
    assert len(rooms) > 15
    assert rooms <= {page.stem for page in apart}, 'a new room has a page in docs/api'


def test_what_pages_include_is_there() -> None:
    """Files by `--8<--`, of which each method's page has its config, and modules by `:::`."""
    for method in common.METHODS:
        text = (ROOT / 'docs' / 'methods' / f'{method}.md').read_text()
        assert f'--8<-- "configs/methods/{method}.py"' in text, method
    for page in PAGES:
        for path in re.findall(r'--8<-- "([^"]+)"', page.read_text()):
            assert (ROOT / path).is_file(), f'{name(page)} includes {path}'
        # A formatter that takes one for Python spoils it, and the page then shows the line.
        assert not re.search(r'--8 ?< ?--(?! ")', page.read_text()), name(page)
        for module in re.findall(r'^::: (\S+)$', page.read_text(), re.MULTILINE):
            path = ROOT / module.replace('.', '/')
            assert path.with_suffix('.py').is_file() or (path / '__init__.py').is_file(), module


PATHS = re.compile(r'(?:dfkd_jax|configs|experiments|tests|docs)/[\w./-]*[\w/]')


@pytest.mark.parametrize('page', PAGES, ids=name)
def test_files_that_are_named_exist(page: Path) -> None:
    for word in re.findall(r'`([^`\n]+)`', prose(page)):
        if PATHS.fullmatch(word) and 'NAME' not in word:
            assert (ROOT / word).exists(), f'{name(page)} names {word}'


# 3. Numbers


def test_means_and_deviations_stand_in_a_receipt() -> None:
    receipts = '\n'.join(path.read_text() for path in (ROOT / 'experiments').rglob('*.md'))
    # What a page derives from rows: the first five seeds of the digits beside those in bfloat16,
    # and the teachers of all six.
    rows = [
        [[float(x) for x in row.split(',')[1:5]] for row in path.read_text().splitlines()[1:]]
        for path in (ROOT / 'experiments/digits').glob('**/rows.csv')
    ]
    six, five = sorted(rows, key=len, reverse=True)
    assert [row[0] for row in five] == [row[0] for row in six[:5]] == [0, 1, 2, 3, 4]
    derived = (
        [row[1] for row in six[:5]],
        [a[1] - b[1] for a, b in zip(six, five, strict=False)],
        [row[3] for row in six],
    )
    receipts += '\n'.join(f'{statistics.mean(x):.2f} ± {statistics.stdev(x):.2f}' for x in derived)
    for page in PAGES:
        for number in re.findall(r'\d+\.\d+\s+±\s+\d+\.\d+', page.read_text()):
            assert ' '.join(number.split()) in receipts, f'{name(page)}: {number}'


@pytest.mark.parametrize('page', ['README.md', 'experiments/bench/README.md'])
def test_speeds_stand_in_the_table_of_the_benchmark(page: str) -> None:
    """Eager PyTorch's images a second, and each other side's with its ratio, row by row."""
    text = (ROOT / page).read_text().replace('**', '')
    rows = (ROOT / 'experiments/bench/rounds/table.md').read_text().splitlines()[2:]
    assert len(rows) == 5
    for row in rows:
        eager, *others = [cell.partition(',')[0].strip() for cell in row.split('|')[2:5]]
        assert f'| {eager.removesuffix(" (1.00)")} | {" | ".join(others)} |' in text, row


# 4. Python


def find(module: str) -> None:
    """Fails where there is no such module; skips where its package is not installed."""
    package = module.partition('.')[0]
    if importlib.util.find_spec(package) is None:
        pytest.skip(f'{package} is not installed')
    assert importlib.util.find_spec(module), module


@pytest.mark.parametrize('block', of('python'))
def test_python_compiles_and_what_it_imports_is_there(block: Block) -> None:
    if block.text.startswith('--8<--'):
        return  # a file of the repository
    tree = ast.parse(block.text)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                find(alias.name)
        elif isinstance(node, ast.ImportFrom):
            find(str(node.module))
            if str(node.module).startswith('dfkd_jax'):
                for alias in node.names:
                    if not hasattr(importlib.import_module(str(node.module)), alias.name):
                        importlib.import_module(f'{node.module}.{alias.name}')
        elif isinstance(node, ast.Attribute):
            used = ast.unparse(node)
            if used.startswith('dfkd_jax.'):
                found: Any = importlib.import_module('dfkd_jax')
                for part in used.split('.')[1:]:
                    found = getattr(found, part)


# 5. Commands


class Command(NamedTuple):
    """One command of a block: its words, and the variables set before it."""

    words: list[str]
    variables: dict[str, str]


def commands(text: str) -> Iterator[Command]:
    """The commands of a `sh` block."""
    for line in text.replace('\\\n', ' ').splitlines():
        words = shlex.split(line, comments=True)
        while words:
            end = words.index('&&') if '&&' in words else len(words)
            one, words = words[:end], words[end + 1 :]
            variables = {}
            while re.match(r'[A-Z_]+=', one[0]):
                key, _, value = one.pop(0).partition('=')
                variables[key] = value
            yield Command(one, variables)


class Parsed(Exception):
    """Raised in the place of what a program does after it has read its arguments."""


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Runs a program until it has read its arguments; fails if it refuses them."""
    parse = argparse.ArgumentParser.parse_args

    def parsed(self: argparse.ArgumentParser, args: Any = None, namespace: Any = None) -> None:
        parse(self, args, namespace)
        raise Parsed

    def call(program: Callable[[], Any], arguments: list[str]) -> None:
        monkeypatch.setattr(sys, 'argv', ['program', *arguments])
        with pytest.raises(Parsed):
            program()

    monkeypatch.setattr(argparse.ArgumentParser, 'parse_args', parsed)
    return call


WITH_CONFIG = ('dfkd_jax.main', 'dfkd_jax.teach', 'dfkd_jax.diffusion.train')


def takes(module: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Parses the flags of a program that takes a config: its fields have to exist."""
    command = ['program', *arguments]
    monkeypatch.setattr(sys, 'argv', command)  # ml_collections looks there for overrides
    values = flags.FlagValues()
    config = cli.define_config(values)
    flags.DEFINE_string('workdir', None, '', flag_values=values)
    flags.DEFINE_string('compiled', None, '', flag_values=values)
    if module == 'dfkd_jax.teach':
        flags.DEFINE_enum('role', 'teacher', supervised.ROLES, '', flag_values=values)
    assert values(command) == ['program'], 'words that are no flags'
    assert (config.value.loop == 'diffusion_prior') == (module == 'dfkd_jax.diffusion.train')


def check_python(words: list[str], monkeypatch: pytest.MonkeyPatch, reads: Any) -> None:
    """Checks ``python ...``: -m MODULE, or a script of the repository."""
    if words[0] != '-m':
        script = ROOT / words[0]
        monkeypatch.syspath_prepend(script.parent)  # as Python does
        return reads(lambda: runpy.run_path(str(script), run_name='__main__'), words[1:])
    module, *arguments = words[1:]
    if module in WITH_CONFIG:
        return takes(module, arguments, monkeypatch)
    if module == 'pytest':
        return check_pytest(arguments)
    if module == 'venv':
        return None
    program = importlib.import_module(module)
    if not hasattr(program, 'main'):
        program = importlib.import_module(f'{module}.__main__')
    return reads(program.main, arguments)


def check_pytest(arguments: list[str]) -> None:
    for argument in arguments:
        assert not argument.startswith('tests') or (ROOT / argument).exists()
    if '-k' in arguments:
        assert arguments[arguments.index('-k') + 1] in METHODS


def check_pip(words: list[str]) -> None:
    """Checks ``pip install``: the extras exist, and so do the files."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / 'setup.cfg')
    for word in words:
        if extras := re.match(r'(?:\.|dfkd_jax)\[([\w,]+)\]', word):
            assert set(extras[1].split(',')) <= set(setup['options.extras_require'])
        assert not word.endswith('.txt') or (ROOT / word).is_file()


@pytest.mark.parametrize('block', of('sh'))
def test_commands_are_understood(
    block: Block, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, reads: Callable[..., None]
) -> None:
    """Configs load, fields exist, and programs know their arguments."""
    monkeypatch.chdir(tmp_path)
    write_files(block.page, tmp_path)
    for command in commands(block.text):
        program, *words = command.words
        if program == 'srun':
            program, *words = words
        if program.endswith('python'):
            check_python(words, monkeypatch, reads)
        elif program == 'dfkd':
            arguments.make(words[0]).split(words[1:])  # ends the program where it refuses them
        elif program.endswith('pip'):
            check_pip(words)
        else:
            assert program in ('apt-get', 'curl', 'mkdocs'), f'{block}: what is {program}?'


# 6. Commands, run


def write_files(page: Path, folder: Path) -> None:
    """Writes the files that a page tells to write."""
    for block in blocks(page):
        if block.title:
            (folder / block.title).write_text(block.text + '\n')


def write_given(folder: Path, rule: Any) -> None:
    """Writes what readers have: teachers and pictures."""
    import jax
    from PIL import Image
    from safetensors.numpy import save_file

    from dfkd_jax import models, port

    for file, model in (('resnet20.th', 'resnet20_option_a'), ('teacher.pth', 'resnet20')):
        module = models.make(model, num_classes=10)
        shapes = jax.eval_shape(module.init, jax.random.key(0), np.zeros((1, 32, 32, 3)))
        blank = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), shapes)
        names = port.to_torch(model, blank)
        save_file(rule.state_dict((key, x.shape) for key, x in names.items()), folder / file)
    for file in ('cat.png', 'dog.png'):
        Image.fromarray(np.full((48, 40, 3), 200, np.uint8)).save(folder / file)


def write_exported(page: Path, folder: Path) -> None:
    """What the page says on how to make a `.pt2` file, done to a small network for 32 px."""
    torch = pytest.importorskip('torch', reason="pip install '.[test]'")
    nn = torch.nn
    [text] = [b.text for b in blocks(page) if 'torch.export.save' in b.text]
    text = text.replace('224, 224', '32, 32').replace("'teacher.pt2'", 'path')
    layers = nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1)
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(8, 10))
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # what PyTorch says of itself
        exec(text, {'model': model, 'path': folder / 'teacher.pt2'})


RUNS = {  # pages: how to make the RUN that they speak of
    'docs/deploy.md': 'python -m dfkd_jax.main --config=digits:noise,smoke --workdir=RUN',
    'docs/transfer.md': 'python -m dfkd_jax.main --config=digits:noise,smoke --workdir=RUN',
    'docs/privacy.md': 'python -m dfkd_jax.main --config=digits:noise,smoke --workdir=RUN',
}


def smoked(words: list[str]) -> list[str]:
    """The same command with its config in its `smoke` form."""
    if words[:2] == ['dfkd', 'distill']:
        return [f'{word},smoke' if word.startswith('--method=') else word for word in words]
    known = words[1:3] and words[1] == '-m' and words[2] in WITH_CONFIG
    if not known:
        return words
    found = []
    for word in words:
        if word.startswith('--config='):
            joint = ',' if ':' in word else ':'
            word = f'{word}{joint}smoke'
        found.append(word)
    return found


RUNNABLE = sorted({block.values[0].page for block in of('sh') if not block.values[0].reason})


@pytest.mark.slow
@pytest.mark.parametrize('page', RUNNABLE, ids=name)
def test_commands_run(page: Path, tmp_path: Path, rule: Any) -> None:
    write_files(page, tmp_path)
    write_given(tmp_path, rule)
    if page == ROOT / 'docs' / 'exported.md':
        write_exported(page, tmp_path)
    given = {name: value for name, value in os.environ.items() if name != 'JAX_NUM_CPU_DEVICES'}
    given |= {
        'PYTHONPATH': str(ROOT), 'JAX_PLATFORMS': 'cpu', 'TFDS_DATA_DIR': str(tmp_path / 'none'),
        'JAX_DISABLE_MOST_OPTIMIZATIONS': '1',
    }  # fmt: skip
    texts = [RUNS.get(name(page), '')]
    texts += [b.text for b in blocks(page) if b.language == 'sh' and not b.reason]
    for command in (each for text in texts for each in commands(text)):
        words = smoked(command.words)
        if words[0] == 'dfkd':
            words = ['python', '-m', 'dfkd_jax', *words[1:]]
        if words[0] == 'python':
            words[0] = sys.executable
            if words[1].startswith('experiments/'):
                words[1] = str(ROOT / words[1])
        if words[1:3] == ['-m', 'pytest']:
            words += ['--collect-only', '-q', str(ROOT)]  # else this test would run itself
        done = subprocess.run(
            words, cwd=tmp_path, env=given | command.variables, capture_output=True, text=True
        )
        assert done.returncode == 0, f'{shlex.join(words)}\n{done.stdout}\n{done.stderr}'


LEFT_OUT = 25


def test_what_is_not_run_is_counted() -> None:
    """The list is printed with -s; a new one is counted in `LEFT_OUT`, so that none slips in."""
    left_out = [block for page in PAGES for block in blocks(page) if block.reason]
    for block in left_out:
        print(f'{block}: {block.reason}')
    assert len(left_out) == LEFT_OUT
    run = [each for each in of('sh') if not each.values[0].reason]
    assert len(run) > 15


def test_json_on_pages_is_json() -> None:
    """What a page shows of a file or an answer, in braces."""
    for page in PAGES:
        for text in re.findall(r'`(\{"[^`]*\})`', prose(page)):
            json.loads(text.replace('...', '""'))
