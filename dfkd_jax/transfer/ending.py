"""How the commands that measure features end: with a result or with one line."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any

from dfkd_jax import build
from dfkd_jax.transfer.measurement import Recipe


def measure(
    run: Callable[..., dict[str, Any]],
    parser: argparse.ArgumentParser,
    argv: Sequence[str] | None,
) -> tuple[dict[str, Any], str]:
    """Parses the arguments and calls `run`; returns the result and the words for whose weights.

    A mistake of the user ends the process with one line.
    """
    args = vars(parser.parse_args(argv))
    recipe = Recipe(**{name: args.pop(name) for name in Recipe._fields if name in args})
    try:
        result = run(**args, recipe=recipe)
    except build.EXPECTED_ERRORS as error:
        sys.exit(f'error: {error}')
    trained = 'untrained' if args['untrained'] else f'trained on {result["source_dataset"]}'
    return result, f'{result["model"]} ({trained})'
