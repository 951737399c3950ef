"""Model folders in diffusers' format: config.json says what to build, other files hold weights.

The module that config.json describes decides what the weight files must hold: the names and shapes
of its leaves, by `torch_name`, no fewer and no more.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import traverse_util

from dfkd_jax.diffusion import clip_text, unet, vae
from dfkd_jax.diffusion.clip_text import CLIPText
from dfkd_jax.diffusion.unet import UNet
from dfkd_jax.diffusion.vae import AutoencoderKL
from dfkd_jax.errors import DiffusionError
from dfkd_jax.models.layers import Dtype
from dfkd_jax.storage import safe_read

Params = dict[str, Any]
Shape = tuple[int, ...]

WEIGHTS = 'diffusion_pytorch_model'  # of diffusers' models; transformers' have 'model'
VARIANTS = ('fp16', 'bf16')  # preferred in this order where there is no file without a variant
FLOATS = ('F64', 'F32', 'F16', 'BF16')
LISTED = 1000  # the most names that an error lists for each kind of mistake

# diffusers' names of attention before 2023, as in Stable Diffusion's VAE and ddpm-cifar10-32.
LEGACY = {'query': 'to_q', 'key': 'to_k', 'value': 'to_v', 'proj_attn': 'to_out.0'}
# Where transformers keeps the parts that are at the top of the text encoder here.
TEXT = {'layers.': 'encoder.', 'token_embedding.': 'embeddings.', 'position_emb': 'embeddings.'}
DROPPED = 'text_model.embeddings.position_ids'  # the numbers 0 to 76

# The axes of a PyTorch array in Flax's order, by the number of axes.
AXES: dict[int, Shape] = {1: (0,), 2: (1, 0), 4: (2, 3, 1, 0)}


class Slot(NamedTuple):
    """Where a PyTorch array lives in Flax."""

    path: str  # 'down_blocks_0/resnets_0/conv1/kernel'
    axes: Shape  # the PyTorch array's axes in Flax's order
    shape: Shape  # in PyTorch


# --- Models --------------------------------------------------------------------------------


def load_unet(
    folder: str | Path, dtype: Dtype = jnp.float32, remat: bool = False
) -> tuple[UNet, Params]:
    """The U-Net in a folder, and its parameters as float32 NumPy arrays.

    Args:
      folder: with config.json and diffusion_pytorch_model.safetensors (or in several files).
      dtype: of the arithmetic.
      remat: recompute blocks in the backward pass.

    Raises:
      DiffusionError: unless every array of the files is used exactly once and every parameter is
        filled with finite numbers of its shape.  It lists every mistake.
    """
    folder = Path(folder)
    where = folder / 'config.json'
    module = UNet(unet.from_config(read_json(where), str(where)), dtype, remat)
    return module, load_weights(folder, WEIGHTS, module)


def load_vae(
    folder: str | Path, dtype: Dtype = jnp.float32, remat: bool = False
) -> tuple[AutoencoderKL, Params]:
    """The autoencoder in a folder, as `load_unet`."""
    folder = Path(folder)
    where = folder / 'config.json'
    module = AutoencoderKL(vae.from_config(read_json(where), str(where)), dtype, remat)
    return module, load_weights(folder, WEIGHTS, module)


def load_text(folder: str | Path, dtype: Dtype = jnp.float32) -> tuple[CLIPText, Params]:
    """The text encoder in a folder (with model.safetensors), as `load_unet`."""
    folder = Path(folder)
    where = folder / 'config.json'
    module = CLIPText(clip_text.from_config(read_json(where), str(where)), dtype)
    return module, load_weights(folder, 'model', module)


def save_unet(
    folder: str | Path,
    config: Mapping[str, Any],
    params: Mapping[str, Any],
    scheduler: Mapping[str, Any] | None = None,
) -> None:
    """Writes a folder that `load_unet`, `dfkd_jax.diffusion.load` and diffusers read.

    Args:
      folder: gets config.json and diffusion_pytorch_model.safetensors; made if it does not exist.
      config: diffusers' configuration, with '_class_name'.
      params: of ``UNet(unet.from_config(config))``, of any float type, which is kept.
      scheduler: diffusers' configuration of a scheduler, for scheduler_config.json.

    Raises:
      DiffusionError: for a configuration that is not supported, or parameters that are not its.
    """
    import safetensors.numpy

    from dfkd_jax.diffusion import schedule
    from dfkd_jax.storage.files import write_bytes, write_json

    folder = Path(folder)
    module = UNet(unet.from_config(config, 'the given configuration'))
    if scheduler is not None:
        schedule.from_config(scheduler, 'the given scheduler')
    arrays = to_torch(module, params)
    # Weights first: a folder with config.json is a whole one.
    data = safetensors.numpy.save(arrays, metadata={'format': 'pt'})
    write_bytes(folder / f'{WEIGHTS}.safetensors', data)
    if scheduler is not None:
        write_json(folder / 'scheduler_config.json', dict(scheduler))
    write_json(folder / 'config.json', dict(config))


# --- Names ---------------------------------------------------------------------------------


def torch_name(path: str, text: bool = False) -> str:
    """The PyTorch name of a leaf: 'mid_block/attentions_0/to_out_0/kernel' is
    'mid_block.attentions.0.to_out.0.weight'.

    text: the leaf is the text encoder's.
    """
    module, _, leaf = path.rpartition('/')
    # `_N` at the end of a part is `.N`, except in the two linear layers of the time embedding.
    module = re.sub(r'(?<!linear)_(\d+)(?=/|$)', r'.\1', module).replace('/', '.')
    name = f'{module}.bias' if leaf == 'bias' else f'{module}.weight'
    if text:
        under = [there for here, there in TEXT.items() if name.startswith(here)]
        name = f'text_model.{"".join(under)}{name}'
    return name


def plan(module: nn.Module) -> dict[str, Slot]:
    """Where each PyTorch array of a module goes, by name; found by tracing `init`."""
    make: Any = type(module)
    return _slots(make, module.config)


@lru_cache(maxsize=32)
def _slots(make: Any, config: Any) -> dict[str, Slot]:
    module = make(config)
    inputs: tuple[Any, ...]
    if isinstance(module, CLIPText):
        inputs = (jax.ShapeDtypeStruct((1, config.length), jnp.int32),)
    elif isinstance(module, AutoencoderKL):
        shape = (1, config.factor, config.factor, config.in_channels)
        inputs = (jax.ShapeDtypeStruct(shape, jnp.float32),)
    else:
        side = config.divisor
        shapes = [(1, side, side, config.in_channels), (1,)]
        if config.context is not None:
            shapes.append((1, 1, config.context))
        inputs = tuple(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)

    try:
        found = jax.eval_shape(lambda *x: module.init(jax.random.key(0), *x), *inputs)
    except Exception as error:  # whatever layers raise for impossible sizes
        raise DiffusionError(
            f'no {make.__name__} can be built as config.json says ({error}): copy it again.'
        ) from error
    shapes = found['params']
    slots = {}
    for path, leaf in traverse_util.flatten_dict(shapes, sep='/').items():
        # The axes of a table of embeddings have the same order in both.
        axes = (0, 1) if path.endswith('/embedding') else AXES[leaf.ndim]
        shape = tuple(leaf.shape[i] for i in np.argsort(axes))
        slots[torch_name(path, isinstance(module, CLIPText))] = Slot(path, axes, shape)
    return slots


def to_torch(module: nn.Module, params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The PyTorch state dict of a module's parameters: contiguous, of their own types, bit for bit.

    Raises DiffusionError where they are not the module's, and lists every mistake.
    """
    slots = plan(module)
    leaves = traverse_util.flatten_dict(dict(params), sep='/')
    paths = {slot.path: tuple(slot.shape[i] for i in slot.axes) for slot in slots.values()}
    mistakes = {
        'missing': [path for path in paths if path not in leaves],
        'unexpected': [path for path in leaves if path not in paths],
        'mis-shaped': [f'{path} {np.shape(leaves[path])}, expected {shape}'
                       for path, shape in paths.items()
                       if path in leaves and np.shape(leaves[path]) != shape],
    }  # fmt: skip
    _report('the given parameters', mistakes)
    return {
        name: np.ascontiguousarray(np.asarray(leaves[slot.path]).transpose(np.argsort(slot.axes)))
        for name, slot in slots.items()
    }


