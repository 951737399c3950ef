"""What the subcommands take: parsers, examples and exit codes, without importing anything heavy."""

from __future__ import annotations

import argparse
import difflib
import pkgutil
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, NoReturn

# Exit codes; docs/command.md has the table.
DONE, FAILED, USAGE, STOPPED, INTERRUPTED = 0, 1, 2, 75, 130

FORMATS = ('onnx', 'stablehlo', 'safetensors', 'torch', 'litert')
RESIZE = ('pad', 'resize', 'crop')
ROLES = ('teacher', 'student', 'kd')
PROTOCOLS = ('probe', 'finetune')
SHELLS = ('bash', 'zsh', 'fish')
FIELDS = '--config.'  # what absl parses: fields of a config


class Parser(argparse.ArgumentParser):
    """A parser that tells a mistake in one line, with near names, and ends with `USAGE`.

    fields: whether it leaves ``--config.FIELD=VALUE`` to absl.
    """

    fields = False

    def error(self, message: str) -> NoReturn:
        unknown = message.partition('unrecognized arguments: ')[2]
        if unknown:
            message = self._unexpected(unknown.split()[0])
        self.exit(USAGE, f'error: {message}. See `{self.prog} --help`.\n')

    def split(self, argv: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
        """The arguments, and those for absl; ends the program where one is not known."""
        args, more = self.parse_known_args(argv)
        for at, each in enumerate(more):
            # absl takes both --config.a=1 and --config.a 1.
            value = at > 0 and more[at - 1].startswith(FIELDS) and '=' not in more[at - 1]
            if self.fields and (each.startswith(FIELDS) or value):
                continue
            self.error(self._unexpected(each))
        return args, more

    def _unexpected(self, word: str) -> str:
        flags = [flag for action in _all(self) for flag in action.option_strings]
        known = flags if word.startswith('-') else []
        return f'unexpected {word!r}{near(word.partition("=")[0], known)}'


def _all(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """The arguments of a parser and of its own subcommands."""
    for action in parser._actions:
        yield action
        if isinstance(action, argparse._SubParsersAction):
            for each in action.choices.values():
                yield from _all(each)


def near(word: str, known: Sequence[str]) -> str:
    """What a misspelt word may have meant, as the end of a sentence; '' where nothing is near."""
    found = difflib.get_close_matches(word, known, n=3)
    return f': did you mean {" or ".join(found)}?' if found else ''


def methods() -> tuple[str, ...]:
    """The methods, by the names of their configs' files, of which none is imported."""
    from dfkd_jax import configs

    folders = [f'{folder}/methods' for folder in configs.__path__]
    return tuple(sorted(module.name for module in pkgutil.iter_modules(folders)))


def distill(parser: Parser) -> None:
    parser.fields = True
    add = parser.add_argument
    add('--teacher', metavar='FILE', help='weights, a model folder, or a whole network '
        '(.pt2, .onnx); FILE#KEY chooses among several sets of weights')  # fmt: skip
    add('--student', metavar='MODEL', help='the architecture of the student, e.g. wrn16_1')
    add('--method', metavar='METHOD[,FLAG...]', help=f'one of {", ".join(methods())} (default '
        'cpsc); nayer,smoke takes a minute')  # fmt: skip
    add('--data', metavar='FOLDER|NAME', help='real images to measure on, prepared by `dfkd data`; '
        'none are needed')  # fmt: skip
    add('--workdir', metavar='DIR', help='the folder to make, or to continue in')
    add('--config', metavar='NAME|FILE[:METHOD,...]',
        help="a config in place of the flags' own, or a run's config.json")  # fmt: skip
    add('--teacher_model', metavar='MODEL', help='the architecture of the teacher; found in the '
        'file where it is the only one that fits')  # fmt: skip
    add('--like', metavar='NAME', help='the config whose settings are taken (default: by the data, '
        'else by image size and classes)')  # fmt: skip
    add('--num_classes', type=int, metavar='N', help='found in the file')
    add('--channels', type=int, choices=(1, 3), help='of the images; found in the file')
    add('--image_size', type=int, metavar='PIXELS', help='the side of the images')
    add('--mean', metavar='X[,X,X]', help='of images in [0, 1], as the teacher was trained')
    add('--std', metavar='X[,X,X]', help='as --mean')
    add('--resize', choices=RESIZE, help='how real images come to that size')
    add('--seed', type=int, metavar='N', help='of the run (default 0)')


def teach(parser: Parser) -> None:
    parser.fields = True
    add = parser.add_argument
    add('--config', required=True, metavar='NAME|FILE[:METHOD]', help='data, networks, recipe')
    add('--workdir', required=True, metavar='DIR', help='the model folder to make or to continue')
    add('--role', choices=ROLES, default='teacher', help='what to train, and how')


def port(parser: Parser) -> None:
    add = parser.add_argument
    add('--model', required=True, help='a name in the model zoo, such as resnet34')
    add('--num_classes', type=int, default=10)
    add('--source', required=True, help='a file or folder of weights, of PyTorch, Hugging Face or '
        'Flax; FILE#KEY chooses among several sets of weights')  # fmt: skip
    add('--output', required=True, help='the model folder to make')
    add('--size', action='append', default=[], metavar='NAME=NUMBER',
        help="repeatable: channels, or a generator's sizes")  # fmt: skip


def evaluate(parser: Parser) -> None:
    add = parser.add_argument
    add('--model', required=True, help='an exported file, a run or a model folder')
    add('--data', metavar='FOLDER|NAME', help="the test images; without it, the model's own")
    add('--teacher', metavar='MODEL', help='also of this kind: the agreement with it')
    add('--batch_size', type=int, default=100, metavar='N')
    add('--json', action='store_true', help='print names and values in JSON')


def predict(parser: Parser) -> None:
    add = parser.add_argument
    add('--model', required=True, help='an exported file, a run or a model folder')
    add('--top', type=int, default=5, help='how many classes to print')
    add('--json', action='store_true', help='print a list in JSON')
    add('images', nargs='+', metavar='IMAGE')


def transfer(parser: Parser) -> None:
    whose(parser)
    add = parser.add_argument
    add('--dataset', required=True, metavar='NAME', help='the images to measure on')
    add('--protocol', required=True, metavar='|'.join(PROTOCOLS))
    add('--resize', default='resize', metavar='|'.join(RESIZE), help="to the network's size")
    add('--pooled', action='store_true', help='probe: pooled maps of all stages too')
    recipe(parser, {'epochs': 20, 'batch_size': 64, 'lr': 0.02, 'weight_decay': 5e-4,
                    'crop_padding': None}, 'finetune')  # fmt: skip


def transfer_dense(parser: Parser) -> None:
    whose(parser)
    add = parser.add_argument
    add('--scenes', required=True, metavar='FOLDER', help='train/ and test/, images/ and masks/')
    add('--size', type=int, default=64, help='pixels that scenes are resized to')
    add('--stages', type=int, default=3, help='how many maps the head sees, the last ones')
    add('--frozen', action='store_true', help='train the head alone')
    recipe(parser, {'epochs': 30, 'batch_size': 64, 'lr': 0.02, 'weight_decay': 5e-4})


def whose(parser: Parser) -> None:
    """What every measurement of features asks: whose weights, which draws, and where to write."""
    add = parser.add_argument
    add('--student', required=True, metavar='FOLDER', help="a run's workdir, or a model folder")
    add('--untrained', action='store_true', help='the control: the architecture, new weights')
    add('--seed', type=int, default=0, help='of new weights, batches and a validation part')
    add('--output', metavar='FILE.json', help='where to write the result')
    add('--data_dir', help='where data sets are kept; else $TFDS_DATA_DIR')
    add('--source_dataset', metavar='NAME', help='what a ported network was trained on')
    add('--image_size', type=int, metavar='PIXELS', help='of a ported network')


def recipe(parser: Parser, defaults: dict[str, float | None], use: str = '') -> None:
    """Fields of a training's recipe.  use: when they count, for the help."""
    for name, default in defaults.items():
        text = f'{use} (default {"the data set" if default is None else default})'.strip()
        kind = float if isinstance(default, float) else int
        parser.add_argument(f'--{name}', type=kind, default=default, help=text)


def export(parser: Parser) -> None:
    add = parser.add_argument
    add('--student', required=True, help='a finished run, or a model folder')
    add('--format', choices=FORMATS, default='onnx')
    add('--int8', action='store_true', help='eight bits, as ONNX')
    add('--output', help='the file to make; without it, in RUN/export')
    add('--overwrite', action='store_true', help='replace a file that is there')


def audit(parser: Parser) -> None:
    add = parser.add_argument
    add('run', metavar='RUN', help='the --workdir of a finished run')
    add('--data_dir', metavar='DIR', help='where data sets are kept; else where the run looked')
    add('--dataset', metavar='NAME', help="the teacher's images, where the run names none")
    add('--teacher', metavar='FILE', help="the teacher's file, if it has moved")
    add('--images', type=int, default=10_000, metavar='N',
        help='members, test images and synthetic images, at most (default 10000)')  # fmt: skip
    add('--seed', type=int, default=0, help='of draws of images, halves and the bootstrap')
    add('--overwrite', action='store_true', help='replace an audit that is there')


def report(parser: Parser) -> None:
    add = parser.add_argument
    add('runs', nargs='+', metavar='RUN', help='the --workdir of a finished run')
    add('--output', metavar='FILE', help='the page to make (default: report.html of one run, '
        'comparison.html for several)')  # fmt: skip
    add('--json', action='store_true', help='print the numbers of each run in JSON, make no page')


def data(parser: Parser) -> None:
    commands = parser.add_subparsers(required=True, metavar='prepare', parser_class=Parser)
    add = commands.add_parser('prepare', help='put a data set into a data folder').add_argument
    add('name', help='fashion_mnist, cifar10, ..., or a name for your own folder')
    add('--data_dir', required=True, help='where data sets are kept')
    add('--source', help='the folder or archive to make it from')


def doctor(parser: Parser) -> None:
    add = parser.add_argument
    add('--data_dir', metavar='DIR', help='where data sets are kept; else $TFDS_DATA_DIR')
    add('--json', action='store_true', help='print a list in JSON')


def completion(parser: Parser) -> None:
    parser.add_argument('shell', choices=SHELLS)


class Subcommand(NamedTuple):
    """summary: a line for the help.  run: ``module:function`` of ``(argv, prog)``."""

    summary: str
    arguments: Callable[[Parser], None]
    run: str
    examples: tuple[str, ...]


HERE = 'dfkd_jax.command'
SUBCOMMANDS = {
    'distill': Subcommand(
        'Distil a student from a teacher, without its data.',
        distill,
        f'{HERE}.distill:main',
        (
            'dfkd distill --teacher=resnet20.th --student=wrn16_1 --method=nayer \\\n'
            '      --image_size=32 --mean=0.485,0.456,0.406 --std=0.229,0.224,0.225',
            'dfkd distill --teacher=teacher.pt2 --student=resnet18 --data=cifar10 --workdir=run',
            'dfkd distill --config=cifar10:nayer --teacher=resnet34.pth --config.student.lr=0.1',
            'dfkd distill --config=run/config.json --workdir=again --config.seed=1',
        ),
    ),
    'teach': Subcommand(
        'Train a teacher, or an upper bound, on real data.',
        teach,
        'dfkd_jax.teach:main',
        (
            'dfkd teach --config=fashion_mnist --workdir=teacher',
            'dfkd teach --config=fashion_mnist --role=kd --workdir=bound \\\n'
            '      --config.teacher.checkpoint=teacher',
        ),
    ),
    'port': Subcommand(
        'Port weights of PyTorch, Hugging Face or Flax to a model folder.',
        port,
        'dfkd_jax.port.__main__:main',
        ('dfkd port --model=resnet34 --num_classes=10 --source=t.pth --output=teachers/r34',),
    ),
    'evaluate': Subcommand(
        'Measure the accuracy of a student, or of any exported file, class by class.',
        evaluate,
        f'{HERE}.evaluate:main',
        (
            'dfkd evaluate --model=RUN',
            'dfkd evaluate --model=RUN/export/student_int8.onnx --data=cifar10 --json',
            'dfkd evaluate --model=RUN --teacher=teachers/r34 --data=tfds/cifar10',
        ),
    ),
    'predict': Subcommand(
        'Classify images.',
        predict,
        'dfkd_jax.predict:main',
        (
            'dfkd predict --model=RUN cat.png dog.jpg',
            'dfkd predict --model=student.onnx --json *.png',
        ),
    ),
    'transfer': Subcommand(
        "Measure what a student's features are worth on other images, or (--scenes) on pixels.",
        transfer,
        f'{HERE}.transfer:main',
        (
            'dfkd transfer --student=RUN --dataset=cifar100 --protocol=probe',
            'dfkd transfer --student=RUN --scenes=FOLDER --frozen',
        ),
    ),
    'export': Subcommand(
        'Write a student as ONNX, StableHLO, safetensors, PyTorch or LiteRT.',
        export,
        'dfkd_jax.export:main',
        ('dfkd export --student=RUN --int8', 'dfkd export --student=RUN --format=stablehlo'),
    ),
    'audit': Subcommand(
        "Measure what a run reveals of the teacher's training images: membership inference.",
        audit,
        'dfkd_jax.audit.__main__:main',
        ('dfkd audit RUN', 'dfkd audit RUN --data_dir=DIR --teacher=resnet20.th --overwrite'),
    ),
    'report': Subcommand(
        'Make the page of a run again, or one page that compares several.',
        report,
        f'{HERE}.report:main',
        ('dfkd report RUN', 'dfkd report RUN1 RUN2 --output=both.html', 'dfkd report --json RUN*'),
    ),
    'data': Subcommand(
        'Prepare real images, to measure on or to train with.',
        data,
        'dfkd_jax.data.__main__:main',
        (
            'dfkd data prepare fashion_mnist --data_dir=DIR',
            'dfkd data prepare my_set --data_dir=DIR --source=FOLDER_OF_CLASS_FOLDERS',
        ),
    ),
    'doctor': Subcommand(
        'Say what is here, what will not run, and what mends it.',
        doctor,
        f'{HERE}.doctor:main',
        ('dfkd doctor', 'dfkd doctor --json'),
    ),
    'completion': Subcommand(
        'Print the completion of a shell.',
        completion,
        f'{HERE}.completion:main',
        (
            'eval "$(dfkd completion bash)"           # in ~/.bashrc',
            'dfkd completion zsh > ~/.zfunc/_dfkd     # a folder of $fpath',
            'dfkd completion fish > ~/.config/fish/completions/dfkd.fish',
        ),
    ),
}


def make(name: str, prog: str | None = None) -> Parser:
    """The parser of a subcommand.  prog: how it was called; default: ``dfkd NAME``."""
    found = SUBCOMMANDS[name]
    return parser(found.arguments, prog or f'dfkd {name}', found.summary, found.examples)


def parser(
    arguments: Callable[[Parser], None], prog: str, summary: str, examples: Sequence[str] = ()
) -> Parser:
    """A parser of these arguments, with examples at the end of its help."""
    more = ''.join(f'\n  {line}' for line in examples)
    made = Parser(
        prog=prog,
        description=summary,
        epilog=f'examples:{more}' if examples else None,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    arguments(made)
    if made.fields:
        made.allow_abbrev = False
        text = 'any field of the config, e.g. --config.student.lr=0.05'
        made.add_argument('--config.FIELD', dest='field', metavar='VALUE', help=text)
    return made
