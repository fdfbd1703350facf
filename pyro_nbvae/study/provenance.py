"""Provenance of a result: version and commit of the code, machine, number of threads, date."""

from __future__ import annotations

import datetime
import platform
import subprocess
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from pyro_nbvae.study.files import write_text


def _commit() -> str | None:
    """Return the git commit that this package is imported from, with a ``+`` if there are uncommitted changes.

    None for an installed package.
    """
    here = Path(__file__).resolve().parent
    command = ["git", "-C", str(here), "describe", "--always", "--abbrev=10", "--exclude=*", "--dirty=+"]
    try:
        tracked = subprocess.run(
            ["git", "-C", str(here), "ls-files", "--error-unmatch", Path(__file__).name],
            capture_output=True,
            check=False,
        )
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:  # git is not installed
        return None
    return done.stdout.strip() or None if tracked.returncode == 0 else None


# Read at import: a later commit does not describe the code that is running.
COMMIT = _commit()


@cache
def processor() -> str:
    """Return the name of the CPU."""
    try:
        names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        return names[0].partition(":")[2].strip()
    except (OSError, IndexError):
        return platform.processor() or platform.machine()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:  # imported from source, not installed
        return "unknown"


def provenance(device: torch.device) -> dict[str, str | int | None]:
    """Return the provenance of a run on this device.

    Returns:
        ``version`` and ``commit`` of pyro-nbvae, ``torch_version``, ``machine`` (name of the GPU or CPU), ``threads``
        and ``date``. The number of threads changes the last digits of a result, and training amplifies the difference.
    """
    return {
        "version": _version("pyro-nbvae"),
        "commit": COMMIT,
        "torch_version": str(torch.__version__),
        "machine": torch.cuda.get_device_name(device) if device.type == "cuda" else processor(),
        "threads": torch.get_num_threads(),
        "date": datetime.date.today().isoformat(),
    }


def write_page(
    path: Path, rows: Sequence[Mapping[str, object]], caption: str, command: str, device: str = "cpu"
) -> str:
    """Write a table for the documentation, in Markdown, with a caption that includes its provenance.

    Args:
        path: path of the file, which pages of the documentation include.
        rows: one dictionary per row; missing values are left empty.
        caption: what the table shows.
        command: the command that writes the table.
        device: the device of the measurements.

    Returns:
        The text of the file.
    """
    import pandas as pd

    cells = pd.DataFrame(rows, dtype=object)  # fillna would make floats of whole numbers before pandas 3
    table = cells.where(cells.notna(), "").astype(str).to_markdown(index=False, disable_numparse=True)
    by = provenance(torch.device(device))
    made = f"{by['date']}, commit {by['commit']}, {by['machine']}, {by['threads']} threads, torch {by['torch_version']}"
    text = f"{table}\n\n{caption} (`{command}`; {made})\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, text)
    return text
