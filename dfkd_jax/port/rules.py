"""The PyTorch and the Flax names of each architecture: tables, read in both directions.

A row is ``(PyTorch module, Flax module, leaves)``.  It says that the two modules are the same, and
which of their leaves are (CONV, LINEAR, NORM, ...).  A placeholder such as ``{s}`` stands for a
number, the same on both sides; one that the Flax side lacks runs over the first axis of the Flax
leaf.  The first row counts that matches the module and has the leaf.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Leaf(NamedTuple):
    """One array: its last name in PyTorch, its place in Flax, and the order of its axes."""

    torch: str
    collection: str  # 'params' / 'batch_stats' / '': not kept in Flax
    flax: str
    axes: tuple[int, ...] | None = None  # the PyTorch array's axes in Flax's order; None: as is
    ones: int = 0  # axes of length 1 that the PyTorch array has behind these


class Row(NamedTuple):
    """A PyTorch module, the same module in Flax, and their leaves; '' is the whole network."""

    torch: str
    flax: str
    leaves: tuple[Leaf, ...]


class Table(NamedTuple):
    """The names of one family of architectures.

    first: the PyTorch array whose second axis counts input channels.
    last: the PyTorch array whose first axis counts classes.  Both are '' where sizes must be given.
    block: the side of the pixel blocks that a space-to-depth stem turns into channels.
    inputs: the inputs of a module, given the number of input channels.
    """

    rows: tuple[Row, ...]
    first: str
    last: str
    inputs: Callable[[Any, int], tuple[jax.ShapeDtypeStruct, ...]]
    block: int = 1


BIAS = Leaf('bias', 'params', 'bias')
LINEAR = (Leaf('weight', 'params', 'kernel', (1, 0)), BIAS)
# Transposed convolutions too, with Flax's `transpose_kernel`: in, out, h, w -> h, w, out, in.
CONV = (Leaf('weight', 'params', 'kernel', (2, 3, 1, 0)), BIAS)

STATISTICS = (
    Leaf('running_mean', 'batch_stats', 'mean'),
    Leaf('running_var', 'batch_stats', 'var'),
    # How many batches the running statistics have seen, which matters only where the momentum is
    # None.  It is dropped on the way in, and 0 on the way out.
    Leaf('num_batches_tracked', '', ''),
)
NORM = (Leaf('weight', 'params', 'scale'), BIAS, *STATISTICS)
AFFINE = NORM[:2]  # of a layer or group norm, which keeps no statistics
# The class tables of a conditional batch norm, whose statistics are those of an inner norm.
CLASS_TABLES = (Leaf('weights.weight', 'params', 'scale'), Leaf('biases.weight', 'params', 'bias'))
# NAYER's noisy layers, one linear layer for each repetition of the class list.
NOISY = (
    Leaf('weight', 'params', 'noisy_kernel', (1, 0)),
    Leaf('bias', 'params', 'noisy_bias'),
)


def _images(module: Any, channels: int) -> tuple[jax.ShapeDtypeStruct, ...]:
    """One image; the weights of a classifier do not depend on its size."""
    del module
    return (jax.ShapeDtypeStruct((1, 32, 32, channels), jnp.float32),)


images = _images


def _latents(module: Any, channels: int) -> tuple[jax.ShapeDtypeStruct, ...]:
    del channels
    return (jax.ShapeDtypeStruct((1, module.latent), jnp.float32),)


def _latents_and_labels(module: Any, channels: int) -> tuple[jax.ShapeDtypeStruct, ...]:
    return (*_latents(module, channels), jax.ShapeDtypeStruct((1,), jnp.int32))


def _embeddings(module: Any, channels: int) -> tuple[jax.ShapeDtypeStruct, ...]:
    del channels
    return (jax.ShapeDtypeStruct((1, module.embedding), jnp.float32),)


def _resnet(shortcut: str, head: str) -> tuple[Row, ...]:
    return (
        Row('conv1', 'conv1', CONV),
        Row('bn1', 'bn1', NORM),
        Row('layer{s}.{i}.conv{n}', 'layer{s}_{i}/conv{n}', CONV),
        Row('layer{s}.{i}.bn{n}', 'layer{s}_{i}/bn{n}', NORM),
        Row(f'layer{{s}}.{{i}}.{shortcut}.0', f'layer{{s}}_{{i}}/{shortcut}_0', CONV),
        Row(f'layer{{s}}.{{i}}.{shortcut}.1', f'layer{{s}}_{{i}}/{shortcut}_1', NORM),
        Row(head, head, LINEAR),
    )


LENET = Table(
    rows=(
        Row('features.{i}', 'features_{i}', CONV),
        Row('fc.{i}', 'fc_{i}', LINEAR),
    ),
    first='features.0.weight',
    last='fc.2.weight',
    inputs=_images,
)

# RepDistiller's names for CIFAR, torchvision's for ImageNet.
RESNET = Table(_resnet('downsample', 'fc'), 'conv1.weight', 'fc.weight', _images)
RESNET_S2D = RESNET._replace(block=2)
RESNET_CIFAR = Table(_resnet('shortcut', 'linear'), 'conv1.weight', 'linear.weight', _images)

WRN = Table(
    rows=(
        Row('conv1', 'conv1', CONV),
        Row('block{g}.layer.{i}.bn{n}', 'block{g}_{i}/bn{n}', NORM),
        Row('block{g}.layer.{i}.conv{n}', 'block{g}_{i}/conv{n}', CONV),
        Row('block{g}.layer.{i}.convShortcut', 'block{g}_{i}/convShortcut', CONV),
        Row('bn1', 'bn1', NORM),
        Row('fc', 'fc', LINEAR),
    ),
    first='conv1.weight',
    last='fc.weight',
    inputs=_images,
)

VGG = Table(
    rows=(
        Row('block{b}.0', 'block{b}_0', CONV),
        Row('block{b}.1', 'block{b}_1', NORM),
        Row('block{b}.3', 'block{b}_3', CONV),
        Row('block{b}.4', 'block{b}_4', NORM),
        Row('classifier', 'classifier', LINEAR),
    ),
    first='block0.0.weight',
    last='classifier.weight',
    inputs=_images,
)

MOBILENETV2 = Table(
    rows=(
        Row('features.0.0', 'features_0_0', CONV),
        Row('features.0.1', 'features_0_1', NORM),
        Row('features.18.0', 'features_18_0', CONV),
        Row('features.18.1', 'features_18_1', NORM),
        # The first block has no expansion, so its projection is number 1 and not 2.
        Row('features.1.conv.1', 'features_1/conv_1', CONV),
        Row('features.1.conv.2', 'features_1/conv_2', NORM),
        Row('features.{n}.conv.{i}.0', 'features_{n}/conv_{i}_0', CONV),
        Row('features.{n}.conv.{i}.1', 'features_{n}/conv_{i}_1', NORM),
        Row('features.{n}.conv.2', 'features_{n}/conv_2', CONV),
        Row('features.{n}.conv.3', 'features_{n}/conv_3', NORM),
        Row('classifier.1', 'classifier_1', LINEAR),
    ),
    first='features.0.0.weight',
    last='classifier.1.weight',
    inputs=_images,
)

EFFICIENTNET = Table(
    rows=(
        Row('_conv_stem', 'conv_stem', CONV),
        Row('_blocks.{i}._expand_conv', 'blocks_{i}/expand_conv', CONV),
        Row('_blocks.{i}._depthwise_conv', 'blocks_{i}/depthwise_conv', CONV),
        Row('_blocks.{i}._project_conv', 'blocks_{i}/project_conv', CONV),
        Row('_blocks.{i}._bn{n}', 'blocks_{i}/bn{n}', NORM),
        Row('_conv_head', 'conv_head', CONV),
        Row('_bn{n}', 'bn{n}', NORM),
        Row('_fc', 'fc', LINEAR),
    ),
    first='_conv_stem.weight',
    last='_fc.weight',
    inputs=_images,
)

CPSC = Table(
    rows=(
        Row('l1.0', 'project', LINEAR),
        Row('conv_blocks0_0', 'norm0/norm', STATISTICS),
        Row('conv_blocks0_0', 'norm0', CLASS_TABLES),
        Row('conv_blocks3_2', 'norm3/norm', STATISTICS),
        Row('conv_blocks3_2', 'norm3', CLASS_TABLES),
        Row('conv_blocks{i}_1', 'norm{i}/norm', STATISTICS),
        Row('conv_blocks{i}_1', 'norm{i}', CLASS_TABLES),
        Row('conv_blocks{i}_0', 'conv{i}', CONV),
    ),
    first='',
    last='',
    inputs=_latents_and_labels,
)

CPSC_DEEP = Table(
    rows=(
        Row('project.1', 'project', LINEAR),
        Row('conv_blocks0_0', 'norm0/norm', STATISTICS),
        Row('conv_blocks0_0', 'norm0', CLASS_TABLES),
        Row('conv_blocks{i}_1', 'norm{i}/norm', STATISTICS),
        Row('conv_blocks{i}_1', 'norm{i}', CLASS_TABLES),
        Row('conv_blocks{i}_0', 'conv{i}', CONV),
    ),
    first='',
    last='',
    inputs=_latents_and_labels,
)

DCGAN = Table(
    rows=(
        Row('l1.0', 'project', LINEAR),
        Row('conv_blocks.0', 'norm0', NORM),
        Row('conv_blocks.2', 'conv1', CONV),
        Row('conv_blocks.3', 'norm1', NORM),
        Row('conv_blocks.6', 'conv2', CONV),
        Row('conv_blocks.7', 'norm2', NORM),
        Row('conv_blocks.9', 'conv3', CONV),
    ),
    first='',
    last='',
    inputs=_latents,
)

NAYER = Table(
    rows=(Row('n1', 'n1', NORM), Row('le1.{i}', '', NOISY), *DCGAN.rows),
    first='',
    last='',
    inputs=_embeddings,
)

# The trunk for 224 px: like DCGAN, but a convolution and a norm follow each upsampling.
DCGAN_DEEP = Table(
    rows=(
        Row('l1.0', 'project', LINEAR),
        Row('conv_blocks.0', 'conv0', CONV),
        Row('conv_blocks.1', 'norm0', NORM),
        Row('conv_blocks.4', 'conv1', CONV),
        Row('conv_blocks.5', 'norm1', NORM),
        Row('conv_blocks.8', 'conv2', CONV),
        Row('conv_blocks.9', 'norm2', NORM),
        Row('conv_blocks.12', 'conv3', CONV),
        Row('conv_blocks.13', 'norm3', NORM),
        Row('conv_blocks.16', 'conv4', CONV),
        Row('conv_blocks.17', 'norm4', NORM),
        Row('conv_blocks.19', 'conv5', CONV),
    ),
    first='',
    last='',
    inputs=_latents,
)

NAYER_DEEP = Table(
    rows=(Row('n1', 'n1', NORM), Row('le1.{i}', '', NOISY), *DCGAN_DEEP.rows),
    first='',
    last='',
    inputs=_embeddings,
)

TABLES: dict[str, Table] = {
    **dict.fromkeys(('lenet5', 'lenet5_half'), LENET),
    **dict.fromkeys(('resnet8', 'resnet20', 'resnet32', 'resnet56', 'resnet110'), RESNET),
    **dict.fromkeys(('resnet8x4', 'resnet32x4', 'resnet8_half'), RESNET),
    **dict.fromkeys(('resnet18_imagenet', 'resnet34_imagenet', 'resnet50_imagenet'), RESNET),
    **dict.fromkeys(('resnet8_s2d', 'resnet8_s2d_half'), RESNET_S2D),
    **dict.fromkeys(('resnet18', 'resnet34', 'resnet50'), RESNET_CIFAR),
    **dict.fromkeys(('wrn16_1', 'wrn16_2', 'wrn40_1', 'wrn40_2'), WRN),
    **dict.fromkeys(('vgg8', 'vgg11', 'vgg13'), VGG),
    'mobilenetv2': MOBILENETV2,
    'efficientnet_lite0': EFFICIENTNET,
    'cpsc_generator': CPSC,
    'cpsc_deep_generator': CPSC_DEEP,
    'dcgan_generator': DCGAN,
    'dcgan_deep_generator': DCGAN_DEEP,
    'nayer_generator': NAYER,
    'nayer_deep_generator': NAYER_DEEP,
}

from dfkd_jax.port.tables import TABLES as _MORE  # noqa: E402

TABLES |= {name: tables[0] for name, tables in _MORE.items()}
