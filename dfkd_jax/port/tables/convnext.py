"""ConvNeXt: the names of torchvision, of its authors (facebookresearch/ConvNeXt) and of timm."""

from __future__ import annotations

from dfkd_jax.port.rules import AFFINE, CONV, LINEAR, Leaf, Row, Table

GAMMA = (Leaf('gamma', 'params', 'gamma'),)
LAYER_SCALE = (Leaf('layer_scale', 'params', 'gamma', ones=2),)


def _torchvision() -> Table:
    """Stages are features 1, 3, 5 and 7; the layers before each are those between."""
    rows = [
        Row('features.0.0', 'stem_conv', CONV),
        Row('features.0.1', 'stem_norm', AFFINE),
        Row('classifier.0', 'norm', AFFINE),
        Row('classifier.2', 'head', LINEAR),
    ]
    for stage in range(4):
        block, ours = f'features.{2 * stage + 1}.{{i}}', f'stages_{stage}_{{i}}'
        rows += [
            Row(f'features.{2 * stage}.0', f'downsample_{stage}_norm', AFFINE),
            Row(f'features.{2 * stage}.1', f'downsample_{stage}_conv', CONV),
            Row(f'{block}.block.0', f'{ours}/dwconv', CONV),
            Row(f'{block}.block.2', f'{ours}/norm', AFFINE),
            Row(f'{block}.block.3', f'{ours}/pwconv1', LINEAR),
            Row(f'{block}.block.5', f'{ours}/pwconv2', LINEAR),
            Row(block, ours, LAYER_SCALE),
        ]
    return Table(tuple(rows), 'features.0.0.weight', 'classifier.2.weight')


AUTHORS = Table(
    rows=(
        Row('downsample_layers.0.0', 'stem_conv', CONV),
        Row('downsample_layers.0.1', 'stem_norm', AFFINE),
        Row('downsample_layers.{s}.0', 'downsample_{s}_norm', AFFINE),
        Row('downsample_layers.{s}.1', 'downsample_{s}_conv', CONV),
        Row('stages.{s}.{i}.dwconv', 'stages_{s}_{i}/dwconv', CONV),
        Row('stages.{s}.{i}.norm', 'stages_{s}_{i}/norm', AFFINE),
        Row('stages.{s}.{i}.pwconv{n}', 'stages_{s}_{i}/pwconv{n}', LINEAR),
        Row('stages.{s}.{i}', 'stages_{s}_{i}', GAMMA),
        Row('norm', 'norm', AFFINE),
        Row('head', 'head', LINEAR),
    ),
    first='downsample_layers.0.0.weight',
    last='head.weight',
)

TIMM = Table(
    rows=(
        Row('stem.0', 'stem_conv', CONV),
        Row('stem.1', 'stem_norm', AFFINE),
        Row('stages.{s}.downsample.0', 'downsample_{s}_norm', AFFINE),
        Row('stages.{s}.downsample.1', 'downsample_{s}_conv', CONV),
        Row('stages.{s}.blocks.{i}.conv_dw', 'stages_{s}_{i}/dwconv', CONV),
        Row('stages.{s}.blocks.{i}.norm', 'stages_{s}_{i}/norm', AFFINE),
        Row('stages.{s}.blocks.{i}.mlp.fc{n}', 'stages_{s}_{i}/pwconv{n}', LINEAR),
        Row('stages.{s}.blocks.{i}', 'stages_{s}_{i}', GAMMA),
        Row('head.norm', 'norm', AFFINE),
        Row('head.fc', 'head', LINEAR),
    ),
    first='stem.0.weight',
    last='head.fc.weight',
)

TABLES = {'convnext_tiny': (_torchvision(), AUTHORS, TIMM)}
