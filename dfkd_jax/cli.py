"""The command line that the programs of a run share: flags, and mistakes told in one line."""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

import jax
from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from dfkd_jax import configs, native
from dfkd_jax.distributed import cores, processes
from dfkd_jax.errors import ConfigError, UserError
from dfkd_jax.storage import compiled, files
from dfkd_jax.storage import workdir as folder

CONTINUES = 'What was saved is whole: the same command continues from it.'


# 1. Configs


def config_names() -> list[str]:
    """The configs that ship: files of the folder ``configs/``, but for what they share."""
    modules = pkgutil.iter_modules(configs.__path__)
    return sorted(m.name for m in modules if not m.ispkg and not m.name.startswith('common'))


def load_config(argument: str) -> ConfigDict:
    """The config that `argument` names: ``NAME[:ARGUMENT]`` or ``PATH/FILE.py[:ARGUMENT]``.

    ``RUN/config.json``, which every run writes, is that run's config: it makes the run again.

    NAME is one that ships, and so is ``configs/NAME.py`` where there is no such file.  ARGUMENT
    goes to the file's `get_config`; for those that ship it is METHOD[,FLAG...].  A file of your own
    imports what they share: ``from dfkd_jax.configs import common``.
    Raises ConfigError where there is no such config, and where its file fails.
    """
    where, *rest = argument.split(':', 1)
    path = files.expanded(where)
    name = path.stem if path == Path('configs', f'{path.stem}.py') else where
    if path.suffix == '.json' and path.is_file():
        if rest:
            raise ConfigError(f'{where} is of a run, with its method: leave :{rest[0]} out.')
        config = folder.read_config(path)
        absent = [name for name in ('method', 'loop', 'data') if name not in config]
        if absent:
            raise ConfigError(
                f'{where} lacks {" and ".join(absent)}: expected the config.json that a '
                'distillation left in its --workdir.'
            )
        return config
    try:
        if path.suffix == '.py' and path.is_file():
            module = _module(path)
        elif name in config_names():
            module = importlib.import_module(f'dfkd_jax.configs.{name}')
        else:
            raise ConfigError(
                f'there is no config {where!r}: expected one of {", ".join(config_names())}, or '
                'the path of a file, PATH/FILE.py; after it, a method and flags: '
                "digits:nayer,smoke; or a run's config.json."
            )
        config = module.get_config(*rest) if hasattr(module, 'get_config') else None
    except UserError:
        raise
    except Exception as error:  # a file of the user's may fail in any way
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if frame.filename == str(path.absolute())]
        line = f', line {lines[-1]},' if lines else ''
        raise ConfigError(f'{where}{line} fails: {type(error).__name__}: {error}.') from error
    if not isinstance(config, ConfigDict):
        raise ConfigError(
            f'{where}: expected a function get_config that returns a ml_collections.ConfigDict.'
        )
    return config


def _module(path: Path) -> ModuleType:
    """A file as a module, which is not kept."""
    spec = importlib.util.spec_from_file_location('config_file', path)
    assert spec and spec.loader  # since its name ends with .py
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class _ConfigParser(flags.ArgumentParser):
    """Parses the value of ``--config``; ml_collections itself knows paths only."""

    def parse(self, argument: str) -> ConfigDict:
        try:
            return load_config(argument).lock()
        except UserError as error:
            raise flags.Error(str(error)) from error


# 2. Flags


def define_config(flag_values: flags.FlagValues = flags.FLAGS) -> flags.FlagHolder:
    """Defines ``--config``, whose fields can be set as ``--config.field=value``."""
    holder = config_flags.DEFINE_config_file(
        'config',
        help_string='The run: NAME or FILE.py, then [:method[,flag...]], e.g. digits:nayer,smoke.',
        flag_values=flag_values,
    )
    flag_values['config'].parser = _ConfigParser()
    return holder


CONFIG = define_config()
WORKDIR = flags.DEFINE_string('workdir', None, 'The folder to make, or to continue in.')
COMPILED = flags.DEFINE_string(
    'compiled', '', 'The folder of compiled programs (one in your cache folder); off: none.'
)
flags.mark_flag_as_required('config')


def launch(
    job: Callable[[Any, str | None], Any], argv: Sequence[str] | None = None, stopped: int = 0
) -> None:
    """Parses the flags and calls ``job(config, workdir)``; then ends the program.

    argv: the program and its flags; None: those of the process.
    stopped: the status where the job returns ``{}``: it was asked to stop, and saved.

    A mistake of the user, a disk that is full or cannot be written, and a second Ctrl-C end the
    program with `error: ...` and status 1 or 2, not a traceback.
    """

    def main(arguments: list[str]) -> int:
        logging.set_verbosity(logging.WARNING)
        if arguments[1:]:
            sys.exit(
                f'error: unexpected arguments {arguments[1:]}: fields are set as '
                '--config.field=value.'
            )
        compiled.keep(COMPILED.value)
        cores.spread(CONFIG.value)
        try:
            if 'distributed' in CONFIG.value:
                processes.join(CONFIG.value.distributed)
            if 'convolutions' in CONFIG.value:
                native.use(CONFIG.value.convolutions)
            done = job(CONFIG.value, WORKDIR.value and str(files.expanded(WORKDIR.value)))
            processes.leave()
            return stopped if done == {} else 0
        except UserError as error:
            _exit(str(error))
        except OSError as error:
            _exit(f'{error}. {CONTINUES}')
        except KeyboardInterrupt:
            _exit(f'interrupted at once. {CONTINUES}')
        except jax.errors.JaxRuntimeError:
            if not processes.several():
                raise
            processes.wait_for_the_end()
        except Exception as error:
            if processes.several():  # or the others would wait for this one
                traceback.print_exc()
                _exit(f'{type(error).__name__}: {error}')
            raise

    before = sys.argv
    try:
        if argv is not None:
            _forget()
            sys.argv = [*argv]  # where ml_collections looks for the fields of the config
        app.run(main, flags_parser=_parse)
    finally:
        if argv is not None:
            sys.argv = before
            _forget()


def _forget() -> None:
    """Flags as before they were parsed: a process may launch several jobs, one after the other."""
    for name in [name for name in flags.FLAGS if name.startswith('config.')]:
        delattr(flags.FLAGS, name)
    for name in ('config', 'workdir', 'role'):
        if name in flags.FLAGS:
            flags.FLAGS[name].unparse()


def _exit(why: str) -> NoReturn:
    if processes.several():
        processes.fail(why)
    sys.exit(f'error: {why}')


def _parse(arguments: list[str]) -> list[str]:
    try:
        return flags.FLAGS(arguments)
    except flags.Error as error:
        text = ' '.join(str(error).split())
        absent = re.search(r'flag --(\w+)=None', text)
        if absent:
            sys.exit(f'error: --{absent[1]} is missing. {flags.FLAGS[absent[1]].help}')
        sys.exit(f'error: {text}')
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        # ml_collections names a field that does not exist, or a value of the wrong type.
        text = ' '.join(str(error).replace('\\n', ' ').replace('\\', '').split()).strip('"')
        wrong = [argument for argument in arguments if argument.startswith('--config.')]
        sys.exit(f'error: no such field, or a value of another type, in {" ".join(wrong)}: {text}')
