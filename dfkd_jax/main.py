"""Distil a student from a teacher without data.

    python -m dfkd_jax.main --config=configs/digits.py[:method[,flag]] [--workdir=DIR]
        [--config.any.field=value]

The same command with the same --workdir continues an interrupted run.
"""

from dfkd_jax import cli
from dfkd_jax.loops import alternating

if __name__ == '__main__':
    cli.launch(alternating.run)
