"""`dfkd completion`: a script that a shell reads once; it asks nothing of Python afterwards."""

from __future__ import annotations

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


def words(name: str) -> str:
    """What can stand behind a subcommand: its flags, and names that are no flags."""
    beside = {'data': ['prepare'], 'completion': [*arguments.SHELLS]}.get(name, [])
    spelt = [
        f'{action.option_strings[-1]}{"" if action.nargs == 0 else "="}' for action in flags(name)
    ]
    return ' '.join([*beside, *spelt])


def bash() -> str:
    cases = '\n'.join(f'        {name}) words="{words(name)}" ;;' for name in SUBCOMMANDS)
    return f'''_dfkd() {{
    local words current="${{COMP_WORDS[COMP_CWORD]}}"
    if [ "$COMP_CWORD" = 1 ]; then
        COMPREPLY=($(compgen -W "{' '.join(SUBCOMMANDS)} --help --version" -- "$current"))
        return
    fi
    case "${{COMP_WORDS[1]}}" in
{cases}
    esac
    COMPREPLY=($(compgen -W "$words" -- "$current"))
    if [[ "${{COMPREPLY[0]}}" == *= ]]; then compopt -o nospace; fi
}}
complete -o default -F _dfkd dfkd'''


def zsh() -> str:
    summaries = '\n'.join(f"        '{name}:{_single(each.summary)}'" for name, each in
                          SUBCOMMANDS.items())  # fmt: skip
    cases = '\n'.join(f'        {name}) compadd -S "" -- {words(name)} ;;' for name in SUBCOMMANDS)
    return f"""#compdef dfkd
_dfkd() {{
    local -a subcommands=(
{summaries}
    )
    if (( CURRENT == 2 )); then
        _describe subcommand subcommands
        return
    fi
    case "$words[2]" in
{cases}
    esac
    _files
}}
compdef _dfkd dfkd"""


def fish() -> str:
    lines = [
        f"complete -c dfkd -n __fish_use_subcommand -f -a {name} -d '{_single(each.summary)}'"
        for name, each in SUBCOMMANDS.items()
    ]
    for name in SUBCOMMANDS:
        for action in flags(name):
            flag = action.option_strings[-1].removeprefix('--')
            value = '' if action.nargs == 0 else ' -r'
            if action.choices:
                value += f" -a '{' '.join(map(str, action.choices))}'"
            lines.append(
                f"complete -c dfkd -n '__fish_seen_subcommand_from {name}' -l {flag}{value} "
                f"-d '{_single(action.help or '')}'"
            )
    return '\n'.join(lines)


def _single(text: str) -> str:
    """A text within single quotes."""
    return ' '.join(text.split()).replace("'", '’')
