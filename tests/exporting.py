"""Small PyTorch networks of every kind, and the files that PyTorch exports of them."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

CLASSES = 5


# 1. Networks


def norm(network: nn.Module, seed: int = 0) -> nn.Module:
    """The network in evaluation, its batch norms' moments drawn, its weights all of some size."""
    generator = torch.Generator().manual_seed(seed)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.2, generator=generator)
            module.running_var.uniform_(0.5, 1.5, generator=generator)
    for parameter in network.parameters():
        if parameter.ndim == 1:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return network.eval()


def conv(inputs: int, outputs: int, size: Any = 3, stride: int = 1, **rest: Any) -> nn.Sequential:
    """A convolution, a batch norm and a ReLU."""
    act = rest.pop('act', nn.ReLU)
    if 'padding' not in rest:
        rest['padding'] = size // 2 * rest.get('dilation', 1)
    layer = nn.Conv2d(inputs, outputs, size, stride, bias=False, **rest)
    return nn.Sequential(layer, nn.BatchNorm2d(outputs), act())


class Squeeze(nn.Module):
    """Squeeze and excitation."""

    def __init__(self, width: int, act: Any = nn.ReLU, gate: Any = nn.Sigmoid):
        super().__init__()
        self.down, self.up = nn.Conv2d(width, 4, 1), nn.Conv2d(4, width, 1)
        self.act, self.gate = act(), gate()

    def forward(self, x: Any) -> Any:
        scale = F.adaptive_avg_pool2d(x, 1)
        return x * self.gate(self.up(self.act(self.down(scale))))


class Residual(nn.Module):
    def __init__(self, *body: nn.Module):
        super().__init__()
        self.body = nn.Sequential(*body)

    def forward(self, x: Any) -> Any:
        return x + self.body(x)


class Classifier(nn.Module):
    """A body, the mean over pixels, a linear layer."""

    def __init__(self, width: int, *body: nn.Module):
        super().__init__()
        self.body, self.head = nn.Sequential(*body), nn.Linear(width, CLASSES)

    def forward(self, x: Any) -> Any:
        return self.head(torch.flatten(F.adaptive_avg_pool2d(self.body(x), 1), 1))


def regnet() -> nn.Module:
    """Grouped convolutions and squeeze-and-excitation."""
    block = Residual(conv(16, 16, 1), conv(16, 16, 3, groups=4), Squeeze(16), conv(16, 16, 1))
    return Classifier(16, conv(3, 16, 3, 2), block, conv(16, 16, 3, 2, groups=2))


def dilated() -> nn.Module:
    """Dilated convolutions, one of them for each channel, and an even pool with a pad."""
    return Classifier(
        8, conv(3, 8, 3, dilation=2), nn.MaxPool2d(3, 2, 1), conv(8, 8, 3, dilation=2, groups=8),
        nn.Conv2d(8, 8, 2, padding='same', dilation=3), nn.ReLU(),
    )  # fmt: skip


def mobilenet() -> nn.Module:
    """One kernel for each channel, and the activations of mobile networks."""
    act = nn.Hardswish
    block = Residual(
        conv(8, 16, 1, act=act), conv(16, 16, 3, groups=16, act=nn.ReLU6),
        Squeeze(16, gate=nn.Hardsigmoid), conv(16, 8, 1, act=nn.Identity),
    )  # fmt: skip
    return Classifier(16, conv(3, 8, 3, 2, act=act), block, conv(8, 16, 3, 2, groups=8, act=act))


