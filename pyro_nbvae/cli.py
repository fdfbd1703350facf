"""The command ``nbvae``: parses, calls, prints.

Heavy imports wait until a command runs, so that help and mistakes answer at once.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tyro.conf import OmitArgPrefixes, Positional
from tyro.extras import subcommand_cli_from_dict

from pyro_nbvae import commandline, plugins
from pyro_nbvae.errors import InputError, check_member
from pyro_nbvae.runs.config import TrainConfig
from pyro_nbvae.tables.config import TABLES, Reproduction

if TYPE_CHECKING:
    from pyro_nbvae.tables.grid import Table


def train(config: OmitArgPrefixes[TrainConfig], out: str, resume: bool = False) -> None:
    """Train a variant and leave a run folder.

    Args:
        out: the run folder: new or empty, or with --resume the run's.
        resume: continue the run in --out from its last whole epoch.
    """
    from pyro_nbvae.runs.processes import local_rank
    from pyro_nbvae.runs.training import train

    folder = train(config, out, resume=resume).folder
    if local_rank() == 0:
        print(folder)


def evaluate(
    runs: Positional[tuple[str, ...]],
    features: tuple[Literal["classifier", "inception"], ...] = ("classifier",),
    inception_weights: str | None = None,
    samples: int = 10_000,
    sampler: Literal["prior", "mixture"] = "prior",
    importance_samples: int = 5,
    seed: int = 0,
    device: str = "auto",
    data_root: str | None = None,
) -> None:
    """Measure runs on their held-out data with integer counts; print a table, write metrics.json, dispersion.png.

    Args:
        runs: run folders that nbvae train wrote.
        features: which features FID and KID use: classifier (FID-c, KID-c), inception, or both.
        inception_weights: torch-fidelity's weights file. Default: the data root's, else downloaded.
        samples: number of generated samples for FID and KID.
        sampler: where their latents are drawn from: the prior, or a mixture fitted to the posteriors of the training
            data; of a mixture only FID and KID are measured, into metrics-mixture.json.
        importance_samples: latents per observation of the importance-weighted bound; 0 leaves it out.
        seed: of the latents that are drawn.
        device: auto (CUDA if available) or a PyTorch device string.
        data_root: folder of the data sets, if not where the run found them.
    """
    if not runs:
        raise InputError("no run named: give one or more folders that nbvae train wrote")
    from pyro_nbvae.runs.evaluation import evaluate, metrics_file
    from pyro_nbvae.runs.folder import Run
    from pyro_nbvae.tables.formats import plain

    folders = [Run(folder) for folder in runs]
    options: dict[str, Any] = dict(
        features=features,
        inception_weights=inception_weights,
        samples=samples,
        sampler=sampler,
        importance_samples=importance_samples,
        seed=seed,
        device=device,
        data_root=data_root,
    )
    print(plain([evaluate(run, **options) for run in folders]))
    for run in folders:
        written = [run.folder / name for name in (metrics_file(sampler), *(["dispersion.png"] * (sampler == "prior")))]
        print(*(path for path in written if path.exists()))


def generate(
    run: Positional[str],
    count: int = 100,
    sampler: Literal["prior", "mixture"] = "prior",
    seed: int = 0,
    device: str = "auto",
    data_root: str | None = None,
) -> None:
    """Draw samples, integer counts; write samples.png.

    Args:
        run: a run folder that nbvae train wrote.
        count: how many.
        sampler: where latents are drawn from: the prior, or a mixture fitted to the posteriors of the training data.
        seed: of the latents that are drawn.
        device: auto (CUDA if available) or a PyTorch device string.
        data_root: folder of the data sets, if not where the run found them.
    """
    from pyro_nbvae.runs.folder import Run
    from pyro_nbvae.runs.generation import generate

    print(generate(Run(run), count=count, sampler=sampler, seed=seed, device=device, data_root=data_root))


def reconstruct(
    run: Positional[str],
    input: str | None = None,
    count: int = 16,
    seed: int = 0,
    device: str = "auto",
    data_root: str | None = None,
) -> None:
    """Encode and decode observations, integer counts between; write reconstructions.png.

    Args:
        run: a run folder that nbvae train wrote.
        input: a .npy file of your own, (N, *event_shape); images as floats in [0, 1] or uint8. Default: held-out data.
        count: how many.
        seed: of the latents that are drawn.
        device: auto (CUDA if available) or a PyTorch device string.
        data_root: folder of the data sets, if not where the run found them.
    """
    from pyro_nbvae.runs.folder import Run
    from pyro_nbvae.runs.generation import reconstruct

    print(reconstruct(Run(run), data=input, count=count, seed=seed, device=device, data_root=data_root))


def export(run: Positional[str], out: str | None = None) -> None:
    """Write the parameters of a run as safetensors; pyro_nbvae.load reads the file, without pickle.

    Args:
        run: a run folder that nbvae train wrote.
        out: the file. Default: weights.safetensors in the run folder.
    """
    from pyro_nbvae.runs.folder import Run

    print(Run(run).export(Path(out) if out else None))


def data(action: Positional[Literal["check"]], name: Positional[str], data_root: str | None = None) -> None:
    """Say what a data set holds, or what is missing and how to get it. Downloads nothing.

    Args:
        action: check.
        name: a data set, as for nbvae train --data.
        data_root: folder of the data sets. Default: the variable NBVAE_DATA, else the platform's user data folder.
    """
    from pyro_nbvae.data import describe, load

    print(describe(load(name, data_root, download=False)))


def table_of(name: str) -> Table:
    """The grid that the experiment script of that name states.

    Raises:
        InputError: for an unknown name.
    """
    import importlib

    check_member("table", name, TABLES)
    return importlib.import_module(f"pyro_nbvae.experiments.{name.replace('-', '_')}").TABLE


def reproduce(
    options: OmitArgPrefixes[Reproduction], table: Positional[str | None] = None, report: bool = False
) -> None:
    """Run what is missing of a table of the experiments, and print and write the table.

    Args:
        table: main, prior, latents, decoder, beta, mc-samples, relaxation or families.
        report: run nothing; write docs/results.md from the run folders that there are, of all tables or the one named.
    """
    names = TABLES if table is None else (table,)
    if report:
        from pyro_nbvae.tables.report import report as write_report

        print(write_report(map(table_of, names), options, Path("docs/results.md")))
    elif table is None:
        raise InputError(f"no table named: choose from {', '.join(TABLES)}")
    else:
        from pyro_nbvae.tables.report import reproduce

        print(reproduce(table_of(table), options))


COMMANDS: dict[str, Callable[..., None]] = {
    "train": train,
    "evaluate": evaluate,
    "generate": generate,
    "reconstruct": reconstruct,
    "export": export,
    "data": data,
    "reproduce": reproduce,
}


def _imports(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """The modules that ``--import`` names before the command, and the rest."""
    rest, names = list(arguments), []
    while rest and (rest[0] == "--import" or rest[0].startswith("--import=")):
        word = rest.pop(0)
        name = word.partition("=")[2] if "=" in word else rest.pop(0) if rest else ""
        if not name:
            raise InputError("--import needs the name of a module, as in nbvae --import my_module train ...")
        names.append(name)
    return names, rest


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command. Exits with 2 and one line on bad input, with 130 when interrupted."""

    def parse() -> Callable[[], None]:
        names, rest = _imports(sys.argv[1:] if arguments is None else arguments)
        call = subcommand_cli_from_dict(
            {name: commandline.deferred(command) for name, command in COMMANDS.items()},
            prog="nbvae",
            description="Variational autoencoders with spike counts for latents. Before the command, --import MODULE "
            "imports a module of yours, which may register variants, data and metrics.",
            args=rest,
            config=commandline.CONFIG,
        )

        def with_imports() -> None:
            plugins.import_modules(names)
            call()

        return with_imports

    commandline.run(parse, "nbvae")