# --- Files ---------------------------------------------------------------------------------


def load_weights(folder: Path, stem: str, module: nn.Module) -> Params:
    """The parameters of a module from the weight files of a folder, as float32 NumPy arrays.

    Raises DiffusionError as `load_unet`.
    """
    from safetensors import safe_open

    slots, leaves = plan(module), {}
    kinds = ('unexpected', 'mis-shaped', 'given twice', 'not floating-point', 'not finite')
    mistakes: dict[str, list[str]] = {kind: [] for kind in kinds}
    for path in _weight_files(folder, stem):
        try:
            with safe_open(path, 'np') as file:
                for key in file.keys():
                    if key == DROPPED and isinstance(module, CLIPText):
                        continue
                    slot = slots.get(_modern(key))
                    if slot is None:
                        mistakes['unexpected'].append(key)
                        continue
                    if slot.path in leaves:
                        mistakes['given twice'].append(key)
                        continue
                    leaves[slot.path], wrong = _read(file, key, slot)
                    for kind, text in wrong.items():
                        mistakes[kind].append(text)
        except Exception as error:  # safetensors raises its own type
            raise DiffusionError(
                f'{path} cannot be read ({error}): it is damaged, cut short, or a pointer to a '
                'large file that was not fetched. Copy it again.'
            ) from error
    missing = [name for name, slot in slots.items() if slot.path not in leaves]
    _report(f'{folder} as what its config.json describes', {'missing': missing} | mistakes)
    return traverse_util.unflatten_dict(leaves, sep='/')


