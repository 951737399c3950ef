"""State dicts as other tools leave them, in the form in which a plain module has them.

- PyTorch's pruning and its weight and spectral norms store a weight in parts, under names such as
  `weight_orig` and `weight_mask`.  They are put together as the layer does when it is called in
  evaluation.
- PaddlePaddle has PyTorch's names, but for the statistics of batch norms, and the kernels of its
  linear layers are transposed.

Sources: ``torch.nn.utils`` (`prune`, `weight_norm`, `spectral_norm`, `parametrizations`) and
``paddle.nn`` (`Linear`, `BatchNorm2D`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

Parts = dict[str, np.ndarray]

# What names a part of a weight, in its two spellings, and the part.
OLD, NEW = r'(.*)_(orig|mask|g|v|u)', r'(.*?)parametrizations\.(\w+)\.(original[01]?|0\._[uv])'
NAMED_ANEW = {'original': 'orig', 'original0': 'g', 'original1': 'v', '0._u': 'u', '0._v': 'v'}
# PaddlePaddle's table of its own names, in a saved state dict, and its batch statistics.
PADDLE = 'StructuredToParameterName@@'
MOST = 2**28  # numbers of one weight; a file's view of one number may claim to be many more
STATISTICS = {'_mean': 'running_mean', '_variance': 'running_var'}


def plain(group: Mapping[str, Any], as_float: Callable[[Any], Any]) -> dict[str, Any]:
    """A dictionary of arrays with its weights whole, and in PyTorch's names and order of axes.

    as_float: an array of any library -> NumPy's in float32, or None if that cannot be.
    """
    return _from_paddle(_whole(group, as_float))


def _whole(group: Mapping[str, Any], as_float: Callable[[Any], Any]) -> dict[str, Any]:
    places: dict[str, dict[str, str]] = {}
    for key in group:
        if match := re.fullmatch(NEW, key):
            places.setdefault(match[1] + match[2], {})[NAMED_ANEW[match[3]]] = key
        elif match := re.fullmatch(OLD, key):
            places.setdefault(match[1], {})[match[2]] = key
    whole = dict(group)
    for weight, keys in places.items():
        put_together = WAYS.get(frozenset(keys))
        if put_together is None or weight in group:
            continue
        arrays = [group[key] for key in keys.values()]
        if any(math.prod(getattr(x, 'shape', (0,))) > MOST for x in arrays):
            continue
        parts = {part: as_float(group[key]) for part, key in keys.items()}
        if any(array is None for array in parts.values()):
            continue
        # In float64, as the sums lose more than a rounding.
        made = put_together({part: array.astype(np.float64) for part, array in parts.items()})
        if made is not None:
            whole = {key: value for key, value in whole.items() if key not in keys.values()}
            whole[weight] = made
    return whole


def _pruned(parts: Parts) -> np.ndarray | None:
    return parts['orig'] * parts['mask'] if parts['orig'].shape == parts['mask'].shape else None


def _weight_norm(parts: Parts) -> np.ndarray | None:
    """A direction for each output, of length 1, times its length."""
    length, direction = parts['g'], parts['v']
    if length.ndim != direction.ndim or direction.ndim < 2:
        return None
    axes = tuple(axis for axis, size in enumerate(length.shape) if size == 1)
    return length * direction / np.sqrt(np.square(direction).sum(axes, keepdims=True))


def _spectral_norm(parts: Parts) -> np.ndarray | None:
    """Divided by the largest singular value, as the stored singular vectors have it."""
    kernel, u, v = parts['orig'], parts['u'], parts['v']
    matrix = kernel.reshape(len(kernel), -1) if kernel.ndim > 1 else kernel[None]
    return kernel / (u @ matrix @ v) if matrix.shape == (*u.shape, *v.shape) else None


WAYS: dict[frozenset[str], Callable[[Parts], np.ndarray | None]] = {
    frozenset(('orig', 'mask')): _pruned,
    frozenset(('g', 'v')): _weight_norm,
    frozenset(('orig', 'u', 'v')): _spectral_norm,
}


def _from_paddle(group: dict[str, Any]) -> dict[str, Any]:
    if PADDLE not in group and not any(key.endswith('._variance') for key in group):
        return group
    made = {}
    for key, value in group.items():
        place, dot, last = key.rpartition('.')
        if last == 'weight' and isinstance(value, np.ndarray) and value.ndim == 2:
            value = value.T
        if key != PADDLE:
            made[f'{place}{dot}{STATISTICS.get(last, last)}'] = value
    return made
