"""Reads fields of a configuration, and refuses what makes no sense or is not supported."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from dfkd_jax.errors import DiffusionError

DEPTH = 256  # the most layers of a stage or of a text encoder


def field(config: Mapping[str, Any], name: str, where: str) -> Any:
    """A field that the architecture needs.  Raises DiffusionError where it is missing."""
    if config.get(name) is None:
        raise DiffusionError(
            f'{where} has no {name!r}: expected a whole config.json of diffusers or transformers. '
            'Copy it again from where the model was published.'
        )
    return config[name]


def whole(config: Mapping[str, Any], name: str, where: str, most: int = 2**20) -> int:
    """A positive whole number up to `most`, which no model comes near; else a DiffusionError."""
    value = field(config, name, where)
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
        raise DiffusionError(
            f'{where} has {name}={value!r:.40}: expected a positive whole number up to {most}.'
        )
    return value


def wholes(config: Mapping[str, Any], name: str, where: str) -> tuple[int, ...]:
    """A list of 1 to 16 positive whole numbers; else a DiffusionError."""
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
    """Refuses options that would change the model from the one that is built here.

    Args:
      config: the configuration in a model's folder.
      read: the names that the caller reads.
      options: for each other name, the values that change nothing; None: no value does.
      where: the file, for the error.

    Raises:
      DiffusionError: lists every option with another value, and every unknown option that is set.
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
            f'{where} has options that are not supported: {", ".join(wrong)}. Use a folder of '
            'Stable Diffusion 1.x or 2.x (text to image), or of an unconditional UNet2DModel such '
            'as ddpm-cifar10-32.'
        )
