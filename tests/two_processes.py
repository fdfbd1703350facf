"""What tests/test_distributed.py has torchrun do: the same runs, in as many processes as it starts."""

import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pyro.distributions as dist
import torch

from pyro_nbvae.errors import InputError
from pyro_nbvae.guides import GaussianGuide
from pyro_nbvae.study.config import configure
from pyro_nbvae.study.training import train
from pyro_nbvae.study.tree import replace
from pyro_nbvae.study.variants import GaussianVAE, register_variant


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


GUIDES = {"noiseless": NoiselessGuide, "noise": NoteNoise}


@dataclass(frozen=True, kw_only=True)
class OtherGuide(GaussianVAE):
    """A Gaussian VAE with one of these guides."""

    kind: Literal["other_guide"] = "other_guide"
    guide: Literal["noiseless", "noise"] = "noiseless"

    def build(self, event_shape, latents, *, encoder, **options):
        model, _ = super().build(event_shape, latents, encoder=encoder, **options)
        return model, GUIDES[self.guide](model, encoder=encoder)


# 51 images in batches of 10: the last batch is one image, which two processes cannot share.
TINY = {
    "data": "digits",
    "train_size": 51,
    "latents": 8,
    "encoder": "linear",
    "decoder": "linear",
    "batch_size": 10,
    "epochs": 3,
    "clip": 0.5,
    "lr_schedule": "constant",
    "kl_warmup": 0.0,
    "device": "cpu",
}
SEED = 0
# a joint prior, a KL from draws, categories, a learned prior, learned scales: the processes share all of these
OTHERS = ("CMP-MAR", "MC-G", "C-VAE", "DS-I", "GS-VAE")


def main(out):
    for guide in GUIDES:
        register_variant(guide, OtherGuide(guide=guide))
    noiseless = configure("noiseless", seed=SEED, **TINY)
    train(noiseless, out / "noiseless", progress=False)
    whole = configure("EX-C", anneal_epochs=1.5, validate=True, **TINY)
    train(whole, out / "whole", progress=False)
    train(replace(whole, epochs=1), out / "resumed", progress=False)
    train(whole, out / "resumed", resume=True, progress=False)
    rank = os.environ.get("RANK", "0")  # each process has a disk of its own, and only that of rank 0 holds the run
    if rank == "0":
        shutil.copytree(out / "noiseless", out / "disk0")
    try:
        train(replace(noiseless, epochs=4), out / f"disk{rank}", resume=True, progress=False)
    except InputError as error:
        (out / f"error{rank}.txt").write_text(str(error))
    short = {**TINY, "epochs": 1}
    for name in ("noise", *OTHERS):
        train(configure(name, **short), out / name, progress=False)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
