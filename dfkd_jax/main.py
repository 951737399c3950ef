"""Distil a student from a teacher without data.

    python -m dfkd_jax.main --config=configs/digits.py[:method[,flag]] [--workdir=DIR]
        [--config.any.field=value]

The same command with the same --workdir continues an interrupted run.
"""

from __future__ import annotations

import sys

from absl import app, flags
from ml_collections import config_flags

from dfkd_jax import train

CONFIG = config_flags.DEFINE_config_file(
    'config', None, 'The run: a file of configs/.', lock_config=True
)
WORKDIR = flags.DEFINE_string('workdir', None, 'Where it goes; default runs/<config>-<time>.')
flags.mark_flag_as_required('config')


def main(argv: list[str]) -> None:
    if argv[1:]:
        sys.exit(f'error: unexpected arguments {argv[1:]}; fields are set as --config.field=value.')
    try:
        train.run(CONFIG.value, WORKDIR.value)
    except train.EXPECTED_ERRORS as error:
        sys.exit(f'error: {error}')


if __name__ == '__main__':
    app.run(main)
