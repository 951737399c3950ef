"""Published numbers, and ours beside them: renders ``published.md`` from ``published.csv``.

    python experiments/published.py [ROWS ...]

ROWS are ``rows.csv`` files that `compare.py` left.  A line of ``published.csv`` is one number as
its source prints it: method (its name here, if any), pair, accuracy in per cent, hours of
synthesis, source, tag and caveat.  Tags:

    repo        read in the authors' repositories
    issue       reported by a user in a public thread
    secondary   reported by somebody else
    inferred    our reading
    unknown     not available
"""

from __future__ import annotations

import argparse
import csv
import statistics
from pathlib import Path

from table import spread

HERE = Path(__file__).resolve().parent
HEAD = """# Published numbers, and ours

`python experiments/published.py` renders this page from [published.csv](published.csv);
[published.py](published.py) explains the tags. Accuracies are as the sources print them (their code
keeps the best epoch by test accuracy). Hours are of synthesis, on GPUs that the sources do not
name. We reproduced none of these numbers. A cell is empty where a number is not available, or where
we have not run."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('rows', nargs='*', type=Path, metavar='ROWS')
    args = parser.parse_args()
    ours = [row for path in args.rows for row in read(path) if row['last']]
    (HERE / 'published.md').write_text(render(read(HERE / 'published.csv'), ours))


def read(path: Path) -> list[dict[str, str]]:
    with open(path, newline='') as file:
        return list(csv.DictReader(file))


def render(published: list[dict[str, str]], ours: list[dict[str, str]]) -> str:
    """A table for each pair; our runs of a method go into its first row."""
    lines = [HEAD]
    told = set()
    for pair in dict.fromkeys(row['pair'] for row in published):
        lines += ['', f'## {pair}', '', '| | published, % | hours | ours, best, % | ours, seconds '
                  '| source | tag | caveat |', '|---' * 8 + '|']  # fmt: skip
        for row in (row for row in published if row['pair'] == pair):
            key = (pair, row['method'])
            runs = [run for run in ours if (run['pair'], run['method']) == key and key not in told]
            told.add(key)
            best, seconds = ([float(run[name]) for run in runs] for name in ('best', 'seconds'))
            cells = [row['name'], row['accuracy'], row['hours'], spread(best) if runs else '',
                     f'{statistics.mean(seconds):.0f}' if runs else '', row['source'], row['tag'],
                     row['soft']]  # fmt: skip
            lines.append(f'| {" | ".join(cells)} |')
    return '\n'.join(lines) + '\n'


if __name__ == '__main__':
    main()
