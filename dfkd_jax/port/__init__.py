"""PyTorch weights to Flax variables and back, by tables of names, all or nothing."""

from __future__ import annotations

from dfkd_jax.errors import PortError as PortError
from dfkd_jax.port.torch_flax import Ported as Ported
from dfkd_jax.port.torch_flax import PortWarning as PortWarning
from dfkd_jax.port.torch_flax import from_torch as from_torch
from dfkd_jax.port.torch_flax import read as read
from dfkd_jax.port.torch_flax import to_torch as to_torch
