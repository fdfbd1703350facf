"""The runner of the tables: what is finished stays, what fails is named, and the table is of the runs' own figures."""

import json
import os
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
from pyro_nbvae.study.claims import Ahead, Alike, BelowCurve, Claim, Reaches
from pyro_nbvae.study.formats import latex, markdown, summarise
from pyro_nbvae.study.grid import Table, cells

from pyro_nbvae.errors import InputError
from pyro_nbvae.study import plugins, results, variants
from pyro_nbvae.study.cli import main, table_of
from pyro_nbvae.study.data import SOURCES
from pyro_nbvae.study.evaluation import evaluate, settings
from pyro_nbvae.study.folder import SCHEMA, Run
from pyro_nbvae.study.jobs import JobError, LocalProcesses
from pyro_nbvae.study.report import command, report, reproduce
from pyro_nbvae.study.scales import SCALES, TABLES, Reproduction

LINEAR = {"latents": 6, "encoder": "linear", "decoder": "linear", "batch_size": 500}
GRID = Table(
    command="nbvae reproduce tiny",
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
    for condition in ("epochs 1;", "training data 1,500;", "batches of 500;", "seeds 0, 1.", "30 samples"):
        assert condition in text
    assert "`nbvae reproduce tiny --scale smoke --seeds 0 1 --samples 30`\n" in text
    assert "-" in next(line for line in text.splitlines() if line.startswith("| G-VAE ")).split("|")[-2]

    stamps = {p: p.stat().st_mtime_ns for c in cells(GRID, options) for p in c.folder.glob("[cm]*.*[tn]")}
    files = {p: t for p, t in stamps.items() if p.name in ("checkpoint.pt", "metrics.json")}
    assert len(files) == 16
    assert reproduce(GRID, options) == text
    assert all(p.stat().st_mtime_ns == t for p, t in files.items())
    options.samples = 31
    assert "FID and KID of 31 samples" in reproduce(GRID, options)
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
    assert "holds another run (lr 0.001 there, 0.1 here, prior_lr 0.03 there, 3.0 here)" in str(error.value)


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
    damages = [b"", b"[1, 2]", (folder / name).read_bytes()[:-30]]  # more of them are in tests/attack
    for content in damages if name != "checkpoint.pt" else damages[-1:]:
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
from dataclasses import replace
import torch
from pyro.infer import Trace_ELBO
from pyro_nbvae.study.data import Source, register_data
from pyro_nbvae.study.variants import VARIANTS, register_variant

register_variant("MINE", replace(VARIANTS["P-VAE"], estimator=Trace_ELBO))
counts = torch.poisson(torch.full((60, 7), 3.0), generator=torch.Generator().manual_seed(0))
register_data("spikes", Source((7,), lambda root: (counts[:50], counts[50:], None, None)))
"""


def test_the_processes_of_a_grid_know_what_a_user_registered(tmp_path, monkeypatch, capsys):
    (tmp_path / "my_own_module.py").write_text(OWN_MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    monkeypatch.setattr(plugins, "imported", [])
    monkeypatch.setitem(variants.VARIANTS, "MINE", None)
    monkeypatch.setitem(SOURCES, "spikes", None)
    grid = replace(
        GRID,
        variants=("MINE",),
        data=("spikes",),
        metrics=("mse", "ssim", "elbo"),
        varied=lambda base: {"": {**LINEAR, "likelihood": "poisson"}},
        command="",
    )
    plugins.import_modules(["my_own_module"])
    text = reproduce(grid, Reproduction(out=str(tmp_path / "out"), samples=30, jobs=2))
    assert "| MINE " in text and "SSIM" not in text
    assert "A table of its own, tiny" in text
    assert command(replace(grid, name="main"), Reproduction()).startswith("nbvae --import my_own_module reproduce main")


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


def test_the_report_is_what_the_folders_hold_and_is_made_again_without_them(options, tmp_path):
    """Seed 1 and the second variant were never run: the report says so and runs nothing."""
    claim = Claim("EX-C it is.", [Ahead("mse", ("EX-C",), ("G-VAE",), ("digits",))])
    grid = replace(GRID, varied=lambda base: {"": LINEAR}, claims=[claim])
    reproduce(grid, replace(options, seeds=(0,), variants=("EX-C",)))
    kept = tmp_path / "results"
    tables = [grid, replace(grid, name="other", data=("mnist",))]
    path = report(tables, options, tmp_path / "docs" / "results.md", kept)
    text = path.read_text()
    assert "1 of 4 runs are finished." in text
    assert "## tiny, smoke" in text and "seeds 0." in text and "| EX-C" in text
    assert "Claims without a decided comparison, by table, and how many: tiny, smoke (1)" in text
    assert "digits, MSE: G-VAE" in text and "## other" not in text and "small" not in text
    assert not [cell for cell in cells(grid, options) if cell.config.variant == "G-VAE" and cell.folder.exists()]

    table = pd.read_csv(kept / "smoke.csv")
    metrics = cells(grid, options)[0].metrics
    assert table["mse"][0] == pytest.approx(metrics["mse"], rel=1e-6) and table["commit"][0] == metrics["commit"]
    assert json.loads(table["config"][0])["latents"] == 6
    rows = (kept / "smoke.csv").read_bytes()
    again = report(tables, replace(options, out=str(tmp_path / "nothing")), tmp_path / "again.md", kept)
    assert again.read_text() == text and (kept / "smoke.csv").read_bytes() == rows
    # rows of another configuration are not a table's
    other = replace(grid, varied=lambda base: {"": {**LINEAR, "lr": 0.5}})
    with pytest.raises(InputError, match=r"no finished run in .* and no row in"):
        report([other], replace(options, out=str(tmp_path / "nothing")), again, kept)
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


@pytest.mark.parametrize("name", TABLES)
def test_claims_are_about_rows_that_the_table_has(name, options):
    table = table_of(name)
    labels = {(cell.config.data, cell.label) for cell in cells(table, options)}
    for claim in table.claims:
        for condition in claim.conditions:
            data = [condition.data] if isinstance(condition.data, str) else condition.data
            for one in data:
                groups = {one: {label: [] for where, label in labels if where == one}}
                match condition:
                    case BelowCurve():
                        metrics, named = [condition.rate, condition.distortion], [*condition.curve, *condition.points]
                    case Reaches():
                        metrics, named = [condition.metric], [condition.label]
                    case Alike():
                        metrics, named = [condition.metric], condition.labels
                    case _:
                        metrics, named = [condition.metric], [*condition.first, *condition.others]
                assert set(metrics) <= set(table.metrics)
                for label in named:
                    assert label in groups[one], (claim.sentence, label)
        assert claim.judge({})[0] == "not measured"


EVALUATED = settings(epochs=1, seed=0, samples=30)


def test_the_paper_stands_beside_ours_in_its_features(options):
    paper = {("digits", "fid", "EX-C"): 78.4, ("digits", "fid", "MC-C"): 99.0, ("mnist", "mse", "EX-C"): 0.01}
    grid = replace(GRID, metrics=("fid", "fid_c"), paper=paper)
    for cell in cells(grid, options):
        cell.run.folder.mkdir(parents=True)
        ours = {"fid": 80.0} if cell.config.seed == 0 else {"fid": None}
        cell.run.write_config(cell.config, (1, 8, 8))
        cell.run.write_json("metrics.json", {**EVALUATED, "fid_c": 5.0, "train_size": 1500, **ours})
    kept = Path(options.out) / "kept"
    with_inception = report([grid], replace(options, seeds=(0,)), Path(options.out) / "a.md", kept).read_text()
    assert "| digits | FID | EX-C | 78.4 | 80.0 |\n| digits | FID | MC-C | 99 | - |" in with_inception
    assert "| digits | FID | best of ours | - | 80.0 (EX-C) |" in with_inception
    assert "| mnist | MSE | EX-C | 0.01 | - |" in with_inception
    table = with_inception.split("**FID**")[1].split("##")[0]
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()[4:] if line]
    named = dict(lines)
    assert named["the paper, EX-C"] == "78.4" and named["the paper, MC-C"] == "99"
    assert sorted(named.values()) == ["**80.0**"] * 4 + ["78.4", "99"]
    assert "Training data of ours: digits 1,500." in with_inception
    assert "**MSE**" not in with_inception


def test_other_samplers_stand_apart(options):
    """Distances of a mixture or of reconstructions have a table of their own, and are never the best of the models."""
    grid = replace(GRID, metrics=("fid_c",), paper={("digits", "fid_c", "EX-C"): 9.0}, varied=lambda base: {"": LINEAR})
    for cell in cells(grid, options):
        cell.run.folder.mkdir(parents=True)
        cell.run.write_config(cell.config, (1, 8, 8))
        cell.run.write_json("metrics.json", {**EVALUATED, "fid_c": 5.0 + cell.config.seed})
        if cell.label == "EX-C":
            cell.run.write_json("metrics-posterior.json", {**EVALUATED, "fid_c": 1.0})
            if cell.config.seed == 1:
                cell.run.write_json("metrics-mixture.json", {**EVALUATED, "fid_c": 2.0})
    text = report([grid], options, Path(options.out) / "a.md", Path(options.out) / "kept").read_text()
    assert "best of ours | - | 5.50 ± 0.71 (EX-C)" in text and "**1.00" not in text
    # only seed 1 has all samplers
    (line,) = (line for line in text.splitlines() if "1.00" in line)
    assert [cell.strip() for cell in line.split("|")[1:-1]] == ["EX-C", "6.00", "2.00", "1.00"]


def test_a_row_is_of_a_finished_run_and_its_evaluation(options, tmp_path):
    grid = replace(GRID, varied=lambda base: {"": LINEAR}, variants=("EX-C",))
    (cell,) = cells(grid, replace(options, seeds=(0,)))
    cell.run.folder.mkdir(parents=True)
    cell.run.write_config(cell.config, (1, 8, 8))
    for wrong in ({"epochs": 0}, {"seed": 7}, {"generated_samples": 12}):
        for name in ("metrics.json", "metrics-mixture.json"):
            cell.run.write_json(name, {**EVALUATED, "mse": 1.0, "fid_c": 5.0, **wrong})
        assert results.rows_of([cell], 30) == {}
        with pytest.raises(InputError, match="no finished run"):
            report([grid], options, tmp_path / "a.md", tmp_path / "kept")
    cell.run.write_json("metrics.json", {**EVALUATED, "mse": 1.0})
    assert [row["mse"] for row in results.rows_of([cell], 30).values()] == [1.0]


def test_the_command_under_a_table_names_the_features_and_samples_of_its_rows(options, tmp_path, monkeypatch):
    """The page of all tables has the options of none, and the command under a table must not take its figures away."""
    monkeypatch.setattr(plugins, "imported", [])
    grid = replace(GRID, varied=lambda base: {"": LINEAR}, variants=("EX-C",), metrics=("fid", "fid_c"), name="main")
    grid = replace(grid, command="")
    made = {**EVALUATED, "fid": 80.0, "fid_c": 5.0}
    for cell, features in zip(cells(grid, options), (["classifier", "inception"], ["classifier"]), strict=True):
        cell.run.folder.mkdir(parents=True)
        cell.run.write_config(cell.config, (1, 8, 8))
        cell.run.write_json("metrics.json", {**made, "feature_sets": features})
    text = report([grid], options, tmp_path / "a.md", tmp_path / "kept").read_text()
    assert "`nbvae reproduce main --scale smoke --seeds 0 1 --features classifier inception --samples 30`" in text


def test_speeds_of_several_machines_have_no_mean():
    rows = [{"seconds_per_step": 0.1, "mse": 1.0, "machine": name} for name in ("a CPU", "a GPU", "a GPU")]
    assert summarise(rows, "seconds_per_step") is None and summarise(rows, "mse").mean == 1.0
    assert summarise(rows[1:], "seconds_per_step").mean == pytest.approx(0.1)


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


def test_a_claim_that_cannot_be_judged_is_refused_before_anything_runs(options):
    with pytest.raises(InputError, match=r"KL \(kl\) has no better direction"):
        reproduce(replace(GRID, claims=[Claim("Less.", [Ahead("kl", ("EX-C",), ("G-VAE",), ("digits",))])]), options)
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
        reproduce(table_of("latents"), replace(options, data=(str(tmp_path / "x.npy"),)))
    assert not (tmp_path / "out").exists()


def test_a_reason_that_runs_share_is_given_once(options, tmp_path):
    np.save(tmp_path / "x.npy", np.ones((40, 7)))
    convolutional = replace(GRID, varied=lambda base: {"": {**LINEAR, "decoder": "conv"}})
    with pytest.raises(InputError) as caught:
        reproduce(convolutional, replace(options, variants=("EX-C",), data=(str(tmp_path / "x.npy"),)))
    assert str(caught.value).startswith("2 of 2 runs failed")
    assert str(caught.value).count("conv networks need observations of shape") == 1


@pytest.mark.parametrize("name", TABLES)
def test_every_table_is_a_grid_that_can_be(name, options):
    table = table_of(name)
    for scale in SCALES:
        grid = cells(table, replace(options, scale=scale))
        assert table.name == name and len({cell.folder for cell in grid}) == len(grid), scale


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
        with pytest.raises(InputError, match=f"{variant} chosen: the runs of a table share a relaxation"):
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
        return {run: row.get("fid_c") for (_, run, _), row in results.keep(path, [cell], 30).items()}

    run = cell.folder.parent.name
    both = measured("2026-01-01", metrics={"fid_c": 5.0}, metrics_mixture={"fid_c": 2.0})
    assert both == {run: 5.0, f"{run} (mixture)": 2.0}
    assert measured("2026-01-01", metrics={"fid_c": 5.0}) == both
    assert measured("2026-01-02", metrics={"fid_c": 4.0}) == {run: 4.0}
