"""Takes a student out of the library.

    python -m dfkd_jax.export --student=RUN --format=FORMAT [--int8] [--output=FILE] [--overwrite]

RUN is the --workdir of a finished run, or a model folder.  FORMAT is onnx, stablehlo, safetensors
(Flax's names), torch (PyTorch's names) or litert.  --int8 quantises ONNX, calibrated on the run's
synthetic images.  The card of the file (classes, size, normalisation) is written beside it, as
FILE.json.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from dfkd_jax.deploy import formats, run
from dfkd_jax.errors import UserError
from dfkd_jax.storage import files


def main(argv: Sequence[str] | None = None) -> None:
    """Exports and prints what was written; a mistake of the user ends it with one line."""
    parser = argparse.ArgumentParser(
        prog='python -m dfkd_jax.export', description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )  # fmt: skip
    parser.add_argument('--student', required=True, help='a finished run, or a model folder')
    parser.add_argument('--format', choices=[*formats.SUFFIXES], default='onnx')
    parser.add_argument('--int8', action='store_true', help='eight bits, as ONNX')
    parser.add_argument('--output', help='the file to make; without it, in RUN/export')
    parser.add_argument('--overwrite', action='store_true', help='replace a file that is there')
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
