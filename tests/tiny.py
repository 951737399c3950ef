"""Networks, methods and configs of a few thousand weights, for tests of the loop and of methods."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache, partial
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from ml_collections import ConfigDict

from dfkd_jax import contract, diffusion, models
from dfkd_jax.configs import common
from dfkd_jax.contract import Frozen, Method, Models, State
from dfkd_jax.diffusion import unet
from dfkd_jax.distributed import sharding
from dfkd_jax.methods import METHODS
from dfkd_jax.methods.shared.trajectories import FrozenPrior
from dfkd_jax.models import generators, layers, resnet
from dfkd_jax.models.layers import BatchNorm, Output
from dfkd_jax.port import tables

CLASSES, SIZE, CHANNELS, BATCH = 4, 8, 3, 16
# A network of the zoo while a module with `fast_runs` is tested: a stem and one residual block,
# which compile sooner than ResNet-8's three.
RESNET = 'resnet_of_one_block'
# What a generator knows of a table of label embeddings and of a batch.
TABLE = {'embedding': 6, 'latent': 6, 'repeats': BATCH // CLASSES}


def add_to_zoo(patch: pytest.MonkeyPatch) -> None:
    """Adds `RESNET`, with the PyTorch names of any ResNet for CIFAR."""
    one_block = partial(resnet.ResNet, (1,), (8, 8), '3x3', False, 'downsample', 'fc')
    patch.setitem(models.MODELS, RESNET, one_block)
    patch.setitem(tables.TABLES, RESNET, tables.tables_of('resnet8_half'))


class Classifier(nn.Module):
    """Two convolutions with batch norms.

    smooth: without kinks.  Two runs that differ in their last bits meet a ReLU's kink on either
    side sooner or later, and part there by more than any tolerance.
    """

    width: int = 8
    smooth: bool = False
    num_classes: int = CLASSES
    axis_name: str | None = None

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> Output:
        taps, maps = {}, []
        act = jnp.tanh if self.smooth else nn.relu
        x = layers.conv(images, self.width, 3, stride=2, name='conv1')
        x, taps['bn1'] = BatchNorm(axis_name=self.axis_name, name='bn1')(x, train)
        maps.append(x := act(x))
        x = layers.conv(x, self.width, 3, stride=2, name='conv2')
        x, taps['bn2'] = BatchNorm(axis_name=self.axis_name, name='bn2')(x, train)
        maps.append(x := act(x))
        features = jnp.mean(x, (1, 2))
        logits = layers.linear(features, self.num_classes, name='fc')
        return Output(logits, features, taps, tuple(maps), x)


class WithoutMaps(Classifier):
    """A classifier that hides its maps."""

    def __call__(self, images: jax.Array, train: bool = False) -> Output:
        return super().__call__(images, train)._replace(stages=(), last=None)


class SmoothGenerator(nn.Module):
    """A conditional generator without kinks, and without biases that a batch norm takes out again.

    (The gradient of such a bias is rounding error, which Adam makes a step of full length.)
    """

    conditioning: ClassVar[str] = 'label'
    latent: int
    spread: float
    axis_name: str | None = None

    @nn.compact
    def __call__(self, z: jax.Array, label: jax.Array, train: bool = True) -> jax.Array:
        def norm(x: jax.Array, name: str) -> jax.Array:
            return generators.ConditionalBatchNorm(
                CLASSES, self.spread, axis_name=self.axis_name, name=name
            )(x, label, train)

        x = nn.Dense(SIZE * SIZE, use_bias=False, name='project')(z)
        x = jnp.tanh(norm(x.reshape(-1, SIZE // 2, SIZE // 2, 4), 'norm0'))
        x = layers.conv(layers.upsample2(x), CHANNELS, 3, name='conv1')
        return norm(jnp.tanh(x), 'norm1')


# What is smaller than published, wherever a method has and uses it.
SMALLER = {
    'student': {'warmup_steps': 0},
    'generator': {'latent': 8, 'width': 4, 'noisy_width': 8},
    'head': {'width': 8},
    'prior': {'steps': 6},
    'in_loop': {'start': 0},
    'synthesis': {
        'batch_size': BATCH, 'student_batch_size': BATCH, 'bank': 2 * BATCH, 'crop_padding': 1,
        'memory': 2 * BATCH, 'negatives': BATCH,
    },
}  # fmt: skip


def config(method: str = 'cpsc', **changes: Any) -> ConfigDict:
    """A run of a method on `nets`; changes are given as `group__field=value`."""
    config = common.run()
    # A data set that no method has settings for, so that they are the published ones.
    config.data = common.data('tiny', num_classes=CLASSES, image_size=SIZE, channels=CHANNELS)
    config.student = common.student('tiny')
    common.with_method(config, method)
    for group, sizes in SMALLER.items():
        for field, size in sizes.items():
            if group in config and config[group].get(field):  # a bank of 0 stays one
                config[group][field] = size
    if 'spread' in config.get('generator', ()):
        config.generator.spread = 0.5
    config.phases = (common.phase(rounds=20, g_steps=2, s_steps=2),)
    for name, value in changes.items():
        group, _, field = name.partition('__')
        config[group][field] = value
    return config


def nets(
    config: ConfigDict, axis_name: str | None = None, smooth: bool = False, student_width: int = 8
) -> Models:
    """The tiny teacher and student, and the method's generator or a smooth one."""
    generator: Any = SmoothGenerator(8, 0.5, axis_name=axis_name)
    if 'generator' not in config:
        generator = None
    elif not smooth:
        sizes = TABLE | dict(config.generator.items())
        sizes |= {'image_size': SIZE, 'channels': CHANNELS, 'num_classes': CLASSES}
        fields = models.fields(config.generator.model)
        sizes = {name: size for name, size in sizes.items() if name in fields}
        generator = models.make(config.generator.model, axis_name=axis_name, **sizes)
    return Models(
        teacher=Classifier(smooth=smooth, axis_name=axis_name),
        student=Classifier(student_width, smooth, axis_name=axis_name),
        generator=generator,
        num_classes=CLASSES,
        image_shape=(SIZE, SIZE, CHANNELS),
        mean=(0.5,) * CHANNELS,
        std=(0.25,) * CHANNELS,
        prior=prior() if 'prior' in config else None,
    )


