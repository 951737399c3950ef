"""Finds the weights of an architecture in what a file holds: under which key, behind which prefix.

Training scripts put a state dict under a key of their own (`net`, `model_state_dict`,
`state_dict_ema`, ...), and wrappers put prefixes before its names (`module.`, `_orig_mod.`,
`backbone.`, ...).  Neither is a list here.  A candidate is any dictionary of arrays, and any prefix
in it, under which all names of the architecture lie.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from dfkd_jax.storage.inert_pickle import Inert

DEPTH = 6  # of dictionaries in dictionaries


class Candidate(NamedTuple):
    """A place where all names of an architecture lie, or most of them.

    label: what chooses it, as in ``FILE#label``: keys and prefix, joined by dots.
    group: the dictionary.
    names: the architecture's name -> the dictionary's.
    prefix, head: before the names, and before those of the head where that differs.
    """

    label: str
    group: Mapping[str, Any]
    names: dict[str, str]
    prefix: str
    head: str

    def has(self, key: str) -> bool:
        """Whether a name lies under the prefix."""
        return key.startswith(self.prefix) or key.startswith(self.head)


def groups(content: Any) -> dict[str, dict[str, Any]]:
    """The dictionaries in a content that hold arrays, by the keys that lead to them."""
    return {
        '.'.join(keys): {str(key): value for key, value in each.items()}
        for keys, each in dictionaries(content)
        if any(is_array(value) for value in each.values())
    }


def modules(content: Any) -> list[tuple[str, ...]]:
    """The keys that lead to PyTorch modules that were pickled whole."""
    found = [keys for keys, each in dictionaries(content) for keys in _modules(keys, each)]
    return [()] if isinstance(content, Inert) and content.is_module else found


def _modules(keys: tuple[str, ...], each: Mapping) -> Iterator[tuple[str, ...]]:
    for key, value in each.items():
        if isinstance(value, Inert) and value.is_module:
            yield (*keys, str(key))


def dictionaries(content: Any, keys: tuple[str, ...] = ()) -> Iterator[tuple[tuple, Mapping]]:
    """All dictionaries in a content, itself first, with the keys that lead to them."""
    if isinstance(content, Mapping) and len(keys) < DEPTH:
        yield keys, content
        for key, value in content.items():
            yield from dictionaries(value, (*keys, str(key)))


def is_array(value: Any) -> bool:
    """Whether a value is an array or a tensor of any library."""
    return hasattr(value, 'shape') and hasattr(value, 'dtype')


def is_optimizers(label: str, content: Any) -> bool:
    """Whether the dictionary under these keys is a part of an optimiser's state dict."""
    for keys, each in dictionaries(content):
        if 'param_groups' in each and f'{label}.'.startswith('.'.join((*keys, 'state.'))):
            return True
    return False


def is_quantised(group: Mapping[str, Any]) -> bool:
    """Whether a dictionary holds quantised weights, which are no plain arrays."""
    return any(
        getattr(value, 'is_quantized', False)
        or (isinstance(value, Inert) and value.name == 'torch._utils._rebuild_qtensor')
        or str(key).endswith('._packed_params')
        for key, value in group.items()
    )


# `best_prec1`, `best_acc`, `acc1`, `test_accuracy`, `val/top1`, ...: letters and digits alone.
_ACCURACY = re.compile(
    r'(best|test|val|valid|validation|eval|final)*(prec|acc|accuracy|top)(1|top1)?'
)


def accuracy(content: Any) -> float | None:
    """The accuracy in per cent that a training script wrote beside the weights; None without one.

    A number of 1 or less is a share.  Of several numbers, the largest.
    """
    found = []
    for key, value in content.items() if isinstance(content, Mapping) else ():
        name = re.sub('[^a-z0-9]', '', str(key).lower())
        if not _ACCURACY.fullmatch(name):
            continue
        if is_array(value) and tuple(value.shape) == ():
            value = float(np.asarray(value))
        if isinstance(value, int | float) and math.isfinite(value):
            share = 100 * value if value <= 1 else value
            if 0 < share <= 100:
                found.append(float(share))
    return max(found, default=None)


def chosen(label: str, key: str) -> bool:
    """Whether ``FILE#key`` means the candidate of this label: all of it, or whole parts."""
    return f'.{key}.' in f'.{label}.'


def prefixes(keys: Iterable[str], name: str) -> list[str]:
    """What stands before `name` in keys that end with it, shortest first."""
    ends = (key.removesuffix(name) for key in keys if key == name or key.endswith(f'.{name}'))
    return sorted(ends, key=len)


def find(label: str, group: Mapping[str, Any], names: Iterable[str], head: str) -> list[Candidate]:
    """The candidates in a dictionary, those with the most names; [] if it has none of them.

    names: of the architecture.
    head: its last layer, which may lie elsewhere: ``backbone.conv1`` and ``head.fc``.
    """
    names = list(names)
    if not names:
        return []
    found = []
    heads = prefixes(group, f'{head}.weight') if head else []
    # The first layer may be the one that is missing, and blocks may have one of that name.
    for prefix in dict.fromkeys((*prefixes(group, names[0]), *heads, '')):
        for before in (prefix, *heads):
            held = {
                name: (before if head and name.startswith(f'{head}.') else prefix) + name
                for name in names
            }
            held = {name: key for name, key in held.items() if key in group}
            place = '.'.join(part for part in (label, prefix.rstrip('.')) if part)
            found.append(Candidate(place, group, held, prefix, before))
            if len(held) == len(names):
                break  # the head beside the rest, before any other
    most = max(len(each.names) for each in found)
    return [each for each in found if len(each.names) == most > 0]
