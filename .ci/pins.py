"""Versions to install: the oldest that setup.cfg allows, and those of a release.

    python .ci/pins.py oldest [EXTRA ...]   every lower bound, those of these extras too
    python .ci/pins.py frozen REPORT.json   all that pip would install

Both print a line name==version for each package.

REPORT.json is of `pip install --dry-run --ignore-installed --report REPORT.json .`
"""

from __future__ import annotations

import configparser
import json
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
REQUIREMENT = re.compile(r'(?P<name>[\w.-]+)(?:\[[\w,-]+\])?(?P<bounds>[^;#]*)')


def requirements(root: Path = ROOT, extras: Iterable[str] = ()) -> list[str]:
    """What an installation needs, with these extras: lines as setup.cfg and its file have them."""
    setup = configparser.ConfigParser()
    setup.read(root / 'setup.cfg')
    core = setup['options']['install_requires'].removeprefix('file:').strip()
    texts = [(root / core).read_text(), *(setup['options.extras_require'][x] for x in extras)]
    lines = [line.strip() for text in texts for line in text.splitlines()]
    return [line for line in lines if line and not line.startswith('#')]


def oldest(lines: Iterable[str]) -> dict[str, str]:
    """The lower bound of each requirement, by name; what has none is left out."""
    found = {}
    for line in lines:
        match = REQUIREMENT.match(line)
        lower = match and re.search(r'[>=]=\s*([\w.]+)', match['bounds'])
        if match and lower:
            found[match['name']] = lower[1]
    return found


def frozen(report: dict[str, Any]) -> dict[str, str]:
    """The versions in a report of pip, by name, without the package itself."""
    installed = [each for each in report['install'] if 'dir_info' not in each['download_info']]
    pairs = [(each['metadata']['name'], each['metadata']['version']) for each in installed]
    return dict(sorted(pairs, key=lambda pair: pair[0].lower()))


def main(argv: list[str]) -> None:
    """Prints a file of requirements."""
    match argv:
        case ['oldest', *extras]:
            pins = oldest(requirements(extras=extras))
        case ['frozen', report]:
            pins = frozen(json.loads(Path(report).read_text()))
        case _:
            sys.exit(__doc__)
    print('\n'.join(f'{name}=={version}' for name, version in pins.items()))


if __name__ == '__main__':
    main(sys.argv[1:])
