"""The runner of the tables: what is finished stays, what fails is named, and the table is of the runs' own figures."""

import json
import os
import re
import signal
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pyro
import pytest

import pyro_nbvae.experiments.tables  # noqa: F401
from pyro_nbvae.errors import InputError
from pyro_nbvae.study import plugins, results, variants
from pyro_nbvae.study.cli import main
from pyro_nbvae.study.data import SOURCES
from pyro_nbvae.study.evaluation import evaluate, settings
from pyro_nbvae.study.folder import SCHEMA, Run
from pyro_nbvae.study.jobs import JobError, LocalProcesses
from pyro_nbvae.study.report import command, render, report, reproduce, summary
from pyro_nbvae.study.scales import SCALES, Reproduction
from pyro_nbvae.study.tables import TABLES, Table, cells

LINEAR = {"latents": 6, "encoder": "linear", "decoder": "linear", "batch_size": 500}
GRID = Table(
    name="tiny",
    title="A tiny grid",
    variants=("EX-C", "G-VAE"),
    data=("digits",),
    metrics=("mse", "ssim", "fid_c", "fano"),
    varied=lambda base: {"": LINEAR, "beta 2": {**LINEAR, "beta": 2.0}},
)


def metrics_of(cell):
    return cell.run.read_json("metrics.json")


@pytest.fixture
def options(tmp_path):
    return Reproduction(out=str(tmp_path / "out"), seeds=(0, 1), samples=30)


def test_a_table_is_of_its_runs_values_and_finished_runs_stay(options, monkeypatch):
    monkeypatch.setitem(TABLES, "tiny", GRID)
    text = reproduce(GRID, options)
    folder = options.out + "/smoke/"
    table = pd.read_csv(folder + "tiny.csv")
    assert len(table) == 8 and set(table["label"]) == {"EX-C", "EX-C beta 2", "G-VAE", "G-VAE beta 2"}
    for cell in cells(GRID, options):
        metrics = json.loads((cell.folder / "metrics.json").read_text())
        assert (metrics["epochs"], metrics["generated_samples"]) == (1, 30)
        which = (cell.label, cell.config.seed)
        (row,) = [r for r in table.to_dict("records") if (r["label"], r["seed"]) == which]
        assert [row[k] for k in ("mse", "fid_c")] == pytest.approx([metrics[k] for k in ("mse", "fid_c")])
    mse = table[table["label"] == "EX-C beta 2"]["mse"]
    line = next(line for line in text.splitlines() if line.startswith("| EX-C beta 2 "))
    assert f"{np.mean(mse):.4f} ± {np.std(mse, ddof=1):.4f}" in line
    for condition in (
        "epochs 1;",
        "training data 1,500;",
        "batches of 500;",
        "seeds 0, 1;",
        "samples for FID and KID 30;",
    ):
        assert condition in text
    assert "`nbvae reproduce tiny --scale smoke --seeds 0 1 --samples 30`\n" in text
    made = metrics_of(cells(GRID, options)[0])
    for name in ("commit", "machine", "torch_version", "date"):
        assert str(made[name] or "unknown") in text
    assert "-" in next(line for line in text.splitlines() if line.startswith("| G-VAE ")).split("|")[-2]

    stamps = {p: p.stat().st_mtime_ns for c in cells(GRID, options) for p in c.folder.glob("[cm]*.*[tn]")}
    files = {p: t for p, t in stamps.items() if p.name in ("checkpoint.pt", "metrics.json")}
    assert len(files) == 16
    assert reproduce(GRID, options) == text
    assert all(p.stat().st_mtime_ns == t for p, t in files.items())
    options.samples = 31
    assert "samples for FID and KID 31;" in reproduce(GRID, options)
    checkpoints = [p for p in files if p.suffix == ".pt"]
    assert all((p.stat().st_mtime_ns == files[p]) == (p in checkpoints) for p in files)


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
    changed = {**SCALES["smoke"].config, "lr": 0.1}  # the folder's name is of what a table varies
    with pytest.MonkeyPatch.context() as patch, pytest.raises(InputError) as error:
        patch.setitem(SCALES, "smoke", replace(SCALES["smoke"], config=changed))
        reproduce(replace(grid, variants=("EX-C",)), options)
    assert "holds another run (lr 0.001 there, 0.1 here)" in str(error.value)


