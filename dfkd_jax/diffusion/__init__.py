"""Pretrained diffusion models as priors over images: loading, noise schedules, sampling steps."""

from __future__ import annotations

from dfkd_jax.diffusion.folder import load_unet as load_unet
from dfkd_jax.diffusion.folder import save_unet as save_unet
from dfkd_jax.diffusion.prior import Prior as Prior
from dfkd_jax.diffusion.prior import load as load
from dfkd_jax.diffusion.prior import shipped as shipped
from dfkd_jax.diffusion.resize import resize_bicubic as resize_bicubic
from dfkd_jax.diffusion.schedule import Schedule as Schedule
from dfkd_jax.errors import DiffusionError as DiffusionError
