"""Thin residual networks with group norms under the names of the batch norms they replace."""

from __future__ import annotations

from dfkd_jax.port.rules import AFFINE, CONV, LINEAR, Row, Table

RESNET_GN = Table(
    rows=(
        Row('conv1', 'conv1', CONV),
        Row('bn1', 'norm1', AFFINE),
        Row('layer{s}.{i}.conv{n}', 'layer{s}_{i}/conv{n}', CONV),
        Row('layer{s}.{i}.bn{n}', 'layer{s}_{i}/norm{n}', AFFINE),
        Row('layer{s}.{i}.downsample.0', 'layer{s}_{i}/downsample_0', CONV),
        Row('layer{s}.{i}.downsample.1', 'layer{s}_{i}/downsample_1', AFFINE),
        Row('fc', 'fc', LINEAR),
    ),
    first='conv1.weight',
    last='fc.weight',
)

TABLES = dict.fromkeys(('resnet8_gn', 'resnet20_gn'), (RESNET_GN,))
