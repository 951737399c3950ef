"""JAX made strict and fast to compile, and what the golden files are computed from."""

from __future__ import annotations

import atexit
import functools
import gc
import importlib.metadata
import os
import shutil
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Compiled programs are shared by the workers of one test run and by the processes that tests start:
# all of them inherit this.
if 'JAX_COMPILATION_CACHE_DIR' not in os.environ:
    os.environ['JAX_COMPILATION_CACHE_DIR'] = tempfile.mkdtemp(prefix='dfkd_jax_compiled_')
    atexit.register(shutil.rmtree, os.environ['JAX_COMPILATION_CACHE_DIR'], ignore_errors=True)
os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0.5')

# A program of a test runs for milliseconds and compiles for seconds, a third less of them without
# these.  Later versions end at a flag that they do not know.
if importlib.metadata.version('jaxlib').startswith('0.10.'):
    flag = '--xla_cpu_use_fusion_emitters=false'
    os.environ['XLA_FLAGS'] = f'{os.environ.get("XLA_FLAGS", "")} {flag}'

import jax
import numpy as np
import optax
import pytest

gc.set_threshold(50_000, 20, 50)  # tracing makes many objects and no garbage
jax.config.update('jax_platforms', 'cpu')
jax.config.update('jax_num_cpu_devices', 4)
jax.config.update('jax_numpy_rank_promotion', 'raise')
jax.config.update('jax_numpy_dtype_promotion', 'strict')
jax.config.update('jax_default_matmul_precision', 'highest')


def promoting(make: Callable[..., Any]) -> Callable[..., Any]:
    """An optimiser whose updates promote types as JAX does by default.

    optax multiplies rates and counts of steps, which are float32 and int32.
    """

    @functools.wraps(make)
    def made(*args: Any, **kwargs: Any) -> optax.GradientTransformation:
        tx = make(*args, **kwargs)

        def update(*args: Any, **kwargs: Any) -> Any:
            with jax.numpy_dtype_promotion('standard'):
                return tx.update(*args, **kwargs)

        return tx._replace(update=update)

    return made


for name in ('adam', 'adamw', 'chain', 'partition', 'sgd'):
    setattr(optax, name, promoting(getattr(optax, name)))

ROOT = Path(__file__).resolve().parents[1]
# Files of tests, the longest first, so that no worker is left alone with one at the end.
LONGEST = (
    'test_hosts', 'test_offline', 'test_train', 'test_sharding', 'test_methods', 'test_inversion',
    'test_cpsc', 'test_diffdfkd', 'test_nayer', 'test_faults',
)  # fmt: skip

# Files for the inner loop: three minutes on two cores.
FAST = (
    'test_augment', 'test_checkpoint', 'test_compare', 'test_contributing', 'test_cores',
    'test_data', 'test_diffusion_schedules', 'test_errors', 'test_image_bank', 'test_imports',
    'test_labels', 'test_losses', 'test_metrics', 'test_port', 'test_report', 'test_synthetic',
)  # fmt: skip


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption('--fault_table', help='FILE.md: the table that tests/test_faults.py makes')


def pytest_configure(config: pytest.Config) -> None:
    # Another worker may be writing the entry that this one reads: it then compiles for itself.
    config.addinivalue_line('filterwarnings', 'ignore:Error (reading|writing) persistent compil')


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.stem, len(places)))
    for item in items:
        if item.path.stem in FAST and not item.get_closest_marker('slow'):
            item.add_marker('fast')


@pytest.fixture
def key() -> jax.Array:
    """A PRNG key, the same in every test."""
    return jax.random.key(0)


@pytest.fixture(scope='module', autouse=True)
def forgotten_programs():
    """Drops what a module compiled.

    Every program maps memory, a process may have 65,530 mappings (vm.max_map_count), and XLA
    crashes at the next one: a worker that keeps the programs of the whole suite gets there.
    """
    yield
    jax.clear_caches()


@pytest.fixture(scope='module')
def fast_compilation():
    """For modules whose programs run for milliseconds and compile for seconds."""
    jax.config.update('jax_disable_most_optimizations', True)
    yield
    jax.config.update('jax_disable_most_optimizations', False)


@pytest.fixture(scope='module')
def fast_runs(fast_compilation):
    """For modules whose every run compiles the same small programs: they are kept for the next.

    The zoo has the tiny network `tiny.RESNET` there.
    """
    name = 'jax_persistent_cache_min_compile_time_secs'
    before = jax.config.values[name]
    jax.config.update(name, 0.0)
    with pytest.MonkeyPatch.context() as patch:
        import tiny  # JAX is set up by now

        tiny.add_to_zoo(patch)
        yield
    jax.config.update(name, before)


@pytest.fixture(scope='session')
def shared() -> Path:
    """The folder of golden data and teachers beside the repository, or `DFKD_SHARED`."""
    path = Path(os.environ.get('DFKD_SHARED', ROOT.parent / 'shared'))
    if not path.is_dir():
        pytest.skip(
            f'no reference data at {path}: set DFKD_SHARED to the folder that holds golden/'
        )
    return path


@pytest.fixture(scope='session')
def golden(shared: Path) -> Path:
    """The outputs of the reference implementations; their README.md says what each file holds."""
    return shared / 'golden'


class Rule:
    """The golden files' rules: every array follows from its name."""

    @staticmethod
    def normal(name: str, shape: Any) -> np.ndarray:
        """Standard normal float32: inputs, latents, embeddings."""
        rng = np.random.default_rng(zlib.crc32(name.encode()))
        return rng.standard_normal(tuple(shape)).astype(np.float32)

    @staticmethod
    def weight(key: str, shape: Any, prefix: str = '') -> np.ndarray:
        """One array of a PyTorch state dict; `prefix` changes the draw, not the kind."""
        last = key.rpartition('.')[2]
        if last == 'num_batches_tracked' or not shape:
            return np.zeros(tuple(shape), np.int64 if last == 'num_batches_tracked' else np.float32)
        x = Rule.normal(prefix + key, shape)
        if last == 'running_var':
            x = 0.5 + np.abs(x)
        elif last == 'running_mean':
            x = 0.1 * x
        elif len(shape) >= 2:
            x = x * np.sqrt(2 / np.prod(shape[1:]))
        else:
            x = 1 + 0.1 * x if last == 'weight' else 0.1 * x
        return x.astype(np.float32)

    @staticmethod
    def state_dict(shapes: Any, prefix: str = '') -> dict[str, np.ndarray]:
        """A state dict from pairs of key and shape, as the golden files list them."""
        return {key: Rule.weight(key, shape, prefix) for key, shape in shapes}


@pytest.fixture(scope='session')
def rule() -> type[Rule]:
    """Arrays by rule: `rule.normal`, `rule.weight`, `rule.state_dict`."""
    return Rule
