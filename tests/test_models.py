"""The model zoo against the reference implementations, and what every classifier promises."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from dfkd_jax import models, port
from dfkd_jax.models import layers

CLASSIFIERS = [name for name in models.MODELS if not name.endswith('_generator')]
# Compiles large programs, and the draws of an initialisation, in a fraction of the time.
UNOPTIMISED = {'xla_backend_optimization_level': 0}
GOLDEN = {
    'lenet5_c10': 'lenet5',
    'lenet5half_c10': 'lenet5_half',
    'resnet18_c10': 'resnet18',
    'resnet8x4_c10': 'resnet8x4',
    'vgg11_c10': 'vgg11',
    'wrn16_1_c10': 'wrn16_1',
    'wrn40_2_c10': 'wrn40_2',
}


def assert_close(actual, expected, tolerance: float = 1e-4) -> None:
    """Relative to the largest value expected: rule weights make large ones."""
    expected = np.asarray(expected)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance * np.abs(expected).max())


@cache
def structure(name: str, channels: int = 3, **sizes):
    """The shapes of a model's variables, traced and not computed."""
    module = models.make(name, **sizes)
    images = jax.ShapeDtypeStruct((1, 32, 32, channels), jnp.float32)
    return jax.eval_shape(lambda x: module.init(jax.random.key(0), x), images)


# 1. Equal to the reference implementations.


@pytest.mark.parametrize('stem', tiny.quick(GOLDEN, *set(GOLDEN) - {'wrn40_2_c10', 'resnet18_c10'}))
def test_classifier_equals_the_reference(golden: Path, rule, stem: str):
    facts = json.loads((golden / 'classifiers' / f'{stem}.json').read_text())
    expected = tiny.arrays(golden / 'classifiers' / f'{stem}.npz')
    name, classes, size = GOLDEN[stem], facts['num_classes'], facts['image_size']
    variables = port.from_torch(name, rule.state_dict(facts['state_dict']), num_classes=classes)
    module = models.make(name, num_classes=classes)
    images = rule.normal(f'input:{stem}', (4, facts.get('channels', 3), size, size))
    images = images.transpose(0, 2, 3, 1)

    out = jax.jit(module.apply)(variables, images)
    assert_close(out.logits, expected['logits'])
    assert_close(out.features, expected['features'])
    if 'bn_stat_loss' not in expected:
        assert out.statistics == {}
        return

    norm = lambda a, b: np.linalg.norm(np.asarray(a) - b)  # noqa: E731
    terms = jax.tree.map(norm, out.statistics, variables['batch_stats'])
    assert_close(sum(jax.tree.leaves(terms)), expected['bn_stat_loss'])

    train = jax.jit(lambda v, x: module.apply(v, x, train=True, mutable=['batch_stats']))
    out, updated = train(variables, images)
    assert_close(out.logits, expected['train_logits'])
    keys = [key for key, _ in facts['state_dict'] if key.endswith('running_var')]
    after = port.to_torch(name, {'params': variables['params'], **updated})
    assert_close(after[keys[0]], expected['running_var_first_after'])
    assert_close(after[keys[-1]], expected['running_var_last_after'])


