"""LeNet-5, by the names that the data-free field gives it."""

from __future__ import annotations

from dfkd_jax.port.rules import CONV, LINEAR, Row, Table

LENET = Table(
    rows=(
        Row('features.{i}', 'features_{i}', CONV),
        Row('fc.{i}', 'fc_{i}', LINEAR),
    ),
    first='features.0.weight',
    last='fc.2.weight',
)

TABLES = dict.fromkeys(('lenet5', 'lenet5_half'), (LENET,))
