"""MobileNetV2, by torchvision's names, which the CIFAR code bases share."""

from __future__ import annotations

from dfkd_jax.port.rules import CONV, LINEAR, NORM, Row, Table

MOBILENETV2 = Table(
    rows=(
        Row('features.0.0', 'features_0_0', CONV),
        Row('features.0.1', 'features_0_1', NORM),
        Row('features.18.0', 'features_18_0', CONV),
        Row('features.18.1', 'features_18_1', NORM),
        # The first block has no expansion, so its projection is number 1 and not 2.
        Row('features.1.conv.1', 'features_1/conv_1', CONV),
        Row('features.1.conv.2', 'features_1/conv_2', NORM),
        Row('features.{n}.conv.{i}.0', 'features_{n}/conv_{i}_0', CONV),
        Row('features.{n}.conv.{i}.1', 'features_{n}/conv_{i}_1', NORM),
        Row('features.{n}.conv.2', 'features_{n}/conv_2', CONV),
        Row('features.{n}.conv.3', 'features_{n}/conv_3', NORM),
        Row('classifier.1', 'classifier_1', LINEAR),
    ),
    first='features.0.0.weight',
    last='classifier.1.weight',
)

TABLES = dict.fromkeys(('mobilenetv2', 'mobilenetv2_cifar'), (MOBILENETV2,))
