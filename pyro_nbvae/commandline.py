"""How a command line of ours is parsed and run: one line and exit code 2 on bad input."""

from __future__ import annotations

import contextlib
import functools
import io
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import tyro
from tyro.conf import FlagCreatePairsOff

from pyro_nbvae import plugins
from pyro_nbvae.errors import InputError

CONFIG = (FlagCreatePairsOff,)


def _fail(program: str, message: str) -> NoReturn:
    print(f"{program}: {' '.join(message.split())}", file=sys.stderr)
    raise SystemExit(2)


def _unboxed(text: str) -> str:
    """The message of an error that the parser drew in a box or between rules: what follows the title's rule."""
    parts = re.split(r"[─-]{5,}", re.sub("[╭╮╰╯│]", " ", text))
    return " ".join(parts[1 if len(parts) > 2 else 0].split())


def deferred(command: Callable[..., None]) -> Callable[..., Callable[[], None]]:
    """The command as something that only takes its arguments, so that parsing is over before the work begins."""

    @functools.wraps(command)
    def take(*arguments: Any, **options: Any) -> Callable[[], None]:
        return functools.partial(command, *arguments, **options)

    return take


def run(parse: Callable[[], Callable[[], None]], program: str) -> None:
    """Parses, then runs. Exits with 2 and one line on bad input, with 130 when interrupted.

    Args:
        parse: reads the command line and returns what to do.
        program: its name, which messages begin with.
    """
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            call = parse()
    except SystemExit as stop:
        if stop.code:
            _fail(program, f"{_unboxed(complaint.getvalue()).rstrip('.')}; see {program} --help")
        raise
    except InputError as error:
        _fail(program, str(error))
    try:
        call()
    except InputError as error:
        _fail(program, str(error))
    except OSError as error:  # a full disk, a folder that may not be written
        _fail(program, f"{error.filename or 'a file'}: {error.strerror or error}")
    except KeyboardInterrupt:
        print(
            f"{program}: interrupted; the same command goes on where it was (nbvae train with --resume)",
            file=sys.stderr,
        )
        raise SystemExit(130) from None


def script(command: Callable[..., None]) -> None:
    """Runs a function as the command line of an experiment script."""

    def parse() -> Callable[[], None]:
        plugins.import_modules()
        return tyro.cli(deferred(command), config=CONFIG)

    run(parse, Path(sys.argv[0]).name)