class DenseLayer(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(width), nn.Conv2d(width, 8, 1, bias=False)
        self.norm2, self.conv2 = nn.BatchNorm2d(8), nn.Conv2d(8, 4, 3, padding=1, bias=False)

    def forward(self, x: Any) -> Any:
        y = self.conv1(F.relu(self.norm1(x)))
        return torch.cat([x, self.conv2(F.relu(self.norm2(y)))], 1)


def densenet() -> nn.Module:
    """Concatenation, and batch norms before convolutions, which no exporter can fold."""
    return Classifier(
        12, conv(3, 8), nn.MaxPool2d(3, 2, 1), DenseLayer(8), DenseLayer(12),
        nn.Conv2d(16, 8, 1), nn.AvgPool2d(2), DenseLayer(8), nn.BatchNorm2d(12), nn.ReLU(),
    )  # fmt: skip


class Shuffle(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        half = width // 2
        self.branch = nn.Sequential(
            conv(half, half, 1), conv(half, half, 3, groups=half, act=nn.Identity)
        )

    def forward(self, x: Any) -> Any:
        first, second = x.chunk(2, 1)
        x = torch.cat([first, self.branch(second)], 1)
        b, c, h, w = x.shape
        return x.view(b, 2, c // 2, h, w).transpose(1, 2).contiguous().view(b, c, h, w)


def shufflenet() -> nn.Module:
    return Classifier(16, conv(3, 16, 3, 2), Shuffle(16), Shuffle(16))


class Inception(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.one, self.three = conv(width, 4, 1), conv(width, 4, 3)
        self.flat = conv(width, 4, (1, 3), padding=(0, 1))
        self.pool = nn.Sequential(nn.MaxPool2d(3, 1, 1, ceil_mode=True), conv(width, 4, 1))

    def forward(self, x: Any) -> Any:
        return torch.cat([self.one(x), self.three(x), self.flat(x), self.pool(x)], 1)


def inception() -> nn.Module:
    """Branches, and pools whose last windows lie half outside the map."""
    return Classifier(
        16, conv(3, 8, 3, padding=0), nn.MaxPool2d(3, 2, ceil_mode=True), Inception(8),
        nn.AvgPool2d(3, 2, 1, ceil_mode=True), nn.AvgPool2d(2, 2, 1, count_include_pad=False),
    )  # fmt: skip


class Attention(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads, self.qkv = heads, nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Any) -> Any:
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v)
        return self.out(y.transpose(1, 2).reshape(b, n, c))


class Scale(nn.Module):
    """Layer scale."""

    def __init__(self, *shape: int):
        super().__init__()
        self.gamma = nn.Parameter(torch.full(shape, 0.3))

    def forward(self, x: Any) -> Any:
        return x * self.gamma


class ViT(nn.Module):
    """A class token, positions, attention of both kinds; with `distilled`, two heads."""

    def __init__(self, distilled: bool = False):
        super().__init__()
        width, extra = 16, 1 + distilled
        self.patch = nn.Conv2d(3, width, 4, 4)
        self.token = nn.Parameter(torch.randn(1, extra, width))
        self.places = nn.Parameter(0.1 * torch.randn(1, 9 + extra, width))
        self.first = Residual(nn.LayerNorm(width), Attention(width, 4), Scale(width))
        self.norm = nn.LayerNorm(width)
        self.second = nn.MultiheadAttention(width, 2, 0.1, batch_first=True)
        mlp = nn.Linear(width, 32), nn.GELU(), nn.Dropout(0.1), nn.Linear(32, width)
        self.mlp = Residual(nn.LayerNorm(width), *mlp)
        self.last, self.head = nn.LayerNorm(width), nn.Linear(width, CLASSES)
        self.other = nn.Linear(width, CLASSES) if distilled else None

    def forward(self, x: Any) -> Any:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.places
        x = self.first(x)
        y = self.norm(x)
        x = self.last(self.mlp(x + self.second(y, y, y, need_weights=False)[0]))
        if self.other is not None:
            return (self.head(x[:, 0]) + self.other(x[:, 1])) / 2
        return self.head(x[:, 0])


class ChannelsLast(nn.Module):
    def __init__(self, *body: nn.Module):
        super().__init__()
        self.body = nn.Sequential(*body)

    def forward(self, x: Any) -> Any:
        return self.body(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def convnext() -> nn.Module:
    """Seven by seven for each channel, layer norms over channels, GELU, layer scale."""
    mix = ChannelsLast(nn.LayerNorm(12, 1e-6), nn.Linear(12, 24), nn.GELU(), nn.Linear(24, 12))
    block = Residual(nn.Conv2d(12, 12, 7, padding=3, groups=12), mix, Scale(12, 1, 1))
    down = ChannelsLast(nn.LayerNorm(12, 1e-6)), nn.Conv2d(12, 16, 2, 2)
    return Classifier(16, nn.Conv2d(3, 12, 2, 2), block, *down)


class Window(nn.Module):
    """Swin's attention in shifted windows, with a bias for relative positions and a mask."""

    def __init__(self, width: int, size: int, shift: int):
        super().__init__()
        self.size, self.shift, self.heads = size, shift, 2
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.table = nn.Parameter(torch.randn((2 * size - 1) ** 2, self.heads))
        place = torch.stack(torch.meshgrid(torch.arange(size), torch.arange(size), indexing='ij'))
        between = place.flatten(1)[:, :, None] - place.flatten(1)[:, None] + size - 1
        self.register_buffer('index', (between[0] * (2 * size - 1) + between[1]).flatten())

    def forward(self, x: Any) -> Any:
        b, h, w, c = x.shape
        n, s = self.size * self.size, self.size
        x = torch.roll(x, (-self.shift, -self.shift), (1, 2))
        x = x.view(b, h // s, s, w // s, s, c).permute(0, 1, 3, 2, 4, 5).reshape(-1, n, c)
        q, k, v = self.qkv(x).view(-1, n, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
        scores = scores + self.table[self.index].view(n, n, -1).permute(2, 0, 1)[None]
        # In-place writes on views, as torchvision's Swin makes its mask.
        part = x.new_zeros((h, w))
        spans = ((0, -s), (-s, -self.shift), (-self.shift, None))
        for i, (top, bottom) in enumerate(spans):
            for j, (left, right) in enumerate(spans):
                part[top:bottom, left:right] = 3 * i + j
        part = part.view(h // s, s, w // s, s).permute(0, 2, 1, 3).reshape(-1, n)
        apart = part[:, None] - part[:, :, None]
        mask = apart.masked_fill(apart != 0, -100.0).masked_fill(apart == 0, 0.0)
        windows = mask.shape[0]
        scores = scores.view(b, windows, self.heads, n, n) + mask[None, :, None]
        x = F.softmax(scores.view(-1, self.heads, n, n), -1) @ v
        x = self.out(x.transpose(1, 2).reshape(-1, n, c))
        x = x.view(b, h // s, w // s, s, s, c).permute(0, 1, 3, 2, 4, 5).reshape(b, h, w, c)
        return torch.roll(x, (self.shift, self.shift), (1, 2))


class Swin(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patch, self.block = nn.Conv2d(3, 8, 2, 2), Residual(nn.LayerNorm(8), Window(8, 3, 1))
        self.merge, self.norm = nn.Linear(32, 16, bias=False), nn.LayerNorm(16)
        self.head = nn.Linear(16, CLASSES)

    def forward(self, x: Any) -> Any:
        x = self.block(self.patch(x).permute(0, 2, 3, 1))
        x = torch.cat([x[:, i::2, j::2] for j in (0, 1) for i in (0, 1)], -1)
        return self.head(self.norm(self.merge(x)).mean((1, 2)))


def efficientnet() -> nn.Module:
    act = nn.SiLU
    block = Residual(
        conv(8, 16, 1, act=act), conv(16, 16, 3, groups=16, act=act), Squeeze(16, act),
        conv(16, 8, 1, act=nn.Identity), nn.Dropout(0.2),
    )  # fmt: skip
    return Classifier(8, conv(3, 8, 3, 2, act=act), block)


class Standardised(nn.Conv2d):
    """Its weights have mean 0 and variance 1, by `batch_norm` as timm's NFNets compute it."""

    def forward(self, x: Any) -> Any:
        weight = F.batch_norm(self.weight.reshape(1, self.out_channels, -1), None, None,
                              training=True, momentum=0.0, eps=1e-6)  # fmt: skip
        return F.conv2d(x, weight.reshape_as(self.weight), self.bias, self.stride, self.padding)


def big_transfer() -> nn.Module:
    """Group norms and standardised weights: no batch norm of images."""
    return Classifier(8, Standardised(3, 8, 3), nn.GroupNorm(4, 8), nn.ReLU(),
                      Residual(Standardised(8, 8, 3, padding=1), nn.InstanceNorm2d(8, affine=True)),
                      nn.GELU('tanh'))  # fmt: skip


class SqueezeNet(nn.Module):
    """A convolution for a head."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(conv(3, 8, 3, 2), nn.MaxPool2d(3, 2, ceil_mode=True))
        self.head = nn.Sequential(nn.Conv2d(8, CLASSES, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1))

    def forward(self, x: Any) -> Any:
        return torch.flatten(self.head(self.body(x)), 1)


class Mixed(nn.Module):
    """What remains: rarer activations, resizing, uneven pools, one-dimensional convolutions.

    The slope 0.25 is the same number in float32, which an ONNX file has for its attributes.
    """

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.slope, self.eca = conv(3, 12), nn.PReLU(12), nn.Conv1d(1, 1, 3, padding=1)
        self.head = nn.Linear(12, CLASSES)

    def forward(self, x: Any) -> Any:
        x = self.slope(self.stem(x) - 0.5)
        x = x * torch.sigmoid(self.eca(x.mean((2, 3))[:, None])).transpose(1, 2)[..., None]
        x = F.adaptive_avg_pool2d(x, (5, 7))
        x = F.interpolate(x, (9, 10), mode='bilinear')
        x = x + F.interpolate(F.leaky_relu(x, 0.25)[:, :, ::3, ::2], (9, 10), mode='nearest')
        x = F.pixel_unshuffle(F.pad(F.mish(x), (1, 1, 2, 1)), 2).clamp(-1, 2)
        x = F.elu(x[:, 12:36]) * F.softplus(x[:, 6:30]) + torch.tanh(x[:, ::2])
        x = F.interpolate(F.pixel_shuffle(x[:, :16], 2), scale_factor=1.5, mode='bicubic')
        parts = x.split([1, 1, 2], 1)
        x = torch.stack([parts[0].amax(1), parts[1].sum(1), (parts[2] ** 2).mean(1)], 1)
        x = F.normalize(x.flatten(2), dim=-1).max(-1).values
        return self.head(torch.cat([x, x.sqrt().repeat(1, 3)], -1))


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    'regnet': regnet, 'dilated': dilated, 'mobilenet': mobilenet, 'densenet': densenet,
    'shufflenet': shufflenet, 'inception': inception, 'vit': ViT, 'convnext': convnext,
    'swin': Swin, 'efficientnet': efficientnet, 'big_transfer': big_transfer,
    'squeezenet': SqueezeNet, 'distilled': lambda: ViT(distilled=True), 'mixed': Mixed,
}  # fmt: skip
SIZE = 12  # pixels of their images


def network(name: str) -> nn.Module:
    torch.manual_seed(0)
    return norm(NETWORKS[name]())


# 2. Files


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without what the exporters print, warn and log."""
    logging.disable(logging.CRITICAL)  # pytest would collect every line, which takes longer
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter('ignore')
            yield
    finally:
        logging.disable(logging.NOTSET)


def program(module: nn.Module, size: int = SIZE, channels: int = 3) -> Any:
    """The network as PyTorch exports it, before `run_decompositions`, for any batch size."""
    images = torch.zeros(2, channels, size, size)
    with quiet():
        batch = torch.export.Dim('batch', max=4096)
        return torch.export.export(module, (images,), dynamic_shapes=({0: batch},))


def save(exported: Any, path: Path, optimize: bool = False) -> Path:
    """A `.pt2` or `.onnx` file of a program, as the documentation has it."""
    with quiet():
        if path.suffix == '.pt2':
            torch.export.save(exported.run_decompositions({}), path)
        else:
            torch.onnx.export(
                exported, (), path, dynamo=True, optimize=optimize, external_data=False,
                verbose=False,
            )  # fmt: skip
    return path
