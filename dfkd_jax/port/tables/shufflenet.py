"""ShuffleNetV2: the names of torchvision."""

from __future__ import annotations

from dfkd_jax.port.rules import CONV, LINEAR, NORM, Row, Table

CONVS = (('branch1', 0), ('branch1', 2), ('branch2', 0), ('branch2', 3), ('branch2', 5))
SHUFFLENETV2 = Table(
    rows=(
        *(
            row
            for branch, n in CONVS
            for row in (
                Row(f'stage{{s}}.{{i}}.{branch}.{n}', f'stage{{s}}_{{i}}/{branch}_{n}', CONV),
                Row(
                    f'stage{{s}}.{{i}}.{branch}.{n + 1}',
                    f'stage{{s}}_{{i}}/{branch}_{n + 1}',
                    NORM,
                ),
            )
        ),
        Row('conv{n}.0', 'conv{n}_0', CONV),
        Row('conv{n}.1', 'conv{n}_1', NORM),
        Row('fc', 'fc', LINEAR),
    ),
    first='conv1.0.weight',
    last='fc.weight',
)

TABLES = dict.fromkeys(('shufflenetv2_x0_5', 'shufflenetv2_x1_0'), (SHUFFLENETV2,))
