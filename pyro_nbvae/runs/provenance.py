"""What made a figure: the version and commit of the code, the machine, the number of threads, the day."""

from __future__ import annotations

import datetime
import platform
import subprocess
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch


@cache
def commit() -> str | None:
    """The commit of the checkout that this package is imported from, ``+`` after it where files differ from it.

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
    except OSError:  # no git
        return None
    return done.stdout.strip() or None if tracked.returncode == 0 else None


@cache
def processor() -> str:
    """The CPU's name, as the system says it."""
    try:
        names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        return names[0].partition(":")[2].strip()
    except (OSError, IndexError):
        return platform.processor() or platform.machine()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:  # the source on the path
        return "unknown"


def provenance(device: torch.device) -> dict[str, str | int | None]:
    """What a run is made by, on that device.

    Returns:
        ``version`` and ``commit`` of pyro-nbvae, ``torch_version``, ``machine`` (of the device), ``threads`` and
        ``date``. Figures depend on the number of threads in their last digits, and training amplifies them.
    """
    return {
        "version": _version("pyro-nbvae"),
        "commit": commit(),
        "torch_version": str(torch.__version__),
        "machine": torch.cuda.get_device_name(device) if device.type == "cuda" else processor(),
        "threads": torch.get_num_threads(),
        "date": datetime.date.today().isoformat(),
    }