def test_a_cell_gains_the_metrics_it_lacks_without_being_trained_again(options):
    """A table that lists another metric measures that, keeps the other figures, and leaves the checkpoint alone."""
    grid = replace(GRID, metrics=("mse",), varied=lambda base: {"": LINEAR})
    options.seeds, options.jobs = (0,), 2
    reproduce(grid, options)
    folders = [cell.folder for cell in cells(grid, options)]
    before = [json.loads((folder / "metrics.json").read_text()) for folder in folders]
    stamps = [(folder / "checkpoint.pt").stat().st_mtime_ns for folder in folders]
    text = reproduce(replace(grid, metrics=("mse", "gradient_noise", "knn_200")), options)
    after = [json.loads((folder / "metrics.json").read_text()) for folder in folders]
    assert stamps == [(folder / "checkpoint.pt").stat().st_mtime_ns for folder in folders]
    for old, new in zip(before, after, strict=True):
        assert set(new) - set(old) == {"gradient_noise", "knn_200"}
        assert all(new[name] == old[name] for name in old)
        assert new["gradient_noise"] > 0 and 0.2 < new["knn_200"] <= 1
        assert f"{new['knn_200']:.3f}" in text
    assert "gradient noise" in text and "kNN 200" in text
    assert len(pyro.get_param_store()) == 0
    # an evaluation by hand, with the bound, and another metric after it
    evaluate(Run(folders[0]), samples=30, importance_samples=2, progress=False)
    reproduce(replace(grid, metrics=("mse", "means_knn_200")), options)
    last = json.loads((folders[0] / "metrics.json").read_text())
    assert last["importance_weighted_bound"] is not None and last["importance_samples"] == 2
    assert set(last) == set(after[0]) | {"means_knn_200"}


@pytest.mark.parametrize("name", ["config.json", "checkpoint.pt", "metrics.json", "log.csv"])
def test_a_damaged_cell_is_set_aside_and_trained_anew(options, name):
    grid = replace(GRID, varied=lambda base: {"": LINEAR}, variants=("EX-C",))
    options.seeds = (0,)
    text = reproduce(grid, options)
    folder = cells(grid, options)[0].folder
    damages = [(folder / name).read_bytes()[:-30]] + [b"[1, 2]"] * (name == "config.json")  # more in tests/attack
    for content in damages:
        (folder / name).write_bytes(content)
        assert reproduce(replace(grid, metrics=("mse", "svm_200")), options).startswith("A tiny grid.")
        assert reproduce(grid, options) == text
    assert (folder / f"{name}.damaged").exists() == (name in ("config.json", "checkpoint.pt"))


def test_a_grid_is_checked_before_anything_is_trained(options):
    """Features, samples, device and jobs; nothing is written."""
    for change, message in (
        ({"features": ("inception",), "inception_weights": "/nowhere"}, "no Inception weights"),
        ({"features": ("vgg",)}, "unknown features 'vgg'"),
        ({"samples": 0}, "--samples must be 2 to"),
        ({"samples": -1}, "--samples must be 2 to"),
        ({"device": "abacus"}, "device 'abacus' is not available"),
        ({"jobs": 0}, "--jobs must be 1 to"),
    ):
        with pytest.raises(InputError, match=message):
            reproduce(GRID, replace(options, **change))
    assert not Path(options.out).exists()


def test_a_metric_that_does_not_exist_is_refused_before_anything_runs(options):
    with pytest.raises(InputError, match="unknown metric 'mes': choose from mse"):
        reproduce(replace(GRID, metrics=("mes",)), options)


