"""Attacks on the command line, on run folders, on data and on the file system, as tables of cases.

A case is a name and a function of a folder of its own. It returns None where the promise held, else what went wrong.
"""

from __future__ import annotations

import contextlib
import errno
import io
import itertools
import json
import os
import random
import shutil
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pyro_nbvae.cli import main
from pyro_nbvae.errors import InputError

Case = tuple[str, Callable[[Path], str | None]]
# A run of a second.
TINY = [
    *("--data", "digits", "--latents", "4", "--encoder", "linear", "--decoder", "linear"),
    *("--epochs", "2", "--train-size", "100", "--batch-size", "50"),
]
# What a message must not say: the words of a programming language.
PYTHON = ("Traceback", "NoneType", "<class", "Got errors", "type matching", "object at 0x", "Errno", "literal for int")


def call(*arguments: object) -> tuple[int, str, str]:
    """Exit code, output and errors of a command."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main([str(a) for a in arguments])
            code = 0
        except SystemExit as stop:
            code = int(stop.code or 0)
    return code, out.getvalue(), err.getvalue()


def wrong_message(code: int, err: str) -> str | None:
    """What is wrong with a refusal: it is code 2 and one plain line."""
    if code != 2:
        return f"exit code {code}: {err[-200:]!r}"
    err = err.rpartition("\r")[2]  # a progress bar that was wiped away
    if err.count("\n") != 1 or not err.startswith("nbvae: "):
        return f"not one line: {err[-300:]!r}"
    found = [word for word in PYTHON if word in err]
    return f"speaks Python ({', '.join(found)}): {err!r}" if found else None


def refused(*arguments: object) -> str | None:
    """None if the command is refused in one line."""
    code, _, err = call(*arguments)
    return wrong_message(code, err)


def works_or_refused(*arguments: object) -> str | None:
    """None if the command works, or is refused in one line."""
    code, _, err = call(*arguments)
    return None if code == 0 else wrong_message(code, err)


# --- command lines ---------------------------------------------------------------------------------------------------

_WHOLE = ["epochs", "latents", "batch-size", "train-size", "kl-samples", "max-count", "categories", "seed"]
_REAL = [
    *("lr", "prior-lr", "prior-mean", "beta", "clip", "temperature", "temperature-start", "anneal-epochs"),
    "kl-warmup",
]
_WORDS = [
    *("variant", "data", "likelihood", "estimator", "relaxation", "indicator", "encoder", "decoder", "preset"),
    "device",
]
_BAD_WHOLE = [
    *("-1", "1.5", "x", "", "1e3", "nan", "inf", "-inf", "1e400", "99999999999999999999999", "None ", "[1]"),
]
    return tensors, rows


def _whole(folder: Path) -> Path:
    return a_run(folder)


def file_system() -> Iterator[Case]:
    """A kill, and a full disk, at every step that touches the disk; then the same command, which must end bit-equal."""
    for step in range(1, 40):
        for kind in ("kill", "full disk"):

            def case(folder: Path, step: int = step, kind: str = kind) -> str | None:
                run = folder / "run"
                command = ["train", *TINY, "--variant", "EX-I", "--out", run]
                error = Killed() if kind == "kill" else OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                with failing(step, error), contextlib.suppress(Killed):
                    code, _, err = call(*command)
                    if kind == "full disk" and code and (problem := wrong_message(code, err)):
                        return problem
                code, _, err = call(*command, "--resume")
                if code:
                    return f"resume: exit code {code}: {err[-300:]}"
                if list(run.glob("*.part")):
                    return "a .part file is left"
                ours, theirs = _state(run), _state(a_run(folder))
                same = all(torch.equal(ours[0][k], v) for k, v in theirs[0].items()) and ours[1] == theirs[1]
                return None if same else "the resumed run differs"

            yield f"{kind} at step {step}", case


GROUPS: dict[str, Callable[[], Iterator[Case]]] = {
    "command lines": command_lines,
    "config.json": configurations,
    "checkpoint.pt": checkpoints,
    "other files of a run": leftovers,
    "data": data,
    "kills and full disks": file_system,
}
