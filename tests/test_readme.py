"""The README's own code runs."""

import contextlib
import io
import re
from pathlib import Path

import numpy as np
import pyro
import torch
from PIL import Image

from pyro_nbvae.guides import PoissonGuide
from pyro_nbvae.models import PoissonModel

ROOT = Path(__file__).parents[1]


def test_python_of_the_readme_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pyro.clear_param_store()
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code, "README.md", "exec"), {})
    lines = printed.getvalue().splitlines()
    losses = [float(line.split()[1]) for line in lines[:-1]]
    assert losses[-1] < losses[0] - 50
    with Image.open(tmp_path / "digits.png") as picture:
        assert np.asarray(picture.convert("L")).std() > 50


def test_the_page_on_saving_loads_what_it_saves(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def make_pair():
        model = PoissonModel((5,), 3, decoder="mlp")
        return model, PoissonGuide(model, encoder="mlp")

    torch.manual_seed(0)
    model, guide = make_pair()
    model.initialize(torch.rand(9, 5)), guide.initialize(torch.rand(9, 5))
    (code,) = re.findall(r"## Saving.*?```python\n(.*?)```", (ROOT / "docs/programs.md").read_text(), re.DOTALL)
    names = {"model": model, "guide": guide, "make_pair": make_pair}
    exec(compile(code, "programs.md", "exec"), names)
    x, z = torch.rand(4, 5), torch.rand(4, 3)
    assert names["model"] is not model
    torch.testing.assert_close(names["model"].eval().decode(z), model.eval().decode(z))
    torch.testing.assert_close(names["guide"].eval().encode(x), guide.eval().encode(x))


def test_links_of_the_documents_lead_somewhere():
    for document in (ROOT / "README.md", *ROOT.glob("docs/*.md")):
        for target in re.findall(r"\]\(([^)#:]+)\)", document.read_text()):
            assert (document.parent / target).exists(), f"{document.name}: {target}"
