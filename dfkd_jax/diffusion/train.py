"""Trains a small diffusion model of pixels: a prior where no large one fits or may be used.

    python -m dfkd_jax.diffusion.train --config=configs/prior_clipart.py --workdir=DIR \\
        --config.data.folder=IMAGES

DIR/prior is the prior: a UNet2DModel in diffusers' format, its noise schedule, a receipt
(receipt.json) and images that it draws (samples.png).  `dfkd_jax.diffusion.load` reads it, and so
does ``--config.prior.path=DIR/prior``.  The same command continues an interrupted run.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from dfkd_jax import cli
from dfkd_jax.errors import ConfigError
from dfkd_jax.loops import Stopped, diffusion_prior
from dfkd_jax.loops.diffusion_prior import PRIOR, SAMPLES
from dfkd_jax.storage import workdir as folders


def train(config: Any, workdir: str | None) -> None:
    """Trains in `workdir`, and prints the loss."""
    if workdir is None:
        raise ConfigError('name a folder: --workdir=DIR.')
    path = Path(workdir)
    diffusion_prior.check(config)
    command = ' '.join(['python -m dfkd_jax.diffusion.train', *sys.argv[1:]])
    with folders.claim(path, config), folders.Interruption() as interrupted:
        try:
            receipt = diffusion_prior.run(config, path, interrupted, command)
        except Stopped:
            return
    print(f'{path / PRIOR}: loss {receipt["loss"]:.4f}; look at {path / PRIOR / SAMPLES}')


if __name__ == '__main__':
    cli.launch(train)
