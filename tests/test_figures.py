"""The figures: of the runs that are there, and naming the command for those that are not."""

import numpy as np
import pytest
from PIL import Image

from pyro_nbvae.cli import main
from pyro_nbvae.experiments import figures


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """The runs of two variants of the main table."""
    folder = str(tmp_path_factory.mktemp("out"))
    grid = ["--scale", "smoke", "--data", "digits", "--samples", "30", "--jobs", "2", "--out", folder]
    main(["reproduce", "main", *grid, "--variants", "EX-C", "P-VAE"])
    return folder


def test_every_figure_whose_runs_are_there_is_drawn(out, capsys):
    capsys.readouterr()
    figures.main(figures.Arguments(scale="smoke", data="digits", out=out))
    printed = capsys.readouterr().out.split("\n")
    missing = {line.split(":")[0]: line for line in printed if "no runs" in line}
    assert set(missing) == {"rate_distortion", "features"}
    again = "no runs; make them with nbvae reproduce decoder --scale smoke --data digits --out"
    assert again in missing["features"] and "reproduce beta" in missing["rate_distortion"]
    drawn = [line for line in printed if line.endswith(".png")]
    assert len(drawn) == len(figures.FIGURES) - 2
    for path in drawn:
        with Image.open(path) as picture:
            assert min(picture.size) > 200 and np.asarray(picture.convert("L")).std() > 5
