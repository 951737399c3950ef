"""The PyTorch names of every architecture of the zoo; one file a family.

An architecture may have several tables, one for each code base that publishes it.  The first is
the one that `to_torch` writes.
"""

from __future__ import annotations

from dfkd_jax import models
from dfkd_jax.port.rules import Table
from dfkd_jax.port.tables import (
    convnext,
    densenet,
    efficientnet,
    generators,
    lenet,
    mobilenet,
    mobilenetv3,
    regnet,
    resnet,
    resnet_gn,
    shufflenet,
    vgg,
    vit,
    wrn,
)

TABLES: dict[str, tuple[Table, ...]] = {
    **lenet.TABLES,
    **resnet.TABLES,
    **vgg.TABLES,
    **mobilenet.TABLES,
    **mobilenetv3.TABLES,
    **efficientnet.TABLES,
    **densenet.TABLES,
    **regnet.TABLES,
    **shufflenet.TABLES,
    **convnext.TABLES,
    **resnet_gn.TABLES,
    **vit.TABLES,
    **generators.TABLES,
}
FAMILIES: dict[str, tuple[Table, ...]] = {**resnet.FAMILIES, **wrn.FAMILIES, **vgg.FAMILIES}

# Architectures whose PyTorch files have the same names and shapes and mean different networks.
TWINS = (
    ('mobilenetv2', 'mobilenetv2_cifar'),
    ('efficientnet_b0', 'efficientnet_b0_tf'),
    *((f'resnet{depth}', f'resnet{depth}_pool') for depth in (18, 34, 50, 101, 152)),
)


def tables_of(name: str) -> tuple[Table, ...]:
    """The tables of an architecture; () where it has none."""
    if name in TABLES:
        return TABLES[name]
    family = models.family(name)
    return FAMILIES.get(family[0], ()) if family else ()


def twin_of(name: str) -> str | None:
    """The other architecture that files of this one may fit, if there is one."""
    for one, other in TWINS:
        if name in (one, other):
            return other if name == one else one
    return None
