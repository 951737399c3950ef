"""Compiled programs, kept so that the next start of a run need not compile them again.

JAX keeps them.  This says where, and how many.
"""

from __future__ import annotations

import hashlib
import os
import platform
from pathlib import Path

import jax
import platformdirs
from absl import logging

from dfkd_jax.storage import files

OFF = 'off'
LARGEST = 4 * 2**30  # bytes of a folder, after which the programs longest unused go
WORTH_KEEPING = 0.3  # seconds of compilation; reading a program back takes a few milliseconds


def keep(where: str = '') -> None:
    """Keeps what this process compiles, and reads what others kept.  Call it before it compiles.

    Several processes may share a folder.  A program that cannot be read is compiled again.

    where: the folder; 'off' for none; '' for JAX's own setting (``JAX_COMPILATION_CACHE_DIR``), and
        without one, a folder for processors like this one in the user's cache folder.
    """
    if where == OFF:
        jax.config.update('jax_enable_compilation_cache', False)
        return
    if not where and jax.config.values['jax_compilation_cache_dir']:
        return
    folder = files.expanded(where) if where else default_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        logging.warning(f'compiled programs are not kept: {error}')
        return
    jax.config.update('jax_compilation_cache_dir', str(folder))
    jax.config.update('jax_compilation_cache_max_size', LARGEST)
    jax.config.update('jax_persistent_cache_min_compile_time_secs', WORTH_KEEPING)


def default_folder() -> Path:
    """In the user's cache folder, which computers with other processors may share.

    Programs are compiled for the instructions of one processor, and another may lack them.
    """
    digest = hashlib.sha256(processor().encode()).hexdigest()[:12]
    return Path(platformdirs.user_cache_dir('dfkd_jax')) / 'compiled' / digest


def processor() -> str:
    """What tells this kind of processor from others."""
    name = f'{platform.machine()} {platform.processor()}'
    if os.path.exists('/proc/cpuinfo'):  # Linux, where `platform` knows little
        lines = Path('/proc/cpuinfo').read_text().splitlines()
        told = ('model name', 'flags', 'Features', 'CPU part')
        name += '\n'.join(sorted({line for line in lines if line.startswith(told)}))
    return name
