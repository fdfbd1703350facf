"""The command line ``nbvae``.

``nbvae train`` offers the options of the parts that are chosen: the flags that choose parts are read first. Slow
imports are delayed until a command runs, so that help and usage errors appear at once.
"""

from __future__ import annotations

import importlib
import itertools
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, make_dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro import MISSING
from tyro.conf import AvoidSubcommands, OmitArgPrefixes, Positional, arg
from tyro.extras import subcommand_cli_from_dict

from pyro_nbvae.errors import InputError
from pyro_nbvae.study import commandline, plugins
from pyro_nbvae.study.config import PRESETS, configure
from pyro_nbvae.study.scales import FeaturesName, Reproduction
from pyro_nbvae.study.tree import DEFAULT_READING, Reading, SamplerName, TrainConfig, choices, options
from pyro_nbvae.study.variants import DEFAULT, VARIANTS

if TYPE_CHECKING:
    from pyro_nbvae.study.folder import Run

_HELP = {
    "variant": "name of the VAE. CMP-MAR: COM-Poisson posterior, and as prior a mixture of autoregressive negative "
    "binomials, whose counts depend on each other. CMP: the same posterior, independent negative binomials as prior. "
    "P-NB: Poisson posterior, the same prior. Negative binomial posterior and prior: a KL form (MC: Monte Carlo, DS: "
    "shared dispersion, EX: exact) and a relaxation (C: arrival times, G: Gumbel-softmax, I: integers), such as EX-I. "
    "Baselines: P-VAE, G-VAE, GS-VAE, L-VAE, C-VAE. Or a registered variant. Its options are listed below",
    "preset": "default; published: the settings and networks of the tables in docs/results.md, with losses in squared "
    "errors; paper: with the paper's schedules and 200 epochs",
    "likelihood": "gaussian; bernoulli (data 0 or 1); poisson, negative_binomial or com_poisson (data are counts)",
    "estimator": "ELBO estimator",
    "relaxation": "how counts are differentiated; auto selects the relaxation and the temperature with the smallest "
    "gradient error at initialisation",
    "prior": "factorised (for GS-VAE: scale): the latents are independent; mixture; autoregressive; or "
    "mixture_autoregressive",
}


class _Train:
    """Train a variant and write a run folder."""

    config: TrainConfig[Any]
    out: str
    resume: bool

    def __call__(self) -> None:
        from pyro_nbvae.study.processes import local_rank
        from pyro_nbvae.study.training import train

        folder = train(self.config, self.out, resume=self.resume).folder
        if local_rank() == 0:
            print(folder)


def _train_for(words: Sequence[str]) -> Callable[..., Callable[[], None]]:
    """Return the command train, with the options of the parts that a command line chooses."""

    def given(flag: str, known: Sequence[str], default: str) -> str:
        values = [after for word, after in itertools.pairwise([*words, ""]) if word == f"--{flag}"]
        values += [word.partition("=")[2] for word in words if word.startswith(f"--{flag}=")]
        return values[-1] if values and values[-1] in known else default  # the parser reports an unknown one

    variant = given("variant", list(VARIANTS), DEFAULT)
    preset = given("preset", list(PRESETS), "default")
    plain = configure(variant, preset=preset)
    there, known = options(plain), choices(plain)
    chosen = {name: given(name, list(parts), there[name]) for name, parts in known.items()}
    config = configure(variant, preset=preset, **{k: v for k, v in chosen.items() if v != there[k]})
    flags: dict[str, tuple[Sequence[str], str]] = {
        "variant": (list(VARIANTS), variant),
        "preset": (list(PRESETS), preset),
    }
    flags |= {name: (list(parts), chosen[name]) for name, parts in known.items()}
    vae: Any = type(config.vae)
    tree: Any = AvoidSubcommands[OmitArgPrefixes[TrainConfig[vae]]]
    command = make_dataclass(
        "Train",
        [
            (
                "out",
                Annotated[str, arg(help="the run folder: new or empty or, with --resume, that of the run")],
                MISSING,
            ),
            ("resume", Annotated[bool, arg(help="continue the run in --out from its last complete epoch")], False),
            *(
                (name, Annotated[Literal[tuple(names)], arg(help=_HELP.get(name, "part of the variant"))], default)
                for name, (names, default) in flags.items()
            ),
            ("config", Annotated[tree, arg(name="")], field(default=config)),
        ],
        bases=(_Train,),
    )
    command.__doc__ = _Train.__doc__
    return command


