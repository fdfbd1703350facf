"""The main table: reconstruction and generation of the ten variants on the four image sets.

nbvae reproduce main --scale smoke    or    python experiments/main.py --scale smoke
"""

from __future__ import annotations

import tyro

from pyro_nbvae.config import Reproduction
from pyro_nbvae.reproduction import Table, reproduce

TABLE = Table(
    name="main",
    title="Reconstruction and generation",
    variants=("MC-G", "MC-C", "DS-G", "DS-C", "EX-G", "EX-C", "P-VAE", "G-VAE", "L-VAE", "C-VAE"),
    data=("mnist", "fashion_mnist", "cifar16", "celeba64"),
    metrics=("mse", "ssim", "fid_c", "kid_c", "fid", "kid", "elbo", "kl", "dead_units", "fano", "overdispersion"),
)

if __name__ == "__main__":
    print(reproduce(TABLE, tyro.cli(Reproduction)))
