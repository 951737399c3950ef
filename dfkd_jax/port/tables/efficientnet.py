"""EfficientNet: the names of ``efficientnet_pytorch``, of torchvision and of timm.

timm has the same names and shapes for the network of TensorFlow (``tf_efficientnet_b0``) and for
that of PyTorch (``efficientnet_b0``): nothing in such a file tells which it is.
"""

from __future__ import annotations

from dfkd_jax.port.rules import CONV, LINEAR, NORM, Row, Table

DEPTHS = (1, 2, 2, 3, 3, 4, 1)  # blocks of each stage
STAGES = [(stage, i) for stage, depth in enumerate(DEPTHS) for i in range(depth)]

PYTORCH = Table(
    rows=(
        Row('_conv_stem', 'conv_stem', CONV),
        Row('_blocks.{i}._expand_conv', 'blocks_{i}/expand_conv', CONV),
        Row('_blocks.{i}._depthwise_conv', 'blocks_{i}/depthwise_conv', CONV),
        Row('_blocks.{i}._se_reduce', 'blocks_{i}/se/fc1', CONV),
        Row('_blocks.{i}._se_expand', 'blocks_{i}/se/fc2', CONV),
        Row('_blocks.{i}._project_conv', 'blocks_{i}/project_conv', CONV),
        Row('_blocks.{i}._bn{n}', 'blocks_{i}/bn{n}', NORM),
        Row('_conv_head', 'conv_head', CONV),
        Row('_bn{n}', 'bn{n}', NORM),
        Row('_fc', 'fc', LINEAR),
    ),
    first='_conv_stem.weight',
    last='_fc.weight',
)


def _torchvision() -> Table:
    rows = [
        Row('features.0.0', 'conv_stem', CONV),
        Row('features.0.1', 'bn0', NORM),
        Row('features.8.0', 'conv_head', CONV),
        Row('features.8.1', 'bn1', NORM),
        Row('classifier.1', 'fc', LINEAR),
    ]
    for n, (stage, i) in enumerate(STAGES):
        block, ours = f'features.{stage + 1}.{i}.block', f'blocks_{n}'
        k = 1 if stage else 0  # the first stage does not expand, and torchvision leaves no gap
        if k:
            rows.append(Row(f'{block}.0.0', f'{ours}/expand_conv', CONV))
            rows.append(Row(f'{block}.0.1', f'{ours}/bn0', NORM))
        rows += [
            Row(f'{block}.{k}.0', f'{ours}/depthwise_conv', CONV),
            Row(f'{block}.{k}.1', f'{ours}/bn1', NORM),
            Row(f'{block}.{k + 1}.fc{{n}}', f'{ours}/se/fc{{n}}', CONV),
            Row(f'{block}.{k + 2}.0', f'{ours}/project_conv', CONV),
            Row(f'{block}.{k + 2}.1', f'{ours}/bn2', NORM),
        ]
    return Table(tuple(rows), 'features.0.0.weight', 'classifier.1.weight')


def _timm() -> Table:
    rows = [
        Row('conv_stem', 'conv_stem', CONV),
        Row('bn1', 'bn0', NORM),
        Row('conv_head', 'conv_head', CONV),
        Row('bn2', 'bn1', NORM),
        Row('classifier', 'fc', LINEAR),
    ]
    for n, (stage, i) in enumerate(STAGES):
        block, ours = f'blocks.{stage}.{i}', f'blocks_{n}'
        k = 1 if stage else 0  # the first stage does not expand, and timm leaves no gap
        if k:
            rows.append(Row(f'{block}.conv_pw', f'{ours}/expand_conv', CONV))
            rows.append(Row(f'{block}.bn1', f'{ours}/bn0', NORM))
        project = 'conv_pwl' if k else 'conv_pw'
        rows += [
            Row(f'{block}.conv_dw', f'{ours}/depthwise_conv', CONV),
            Row(f'{block}.bn{k + 1}', f'{ours}/bn1', NORM),
            Row(f'{block}.se.conv_reduce', f'{ours}/se/fc1', CONV),
            Row(f'{block}.se.conv_expand', f'{ours}/se/fc2', CONV),
            Row(f'{block}.{project}', f'{ours}/project_conv', CONV),
            Row(f'{block}.bn{k + 2}', f'{ours}/bn2', NORM),
        ]
    return Table(tuple(rows), 'conv_stem.weight', 'classifier.weight')


TABLES = {
    'efficientnet_lite0': (PYTORCH,),
    'efficientnet_b0': (_torchvision(), _timm()),
    'efficientnet_b0_tf': (PYTORCH, _timm()),
}
