"""Prepares data sets: ``python -m dfkd_jax.data prepare NAME --data_dir=DIR [--source=FOLDER]``."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from dfkd_jax.command import arguments
from dfkd_jax.data import prepare
from dfkd_jax.errors import DataError


def main(argv: Sequence[str] | None = None, prog: str = 'python -m dfkd_jax.data') -> None:
    """Prepares one data set and prints where it is."""
    args = arguments.make('data', prog).parse_args(argv)
    try:
        place = prepare.prepare(args.name, args.data_dir, args.source)
    except (DataError, OSError) as error:
        sys.exit(f'error: {error}')
    print(f'{args.name} is in {place}')


if __name__ == '__main__':
    main()