def method(config: ConfigDict, shards: sharding.Shards, **nets_changes: Any) -> Method:
    """The method of a config on `nets`."""
    return METHODS[config.method](config, nets(config, shards.axis, **nets_changes), shards)


class Built(NamedTuple):
    """A method on the tiny networks, its steps compiled, and its start."""

    config: ConfigDict
    method: Method
    frozen: Frozen
    state: State


@cache
def built(name: str, warmup: int = 0, student_width: int = 8, **changes: Any) -> Built:
    """A method, the changes to its config given as to `config`; warmup: rounds."""
    settings = config(name, **changes)
    if warmup:
        first = common.phase(rounds=warmup, g_steps=2, s_steps=0)
        settings.phases = (first, *settings.phases)
    plain = method(settings, sharding.Shards(), student_width=student_width)
    given = frozen(method=name)
    compiled = {
        field: jax.jit(step) for field, step in plain._asdict().items()
        if step not in (None, contract.unchanged)
    }  # fmt: skip
    compiled = plain._replace(**compiled)
    return Built(settings, compiled, given, compiled.init(given, jax.random.key(0)))


def equal(a: Any, b: Any) -> bool:
    """Whether two trees hold the same numbers."""
    return all(
        np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


def vector(tree: Any) -> np.ndarray:
    """All numbers of a tree in a row."""
    return np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])


def prior_params(channels: int = CHANNELS) -> dict[str, Any]:
    """The parameters of `prior`."""
    kernel = np.random.default_rng(3).normal(0, 0.02, (3, 3, channels, channels))
    return {'kernel': kernel.astype(np.float32), 'bias': np.zeros(channels, np.float32)}


