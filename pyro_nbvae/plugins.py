"""Modules of a user's own, imported so that what they register is known: variants, data, metrics.

``nbvae --import my_module ...`` names them; an installed package names its own in the entry-point group
``pyro_nbvae``. Processes that a grid starts import the same.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib.metadata import entry_points

from pyro_nbvae.errors import InputError

GROUP = "pyro_nbvae"
# What was asked for, so that other processes can be told.
imported: list[str] = []


def import_modules(names: Sequence[str] = ()) -> None:
    """Imports the modules of that name, found as ``python -m`` finds them, and those of installed packages.

    Raises:
        InputError: for a module that cannot be imported.
    """
    if names and "" not in sys.path:
        sys.path.insert(0, "")
    for point in entry_points(group=GROUP):
        try:
            point.load()
        except Exception as error:
            raise InputError(f"the entry point {point.name} of {GROUP} cannot be loaded: {error}") from error
    for name in names:
        try:
            importlib.import_module(name)
        except Exception as error:
            raise InputError(
                f"--import {name}: {type(error).__name__}: {error}; name a module as in import statements, in this "
                "folder or installed"
            ) from error
        if name not in imported:
            imported.append(name)
