"""Training by two processes under torchrun, over gloo, beside training by one."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from pyro_nbvae.study.folder import Run
from pyro_nbvae.study.training import noise_seed
from tests.two_processes import CONFIG, OTHERS

SCRIPT = Path(__file__).with_name("two_processes.py")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folders of one process and of two."""
    one, two = (tmp_path_factory.mktemp(name) for name in ("one", "two"))
    for command, out in (([], one), (["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"], two)):
        done = subprocess.run([sys.executable, *command, SCRIPT, out], capture_output=True, text=True)
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


def draws_of(state=None, seed=None):
    """What a state of torch's generator, or a seed, draws next."""
    with torch.random.fork_rng():
        if seed is not None:
            torch.manual_seed(seed)
        else:
            torch.set_rng_state(state)
        return tuple(torch.rand(8).tolist())


def test_processes_draw_different_noise(runs):
    """Each process has a stream of its own, kept in the checkpoint; none is that of the initialisation."""
    saved = [rng for rng, _ in Run(runs[1] / "EX-C").read_checkpoint()["rng"]]
    first = [torch.load(path, weights_only=True) for path in sorted(runs[1].glob("noise*.pt"))]
    assert len(saved) == len(first) == 2
    drawn = [*map(draws_of, saved), *(tuple(noise.tolist()) for noise in first), draws_of(seed=CONFIG.seed)]
    assert len(set(drawn)) == 5


@pytest.mark.parametrize("seed", [0, 1, 7, 12345, 2**31, 2**32 - 1])
def test_the_noise_of_every_process_is_another(seed):
    """And another than that of the initialisation, and than that of runs with seeds nearby."""
    seeds = [noise_seed(s % 2**32, rank) for s in (seed, seed + 1, seed + 2) for rank in range(64)]
    drawn = {draws_of(seed=s) for s in (*seeds, seed)}
    assert len(drawn) == len(seeds) + 1


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
