"""Data-free knowledge distillation in JAX."""

__version__ = '0.1.0'

# What users of the library call: dfkd_jax.models.make, dfkd_jax.port.from_torch and to_torch.
from dfkd_jax import models as models
from dfkd_jax import port as port