@dataclass(frozen=True)
class Where:
    """How and where a command runs.

    Args:
        seed: random seed.
        device: auto (CUDA if available) or a PyTorch device string.
        data_root: folder of the data sets, if it is not the one of the training.
        data_path: where the data of the training are now, if they have moved.
    """

    seed: int = 0
    device: str = "auto"
    data_root: str | None = None
    data_path: Annotated[str | None, arg(name="data")] = None


def _say_if_unfinished(run: Run) -> None:
    if problem := run.unfinished():
        print(f"nbvae: {run.folder}: {problem}", file=sys.stderr)


def evaluate(
    runs: Positional[tuple[str, ...]],
    features: tuple[FeaturesName, ...] | None = None,
    inception_weights: str | None = None,
    samples: int = 10_000,
    sampler: SamplerName = "prior",
    importance_samples: int = 5,
    where: OmitArgPrefixes[Where] = Where(),
) -> None:
    """Evaluate runs on held-out data with integer counts; print a table, write metrics.json and dispersion.png.

    Args:
        runs: run folders written by nbvae train.
        features: features for FID and KID: classifier (FID-c, KID-c); inception, or inception_bfloat16 (half the
            time on a CPU); or classifier and one of these. Default: classifier for images.
        inception_weights: torch-fidelity's weights file. Default: the file in the data root, else it is downloaded.
        samples: number of generated samples for FID and KID.
        sampler: distribution of their latents: the prior; mixture, the prior of nbvae fit-prior, which is then the
            model's in all metrics; or posterior, the aggregate posterior of the training data (reconstructions), with
            which only FID and KID are computed. The last two are written to metrics-SAMPLER.json.
        importance_samples: samples per observation for the importance-weighted bound; with 0 it is not computed.
    """
    if not runs:
        raise InputError("no run named: give one or more folders written by nbvae train")
    from pyro_nbvae.study.evaluation import collapsed, evaluate, overfitted, plain
    from pyro_nbvae.study.folder import Run, metrics_file

    folders = [Run(folder) for folder in runs]
    for run in folders:  # before the first, which may take long
        run.config()
        if sampler == "mixture":
            run.read_prior(run.read_checkpoint())
    found = [
        evaluate(
            run,
            features=features,
            inception_weights=inception_weights,
            samples=samples,
            sampler=sampler,
            importance_samples=importance_samples,
            **asdict(where),
        )
        for run in folders
    ]
    print(plain(found, runs))
    for run, values in zip(folders, found, strict=True):
        for problem in filter(None, (collapsed(values), overfitted(run))):
            print(f"nbvae: {run.folder}: {problem}", file=sys.stderr)
        _say_if_unfinished(run)
    for run in folders:
        written = [run.folder / name for name in (metrics_file(sampler), *(["dispersion.png"] * (sampler == "prior")))]
        print(*(path for path in written if path.exists()))


def fit_prior(run: Positional[str], components: int = 200, where: OmitArgPrefixes[Where] = Where()) -> None:
    """Fit a mixture to the posteriors of a run's training data; write prior.pt, for --sampler mixture.

    Args:
        run: a run folder written by nbvae train.
        components: largest number of components; the likelihood of held-out latents chooses it, or a half, a quarter
            or an eighth of it.
    """
    from pyro_nbvae.study.folder import Run
    from pyro_nbvae.study.generation import fit_prior

    scores = fit_prior(Run(run), components=components, **asdict(where))
    best = max(scores, key=lambda number: scores[number])
    for number, score in scores.items():
        print(f"{number} components: log p(z) of held-out latents {score:.2f} nats{' (chosen)' * (number == best)}")
    print(Run(run).prior_path)


