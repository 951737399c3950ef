"""What a run reveals of the images that its teacher was trained on: membership inference.

    python -m dfkd_jax.audit RUN [--data_dir=DIR] [--dataset=NAME] [--teacher=FILE]
        [--images=10000] [--seed=0] [--overwrite]

RUN is the --workdir of a finished run.  Members are images of the training split of its data set,
non-members those of the test split.  Three attacks call an image a member where the loss of a
network is low, or a synthetic image of the run is near (docs/privacy.md).

Writes audit.json and audit.md into RUN, and prints the table.  Real images are only measured on.
"""

from __future__ import annotations

from collections.abc import Sequence

from dfkd_jax.audit import measurement, table
from dfkd_jax.command import arguments
from dfkd_jax.errors import UserError
from dfkd_jax.storage import files


def main(argv: Sequence[str] | None = None, prog: str = 'python -m dfkd_jax.audit') -> None:
    """Audits a run and prints the table; a mistake of the user ends it with one line."""
    parser = arguments.make('audit', prog)
    args = parser.parse_args(argv)
    given = {name: value for name, value in vars(args).items() if name != 'run'}
    try:
        found = measurement.run(args.run, **given)
    except (UserError, OSError) as error:
        parser.exit(1, f'error: {error}\n')
    print(table.render(found), end='')
    print(f'\nwrote {files.expanded(args.run) / measurement.FILE} and {measurement.TABLE}')


if __name__ == '__main__':
    main()
