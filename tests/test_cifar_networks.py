"""CIFAR's variants of well-known networks equal PyTorch's: torchvision's, as people change them."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest
import torchvision_models

from dfkd_jax import models, port

torch = pytest.importorskip('torch', reason='PyTorch computes the reference')
nn = torch.nn
F = torch.nn.functional


def small_stem(net: Any, pool: bool) -> Any:
    """torchvision's network behind a 3x3 stem, as most people train it on CIFAR."""
    net.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
    if not pool:
        net.maxpool = nn.Identity()
    return net


def strides_of_cifar(net: Any) -> Any:
    """MobileNetV2 without the strides of the stem and of the stage of 24 channels."""
    net.features[0][0].stride = (1, 1)
    net.features[2].conv[1][0].stride = (1, 1)
    return net


class OptionA(nn.Module):
    """A residual block whose shortcut takes every second pixel and adds channels of zeros."""

    def __init__(self, before: int, width: int):
        super().__init__()
        self.step = 1 if before == width else 2
        self.conv1 = nn.Conv2d(before, width, 3, self.step, 1, bias=False)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(width), nn.BatchNorm2d(width)
        self.more = (width - before) // 2

    def forward(self, x: Any) -> Any:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        x = F.pad(x[..., :: self.step, :: self.step], (0, 0, 0, 0, self.more, self.more))
        return F.relu(x + y)


class PreAct(nn.Module):
    def __init__(self, before: int, width: int, step: int):
        super().__init__()
        self.bn1, self.bn2 = nn.BatchNorm2d(before), nn.BatchNorm2d(width)
        self.conv1 = nn.Conv2d(before, width, 3, step, 1, bias=False)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.shortcut = None
        if step > 1 or before != width:
            self.shortcut = nn.Sequential(nn.Conv2d(before, width, 1, step, bias=False))

    def forward(self, x: Any) -> Any:
        y = F.relu(self.bn1(x))
        x = self.shortcut(y) if self.shortcut else x
        return x + self.conv2(F.relu(self.bn2(self.conv1(y))))


class Staged(nn.Module):
    """A stem, stages of blocks, perhaps a last norm, the mean and a linear layer."""

    def __init__(self, stem: list, stages: list, width: int, last: bool):
        super().__init__()
        self.conv1 = stem[0]
        self.bn1 = stem[1] if len(stem) > 1 else None
        for i, blocks in enumerate(stages, 1):
            setattr(self, f'layer{i}', nn.Sequential(*blocks))
        self.stages = len(stages)
        self.bn = nn.BatchNorm2d(width) if last else None
        self.linear = nn.Linear(width, 10)

    def forward(self, x: Any) -> Any:
        x = self.conv1(x)
        x = F.relu(self.bn1(x)) if self.bn1 else x
        for i in range(self.stages):
            x = getattr(self, f'layer{i + 1}')(x)
        x = F.relu(self.bn(x)) if self.bn else x
        return self.linear(x.mean((2, 3)))


def option_a() -> Any:
    stem = [nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)]
    stages = [[OptionA(a, b)] for a, b in ((16, 16), (16, 32), (32, 64))]
    return Staged(stem, stages, 64, False)


def preact(last: bool) -> Any:
    stages, before = [], 64
    for width in (64, 128, 256, 512):
        step = 1 if width == 64 else 2
        stages.append([PreAct(before, width, step), PreAct(width, width, 1)])
        before = width
    return Staged([nn.Conv2d(3, 64, 3, 1, 1, bias=False)], stages, 512, last)


def vgg(depth: int, norm: str, head: Any) -> Any:
    net = getattr(torchvision_models.load(), f'vgg{depth}{norm}')(num_classes=10)
    if head is not None:
        net.avgpool, net.classifier = nn.AdaptiveAvgPool2d(1), head
    return net


def three(width: int) -> Any:
    return nn.Sequential(nn.Linear(512, width), nn.ReLU(), nn.Dropout(), nn.Linear(width, width),
                         nn.ReLU(), nn.Dropout(), nn.Linear(width, 10))  # fmt: skip


def resnet(depth: int) -> Any:
    return getattr(torchvision_models.load(), f'resnet{depth}')(num_classes=10)


NETWORKS = {
    'resnet8_option_a': option_a,
    'preact_resnet18': lambda: preact(False),
    'preact_resnet18_bn': lambda: preact(True),
    'vgg16_cifar_512': lambda: vgg(16, '', three(512)),
}
SLOW = {
    'mobilenetv2_cifar': lambda: strides_of_cifar(
        torchvision_models.load().mobilenet_v2(num_classes=10)
    ),
    'resnet18': lambda: small_stem(resnet(18), pool=False),
    'resnet18_pool': lambda: small_stem(resnet(18), pool=True),
    'vgg11_bn_cifar': lambda: vgg(11, '_bn', nn.Linear(512, 10)),
    'vgg11_imagenet': lambda: vgg(11, '', None),
    'resnet50': lambda: small_stem(resnet(50), pool=False),
    'resnet101_imagenet': lambda: resnet(101),
    'resnet152_imagenet': lambda: resnet(152),
    'vgg19_bn_cifar_4096': lambda: vgg(19, '_bn', three(4096)),
}


def fill(net: Any) -> Any:
    """Random weights of the usual size, and running statistics away from 0 and 1."""
    draws = torch.Generator().manual_seed(0)
    for name, x in net.state_dict().items():
        if not x.is_floating_point():
            continue
        r = torch.randn(x.shape, generator=draws)
        if x.ndim > 1:
            x.copy_(r * (2 / x[0].numel()) ** 0.5)
        else:
            x.copy_(1 + 0.2 * torch.tanh(r) if name.endswith(('var', 'weight')) else 0.1 * r)
    return net.eval()


@pytest.mark.parametrize(
    'name', [*NETWORKS, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)]
)
def test_equals_pytorch(name: str):
    """Logits and features, ported by name, in evaluation; the statistics that batch norms see."""
    net = fill((NETWORKS | SLOW)[name]())
    variables = port.read(name, net.state_dict()).variables
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    seen: dict[str, np.ndarray] = {}
    for place, layer in net.named_modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.register_forward_pre_hook(
                lambda _, x, place=place: seen.update({place: x[0].mean((0, 2, 3)).numpy()})
            )
        last = layer
    last.register_forward_pre_hook(lambda _, x: seen.update(features=x[0].numpy()))
    with torch.no_grad():
        logits = net(images).numpy()
    module = models.make(name)
    out = jax.jit(module.apply)(variables, images.permute(0, 2, 3, 1).numpy())
    for found, expected in ((out.logits, logits), (out.features, seen.pop('features'))):
        scale = np.abs(expected).max()
        np.testing.assert_allclose(found / scale, expected / scale, atol=1e-4)
    norms = [x for path, x in jax.tree_util.tree_leaves_with_path(out.statistics)
             if path[-1].key == 'mean']  # fmt: skip
    assert len(norms) == len(seen)
    for expected in seen.values():
        assert min(np.abs(x - expected).max() for x in norms if x.shape == expected.shape) < 1e-3
