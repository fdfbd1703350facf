"""Training by two processes under torchrun, over gloo, beside training by one."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from pyro_nbvae.runs.folder import Run
from tests.two_processes import OTHERS

SCRIPT = Path(__file__).with_name("two_processes.py")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folders of one process and of two."""
    one, two = (tmp_path_factory.mktemp(name) for name in ("one", "two"))
    for command, out in (([], one), (["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"], two)):
        done = subprocess.run([sys.executable, *command, SCRIPT, out], capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
    return one, two


def numbers(folder):
    return pd.read_csv(folder / "log.csv").drop(columns="seconds")


def test_two_processes_and_one_reach_the_same_loss(runs):
    """Without noise in the latents, within single precision's rounding: losses and parameters after 18 steps."""
    one, two = (folder / "noiseless" for folder in runs)
    pd.testing.assert_frame_equal(numbers(one), numbers(two), rtol=1e-5)
    first, second = (Run(folder).read_checkpoint() for folder in (one, two))
    for part in ("model", "guide"):
        for name, value in first[part].items():
            torch.testing.assert_close(second[part][name], value, rtol=1e-4, atol=1e-5)
    errors = numbers(one)["test_mse"]
    assert errors.iloc[-1] < errors.iloc[0]


def test_processes_draw_different_noise(runs):
    """Each process has a stream of its own, kept in the checkpoint."""
    states = [rng for rng, _ in Run(runs[1] / "EX-C").read_checkpoint()["rng"]]
    assert len(states) == 2 and not torch.equal(*states)


def test_two_processes_resume_to_the_same_numbers(runs):
    pd.testing.assert_frame_equal(numbers(runs[1] / "whole"), numbers(runs[1] / "resumed"))


def test_processes_that_see_different_runs_are_refused(runs):
    """Both stop, and rank 0, which alone finds the run on its disk, does not go on with it."""
    assert len(numbers(runs[0] / "disk0")) == 4 and len(numbers(runs[1] / "disk0")) == 3
    for rank in (0, 1):
        assert "differ in their trained epochs" in (runs[1] / f"error{rank}.txt").read_text()


@pytest.mark.parametrize("name", OTHERS)
def test_every_variant_trains_in_two_processes(name, runs):
    one, two = (numbers(folder / name)["test_mse"].iloc[-1] for folder in runs)
    assert np.isfinite(two) and two == pytest.approx(one, rel=0.2)
