"""All settings are in setup.cfg; here is what must be there before a package is built."""

from pathlib import Path

from setuptools import setup

for name in ("models", "guides", "experiments"):
    if not (Path(__file__).parent / "pyro_nbvae" / name / "__init__.py").is_file():
        raise SystemExit(
            f"pyro_nbvae/{name} is not a folder here: it is a symbolic link in the repository; clone it with "
            "git -c core.symlinks=true clone, or copy the folder there"
        )

setup()
