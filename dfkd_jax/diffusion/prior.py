"""One interface to diffusion models of pixels and of latents."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from dfkd_jax.diffusion import folder as folders
from dfkd_jax.diffusion import schedule as schedules
from dfkd_jax.diffusion import tokenizer as tokenizers
from dfkd_jax.diffusion.clip_text import CLIPText
from dfkd_jax.diffusion.fields import wholes
from dfkd_jax.diffusion.schedule import Schedule
from dfkd_jax.diffusion.unet import UNet
from dfkd_jax.diffusion.vae import AutoencoderKL
from dfkd_jax.errors import DiffusionError
from dfkd_jax.models.layers import Array, Dtype
from dfkd_jax.storage import files

# The schedule of Ho et al., for a UNet2DModel in a folder without a scheduler.
DDPM = {'_class_name': 'DDPMScheduler', 'beta_schedule': 'linear', 'beta_start': 1e-4,
        'beta_end': 0.02, 'num_train_timesteps': 1000, 'clip_sample': True}  # fmt: skip
LATENT = {'UNet2DConditionModel': 'unet', 'AutoencoderKL': 'vae', 'CLIPTextModel': 'text_encoder'}

SHIPPED = Path(__file__).parent / 'priors'  # small priors, each with its receipt.json

Frozen = dict[str, Any]  # parameters: 'unet', and of a latent prior 'vae' and 'text'


class Pure(NamedTuple):
    """The functions of a prior, with its parameters as an argument: those to compile.

    (What a compiled function closes over becomes a constant of the program: gigabytes, here.)
    All are differentiable.  When traced, they raise DiffusionError for shapes that do not fit.
    """

    eps: Callable[[Frozen, Array, Array, Array | None], Array]  # (frozen, x, t, cond) -> eps
    decode: Callable[[Frozen, Array], Array]  # (frozen, z) -> images
    encode: Callable[[Frozen, Array], Array]  # (frozen, tokens [B, 77]) -> text states


class Prior(NamedTuple):
    """A pretrained diffusion model.

    It diffuses x [B, h, w, c]: pixels in [-1, 1], or latents of about unit variance.

    Attributes:
      frozen: the parameters, float32, on the default device.
      pure: `eps`, `decode` and `encode` with `frozen` as their first argument.
      schedule: the tables for `dfkd_jax.diffusion.schedule`.
      shape: (h, w, c) in training; h and w are 0 where the folder does not say.
      divisor: h and w must be multiples of it.
      factor: the side of an image divided by that of x.
      tokenize: prompts to tokens int32 [B, 77]; None in a prior without a text encoder.
    """

    frozen: Frozen
    pure: Pure
    schedule: Schedule
    shape: tuple[int, int, int]
    divisor: int
    factor: int
    tokenize: Callable[[Sequence[str]], np.ndarray] | None

    def eps(self, x: Array, t: Array, cond: Array | None = None) -> Array:
        """The noise in x [B, h, w, c] at timesteps t [B], float32.

        cond: text states [B, 77, D] of a prior with a text encoder.
        """
        return self.pure.eps(self.frozen, x, t, cond)

    def decode(self, z: Array) -> Array:
        """From z [B, h, w, c], an x without noise, to images [B, H, W, 3] in [0, 1]."""
        return self.pure.decode(self.frozen, z)

    def encode(self, prompts: Sequence[str]) -> Array:
        """Text states [B, 77, D] of a list of prompts; '' is the empty prompt."""
        if self.tokenize is None:
            raise DiffusionError(
                'this prior diffuses pixels and has no text encoder: pass cond=None to `eps`.'
            )
        return self.pure.encode(self.frozen, jnp.asarray(self.tokenize(prompts)))


def load(folder: str | Path, dtype: Dtype = jnp.float32, remat: bool = False) -> Prior:
    """The prior in a folder of diffusers' format, or one that ships with this package.

    Args:
      folder: one of
        a pipeline: Stable Diffusion 1.x or 2.x (unet, vae, text_encoder, tokenizer, scheduler), or
          unet and scheduler;
        a UNet2DModel alone; its schedule is in scheduler_config.json beside it, or else the linear
          one of Ho et al.;
        a name in `shipped`.
      dtype: of the arithmetic in the U-Net and the decoder; outputs are float32.
      remat: recompute blocks in the backward pass: less memory, more time.

    Raises:
      DiffusionError: for a folder that is incomplete, damaged, or of a model that is not supported.
    """
    folder = SHIPPED / folder if folder in shipped() else files.expanded(folder)
    if not folder.is_dir():
        raise DiffusionError(
            f'there is no folder {folder}: check the path. The priors that ship with dfkd_jax are '
            f'{" and ".join(shipped())}: give the name alone.'
        )
    alone = (folder / 'config.json').is_file() and not (folder / 'unet').is_dir()
    home = folder if alone else folder / 'unet'
    kind = folders.read_json(home / 'config.json').get('_class_name')
    if kind == 'UNet2DConditionModel' and alone:
        raise DiffusionError(
            f'{folder} holds a UNet2DConditionModel alone: expected the folder above it, with '
            f'{", ".join(LATENT.values())}, tokenizer and scheduler.'
        )
    if not alone:
        _check_pipeline(folder)
    schedule = _schedule(folder, alone)
    if kind == 'UNet2DConditionModel':
        return _latent(folder, schedule, dtype, remat)
    return _pixel(home, schedule, dtype, remat)


def described(folder: str | Path) -> dict[str, Any]:
    """The name of a prior, and what it was trained on, by its receipt; None: not known."""
    place = SHIPPED / folder if folder in shipped() else files.expanded(folder)
    source = None
    if (place / 'receipt.json').is_file():
        receipt = folders.read_json(place / 'receipt.json')
        source, number = receipt.get('source'), receipt.get('images')
        if isinstance(source, dict):
            source = f'{number} images of {source.get("data")} ({source.get("made_by")})'
    return {'name': place.name, 'trained_on': source}


def shipped() -> list[str]:
    """The names of the priors that ship with this package; `load` takes them."""
    return sorted(path.parent.name for path in SHIPPED.glob('*/config.json'))


def _check_pipeline(folder: Path) -> None:
    """Raises DiffusionError for a pipeline with networks that would not be read."""
    path = folder / 'model_index.json'
    if not path.is_file():
        return
    known = {'unet', 'vae', 'text_encoder', 'tokenizer', 'scheduler', 'safety_checker',
             'feature_extractor', 'image_encoder'}  # fmt: skip
    extra = [
        name
        for name, value in folders.read_json(path).items()
        if name not in known and isinstance(value, list) and value and value[0] is not None
    ]
    if extra:
        raise DiffusionError(
            f'{path} lists {", ".join(extra)}: expected a pipeline of Stable Diffusion 1.x or 2.x, '
            'or of DDPM, with none of these.'
        )


def _schedule(folder: Path, alone: bool) -> Schedule:
    """The schedule of a pipeline, or of a U-Net alone."""
    path = folder / 'scheduler' / 'scheduler_config.json'
    if not path.is_file() and (alone or (folder / 'scheduler_config.json').is_file()):
        path = folder / 'scheduler_config.json'
        if not path.is_file():
            return schedules.from_config(DDPM)
    return schedules.from_config(folders.read_json(path), str(path))


def _shape(config: dict[str, Any], channels: int, where: str) -> tuple[int, int, int]:
    """(h, w, c) from `sample_size`, which is one side, both, or nothing."""
    size = config.get('sample_size')
    if not size:
        return 0, 0, channels
    sides = wholes(
        {'sample_size': size if isinstance(size, list) else [size]}, 'sample_size', where
    )
    return sides[0], sides[-1], channels


def _latent(folder: Path, schedule: Schedule, dtype: Dtype, remat: bool) -> Prior:
    """The prior of a pipeline with a VAE and a text encoder."""
    network, network_params = folders.load_unet(folder / 'unet', dtype, remat)
    vae, vae_params = folders.load_vae(folder / 'vae', dtype, remat)
    # Few prompts are encoded, and once: in float32, whatever the dtype of the rest.
    text, text_params = folders.load_text(folder / 'text_encoder')
    latent, width = vae.config.latent_channels, text.config.width
    if (network.config.in_channels, network.config.out_channels) != (latent, latent):
        raise DiffusionError(
            f'{folder}: the U-Net has {network.config.in_channels} channels in and '
            f'{network.config.out_channels} out, the VAE {latent} of latents: expected the same '
            '(inpainting and upscaling models, which have more, are not supported).'
        )
    if network.config.context != width:
        raise DiffusionError(
            f'{folder}: the U-Net has cross_attention_dim={network.config.context}, the text '
            f'encoder hidden_size={width}: expected the same. They are of different models.'
        )
    tokenize = tokenizers.load(
        folder / 'tokenizer', text.config.length, text.config.vocabulary
    )  # fmt: skip
    frozen = {'unet': network_params, 'vae': vae_params, 'text': text_params}
    config = folders.read_json(folder / 'unet' / 'config.json')
    return Prior(jax.device_put(frozen), latent_functions(network, vae, text, schedule),
                 schedule, _shape(config, latent, str(folder)), network.config.divisor,
                 vae.config.factor, tokenize)  # fmt: skip


def latent_functions(network: UNet, vae: AutoencoderKL, text: CLIPText, schedule: Schedule) -> Pure:
    """The functions of a prior of latents, whose `frozen` has 'unet', 'vae' and 'text'."""
    latent, width = vae.config.latent_channels, text.config.width

    def eps(frozen: Frozen, x: Array, t: Array, cond: Array | None) -> Array:
        _check_x(x, t, latent, network.config.divisor)
        if cond is None or cond.ndim != 3 or (cond.shape[0], cond.shape[2]) != (len(x), width):
            raise DiffusionError(
                f'cond is {None if cond is None else list(cond.shape)}: expected text states '
                f'[{len(x)}, {text.config.length}, {width}] of `encode`, one text per image.'
            )
        output = _apply(network, frozen['unet'], x, t, cond)
        return schedules.to_eps(schedule, output, x, t)

    def decode(frozen: Frozen, z: Array) -> Array:
        _check_z(z, latent)
        images = _apply(vae, frozen['vae'], z / vae.config.scaling, method='decode')
        return _unit(images)

    def encode(frozen: Frozen, tokens: Array) -> Array:
        return _apply(text, frozen['text'], tokens)

    return Pure(eps, decode, encode)


def _pixel(folder: Path, schedule: Schedule, dtype: Dtype, remat: bool) -> Prior:
    """The prior of a UNet2DModel."""
    network, params = folders.load_unet(folder, dtype, remat)
    channels = network.config.in_channels
    if network.config.out_channels != channels:
        raise DiffusionError(
            f'{folder}: the U-Net has {channels} channels in and {network.config.out_channels} '
            'out: expected the same (models that predict a variance too are not supported).'
        )

    def eps(frozen: Frozen, x: Array, t: Array, cond: Array | None) -> Array:
        _check_x(x, t, channels, network.config.divisor)
        if cond is not None:
            raise DiffusionError('this prior diffuses pixels and sees no text: pass cond=None.')
        output = _apply(network, frozen['unet'], x, t)
        return schedules.to_eps(schedule, output, x, t)

    def decode(frozen: Frozen, z: Array) -> Array:
        del frozen  # pixels are images already
        _check_z(z, channels)
        return _unit(z)

    def encode(frozen: Frozen, tokens: Array) -> Array:
        raise DiffusionError('this prior diffuses pixels and has no text encoder.')

    shape = _shape(folders.read_json(folder / 'config.json'), channels, str(folder))
    frozen = jax.device_put({'unet': params})  # jnp.asarray would compile a copy
    return Prior(
        frozen, Pure(eps, decode, encode), schedule, shape, network.config.divisor, 1, None
    )


def _apply(module: nn.Module, params: Any, *inputs: Array, method: str | None = None) -> Array:
    output: Any = module.apply({'params': params}, *inputs, method=method)
    return output


def _unit(images: Array) -> Array:
    """From [-1, 1] to [0, 1], clipped, float32."""
    return jnp.clip(images.astype(jnp.float32) / 2 + 0.5, 0.0, 1.0)


def _check_x(x: Array, t: Array, channels: int, divisor: int) -> None:
    if x.ndim != 4 or x.shape[3] != channels:
        raise DiffusionError(
            f'x is {list(x.shape)}: expected [B, h, w, {channels}], channels last.'
        )
    if x.shape[1] % divisor or x.shape[2] % divisor:
        raise DiffusionError(
            f'x is {x.shape[1]} by {x.shape[2]}: expected sides that are multiples of {divisor}, '
            'since the network halves them several times. Resize or pad it.'
        )
    if jnp.shape(t) != x.shape[:1]:
        raise DiffusionError(
            f't is {list(jnp.shape(t))}: expected one timestep per image, [{len(x)}].'
        )


def _check_z(z: Array, channels: int) -> None:
    if z.ndim != 4 or z.shape[3] != channels:
        raise DiffusionError(
            f'z is {list(z.shape)}: expected [B, h, w, {channels}], channels last.'
        )
