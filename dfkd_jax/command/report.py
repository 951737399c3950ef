"""`dfkd report`: the page of a run again, or one page of several runs."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from dfkd_jax.command import arguments
from dfkd_jax.errors import DataError
from dfkd_jax.loops import supervised
from dfkd_jax.reporting import artifacts, metrics, page
from dfkd_jax.storage import files


def main(argv: Sequence[str], prog: str) -> None:
    """Makes a page, or prints the numbers in JSON."""
    args = arguments.make('report', prog).parse_args(argv)
    runs = named([load(files.expanded(each)) for each in args.runs])
    output = files.expanded(args.output) if args.output else None
    if args.json:
        print(json.dumps([files.plain(page.numbers(run)) for run in runs], indent=2,
                         ensure_ascii=False))  # fmt: skip
    elif len(runs) == 1:
        print(f'wrote {page.page(runs[0], output)}')
    else:
        print(f'wrote {page.comparison(runs, output or Path(page.COMPARISON))}')


def load(workdir: Path) -> page.Run:
    """A finished run.  Raises DataError or CheckpointError for a folder that holds none."""
    path = workdir / artifacts.SUMMARY
    if not path.is_file():
        raise DataError(
            f'{workdir} holds no finished run: there is no {artifacts.SUMMARY}. Expected the '
            '--workdir of one; the command that began it continues it to its end.'
        )
    summary = files.read_json(path, 'Remove it: the command that began the run writes it again.')
    if (workdir / 'distillation' / metrics.FILE).is_file():
        return page.Run(workdir, summary, supervised.curves(workdir / 'distillation'), 'epochs')
    return page.Run(workdir, summary, metrics.read(workdir))


def named(runs: Sequence[page.Run]) -> list[page.Run]:
    """The runs with a name each: of its folder, with those above where two are called the same."""
    found = [run.workdir.absolute().parts for run in runs]
    depth = 1
    while depth < max(map(len, found)):
        names = Counter(parts[-depth:] for parts in found)
        if max(names.values()) == 1:
            break
        depth += 1
    return [run._replace(name='/'.join(parts[-depth:])) for run, parts in zip(runs, found)]
