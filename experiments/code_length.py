"""Image quality against code length while models train on CIFAR16: python -m experiments.code_length

It draws SSIM and squared error on held-out images against the true KL, from the logs of runs: of the table ``main`` at
scale ``full``, and of the losses in ``released.py`` at scale ``paper``. Values of the paper have no code length and are
drawn as lines.
"""

from pathlib import Path

import pandas as pd

from pyro_nbvae.errors import InputError
from pyro_nbvae.experiments import main as of_main
from pyro_nbvae.experiments import released
from pyro_nbvae.study.commandline import script
from pyro_nbvae.study.plots import Panel, plot_curves
from pyro_nbvae.study.scales import Reproduction
from pyro_nbvae.study.tables import cells

DATA, SHOWN = "cifar16", ("P-VAE", "DS-C", "MC-C", "MC-G", "CMP", "G-VAE")
# Epochs at which a curve has points, besides the last one: each 1.4 times the one before.
SHOWN_EPOCHS = {round(1.4**k) for k in range(40)}


def curves(out: str, seed: int) -> dict[str, pd.DataFrame]:
    """Return the logs of the runs that have been trained for an epoch, a few epochs of each."""
    own = Reproduction(scale="full", data=(DATA,), variants=SHOWN, seeds=(seed,), out=out)
    early = Reproduction(scale="paper", data=(DATA,), variants=tuple(released.VARIANTS), seeds=(seed,), out=out)
    found = {}
    for cell in (*cells(of_main.TABLE, own), *cells(released.TABLE, early)):
        if (path := cell.folder / "log.csv").exists():
            log = pd.read_csv(path)
            if len(log):
                found[cell.label] = log[log["epoch"].isin(SHOWN_EPOCHS) | (log["epoch"] == len(log))]
    return found


def main(out: str = "runs/reproduce", path: Path = Path("docs/code_length.png"), seed: int = 0) -> None:
    """Draw SSIM and squared error against the true KL.

    Args:
        out: folder of the run folders, as in nbvae reproduce.
        path: the picture.
        seed: seed of the runs.
    """
    logs = curves(out, seed)
    if not logs:
        raise InputError(f"no runs of {DATA} in {out}: nbvae reproduce main --scale full --data {DATA}")
    ends = [min(log["test_kl"].min() for log in logs.values()), max(log["test_kl"].max() for log in logs.values())]
    lines = {f"{name}, paper": (ends, [value] * 2) for name, value in of_main.PAPER[DATA, "ssim"].items()}

    def panel(column: str, label: str, more: dict) -> Panel:
        own = {name: (list(log["test_kl"]), list(log[column])) for name, log in logs.items()}
        return Panel({**own, **more}, "true KL, nats per image", label, "log")

    panels = [panel("test_mse", "squared error per element", {}), panel("test_ssim", "SSIM of reconstructions", lines)]
    plot_curves(panels, path, title="CIFAR16, held-out images, over the epochs of training")
    print(path)


if __name__ == "__main__":
    script(main)
