"""The model zoo: names to linen modules."""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Callable
from functools import partial
from typing import Any

from flax import linen as nn

from dfkd_jax.models import efficientnet, mobilenetv3
from dfkd_jax.models.convnext import ConvNeXt
from dfkd_jax.models.densenet import DenseNet
from dfkd_jax.models.efficientnet import EfficientNet
from dfkd_jax.models.generators import (
    CPSCDeepGenerator,
    CPSCGenerator,
    DCGANDeepGenerator,
    DCGANGenerator,
    NAYERDeepGenerator,
    NAYERGenerator,
)
from dfkd_jax.models.layers import Output as Output
from dfkd_jax.models.lenet import LeNet5
from dfkd_jax.models.mobilenet import CIFAR_STRIDES, MobileNetV2
from dfkd_jax.models.mobilenetv3 import MobileNetV3
from dfkd_jax.models.regnet import RegNetY
from dfkd_jax.models.resnet import imagenet, preact, thin, wide
from dfkd_jax.models.resnet_gn import GroupNormResNet
from dfkd_jax.models.shufflenet import ShuffleNetV2
from dfkd_jax.models.vgg import VGG, sequential
from dfkd_jax.models.vit import ViT
from dfkd_jax.models.wrn import wrn

X4, HALF = (32, 64, 128, 256), (8, 8, 16, 32)  # RepDistiller's widths; ours

MODELS: dict[str, Any] = {
    'lenet5': LeNet5,
    'lenet5_half': partial(LeNet5, (3, 8, 60, 42)),
    **{f'resnet{depth}': thin(depth) for depth in (8, 20, 32, 56, 110)},
    'resnet8x4': thin(8, X4),
    'resnet32x4': thin(32, X4),
    'resnet8_half': thin(8, HALF),
    'resnet8_s2d': thin(8, stem='s2d'),
    'resnet8_s2d_half': thin(8, HALF, 's2d'),
    **{f'resnet{depth}': wide(depth) for depth in (18, 34, 50)},
    **{f'resnet{depth}_imagenet': imagenet(depth) for depth in (18, 34, 50)},
    **{f'wrn{depth}_{widen}': wrn(depth, widen) for depth in (16, 40) for widen in (1, 2)},
    'vgg8': partial(VGG, (1, 1, 1, 1, 1)),
    'vgg11': partial(VGG, (1, 1, 2, 2, 2)),
    'vgg13': partial(VGG, (2, 2, 2, 2, 2)),
    'mobilenetv2': MobileNetV2,
    'mobilenetv2_cifar': partial(MobileNetV2, CIFAR_STRIDES),
    'mobilenetv3_large': partial(MobileNetV3, mobilenetv3.LARGE, 1280),
    'mobilenetv3_small': partial(MobileNetV3, mobilenetv3.SMALL, 1024),
    'efficientnet_lite0': partial(EfficientNet, efficientnet.LITE),
    'efficientnet_b0': partial(EfficientNet, efficientnet.TORCH),
    'efficientnet_b0_tf': partial(EfficientNet, efficientnet.TENSORFLOW),
    'densenet121': partial(DenseNet, (6, 12, 24, 16)),
    'regnet_y_400mf': partial(RegNetY, (1, 3, 6, 6), (48, 104, 208, 440), 8),
    'shufflenetv2_x0_5': partial(ShuffleNetV2, (48, 96, 192)),
    'shufflenetv2_x1_0': partial(ShuffleNetV2, (116, 232, 464)),
    'convnext_tiny': partial(ConvNeXt, (3, 3, 9, 3), (96, 192, 384, 768)),
    'vit_tiny': partial(ViT, 192, 12, 3),
    'vit_small': partial(ViT, 384, 12, 6),
    'vit_base': partial(ViT, 768, 12, 12),
    'vit_tiny_cifar': partial(ViT, 192, 6, 3, 4, 32),
    'vit_mini_cifar': partial(ViT, 64, 4, 4, 4, 32),
    'resnet8_gn': partial(GroupNormResNet, 1),
    'resnet20_gn': partial(GroupNormResNet, 3),
    'cpsc_generator': CPSCGenerator,
    'cpsc_deep_generator': CPSCDeepGenerator,
    'dcgan_generator': DCGANGenerator,
    'dcgan_deep_generator': DCGANDeepGenerator,
    'nayer_generator': NAYERGenerator,
    'nayer_deep_generator': NAYERDeepGenerator,
}


