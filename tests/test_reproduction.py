"""The runner of the tables: what is finished stays, what fails is named, and the table is of the runs' own figures."""

import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from pyro_nbvae.cli import table_of
from pyro_nbvae.config import TABLES, Reproduction
from pyro_nbvae.errors import InputError
from pyro_nbvae.reproduction import Table, cells, reproduce
from pyro_nbvae.tables import latex, markdown

LINEAR = {"latents": 6, "encoder": "linear", "decoder": "linear", "batch_size": 500}
GRID = Table(
    name="tiny",
    title="A tiny grid",
    variants=("EX-C", "G-VAE"),
    data=("digits",),
    metrics=("mse", "ssim", "fid_c", "fano"),
    varied=lambda base: {"": LINEAR, "beta 2": {**LINEAR, "beta": 2.0}},
)


@pytest.fixture
def options(tmp_path):
    return Reproduction(out=str(tmp_path / "out"), seeds=(0, 1), samples=30)


def test_a_table_is_of_its_runs_figures_and_finished_runs_stay(options):
    text = reproduce(GRID, options)
    folder = options.out + "/smoke/"
    table = pd.read_csv(folder + "tiny.csv", float_precision="round_trip")
    assert len(table) == 8 and set(table["label"]) == {"EX-C", "EX-C beta 2", "G-VAE", "G-VAE beta 2"}
    for cell in cells(GRID, options):
        metrics = json.loads((cell.folder / "metrics.json").read_text())
        assert (metrics["epochs"], metrics["generated_images"]) == (1, 30)
        (row,) = [r for r in table.to_dict("records") if (r["label"], r["fid_c"]) == (cell.label, metrics["fid_c"])]
        assert row["mse"] == pytest.approx(metrics["mse"])
    mse = table[table["label"] == "EX-C beta 2"]["mse"]
    line = next(line for line in text.splitlines() if line.startswith("| EX-C beta 2 "))
    assert f"{np.mean(mse):.4f} ± {np.std(mse, ddof=1):.4f}" in line
    for condition in ("epochs 1;", "training images 1,500;", "batches of 500;", "seeds 0, 1.", "30 samples"):
        assert condition in text
    assert f"nbvae reproduce tiny --scale smoke --seeds 0 1 --out {options.out} --samples 30\n" in text
    assert "-" in next(line for line in text.splitlines() if line.startswith("| G-VAE ")).split("|")[-2]

    stamps = {p: p.stat().st_mtime_ns for c in cells(GRID, options) for p in c.folder.glob("[cm]*.*[tn]")}
    files = {p: t for p, t in stamps.items() if p.name in ("checkpoint.pt", "metrics.json")}
    assert len(files) == 16
    assert reproduce(GRID, options) == text
    assert all(p.stat().st_mtime_ns == t for p, t in files.items())


def test_what_fails_is_named_and_the_others_go_on(options):
    grid = replace(GRID, varied=lambda base: {"": LINEAR})
    options.seeds = (0,)
    in_the_way = cells(grid, options)[0].folder
    in_the_way.mkdir(parents=True)
    (in_the_way / "notes.txt").write_text("mine")
    with pytest.raises(InputError) as error:
        reproduce(grid, options)
    message = str(error.value)
    assert message.startswith("1 of 2 runs failed") and str(in_the_way) in message and "holds no run" in message
    assert (in_the_way / "notes.txt").read_text() == "mine"
    assert list(pd.read_csv(options.out + "/smoke/tiny.csv")["label"]) == ["G-VAE"]
    (in_the_way / "notes.txt").unlink()
    assert "| EX-C " in reproduce(grid, options)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scale": "tiny"}, "unknown scale 'tiny': choose from smoke"),
        ({"data": ("cats",)}, "unknown data 'cats': choose from digits"),
        ({"variants": ("VAE",)}, "unknown variant 'VAE': choose from MC-G"),
        ({"seeds": (-1,)}, "seed must be 0 to"),
    ],
)
def test_a_grid_that_names_what_does_not_exist(options, change, message):
    with pytest.raises(InputError, match=message):
        reproduce(GRID, replace(options, **change))


@pytest.mark.parametrize("name", TABLES)
def test_every_table_is_a_grid_that_can_be(name, options):
    table = table_of(name)
    grid = cells(table, options)
    assert table.name == name and len({cell.folder for cell in grid}) == len(grid)


def test_the_best_of_a_column_is_bold():
    groups = {
        "a": [{"mse": 1.0, "ssim": 0.5, "kl": 3.0}],
        "b": [{"mse": 2.0, "ssim": 0.75, "kl": 4.0}, {"mse": 4.0, "ssim": 0.75, "kl": 5.0}],
        "c": [],
    }
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in markdown(groups).splitlines()]
    assert rows[0] == ["", "MSE", "SSIM", "KL"]
    assert rows[2:] == [
        ["a", "**1.0000**", "0.500", "3.00"],
        ["b", "3.0000 ± 1.4142", "**0.750 ± 0.000**", "4.50 ± 0.71"],
        ["c", "-", "-", "-"],
    ]
    lines = latex(groups, ["ssim"], caption="fashion_mnist").splitlines()
    assert r"b & \textbf{0.750 $\pm$ 0.000} \\" in lines and r"\caption{fashion\_mnist}" in lines
