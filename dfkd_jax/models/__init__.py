"""The model zoo: names to linen modules."""

from __future__ import annotations

import dataclasses
import difflib
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
from dfkd_jax.models.mobilenet import MobileNetV2
from dfkd_jax.models.mobilenetv3 import MobileNetV3
from dfkd_jax.models.regnet import RegNetY
from dfkd_jax.models.resnet import imagenet, thin, wide
from dfkd_jax.models.resnet_gn import GroupNormResNet
from dfkd_jax.models.shufflenet import ShuffleNetV2
from dfkd_jax.models.vgg import VGG
from dfkd_jax.models.vit import ViT
from dfkd_jax.models.wrn import WideResNet

MODELS: dict[str, Any] = {
    'lenet5': LeNet5,
    'lenet5_half': partial(LeNet5, (3, 8, 60, 42)),
    'resnet8': thin(8),
    'resnet20': thin(20),
    'resnet32': thin(32),
    'resnet56': thin(56),
    'resnet110': thin(110),
    'resnet8x4': thin(8, (32, 64, 128, 256)),
    'resnet32x4': thin(32, (32, 64, 128, 256)),
    'resnet8_half': thin(8, (8, 8, 16, 32)),
    'resnet8_s2d': thin(8, stem='s2d'),
    'resnet8_s2d_half': thin(8, (8, 8, 16, 32), 's2d'),
    'resnet18': wide((2, 2, 2, 2)),
    'resnet34': wide((3, 4, 6, 3)),
    'resnet50': wide((3, 4, 6, 3), bottleneck=True),
    'resnet18_imagenet': imagenet((2, 2, 2, 2)),
    'resnet34_imagenet': imagenet((3, 4, 6, 3)),
    'resnet50_imagenet': imagenet((3, 4, 6, 3), bottleneck=True),
    'wrn16_1': partial(WideResNet, 16, 1),
    'wrn16_2': partial(WideResNet, 16, 2),
    'wrn40_1': partial(WideResNet, 40, 1),
    'wrn40_2': partial(WideResNet, 40, 2),
    'vgg8': partial(VGG, (1, 1, 1, 1, 1)),
    'vgg11': partial(VGG, (1, 1, 2, 2, 2)),
    'vgg13': partial(VGG, (2, 2, 2, 2, 2)),
    'mobilenetv2': MobileNetV2,
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
    'resnet20_gn': partial(GroupNormResNet, 3),
    'cpsc_generator': CPSCGenerator,
    'cpsc_deep_generator': CPSCDeepGenerator,
    'dcgan_generator': DCGANGenerator,
    'dcgan_deep_generator': DCGANDeepGenerator,
    'nayer_generator': NAYERGenerator,
    'nayer_deep_generator': NAYERDeepGenerator,
}


def make(name: str, **sizes: Any) -> nn.Module:
    """The module called `name`; `sizes` are its fields (of all: num_classes, axis_name, dtype).

    Raises ValueError for an unknown name, listing near and known ones.
    """
    if name not in MODELS:
        near = difflib.get_close_matches(name, MODELS, n=3)
        hint = f' Did you mean {" or ".join(near)}?' if near else ''
        known = ', '.join(sorted(MODELS))
        raise ValueError(f'unknown model {name!r}.{hint} Known models: {known}.')
    return MODELS[name](**sizes)


def fields(name: str) -> set[str]:
    """The sizes that `make(name, ...)` takes, as keyword arguments.  ValueError as `make`."""
    return {field.name for field in dataclasses.fields(make(name))} - {'parent', 'name'}
