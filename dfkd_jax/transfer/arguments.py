"""The arguments that both commands share, and how they end: with a result or with one line."""

# Arguments, not flags: as in `data` and `port`, there is no config here.

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any

from dfkd_jax import build
from dfkd_jax.transfer.measurement import Recipe


def make_parser(prog: str, description: str | None) -> argparse.ArgumentParser:
    """A parser of what every measurement asks: whose weights, which draws, and where to write."""
    parser = argparse.ArgumentParser(prog=prog, description=description,
                                     formatter_class=argparse.RawTextHelpFormatter)  # fmt: skip
    add = parser.add_argument
    add('--student', required=True, metavar='FOLDER', help="a run's workdir, or a model folder")
    add('--untrained', action='store_true', help='the control: the architecture, new weights')
    add('--seed', type=int, default=0, help='of new weights, batches and a validation part')
    add('--output', metavar='FILE.json', help='where to write the result')
    add('--data_dir', help='where data sets are kept; else $TFDS_DATA_DIR')
    add('--source_dataset', metavar='NAME', help='what a ported network was trained on')
    add('--image_size', type=int, metavar='PIXELS', help='of a ported network')
    return parser


def add_recipe(
    parser: argparse.ArgumentParser, defaults: Recipe, names: Sequence[str], use: str = ''
) -> None:
    """Adds fields of the recipe.  use: when they count, for the help."""
    for name in names:
        default = getattr(defaults, name)
        kind = float if isinstance(default, float) else int
        text = f'{use} (default {default})'.strip()
        parser.add_argument(f'--{name}', type=kind, default=default, help=text)


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
