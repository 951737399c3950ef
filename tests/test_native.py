"""Convolutions on CPUs: Winograd's kernels, compiled here, and products of small maps' patches."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from dfkd_jax import native
from dfkd_jax.distributed import sharding
from dfkd_jax.errors import ConfigError
from dfkd_jax.models import layers, winograd

ROOT = Path(__file__).resolve().parents[1]
LAYOUT = ('NHWC', 'HWIO', 'NHWC')


@pytest.fixture(scope='session')
def compiled() -> None:
    """The kernels, which the first test of a machine waits for."""
    try:
        native.register()
    except native.Unavailable as why:
        pytest.skip(str(why))


@pytest.fixture
def kernels(compiled: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Winograd's kernels, however small the maps are."""
    monkeypatch.setattr(winograd, '_on', True)
    monkeypatch.setattr(winograd, 'LEAST_TILES', 1)


def drawn(*shapes: tuple[int, ...]) -> list[np.ndarray]:
    random = np.random.default_rng(0)
    return [random.standard_normal(shape, np.float32) for shape in shapes]


def exact(x: Any, kernel: Any, gradient: Any, stride: int, pad: int) -> tuple[np.ndarray, ...]:
    """A convolution and its two gradients in float64, a place of the kernel after the other."""
    x, kernel, gradient = (np.asarray(each, np.float64) for each in (x, kernel, gradient))
    padded = np.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    of_padded, of_kernel, y = np.zeros_like(padded), np.zeros_like(kernel), np.zeros_like(gradient)
    for i, j in np.ndindex(kernel.shape[:2]):
        rows, columns = (
            slice(start, start + stride * (size - 1) + 1, stride)
            for start, size in zip((i, j), gradient.shape[1:3])
        )
        y += padded[:, rows, columns] @ kernel[i, j]
        of_kernel[i, j] = np.einsum('bhwc,bhwk->ck', padded[:, rows, columns], gradient)
        of_padded[:, rows, columns] += gradient @ kernel[i, j].T
    inner = [slice(pad, size - pad) for size in padded.shape[1:3]]
    return y, of_padded[:, inner[0], inner[1]], of_kernel


def convolution(x: Any, kernel: Any, stride: int = 1, pad: int = 1) -> jax.Array:
    strides, padding = (stride,) * 2, ((pad, pad),) * 2
    return layers.convolve(x, kernel, strides, padding, dimension_numbers=LAYOUT)


def computed(x: Any, kernel: Any, gradient: Any, stride: int = 1, pad: int = 1) -> tuple[str, Any]:
    """The compiled program of `layers.convolve` with its gradients, and what it returns."""

    def step(x: Any, kernel: Any, gradient: Any) -> Any:
        y, pull = jax.vjp(lambda x, kernel: convolution(x, kernel, stride, pad), x, kernel)
        return y, *pull(gradient)

    program = jax.jit(step).lower(x, kernel, gradient).compile()
    return program.as_text(), program(x, kernel, gradient)


def assert_near(found: Any, wanted: Any, tolerance: float) -> None:
    """Relative to the largest number."""
    for a, b in zip(found, wanted, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * np.abs(b).max())


# 1. Winograd's kernels.


@pytest.mark.parametrize(
    ('batch', 'height', 'width', 'channels', 'features'),
    [
        (1, 4, 4, 16, 16),  # one tile
        (3, 9, 6, 16, 32),  # tiles over the edges
        (2, 3, 5, 48, 16),
        (13, 16, 16, 16, 16),  # several blocks and parts, of which the last are smaller
        (2, 8, 7, 32, 80),  # two ranges of channels
        (1, 8, 8, 144, 16),
    ],
)
def test_kernels_are_exact_up_to_rounding(
    kernels: None, batch: int, height: int, width: int, channels: int, features: int
) -> None:
    x, kernel, gradient = drawn(
        (batch, height, width, channels), (3, 3, channels, features),
        (batch, height, width, features),
    )  # fmt: skip
    program, found = computed(x, kernel, gradient)
    assert program.count('custom_call_target="dfkd_winograd"') == 2
    assert program.count('custom_call_target="dfkd_winograd_kernel"') == 1
    assert 'convolution(' not in program
    assert_near(found, exact(x, kernel, gradient, 1, 1), 3e-6)


