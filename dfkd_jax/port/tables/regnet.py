"""RegNet-Y: the names of torchvision and of timm."""

from __future__ import annotations

from dfkd_jax.port.rules import CONV, LINEAR, NORM, Row, Table

BLOCK = 'trunk_output.block{s}.block{s}-{i}'
TORCHVISION = Table(
    rows=(
        Row('stem.0', 'stem_0', CONV),
        Row('stem.1', 'stem_1', NORM),
        Row(f'{BLOCK}.proj.0', 'block{s}_{i}/proj_0', CONV),
        Row(f'{BLOCK}.proj.1', 'block{s}_{i}/proj_1', NORM),
        *(
            row
            for part in 'abc'
            for row in (
                Row(f'{BLOCK}.f.{part}.0', f'block{{s}}_{{i}}/{part}_0', CONV),
                Row(f'{BLOCK}.f.{part}.1', f'block{{s}}_{{i}}/{part}_1', NORM),
            )
        ),
        Row(f'{BLOCK}.f.se.fc{{n}}', 'block{s}_{i}/se/fc{n}', CONV),
        Row('fc', 'fc', LINEAR),
    ),
    first='stem.0.weight',
    last='fc.weight',
)


def _timm(depth: int) -> Table:
    """depth: the most blocks of a stage; timm counts them from 1."""
    rows = [
        Row('stem.conv', 'stem_0', CONV),
        Row('stem.bn', 'stem_1', NORM),
        Row('head.fc', 'fc', LINEAR),
    ]
    for i in range(depth):
        block, ours = f's{{s}}.b{i + 1}', f'block{{s}}_{i}'
        parts = ('a', 'conv1'), ('b', 'conv2'), ('c', 'conv3'), ('proj', 'downsample')
        for part, name in parts:
            rows.append(Row(f'{block}.{name}.conv', f'{ours}/{part}_0', CONV))
            rows.append(Row(f'{block}.{name}.bn', f'{ours}/{part}_1', NORM))
        rows.append(Row(f'{block}.se.fc{{n}}', f'{ours}/se/fc{{n}}', CONV))
    return Table(tuple(rows), 'stem.conv.weight', 'head.fc.weight')


TABLES = {'regnet_y_400mf': (TORCHVISION, _timm(6))}
