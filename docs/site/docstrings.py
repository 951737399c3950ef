"""An extension of griffe: what docstrings list becomes a list of the page.

The package's docstrings describe arguments and fields as lines of their own, `name: what it is`,
with what does not fit indented below; and enumerate in indented blocks, in one column or two.
Equations and commands stay as they are written.
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


TWO_COLUMNS = re.compile(r'^(?P<names>[^\s,]+(?:, [^\s,]+)*)(?: {2,}(?P<text>.+))?$')
WRITTEN = re.compile(r' = |<-|^(python|from|import|apt|--|[A-Z]\w*/) ?', re.MULTILINE)


def enumerated(block: str) -> str:
    """An indented block as a list; as it is, if it holds equations or commands."""
    lines = [line[4:] for line in block.splitlines()]
    if WRITTEN.search('\n'.join(lines)):
        return block
    items: list[str] = []
    for line in lines:
        if line.startswith(' '):
            items.append(f'    {line.strip()}')
        elif match := TWO_COLUMNS.match(line):
            items.append(f'- `{match["names"]}`: {match["text"] or ""}'.rstrip())
        else:
            items.append(f'- {line}')
    return '\n'.join(items)


BLOCK = re.compile(r'(?<=\n\n) {4}\S.*(?:\n {4,}\S.*)*')


class Lists(griffe.Extension):
    """Applies both to every docstring."""

    def on_object(self, *, obj: Any, **_: Any) -> None:
        """Rewrites the docstring of one object, in place."""
        if obj.docstring:
            text = BLOCK.sub(lambda match: enumerated(match[0]), obj.docstring.value)
            obj.docstring.value = listed(text)
