"""`dfkd completion`: a script that a shell reads once; it asks nothing of Python afterwards."""

from __future__ import annotations

import re
from argparse import Action
from collections.abc import Sequence

from dfkd_jax.command import arguments
from dfkd_jax.command.arguments import FIELDS, SUBCOMMANDS


def main(argv: Sequence[str], prog: str) -> None:
    """Prints the script of a shell."""
    shell = arguments.make('completion', prog).parse_args(argv).shell
    print({'bash': bash, 'zsh': zsh, 'fish': fish}[shell]())


def flags(name: str) -> list[Action]:
    """The flags of a subcommand; of both kinds of `transfer`."""
    parsers = [arguments.make(name)]
    if name == 'transfer':
        parsers.append(arguments.parser(arguments.transfer_dense, '', ''))
    found = {action.option_strings[-1]: action for parser in parsers for action in parser._actions
             if action.option_strings}  # fmt: skip
    return [action for flag, action in found.items() if not flag.startswith(FIELDS)]


BESIDE = {'data': ('prepare',), 'completion': arguments.SHELLS}  # words that are no flags


def values(action: Action) -> list[str]:
    """What can stand behind a flag; [] where that is a file, a number or a name."""
    if action.option_strings == ['--method']:
        return [*arguments.methods()]
    return [str(each) for each in action.choices or ()]


def bash() -> str:
    cases = []
    for name in SUBCOMMANDS:
        spelt = [f'{action.option_strings[-1]}{"" if action.nargs == 0 else "="}'
                 for action in flags(name)]  # fmt: skip
        words = ' '.join([*BESIDE.get(name, ()), *spelt])
        cases.append(f'        {name}) words="{words}" ;;')
    return f'''_dfkd() {{
    local words current="${{COMP_WORDS[COMP_CWORD]}}"
    if [ "$COMP_CWORD" = 1 ]; then
        COMPREPLY=($(compgen -W "{' '.join(SUBCOMMANDS)} --help --version" -- "$current"))
        return
    fi
    case "${{COMP_WORDS[1]}}" in
{chr(10).join(cases)}
    esac
    COMPREPLY=($(compgen -W "$words" -- "$current"))
    if [[ "${{COMPREPLY[0]}}" == *= ]]; then compopt -o nospace; fi
}}
complete -o default -F _dfkd dfkd'''


def zsh() -> str:
    summaries = '\n'.join(f"        '{name}:{_single(each.summary)}'" for name, each in
                          SUBCOMMANDS.items())  # fmt: skip
    cases = []
    for name in SUBCOMMANDS:
        specs = [_spec(action) for action in flags(name)]
        if name in BESIDE:
            specs.append(f"'1:word:({' '.join(BESIDE[name])})'")
        specs.append("'*:file:_files'")
        cases.append(f'        {name}) _arguments {" ".join(specs)} ;;')
    return f"""#compdef dfkd
_dfkd() {{
    local -a subcommands=(
{summaries}
    )
    if (( CURRENT == 2 )); then
        _describe subcommand subcommands
        return
    fi
    shift words
    (( CURRENT-- ))
    case "$words[1]" in
{chr(10).join(cases)}
    esac
}}
if [ "$funcstack[1]" = _dfkd ]; then _dfkd "$@"; else compdef _dfkd dfkd; fi"""


def _spec(action: Action) -> str:
    """A flag as zsh's `_arguments` takes it."""
    told = re.sub(r'([][:])', r'\\\1', _single(action.help or ''))
    flag = action.option_strings[-1]
    if action.nargs == 0:
        return f"'{flag}[{told}]'"
    known = values(action)
    behind = f'({" ".join(known)})' if known else '_files'
    return f"'{flag}=[{told}]:value:{behind}'"


def fish() -> str:
    lines = [
        f"complete -c dfkd -n __fish_use_subcommand -f -a {name} -d '{_single(each.summary)}'"
        for name, each in SUBCOMMANDS.items()
    ]
    for name in SUBCOMMANDS:
        condition = f"complete -c dfkd -n '__fish_seen_subcommand_from {name}'"
        if name in BESIDE:
            lines.append(f"{condition} -f -a '{' '.join(BESIDE[name])}'")
        for action in flags(name):
            flag = action.option_strings[-1].removeprefix('--')
            known = values(action)
            value = '' if action.nargs == 0 else f" -x -a '{' '.join(known)}'" if known else ' -r'
            lines.append(f"{condition} -l {flag}{value} -d '{_single(action.help or '')}'")
    return '\n'.join(lines)


def _single(text: str) -> str:
    """A text within single quotes."""
    return ' '.join(text.split()).replace("'", '’')
