"""Distil a student from a teacher without data.

    python -m dfkd_jax.main --config=configs/digits.py[:method[,flag]] [--workdir=DIR]
        [--config.any.field=value]

The same command with the same --workdir continues an interrupted run.
"""

from dfkd_jax import cli, loops

if __name__ == '__main__':
    cli.launch(loops.run)