def _read(file: Any, key: str, slot: Slot) -> tuple[np.ndarray | None, dict[str, str]]:
    """An array of a safetensors file as its leaf, float32; and what is wrong with it, by kind."""
    view = file.get_slice(key)
    shape = tuple(view.get_shape())
    if not _fits(_modern(key), shape, slot.shape):
        return None, {'mis-shaped': f'{key} {shape}, expected {slot.shape}'}
    if view.get_dtype() not in FLOATS:
        return None, {'not floating-point': f'{key} {view.get_dtype()}'}
    array = file.get_tensor(key).astype(np.float32).reshape(slot.shape)
    wrong = {} if np.isfinite(array).all() else {'not finite': key}
    return np.ascontiguousarray(array.transpose(slot.axes)), wrong


def _modern(name: str) -> str:
    """Today's name of an array, which may have a legacy name of attention."""
    module, _, leaf = name.rpartition('.')
    owner, _, last = module.rpartition('.')
    if last in LEGACY and re.search(r'attentions\.\d+$', owner):
        return f'{owner}.{LEGACY[last]}.{leaf}'
    return name


def _fits(name: str, shape: Shape, expected: Shape) -> bool:
    """Whether a shape is the one expected; attention may be stored as 1x1 convolutions."""
    if shape == (*expected, 1, 1) and re.search(r'attentions\.\d+\.to_\w+(\.0)?\.weight$', name):
        return True
    return shape == expected


def _weight_files(folder: Path, stem: str) -> list[Path]:
    """The files of one set of weights: a single one, or those that an index lists."""
    found: dict[str, Path] = {}
    for path in sorted(folder.glob(f'{stem}*')) if folder.is_dir() else ():
        single = re.fullmatch(rf'{stem}(?:\.([\w-]+))?\.safetensors', path.name)
        index = re.fullmatch(rf'{stem}\.safetensors\.index(?:\.([\w-]+))?\.json', path.name)
        match = single or index
        # 'model.fp16-00001-of-00002.safetensors' is a part of what an index lists.
        if match and not re.search(r'-\d+-of-\d+$', match[1] or ''):
            found.setdefault(match[1] or '', path)
    usual = [variant for variant in ('', *VARIANTS) if variant in found]
    chosen = found[usual[0]] if usual else next(iter(found.values()), None)
    if chosen is None:
        others = sorted(path.name for path in folder.glob(f'{stem}*')) if folder.is_dir() else []
        there = f'there is {", ".join(others)}' if others else 'there is nothing of that name'
        raise DiffusionError(
            f'{folder} has no {stem}.safetensors ({there}): expected one, or several with '
            f'{stem}.safetensors.index.json. Weights of other formats must be saved as safetensors '
            'first.'
        )
    if not usual and len(found) > 1:
        raise DiffusionError(
            f'{folder} has weights of {", ".join(found)}, and none without a variant: keep one of '
            'them.'
        )
    if chosen.suffix == '.safetensors':
        return [chosen]
    listed = read_json(chosen).get('weight_map')
    if not isinstance(listed, dict) or not listed:
        raise DiffusionError(f"{chosen} has no 'weight_map': copy it again.")
    names = sorted({str(name) for name in listed.values()})
    absent = [name for name in names if Path(name).name != name or not (folder / name).is_file()]
    if absent:
        raise DiffusionError(
            f'{folder} has no {", ".join(absent)}, which {chosen.name} lists: copy them there.'
        )
    return [folder / name for name in names]


def read_json(path: Path) -> dict[str, Any]:
    """The names and values in a JSON file of a model folder.

    Raises DiffusionError for a file that is missing, or is not JSON of names and values.
    """
    try:
        return safe_read.read_json(path)
    except FileNotFoundError:
        raise DiffusionError(
            f"there is no {path}: expected a model's folder in diffusers' format. Check the path, "
            'and that the whole folder was copied.'
        ) from None
    except (OSError, ValueError) as error:
        raise DiffusionError(f'{path} cannot be read as JSON ({error}): copy it again.') from error


def _report(where: str, mistakes: Mapping[str, list[str]]) -> None:
    """Raises one error with every mistake of every kind, if there are any."""
    mistakes = {kind: sorted(names) for kind, names in mistakes.items() if names}
    if not mistakes:
        return
    counts = ', '.join(f'{len(names)} {kind}' for kind, names in mistakes.items())
    lines = [f'cannot load {where}: {counts}.']
    for kind, names in mistakes.items():
        more = f', and {len(names) - LISTED} more' if len(names) > LISTED else ''
        lines.append(f'  {kind} ({len(names)}): {", ".join(names[:LISTED])}{more}')
    lines.append('The configuration and the weights are of different models, or incomplete.')
    raise DiffusionError('\n'.join(lines))
