"""Trains a classifier on real data: teachers, and the upper bounds of every table.

    python -m dfkd_jax.teach --config=configs/fashion_mnist.py --workdir=DIR [--role=ROLE]

--role=teacher trains config.teacher.model; --role=student trains config.student.model, what a
student reaches with the real images and labels; --role=kd distils the teacher to the student on
the real images, what data-free distillation is measured against.  DIR is a model folder then:
``--config.teacher.checkpoint=DIR`` takes it.  The same command continues an interrupted run.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags

from dfkd_jax import cli, data
from dfkd_jax.command import arguments
from dfkd_jax.loops import Stopped, supervised
from dfkd_jax.storage import workdir as folder


def teach(config: Any, workdir: str | None) -> dict[str, Any]:
    """Trains as --role says, in `workdir`, and tells the accuracy; ``{}`` if asked to stop."""
    path, role = Path(str(workdir)), flags.FLAGS.role
    data.check(config.data, ('train', 'test'))
    mine = supervised.settings(config, role)
    with folder.claim(path, mine), folder.Interruption() as interrupted:
        try:
            trained = supervised.run(config, path, role, interrupted)
        except Stopped:
            return {}
    print(f'{trained["model"]}: {trained["accuracy"]:.2f} % on the test images; see {path}')
    return trained


def main(argv: Sequence[str] | None = None, prog: str = 'python -m dfkd_jax.teach') -> None:
    """Parses the flags and trains; as `dfkd teach`, a training that was stopped ends with 75."""
    if 'role' not in flags.FLAGS:
        flags.DEFINE_enum('role', 'teacher', supervised.ROLES, 'What to train, and how.')
        flags.mark_flag_as_required('workdir')
    if argv is None:
        cli.launch(teach)
    else:
        cli.launch(teach, [prog, *argv], arguments.STOPPED)


if __name__ == '__main__':
    main()
