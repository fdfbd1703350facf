"""The figures: of the runs that are there, and naming the command for those that are not."""

import itertools
import shutil

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from pyro_nbvae.experiments import decoder, figures
from pyro_nbvae.study import plots as plotting
from pyro_nbvae.study.cli import main
from pyro_nbvae.study.provenance import write_page
from pyro_nbvae.study.scales import Reproduction
from pyro_nbvae.study.tables import cells


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """The runs of two variants of the main table."""
    folder = str(tmp_path_factory.mktemp("out"))
    grid = ["--scale", "smoke", "--data", "digits", "--samples", "30", "--jobs", "2", "--out", folder]
    main(["reproduce", "main", *grid, "--variants", "EX-C", "P-VAE"])
    return folder


def test_every_figure_whose_runs_are_there_is_drawn(out, capsys):
    capsys.readouterr()
    figures.run(figures.Arguments(scale="smoke", data="digits", out=out))
    printed = capsys.readouterr().out.split("\n")
    missing = {line.split(":")[0]: line for line in printed if "no runs" in line}
    assert set(missing) == {"priors", "rate_distortion", "features"}
    again = "no runs; make them with nbvae reproduce decoder --scale smoke --data digits --out"
    assert again in missing["features"] and "reproduce beta" in missing["rate_distortion"]
    drawn = [line for line in printed if line.endswith(".png")]
    assert len(drawn) == len(figures.PLOTS) - 3
    for path in drawn:
        with Image.open(path) as picture:
            assert min(picture.size) > 200 and np.asarray(picture.convert("L")).std() > 5


def test_runs_whose_checkpoints_were_deleted_are_left_out(out, tmp_path, capsys):
    shutil.copytree(out, tmp_path, dirs_exist_ok=True)
    deleted = tmp_path / "smoke" / "digits" / "EX-C" / "seed-0"
    (deleted / "checkpoint.pt").unlink()
    for cell in cells(decoder.TABLE, Reproduction(data=("digits",), seeds=(0,), out=str(tmp_path))):
        if cell.config.decoder == "released_linear":
            shutil.copytree(deleted, cell.folder)
    capsys.readouterr()
    figures.run(figures.Arguments(scale="smoke", data="digits", out=str(tmp_path)))
    missing = {line.split(":")[0] for line in capsys.readouterr().out.split("\n") if "no runs" in line}
    assert missing == {"priors", "rate_distortion", "features"}


@pytest.mark.parametrize(("low", "high"), [(0.21, 0.45), (0.3, 4), (0.03, 3), (0.004, 0.9), (1e-4, 300), (1e-9, 1e6)])
def test_labels_of_logarithmic_axes_are_there_and_do_not_overlap(low, high):
    figure = Figure(figsize=(4.2, 3.9), layout="constrained")
    canvas, axes = FigureCanvasAgg(figure), figure.subplots()
    axes.scatter([low, high], [low, high])
    plotting._logarithmic(axes)
    canvas.draw()
    for axis, ends in ((axes.xaxis, ("x0", "x1")), (axes.yaxis, ("y0", "y1"))):
        inside = [
            tick.label1.get_window_extent()
            for tick, at in zip(axis.get_major_ticks(), axis.get_majorticklocs(), strict=True)
            if axis.get_view_interval()[0] <= at <= axis.get_view_interval()[1]
        ]
        assert len(inside) >= 2
        spans = sorted((getattr(box, ends[0]), getattr(box, ends[1])) for box in inside)
        assert all(one[1] < other[0] for one, other in itertools.pairwise(spans))


def test_bias_and_noise_has_a_panel_for_each_case(tmp_path):
    def row(case, temperature, bias):
        shown = {"way": "arrival", "temperature": temperature, "bias": bias, "± bias": 0.1, "noise": 1.0}
        return {"case": case, "posterior": "Poisson", **shown}

    widths = []
    for cases in (["a"], ["a", "b"]):
        path = tmp_path / f"{len(cases)}.png"
        plotting.plot_bias_and_noise([row(c, t, b) for c in cases for t, b in ((0.1, 0.02), (None, 0.9))], path)
        with Image.open(path) as picture:
            widths.append(picture.size[0])
    assert widths[1] == 2 * widths[0]


def test_a_page_says_where_its_table_comes_from(tmp_path):
    text = write_page(tmp_path / "new" / "page.md", [{"a": 1.5, "b": None}, {"a": 2}], "Some numbers", "python -m x")
    assert text == (tmp_path / "new" / "page.md").read_text()
    table, under = text.split("\n\n")
    assert [line.replace(" ", "") for line in table.splitlines()][2:] == ["|1.5||", "|2||"]
    assert under.startswith("Some numbers (`python -m x`; 2") and "commit" in under and "threads" in under
