"""python -m benchmarks [NAME ...]    run these benchmarks; without names all that need nothing but the data sets"""

from __future__ import annotations

import importlib
from typing import Annotated, Literal

import tyro

Name = Literal["samplers", "kl", "log_mass", "step", "scaling", "contention", "inception", "gpu"]


def main(
    names: Annotated[tuple[Name, ...], tyro.conf.Positional] = (
        "samplers",
        "kl",
        "log_mass",
        "step",
        "scaling",
        "contention",
    ),
    /,
) -> None:
    """Run benchmarks on a quiet machine; each writes its table to ``results/benchmarks``.

    Args:
        names: which. ``inception`` needs torch-fidelity's weights, ``gpu`` an NVIDIA GPU.
    """
    for name in names:
        importlib.import_module(f"benchmarks.{name}").main()


if __name__ == "__main__":
    tyro.cli(main)
