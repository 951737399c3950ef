"""EfficientNet, by the names of lukemelas/EfficientNet-PyTorch."""

from __future__ import annotations

from dfkd_jax.port.rules import CONV, LINEAR, NORM, Row, Table

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
)

TABLES = {'efficientnet_lite0': (EFFICIENTNET,)}
