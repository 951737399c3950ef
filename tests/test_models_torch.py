"""The model zoo against PyTorch's own networks: values, statistics, gradients, names."""

from __future__ import annotations

import re
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import torchvision_models
from reference import identical, last, near

from dfkd_jax import models, port
from dfkd_jax.errors import PortError
from dfkd_jax.models import vit

CLASSES = 7
# Compiles large programs in a fraction of the time.
UNOPTIMISED = {'xla_backend_optimization_level': 0}


class Pair(NamedTuple):
    """A network here and its PyTorch namesake, with the same random weights."""

    name: str
    module: Any
    variables: dict[str, Any]
    torch: Any  # in evaluation
    weights: dict[str, np.ndarray]  # PyTorch's, by name
    images: np.ndarray  # [B, H, W, channels]


def tensorflow_padding(network: Any) -> Any:
    """`network` with TensorFlow's 'SAME' padding in all its convolutions."""
    import torch

    def pad(module, args):
        pads = []
        for size, kernel, stride in zip(args[0].shape[:1:-1], module.kernel_size, module.stride):
            whole = max((-(-size // stride) - 1) * stride + kernel - size, 0)
            pads += [whole // 2, whole - whole // 2]
        return (torch.nn.functional.pad(args[0], pads),)

    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.padding = (0, 0)
            module.register_forward_pre_hook(pad)
    return network


def torch_vit(tv: Any, image_size: int, patch: int, width: int, depth: int, heads: int) -> Any:
    return tv.VisionTransformer(image_size, patch, depth, heads, width, 4 * width,
                                num_classes=CLASSES)  # fmt: skip


def group_norm_resnet(depth: int = 3) -> Any:
    """A thin ResNet of `depth` blocks a stage as training scripts write it, with group norms."""
    from torch import nn

    class Block(nn.Module):
        def __init__(self, before: int, after: int, stride: int):
            super().__init__()
            self.conv1 = nn.Conv2d(before, after, 3, stride, 1, bias=False)
            self.bn1 = nn.GroupNorm(8, after)
            self.conv2 = nn.Conv2d(after, after, 3, 1, 1, bias=False)
            self.bn2 = nn.GroupNorm(8, after)
            self.downsample = nn.Identity()
            if before != after:
                conv = nn.Conv2d(before, after, 1, stride, bias=False)
                self.downsample = nn.Sequential(conv, nn.GroupNorm(8, after))

        def forward(self, x):
            y = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
            return (self.downsample(x) + y).relu()

    class ResNet(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
            self.bn1 = nn.GroupNorm(8, 16)
            for stage, (before, after) in enumerate([(16, 16), (16, 32), (32, 64)], start=1):
                blocks = [Block(before, after, 2 if stage > 1 else 1)]
                blocks += [Block(after, after, 1) for _ in range(depth - 1)]
                setattr(self, f'layer{stage}', nn.Sequential(*blocks))
            self.fc = nn.Linear(64, CLASSES)

        def forward(self, x):
            x = self.layer3(self.layer2(self.layer1(self.bn1(self.conv1(x)).relu())))
            return self.fc(x.mean((2, 3)))

    return ResNet()


# Name: the PyTorch network, given torchvision's models; and the size of the images.
NETWORKS: dict[str, tuple[Any, int]] = {
    'densenet121': (lambda tv: tv.densenet121(num_classes=CLASSES), 64),
    'regnet_y_400mf': (lambda tv: tv.regnet_y_400mf(num_classes=CLASSES), 64),
    'shufflenetv2_x0_5': (lambda tv: tv.shufflenet_v2_x0_5(num_classes=CLASSES), 64),
    'shufflenetv2_x1_0': (lambda tv: tv.shufflenet_v2_x1_0(num_classes=CLASSES), 64),
    'mobilenetv3_large': (lambda tv: tv.mobilenet_v3_large(num_classes=CLASSES), 64),
    'mobilenetv3_small': (lambda tv: tv.mobilenet_v3_small(num_classes=CLASSES), 64),
    'efficientnet_b0': (lambda tv: tv.efficientnet_b0(num_classes=CLASSES), 64),
    'efficientnet_b0_tf': (
        lambda tv: tensorflow_padding(
            tv.efficientnet_b0(num_classes=CLASSES, norm_layer=tensorflow_norm())
        ),
        64,
    ),
    'convnext_tiny': (lambda tv: tv.convnext_tiny(num_classes=CLASSES), 32),
    'vit_tiny': (lambda tv: torch_vit(tv, 224, 16, 192, 12, 3), 224),
    'vit_tiny_cifar': (lambda tv: torch_vit(tv, 32, 4, 192, 6, 3), 32),
    'vit_mini_cifar': (lambda tv: torch_vit(tv, 32, 4, 64, 4, 4), 32),
    'resnet8_gn': (lambda tv: group_norm_resnet(1), 32),
    'resnet20_gn': (lambda tv: group_norm_resnet(), 32),
}


def tensorflow_norm() -> Any:
    import torch

    return partial(torch.nn.BatchNorm2d, eps=1e-3, momentum=0.01)


# torchvision's names of a network whose own table here is of another source.
RENAMED = {
    'efficientnet_b0_tf': 'efficientnet_b0',
}


def draw(rule: Any, key: str, shape: tuple[int, ...]) -> np.ndarray:
    """`rule.weight`, but for what it would make too small or too large to matter."""
    if 'pos_embed' in key:
        return 0.5 * rule.normal(key, shape)
    if key.endswith('layer_scale'):
        return 0.3 * rule.normal(key, shape)
    return rule.weight(key, shape)


@pytest.fixture(scope='module')
def pair(rule):
    """A function from a name to its `Pair`, made once."""
    tv = torchvision_models.load()

    @cache
    def make(name: str) -> Pair:
        import torch

        build, size = NETWORKS[name]
        network = build(tv).eval()
        shapes = {key: tuple(value.shape) for key, value in network.state_dict().items()}
        weights = {key: draw(rule, key, shape) for key, shape in shapes.items()}
        network.load_state_dict({key: torch.as_tensor(x) for key, x in weights.items()})
        for module in network.modules():
            # Dropout and stochastic depth, which the zoo leaves out.
            if hasattr(module, 'p'):
                module.p = 0.0
        # The two EfficientNets have the same modules, under other names.
        variables = port.from_torch(RENAMED.get(name, name), weights, num_classes=CLASSES)
        images = last(rule.normal(f'input:{name}', (4, 3, size, size)))
        module = models.make(name, num_classes=CLASSES)
        return Pair(name, module, variables, network, weights, images)

    return make


def compiled(fn: Any) -> Any:
    return jax.jit(fn, compiler_options=UNOPTIMISED)


def torch_images(images: np.ndarray) -> Any:
    import torch

    return torch.from_numpy(images.transpose(0, 3, 1, 2).copy())


def torch_results(network: Any, images: np.ndarray, direction: np.ndarray) -> dict[str, Any]:
    """What PyTorch computes: logits, features, statistics by name, the gradient of the images."""
    import torch

    found: dict[str, Any] = {}

    def statistics(name: str, module: Any, args: Any) -> None:
        x = args[0].detach()
        found[f'{name}.running_mean'] = x.mean((0, 2, 3)).numpy()
        found[f'{name}.running_var'] = x.var((0, 2, 3), correction=0).numpy()

    def features(module: Any, args: Any) -> None:
        found['features'] = args[0].detach().numpy()

    named = list(network.named_modules())
    linear = [module for _, module in named if isinstance(module, torch.nn.Linear)][-1]
    hooks = [linear.register_forward_pre_hook(features)]
    hooks += [
        module.register_forward_pre_hook(partial(statistics, name))
        for name, module in named
        if isinstance(module, torch.nn.BatchNorm2d)
    ]
    x = torch_images(images).requires_grad_()
    logits = network(x)
    (logits * torch.from_numpy(direction)).sum().backward()
    for hook in hooks:
        hook.remove()
    return found | {'logits': logits.detach().numpy(), 'gradient': last(x.grad.numpy())}


# The small ones, and of two that share their code, one.
LARGE = {'densenet121', 'convnext_tiny', 'efficientnet_b0', 'efficientnet_b0_tf'}
FAST = set(NETWORKS) - LARGE - {
    'shufflenetv2_x1_0', 'vit_tiny', 'mobilenetv3_large', 'regnet_y_400mf', 'shufflenetv2_x0_5',
}  # fmt: skip


@pytest.mark.parametrize('name', tiny.quick(NETWORKS, *FAST))
def test_evaluation_equals_torch(pair, rule, name: str):
    """Logits, features, and the statistics of every batch norm."""
    made = pair(name)
    out = compiled(made.module.apply)(made.variables, made.images)
    direction = rule.normal(f'direction:{name}', (4, CLASSES))
    expected = torch_results(made.torch, made.images, direction)
    near(out.logits, expected.pop('logits'), 'logits')
    near(out.features, expected.pop('features'), 'features')
    del expected['gradient']
    named = torch_named(made, out.statistics)
    assert set(named) == set(expected)
    for key, value in expected.items():
        near(named[key], value, key)


@pytest.mark.parametrize('name', tiny.quick(NETWORKS, 'resnet20_gn'))
def test_the_gradient_of_images_equals_torch(pair, rule, name: str):
    """In its L2 norm, for ReLUs have kinks."""
    made = pair(name)
    direction = rule.normal(f'direction:{name}', (4, CLASSES))

    def along(images):
        return jnp.sum(made.module.apply(made.variables, images).logits * direction)

    gradient = compiled(jax.grad(along))(made.images)
    expected = torch_results(made.torch, made.images, direction)['gradient']
    assert np.linalg.norm(gradient - expected) < 2e-3 * np.linalg.norm(expected)


WITHOUT_STATISTICS = {
    'convnext_tiny', 'vit_tiny', 'vit_tiny_cifar', 'vit_mini_cifar', 'resnet8_gn', 'resnet20_gn',
}  # fmt: skip


@pytest.mark.parametrize(
    'name',
    tiny.quick(
        [name for name in NETWORKS if name not in WITHOUT_STATISTICS],
        'shufflenetv2_x0_5', 'mobilenetv3_small',
    ),
)  # fmt: skip
def test_a_batch_in_training_equals_torch(pair, name: str):
    """Logits, and where the running statistics are after it."""
    import torch

    made = pair(name)
    train = compiled(lambda v, x: made.module.apply(v, x, train=True, mutable=['batch_stats']))
    out, updated = train(made.variables, made.images)
    before = {key: value.clone() for key, value in made.torch.state_dict().items()}
    made.torch.train()
    with torch.no_grad():
        logits = made.torch(torch_images(made.images)).numpy()
    after = {key: value.numpy() for key, value in made.torch.state_dict().items()}
    after = {key: value.copy() for key, value in after.items() if 'running' in key}
    made.torch.eval().load_state_dict(before)
    near(out.logits, logits, 'logits', 1e-3)
    named = torch_named(made, updated['batch_stats'])
    assert set(named) == set(after)
    for key, value in after.items():
        near(named[key], value, key)


@pytest.mark.parametrize(
    'name', tiny.quick(sorted(WITHOUT_STATISTICS), 'resnet20_gn', 'vit_tiny_cifar')
)
def test_training_is_evaluation_without_batch_norms(name: str):
    """Traced: the same program, and nothing that training would update."""
    module = models.make(name)
    images = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)
    variables = jax.eval_shape(lambda x: module.init(jax.random.key(0), x), images)
    assert set(variables) == {'params'}
    programs = {
        str(jax.make_jaxpr(partial(module.apply, train=train))(variables, images))
        for train in (False, True)
    }
    assert len(programs) == 1


def torch_named(made: Pair, statistics: Any) -> dict[str, np.ndarray]:
    """A tree of batch statistics by PyTorch's names."""
    variables = {'params': made.variables['params'], 'batch_stats': statistics}
    named = port.to_torch(RENAMED.get(made.name, made.name), variables)
    return {key: value for key, value in named.items() if 'running' in key}


# The names of other sources, from torchvision's, written down apart from the tables.  Patterns
# match the beginning of a name.


def densenet_file(key: str) -> str:
    """torchvision's files, which it renames as it loads them."""
    return re.sub(r'(denselayer\d+\.(?:norm|conv))(\d)', r'\1.\2', key)


def regnet_timm(key: str) -> str:
    kinds = {'0': 'conv', '1': 'bn'}
    if found := re.match(r'stem\.([01])', key):
        return f'stem.{kinds[found[1]]}{key[found.end() :]}'
    if found := re.match(r'trunk_output\.block(\d)\.block\d-(\d+)\.', key):
        rest = key[found.end() :].removeprefix('f.')
        part, _, last_name = rest.partition('.')
        block = f's{found[1]}.b{int(found[2]) + 1}'
        if part == 'se':
            return f'{block}.{rest}'
        names = {'proj': 'downsample', 'a': 'conv1', 'b': 'conv2', 'c': 'conv3'}
        kind, _, leaf = last_name.partition('.')
        return f'{block}.{names[part]}.{kinds[kind]}.{leaf}'
    return f'head.{key}'


EFFICIENTNET_BLOCKS = {
    # Of the first stage, which does not expand, and of the others: torchvision, timm, TensorFlow.
    True: (('0.0', 'conv_dw', '_depthwise_conv'), ('0.1', 'bn1', '_bn1'),
           ('1.fc1', 'se.conv_reduce', '_se_reduce'), ('1.fc2', 'se.conv_expand', '_se_expand'),
           ('2.0', 'conv_pw', '_project_conv'), ('2.1', 'bn2', '_bn2')),
    False: (('0.0', 'conv_pw', '_expand_conv'), ('0.1', 'bn1', '_bn0'),
            ('1.0', 'conv_dw', '_depthwise_conv'), ('1.1', 'bn2', '_bn1'),
            ('2.fc1', 'se.conv_reduce', '_se_reduce'), ('2.fc2', 'se.conv_expand', '_se_expand'),
            ('3.0', 'conv_pwl', '_project_conv'), ('3.1', 'bn3', '_bn2')),
}  # fmt: skip
EFFICIENTNET_ENDS = (
    ('features.0.0', 'conv_stem', '_conv_stem'),
    ('features.0.1', 'bn1', '_bn0'),
    ('features.8.0', 'conv_head', '_conv_head'),
    ('features.8.1', 'bn2', '_bn1'),
    ('classifier.1', 'classifier', '_fc'),
)


def efficientnet(key: str, source: int) -> str:
    """source: 1 for timm, 2 for efficientnet_pytorch."""
    module, _, leaf = key.rpartition('.')
    if found := re.match(r'features\.(\d)\.(\d)\.block\.(.*)', module):
        stage, block, part = int(found[1]) - 1, int(found[2]), found[3]
        before = sum((1, 2, 2, 3, 3, 4, 1)[:stage])
        names = next(names for names in EFFICIENTNET_BLOCKS[stage == 0] if names[0] == part)
        where = f'blocks.{stage}.{block}' if source == 1 else f'_blocks.{before + block}'
        return f'{where}.{names[source]}.{leaf}'
    names = next(names for names in EFFICIENTNET_ENDS if names[0] == module)
    return f'{names[source]}.{leaf}'


def convnext(key: str, timm: bool) -> str:
    """timm's names, or those of the authors."""
    if found := re.match(r'classifier\.([02])', key):
        name = {'0': 'norm', '2': 'fc' if timm else 'head'}[found[1]]
        return f'{"head." if timm else ""}{name}{key[found.end() :]}'
    stage, part, rest = re.match(r'features\.(\d)\.(\d+)\.(.*)', key).groups()  # type: ignore
    if stage == '0':
        return f'{"stem" if timm else "downsample_layers.0"}.{part}.{rest}'
    if int(stage) % 2 == 0:
        number = int(stage) // 2
        where = f'stages.{number}.downsample' if timm else f'downsample_layers.{number}'
        return f'{where}.{part}.{rest}'
    names = {'block.0': 'dwconv', 'block.2': 'norm', 'block.3': 'pwconv1', 'block.5': 'pwconv2'}
    if timm:
        names |= {'block.0': 'conv_dw', 'block.3': 'mlp.fc1', 'block.5': 'mlp.fc2'}
    where = f'stages.{int(stage) // 2}{".blocks" if timm else ""}.{part}'
    if rest == 'layer_scale':
        return f'{where}.gamma'
    return f'{where}.{names[rest[:7]]}{rest[7:]}'


def vit_timm(key: str) -> str:
    for pattern, name in (
        (r'class_token', 'cls_token'),
        (r'encoder\.pos_embedding', 'pos_embed'),
        (r'conv_proj', 'patch_embed.proj'),
        (r'encoder\.layers\.encoder_layer_(\d+)\.ln_', r'blocks.\1.norm'),
        (r'encoder\.layers\.encoder_layer_(\d+)\.self_attention\.in_proj_', r'blocks.\1.attn.qkv.'),
        (r'encoder\.layers\.encoder_layer_(\d+)\.self_attention\.out_', r'blocks.\1.attn.'),
        (r'encoder\.layers\.encoder_layer_(\d+)\.mlp\.0', r'blocks.\1.mlp.fc1'),
        (r'encoder\.layers\.encoder_layer_(\d+)\.mlp\.3', r'blocks.\1.mlp.fc2'),
        (r'encoder\.ln', 'norm'),
        (r'heads\.head', 'head'),
    ):
        if re.match(pattern, key):
            return re.sub(pattern, name, key, count=1)
    raise KeyError(key)


@pytest.mark.parametrize(
    ('name', 'rename', 'example'),
    [
        ('densenet121', densenet_file, 'features.denseblock4.denselayer16.norm.2.running_var'),
        ('regnet_y_400mf', regnet_timm, 's4.b6.conv2.bn.running_mean'),
        ('efficientnet_b0', partial(efficientnet, source=1), 'blocks.6.0.se.conv_expand.bias'),
        ('efficientnet_b0_tf', partial(efficientnet, source=2), '_blocks.15._bn2.running_var'),
        ('efficientnet_b0_tf', partial(efficientnet, source=1), 'blocks.0.0.bn2.running_var'),
        ('convnext_tiny', partial(convnext, timm=False), 'stages.3.2.gamma'),
        ('convnext_tiny', partial(convnext, timm=True), 'stages.3.downsample.1.weight'),
        ('vit_tiny_cifar', vit_timm, 'blocks.5.attn.qkv.bias'),
    ],
)
def test_names_of_other_sources(pair, name: str, rename: Any, example: str):
    """All of them, and nothing else; the same variables as by torchvision's names."""
    made = pair(name)
    shapes = {'layer_scale': lambda x: x[:, 0, 0]}  # torchvision's alone has axes of length 1
    renamed = {
        rename(key): shapes.get(key.rpartition('.')[2], lambda x: x)(value)
        for key, value in made.weights.items()
    }
    assert example in renamed and len(renamed) == len(made.weights)
    found = port.read(name, renamed, num_classes=CLASSES)
    identical(found.variables, made.variables)
    # timm's names of the two EfficientNets are the same, and nothing tells which it is.
    told = ' '.join(found.notes)
    assert ("'efficientnet_b0' and of 'efficientnet_b0_tf'" in told) == (
        name == 'efficientnet_b0' and example.startswith('blocks.')
    )
    assert bool(told) == ('efficientnet' in name and example.startswith('blocks.'))


@pytest.mark.parametrize('name', sorted(set(NETWORKS) - {'efficientnet_b0_tf'}))
def test_to_torch_gives_the_names_of_torch_back(pair, name: str):
    """As timm has them where it publishes the network, else as torchvision: bit for bit."""
    made = pair(name)
    expected = made.weights
    if name.startswith('vit_'):
        expected = {vit_timm(key): value for key, value in expected.items()}
    identical(port.to_torch(name, made.variables), expected)


# What vision transformers do with images of other sizes.


def test_positions_are_interpolated_as_in_timm(pair):
    """Bicubically and antialiased, as PyTorch does it; the class token's stays."""
    import torch

    made = pair('vit_tiny_cifar')
    images = made.images[:, :24, :20]
    table = made.weights['encoder.pos_embedding']
    grid = torch.from_numpy(table[:, 1:].reshape(1, 8, 8, -1).transpose(0, 3, 1, 2).copy())
    how = {'mode': 'bicubic', 'antialias': True, 'align_corners': False}
    small = torch.nn.functional.interpolate(grid, (6, 5), **how).flatten(2).mT.numpy()
    module = models.make('vit_tiny_cifar', num_classes=CLASSES)
    found = vit.positions(made.variables['params']['pos_embed'], 6, 5)
    near(found, np.concatenate([table[:, :1], small], axis=1), 'positions', 1e-5)
    out = jax.eval_shape(module.apply, made.variables, images)
    assert out.logits.shape == (4, CLASSES)
    assert out.stages[0].shape == (4, 6, 5, 192)


def test_positions_of_another_image_size_are_refused_or_asked_for():
    """A file for 384 px, whose positions are 24 x 24 and not 14 x 14."""
    module = models.make('vit_tiny')
    images = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    shapes = jax.eval_shape(lambda x: module.init(jax.random.key(0), x), images)
    fill = np.float32(0.5)
    ours = jax.tree.map(lambda x: np.broadcast_to(fill, x.shape), shapes)
    file = port.to_torch('vit_tiny', ours)
    file['pos_embed'] = np.full((1, 577, 192), fill)
    with pytest.raises(PortError, match=r'pos_embed \(1, 577, 192\), expected \(1, 197, 192\)'):
        port.from_torch('vit_tiny', file)
    found = port.from_torch('vit_tiny', file, image_size=384)
    assert found['params']['pos_embed'].shape == (1, 577, 192)


# What every network promises beside these values.


@pytest.mark.parametrize(
    'name',
    tiny.quick(sorted({*NETWORKS, 'vit_small', 'vit_base'}),
               'mobilenetv3_small', 'shufflenetv2_x0_5', 'vit_tiny_cifar', 'resnet20_gn'),
)  # fmt: skip
def test_bfloat16(name: str):
    """Traced with strict promotion: layers in bfloat16, outputs and statistics in float32."""
    module = models.make(name, num_classes=CLASSES, dtype=jnp.bfloat16)
    images = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)
    variables = jax.eval_shape(lambda x: module.init(jax.random.key(0), x), images)
    out, _ = jax.eval_shape(
        lambda v, x: module.apply(v, x, train=True, mutable=['batch_stats']), variables, images
    )
    rest = out._replace(stages=(), last=None)
    kinds = {leaf.dtype for leaf in jax.tree.leaves((variables, rest))}
    assert kinds == {jnp.dtype('float32')}
    maps = [*out.stages, *([] if out.last is None else [out.last])]
    assert {each.dtype for each in maps} == {jnp.dtype('bfloat16')}


@pytest.mark.parametrize('name', ['resnet20_gn', 'vit_tiny_cifar'])
def test_bfloat16_computes_about_the_same(pair, name: str):
    made = pair(name)
    module = made.module.clone(dtype=jnp.bfloat16)
    logits = compiled(module.apply)(made.variables, made.images).logits
    expected = torch_results(made.torch, made.images, np.ones((4, CLASSES), np.float32))['logits']
    near(logits, expected, 'logits', 0.05)


@pytest.mark.parametrize(
    ('name', 'size', 'message'),
    [
        ('densenet121', 28, '29 px and more, not 28x28'),
        ('convnext_tiny', 31, '32 px and more, not 31x31'),
        ('vit_tiny', 40, '40x40 px do not divide into patches of 16'),
    ],
)
def test_image_size_that_does_not_fit(name: str, size: int, message: str):
    module = models.make(name)
    images = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda x: module.init(jax.random.key(0), x), images)