def generate(
    run: Positional[str],
    count: int = 100,
    sampler: SamplerName = "prior",
    given: str | None = None,
    out: str | None = None,
    where: OmitArgPrefixes[Where] = Where(),
) -> None:
    """Generate observations from integer counts; write samples.npz, with latents, means and draws, and samples.png.

    Args:
        run: a run folder written by nbvae train.
        count: number of samples.
        sampler: distribution of the latents: the prior; mixture, the prior of nbvae fit-prior; or posterior, the
            aggregate posterior of the training data (reconstructions).
        given: the label that the samples are given, for a run with --condition labels. Default: those of the data.
        out: a .npz file; the plot is beside it. Default: samples.npz, or samples-SAMPLER.npz, in the run folder.
    """
    from pyro_nbvae.study.folder import Run
    from pyro_nbvae.study.generation import generate

    print(*generate(Run(run), count=count, sampler=sampler, condition=given, out=out, **asdict(where)), sep="\n")
    _say_if_unfinished(Run(run))


def components(
    run: Positional[str],
    count: int = 10,
    sampler: Literal["prior", "mixture"] = "prior",
    where: OmitArgPrefixes[Where] = Where(),
) -> None:
    """Show a mixture prior: write components.png, samples of each component, and paths.png, ways between components.

    Args:
        run: a run folder written by nbvae train.
        count: number of components, those with the largest weights, and of samples of each; at most 20.
        sampler: prior, or mixture for the prior of nbvae fit-prior.
    """
    from pyro_nbvae.study.folder import Run
    from pyro_nbvae.study.generation import components

    print(*components(Run(run), count=count, sampler=sampler, **asdict(where)), sep="\n")


def reconstruct(
    run: Positional[str], input: str | None = None, count: int = 16, where: OmitArgPrefixes[Where] = Where()
) -> None:
    """Reconstruct observations from integer counts; write reconstructions.png.

    Args:
        run: a run folder written by nbvae train.
        input: a .npy file, (N, *event_shape); images as floats in [0, 1] or uint8. Default: the held-out data.
        count: number of observations.
    """
    from pyro_nbvae.study.folder import Run
    from pyro_nbvae.study.generation import reconstruct

    print(reconstruct(Run(run), input=input, count=count, **asdict(where)))


def encode(
    run: Positional[str],
    data: Positional[str | None] = None,
    out: str | None = None,
    seed: int = 0,
    device: str = "auto",
    data_root: str | None = None,
) -> None:
    """Write the latents of observations: means, variances and integer samples of their posteriors, and information.

    Args:
        run: a run folder written by nbvae train.
        data: data of the same kind, as for nbvae train --data. Default: all data of the training.
        out: a .npz file, or for data in .h5ad a .h5ad file with the latents in obsm. Default: latents.npz in the run
            folder.
        seed: random seed.
        device: auto (CUDA if available) or a PyTorch device string.
        data_root: folder of the data sets, if it is not the one of the training.
    """
    from pyro_nbvae.study.folder import Run
    from pyro_nbvae.study.recordings import encode_run

    print(encode_run(Run(run), data=data, out=out, seed=seed, device=device, data_root=data_root))
    _say_if_unfinished(Run(run))


def predict(
    run: Positional[str],
    data: Positional[str | None] = None,
    out: str | None = None,
    samples: int = 100,
    level: float = 0.9,
    seed: int = 0,
    device: str = "auto",
    data_root: str | None = None,
) -> None:
    """Write expected observations with intervals; values that were not observed are filled in.

    Args:
        run: a run folder written by nbvae train.
        data: data of the same kind, as for nbvae train --data. Default: all data of the training.
        out: a .npz file. Default: predictions.npz in the run folder.
        samples: number of samples of the posterior of each observation.
        level: probability of the intervals.
        seed: random seed.
        device: auto (CUDA if available) or a PyTorch device string.
        data_root: folder of the data sets, if it is not the one of the training.
    """
    from pyro_nbvae.study.folder import Run
    from pyro_nbvae.study.recordings import predict_run

    where: dict[str, Any] = {"seed": seed, "device": device, "data_root": data_root}
    print(predict_run(Run(run), data=data, out=out, samples=samples, level=level, **where))
    _say_if_unfinished(Run(run))


def export(run: Positional[str], out: str | None = None, programs: bool = False) -> None:
    """Export the parameters of a run as safetensors; pyro_nbvae.load reads the file, without pickle.

    Args:
        run: a run folder written by nbvae train.
        out: path of the file. Default: weights.safetensors in the run folder.
        programs: write encoder.pt2 and decoder.pt2 instead, programs of plain PyTorch (torch.export), which run without
            this package.
    """
    from pyro_nbvae.study.folder import Run

    if programs:
        if out:
            raise InputError("--programs writes two files into the run folder: leave out --out")
        from pyro_nbvae.study.recordings import export_run_programs

        print(*export_run_programs(Run(run)), sep="\n")
    else:
        print(Run(run).export(Path(out) if out else None))


