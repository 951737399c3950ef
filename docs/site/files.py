"""A hook of MkDocs: pages may link any file of the repository, by its path as on GitHub.

README.md is the home page.  What a page links outside ``docs/`` becomes a part of the site:
Markdown a page, Python a page that shows it, anything else a copy.
"""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath
from posixpath import normpath, relpath
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[2]
LINK = re.compile(r'(?<=\]\()([^)\s#:]+)(?=[)#])')  # the target of [text](target#anchor)


def place(path: str) -> str:
    """Where a file of the repository, by its path there, is among the sources of the site."""
    if path == 'README.md':
        return 'index.md'
    if path.startswith('docs/'):
        return path.removeprefix('docs/')
    return f'{path}.md' if path.endswith('.py') else path


def targets(text: str, page: str) -> dict[str, str]:
    """The links of a page to files of the repository: as written -> path there."""
    folder = PurePosixPath(page).parent.as_posix()
    found = {link: normpath(f'{folder}/{link}') for link in LINK.findall(text)}
    return {link: path for link, path in found.items() if (ROOT / path).is_file()}


def shown(path: str) -> str:
    """A page that shows a source file."""
    code = f'```python\n{(ROOT / path).read_text()}```\n'
    return f'---\nsearch: {{exclude: true}}\n---\n# {path}\n\n{code}'


def on_files(files: Files, config: Any) -> Files:
    """Adds README and all files that pages link, and that those link in turn."""
    waiting = ['README.md', *(f'docs/{file.src_uri}' for file in files.documentation_pages())]
    known = set(waiting)
    while waiting:
        path = waiting.pop()
        if path.endswith('.py'):
            files.append(File.generated(config, place(path), content=shown(path)))
        elif not path.startswith('docs/'):
            files.append(File.generated(config, place(path), abs_src_path=str(ROOT / path)))
        if path.endswith('.md'):
            new = set(targets((ROOT / path).read_text(), path).values()) - known
            known |= new
            waiting += sorted(new)
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Turns links to files of the repository into links to their places in the site."""
    here = page.file.src_uri
    path = 'README.md' if here == 'index.md' else f'docs/{here}'
    if not (ROOT / path).is_file():
        path = here
    links = targets(markdown, path)
    folder = PurePosixPath(here).parent.as_posix()

    def moved(match: re.Match[str]) -> str:
        link = match[1]
        return relpath(place(links[link]), folder) if link in links else link

    return LINK.sub(moved, markdown)
