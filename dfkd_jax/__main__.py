"""The command `dfkd`: ``python -m dfkd_jax SUBCOMMAND ...``."""

import sys

from dfkd_jax.command.main import main

if __name__ == '__main__':
    sys.exit(main())
