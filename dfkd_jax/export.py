"""Takes a student out of the library.

    python -m dfkd_jax.export --student=RUN --format=FORMAT [--int8] [--output=FILE] [--overwrite]

RUN is the --workdir of a finished run, or a model folder.  FORMAT is onnx, stablehlo, safetensors
(Flax's names), torch (PyTorch's names) or litert.  --int8 quantises ONNX, calibrated on the run's
synthetic images.  The card of the file (classes, size, normalisation) is written beside it, as
FILE.json.
"""

from __future__ import annotations

from collections.abc import Sequence

from dfkd_jax.command import arguments
from dfkd_jax.deploy import run
from dfkd_jax.errors import UserError
from dfkd_jax.storage import files


def main(argv: Sequence[str] | None = None, prog: str = 'python -m dfkd_jax.export') -> None:
    """Exports and prints what was written; a mistake of the user ends it with one line."""
    parser = arguments.make('export', prog)
    args = parser.parse_args(argv)
    output = files.expanded(args.output) if args.output else None
    try:
        student = files.expanded(args.student)
        for line in run.export(student, args.format, args.int8, output, args.overwrite):
            print(line, flush=True)
    except (UserError, OSError) as error:
        parser.exit(1, f'error: {error}\n')


if __name__ == '__main__':
    main()
