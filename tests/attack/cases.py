"""Attacks on the command line, on run folders, on data and on the file system, as tables of cases.

A case is a name and a function of a folder of its own. It returns None where the promise held, else what went wrong.
"""

from __future__ import annotations

import contextlib
import dataclasses
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
from PIL import Image

from pyro_nbvae.errors import InputError
from pyro_nbvae.study.cli import main
from pyro_nbvae.study.config import TrainConfig
from pyro_nbvae.study.data import load
from pyro_nbvae.study.files import read_tensors

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
_BAD_REAL = ["-1", "x", "", "nan", "inf", "-inf", "1e400", "1,5", "1e99", "0x1", "1 2", "--", "None "]
_BAD_WORD = [
    *("", " ", "x", "β", "None ", "a b", "\n", "😀", "A" * 3000, "~nobody-here/x.npy", "-", "%s", "\x00"),
]


def command_lines() -> Iterator[Case]:
    """Flags with values that they do not take; commands and flags that do not exist; what is missing."""

    def train(*flags: str) -> Callable[[Path], str | None]:
        return lambda folder: refused("train", *TINY, "--variant", "MC-C", "--out", folder / "run", *flags)

    for name in _WHOLE:
        for value in (*_BAD_WHOLE, *(["0"] if name != "seed" else [])):
            yield f"train --{name} {value!r}", train(f"--{name}", value)
    for name in _REAL:
        for value in (*_BAD_REAL, *(["0"] if name != "kl-warmup" else [])):
            yield f"train --{name} {value!r}", train(f"--{name}", value)
    for name in _WORDS:
        for value in _BAD_WORD:
            yield f"train --{name} {value[:20]!r}", train(f"--{name}", value)
    for name in (*_WHOLE, *_REAL, *_WORDS, "out"):
        yield f"train --{name} without a value", train(f"--{name}")
        yield f"train --{name}s", train(f"--{name}s", "1")
        yield f"train --{name} twice over", train(f"--{name}", "1", "2")
    runs = {"evaluate": "samples importance-samples seed", "generate": "count seed", "reconstruct": "count seed"}
    for command, flags in runs.items():
        for name in flags.split():
            for value in (*_BAD_WHOLE, "-5", "1000000000000"):
                yield (
                    f"{command} --{name} {value!r}",
                    lambda folder, c=command, n=name, v=value: refused(c, a_run(folder), f"--{n}", v),
                )
        for value in _BAD_WORD:
            yield f"{command} {value[:20]!r}", lambda folder, c=command, v=value: refused(c, v)
            yield (
                f"{command} --device {value[:20]!r}",
                lambda folder, c=command, v=value: refused(c, a_run(folder), "--device", v),
            )
    for flag in ("scale", "variants", "data", "seeds", "features", "samples", "jobs", "cluster", "device"):
        for value in _BAD_WORD:
            yield (
                f"reproduce --{flag} {value[:20]!r}",
                lambda folder, f=flag, v=value: refused(
                    *("reproduce", "main", "--out", folder / "out", "--data", "digits", "--variants", "G-VAE"),
                    f"--{f}",
                    v,
                ),
            )
    for value in _BAD_WORD:
        for words in (("data", "check"), ("export",), ("reproduce",), ("data",), ("--import",), ()):
            yield f"{' '.join(words)} {value[:20]!r}", lambda folder, w=words, v=value: refused(*w, v)
    for words in ((), ("train",), ("evaluate",), ("generate",), ("reproduce",), ("data",), ("--import",)):
        yield f"nothing after {' '.join(words)!r}", lambda folder, w=words: refused(*w)


_RUN: dict[str, Path] = {}


def a_run(folder: Path) -> Path:
    """A copy, in a folder, of one run that is trained once."""
    if "run" not in _RUN:
        run = folder.parent / "the-run"
        code, _, err = call("train", *TINY, "--variant", "EX-I", "--out", run)
        assert code == 0, err
        _RUN["run"] = run
    copy = folder / "copy"
    if not copy.exists():
        shutil.copytree(_RUN["run"], copy)
    return copy


# --- run folders -----------------------------------------------------------------------------------------------------

_VALUES: list[Any] = [None, True, -1, 0, 1.5, 1e300, "", "x", "1", [], [1], {}, {"a": 1}, "conv", [None], 10**30]


