"""What `port.read` says of files: a line of FILE MODEL [CLASSES] in, a row of a table out.

PYTHONPATH=. python experiments/public_files.py < files.txt
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import jax

from dfkd_jax import port
from dfkd_jax.errors import UserError


def answer(source: str, model: str, num_classes: int = 10) -> str:
    """How many arrays were ported, and what was noted, or the one line that refuses the file."""
    try:
        ported = port.read(model, source, num_classes)
    except UserError as error:
        return str(error).replace(source, Path(source).name)
    return ' '.join((f'{len(jax.tree.leaves(ported.variables))} leaves', *ported.notes))


if __name__ == '__main__':
    print('| file | as | seconds | answer |\n|---|---|---|---|')
    for line in filter(str.strip, sys.stdin):
        source, model, *classes = line.split()
        start = time.perf_counter()
        said = answer(source, model, *map(int, classes))
        seconds = time.perf_counter() - start
        print(f'| {Path(source).name} | {model} | {seconds:.1f} | {said} |', flush=True)
