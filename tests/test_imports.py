"""Imports go one way: a layer knows those below it and none above (CONTRIBUTING.md, "Where things are")."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "pyro_nbvae"
# from the bottom; what stands in one line may know each other
LAYERS = [
    {"errors", "batching", "rates"},
    {"distributions"},
    {"infer", "likelihoods", "networks"},
    {"vae"},
    {"models"},
    {"guides"},
    {"metrics", "sampling"},
    {"study"},
    {"experiments"},
    {"__main__"},
]
RANK = {name: rank for rank, layer in enumerate(LAYERS) for name in layer}


def imports(path):
    """The parts of the package that a module imports, wherever it does, but for the types alone."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            node.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("pyro_nbvae"):
            names = [node.module] if node.module != "pyro_nbvae" else [f"pyro_nbvae.{a.name}" for a in node.names]
            yield from (name.split(".")[1] for name in names)


MODULES = [path for path in PACKAGE.rglob("*.py") if path.parent != PACKAGE or path.stem != "__init__"]
MODULES += [path for folder in ("models", "guides", "experiments") for path in (PACKAGE / folder).glob("*.py")]


@pytest.mark.parametrize("path", sorted(set(MODULES)), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_module_knows_nothing_above_it(path):
    part = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    above = {name for name in imports(path) if name in RANK and RANK[name] > RANK[part]}
    assert not above, f"{part} imports {', '.join(above)}"


def test_distributions_and_estimators_know_no_image():
    for folder in ("distributions", "infer"):
        for path in (PACKAGE / folder).rglob("*.py"):
            assert "image" not in path.read_text().lower(), path


@pytest.mark.parametrize(
    ("given", "spins"),
    [({}, "1000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, "None")],
)
def test_threads_soon_sleep_while_they_wait(given, spins):
    """It is set before PyTorch is loaded, which reads it once, and a user's own choice is kept."""
    code = "import sys, os, pyro_nbvae; assert 'torch' not in sys.modules; print(os.environ.get('GOMP_SPINCOUNT'))"
    environment = {k: v for k, v in os.environ.items() if k not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")} | given
    told = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert told.stdout.strip() == spins