def configurations() -> Iterator[Case]:
    """config.json with keys missing, of other types and values, and cut or overwritten at random places."""

    def changed(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], str | None]:
        def case(folder: Path) -> str | None:
            path = a_run(folder) / "config.json"
            stored = json.loads(path.read_text())
            new = change(stored)
            path.write_text(json.dumps(stored if new is None else new))
            return works_or_refused("generate", path.parent, "--count", 2)

        return case

    keys = [*(f.name for f in dataclasses.fields(TrainConfig)), "event_shape", "schema_version"]
    for key in keys:
        yield f"config without {key}", changed(lambda c, k=key: c.pop(k, None) and None)
        for value in _VALUES:
            yield f"config {key} = {value!r}", changed(lambda c, k=key, v=value: c.__setitem__(k, v))
    for value in _VALUES:
        yield f"config is {value!r}", changed(lambda c, v=value: v if v is not None else "null")
        yield f"config with {value!r} added", changed(lambda c, v=value: c.__setitem__(str(v), v))
    generator = random.Random(0)
    for k in range(120):
        place, byte = generator.random(), generator.randrange(256)

        def overwritten(folder: Path, place: float = place, byte: int = byte, cut: bool = k % 2 == 0) -> str | None:
            path = a_run(folder) / "config.json"
            text = bytearray(path.read_bytes())
            at = int(place * len(text))
            if cut:
                text = text[:at]
            else:
                text[at] = byte
            path.write_bytes(bytes(text))
            return works_or_refused("generate", path.parent, "--count", 2)

        yield f"config.json {'cut' if k % 2 == 0 else 'overwritten'} at {place:.3f}", overwritten


def checkpoints() -> Iterator[Case]:
    """checkpoint.pt with a bit turned over, cut, or replaced: none may be evaluated."""
    generator = random.Random(1)
    for k in range(400):
        place, bit, cut = generator.random(), generator.randrange(8), k % 4 == 0

        def damaged(folder: Path, place: float = place, bit: int = bit, cut: bool = cut) -> str | None:
            path = a_run(folder) / "checkpoint.pt"
            content = bytearray(path.read_bytes())
            at = int(place * len(content))
            if cut:
                content = content[:at]
            else:
                content[at] ^= 1 << bit
            path.write_bytes(bytes(content))
            return refused("generate", path.parent, "--count", 2)

        yield f"checkpoint.pt {'cut' if cut else f'bit {bit} turned'} at {place:.4f}", damaged
    others: dict[str, Any] = {"a number": 1, "a list": [1], "nothing": {}, "a tensor": torch.ones(3), "text": "x"}
    others |= {f"no {k}": k for k in ("model", "guide", "optimizer", "log", "rng")}
    for name, content in others.items():

        def replaced(folder: Path, content: Any = content, name: str = name) -> str | None:
            path = a_run(folder) / "checkpoint.pt"
            if name.startswith("no "):
                state = torch.load(path, weights_only=True)
                del state[content]
                torch.save(state, path)
            else:
                torch.save(content, path)
            return refused("evaluate", path.parent, "--samples", 10)

        yield f"checkpoint.pt holds {name}", replaced


def leftovers() -> Iterator[Case]:
    """metrics.json, log.csv and files of killed processes that are damaged or stale do no harm."""
    contents = [b"", b"{", b"null", b"[1]", "{}".encode("utf-16"), bytes(range(256)), b"\xff\xfe", b"1e999", b'"x"']
    for name, content in itertools.product(("metrics.json", "log.csv", "config.json.123.part"), contents):

        def evaluated(folder: Path, name: str = name, content: bytes = content) -> str | None:
            run = a_run(folder)
            (run / name).write_bytes(content)
            code, _, err = call("evaluate", run, "--samples", 10, "--importance-samples", 0)
            return None if code == 0 else f"exit code {code}: {err[-200:]}"

        yield f"{name} is {content[:10]!r}, then evaluate", evaluated

        def resumed(folder: Path, name: str = name, content: bytes = content) -> str | None:
            run = a_run(folder)
            (run / name).write_bytes(content)
            code, _, err = call("train", *TINY, "--variant", "EX-I", "--epochs", 3, "--out", run, "--resume")
            return None if code == 0 and not list(run.glob("*.part")) else f"exit code {code}: {err[-200:]}"

        yield f"{name} is {content[:10]!r}, then resume", resumed


# --- data ------------------------------------------------------------------------------------------------------------


def loaded(path: Path) -> str | None:
    """None if a path is read, or is refused in one line."""
    try:
        found = load(str(path))
    except InputError as error:
        return None if "\n" not in str(error) else f"several lines: {error}"
    return None if len(found.train) and len(found.test) else "empty data"


def _damaged(kind: str, folder: Path, good: np.ndarray) -> tuple[Path, Path]:
    """What is loaded, and the file of it that is damaged."""
    path = folder / f"x{kind}"
    if kind == ".npy":
        np.save(path, good)
    elif kind == ".npz":
        np.savez_compressed(path, train=good, test=good)
    else:
        for number in range(12):
            Image.fromarray((good[:4, :4] * 255).astype(np.uint8)).save(folder / f"{number}.png")
        return folder, folder / "7.png"
    return path, path


