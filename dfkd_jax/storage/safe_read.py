"""Files of others: read without running them, and refused where they are not what they claim.

Weights are only ever read as arrays, by readers that run nothing (safetensors, NumPy without
pickles, PyTorch with `weights_only`).  What is left to hurt is size: an archive of kilobytes that
unpacks to gigabytes, or a configuration nested until the parser gives up.
"""

from __future__ import annotations

import json
import os
import zipfile
from pathlib import Path
from typing import Any

JSON_BYTES = 2**26  # the largest of a model folder, a vocabulary, has one million
# Numbers of weights hardly compress; zeros do, and a small file of them is no harm.
UNPACKED_RATIO, UNPACKED_BYTES = 50, 2**26


class Refused(ValueError):
    """A file that is not what it should be; the message goes on after 'it'."""


def read_json(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The names and values of a JSON file.

    Raises OSError where it cannot be opened, ValueError where it is no JSON, and Refused, which is
    one, for anything but names and values, more than 64 MiB of them, or absurd nesting.
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
    """Raises Refused for a zip archive (.npz, .pth) that is damaged or a bomb.

    That is one whose directory promises 50 times the bytes of the file and more than 64 MiB: no
    reader unpacks more of a member than the directory says.  Other files pass.
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
