"""The one error of this package, and what reads a configuration's fields with it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from dfkd_jax.errors import DiffusionError

DEPTH = 256  # layers of a stage or of a text encoder, at most


def field(config: Mapping[str, Any], name: str, where: str) -> Any:
    """A field without which the architecture is not known."""
    if config.get(name) is None:
        raise DiffusionError(
            f'{where} has no {name!r}: expected a whole config.json of diffusers or transformers. '
            'Copy it again from where the model was published.'
        )
    return config[name]


def whole(config: Mapping[str, Any], name: str, where: str, most: int = 2**20) -> int:
    """A positive whole number, no more than `most`: of sizes that no model comes near."""
    value = field(config, name, where)
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
        raise DiffusionError(
            f'{where} has {name}={value!r:.40}: expected a positive whole number up to {most}.'
        )
    return value


def wholes(config: Mapping[str, Any], name: str, where: str) -> tuple[int, ...]:
    """A list of positive whole numbers, of one to 16."""
    values = field(config, name, where)
    if not isinstance(values, list | tuple) or not 1 <= len(values) <= 16:
        raise DiffusionError(
            f'{where} has {name}={str(values):.40}: expected a list of 1 to 16 numbers.'
        )
    return tuple(whole({name: value}, name, where) for value in values)


def neutral(
    config: Mapping[str, Any],
    read: Collection[str],
    options: Mapping[str, Collection[Any] | None],
    where: str,
) -> None:
    """Refuses options that would make the model another one than is built here.

    Args:
      config: of the folder.
      read: the names that the caller reads.
      options: the values of an option at which it changes nothing; None: whatever it says.
      where: the file, for the error.

    Raises:
      DiffusionError: listing every option with another value, and every unknown one that is set.
    """
    wrong = []
    for name, value in config.items():
        if name.startswith('_') or name in read:
            continue
        allowed = options.get(name, (None, False))
        if allowed is not None and value not in allowed:
            wrong.append(f'{name}={value!r} (only {" or ".join(map(repr, allowed))})')
    if wrong:
        raise DiffusionError(
            f'{where} asks for what is not supported: {", ".join(wrong)}. Supported are Stable '
            'Diffusion 1.x and 2.x (text to image) and unconditional UNet2DModel as of '
            'ddpm-cifar10-32: use a folder of one of those.'
        )
