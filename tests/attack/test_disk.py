"""A kill and a full disk at any step that touches the disk; the same command then ends as if nothing had happened."""

import contextlib
import errno
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyro_nbvae.study.folder import Run

from .common import TINY, call, check_refused, share
from .test_files import equal, weights


class Killed(BaseException):
    """A process that ends at once: no handler of ours sees it, and nothing is cleaned up."""


@contextlib.contextmanager
def failing(step, error):
    """The ``step``-th call that opens for writing, flushes to disk or renames raises."""
    calls = 0

    def guarded(original, counts=lambda *_: True):
        def run(*arguments, **options):
            nonlocal calls
            if counts(*arguments):
                calls += 1
                if calls == step:
                    raise error
            return original(*arguments, **options)

        return run

    def guarded_unlink(self, *arguments, **options):
        if not (isinstance(error, Killed) and calls >= step and self.suffix == ".part"):
            unlink(self, *arguments, **options)  # whoever is killed removes nothing

    unlink = Path.unlink
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "replace", guarded(os.replace))
        patch.setattr(os, "fsync", guarded(os.fsync))
        patch.setattr(Path, "open", guarded(Path.open, lambda self, mode="r", *_: "w" in mode))
        patch.setattr(Path, "unlink", guarded_unlink)
        yield


def log(run):
    return [{k: v for k, v in row.items() if k != "seconds"} for row in Run(run).read_checkpoint()["log"]]


# A run of two epochs has 15 such steps: three for each of config.json and, twice, checkpoint.pt and log.csv.
@share(50)
@given(st.integers(1, 16), st.sampled_from([Killed(), OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))]))
def test_a_kill_and_a_full_disk(trained, new_folder, step, error):
    run = new_folder() / "run"
    with failing(step, error), contextlib.suppress(Killed):
        code, _, err = call("train", *TINY, "--out", run)
        assert (code == 0) == (step == 16)
        if code:
            check_refused(code, err.rstrip("\n").rpartition("\n")[2] + "\n")  # the bar stands above it
    code, _, err = call("train", *TINY, "--out", run, "--resume")
    assert code == 0, err
    assert not list(run.glob("*.part"))
    assert equal(weights(run), weights(trained)) and log(run) == log(trained)
