"""The command ``nbvae``: parses, calls, prints.

Heavy imports wait until a command runs, so that help and mistakes answer at once.
"""

from __future__ import annotations

import contextlib
import functools
import io
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn

import tyro
from tyro.conf import FlagCreatePairsOff, OmitArgPrefixes, Positional
from tyro.extras import subcommand_cli_from_dict

from pyro_nbvae.config import TABLES, Reproduction, TrainConfig
from pyro_nbvae.errors import InputError, check_member

if TYPE_CHECKING:
    from pyro_nbvae.reproduction import Table


def train(config: OmitArgPrefixes[TrainConfig], out: str, resume: bool = False) -> None:
    """Train a variant and leave a run folder.

    Args:
        out: the run folder: new or empty, or with --resume the run's.
        resume: continue the run in --out from its last whole epoch.
    """
    from pyro_nbvae.distributed import local_rank
    from pyro_nbvae.training import train

    folder = train(config, out, resume=resume).folder
    if local_rank() == 0:
        print(folder)


def evaluate(
    runs: Positional[tuple[str, ...]],
    features: tuple[Literal["classifier", "inception"], ...] = ("classifier",),
    inception_weights: str | None = None,
    samples: int = 10_000,
    importance_samples: int = 5,
    seed: int = 0,
    device: str = "auto",
    data_root: str | None = None,
) -> None:
    """Measure runs on their held-out images with integer counts; print a table, write metrics.json, dispersion.png.

    Args:
        runs: run folders that nbvae train wrote.
        features: what FID and KID compare images in: classifier (FID-c, KID-c), inception, or both.
        inception_weights: torch-fidelity's weights file. Default: the data root's, else it is downloaded.
        samples: images to generate for FID and KID.
        importance_samples: latents per image of the importance-weighted bound; 0 leaves it out.
        seed: of the latents that are drawn.
        device: auto (CUDA where it is), or a device of torch's.
        data_root: where the data are, if not where the run found them.
    """
    if not runs:
        raise InputError("no run named: give one or more folders that nbvae train wrote")
    from pyro_nbvae.evaluation import evaluate
    from pyro_nbvae.runs import Run
    from pyro_nbvae.tables import plain

    found = [Run(folder) for folder in runs]
    options: dict[str, Any] = dict(
        features=features,
        inception_weights=inception_weights,
        samples=samples,
        importance_samples=importance_samples,
        seed=seed,
        device=device,
        data_root=data_root,
    )
    print(plain([evaluate(run, **options) for run in found]))
    for run in found:
        written = [run.folder / name for name in ("metrics.json", "dispersion.png")]
        print(*(path for path in written if path.exists()))


def generate(run: Positional[str], count: int = 100, seed: int = 0, device: str = "auto") -> None:
    """Draw images from the prior, integer counts; write samples.png.

    Args:
        run: a run folder that nbvae train wrote.
        count: how many images.
        seed: of the latents that are drawn.
        device: auto (CUDA where it is), or a device of torch's.
    """
    from pyro_nbvae.generation import generate
    from pyro_nbvae.runs import Run

    print(generate(Run(run), count=count, seed=seed, device=device))


def reconstruct(
    run: Positional[str],
    images: str | None = None,
    count: int = 16,
    seed: int = 0,
    device: str = "auto",
    data_root: str | None = None,
) -> None:
    """Encode and decode images, integer counts between; write reconstructions.png.

    Args:
        run: a run folder that nbvae train wrote.
        images: a .npy file of your own, (N, C, H, W), floats in [0, 1] or uint8. Default: held-out images.
        count: how many images.
        seed: of the latents that are drawn.
        device: auto (CUDA where it is), or a device of torch's.
        data_root: where the data are, if not where the run found them.
    """
    from pyro_nbvae.generation import reconstruct
    from pyro_nbvae.runs import Run

    print(reconstruct(Run(run), images=images, count=count, seed=seed, device=device, data_root=data_root))


def data(action: Positional[Literal["check"]], name: Positional[str], data_root: str | None = None) -> None:
    """Say what a data set holds, or what is missing and how to get it. Downloads nothing.

    Args:
        action: check.
        name: digits, mnist, fashion_mnist, cifar16, cifar32 or celeba64.
        data_root: where the data are. Default: the variable NBVAE_DATA, else the platform's user data folder.
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
        table: main, latents, decoder, beta, mc-samples, relaxation or families.
        report: run nothing; write docs/results.md from the run folders that there are, of all tables or the one named.
    """
    names = TABLES if table is None else (table,)
    if report:
        from pyro_nbvae.reproduction import report as write_report

        print(write_report(map(table_of, names), options, Path("docs/results.md")))
    elif table is None:
        raise InputError(f"no table named: choose from {', '.join(TABLES)}")
    else:
        from pyro_nbvae.reproduction import reproduce

        print(reproduce(table_of(table), options))


COMMANDS: dict[str, Callable[..., None]] = {
    "train": train,
    "evaluate": evaluate,
    "generate": generate,
    "reconstruct": reconstruct,
    "data": data,
    "reproduce": reproduce,
}


def _fail(message: str) -> NoReturn:
    print(f"nbvae: {' '.join(message.split())}", file=sys.stderr)
    raise SystemExit(2)


def _unboxed(text: str) -> str:
    """The message of an error that the parser drew in a box: its lines down to the first rule."""
    lines = [line.strip("│ ") for line in text.splitlines()]
    body = [line for line in lines if not line.startswith(("╭", "╰"))]
    rule = next((i for i, line in enumerate(body) if line.startswith("─")), len(body))
    return " ".join(body[:rule]) or text


def _deferred(command: Callable[..., None]) -> Callable[..., Callable[[], None]]:
    """The command as something that only takes its arguments, so that parsing is over before the work begins."""

    @functools.wraps(command)
    def take(*arguments: Any, **options: Any) -> Callable[[], None]:
        return functools.partial(command, *arguments, **options)

    return take


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command. Exits with 2 and one line on bad input, with 130 when interrupted."""

    def parse() -> Callable[[], None]:
        return subcommand_cli_from_dict(
            {name: _deferred(command) for name, command in COMMANDS.items()},
            prog="nbvae",
            description="Variational autoencoders with spike counts for latents.",
            args=arguments,
            config=(FlagCreatePairsOff,),
        )

    _run(parse, "nbvae --help")


def script(command: Table | Callable[..., None]) -> None:
    """Runs an experiment script, a table or a function of its own, as :func:`main` runs the command."""
    if callable(command):
        function = command
    else:

        def function(options: OmitArgPrefixes[Reproduction]) -> None:
            from pyro_nbvae.reproduction import reproduce

            print(reproduce(command, options))

        function.__doc__ = f"{command.title}: run what is missing, and print and write the table."
    _run(lambda: tyro.cli(_deferred(function), config=(FlagCreatePairsOff,)), "--help")


def _run(parse: Callable[[], Callable[[], None]], help: str) -> None:
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            call = parse()
    except SystemExit as stop:
        if stop.code:
            _fail(f"{_unboxed(complaint.getvalue()).rstrip('.')}; see {help}")
        raise
    try:
        call()
    except InputError as error:
        _fail(str(error))
    except OSError as error:  # a full disk, a folder that may not be written
        _fail(f"{error.filename or 'a file'}: {error.strerror or error}")
    except KeyboardInterrupt:
        print("nbvae: interrupted; the same command continues (nbvae train with --resume)", file=sys.stderr)
        raise SystemExit(130) from None