OWN_MODULE = """
from dataclasses import dataclass, replace
from typing import Literal
import torch
from pyro_nbvae.study.data import Source, register_data
from pyro_nbvae.study.tables import Table, register_table
from pyro_nbvae.study.tree import Kind, PyroELBO
from pyro_nbvae.study.variants import PoissonVAE, register_variant

@dataclass(frozen=True, kw_only=True)
class Mine(PoissonVAE):
    kind: Kind[Literal["mine"]] = "mine"

register_variant("MINE", Mine(estimator=PyroELBO()))
counts = torch.poisson(torch.full((60, 7), 3.0), generator=torch.Generator().manual_seed(0))
register_data("spikes", Source((7,), lambda root: (counts[:50], counts[50:], None, None)))
LINEAR = {"latents": 6, "encoder": "linear", "decoder": "linear", "batch_size": 500, "likelihood": "poisson"}
register_table(Table(
    name="my-table", title="My title", variants=("MINE",), data=("spikes",), metrics=("mse", "ssim", "elbo"),
    varied=lambda base: {"": LINEAR},
))
"""


def test_the_processes_of_a_grid_know_what_a_user_registered(tmp_path, monkeypatch, capsys):
    """Also a table: the command finds it by its name."""
    (tmp_path / "my_own_module.py").write_text(OWN_MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    monkeypatch.setattr(plugins, "imported", [])
    for registry, name in (
        (variants.VARIANTS, "MINE"),
        (variants.KINDS, "mine"),
        (SOURCES, "spikes"),
        (TABLES, "my-table"),
    ):
        monkeypatch.setitem(registry, name, None)
        del registry[name]
    words = ["--scale", "smoke", "--samples", "30", "--jobs", "2", "--out", str(tmp_path / "out")]
    main(["--import", "my_own_module", "reproduce", "my-table", *words])
    text = capsys.readouterr().out
    assert text.startswith("My title.") and "| MINE " in text and "SSIM" not in text
    assert "nbvae --import my_own_module reproduce my-table --scale smoke --samples 30 --jobs 2`" in text
    unregistered = replace(TABLES["my-table"], name="another")
    assert "A table of its own, another" in reproduce(unregistered, Reproduction(out=str(tmp_path / "out"), samples=30))
    assert command(TABLES["main"], Reproduction()).startswith("nbvae --import my_own_module reproduce main")
    with pytest.raises(SystemExit):
        main(["reproduce", "my-tables"])
    assert re.search("unknown table 'my-tables': choose from .*main", error := capsys.readouterr().err)
    assert error.endswith(", my-table\n")


@pytest.mark.parametrize("images", [False, True])
def test_data_that_have_changed_leave_no_old_row(images, tmp_path):
    """And data without FID, also counts in the shape of images, are finished: the second time nothing is run."""
    path, rng = tmp_path / "x.npy", np.random.default_rng(0)
    np.save(path, rng.poisson(3.0, (60, 1, 8, 8)) if images else rng.normal(size=(60, 5)))
    table = Table(
        name="own",
        title="Own data",
        variants=("P-VAE", "G-VAE"),
        data=(str(path),),
        metrics=("mse", "elbo"),
        varied=lambda base: {"": {**LINEAR, "likelihood": "poisson" if images else "gaussian"}},
    )
    chosen = Reproduction(out=str(tmp_path / "out"), samples=30, seeds=(0,))
    reproduce(table, replace(chosen, variants=("P-VAE",)))
    (cell, _) = cells(table, chosen)
    made = (cell.folder / "metrics.json").stat().st_mtime_ns
    reproduce(table, replace(chosen, variants=("P-VAE",)))
    assert (cell.folder / "metrics.json").stat().st_mtime_ns == made
    np.save(path, np.load(path)[::-1])
    with pytest.raises(InputError, match=r"x\.npy does not hold the data that .*P-VAE"):
        reproduce(table, chosen)


@pytest.mark.parametrize("part", [["main"], ["--data", "mnist"], ["--variants", "CMP"], ["--seeds", "0"]])
def test_a_part_of_the_tables_does_not_replace_the_report(part, tmp_path, monkeypatch, capsys):
    page = tmp_path / "docs" / "results.md"
    page.parent.mkdir()
    page.write_text("all tables\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        main(["reproduce", "--report", *part])
    assert "--report writes all tables" in capsys.readouterr().err
    assert page.read_text() == "all tables\n"


PAPER = {("digits", "mse", "EX-C"): 0.05, ("digits", "mse", "MC-C"): 0.125}


def test_the_report_is_what_the_folders_hold_and_is_made_again_without_them(options, tmp_path):
    """Seed 1 and the second variant were never run: the page has no line for them, and nothing is run."""
    compare = {("EX-C", "G-VAE"): ("mse",)}
    grid = replace(GRID, varied=lambda base: {"": LINEAR}, compare=compare, paper=PAPER)
    reproduce(grid, replace(options, seeds=(0,), variants=("EX-C",)))
    kept = tmp_path / "results"
    tables = [grid, replace(grid, name="other", data=("mnist",))]
    path = report(tables, options, tmp_path / "docs" / "results.md", kept)
    text = path.read_text()
    assert "**digits**, table `tiny`, scale `smoke`" in text and "seeds 0;" in text
    (line,) = (line for line in text.splitlines() if line.startswith("| EX-C"))
    table = pd.read_csv(kept / "smoke.csv")
    metrics = metrics_of(cells(grid, options)[0])
    assert [cell.strip() for cell in line.split("|")[2:5]] == ["0", f"{metrics['mse']:.4f}", "0.05"]
    assert [cell.strip() for cell in next(x for x in text.splitlines() if "| MC-C" in x).split("|")[2:5]] == [
        "-",
        "-",
        "0.125",
    ]
    # one seed decides nothing
    assert "What the rows decide" not in text and "G-VAE" not in text and "other" not in text and "small" not in text
    assert not [cell for cell in cells(grid, options) if cell.config.variant == "G-VAE" and cell.folder.exists()]

    assert table["mse"][0] == pytest.approx(metrics["mse"], rel=1e-6) and table["commit"][0] == metrics["commit"]
    assert json.loads(table["config"][0])["latents"] == 6
    rows = (kept / "smoke.csv").read_bytes()
    again = report(tables, replace(options, out=str(tmp_path / "nothing")), tmp_path / "again.md", kept)
    assert again.read_text() == text
    assert (kept / "smoke.csv").read_bytes() == rows
    # rows of runs that a table would not train like that do not count
    others = [replace(table, varied=lambda base: {"": {**LINEAR, "latents": 7}}) for table in tables]
    with pytest.raises(InputError, match=r"no finished run in .* and no row in"):
        report(others, replace(options, out=str(tmp_path / "nothing")), again, kept)
    assert again.read_text() == text
    # nor are those of models of an older version
    older = rows.decode().replace('""schema_version"": ' + str(SCHEMA), '""schema_version"": ' + str(SCHEMA - 1))
    assert older != rows.decode()
    (kept / "smoke.csv").write_text(older)
    with pytest.raises(InputError, match=r"no finished run in .* and no row in"):
        report(tables, replace(options, out=str(tmp_path / "nothing")), again, kept)


def test_a_damaged_file_of_results_is_named(options, tmp_path):
    (tmp_path / "smoke.csv").write_text("a,b\n1,2\n")
    with pytest.raises(InputError, match=r"smoke.csv is not a table of results"):
        report([GRID], options, tmp_path / "results.md", tmp_path)
    assert (tmp_path / "smoke.csv").read_text() == "a,b\n1,2\n" and not (tmp_path / "results.md").exists()


@pytest.mark.parametrize("name", [*TABLES])
def test_comparisons_are_of_rows_and_metrics_that_the_table_has(name, options):
    table = TABLES[name]
    labels = {cell.label for cell in cells(table, options)}
    for pair, metrics in table.compare.items():
        assert set(pair) <= labels and set(metrics) <= set(table.metrics), pair
    assert {label for pair in table.curves for label in pair} <= set(table.variants)
    assert set(table.within) <= set(table.metrics)
    for data, metric, label in table.paper:
        assert data in table.data and metric in table.metrics and label in labels


EVALUATED = settings(epochs=1, seed=0, samples=30)


def finished(cell, **values):
    """Write a run folder as if the run had been trained and evaluated."""
    cell.run.folder.mkdir(parents=True, exist_ok=True)
    cell.run.write_config(cell.config, (1, 8, 8))
    cell.run.write_json("metrics.json", {**EVALUATED, **values})


def lines_of(text):
    """Return the lines of Markdown tables, as {label: cells}."""
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    return {label: cells for label, *cells in lines}


def test_the_paper_stands_beside_ours_in_its_features(options):
    paper = {("digits", "fid", "EX-C"): 78.4, ("digits", "fid", "MC-C"): 99.0, ("mnist", "mse", "EX-C"): 0.01}
    grid = replace(GRID, metrics=("fid", "fid_c"), paper=paper)
    for cell in cells(grid, options):
        finished(cell, fid_c=5.0, train_size=1500, fid=80.0 if cell.config.seed == 0 else None)
    kept = Path(options.out) / "kept"
    text = report([grid], replace(options, seeds=(0,)), Path(options.out) / "a.md", kept).read_text()
    lines = lines_of(text)
    assert lines[""] == ["seeds", "FID-c", "FID", "FID, paper"]
    assert lines["EX-C"] == ["0", "**5.00**", "**80.0**", "78.4"]
    assert lines["MC-C"] == ["-", "-", "-", "99"]
    assert "training data 1,500;" in text and "mnist" not in text


def test_rows_that_decide_are_listed(options, tmp_path):
    grid = replace(GRID, varied=lambda base: {"": LINEAR}, compare={("EX-C", "G-VAE"): ("mse", "fid_c")}, paper={})
    chosen = replace(options, seeds=(0, 1, 2))
    for cell in cells(grid, chosen):
        finished(cell, mse=(1.0 if cell.label == "EX-C" else 2.0) + cell.config.seed / 100, fid_c=5.0)
    text = report([grid], chosen, tmp_path / "a.md", tmp_path / "kept").read_text()
    assert text.endswith("- `tiny`, scale `smoke`, digits. **MSE**: EX-C lower than G-VAE.\n")


def test_other_samplers_stand_apart(options):
    """Distances of a mixture or of reconstructions have a table of their own, and are never the best of the models."""
    grid = replace(GRID, metrics=("fid_c",), varied=lambda base: {"": LINEAR})
    for cell in cells(grid, options):
        finished(cell, fid_c=5.0 + cell.config.seed, kid_c=1.0)
        if cell.label == "EX-C":
            cell.run.write_json("metrics-posterior.json", {**EVALUATED, "fid_c": 1.0})
            if cell.config.seed == 1:
                cell.run.write_json("metrics-mixture.json", {**EVALUATED, "fid_c": 2.0})
    rows = results.select(results.finished(cells(grid, options), 30), cells(grid, options))
    text = render(grid, options, cells(grid, options), rows)
    above, below = text.split("By sampler")
    assert lines_of(above)["EX-C"] == ["0, 1", "**5.50 ± 0.71**"]
    # only seed 1 has all samplers
    assert lines_of(below)["EX-C"] == ["6.00", "2.00", "1.00"]


def test_a_row_is_of_a_finished_run_and_its_evaluation(options, tmp_path):
    grid = replace(GRID, varied=lambda base: {"": LINEAR}, variants=("EX-C",))
    (cell,) = cells(grid, replace(options, seeds=(0,)))
    cell.run.folder.mkdir(parents=True)
    cell.run.write_config(cell.config, (1, 8, 8))
    for wrong in ({"epochs": 0}, {"seed": 7}, {"generated_samples": 12}):
        for name in ("metrics.json", "metrics-mixture.json"):
            cell.run.write_json(name, {**EVALUATED, "mse": 1.0, "fid_c": 5.0, **wrong})
        assert results.finished([cell], 30).empty
        with pytest.raises(InputError, match="no finished run"):
            report([grid], options, tmp_path / "a.md", tmp_path / "kept")
    cell.run.write_json("metrics.json", {**EVALUATED, "mse": 1.0})
    assert list(results.finished([cell], 30)["mse"]) == [1.0]


def test_the_command_under_a_table_names_the_features_and_samples_of_its_rows(options, tmp_path, monkeypatch):
    """The page of all tables has the options of none, and the command under a table must not take its figures away."""
    monkeypatch.setattr(plugins, "imported", [])
    grid = replace(GRID, varied=lambda base: {"": LINEAR}, variants=("EX-C",), metrics=("fid", "fid_c"), name="main")
    grid = replace(grid, paper={("digits", "fid", "EX-C"): 1.0})
    made = {**EVALUATED, "fid": 80.0, "fid_c": 5.0}
    for cell, features in zip(cells(grid, options), (["classifier", "inception"], ["classifier"]), strict=True):
        cell.run.folder.mkdir(parents=True)
        cell.run.write_config(cell.config, (1, 8, 8))
        cell.run.write_json("metrics.json", {**made, "feature_sets": features})
    text = report([grid], options, tmp_path / "a.md", tmp_path / "kept").read_text()
    assert (
        "`nbvae reproduce main --scale smoke --data digits --seeds 0 1 --features classifier inception --samples 30`"
        in text
    )


def test_speeds_of_several_machines_have_no_mean():
    rows = pd.DataFrame(
        [
            {"label": label, "seed": 0, "seconds_per_step": 0.1, "mse": 1.0, "machine": name, "threads": 1}
            for label, name in (("a", "a CPU"), ("a", "a GPU"), ("b", "a GPU"), ("b", "a GPU"))
        ]
    )
    found = summary(rows, ["seconds_per_step", "mse"], {})
    assert list(found["s/step"]) == ["-", "0.100 ± 0.000"] and found["MSE"]["a"] == "**1.0000 ± 0.0000**"


@pytest.mark.parametrize(
    ("twice", "named"),
    [
        ({"seeds": (0, 1, 0)}, "digits/EX-C_.*/seed-0"),
        ({"variants": ("CMP", "CMP")}, "digits/CMP_.*/seed-0"),
        ({"data": ("x.npy", "./x.npy")}, "x-.*/EX-C_.*/seed-0"),
    ],
)
def test_what_is_named_twice_is_refused(twice, named, options, tmp_path, monkeypatch):
    """A seed that counts twice would decide claims."""
    monkeypatch.chdir(tmp_path)
    np.save("x.npy", np.zeros((20, 5), dtype=np.float32))
    with pytest.raises(InputError, match=rf"the table has .*{named} 2 times: name each"):
        cells(GRID, replace(options, **twice))


def test_a_comparison_in_an_unknown_metric_is_refused_before_anything_runs(options):
    with pytest.raises(InputError, match="unknown metric 'mes'"):
        reproduce(replace(GRID, compare={("EX-C", "G-VAE"): ("mes",)}), options)
    assert not list(Path(options.out).rglob("checkpoint.pt"))


def test_the_same_grid_goes_through_submitit(options):
    grid = replace(GRID, varied=lambda base: {"": LINEAR})
    options = replace(options, seeds=(0,), cluster="local", cluster_options=("timeout_min=60",))
    assert "| EX-C " in reproduce(grid, options) and len(list((Path(options.out) / "submitit").glob("*.pkl"))) == 4
    with pytest.raises(InputError, match="submitit refuses --cluster local nonsense=1"):
        reproduce(grid, replace(options, cluster_options=("nonsense=1",)))
    with pytest.raises(InputError, match="unknown cluster 'moon'"):
        reproduce(grid, replace(options, cluster="moon"))


def killed_or_write(path, device):
    """Work for a pool: is killed, fails, or writes where it was called."""
    if path.name == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if path.name == "fails":
        raise OSError(28, "No space left on device", str(path))
    path.write_text(device)


def test_a_killed_worker_takes_no_other_with_it(tmp_path):
    with LocalProcesses(2) as pool:
        jobs = {name: pool.submit(killed_or_write, tmp_path / name) for name in ("killed", "fails", "a", "b", "c")}
        errors = {name: job.exception() for name, job in jobs.items()}
    assert all(isinstance(errors[name], JobError) for name in ("killed", "fails"))
    assert str(errors["killed"]) == "its process was killed (exit code -9)"
    assert "No space left on device" in str(errors["fails"]) and "\n" not in str(errors["fails"])
    assert [errors[name] for name in "abc"] == [None] * 3
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == dict.fromkeys("abc", "cpu")


def wait_for(path, device):
    """Work for a pool: says that it began, and does not end."""
    path.write_text(str(os.getpid()))
    while True:
        time.sleep(600)


def test_leaving_a_pool_ends_what_it_runs(tmp_path):
    with LocalProcesses(1) as pool:
        jobs = [pool.submit(wait_for, tmp_path / name) for name in ("running", "waiting")]
        while not (tmp_path / "running").exists() or not (tmp_path / "running").read_text():
            assert not jobs[0].done()
            time.sleep(0.05)
    assert jobs[0].exception() is not None and jobs[1].cancelled() and not (tmp_path / "waiting").exists()
    assert threading.active_count() < 20
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "running").read_text()), 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scale": "tiny"}, "unknown scale 'tiny': choose from smoke"),
        ({"data": ("cats",)}, "unknown data 'cats': choose from digits"),
        ({"variants": ("VAE",)}, "unknown variant 'VAE': choose from MC-G"),
        ({"seeds": (-1,)}, "seed must be 0 to"),
        ({"jobs": 0}, "--jobs must be 1 to 1,000, got 0"),
    ],
)
def test_a_grid_that_names_what_does_not_exist(options, change, message):
    with pytest.raises(InputError, match=message):
        reproduce(GRID, replace(options, **change))


