"""The command line ``nbvae``.

Slow imports are delayed until a command runs, so that help and usage errors appear at once.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tyro.conf import OmitArgPrefixes, Positional
from tyro.extras import subcommand_cli_from_dict

from pyro_nbvae.errors import InputError
from pyro_nbvae.study import commandline, plugins
from pyro_nbvae.study.config import SamplerName, TrainConfig
from pyro_nbvae.study.errors import check_member
from pyro_nbvae.study.scales import TABLES, FeaturesName, Reproduction

if TYPE_CHECKING:
    from pyro_nbvae.study.grid import Table


def train(config: OmitArgPrefixes[TrainConfig], out: str, resume: bool = False) -> None:
    """Train a variant and write a run folder.

    Args:
        out: the run folder: new or empty or, with --resume, that of the run.
        resume: continue the run in --out from its last complete epoch.
    """
    from pyro_nbvae.study.processes import local_rank
    from pyro_nbvae.study.training import train

    folder = train(config, out, resume=resume).folder
    if local_rank() == 0:
        print(folder)


def evaluate(
    runs: Positional[tuple[str, ...]],
    features: tuple[FeaturesName, ...] | None = None,
    inception_weights: str | None = None,
    samples: int = 10_000,
    sampler: SamplerName = "prior",
    importance_samples: int = 5,
    seed: int = 0,
    device: str = "auto",
    data_root: str | None = None,
    data: str | None = None,
) -> None:
    """Evaluate runs on held-out data with integer counts; print a table, write metrics.json and dispersion.png.

    Args:
        runs: run folders written by nbvae train.
        features: features for FID and KID: classifier (FID-c, KID-c); inception, or inception_bfloat16 (half the
            time on a CPU); or classifier and one of these. Default: classifier for images.
        inception_weights: torch-fidelity's weights file. Default: the file in the data root, else it is downloaded.
        samples: number of generated samples for FID and KID.
        sampler: distribution of their latents: the prior; a mixture fitted to the posteriors of the training data; or
            posterior, the aggregate posterior of the training data (reconstructions). With a mixture or the posterior
            only FID and KID are computed, and written to metrics-SAMPLER.json.
        importance_samples: samples per observation for the importance-weighted bound; with 0 it is not computed.
        seed: random seed.
        device: auto (CUDA if available) or a PyTorch device string.
        data_root: folder of the data sets, if it is not the one of the training.
        data: where the data of the training are now, if they have moved.
    """
    if not runs:
        raise InputError("no run named: give one or more folders written by nbvae train")
    from pyro_nbvae.study.evaluation import evaluate
    from pyro_nbvae.study.folder import Run, metrics_file
    from pyro_nbvae.study.formats import plain

    folders = [Run(folder) for folder in runs]
    for run in folders:  # before the first, which may take long
        run.config()
    options: dict[str, Any] = dict(
        features=features,
        inception_weights=inception_weights,
        samples=samples,
        sampler=sampler,
        importance_samples=importance_samples,
        seed=seed,
        device=device,
        data_root=data_root,
        data_path=data,
    )
    found = [evaluate(run, **options) for run in folders]
    print(plain(found, runs))
    for run, figures in zip(folders, found, strict=True):
        collapsed, units = figures.get("collapsed_units"), figures.get("units")
        several = int(str(figures.get("test_size", 2))) > 1  # of one observation, no unit has information
        if not (isinstance(collapsed, (int, float)) and isinstance(units, int) and several):
            continue
        if units - collapsed <= units // 100:
            lost = f"all {units}" if collapsed == units else f"{collapsed:.0f} of {units}"
            beta = ", a smaller --beta" if figures.get("beta") is not None else ""
            print(
                f"nbvae: {run.folder}: {lost} units are collapsed (information below 0.01 nats), so the latents carry "
                f"almost no information about the data: train longer, or with a lower --prior-lr{beta} or a smaller "
                "--batch-size",
                file=sys.stderr,
            )
    for run in folders:
        written = [run.folder / name for name in (metrics_file(sampler), *(["dispersion.png"] * (sampler == "prior")))]
        print(*(path for path in written if path.exists()))


def generate(
    run: Positional[str],
    count: int = 100,
    sampler: SamplerName = "prior",
    seed: int = 0,
    device: str = "auto",
    data_root: str | None = None,
    data: str | None = None,
) -> None:
    """Generate samples from integer counts; write samples.png.

    Args:
        run: a run folder written by nbvae train.
        count: number of samples.
        sampler: distribution of the latents: the prior; a mixture fitted to the posteriors of the training data; or
            posterior, the aggregate posterior of the training data (reconstructions).
        seed: random seed.
        device: auto (CUDA if available) or a PyTorch device string.
        data_root: folder of the data sets, if it is not the one of the training.
        data: where the data of the training are now, if they have moved.
    """
    from pyro_nbvae.study.folder import Run
    from pyro_nbvae.study.generation import generate

    options: dict[str, Any] = dict(seed=seed, device=device, data_root=data_root, data_path=data)
    print(generate(Run(run), count=count, sampler=sampler, **options))


def reconstruct(
    run: Positional[str],
    input: str | None = None,
    count: int = 16,
    seed: int = 0,
    device: str = "auto",
    data_root: str | None = None,
    data: str | None = None,
) -> None:
    """Reconstruct observations from integer counts; write reconstructions.png.

    Args:
        run: a run folder written by nbvae train.
        input: a .npy file, (N, *event_shape); images as floats in [0, 1] or uint8. Default: the held-out data.
        count: number of observations.
        seed: random seed.
        device: auto (CUDA if available) or a PyTorch device string.
        data_root: folder of the data sets, if it is not the one of the training.
        data: where the data of the training are now, if they have moved.
    """
    from pyro_nbvae.study.folder import Run
    from pyro_nbvae.study.generation import reconstruct

    options: dict[str, Any] = dict(seed=seed, device=device, data_root=data_root, data_path=data)
    print(reconstruct(Run(run), input=input, count=count, **options))


def export(run: Positional[str], out: str | None = None) -> None:
    """Export the parameters of a run as safetensors; pyro_nbvae.load reads the file, without pickle.

    Args:
        run: a run folder written by nbvae train.
        out: path of the file. Default: weights.safetensors in the run folder.
    """
    from pyro_nbvae.study.folder import Run

    print(Run(run).export(Path(out) if out else None))


def data(action: Positional[Literal["check"]], name: Positional[str], data_root: str | None = None) -> None:
    """Describe a data set, or report which files are missing and how to get them. Nothing is downloaded.

    Args:
        action: check.
        name: a data set, as for nbvae train --data.
        data_root: folder of the data sets. Default: the environment variable NBVAE_DATA, else the user data folder.
    """
    from pyro_nbvae.study.data import describe, load

    print(describe(load(name, data_root, download=False)))


def table_of(name: str) -> Table:
    """Return the table that the experiment script with this name defines.

    Raises:
        InputError: for an unknown name.
    """
    import importlib

    check_member("table", name, TABLES)
    return importlib.import_module(f"pyro_nbvae.experiments.{name.replace('-', '_')}").TABLE


def reproduce(
    options: OmitArgPrefixes[Reproduction], table: Positional[str | None] = None, report: bool = False
) -> None:
    """Train and evaluate the missing runs of a table, then print and write the table.

    Args:
        table: main, prior, latents, decoder, beta, mc-samples, relaxation, families or precision.
        report: train nothing; write docs/results.md from the finished runs of all tables.
    """
    if report:
        from pyro_nbvae.study.report import report as write_report

        if table or options.variants or options.data or options.seeds:  # the page would lose the other rows
            raise InputError("--report writes all tables: leave out the table, --variants, --data and --seeds")
        print(write_report(map(table_of, TABLES), options, Path("docs/results.md")))
    elif table is None:
        raise InputError(f"no table named: choose from {', '.join(TABLES)}")
    else:
        from pyro_nbvae.study.report import reproduce

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
    """Split off the modules that ``--import`` names, before or after the command."""
    words, rest, names = list(arguments), [], []
    while words:
        word = words.pop(0)
        if word != "--import" and not word.startswith("--import="):
            rest.append(word)
            continue
        name = word.partition("=")[2] if "=" in word else words.pop(0) if words else ""
        if not name:
            raise InputError("--import needs the name of a module, as in nbvae --import my_module train ...")
        names.append(name)
    return names, rest


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line. On invalid input, print one line and exit with status 2; if interrupted, with 130.

    Args:
        arguments: the arguments. Default: those of the process.
    """
    words = sys.argv[1:] if arguments is None else arguments
    if list(words) == ["--version"]:
        from pyro_nbvae import __version__

        print(f"nbvae {__version__}")
        return
    command = next((word for word in words if word in COMMANDS), None)

    def parse() -> Callable[[], None]:
        names, rest = _imports(words)
        call = subcommand_cli_from_dict(
            {name: commandline.deferred(command) for name, command in COMMANDS.items()},
            prog="nbvae",
            description="Variational autoencoders with spike-count latents. With every command, --import MODULE "
            "imports your own module, which may register variants, data sets and metrics. nbvae --version prints the "
            "version.",
            args=rest,
            config=commandline.CONFIG,
        )

        def with_imports() -> None:
            plugins.import_modules(names)
            call()

        return with_imports

    commandline.run(parse, "nbvae", f"nbvae {command} --help" if command else "nbvae --help")
