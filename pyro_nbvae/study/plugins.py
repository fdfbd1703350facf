"""The user's own modules, imported so that the variants, data and metrics that they register are known.

``nbvae --import my_module ...`` names them; an installed package lists its own in the entry-point group
``pyro_nbvae``. The processes of a grid import the same modules.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib.metadata import entry_points

from pyro_nbvae.errors import InputError

GROUP = "pyro_nbvae"
# Names of the modules imported so far, for other processes.
imported: list[str] = []


def import_modules(names: Sequence[str] = ()) -> None:
    """Import the modules with these names, found as ``python -m`` finds them, and those of installed packages.

    Args:
        names: names of modules, as in import statements.

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
        except (Exception, SystemExit) as error:  # a script may end itself
            raise InputError(
                f"--import {name}: {type(error).__name__}: {error}; give a module's name as in an import statement, in "
                "this folder or installed"
            ) from error
        if name not in imported:
            imported.append(name)