def spikes(runs: Positional[tuple[str, ...]], where: OmitArgPrefixes[Where] = Where()) -> None:
    """Plot runs of spike counts: rasters, PSTHs, Fano factors, calibration and latents; write spikes-NAME.png.

    Args:
        runs: run folders written by nbvae train; of several, the stability of the latents is plotted too.
    """
    if not runs:
        raise InputError("no run named: give one or more folders written by nbvae train")
    from pyro_nbvae.study.folder import Run
    from pyro_nbvae.study.spike_plots import plot_spikes

    print(*plot_spikes([Run(run) for run in runs], **asdict(where)), sep="\n")
    for run in runs:
        _say_if_unfinished(Run(run))


def data(
    action: Positional[Literal["check"]],
    name: Positional[str],
    data_root: str | None = None,
    reading: OmitArgPrefixes[Reading] = DEFAULT_READING,
) -> None:
    """Describe a data set, or report which files are missing and how to get them. Nothing is downloaded.

    Of spike counts, Fano factors, what looks like an artefact and a likelihood are reported.

    Args:
        action: check.
        name: a data set, as for nbvae train --data.
        data_root: folder of the data sets. Default: the environment variable NBVAE_DATA, else the user data folder.
    """
    from pyro_nbvae.study.data import describe, load

    found = load(name, data_root, download=False, reading=reading)
    print(describe(found))
    if found.values == "counts" and len(found.event_shape) <= 2:
        from pyro_nbvae.study.spike_plots import describe_counts

        print(*describe_counts(found.joined()), sep="\n")


def reproduce(
    options: OmitArgPrefixes[Reproduction], table: Positional[str | None] = None, report: bool = False
) -> None:
    """Train and evaluate the missing runs of a table, then print and write the table.

    Args:
        table: main, prior, priors, latents, latents-means, latents-counts, decoder, beta, mc-samples, relaxation,
            families or precision; or a registered table.
        report: train nothing; write docs/results.md from the finished runs of all tables.
    """
    from pyro_nbvae.study.report import report as write_report
    from pyro_nbvae.study.report import reproduce
    from pyro_nbvae.study.tables import TABLES

    importlib.import_module("pyro_nbvae.experiments.tables")  # whose scripts register their tables
    if report:
        if table or options.variants or options.data or options.seeds:  # the page would lose the other rows
            raise InputError("--report writes all tables: leave out the table, --variants, --data and --seeds")
        print(write_report(TABLES.values(), options, Path("docs/results.md")))
    elif table not in TABLES:
        problem = f"unknown table {table!r}" if table else "no table named"
        raise InputError(f"{problem}: choose from {', '.join(TABLES)}")
    else:
        print(reproduce(TABLES[table], options))


COMMANDS: dict[str, Callable[..., None]] = {
    "evaluate": evaluate,
    "fit-prior": fit_prior,
    "generate": generate,
    "components": components,
    "reconstruct": reconstruct,
    "encode": encode,
    "predict": predict,
    "export": export,
    "spikes": spikes,
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
    """Run the command line. On invalid input, print what is wrong and exit with status 2; if interrupted, with 130.

    Args:
        arguments: the arguments. Default: those of the process.
    """
    words = sys.argv[1:] if arguments is None else arguments
    if list(words) == ["--version"]:
        print(f"nbvae {version('pyro-nbvae')}")
        return

    def parse() -> Callable[[], None]:
        names, rest = _imports(words)
        plugins.import_modules(names)
        commands = {name: commandline.deferred(command) for name, command in COMMANDS.items()}
        return subcommand_cli_from_dict(
            {"train": _train_for(rest), **commands},
            prog="nbvae",
            description="Variational autoencoders with spike-count latents. With every command, --import MODULE "
            "imports your own module, which may register variants, data sets and metrics. nbvae --version prints the "
            "version.",
            args=rest,
            config=commandline.CONFIG,
        )

    commandline.run(parse, "nbvae")
