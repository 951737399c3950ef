"""MobileNetV3: the names of torchvision."""

from __future__ import annotations

from dfkd_jax.port.rules import CONV, LINEAR, NORM, Row, Table

MOBILENETV3 = Table(
    rows=(
        Row('features.{n}.0', 'features_{n}_0', CONV),
        Row('features.{n}.1', 'features_{n}_1', NORM),
        Row('features.{n}.block.{i}.0', 'features_{n}/block_{i}_0', CONV),
        Row('features.{n}.block.{i}.1', 'features_{n}/block_{i}_1', NORM),
        Row('features.{n}.block.{i}.fc{k}', 'features_{n}/block_{i}/fc{k}', CONV),
        Row('classifier.{n}', 'classifier_{n}', LINEAR),
    ),
    first='features.0.0.weight',
    last='classifier.3.weight',
)

TABLES = dict.fromkeys(('mobilenetv3_large', 'mobilenetv3_small'), (MOBILENETV3,))