# Names by rule, of which `MODELS` lists the usual ones: a pattern, and what its parts make.
FAMILIES: dict[str, tuple[str, Callable[..., Any]]] = {
    'wide': (r'resnet(18|34|50|101|152)', wide),
    'wide_pool': (r'resnet(18|34|50|101|152)_pool', partial(wide, stem='3x3-pool')),
    'imagenet': (r'resnet(18|34|50|101|152)_imagenet', imagenet),
    'preact': (r'preact_resnet(18|34|50|101|152)(_bn)?', preact),
    'thin': (r'resnet(\d+)', thin),
    'thin_x4': (r'resnet(\d+)x4', partial(thin, widths=X4)),
    'option_a': (r'resnet(\d+)_option_a', partial(thin, option_a=True)),
    'wrn': (r'wrn(\d+)_(\d+)', wrn),
    'vgg': (r'vgg(11|13|16|19)(_bn)?_(cifar|cifar_512|cifar_4096|imagenet)', sequential),
}


def family(name: str) -> tuple[str, tuple[Any, ...]] | None:
    """The family of `FAMILIES` that a name belongs to, and its parts; None: to none."""
    for each, (pattern, _) in FAMILIES.items():
        if match := re.fullmatch(pattern, name):
            parts = match.groups()
            return each, tuple(int(part) if str(part).isdigit() else part for part in parts)
    return None


def names(depth: int = 44, wide_depth: int = 28, widen: int = 2) -> list[str]:
    """Every name; of the families by rule with any number of names, those of these sizes."""
    standard = (18, 34, 50, 101, 152)
    by_rule = [f'resnet{depth}{ending}' for ending in ('', 'x4', '_option_a')]
    by_rule.append(f'wrn{wide_depth}_{widen}')
    by_rule += [f'resnet{d}{kind}' for d in standard for kind in ('', '_pool', '_imagenet')]
    by_rule += [f'preact_resnet{d}{norm}' for d in standard for norm in ('', '_bn')]
    by_rule += [
        f'vgg{d}{norm}_{kind}'
        for d in (11, 13, 16, 19)
        for norm in ('', '_bn')
        for kind in ('cifar', 'cifar_512', 'cifar_4096', 'imagenet')
    ]
    return list(dict.fromkeys((*MODELS, *by_rule)))


def make(name: str, **sizes: Any) -> nn.Module:
    """The module called `name`; `sizes` are its fields (of all: num_classes, axis_name, dtype).

    Raises ValueError for an unknown name, listing near and known ones, and for a depth that its
    family does not have.
    """
    if name in MODELS:
        return MODELS[name](**sizes)
    wrong = ''
    if found := family(name):
        which, parts = found
        try:
            module = FAMILIES[which][1](*parts)
        except ValueError as error:  # a depth that the family does not have
            wrong = f': {error}'
        else:
            return module(**sizes)
    near = difflib.get_close_matches(name, MODELS, n=3)
    hint = f' Did you mean {" or ".join(near)}?' if near else ''
    known = ', '.join(sorted(MODELS))
    raise ValueError(
        f'unknown model {name!r}{wrong}.{hint} Known models: {known}; and by rule resnet{{6n+2}} '
        '(also with x4 or _option_a), wrn{6n+4}_{k}, resnet{18,34,50,101,152} (also with _pool or '
        '_imagenet), preact_resnet{18,34,50,101,152} (also with _bn) and '
        'vgg{11,13,16,19}[_bn]_{cifar,cifar_512,cifar_4096,imagenet}.'
    )


def fields(name: str) -> set[str]:
    """The sizes that `make(name, ...)` takes, as keyword arguments.  ValueError as `make`."""
    return {field.name for field in dataclasses.fields(make(name))} - {'parent', 'name'}
