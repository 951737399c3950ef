"""Kernels in C++ for XLA on CPUs, compiled on the user's machine at first use and kept there."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np
import platformdirs

from dfkd_jax.distributed import processes
from dfkd_jax.errors import ConfigError
from dfkd_jax.models import winograd
from dfkd_jax.storage import compiled

MODES = ('auto', 'xla')
SOURCE = Path(__file__).with_name('winograd.cc')
# Not -ffast-math, which would flush small numbers to zero in the whole process.
COMPILER = ('g++', '-std=c++17', '-O3', '-march=native', '-ffp-contract=fast', '-fPIC', '-shared')


class Unavailable(Exception):  # noqa: N818, not an error: XLA's own convolutions take over
    """Why there are no kernels, and what to do about it."""


def use(mode: str) -> bool:
    """Decides how this process convolves on CPUs (`config.convolutions`), before it traces.

    mode: 'auto': by Winograd's algorithm where that gains, if the kernels can be had; 'xla': never.
    Returns whether they are used; all processes of a run do alike.  Raises ConfigError for another
    mode.
    """
    if mode not in MODES:
        raise ConfigError(f'config.convolutions={mode!r}: expected one of {", ".join(MODES)}.')
    why = ''
    if mode == 'auto' and jax.default_backend() == 'cpu':
        try:
            register()
        except Unavailable as reason:
            why = str(reason)
            print(f'3x3 convolutions are those of XLA, which are slower: {why}', flush=True)
    on = mode == 'auto' and jax.default_backend() == 'cpu' and not processes.any_process(bool(why))
    winograd.use(on)
    return on


@functools.cache
def register() -> None:
    """Makes the kernels known to XLA, once in a process.  Raises Unavailable."""
    path = folder() / f'winograd-{identity()}.so'
    try:
        _load(path)
        return
    except OSError:  # not there, or damaged
        compile_to(path)
    try:
        _load(path)
    except OSError as error:
        raise Unavailable(f'{path} cannot be loaded ({error}).') from error
    if difference() > 1e-5:
        path.unlink(missing_ok=True)
        raise Unavailable(f'those that {COMPILER[0]} compiles compute something else.')


def _load(path: Path) -> None:
    library = ctypes.CDLL(os.fspath(path))
    for target in (winograd.CONVOLVE, winograd.OF_KERNEL):
        call = jax.ffi.pycapsule(getattr(library, target))
        jax.ffi.register_ffi_target(target, call, platform='cpu')


def difference() -> float:
    """Of the kernels from XLA's convolution and its gradients, relative to the largest number."""
    x, kernel, gradient = (
        np.random.default_rng(i).standard_normal(shape, np.float32)
        for i, shape in enumerate([(2, 5, 6, 16), (3, 3, 16, 32), (2, 5, 6, 32)])
    )

    def plain(x: jax.Array, kernel: jax.Array) -> jax.Array:
        layout = ('NHWC', 'HWIO', 'NHWC')
        return jax.lax.conv_general_dilated(x, kernel, (1, 1), 'SAME', dimension_numbers=layout)

    ways = []
    for convolution in (winograd.convolve, plain):
        y, gradients = jax.vjp(convolution, jnp.asarray(x), jnp.asarray(kernel))
        ways.append((y, *gradients(jnp.asarray(gradient))))
    return max(float(jnp.abs(a - b).max() / jnp.abs(b).max()) for a, b in zip(*ways, strict=True))


def folder() -> Path:
    """Where compiled kernels are kept: in the user's cache folder, beside XLA's programs."""
    return Path(platformdirs.user_cache_dir('dfkd_jax')) / 'kernels'


def identity() -> str:
    """Of what a compiled kernel depends on: the source, the compilation, jaxlib and the CPU."""
    parts = (SOURCE.read_text(), *COMPILER, jaxlib.__version__, compiled.processor())
    return hashlib.sha256('\n'.join(parts).encode()).hexdigest()[:16]


def compile_to(path: Path) -> None:
    """Compiles the kernels to `path`, atomically: several processes may do so at once.

    Raises Unavailable.
    """
    if shutil.which(COMPILER[0]) is None:
        raise Unavailable(
            f'there is no {COMPILER[0]} to compile faster ones: install it, or set '
            '--config.convolutions=xla.'
        )
    print(f'compiling convolutions for this CPU, once ({path})', flush=True)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as temporary:
            made = Path(temporary, path.name)
            include = ('-isystem', jax.ffi.include_dir())
            command = [*COMPILER, *include, os.fspath(SOURCE), '-o', os.fspath(made)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                lines = [line for line in done.stderr.splitlines() if 'error' in line]
                why = ' '.join((lines or ['it does not say why'])[0].split())
                raise Unavailable(f'{COMPILER[0]} cannot compile faster ones ({why}).')
            os.replace(made, path)
    except OSError as error:
        raise Unavailable(
            f'faster ones cannot be kept ({error}): set XDG_CACHE_HOME to a folder that can be '
            'written.'
        ) from error
