"""The command `dfkd`: finds a subcommand, checks its flags, and calls it."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from dfkd_jax import __version__
from dfkd_jax.command import arguments
from dfkd_jax.command.arguments import SUBCOMMANDS
from dfkd_jax.errors import UserError


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a subcommand and returns its exit code; what it ends with itself is a SystemExit."""
    given = list(sys.argv[1:] if argv is None else argv)
    if given[:1] == ['help']:
        given = [*given[1:2], '--help']
    if not given or given[0] in ('-h', '--help'):
        print(overview())
        return arguments.DONE
    if given[0] in ('-V', '--version'):
        print(f'dfkd {__version__}')
        return arguments.DONE
    name, *rest = given
    if name not in SUBCOMMANDS:
        hint = arguments.near(name, [*SUBCOMMANDS])
        known = '' if hint else f': expected one of {", ".join(SUBCOMMANDS)}'
        print(f'error: no subcommand {name!r}{hint or known}. See `dfkd --help`.', file=sys.stderr)
        return arguments.USAGE
    if name != 'transfer':  # which has two kinds, and does this itself
        arguments.make(name).split(rest)  # a mistake is told before anything heavy is imported
    module, function = SUBCOMMANDS[name].run.split(':')
    try:
        run = getattr(importlib.import_module(module), function)
        return run(rest, f'dfkd {name}') or arguments.DONE
    except (UserError, OSError) as error:
        print(f'error: {error}', file=sys.stderr)
        return arguments.FAILED
    except KeyboardInterrupt:
        print('error: interrupted', file=sys.stderr)
        return arguments.INTERRUPTED


def overview() -> str:
    """The help of `dfkd` itself."""
    width = max(map(len, SUBCOMMANDS))
    lines = [f'  {name:{width}}  {each.summary}' for name, each in SUBCOMMANDS.items()]
    return '\n'.join((
        'usage: dfkd SUBCOMMAND [--flag=value ...]',
        '',
        'Data-free knowledge distillation: a student from a teacher, without its data.',
        '',
        *lines,
        '',
        '`dfkd SUBCOMMAND --help` has its flags and examples, `dfkd --version` the version.',
    ))  # fmt: skip
