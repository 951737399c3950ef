"""A prior of random strokes, 16 px grey on black, for the digits' teacher: three minutes of a core.

    python experiments/prior_data.py strokes --output=strokes16
    python -m dfkd_jax.diffusion.train --config=prior_strokes --workdir=DIR \\
        --config.data.folder=strokes16

Loss of images held out 0.1695; the receipt and samples are in dfkd_jax/diffusion/priors/strokes16.
"""

from dfkd_jax.configs import common_prior


def get_config(arg: str | None = None):
    """`[smoke]`."""
    config = common_prior.prior(image_size=16, channels=1, widths=(8, 16, 32), attention=())
    config.train.update(steps=1_500, batch_size=32, lr=4e-3, ema_decay=0.99)
    return common_prior.finish(config, arg)
