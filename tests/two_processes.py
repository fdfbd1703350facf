"""What tests/test_distributed.py has torchrun do: the same runs, in as many processes as it starts."""

import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pyro.distributions as dist
import torch

from pyro_nbvae.errors import InputError
from pyro_nbvae.guides import GaussianGuide
from pyro_nbvae.study import variants
from pyro_nbvae.study.config import TrainConfig
from pyro_nbvae.study.training import train


class NoteNoise(GaussianGuide):
    """Writes what this process draws at its first training step."""

    steps = 0

    def forward(self, x):
        NoteNoise.steps += 1
        if NoteNoise.steps == 2 and "RANK" in os.environ:  # the first is the try-out's
            with torch.random.fork_rng():
                torch.save(torch.rand(8), f"{sys.argv[1]}/noise{os.environ['RANK']}.pt")
        return super().forward(x)


class NoiselessGuide(GaussianGuide):
    """A posterior so narrow that its samples are its location to the last digit."""

    def posterior(self, x):
        location, _ = self.encode(x)
        return dist.Normal(location + 1, location.new_full((), 1e-15).expand_as(location))


# 51 images in batches of 10: the last batch is one image, which two processes cannot share.
CONFIG = TrainConfig(
    variant="noiseless",
    data="digits",
    train_size=51,
    latents=8,
    encoder="linear",
    decoder="linear",
    batch_size=10,
    epochs=3,
    clip=0.5,
    lr_schedule="constant",
    kl_warmup=0.0,
    device="cpu",
)
# not those that an example has registered in this process
OTHERS = [name for name, one in variants.VARIANTS.items() if one.model.__module__.startswith("pyro_nbvae.")]


def main(out):
    variants.VARIANTS["noiseless"] = replace(variants.VARIANTS["G-VAE"], guide=NoiselessGuide)
    train(CONFIG, out / "noiseless", progress=False)
    train(replace(CONFIG, variant="EX-C"), out / "whole", progress=False)
    train(replace(CONFIG, variant="EX-C", epochs=1, anneal_epochs=1.5), out / "resumed", progress=False)
    train(replace(CONFIG, variant="EX-C", epochs=3, anneal_epochs=1.5), out / "resumed", resume=True, progress=False)
    rank = os.environ.get("RANK", "0")  # each process has a disk of its own, and only that of rank 0 holds the run
    if rank == "0":
        shutil.copytree(out / "noiseless", out / "disk0")
    try:
        train(replace(CONFIG, epochs=4), out / f"disk{rank}", resume=True, progress=False)
    except InputError as error:
        (out / f"error{rank}.txt").write_text(str(error))
    variants.VARIANTS["noise"] = replace(variants.VARIANTS["G-VAE"], guide=NoteNoise)
    train(replace(CONFIG, variant="noise", epochs=1), out / "noise", progress=False)
    for name in OTHERS:
        train(replace(CONFIG, variant=name, epochs=1), out / name, progress=False)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
