"""A prior of clip art, 32 px grey on black, for Fashion-MNIST's teachers: 50 minutes of one core.

    apt-get download openclipart-png && dpkg-deb -x openclipart-png_*.deb CLIPART
    python experiments/prior_data.py clipart --source=CLIPART --output=clipart32
    python -m dfkd_jax.diffusion.train --config=prior_clipart --workdir=DIR \\
        --config.data.folder=clipart32

Loss of images held out 0.1555; the receipt and samples are in dfkd_jax/diffusion/priors/clipart32.
"""

from dfkd_jax.configs import common_prior


def get_config(arg: str | None = None):
    """`[smoke]`."""
    config = common_prior.prior(image_size=32, channels=1, widths=(16, 16, 32, 64), attention=(2,))
    config.train.update(steps=6_000, batch_size=32, lr=2e-3)
    return common_prior.finish(config, arg)
