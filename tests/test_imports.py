"""Imports go one way: a layer knows those below it and none above (CONTRIBUTING.md, "Where things are")."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "pyro_nbvae"
# from the bottom; what stands in one line may know each other
LAYERS = [
    {"errors", "seeds", "batching", "arriving"},
    {"distributions"},
    {"infer", "likelihoods", "networks", "priors"},
    {"vae"},
    {"models"},
    {"guides"},
    {"metrics", "sampling"},
    {"encoding"},
    {"study"},
    {"experiments"},
    {"__main__"},
]
RANK = {name: rank for rank, layer in enumerate(LAYERS) for name in layer}
LINKS = ("models", "guides", "experiments")
FILES = [p for p in PACKAGE.rglob("*.py") if p.relative_to(PACKAGE).parts[0] not in LINKS]
FILES += [path for name in LINKS for path in (PACKAGE / name).glob("*.py")]
MODULES = {
    ".".join(["pyro_nbvae", *path.relative_to(PACKAGE).with_suffix("").parts]).removesuffix(".__init__"): path
    for path in sorted(FILES)
}
LIBRARY = {
    name: path for name, path in MODULES.items() if not re.match(r"pyro_nbvae\.(study|experiments|__main__)", name)
}


def imports(path):
    """The modules of the package that a module imports, also inside functions, but for the types alone."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            node.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("pyro_nbvae"):
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield whole if whole in MODULES else node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.startswith("pyro_nbvae"))


@pytest.mark.parametrize("name", [name for name in MODULES if name != "pyro_nbvae"])
def test_a_module_knows_nothing_above_it(name):
    part = name.split(".")[1]
    above = {other for other in imports(MODULES[name]) if "." in other and RANK[other.split(".")[1]] > RANK[part]}
    assert not above, f"{name} imports {', '.join(above)}"


def test_no_modules_import_each_other():
    graph = {name: {other for other in imports(path) if other != name} for name, path in MODULES.items()}

    def reached(start):
        seen, todo = set(), [start]
        while todo:
            for other in graph[todo.pop()] - seen:
                seen.add(other)
                todo.append(other)
        return seen

    assert not [name for name in graph if name in reached(name)]


def test_the_library_knows_no_flag_no_download_and_no_run_folder():
    """Only ``pyro_nbvae.load`` leads to the study; no text of the library, documentation included, names a flag."""
    for name, path in LIBRARY.items():
        text = path.read_text()
        for word in re.findall(
            r"--[a-z][a-z-]+|nbvae (?:train|evaluate|generate)|urllib|requests|torch\.hub|config\.json", text
        ):
            raise AssertionError(f"{name} has {word}")
        if name != "pyro_nbvae":
            assert "pyro_nbvae.study" not in text, name


def test_models_and_guides_are_one_module_each():
    """``models`` beside the package and ``pyro_nbvae.models`` are one file: what they register is registered once."""
    code = (
        "import sys, pyro_nbvae.study.cli, pyro_nbvae.study.training, pyro_nbvae.experiments.main;"
        "print([name for name in sys.modules if name.split('.')[0] in ('models', 'guides', 'experiments')])"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert told.stdout.strip() == "[]"


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