def test_a_table_of_labels_needs_labels(options, tmp_path):
    np.save(tmp_path / "x.npy", np.random.default_rng(0).integers(0, 256, (40, 1, 16, 16), np.uint8))
    with pytest.raises(InputError, match=r"x.npy has no labels, which the table latents needs"):
        reproduce(TABLES["latents"], replace(options, data=(str(tmp_path / "x.npy"),)))
    assert not (tmp_path / "out").exists()


def test_a_reason_that_runs_share_is_given_once(options, tmp_path):
    np.save(tmp_path / "x.npy", np.ones((40, 7)))
    convolutional = replace(GRID, varied=lambda base: {"": {**LINEAR, "decoder": "conv"}})
    with pytest.raises(InputError) as caught:
        reproduce(convolutional, replace(options, variants=("EX-C",), data=(str(tmp_path / "x.npy"),)))
    assert str(caught.value).startswith("2 of 2 runs failed")
    assert str(caught.value).count("conv networks need observations of shape") == 1


@pytest.mark.parametrize("name", [*TABLES])
def test_every_table_is_a_grid_that_can_be(name, options):
    table = TABLES[name]
    for scale in SCALES:
        grid = cells(table, replace(options, scale=scale))
        assert table.name == name and len({cell.folder for cell in grid}) == len(grid), scale


