"""An extension of griffe: `name: what it is` in a docstring becomes an item of a list.

The package's docstrings describe arguments and fields as lines of their own, with what does not fit
indented below.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

ITEM = re.compile(r'^(?P<names>\*{0,2}[a-z_]\w*(?:, \*{0,2}[a-z_]\w*)*): (?P<text>\S.*)$')
SECTIONS = ('Raises:', 'Args:', 'Returns:', 'Attributes:', 'Yields:')


def listed(text: str) -> str:
    """The docstring with its descriptions as a list."""
    lines: list[str] = []
    item = section = False
    for line in text.splitlines():
        if line in SECTIONS or (section and line.startswith(' ')):
            section, item = True, False
            lines.append(line)
        elif match := ITEM.match(line):
            if not item and lines and lines[-1]:
                lines.append('')
            lines.append(f'- `{match["names"]}`: {match["text"]}')
            item, section = True, False
        elif item and line.startswith(' '):
            lines.append(f'    {line.strip()}')
        else:
            if item and line:
                lines.append('')
            item = section = False
            lines.append(line)
    return '\n'.join(lines)


class Lists(griffe.Extension):
    """Applies `listed` to every docstring."""

    def on_object(self, *, obj: Any, **_: Any) -> None:
        """Rewrites the docstring of one object, in place."""
        if obj.docstring:
            obj.docstring.value = listed(obj.docstring.value)
