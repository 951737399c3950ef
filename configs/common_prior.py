"""What the configs of diffusion priors share (`python -m dfkd_jax.diffusion.train`)."""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from dfkd_jax.errors import ConfigError


def prior(image_size: int, channels: int, widths: tuple[int, ...], attention: tuple[int, ...]):
    """A small UNet2DModel on a cosine schedule."""
    return ConfigDict(
        dict(
            loop='diffusion_prior',
            seed=0,
            parallel='shard_map',  # jit (one device) / pmap / shard_map (all devices of the host)
            convolutions='auto',  # on CPUs: auto (Winograd's where g++ compiles them) / xla
            weights='float16',  # of what is kept: float16 / float32
            log_every_steps=50,
            save_every_steps=500,
            data=dict(
                folder=placeholder(str),  # of PNG or JPEG images
                name=placeholder(str),  # or a data set in TFDS format: its training images
                data_dir=placeholder(str),  # else $TFDS_DATA_DIR, else ~/tensorflow_datasets
                num_classes=placeholder(int),  # of the data set
                resize='resize',  # of the data set: pad / resize / crop
                image_size=image_size,
                channels=channels,
                invert=False,  # negatives, for pictures that are dark on white
                held_out=128,  # images that are measured and not trained on
            ),
            unet=dict(
                widths=widths,  # of the levels, from the finest map to the coarsest
                blocks=1,  # a level
                attention=attention,  # levels with attention, beside the middle block
                head_width=8,
                groups=8,
            ),
            schedule=dict(
                betas='squaredcos_cap_v2',  # linear / scaled_linear / squaredcos_cap_v2
                timesteps=1000,
                prediction='v_prediction',  # epsilon / v_prediction
            ),
            train=dict(
                steps=1000,
                batch_size=32,
                lr=1e-3,
                warmup_steps=200,
                clip_norm=1.0,
                ema_decay=0.999,
                flip=True,
            ),
        )
    )


def finish(config: ConfigDict, arg: str | None) -> ConfigDict:
    """Applies the one flag, `smoke`: the same program at a fraction of its length and width.

    Raises ConfigError for another.
    """
    if arg not in (None, '', 'smoke'):
        raise ConfigError(f'config argument {arg!r}: expected nothing or smoke.')
    if arg:
        config.unet.widths = (8,) * len(config.unet.widths)
        config.train.update(steps=20, batch_size=8, warmup_steps=2)
        config.data.held_out = 8
        config.log_every_steps, config.save_every_steps = 5, 10
    return config