def test_the_best_of_a_column_is_bold():
    rows = [("a", 0, 1.0, 0.5, 3.0), ("b", 1, 2.0, 0.75, 4.0), ("b", 0, 4.0, 0.75, 5.0)]
    found = summary(
        pd.DataFrame(rows, columns=["label", "seed", "mse", "ssim", "kl"]), ["kl", "mse", "ssim"], {}, ["a", "b", "c"]
    )
    assert list(found.columns) == ["seeds", "MSE", "SSIM", "KL"]
    assert found.T.to_dict("list") == {
        "a": ["0", "**1.0000**", "0.500", "3.00"],
        "b": ["0, 1", "3.0000 ± 1.4142", "**0.750 ± 0.000**", "4.50 ± 0.71"],
        "c": ["-", "-", "-", "-"],
    }


def test_data_of_one_name_in_two_places_are_two(tmp_path):
    """And so are a set and a file of its name: each has a folder, and figures, of its own."""
    rng = np.random.default_rng(0)
    paths = []
    for place, scale in (("a", 1), ("b", 30)):
        (tmp_path / place).mkdir()
        paths.append(str(tmp_path / place / "x.npy"))
        np.save(paths[-1], scale * rng.normal(size=(60, 5)))
    grid = replace(GRID, variants=("G-VAE",), data=tuple(paths), metrics=("mse",), varied=lambda base: {"": LINEAR})
    options = Reproduction(out=str(tmp_path / "out"), seeds=(0,), samples=30)
    reproduce(grid, options)
    first, second = (json.loads((cell.folder / "metrics.json").read_text()) for cell in cells(grid, options))
    assert second["mse"] > 100 * first["mse"]


