"""The configs that ship with the package.

In a checkout they lie in its folder ``configs/``, which this file makes importable under the name
that they have where the package is installed (setup.cfg puts them there, in place of this file).
"""

from pathlib import Path

__path__.append(str(Path(__file__).resolve().parents[2] / 'configs'))