def prior() -> diffusion.Prior:
    """A diffusion model of pixels that is one convolution."""

    def eps(params: Any, x: jax.Array, t: jax.Array, cond: Any) -> jax.Array:
        assert cond is None
        share = (t / 1000).astype(jnp.float32)[:, None, None, None]
        return (0.2 + 0.8 * share) * x + nn.Conv(x.shape[-1], (3, 3)).apply({'params': params}, x)

    def decode(params: Any, z: jax.Array) -> jax.Array:
        return jnp.clip(z / 2 + 0.5, 0, 1)

    schedule = diffusion.schedule.from_config(diffusion.prior.DDPM)
    shape = (SIZE, SIZE, CHANNELS)
    return diffusion.Prior(
        {}, diffusion.prior.Pure(eps, decode, decode), schedule, shape, 1, 1, None
    )


UNET = {
    '_class_name': 'UNet2DModel', 'attention_head_dim': 4, 'block_out_channels': [8, 8],
    'down_block_types': ['DownBlock2D', 'DownBlock2D'], 'downsample_padding': 1,
    'flip_sin_to_cos': True, 'freq_shift': 0, 'in_channels': 1, 'layers_per_block': 1,
    'norm_eps': 1e-5, 'norm_num_groups': 4, 'out_channels': 1, 'sample_size': 4,
    'up_block_types': ['UpBlock2D', 'UpBlock2D'],
}  # fmt: skip


def saved_prior(folder: Path) -> Path:
    """The folder of a diffusion model with drawn weights, of 4 x 4 grey pixels."""
    module = unet.UNet(unet.from_config(UNET))
    blank = np.zeros((1, 4, 4, 1), np.float32), np.zeros(1, np.int32)
    params = jax.jit(module.init)(jax.random.key(0), *blank)['params']
    diffusion.save_unet(folder, UNET, params, diffusion.prior.DDPM)
    return folder


def frozen(smooth: bool = False, method: str = 'cpsc') -> Frozen:
    """A teacher with an opinion: logits far apart, and statistics that are no starting values.

    And label embeddings, for the methods that start from them.
    """
    shape = (SIZE, SIZE, CHANNELS)
    module = Classifier(smooth=smooth)

    @jax.jit
    def make(key: jax.Array) -> dict[str, Any]:
        variables = module.init(key, jnp.zeros((1, *shape)))
        images = jax.random.normal(key, (32, *shape))
        out, mutated = module.apply(variables, images, train=True, mutable=['batch_stats'])
        variables['params']['fc']['kernel'] *= 3 / jnp.std(out.logits)
        return variables | mutated

    if method == 'diffdfkd':
        params = jax.tree.map(jnp.asarray, prior_params())
        return Frozen(teacher=make(jax.random.key(1)), extra=FrozenPrior(params, ()))
    table = jax.random.normal(jax.random.key(2), (CLASSES, TABLE['embedding']))
    return Frozen(teacher=make(jax.random.key(1)), extra=table)


def quick(cases: Iterable[Any], *kept: Any) -> list[Any]:
    """Cases of which every run of the tests has these, and ``pytest -m slow`` the others.

    For tests that compile a program for each case, where a few cases differ most.
    """
    cases = list(cases)
    assert not set(kept) - set(cases), 'a case that is kept is one of them'
    return [
        case if case in kept
        else pytest.param(*case if isinstance(case, tuple) else (case,), marks=pytest.mark.slow)
        for case in cases
    ]  # fmt: skip


def arrays(path: Path) -> dict[str, np.ndarray]:
    """The arrays of an `.npz` file, which is closed again."""
    with np.load(path) as file:
        return dict(file)


def close(actual: Any, expected: Any, tolerance: float) -> None:
    """Asserts that trees agree, leaf by leaf, relative to each leaf's largest value."""
    difference = distance(actual, expected)
    assert difference <= tolerance, f'they differ by {difference:.2e}, more than {tolerance:.0e}'


def distance(actual: Any, expected: Any) -> float:
    """The largest difference between two trees, relative to each leaf's largest value."""
    actual, expected = jax.device_get((actual, expected))
    assert jax.tree.structure(actual) == jax.tree.structure(expected)

    def of(a: Any, b: Any) -> float:
        assert a.shape == b.shape
        scale = abs(b).max(initial=0.0)
        gap = abs(a - b).max(initial=0.0)
        return float(gap / scale if scale else gap)

    return max(jax.tree.leaves(jax.tree.map(of, actual, expected)), default=0.0)
