"""Residual networks, by the names of the code bases that publish them."""

from __future__ import annotations

from dfkd_jax.port.rules import CONV, LINEAR, NORM, Row, Table


def _table(shortcut: str, head: str, ours: tuple[str, str], block: int = 1) -> Table:
    """`conv1`, `bn1`, `layer1.0.conv1`, ..., and the shortcut and the head under given names."""
    our_shortcut, our_head = ours
    shortcuts = (
        Row(f'layer{{s}}.{{i}}.{shortcut}.0', f'layer{{s}}_{{i}}/{our_shortcut}_0', CONV),
        Row(f'layer{{s}}.{{i}}.{shortcut}.1', f'layer{{s}}_{{i}}/{our_shortcut}_1', NORM),
    )
    rows = (
        Row('conv1', 'conv1', CONV),
        Row('bn1', 'bn1', NORM),
        Row('layer{s}.{i}.conv{n}', 'layer{s}_{i}/conv{n}', CONV),
        Row('layer{s}.{i}.bn{n}', 'layer{s}_{i}/bn{n}', NORM),
        *(shortcuts if shortcut else ()),
        Row(head, our_head, LINEAR),
    )
    return Table(rows, 'conv1.weight', f'{head}.weight', block=block)


def _numbered(ours: tuple[str, str]) -> Table:
    """weiaicunzai/pytorch-cifar100: stage 1 is `conv2_x`, and layers are numbers of a sequence."""
    shortcut, head = ours
    rows = [Row('conv1.0', 'conv1', CONV), Row('conv1.1', 'bn1', NORM)]
    for stage in range(1, 5):
        theirs, place = f'conv{stage + 1}_x.{{i}}', f'layer{stage}_{{i}}'
        for n in range(3):
            rows += [
                Row(f'{theirs}.residual_function.{3 * n}', f'{place}/conv{n + 1}', CONV),
                Row(f'{theirs}.residual_function.{3 * n + 1}', f'{place}/bn{n + 1}', NORM),
            ]
        rows += [
            Row(f'{theirs}.shortcut.0', f'{place}/{shortcut}_0', CONV),
            Row(f'{theirs}.shortcut.1', f'{place}/{shortcut}_1', NORM),
        ]
    return Table((*rows, Row('fc', head, LINEAR)), 'conv1.0.weight', 'fc.weight')


def _hugging_face(ours: tuple[str, str]) -> Table:
    """transformers' ResNetForImageClassification: stages and layers count from 0."""
    shortcut, head = ours
    stem = 'resnet.embedder.embedder'
    rows = [
        Row(f'{stem}.convolution', 'conv1', CONV),
        Row(f'{stem}.normalization', 'bn1', NORM),
    ]
    for stage in range(1, 5):
        theirs = f'resnet.encoder.stages.{stage - 1}.layers.{{i}}'
        place = f'layer{stage}_{{i}}'
        for n in range(3):
            rows += [
                Row(f'{theirs}.layer.{n}.convolution', f'{place}/conv{n + 1}', CONV),
                Row(f'{theirs}.layer.{n}.normalization', f'{place}/bn{n + 1}', NORM),
            ]
        rows += [
            Row(f'{theirs}.shortcut.convolution', f'{place}/{shortcut}_0', CONV),
            Row(f'{theirs}.shortcut.normalization', f'{place}/{shortcut}_1', NORM),
        ]
    rows.append(Row('classifier.1', head, LINEAR))
    return Table(tuple(rows), f'{stem}.convolution.weight', 'classifier.1.weight')


def _pre_activation() -> Table:
    """kuangliu/pytorch-cifar's PreActResNet, and the robustness field's, which has a last norm."""
    rows = (
        Row('conv1', 'conv1', CONV),
        Row('layer{s}.{i}.conv{n}', 'layer{s}_{i}/conv{n}', CONV),
        Row('layer{s}.{i}.bn{n}', 'layer{s}_{i}/bn{n}', NORM),
        Row('layer{s}.{i}.shortcut.0', 'layer{s}_{i}/shortcut_0', CONV),
        Row('bn', 'bn', NORM),
        Row('linear', 'linear', LINEAR),
    )
    return Table(rows, 'conv1.weight', 'linear.weight')


# The names in our modules: of the shortcut, then of the head.
THIN, WIDE, PADDED = ('downsample', 'fc'), ('shortcut', 'linear'), ('', 'linear')

# RepDistiller's names for CIFAR, torchvision's for ImageNet.
RESNET = _table('downsample', 'fc', THIN)
RESNET_S2D = _table('downsample', 'fc', THIN, block=2)
# kuangliu/pytorch-cifar first; torchvision's network behind another stem; then the others.
RESNET_CIFAR = (
    _table('shortcut', 'linear', WIDE),
    _table('downsample', 'fc', WIDE),
    _numbered(WIDE),
)
RESNET_POOL = (_table('downsample', 'fc', WIDE),)
# With projections under kuangliu's names: option B of akamaster/pytorch_resnet_cifar10's classes.
RESNET_THIN = (RESNET, _table('shortcut', 'linear', THIN))
RESNET_IMAGENET = (RESNET, _hugging_face(THIN))
# akamaster/pytorch_resnet_cifar10: shortcuts without weights.
OPTION_A = (_table('', 'linear', PADDED), _table('', 'fc', PADDED))

TABLES = {
    'resnet8_half': (RESNET,),
    **dict.fromkeys(('resnet8_s2d', 'resnet8_s2d_half'), (RESNET_S2D,)),
}
FAMILIES = {
    'thin': RESNET_THIN,
    'thin_x4': RESNET_THIN,
    'option_a': OPTION_A,
    'wide': RESNET_CIFAR,
    'wide_pool': RESNET_POOL,
    'imagenet': RESNET_IMAGENET,
    'preact': (_pre_activation(),),
}
