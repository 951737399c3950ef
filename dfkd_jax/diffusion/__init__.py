"""Pretrained diffusion models as priors over images: loading, noise schedules, sampling steps.

`prior` is the interface.  `folder` reads and writes diffusers' format, `tokenizer` and `clip_text`
turn prompts into text states, `unet` and `vae` are the networks and `schedule` has the samplers'
steps.  `recipe` describes a small prior to train, and ``python -m dfkd_jax.diffusion.train`` trains
it.
"""

from __future__ import annotations

from dfkd_jax.diffusion.folder import load_unet as load_unet
from dfkd_jax.diffusion.folder import save_unet as save_unet
from dfkd_jax.diffusion.prior import Prior as Prior
from dfkd_jax.diffusion.prior import described as described
from dfkd_jax.diffusion.prior import load as load
from dfkd_jax.diffusion.prior import shipped as shipped
from dfkd_jax.diffusion.resize import resize_bicubic as resize_bicubic
from dfkd_jax.diffusion.schedule import Schedule as Schedule
from dfkd_jax.errors import DiffusionError as DiffusionError
