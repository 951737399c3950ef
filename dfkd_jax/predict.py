"""Classifies images with a student.

    python -m dfkd_jax.predict --model=FILE IMAGE... [--top=5] [--json]

FILE is what `python -m dfkd_jax.export` wrote (.onnx, .stablehlo, .safetensors), a finished run or
a model folder.  The most probable classes of each image are printed, in per cent.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

from dfkd_jax.command import arguments
from dfkd_jax.deploy import run
from dfkd_jax.errors import UserError
from dfkd_jax.storage import files


def main(argv: Sequence[str] | None = None, prog: str = 'python -m dfkd_jax.predict') -> None:
    """Prints the classes of each image; exits with 1 where one could not be read."""
    parser = arguments.make('predict', prog)
    args = parser.parse_args(argv)
    try:
        model = files.expanded(args.model)
        paths = [files.expanded(image) for image in args.images]
        results = run.predict(model, paths, args.top)
    except (UserError, OSError) as error:
        parser.exit(1, f'error: {error}\n')
    if args.json:
        print(json.dumps([result._asdict() for result in results], indent=2, ensure_ascii=False))
    for result in results:
        if result.error:
            print(f'error: {result.error}', file=sys.stderr)
        elif not args.json:
            print(result.image)
            for answer in result.top:
                print(f'  {100 * answer["probability"]:6.2f} %  {answer["name"]}')
    if any(result.error for result in results):
        sys.exit(1)


if __name__ == '__main__':
    main()
