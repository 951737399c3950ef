"""Guards for files that come from others: no file may run code or exhaust the memory.

Weights are read only by readers that run no code (safetensors, NumPy without pickles, PyTorch with
`weights_only`).  The remaining danger is size: an archive of kilobytes that unpacks to gigabytes,
or JSON nested so deeply that the parser fails.
"""

from __future__ import annotations

import json
import os
import zipfile
from pathlib import Path
from typing import Any

JSON_BYTES = 2**26  # the largest JSON file of a diffusion model, a vocabulary, has one million
# Weights hardly compress.  Zeros do, but a small file of them does no harm.
UNPACKED_RATIO, UNPACKED_BYTES = 50, 2**26


class Refused(ValueError):
    """A file that is not read; the message is a clause for the parentheses of a longer one."""


def read_json(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The names and values of a JSON file.

    Raises OSError for a file that cannot be opened, ValueError for one that is not JSON, and
    Refused, which is a ValueError, for JSON that is not an object, is larger than 64 MiB, or is
    nested too deeply for the parser.
    """
    path = Path(path)
    size = path.stat().st_size
    if size > JSON_BYTES:
        raise Refused(f'it has {size:,} bytes, and no more than {JSON_BYTES:,} are read')
    try:
        found = json.loads(path.read_text(encoding='utf-8'))
    except RecursionError:
        raise Refused('it is nested too deeply') from None
    if not isinstance(found, dict):
        raise Refused(f'it holds a {type(found).__name__}: expected names and values')
    return found


def check_archive(path: str | os.PathLike[str]) -> None:
    """Raises Refused for a zip archive (.npz, .pth) that is damaged or a zip bomb.

    A zip bomb, here, is an archive whose directory lists more than 64 MiB and more than 50 times
    the size of the file; no reader unpacks more than the directory lists.  Other files pass.
    """
    if not zipfile.is_zipfile(path):
        return
    try:
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(member.file_size for member in archive.infolist())
    except zipfile.BadZipFile as error:
        raise Refused(str(error)) from error
    packed = Path(path).stat().st_size
    if unpacked > max(UNPACKED_RATIO * packed, UNPACKED_BYTES):
        raise Refused(
            f'its {packed:,} bytes would unpack to {unpacked:,}, which no weights do: a zip bomb'
        )
