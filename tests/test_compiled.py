"""Compiled programs are kept for the next start, where the user says or where others find them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import jax
import pytest

from dfkd_jax.storage import compiled

NAMES = ('jax_compilation_cache_dir', 'jax_compilation_cache_max_size',
         'jax_persistent_cache_min_compile_time_secs', 'jax_enable_compilation_cache')  # fmt: skip


@pytest.fixture
def as_new(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """A process without a setting of JAX's own, and its user's cache folder."""
    before = {name: jax.config.values[name] for name in NAMES}
    jax.config.update('jax_compilation_cache_dir', None)
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    yield tmp_path
    for name, value in before.items():
        jax.config.update(name, value)


def test_they_are_kept_in_the_users_cache_folder(as_new: Path) -> None:
    compiled.keep()
    folder = Path(jax.config.values['jax_compilation_cache_dir'])
    assert folder.is_dir() and folder.is_relative_to(as_new)
    assert jax.config.values['jax_compilation_cache_max_size'] == compiled.LARGEST


def test_processors_have_folders_of_their_own(
    as_new: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = compiled.default_folder()
    monkeypatch.setattr(compiled, 'processor', lambda: 'another')
    assert compiled.default_folder() != ours


def test_the_users_own_settings_hold(as_new: Path) -> None:
    jax.config.update('jax_compilation_cache_dir', 'elsewhere')
    compiled.keep()
    assert jax.config.values['jax_compilation_cache_dir'] == 'elsewhere'
    compiled.keep(str(as_new / 'mine'))
    assert jax.config.values['jax_compilation_cache_dir'] == str(as_new / 'mine')
    compiled.keep('off')
    assert not jax.config.values['jax_enable_compilation_cache']


def test_a_folder_that_cannot_be_made_stops_nothing(as_new: Path) -> None:
    (as_new / 'file').write_text('')
    compiled.keep(str(as_new / 'file' / 'folder'))
    assert jax.config.values['jax_compilation_cache_dir'] is None


def test_the_next_process_reads_what_this_one_compiled(tmp_path: Path) -> None:
    program = (
        'import sys, jax\n'
        'from dfkd_jax.storage import compiled\n'
        'hits = []\n'
        "of = '/jax/compilation_cache/cache_hits'\n"
        'jax.monitoring.register_event_listener(lambda name, **_: hits.append(name == of))\n'
        'compiled.WORTH_KEEPING = 0.0\n'
        'compiled.keep(sys.argv[1])\n'
        'jax.jit(lambda x: x * 2)(jax.numpy.ones(3)).block_until_ready()\n'
        'print(sum(hits))'
    )
    environment = {k: v for k, v in os.environ.items() if k != 'JAX_COMPILATION_CACHE_DIR'}
    command = [sys.executable, '-c', program, str(tmp_path)]
    first, second = (
        int(
            subprocess.run(
                command, env=environment, text=True, check=True, capture_output=True
            ).stdout
        )
        for _ in range(2)
    )
    assert first == 0 and second > 0