def reference_resnet(w: dict, images, depths: tuple[int, ...], shortcut: str, head: str):
    """Residual networks written over a state dict with PyTorch's functions; stem by its size."""
    F = pytest.importorskip('torch.nn.functional', reason='PyTorch computes the reference')

    def conv(x, key: str, stride: int = 1):
        return F.conv2d(x, w[f'{key}.weight'], None, stride, w[f'{key}.weight'].shape[-1] // 2)

    def norm(x, key: str):
        return F.batch_norm(x, w[f'{key}.running_mean'], w[f'{key}.running_var'],
                            w[f'{key}.weight'], w[f'{key}.bias'])  # fmt: skip

    imagenet = w['conv1.weight'].shape[-1] == 7
    x = F.relu(norm(conv(images, 'conv1', 2 if imagenet else 1), 'bn1'))
    x = F.max_pool2d(x, 3, 2, 1) if imagenet else x
    for stage, depth in enumerate(depths, start=1):
        for i in range(depth):
            block, stride = f'layer{stage}.{i}', 2 if stage > 1 and i == 0 else 1
            if f'{block}.conv3.weight' in w:
                y = F.relu(norm(conv(x, f'{block}.conv1'), f'{block}.bn1'))
                y = F.relu(norm(conv(y, f'{block}.conv2', stride), f'{block}.bn2'))
                y = norm(conv(y, f'{block}.conv3'), f'{block}.bn3')
            else:
                y = F.relu(norm(conv(x, f'{block}.conv1', stride), f'{block}.bn1'))
                y = norm(conv(y, f'{block}.conv2'), f'{block}.bn2')
            if f'{block}.{shortcut}.0.weight' in w:
                x = norm(conv(x, f'{block}.{shortcut}.0', stride), f'{block}.{shortcut}.1')
            x = F.relu(x + y)
    return F.linear(x.mean((2, 3)), w[f'{head}.weight'], w[f'{head}.bias'])


def reference_mobilenetv2(w: dict, images):
    """MobileNetV2 written over a state dict with PyTorch's functions."""
    F = pytest.importorskip('torch.nn.functional', reason='PyTorch computes the reference')

    def conv_norm(x, conv: str, norm: str, stride: int = 1):
        kernel = w[f'{conv}.weight']
        x = F.conv2d(x, kernel, None, stride, kernel.shape[-1] // 2,
                     groups=x.shape[1] // kernel.shape[1])  # fmt: skip
        return F.batch_norm(x, w[f'{norm}.running_mean'], w[f'{norm}.running_var'],
                            w[f'{norm}.weight'], w[f'{norm}.bias'])  # fmt: skip

    x = F.relu6(conv_norm(images, 'features.0.0', 'features.0.1', 2))
    x_in = F.relu6(conv_norm(x, 'features.1.conv.0.0', 'features.1.conv.0.1'))
    x = conv_norm(x_in, 'features.1.conv.1', 'features.1.conv.2')
    for n in range(2, 18):
        at = f'features.{n}.conv'
        y = F.relu6(conv_norm(x, f'{at}.0.0', f'{at}.0.1'))
        y = F.relu6(conv_norm(y, f'{at}.1.0', f'{at}.1.1', 2 if n in (2, 4, 7, 14) else 1))
        y = conv_norm(y, f'{at}.2', f'{at}.3')
        x = x + y if x.shape == y.shape else y
    x = F.relu6(conv_norm(x, 'features.18.0', 'features.18.1'))
    return F.linear(x.mean((2, 3)), w['classifier.1.weight'], w['classifier.1.bias'])


@pytest.mark.parametrize(
    ('name', 'reference'),
    [
        ('resnet20', lambda w, x: reference_resnet(w, x, (3, 3, 3), 'downsample', 'fc')),
        pytest.param(
            'resnet50_imagenet',
            lambda w, x: reference_resnet(w, x, (3, 4, 6, 3), 'downsample', 'fc'),
            marks=pytest.mark.slow,
        ),
        pytest.param('mobilenetv2', reference_mobilenetv2, marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_classifier_equals_plain_torch(rule, name: str, reference):
    """For the families without a golden file; odd maps inside, where paddings would differ."""
    torch = pytest.importorskip('torch', reason='PyTorch computes the reference')
    shapes = port.to_torch(name, zeros(structure(name, channels=1, num_classes=7)))
    weights = rule.state_dict([(key, value.shape) for key, value in shapes.items()])
    images = rule.normal(f'input:{name}', (2, 22, 22, 1))

    variables = port.read(name, weights, num_classes=7).variables
    apply = jax.jit(models.make(name, num_classes=7).apply, compiler_options=UNOPTIMISED)
    logits = apply(variables, images).logits
    with torch.no_grad():
        expected = reference({key: torch.from_numpy(value) for key, value in weights.items()},
                             torch.from_numpy(images.transpose(0, 3, 1, 2).copy()))  # fmt: skip
    assert_close(logits, expected.numpy())


def zeros(shapes):
    return jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)


# Trainable parameters of the published networks.
COUNTS = [
    ('resnet18', 10, 11_173_962),
    ('resnet34', 10, 21_282_122),
    ('resnet50', 10, 23_520_842),
    ('resnet18_imagenet', 1000, 11_689_512),
    ('resnet34_imagenet', 1000, 21_797_672),
    ('resnet50_imagenet', 1000, 25_557_032),
    ('wrn16_1', 10, 175_066),
    ('wrn40_2', 10, 2_243_546),
    ('resnet8x4', 100, 1_233_540),
    ('resnet32x4', 100, 7_433_860),
    ('vgg8', 100, 3_965_028),
    ('vgg13', 100, 9_462_180),
    ('mobilenetv2', 1000, 3_504_872),
    ('efficientnet_lite0', 1000, 4_652_008),
    ('efficientnet_b0', 1000, 5_288_548),
    ('mobilenetv3_large', 1000, 5_483_032),
    ('mobilenetv3_small', 1000, 2_542_856),
    ('densenet121', 1000, 7_978_856),
    ('regnet_y_400mf', 1000, 4_344_144),
    ('shufflenetv2_x0_5', 1000, 1_366_792),
    ('shufflenetv2_x1_0', 1000, 2_278_604),
    ('convnext_tiny', 1000, 28_589_128),
    ('vit_tiny', 1000, 5_717_416),
    ('vit_small', 1000, 22_050_664),
    ('vit_base', 1000, 86_567_656),
]


@pytest.mark.parametrize(('name', 'num_classes', 'count'), tiny.quick(COUNTS, *COUNTS[:13]))
def test_parameter_count(name: str, num_classes: int, count: int):
    params = structure(name, num_classes=num_classes)['params']
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == count


# 2. What every classifier promises.


@pytest.mark.parametrize(
    'name',
    tiny.quick(CLASSIFIERS, 'lenet5', 'resnet8', 'resnet18', 'resnet18_imagenet', 'wrn16_1', 'vgg8',
               'mobilenetv2', 'efficientnet_lite0', 'mobilenetv3_small', 'shufflenetv2_x0_5',
               'vit_tiny_cifar', 'resnet20_gn'),
)  # fmt: skip
def test_outputs(name: str):
    """Traced, not computed: logits, features, and a tap for every batch norm, over two shares."""
    module = models.make(name, num_classes=7, axis_name='data')
    images = jax.ShapeDtypeStruct((2, 4, 32, 32, 1), jnp.float32)
    variables = structure(name, channels=1, num_classes=7)

    def train(variables, images):
        return module.apply(variables, images, train=True, mutable=['batch_stats'])

    # An out_axis of None refuses what is not the same in every share: a norm of its share alone.
    axes = (models.Output(0, 0, None, 0, 0), None)  # type: ignore[arg-type]
    mapped = jax.vmap(train, in_axes=(None, 0), out_axes=axes, axis_name='data')
    out, updated = jax.eval_shape(mapped, variables, images)
    assert (out.logits.shape, out.logits.dtype) == ((2, 4, 7), jnp.float32)
    assert (out.features.shape[:2], out.features.dtype) == ((2, 4), jnp.float32)
    statistics = variables.get('batch_stats', {})
    sizes = [stage.shape[2:4] for stage in out.stages]
    assert sizes == sorted(set(sizes), reverse=True), 'finest first'
    assert len(sizes) > 2 or name.startswith('vit') and len(sizes) == 1
    assert {stage.shape[:2] for stage in out.stages} == {(2, 4)}
    assert out.statistics == statistics  # the same tree of the same shapes and dtypes
    assert updated.get('batch_stats', {}) == statistics


@pytest.mark.parametrize(
    'name',
    tiny.quick(
        ['resnet8', 'resnet8_s2d', 'resnet18', 'resnet18_imagenet', 'wrn16_1', 'vgg8',
         'mobilenetv2', 'efficientnet_lite0', 'efficientnet_b0', 'mobilenetv3_small', 'densenet121',
         'regnet_y_400mf', 'shufflenetv2_x0_5', 'convnext_tiny', 'resnet20_gn'],
        'resnet8', 'resnet8_s2d', 'resnet18_imagenet', 'vgg8', 'mobilenetv2', 'resnet20_gn',
    ),
)  # fmt: skip
def test_any_image_size(name: str):
    images = jax.ShapeDtypeStruct((2, 34 if 's2d' in name else 33, 38, 3), jnp.float32)
    out = jax.eval_shape(models.make(name).apply, structure(name), images)
    assert out.logits.shape == (2, 10)


@pytest.mark.parametrize('name', ['resnet8_s2d_half', 'lenet5_half'])
def test_initialised_network_computes(key, name: str):
    module = models.make(name, num_classes=5)
    images = np.random.default_rng(0).standard_normal((4, 32, 32, 1), np.float32)
    init = jax.jit(module.init_with_output, compiler_options=UNOPTIMISED)
    out, variables = init(key, images)
    assert out.logits.shape == (4, 5)
    assert bool(jnp.isfinite(out.logits).all())
    assert 0.01 < float(out.logits.std()) < 10
    first = jax.tree.leaves(variables['params'])
    other = jax.tree.leaves(init(jax.random.key(1), images)[1]['params'])
    assert not any(np.array_equal(a, b) for a, b in zip(first, other, strict=True) if a.ndim > 1)


def test_vgg_pools_a_fourth_time_at_64_px_only():
    """Visible in nothing but the work: count the positions of the last block's convolution."""

    def last_map(size: int) -> tuple[int, ...]:
        images = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
        module = models.make('vgg8')
        program = jax.make_jaxpr(module.apply)(zeros(structure('vgg8')), zeros(images))
        return [e.outvars[0].aval.shape for e in program.eqns if 'conv' in e.primitive.name][-1]

    assert last_map(32) == (1, 4, 4, 512)
    assert last_map(64) == (1, 4, 4, 512)
    assert last_map(48) == (1, 6, 6, 512)


@pytest.mark.parametrize(
    ('name', 'size', 'message'),
    [('lenet5', 28, 'pad 28 px'), ('vgg11', 4, '8 px and more'), ('resnet8_s2d', 15, 'multiple')],
)
def test_image_size_that_does_not_fit(name: str, size: int, message: str):
    images = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(models.make(name).apply, structure(name), images)


def test_unknown_name_lists_near_and_known_ones():
    with pytest.raises(ValueError, match=r"unknown model 'resnet43'.*Did you mean.*resnet34"):
        models.make('resnet43')


@pytest.mark.parametrize('train', [False, True])
def test_batch_norm_of_shares_is_that_of_the_batch(key, train: bool):
    """Over a mapped axis, outputs, taps and updates are those of the whole batch."""
    x = 2 + 3 * jax.random.normal(key, (8, 3, 5, 4))
    variables = layers.BatchNorm().init(key, x, True)

    def apply(x, **sizes):
        return layers.BatchNorm(**sizes).apply(variables, x, train, mutable=['batch_stats'])

    (y, taps), state = jax.jit(apply)(x)
    shares = jax.jit(jax.vmap(lambda x: apply(x, axis_name='data'), axis_name='data',
                              out_axes=((0, None), None)))  # fmt: skip
    (y_shares, taps_shares), state_shares = shares(x.reshape(4, 2, 3, 5, 4))
    assert_close(y_shares.reshape(x.shape), y, 1e-6)
    jax.tree.map(lambda a, b: assert_close(a, b, 1e-6), (taps_shares, state_shares), (taps, state))
    assert_close(taps['var'], np.asarray(x).var((0, 1, 2)), 1e-5)
    moved = 0.9 + 0.1 * np.asarray(x).var((0, 1, 2), ddof=1)
    assert_close(state['batch_stats']['var'], moved if train else np.ones(4), 1e-5)


@pytest.mark.parametrize('name', ['resnet8_half', 'mobilenetv2'])
def test_bfloat16_keeps_outputs_and_statistics_in_float32(name: str):
    module = models.make(name, dtype=jnp.bfloat16)
    images = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)
    out = jax.eval_shape(module.apply, structure(name), images)
    maps, rest = (*out.stages, out.last), out._replace(stages=(), last=None)
    assert {leaf.dtype for leaf in jax.tree.leaves(rest)} == {jnp.dtype('float32')}
    assert {leaf.dtype for leaf in maps} == {jnp.dtype('bfloat16')}


def test_wide_residual_networks_average_in_float32():
    """As the others do: a mean that is rounded to bfloat16 first loses two of its three digits."""
    name, images = 'wrn16_1', np.random.default_rng(0).standard_normal((2, 32, 32, 3), np.float32)
    module = models.make(name, dtype=jnp.bfloat16)
    variables = jax.jit(module.init, compiler_options=UNOPTIMISED)(jax.random.key(0), images)
    out = jax.jit(module.apply, compiler_options=UNOPTIMISED)(variables, images)
    as_rounded = np.asarray(out.features.astype(jnp.bfloat16).astype(jnp.float32))
    assert np.mean(as_rounded == out.features) < 0.1


def test_the_deep_generator_of_cpsc_starts_as_its_authors_has_it():
    """Its linear layer and its last convolution too: weights from N(0, 0.02), biases zero."""
    module = models.make('cpsc_deep_generator', latent=8, width=4, image_size=16, channels=1)
    z, label = jnp.zeros((1, 8)), jnp.zeros((1,), jnp.int32)
    start = jax.jit(module.init, compiler_options=UNOPTIMISED)
    params = start(jax.random.key(0), z, label)['params']
    assert module.epsilon == 1e-3
    for name in ('project', 'conv5'):
        np.testing.assert_allclose(np.std(params[name]['kernel']), 0.02, rtol=0.2)
        assert not np.any(params[name]['bias'])


@pytest.mark.slow
def test_one_brightness_for_all_classes():
    """The published generator paints a class by its last norm alone; the other one cannot."""

    def outputs(class_brightness: bool):
        module = models.make('cpsc_generator', num_classes=3, image_size=8, channels=1, latent=4,
                             width=2, class_brightness=class_brightness)  # fmt: skip
        z = jax.random.normal(jax.random.key(1), (6, 4))
        label = jnp.asarray([0, 1, 2, 0, 1, 2])
        variables = jax.jit(module.init, compiler_options=UNOPTIMISED)(jax.random.key(0), z, label)
        last = variables['params']['norm3']
        rows = last['bias'].shape[0]
        moved = last | {'bias': last['bias'].at[rows - 1].add(1.0)}
        moved = variables | {'params': variables['params'] | {'norm3': moved}}
        before, after = (module.apply(v, z, label, train=False) for v in (variables, moved))
        return rows, np.asarray(after - before).mean((1, 2, 3))

    rows, change = outputs(True)
    assert rows == 3
    np.testing.assert_allclose(change, [0, 0, 1, 0, 0, 1], atol=1e-6)
    rows, change = outputs(False)
    assert rows == 1
    np.testing.assert_allclose(change, 1, atol=1e-6)


def with_gradients(convolve, image: jax.Array, kernel: jax.Array):
    """The program of a convolution and its gradients; ((loss, output), (of image, of kernel))."""

    def loss(image, kernel):
        out = convolve(image, kernel)
        return jnp.sum(jnp.sin(out)), out

    step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)).lower(image, kernel)
    return step.as_text(), step.compile()(image, kernel)


@pytest.mark.parametrize('stride, size', tiny.quick([(1, 3), (2, 3), (2, 1)], (2, 3), (2, 1)))
def test_a_kernels_gradient_in_parts_is_the_whole_one(stride: int, size: int, monkeypatch):
    """What CPUs do at sizes that users have, at a tiny one; the last part is a smaller one."""
    image, kernel = jnp.ones((7, 6, 6, 3)), jnp.ones((size, size, 3, 4))
    image, kernel = (
        jax.random.normal(jax.random.key(i), x.shape) for i, x in enumerate((image, kernel))
    )
    padding, layout = ((size // 2,) * 2,) * 2, ('NHWC', 'HWIO', 'NHWC')

    def gradients(convolve):
        how = {'padding': padding, 'dimension_numbers': layout}
        text, (_, found) = with_gradients(
            lambda x, k: convolve(x, k, (stride, stride), **how), image, kernel
        )
        return text.count('stablehlo.convolution'), found

    monkeypatch.setattr(layers, 'PART', 2 * image[0].size)
    found, wanted = gradients(layers.convolve), gradients(jax.lax.conv_general_dilated)
    assert (found[0], wanted[0]) == (2 + 4, 3)  # forward, of the image, of the kernel
    for a, b in zip(found[1], wanted[1], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('size, stride', tiny.quick([(3, 1), (3, 2), (5, 2)], (3, 2)))
@pytest.mark.parametrize('padding', tiny.quick(['SAME', 'symmetric'], 'SAME'))
def test_channels_with_their_own_kernels_are_convolved_as_in_groups(
    size: int, stride: int, padding: str
):
    image, kernel = (
        jax.random.normal(jax.random.key(i), x)
        for i, x in enumerate([(2, 8, 7, 6), (size, size, 1, 6)])
    )
    pads = padding if padding == 'SAME' else ((size // 2,) * 2,) * 2
    how = {'dimension_numbers': ('NHWC', 'HWIO', 'NHWC'), 'feature_group_count': 6}

    (program, found), (slow, wanted) = (
        with_gradients(lambda x, k, f=f: f(x, k, (stride, stride), pads, **how), image, kernel)
        for f in (layers.convolve, jax.lax.conv_general_dilated)
    )
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    assert [text.count('stablehlo.convolution') for text in (slow, program)] == [3, 0]


def test_patches_are_convolved_as_by_xla():
    """A rest of the image is left out, and gets no gradient."""
    image, kernel = (
        jax.random.normal(jax.random.key(i), x) for i, x in enumerate([(2, 9, 10, 3), (4, 4, 3, 5)])
    )
    how = {'dimension_numbers': ('NHWC', 'HWIO', 'NHWC')}
    (program, found), (slow, wanted) = (
        with_gradients(lambda x, k, f=f: f(x, k, (4, 4), ((0, 0), (0, 0)), **how), image, kernel)
        for f in (layers.convolve, jax.lax.conv_general_dilated)
    )
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert_close(a, b, 1e-5)
    assert not found[1][0][:, 8:].any()
    assert [text.count('stablehlo.convolution') for text in (slow, program)] == [3, 0]


def test_a_transposed_convolution_has_the_gradients_of_the_plain_one():
    image, kernel = (
        jax.random.normal(jax.random.key(i), x) for i, x in enumerate([(3, 5, 6, 4), (4, 4, 2, 4)])
    )

    def plain(image, kernel):
        return jax.lax.conv_transpose(
            image, kernel, (2, 2), ((2, 2), (2, 2)), transpose_kernel=True
        )

    (program, found), (slow, wanted) = (
        with_gradients(f, image, kernel) for f in (layers.convolve_transposed, plain)
    )
    assert found[0][1].shape == (3, 10, 12, 2)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    # What XLA is slow at on CPUs: the image dilated in the gradient of the kernel.
    assert [text.count('lhs_dilate = [2, 2]') for text in (slow, program)] == [2, 1]
