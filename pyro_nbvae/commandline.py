"""How a command line of ours is parsed and run: one line and exit code 2 on bad input."""

from __future__ import annotations

import contextlib
import functools
import io
import os
import re
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import tyro
from tyro.conf import FlagCreatePairsOff

from pyro_nbvae import plugins
from pyro_nbvae.errors import InputError, first_line

CONFIG = (FlagCreatePairsOff,)


def _fail(program: str, message: str) -> NoReturn:
    print(f"{program}: {' '.join(message.split())}", file=sys.stderr)
    raise SystemExit(2)


def _unboxed(text: str) -> str:
    """The message of an error that the parser drew in a box or between rules: what follows the title's rule."""
    parts = re.split(r"[─-]{5,}", re.sub("[╭╮╰╯│]", " ", text))
    return " ".join(parts[1 if len(parts) > 2 else 0].split())


# What the parser says, and the same in plain words.
_WHOLE, _NUMBER = "a whole number", "a number"
_PLAIN: list[tuple[str, str]] = [
    (
        r"Error parsing (\S+?): no type matching \{?None\}?\|INT could be instantiated from \['(.*?)'\].*",
        rf"\1 must be {_WHOLE}, got '\2'",
    ),
    (
        r"Error parsing (\S+?): no type matching \{?None\}?\|FLOAT could be instantiated from \['(.*?)'\].*",
        rf"\1 must be {_NUMBER}, got '\2'",
    ),
    (
        r"Error parsing (\S+?): invalid literal for int\(\) with base 10: '([^']{0,60}).*",
        rf"\1 must be {_WHOLE}, got '\2'",
    ),
    (r"Error parsing (\S+?): could not convert string to float: '([^']{0,60}).*", rf"\1 must be {_NUMBER}, got '\2'"),
    (r"Error parsing (\S+?): Could not find valid parse for arguments: \[(.*?)\].*", r"\1: \2 is not a valid value"),
    (r"invalid choice (.*?) for argument '(\S+?)'\. Expected one of \((.*?),?\).*", r"unknown \2 \1: choose from \3"),
    (r"Missing value for argument '(\S+?)'\..*", r"\1 needs a value"),
    (r"Missing from (nbvae \w+): (--\S+) (?:\S+) (.*?)\.? \(required\).*", r"\1 needs \2: \3"),
    (r"Missing from (nbvae \w+): (?:\S+) (.*?)\.? \(required\).*", r"\1 needs \2"),
    (r"Unrecognized options: (.*)", r"unknown option or argument: \1"),
]


def _in_plain_words(text: str) -> str:
    """A message of the parser without its types and Python's literals."""
    for pattern, plain in _PLAIN:
        found = re.fullmatch(pattern, text)
        if found:
            text = found.expand(plain)
            if ": choose from " in text:
                head, _, choices = text.partition(": choose from ")
                kept = [choice.strip(" '") for choice in choices.split(",")]
                text = f"{head}: choose from {', '.join(sorted(c for c in kept if c and c != 'None'))}"
            break
    return text


def deferred(command: Callable[..., None]) -> Callable[..., Callable[[], None]]:
    """The command as something that only takes its arguments, so that parsing is over before the work begins."""

    @functools.wraps(command)
    def take(*arguments: object, **options: object) -> Callable[[], None]:
        return functools.partial(command, *arguments, **options)

    return take


_GOES_ON = "the same command goes on where it was (nbvae train with --resume)"


class _Terminated(BaseException):
    """SIGTERM, as an exception: what is running is ended in order."""


def _terminate(number: int, frame: object) -> NoReturn:
    raise _Terminated


def _is_out_of_memory(error: BaseException) -> bool:
    text = str(error).lower()
    return isinstance(error, MemoryError) or any(
        words in text for words in ("not enough memory", "can't allocate memory", "out of memory", "bad_alloc")
    )


def run(parse: Callable[[], Callable[[], None]], program: str) -> None:
    """Parses, then runs. Exits with 2 and one line on bad input, with 130 when interrupted.

    Args:
        parse: reads the command line and returns what to do.
        program: its name, which messages begin with.
    """
    complaint = io.StringIO()
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed by the caller
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal without a letter shows another
    with contextlib.suppress(ValueError):  # not in the main thread
        signal.signal(signal.SIGTERM, _terminate)
    try:
        with contextlib.redirect_stderr(complaint):
            call = parse()
    except SystemExit as stop:
        if stop.code:
            _fail(program, f"{_in_plain_words(_unboxed(complaint.getvalue()).rstrip('.'))}; see {program} --help")
        raise
    except InputError as error:
        _fail(program, str(error))
    try:
        call()
    except InputError as error:
        _fail(program, str(error))
    except BrokenPipeError:  # whoever read the output has gone
        raise SystemExit(141) from None
    except OSError as error:  # a full disk, a folder that may not be written
        _fail(program, f"{error.filename or 'a file'}: {error.strerror or error}")
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        _fail(program, f"out of memory ({first_line(error)}): take a smaller --batch-size, --latents or --samples")
    except _Terminated:
        print(f"{program}: terminated; {_GOES_ON}", file=sys.stderr)
        raise SystemExit(143) from None
    except KeyboardInterrupt:
        print(f"{program}: interrupted; {_GOES_ON}", file=sys.stderr)
        raise SystemExit(130) from None


def script(command: Callable[..., None]) -> None:
    """Runs a function as the command line of an experiment script."""

    def parse() -> Callable[[], None]:
        plugins.import_modules()
        return tyro.cli(deferred(command), config=CONFIG)

    run(parse, Path(sys.argv[0]).name)
