"""VGG, by the names of the code bases that publish it."""

from __future__ import annotations

from dfkd_jax.port.rules import CONV, LINEAR, NORM, Row, Table

BLOCKS = Table(  # RepDistiller
    rows=(
        Row('block{b}.0', 'block{b}_0', CONV),
        Row('block{b}.1', 'block{b}_1', NORM),
        Row('block{b}.3', 'block{b}_3', CONV),
        Row('block{b}.4', 'block{b}_4', NORM),
        Row('classifier', 'classifier', LINEAR),
    ),
    first='block0.0.weight',
    last='classifier.weight',
)


# torchvision: one sequence of convolutions, norms and pools; three linear layers, 0, 3 and 6, or
# (kuangliu/pytorch-cifar) one.
SEQUENTIAL = Table(
    rows=(
        Row('features.{i}', 'features_{i}', CONV),
        Row('features.{i}', 'features_{i}_norm', NORM),
        Row('classifier.{j}', 'classifier_{j}', LINEAR),
    ),
    first='features.0.weight',
    last='classifier.6.weight',
)
ONE_LAYER = SEQUENTIAL._replace(
    rows=(*SEQUENTIAL.rows[:2], Row('classifier', 'classifier', LINEAR)), last='classifier.weight'
)

TABLES = dict.fromkeys(('vgg8', 'vgg11', 'vgg13'), (BLOCKS,))
FAMILIES = {'vgg': (SEQUENTIAL, ONE_LAYER)}