@pytest.mark.parametrize('mode', [*sharding.MODES, 'vmap'])
def test_every_mode_computes_the_same(
    kernels: None, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of one mean gradient over shards, whose parameters are the same everywhere."""
    image, kernel = drawn((8, 6, 6, 16), (3, 3, 16, 16))

    def new_kernel(mode: str) -> Any:
        plan = sharding.make(mode)

        def step(image: Any, kernel: Any, inputs: Any) -> Any:
            del inputs

            def loss(kernel: Any) -> Any:
                hidden = convolution(plan.shards.share(image), kernel)
                return jnp.mean(jnp.sin(convolution(hidden, kernel))), ()

            (total, _), gradient = plan.shards.value_and_grad(loss)(kernel)
            return kernel - gradient, {'total': plan.shards.mean(total)}

        given = (plan.replicate(x) for x in (image, jnp.asarray(kernel), jnp.zeros(())))
        return plan.compile(step)(*given)[0]

    found = new_kernel(mode)
    monkeypatch.setattr(winograd, '_on', False)
    tiny.close(found, new_kernel('jit'), 1e-5)


def test_shard_map_sums_the_gradient_of_a_kernel_that_is_equal_everywhere(kernels: None) -> None:
    x, kernel, gradient = drawn((4, 5, 5, 16), (3, 3, 16, 16), (4, 5, 5, 16))
    mesh = jax.sharding.Mesh(np.asarray(jax.devices()), ('shard',))
    split, same = jax.sharding.PartitionSpec('shard'), jax.sharding.PartitionSpec()

    def step(x: Any, kernel: Any, gradient: Any) -> Any:
        y, pull = jax.vjp(convolution, x, kernel)
        return y, *pull(gradient)

    mapped = jax.shard_map(
        step, mesh=mesh, in_specs=(split, same, split), out_specs=(split, split, same)
    )
    assert_near(jax.jit(mapped)(x, kernel, gradient), exact(x, kernel, gradient, 1, 1), 3e-6)


def test_they_are_mapped_and_differentiated_twice(
    kernels: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, stack = drawn((2, 6, 5, 16), (3, 3, 3, 16, 32))

    def loss(kernel: Any) -> Any:
        return jnp.sum(jnp.sin(convolution(x, kernel)))

    def second(kernel: Any) -> Any:
        return jnp.sum(jnp.square(jax.grad(loss)(kernel)))

    ways = []
    for on in (True, False):
        monkeypatch.setattr(winograd, '_on', on)
        fresh = jax.jit(jax.vmap(lambda kernel: (loss(kernel), jax.grad(second)(kernel))))
        ways.append(fresh(0.1 * stack))
    assert_near(*ways, 1e-5)


ONE_THREAD = """
import os, sys
os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:1])
import jax, numpy as np
from dfkd_jax import native
from dfkd_jax.models import winograd
assert native.use('auto')
arrays = np.load(sys.argv[1])
y, pull = jax.vjp(winograd.convolve, arrays['x'], arrays['kernel'])
of_x, of_kernel = pull(jax.numpy.asarray(arrays['gradient']))
np.savez(sys.argv[2], y=y, of_x=of_x, of_kernel=of_kernel)
"""


@pytest.mark.skipif(not hasattr(os, 'sched_setaffinity'), reason='threads follow the affinity')
def test_numbers_do_not_depend_on_threads(kernels: None, tmp_path: Path) -> None:
    """Bit for bit, and from call to call: a run that continues elsewhere is the same run."""
    given = drawn((96, 9, 8, 16), (3, 3, 16, 32), (96, 9, 8, 32))
    np.savez(tmp_path / 'given.npz', **dict(zip(('x', 'kernel', 'gradient'), given)))
    python(ONE_THREAD, str(tmp_path / 'given.npz'), str(tmp_path / 'made.npz'))
    made = tiny.arrays(tmp_path / 'made.npz')
    for _ in range(3):
        for array, name in zip(computed(*given)[1], made, strict=True):
            assert np.array_equal(array, made[name]), name


@pytest.mark.parametrize(
    ('shape', 'kernel', 'stride', 'pad', 'dtype'),
    [
        ((8, 8, 8, 16), (3, 3, 16, 16), 2, 1, 'float32'),
        ((8, 8, 8, 16), (3, 3, 16, 16), 1, 0, 'float32'),
        ((8, 8, 8, 16), (5, 5, 16, 16), 1, 2, 'float32'),
        ((8, 8, 8, 16), (1, 1, 16, 16), 1, 0, 'float32'),
        ((8, 8, 8, 16), (3, 3, 16, 24), 1, 1, 'float32'),
        ((8, 8, 8, 3), (3, 3, 3, 16), 1, 1, 'float32'),
        ((8, 8, 8, 16), (3, 3, 16, 16), 1, 1, 'bfloat16'),
        ((1, 8, 8, 16), (3, 3, 16, 16), 1, 1, 'float32'),  # few tiles
    ],
)
def test_others_stay_with_xla(
    shape: Any, kernel: Any, stride: int, pad: int, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(winograd, '_on', True)
    monkeypatch.setattr(winograd, 'LEAST_TILES', 32)
    given = jnp.ones(shape, dtype), jnp.ones(kernel, dtype)
    traced = str(jax.make_jaxpr(lambda x, k: convolution(x, k, stride, pad))(*given))
    assert 'conv_general_dilated' in traced and 'ffi_call' not in traced
    same = jnp.ones((8, 8, 8, 16)), jnp.ones((3, 3, 16, 16))
    assert 'ffi_call' in str(jax.make_jaxpr(convolution)(*same))


def test_programs_for_other_machines_have_none(kernels: None) -> None:
    """A program for GPUs, and one that is exported for any batch."""
    x, kernel = jnp.ones((8, 8, 8, 16)), jnp.ones((3, 3, 16, 16))
    for platform, calls in (('cpu', 1), ('cuda', 0), ('tpu', 0)):
        text = jax.jit(convolution).trace(x, kernel).lower(lowering_platforms=(platform,)).as_text()
        assert text.count('@dfkd_winograd') == calls
    [batch] = jax.export.symbolic_shape('batch')
    fn = jax.jit(lambda x: convolution(x, kernel))
    exported = jax.export.export(fn)(jax.ShapeDtypeStruct((batch, 8, 8, 16), jnp.float32))
    assert '@dfkd_winograd' not in exported.mlir_module()
    assert_near([exported.call(x)], [fn(x)], 1e-6)


# 2. Where they come from.


def python(code: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, 'JAX_PLATFORMS': 'cpu', 'PYTHONPATH': str(ROOT), **variables}
    command = [sys.executable, '-W', 'error', '-c', code, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done


def test_the_config_decides(compiled: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(winograd, '_on', False)
    assert native.use('auto') and winograd._on
    assert not native.use('xla') and not winograd._on
    with pytest.raises(ConfigError, match="config.convolutions='fast': expected one of auto, xla"):
        native.use('fast')


def test_without_a_compiler_one_line_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / 'winograd.cc'
    broken.write_text('#error "not this CPU"\n')
    (tmp_path / 'file').touch()
    for where, compiler, source, said in (
        (tmp_path, 'no-such-compiler', native.SOURCE, 'there is no no-such-compiler'),
        (tmp_path, native.COMPILER[0], broken, 'not this CPU'),
        (tmp_path / 'file', native.COMPILER[0], native.SOURCE, 'set XDG_CACHE_HOME'),
    ):
        monkeypatch.setenv('XDG_CACHE_HOME', str(where))
        monkeypatch.setattr(winograd, '_on', True)
        # As in a process that has none: XLA takes a target once, so what it has is not forgotten.
        monkeypatch.setattr(native, 'register', native.register.__wrapped__)
        monkeypatch.setattr(native, 'COMPILER', (compiler, *native.COMPILER[1:]))
        monkeypatch.setattr(native, 'SOURCE', source)
        assert not native.use('auto') and not winograd._on
        [line] = [x for x in capsys.readouterr().out.splitlines() if not x.startswith('compiling')]
        assert line.startswith('3x3 convolutions are those of XLA') and said in line
        monkeypatch.undo()


FIRST_USE = """
from dfkd_jax import native
native.COMPILER = tuple('-O0' if word == '-O3' else word for word in native.COMPILER)
path = native.folder() / f'winograd-{native.identity()}.so'
if not path.exists():
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b'half of a file')
print(native.use('auto'), sorted(each.name for each in path.parent.iterdir()) == [path.name])
"""


@pytest.mark.slow
def test_a_damaged_file_is_compiled_anew_and_kept(compiled: None, tmp_path: Path) -> None:
    first, second = (python(FIRST_USE, XDG_CACHE_HOME=str(tmp_path)).stdout for _ in range(2))
    assert first.splitlines()[-1] == second.strip() == 'True True'
    assert first.startswith('compiling convolutions for this CPU, once')


@pytest.mark.slow
def test_what_computes_something_else_is_not_used(compiled: None, tmp_path: Path) -> None:
    text = native.SOURCE.read_text()
    wrong = text.replace('B2 = 2.0f', 'B2 = 2.01f')
    assert wrong != text
    (tmp_path / 'winograd.cc').write_text(wrong)
    line = f'import pathlib\nnative.SOURCE = pathlib.Path({str(tmp_path / "winograd.cc")!r})\n'
    code = FIRST_USE.replace('path = ', f'{line}path = ')
    said = python(code, XDG_CACHE_HOME=str(tmp_path)).stdout.splitlines()
    assert said[-1].startswith('False') and 'compute something else' in said[-2]
    assert not list((tmp_path / 'dfkd_jax').iterdir())


# 3. Maps smaller than the kernel.


@pytest.mark.parametrize(
    ('height', 'width', 'size', 'stride'),
    [
        (1, 1, 3, 1), (2, 2, 3, 1), (2, 2, 3, 2), (1, 2, 3, 2), (3, 3, 3, 2), (4, 4, 3, 2),
        (2, 7, 3, 1), (4, 3, 5, 1), (1, 3, 7, 2), (6, 6, 7, 2),
    ],
)  # fmt: skip
def test_small_maps_are_products_of_patches(
    height: int, width: int, size: int, stride: int
) -> None:
    pad = size // 2
    outputs = ((side + 2 * pad - size) // stride + 1 for side in (height, width))
    x, kernel, gradient = drawn((3, height, width, 5), (size, size, 5, 4), (3, *outputs, 4))
    program, found = computed(x, kernel, gradient, stride, pad)
    assert 'convolution(' not in program
    assert_near(found, exact(x, kernel, gradient, stride, pad), 2e-6)


def test_places_that_see_padding_alone_are_left_out() -> None:
    x, kernel, gradient = drawn((2, 1, 1, 4), (3, 3, 4, 5), (2, 1, 1, 5))
    program = jax.jit(convolution).lower(x, kernel).as_text()
    assert 'tensor<2x1x1x4xf32>, tensor<4x5xf32>' in program, 'the middle one is the product'
    of_kernel = computed(x, kernel, gradient)[1][2]
    assert np.count_nonzero(of_kernel) == 4 * 5


def test_small_maps_take_a_symbolic_batch_and_bfloat16() -> None:
    x, kernel = (jnp.asarray(each) for each in drawn((5, 2, 2, 4), (3, 3, 4, 3)))
    [batch] = jax.export.symbolic_shape('batch')
    fn = jax.jit(lambda x: convolution(x, kernel))
    exported = jax.export.export(fn, platforms=('cpu', 'cuda'))(
        jax.ShapeDtypeStruct((batch, 2, 2, 4), jnp.float32)
    )
    assert_near([exported.call(x)], [fn(x)], 1e-6)
    half = convolution(x.astype(jnp.bfloat16), kernel.astype(jnp.bfloat16))
    assert half.dtype == jnp.bfloat16
    assert_near([half.astype(jnp.float32)], [fn(x)], 2e-2)
