"""Training by two processes under torchrun, over gloo, beside training by one."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from pyro_nbvae.study.build import resolve
from pyro_nbvae.study.config import configure
from pyro_nbvae.study.data import load
from pyro_nbvae.study.folder import Run
from pyro_nbvae.study.processes import Processes
from pyro_nbvae.study.training import Trainer
from tests.two_processes import OTHERS, SEED, TINY

SCRIPT = Path(__file__).with_name("two_processes.py")


def numbers(folder):
    return pd.read_csv(folder / "log.csv").drop(columns="seconds")


def draws_of(state=None, seed=None):
    """What a state of torch's generator, or a seed, draws next."""
    with torch.random.fork_rng():
        if seed is not None:
            torch.manual_seed(seed)
        else:
            torch.set_rng_state(state)
        return tuple(torch.rand(8).tolist())


@pytest.mark.parametrize("seed", [0, 12345, 2**32 - 1])
def test_the_noise_of_every_process_is_another(seed, tmp_path):
    """And another than that of the initialisation, and than that of runs with seeds nearby."""
    digits, drawn = load("digits"), {draws_of(seed=seed)}
    for near in range(seed, seed + 3):
        config = resolve(configure("G-VAE", seed=near % 2**32, **TINY), digits.event_shape, digits)
        for rank in (0, 1, 63):
            with torch.random.fork_rng():
                Trainer(Run(tmp_path), config, digits, torch.device("cpu"), Processes(rank, 64))
                drawn.add(tuple(torch.rand(8).tolist()))
    assert len(drawn) == 10


def test_two_processes_beside_one(tmp_path):
    """All of two_processes.py, by one process and under torchrun: separate tests would each train again."""
    one, two = tmp_path / "one", tmp_path / "two"
    for command, out in (([], one), (["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"], two)):
        out.mkdir()
        done = subprocess.run([sys.executable, *command, SCRIPT, out], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr

    # without noise in the latents they reach the same losses and parameters, within single precision's rounding
    first, second = (folder / "noiseless" for folder in (one, two))
    pd.testing.assert_frame_equal(numbers(first), numbers(second), rtol=1e-5)
    states = [Run(folder).read_checkpoint() for folder in (first, second)]
    for part in ("model", "guide"):
        for name, value in states[0][part].items():
            torch.testing.assert_close(states[1][part][name], value, rtol=1e-4, atol=1e-5)
    errors = numbers(first)["test_mse"]
    assert errors.iloc[-1] < errors.iloc[0]

    # each process has a stream of noise of its own, kept in the checkpoint; none is that of the initialisation
    saved = [rng for rng, _ in Run(two / "whole").read_checkpoint()["rng"]]
    begun = [torch.load(path, weights_only=True) for path in sorted(two.glob("noise*.pt"))]
    assert len(saved) == len(begun) == 2
    drawn = [*map(draws_of, saved), *(tuple(noise.tolist()) for noise in begun), draws_of(seed=SEED)]
    assert len(set(drawn)) == 5

    # two processes resume to the same numbers, with a part held out to validate
    pd.testing.assert_frame_equal(numbers(two / "whole"), numbers(two / "resumed"))
    assert "validation_elbo" in numbers(two / "whole")

    # if they see different runs, both stop, and rank 0, which alone finds the run on its disk, does not go on with it
    assert len(numbers(one / "disk0")) == 4 and len(numbers(two / "disk0")) == 3
    for rank in (0, 1):
        assert "differ in their trained epochs" in (two / f"error{rank}.txt").read_text()

    for name in OTHERS:
        alone, together = (numbers(folder / name)["test_mse"].iloc[-1] for folder in (one, two))
        assert np.isfinite(together) and together == pytest.approx(alone, rel=0.2), name
