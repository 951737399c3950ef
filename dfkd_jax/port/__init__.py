"""Networks of others.

PyTorch weights to Flax variables and back, by tables of names, all or nothing (`from_torch`,
`to_torch`); and networks of any architecture, exported as `.pt2` or `.onnx` (`load_exported`).
"""

from __future__ import annotations

from dfkd_jax.errors import PortError as PortError
from dfkd_jax.port.exported import load_exported as load_exported
from dfkd_jax.port.torch_flax import Ported as Ported
from dfkd_jax.port.torch_flax import PortWarning as PortWarning
from dfkd_jax.port.torch_flax import accuracy_in as accuracy_in
from dfkd_jax.port.torch_flax import from_torch as from_torch
from dfkd_jax.port.torch_flax import read as read
from dfkd_jax.port.torch_flax import recognise as recognise
from dfkd_jax.port.torch_flax import to_torch as to_torch
