"""Demo: train the default variant and P-VAE on digits of scikit-learn, and print their metrics and the paths of plots.

python -m experiments.demo [--out FOLDER]    about a minute on two cores
"""

from pathlib import Path

from pyro_nbvae.study.commandline import script
from pyro_nbvae.study.config import configure
from pyro_nbvae.study.evaluation import evaluate, plain
from pyro_nbvae.study.generation import generate, reconstruct
from pyro_nbvae.study.training import train
from pyro_nbvae.study.variants import DEFAULT


def demo(out: Path = Path("runs/demo")) -> None:
    """Train, evaluate, generate and reconstruct.

    Args:
        out: folder of the runs; finished runs in it are not trained again.
    """
    runs = [train(configure(name, data="digits"), out / name, resume=True) for name in (DEFAULT, "P-VAE")]
    print(plain([evaluate(run, samples=2000) for run in runs], [str(run.folder) for run in runs]))
    for run in runs:
        print(*generate(run), reconstruct(run, count=32), run.folder / "dispersion.png", sep="\n")


if __name__ == "__main__":
    script(demo)
