"""The command line that `main` and `teach` share: flags, and mistakes told in one line."""

from __future__ import annotations

import re
import sys
import traceback
from collections.abc import Callable
from typing import Any, NoReturn

import jax
from absl import app, flags, logging
from ml_collections import config_flags

from dfkd_jax import build
from dfkd_jax.distributed import processes
from dfkd_jax.errors import HostError

CONFIG = config_flags.DEFINE_config_file(
    'config', None, 'The run: FILE[:method[,flag...]], a file of configs/.', lock_config=True
)
WORKDIR = flags.DEFINE_string('workdir', None, 'The folder to make, or to continue in.')
flags.mark_flag_as_required('config')
CONTINUES = 'What was saved is whole: the same command continues from it.'
EXPECTED_ERRORS = (*build.EXPECTED_ERRORS, HostError)


def launch(job: Callable[[Any, str | None], Any]) -> None:
    """Parses the flags and calls ``job(config, workdir)``.

    A mistake of the user, a disk that is full or cannot be written, and a second Ctrl-C end the
    program with `error: ...` and status 1 or 2, not a traceback.
    """

    def main(arguments: list[str]) -> None:
        logging.set_verbosity(logging.WARNING)
        if arguments[1:]:
            sys.exit(
                f'error: unexpected arguments {arguments[1:]}: fields are set as '
                '--config.field=value.'
            )
        try:
            CONFIG.value.to_dict()  # a file that did not load is reported at its first use only
        except OSError as error:
            sys.exit(f'error: {" ".join(str(error).split())}')
        try:
            if 'distributed' in CONFIG.value:
                processes.join(CONFIG.value.distributed)
            job(CONFIG.value, WORKDIR.value)
            processes.leave()
        except EXPECTED_ERRORS as error:
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

    app.run(main, flags_parser=_parse)


def _exit(why: str) -> NoReturn:
    if processes.several():
        processes.fail(why)
    sys.exit(f'error: {why}')


def _parse(arguments: list[str]) -> list[str]:
    try:
        return flags.FLAGS(arguments)
    except flags.Error as error:
        # absl puts the traceback of a failing config file into its message; its end says it all.
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        absent = re.match(r'flag --(\w+)=None', lines[-1])
        if absent:
            sys.exit(f'error: --{absent[1]} is missing. {flags.FLAGS[absent[1]].help}')
        sys.exit(f'error: {lines[-1].removeprefix("ValueError: ")}')
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        # ml_collections names a field that does not exist, or a value of the wrong type.
        text = ' '.join(str(error).replace('\\n', ' ').replace('\\', '').split()).strip('"')
        wrong = [argument for argument in arguments if argument.startswith('--config.')]
        sys.exit(f'error: no such field, or a value of another type, in {" ".join(wrong)}: {text}')
