"""Error handling of all command lines: invalid input gives a line, or the parser's box, and exit status 2."""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import socket
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

import tyro
from tqdm import tqdm
from tyro.conf import FlagCreatePairsOff

from pyro_nbvae.errors import InputError
from pyro_nbvae.study import plugins
from pyro_nbvae.study.errors import first_line

CONFIG = (FlagCreatePairsOff,)


def _fail(program: str, message: str) -> NoReturn:
    # a name may hold characters that are not shown, or that move the cursor
    shown = "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in message)
    print(f"{program}: {shown}", file=sys.stderr)
    raise SystemExit(2)


def deferred(command: Callable[..., None]) -> Callable[..., Callable[[], None]]:
    """Wrap a command so that calling it only binds its arguments. Parsing then ends before the command runs."""

    @functools.wraps(command)
    def take(*arguments: object, **options: object) -> Callable[[], None]:
        return functools.partial(command, *arguments, **options)

    return take


_KEPT = "what was finished is kept; the same command goes on from there (nbvae train with --resume)"
# Seconds after SIGTERM in which contexts are closed; then the process ends in any case.
GRACE = 10.0


class _Terminated(BaseException):
    """SIGTERM as an exception, so that contexts are closed properly."""


def _terminate(number: int, frame: object) -> NoReturn:
    raise _Terminated


def _end_after_grace(program: str, signals: socket.socket) -> None:
    """End the process after SIGTERM, unless the other end of a socket, to which Python writes signals, is closed."""
    with signals:
        while (number := signals.recv(1)) != b"":
            if number[0] == signal.SIGTERM:
                signals.settimeout(GRACE)
                try:
                    while signals.recv(1) != b"":
                        pass
                except TimeoutError:
                    print(f"{program}: terminated; {_KEPT}", file=sys.stderr, flush=True)
                    os._exit(143)
                return


@contextlib.contextmanager
def _termination(program: str) -> Iterator[None]:
    """Context in which SIGTERM raises an exception; if that does not end the process, a thread does.

    A finalizer may swallow the exception, and a lock, or a library that waits for one, may delay it without end.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    signal.signal(signal.SIGTERM, _terminate)
    before = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    threading.Thread(target=_end_after_grace, args=(program, reader), daemon=True).start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        writer.close()


def _is_out_of_memory(error: BaseException) -> bool:
    text = str(error).lower()
    return isinstance(error, MemoryError) or any(
        words in text for words in ("not enough memory", "can't allocate memory", "out of memory", "bad_alloc")
    )


@contextlib.contextmanager
def _warnings_in_one_line(program: str) -> Iterator[None]:
    """Context in which a warning is one line on standard error."""
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, category, *_: tqdm.write(
            f"{program}: {first_line(message)}"
            if issubclass(category, (UserWarning, RuntimeWarning))
            else f"{program}: {category.__name__}: {first_line(message)}",
            file=sys.stderr,
        )
        yield


def run(parse: Callable[[], Callable[[], None]], program: str) -> None:
    """Parse and run a command line.

    On invalid input, print what is wrong and exit with status 2. Exit with 130 if interrupted, 143 if terminated.

    Args:
        parse: parses the command line and returns the command to call.
        program: name of the program, with which messages begin.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed by the caller
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # characters that the terminal cannot show are replaced
    try:
        with _termination(program):
            call = parse()
            with _warnings_in_one_line(program):
                call()
    except InputError as error:
        _fail(program, str(error))
    except BrokenPipeError:  # the reader of the output has closed it
        raise SystemExit(141) from None
    except OSError as error:  # for example a full disk or a folder without write permission
        _fail(program, f"{error.filename or 'a file'}: {error.strerror or error}")
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        _fail(program, f"out of memory ({first_line(error)}): reduce --batch-size, --latents or --samples")
    except _Terminated:
        print(f"{program}: terminated; {_KEPT}", file=sys.stderr)
        raise SystemExit(143) from None
    except KeyboardInterrupt:
        print(f"{program}: interrupted; {_KEPT}", file=sys.stderr)
        raise SystemExit(130) from None


def script(command: Callable[..., None]) -> None:
    """Run a function as the command line of an experiment script."""
    program = Path(sys.argv[0]).name

    def parse() -> Callable[[], None]:
        plugins.import_modules()
        return tyro.cli(deferred(command), prog=program, config=CONFIG)

    run(parse, program)
