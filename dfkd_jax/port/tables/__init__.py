"""The PyTorch names of each network: of those it is published under, the first is written."""

from __future__ import annotations

from dfkd_jax.port.rules import Table
from dfkd_jax.port.tables import (
    convnext,
    densenet,
    efficientnet,
    mobilenetv3,
    regnet,
    resnet_gn,
    shufflenet,
    vit,
)

TABLES: dict[str, tuple[Table, ...]] = {
    **convnext.TABLES,
    **densenet.TABLES,
    **efficientnet.TABLES,
    **mobilenetv3.TABLES,
    **regnet.TABLES,
    **resnet_gn.TABLES,
    **shufflenet.TABLES,
    **vit.TABLES,
}
