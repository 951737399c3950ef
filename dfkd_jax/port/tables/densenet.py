"""DenseNet: the names of torchvision, which timm has too, and those of torchvision's files.

Its files (``densenet121-a639ec97.pth``) are older than its names: ``norm1`` is ``norm.1`` there.
"""

from __future__ import annotations

from dfkd_jax.port.rules import CONV, LINEAR, NORM, Row, Table


def _table(dot: str) -> Table:
    """dot: between the name and the number of a layer's parts."""
    layer, ours = 'features.denseblock{b}.denselayer{i}', 'denseblock{b}_{i}'
    rows = (
        Row('features.conv0', 'conv0', CONV),
        Row(f'{layer}.norm{dot}{{n}}', f'{ours}/norm{{n}}', NORM),
        Row(f'{layer}.conv{dot}{{n}}', f'{ours}/conv{{n}}', CONV),
        Row('features.transition{t}.norm', 'transition{t}_norm', NORM),
        Row('features.transition{t}.conv', 'transition{t}_conv', CONV),
        Row('features.norm{n}', 'norm{n}', NORM),
        Row('classifier', 'classifier', LINEAR),
    )
    return Table(rows, 'features.conv0.weight', 'classifier.weight')


TABLES = {'densenet121': (_table(''), _table('.'))}
