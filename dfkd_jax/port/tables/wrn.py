"""Wide residual networks, by the names of xternalz/WideResNet-pytorch, which this field shares."""

from __future__ import annotations

from dfkd_jax.port.rules import CONV, LINEAR, NORM, Row, Table

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
    unused=('sub_block1',),  # TRADES and RobustBench: a copy of block1 that nothing calls
)

FAMILIES = {'wrn': (WRN,)}