def test_auto_has_no_place_in_a_table(options):
    for variant in ("EX-C", "EX-I"):
        grid = replace(GRID, variants=(variant,), varied=lambda base: {"chosen": {"relaxation": "auto"}})
        with pytest.raises(InputError, match=f"{variant} chosen: runs of a table share a relaxation"):
            cells(grid, options)


def test_rows_of_other_samplers_go_when_their_model_does(options, tmp_path):
    grid = replace(GRID, varied=lambda base: {"": LINEAR}, variants=("EX-C",))
    (cell,) = cells(grid, replace(options, seeds=(0,)))
    cell.run.folder.mkdir(parents=True)
    cell.run.write_config(cell.config, (1, 8, 8))
    path = tmp_path / "rows.csv"

    def measured(date, **files):
        for name in ("metrics.json", "metrics-mixture.json"):
            (cell.folder / name).unlink(missing_ok=True)
        for name, figures in files.items():
            cell.run.write_json(name.replace("_", "-") + ".json", {**EVALUATED, "date": date, **figures})
        rows = results.keep(path, [cell], 30)
        assert rows.equals(results.read(path))
        return dict(zip(rows["run"], rows["fid_c"], strict=True))

    run = cell.folder.parent.name
    both = measured("2026-01-01", metrics={"fid_c": 5.0}, metrics_mixture={"fid_c": 2.0})
    assert both == {run: 5.0, f"{run} (mixture)": 2.0}
    assert measured("2026-01-01", metrics={"fid_c": 5.0}) == both
    assert measured("2026-01-02", metrics={"fid_c": 4.0}) == {run: 4.0}


@pytest.mark.parametrize("name", sorted(TABLES))
def test_a_table_takes_every_variant_that_has_what_it_varies(name, options):
    """A run occurs once, also where a variant has what the table varies: CMP-MAR has a joint prior anyway."""
    table = TABLES[name]
    for variant in ("CMP-MAR", "CMP", "MC-C", "G-VAE", "GS-VAE"):
        try:
            found = cells(table, replace(options, variants=(variant,), seeds=(0,)))
        except InputError:
            assert variant not in table.variants
        else:
            assert len({cell.label for cell in found}) * len(table.data) == len(found) > 0