def data() -> Iterator[Case]:
    """Arrays and pictures that are cut, overwritten, or of shapes and types that are no data."""
    good = np.random.default_rng(0).random((30, 4)).astype(np.float32)
    generator = random.Random(2)
    for k in range(200):
        place, byte, kind = generator.random() ** 3, generator.randrange(256), (".npy", ".npz", ".png")[k % 3]

        def damaged(folder: Path, place: float = place, byte: int = byte, kind: str = kind, k: int = k) -> str | None:
            whole, path = _damaged(kind, folder, good)
            content = bytearray(path.read_bytes())
            at = int(place * len(content))
            if k % 2:
                content = content[:at]
            else:
                content[at] = byte
            path.write_bytes(bytes(content))
            return loaded(whole)

        yield f"{kind} {'cut' if k % 2 else f'byte {byte}'} at {place:.3f}", damaged
    arrays: dict[str, Any] = {
        "no dimension": np.float32(1),
        "one dimension": np.ones(30),
        "no observations": np.ones((0, 4)),
        "no elements": np.ones((30, 0)),
        "three observations": np.ones((3, 4)),
        "nan": np.full((30, 4), np.nan),
        "inf": np.full((30, 4), np.inf),
        "complex": np.ones((30, 4), complex),
        "text": np.full((30, 4), "x"),
        "bytes": np.full((30, 4), b"x"),
        "dates": np.zeros((30, 4), "datetime64[s]"),
        "records": np.zeros(30, [("a", int)]),
        "objects": np.full((30, 4), None),
        "half": np.ones((30, 4), np.float16),
        "big endian": np.ones((30, 4), ">f8"),
        "long": np.ones((30, 4), np.longdouble),
        "unsigned": np.ones((30, 4), np.uint64),
        "fortran": np.asfortranarray(np.ones((30, 4))),
    }
    for name, array in arrays.items():

        def saved(folder: Path, array: Any = array) -> str | None:
            np.save(folder / "x.npy", array, allow_pickle=True)
            return loaded(folder / "x.npy")

        yield f".npy of {name}", saved
        for labels in (np.ones(30, int), np.ones(29, int), np.ones(30), np.full(30, -1)):

            def with_labels(folder: Path, array: Any = array, labels: Any = labels) -> str | None:
                np.savez(folder / "x.npz", x=array, labels=labels)
                return loaded(folder / "x.npz")

            yield f".npz of {name}, labels {labels.dtype} {labels.shape} {labels[0]}", with_labels

    def empty_zip(folder: Path) -> str | None:
        zipfile.ZipFile(folder / "x.npz", "w").close()
        return loaded(folder / "x.npz")

    yield ".npz of nothing", empty_zip


# --- the file system -------------------------------------------------------------------------------------------------


class Killed(BaseException):
    """A process that ends at once: no handler of ours sees it, and nothing is cleaned up."""


@contextlib.contextmanager
def failing(step: int, error: BaseException) -> Iterator[list[int]]:
    """The ``step``-th call that opens for writing, flushes to disk or renames raises; counts the calls."""
    calls = [0]
    originals = {"replace": os.replace, "fsync": os.fsync}

    def guarded(original: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any, **options: Any) -> Any:
            calls[0] += 1
            if calls[0] == step:
                raise error
            return original(*arguments, **options)

        return run

    opened, unlink = Path.open, Path.unlink

    def guarded_open(self: Path, mode: str = "r", *arguments: Any, **options: Any) -> Any:
        if "w" in mode:
            calls[0] += 1
            if calls[0] == step:
                raise error
        return opened(self, mode, *arguments, **options)

    def guarded_unlink(self: Path, *arguments: Any, **options: Any) -> Any:
        if isinstance(error, Killed) and calls[0] >= step and self.suffix == ".part":
            return None  # whoever is killed removes nothing
        return unlink(self, *arguments, **options)

    try:
        for name, original in originals.items():
            setattr(os, name, guarded(original))
        Path.open, Path.unlink = guarded_open, guarded_unlink  # type: ignore[method-assign,assignment]
        yield calls
    finally:
        for name, original in originals.items():
            setattr(os, name, original)
        Path.open, Path.unlink = opened, unlink  # type: ignore[method-assign]


def _state(run: Path) -> tuple[Any, Any]:
    state = read_tensors(run / "checkpoint.pt")
    tensors = {f"{part}.{k}": v for part in ("model", "guide") for k, v in state[part].items()}
    rows = [{k: v for k, v in row.items() if k != "seconds"} for row in state["log"]]
    return tensors, rows


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
                    last = err.rstrip("\n").rpartition("\n")[2] + "\n"  # the bar stands above it
                    if kind == "full disk" and code and (problem := wrong_message(code, last)):
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
