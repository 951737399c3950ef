"""Prepares data sets: ``python -m dfkd_jax.data prepare NAME --data_dir=DIR [--source=FOLDER]``."""

from __future__ import annotations

import argparse
import sys

from dfkd_jax.data import prepare
from dfkd_jax.errors import DataError


def main(argv: list[str] | None = None) -> None:
    """Prepares one data set and prints where it is."""
    parser = argparse.ArgumentParser(prog='python -m dfkd_jax.data', description=prepare.__doc__)
    commands = parser.add_subparsers(required=True, metavar='prepare')
    command = commands.add_parser('prepare', help='put a data set into a data folder')
    command.add_argument('name', help='fashion_mnist, cifar10, ..., or a name for your own folder')
    command.add_argument('--data_dir', required=True, help='where data sets are kept')
    command.add_argument('--source', help='the folder or archive to make it from')
    args = parser.parse_args(argv)
    try:
        place = prepare.prepare(args.name, args.data_dir, args.source)
    except (DataError, OSError) as error:
        sys.exit(f'error: {error}')
    print(f'{args.name} is in {place}')


if __name__ == '__main__':
    main()
