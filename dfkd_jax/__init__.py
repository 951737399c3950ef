"""Data-free knowledge distillation in JAX."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = '0.2.0'

# What users of the library call: dfkd_jax.models.make, dfkd_jax.port.from_torch and to_torch.
OFFERED = ('models', 'port')
if TYPE_CHECKING:
    from dfkd_jax import models as models
    from dfkd_jax import port as port


def __getattr__(name: str) -> Any:
    """What is offered, imported when it is asked for: `dfkd --help` needs no JAX."""
    if name in OFFERED:
        return importlib.import_module(f'dfkd_jax.{name}')
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
