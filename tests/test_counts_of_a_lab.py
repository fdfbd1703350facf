"""A lab's own files of counts: how they are read and divided, and what the commands make of them."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse
import torch
from matplotlib.figure import Figure

import pyro_nbvae
from pyro_nbvae.errors import InputError
from pyro_nbvae.experiments.spikes import check_data
from pyro_nbvae.experiments.spikes import main as spikes_experiment
from pyro_nbvae.metrics import Score, fano_factor, held_out
from pyro_nbvae.metrics.spikes import relative_to_null
from pyro_nbvae.study import generation, spike_plots
from pyro_nbvae.study.build import load_data, resolve
from pyro_nbvae.study.cli import main
from pyro_nbvae.study.config import configure
from pyro_nbvae.study.data import load
from pyro_nbvae.study.data.arrays import fold_of
from pyro_nbvae.study.evaluation import METRICS, Evaluation, evaluate
from pyro_nbvae.study.folder import Run
from pyro_nbvae.study.processes import Processes
from pyro_nbvae.study.recordings import names_of
from pyro_nbvae.study.spike_plots import _linear_r2, _mark_sessions, _matched, describe_counts
from pyro_nbvae.study.training import DISPERSED, Trainer
from pyro_nbvae.study.tree import Reading, replace


def arrays_of(path):
    with np.load(path) as file:
        return dict(file)


def recording(trials=60, bins=4, neurons=6, seed=0):
    """Simulated counts with three stimuli, in the arrays of a file."""
    rng = np.random.default_rng(seed)
    stimulus = np.array(["left", "right", "up"])[np.arange(trials) % 3]
    rates = rng.uniform(0.2, 3.0, (3, bins, neurons))[np.arange(trials) % 3]
    counts = rng.binomial(4, rates / 4).astype(np.uint8)
    return {"counts": counts, "stimulus": stimulus, "session": np.arange(trials) // 20}


@pytest.fixture
def file(tmp_path):
    def write(**arrays):
        path = tmp_path / "recording.npz"
        np.savez(path, **arrays)
        return str(path)

    return write


def test_counts_are_read_with_what_is_known_of_them(file):
    arrays = recording()
    rng = np.random.default_rng(1)
    arrays |= {"mask": rng.random(arrays["counts"].shape) > 0.1, "exposure": rng.uniform(0.5, 2, 60)}
    arrays["covariates"] = rng.normal(size=(60, 2))
    data = load(file(**arrays), reading=Reading(labels="stimulus"))
    assert data.event_shape == (4, 6) and data.values == "counts" and not data.images
    assert data.classes == ("left", "right", "up") and len(data.test) == 6
    assert data.training.mask.shape == data.train.shape and data.training.exposure.shape == (54, 1, 1)
    assert data.training.covariates.shape == (54, 2)
    whole = load(file(**arrays), reading=Reading(labels="stimulus", whole=True))
    assert torch.equal(whole.training.mask, torch.tensor(arrays["mask"])) and len(whole.test) == 0
    seen = np.where(arrays["mask"], arrays["counts"], 0)
    np.testing.assert_array_equal(whole.training.filled(0).numpy(), seen)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"counts": np.ones((20, 3)) / 2}, r"counts\[0, 0\] is 0.5: counts are whole numbers of at least 0"),
        ({"counts": -np.ones((20, 3), int)}, r"counts\[0, 0\] is -1: counts are whole numbers"),
        ({"counts": np.ones(20, int)}, r"expected whole numbers of shape \(trials, neurons\)"),
        ({"counts": np.full((20, 3), np.nan)}, r"60 such values\): give the array mask"),
        ({"mask": np.full((20, 3), 2)}, "mask must be True where a count was observed"),
        ({"mask": np.zeros((20, 3), bool)}, "mask is False for every count of the training trials: none was observed"),
        ({"mask": np.ones((20, 2), bool)}, r"mask has shape \(20, 2\) and counts \(20, 3\)"),
        ({"exposure": np.zeros(20)}, "exposure must be positive and finite, got 0"),
        ({"exposure": np.ones(3)}, r"exposure has shape \(3,\)"),
        ({"covariates": np.full((20, 1), np.inf)}, "covariates must be finite"),
        ({"covariates": np.array(["a"] * 20)}, "for classes use --condition labels"),
        ({"trial": np.zeros(20)}, "1 groups of observations are too few: 10 or more"),
        ({"labels": np.zeros(3)}, r"labels has shape \(3,\): expected \(20,\)"),
    ],
)
def test_wrong_arrays_end_with_one_line(file, changes, message):
    with pytest.raises(InputError, match=message) as error:
        load(file(**{"counts": np.ones((20, 3), int), **changes}))
    assert "\n" not in str(error.value) and "recording.npz" in str(error.value)


def test_held_out_trials_of_which_nothing_was_observed(file):
    held_out = fold_of(20, Reading()) == 0
    with pytest.raises(InputError, match="every count of the held-out trials"):
        load(file(counts=np.ones((20, 3), int), mask=~held_out))


def test_names_that_a_file_lacks_are_told(file):
    with pytest.raises(InputError, match="has no array orientation: of each trial it holds session, stimulus"):
        load(file(**recording()), reading=Reading(labels="orientation"))
    with pytest.raises(InputError, match="has no array mouse"):
        load(file(**recording()), reading=Reading(group="mouse"))
    with pytest.raises(InputError, match="fold must be at most folds - 1 = 4, got 5"):
        Reading(folds=5, fold=5)


@pytest.mark.parametrize("folds", [2, 5, 10])
def test_folds_are_stratified_and_hold_every_trial_once(folds):
    labels = np.random.default_rng(0).integers(0, 3, 200)
    fold = fold_of(200, Reading(folds=folds), labels)
    counts = np.array([[((fold == k) & (labels == c)).sum() for c in range(3)] for k in range(folds)])
    assert (counts.max(0) - counts.min(0) <= 1).all() and counts.sum() == 200
    sizes = counts.sum(1)
    assert sizes.max() - sizes.min() <= 1 and sizes[0] == 200 // folds
    other = fold_of(200, Reading(folds=folds, fold=1), labels)
    assert (fold == other).all()


def test_trials_and_groups_are_never_divided(file):
    """Rows that are bins of trials, and trials of sessions that the user names."""
    rng = np.random.default_rng(0)
    trial = rng.permutation(np.repeat(np.arange(40), 5))
    arrays = {"counts": rng.poisson(1.0, (200, 3)), "trial": trial, "mouse": trial % 13, "labels": trial % 2}
    arrays["covariates"] = np.stack([trial, trial % 13], 1).astype(float)
    for group, column in ((None, 0), ("mouse", 1)):
        data = load(file(**arrays), reading=Reading(group=group))
        train, test = (set(part.covariates[:, column].tolist()) for part in (data.training, data.held_out))
        assert not train & test and train | test == set(arrays["covariates"][:, column])


def test_rows_of_a_trial_count_once_in_standard_errors(tmp_path):
    """Ten equal rows of each trial: the error is that of the trials, and no likelihood is suggested by copies."""
    rng = np.random.default_rng(0)
    trials = rng.poisson(3.0, (40, 5))
    arrays = {"counts": np.repeat(trials, 10, 0), "trial": np.repeat(np.arange(40), 10)}
    np.savez(tmp_path / "rows.npz", **arrays)
    main(["train", "--data", str(tmp_path / "rows.npz"), "--likelihood", "poisson", *SMALL, "--out", f"{tmp_path}/run"])
    this = Evaluation(Run(tmp_path / "run"), device="cpu", progress=False)
    assert len(this.bits.nats) == 4
    rows = relative_to_null(this.bounds, this.model.input_batches(this.test), this.null)
    each = Score(*(t.reshape(4, 10).sum(1) for t in (rows.nats, rows.spikes)))
    assert (this.bits.bits, this.bits.over_trials) == pytest.approx((each.bits, each.over_trials))
    assert rows.over_trials < 0.7 * each.over_trials
    of_trials = this.bounds.reshape(4, 10).mean(1)
    assert this.bound[1] == pytest.approx(float(of_trials.std()) / 2)
    kl = held_out(this.model, this.guide, this.test[::10], seed=this.seed)  # each row of a trial has the same
    assert this.held_out.kl_error == pytest.approx(kl.kl_error)


def test_blocks_are_the_last_trials_of_each_label():
    labels = np.array([0, 1] * 20)
    fold = fold_of(40, Reading(folds=4, split="blocks"), labels)
    for c in (0, 1):
        own = fold[labels == c]
        assert own.tolist() == sorted(own) and (own[-5:] == 3).all()


def test_a_missing_label_is_no_class(tmp_path):
    """In either format; a column that is not used may have missing values."""
    counts = np.random.default_rng(0).poisson(2.0, (40, 3))
    kind = pd.Series(["a", "b"] * 20, dtype=object).where(np.arange(40) != 7)
    table = pd.DataFrame({"kind": kind.to_numpy(), "other": "x"}, index=[f"cell {k}" for k in range(40)])
    anndata.AnnData(counts.astype(np.float32), obs=table).write_h5ad(tmp_path / "cells.h5ad")
    np.savez(tmp_path / "r.npz", counts=counts, kind=np.where(np.arange(40) == 7, np.nan, np.arange(40.0) // 20))
    for name in ("cells.h5ad", "r.npz"):
        assert len(load(str(tmp_path / name)).train) == 36
        for option in ({"labels": "kind"}, {"group": "kind"}):
            with pytest.raises(InputError, match="kind has 1 missing values, the first of trial 7"):
                load(str(tmp_path / name), reading=Reading(**option))


def test_new_data_may_lack_labels_trials_and_sessions(tmp_path):
    """Values that encode and predict do not use may be missing; a session is for plots."""
    rng = np.random.default_rng(0)
    arrays = {"counts": rng.poisson(2.0, (40, 3)), "kind": np.arange(40) % 2, "trial": np.arange(40)}
    np.savez(tmp_path / "r.npz", **arrays, session=np.where(np.arange(40) < 3, np.nan, 1.0))
    flags = ["--labels", "kind", "--likelihood", "poisson", *SMALL]
    main(["train", "--data", str(tmp_path / "r.npz"), *flags, "--out", str(tmp_path / "run")])
    lacking = {name: np.where(np.arange(40) == 5, np.nan, arrays[name]) for name in ("kind", "trial")}
    np.savez(tmp_path / "new.npz", counts=arrays["counts"], **lacking)
    main(["encode", str(tmp_path / "run"), str(tmp_path / "new.npz"), "--device", "cpu"])
    assert "labels" not in arrays_of(tmp_path / "run/latents.npz")


def test_the_spikes_experiment_takes_no_fits_of_other_data(tmp_path):
    counts, labels = torch.ones(4, 3), torch.zeros(4, dtype=torch.int64)
    out = tmp_path / "fits"
    for _ in range(2):
        check_data(counts, labels, out)
    for other in ((counts + 1, labels), (counts, labels + 1), (counts[:, None], labels)):
        with pytest.raises(InputError, match="has the fits of other counts, labels or bins"):
            check_data(*other, out)
    for name in ("mask", "exposure", "trial"):
        np.savez(tmp_path / "r.npz", counts=np.ones((4, 3)), labels=np.zeros(4), **{name: np.ones(4)})
        with pytest.raises(InputError, match=f"r.npz has the array {name}, which is not used here"):
            spikes_experiment(tmp_path / "r.npz", out=out)


def test_an_h5ad_file_is_read_and_written(tmp_path):
    """Counts may be sparse; size factors are the exposure; the latents come back in obsm."""
    rng = np.random.default_rng(0)
    counts = rng.poisson(2.0, (80, 7))
    obs = {"batch": np.array(["a", "b"])[np.arange(80) % 2], "size_factors": rng.uniform(0.5, 2, 80)}
    table = pd.DataFrame(obs, index=[f"cell {k}" for k in range(80)])
    sparse = scipy.sparse.csr_matrix
    cells = anndata.AnnData(sparse(np.log1p(counts)), obs=table, layers={"counts": sparse(counts)})
    path = tmp_path / "cells.h5ad"
    cells.write_h5ad(path)
    whole = load(str(path), reading=Reading(labels="batch", whole=True))
    np.testing.assert_array_equal(whole.train.numpy(), counts)
    np.testing.assert_allclose(whole.training.exposure[:, 0], cells.obs["size_factors"], rtol=1e-6)
    small = ["--latents", "2", "--encoder", "linear", "--decoder", "linear", "--epochs", "1", "--device", "cpu"]
    options = ["--likelihood", "negative_binomial", "--labels", "batch", "--condition", "labels", *small]
    main(["train", "--data", str(path), *options, "--variant", "CMP", "--out", str(tmp_path / "run")])
    main(["encode", str(tmp_path / "run"), "--out", str(tmp_path / "with.h5ad"), "--device", "cpu"])
    written = anndata.read_h5ad(tmp_path / "with.h5ad")
    assert written.obsm["X_nbvae"].shape == (80, 2) and (written.obsm["X_nbvae_variance"] > 0).all()
    assert (written.obsm["X_nbvae_sample"] == written.obsm["X_nbvae_sample"].round()).all()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A trained run on a recording with stimuli, a mask and held-out neurons."""
    folder = tmp_path_factory.mktemp("lab")
    arrays = recording()
    mask = np.random.default_rng(2).random(arrays["counts"].shape) > 0.1
    counts = np.where(mask, arrays["counts"], np.nan)
    np.savez(folder / "recording.npz", **{**arrays, "counts": counts, "mask": mask})
    flags = ["--data", str(folder / "recording.npz"), "--labels", "stimulus", "--condition", "labels"]
    flags += ["--likelihood", "com_poisson", "--latents", "8", "--encoder", "temporal_bins", "--decoder"]
    flags += ["temporal_bins", "--held-out-neurons", "0.3", "--epochs", "2", "--batch-size", "20", "--device", "cpu"]
    main(["train", "--variant", "CMP", *flags, "--out", str(folder / "run")])
    return folder / "run", arrays, mask


def test_latents_come_out_in_the_order_of_the_file(run):
    folder, arrays, _ = run
    main(["encode", str(folder), "--device", "cpu"])
    found = arrays_of(folder / "latents.npz")
    assert found["mean"].shape == found["sample"].shape == (60, 4, 2) and found["information"].shape == (4, 2)
    assert (found["labels"] == arrays["stimulus"]).all() and (found["sample"] == found["sample"].round()).all()
    # the same in two lines
    model, guide = pyro_nbvae.load(folder, "cpu")
    whole = load(str(folder.parent / "recording.npz"), reading=Reading(labels="stimulus", whole=True))
    latents = pyro_nbvae.encode(model, guide, whole.conditioned("labels").training)
    np.testing.assert_allclose(latents.mean.reshape(60, 4, 2), found["mean"], rtol=1e-5)


def test_missing_counts_are_filled(run):
    folder, arrays, mask = run
    main(["predict", str(folder), "--samples", "20", "--device", "cpu"])
    found = arrays_of(folder / "predictions.npz")
    assert np.array_equal(found["filled"][mask], arrays["counts"][mask])
    np.testing.assert_array_equal(found["filled"][~mask], found["rates"][~mask])
    assert (found["low"] <= found["high"]).all() and np.isfinite(found["rates"]).all()


def test_new_data_with_a_label_that_the_run_does_not_know(run, tmp_path, capsys):
    folder, arrays, _ = run
    few = {"counts": arrays["counts"][:3].astype(float), "mask": np.ones((3, 4, 6), bool)}
    np.savez(tmp_path / "three.npz", **few, stimulus=arrays["stimulus"][:3])
    main(["encode", str(folder), str(tmp_path / "three.npz"), "--out", str(tmp_path / "z.npz"), "--device", "cpu"])
    assert arrays_of(tmp_path / "z.npz")["mean"].shape == (3, 4, 2)
    np.savez(tmp_path / "other.npz", **few, stimulus=np.array(["left", "down", "up"]))
    with pytest.raises(SystemExit):
        main(["encode", str(folder), str(tmp_path / "other.npz"), "--device", "cpu"])
    assert (
        "has the label down, on which the run is not conditional: it knows left, right, up" in capsys.readouterr().err
    )


def test_programs_run_without_this_package(run):
    folder, arrays, mask = run
    main(["export", str(folder), "--programs"])
    script = (
        "import sys, numpy as np, torch\n"
        "sys.modules['pyro_nbvae'] = None\n"
        f"folder = {str(folder)!r}\n"
        "given = np.load(folder + '/input.npz')\n"
        "x, mask, c = (torch.from_numpy(given[k]) for k in ('x', 'mask', 'c'))\n"
        "q = torch.export.load(folder + '/encoder.pt2').module()(x, mask, c)\n"
        "z = torch.round(q['rate'])\n"
        "mean = torch.export.load(folder + '/decoder.pt2').module()(z, c)\n"
        "np.savez(folder + '/output.npz', **{k: v.detach() for k, v in q.items()}, mean=mean.detach())\n"
    )
    x = arrays["counts"].astype(np.float32)
    c = np.eye(3, dtype=np.float32)[np.arange(60) % 3]
    np.savez(folder / "input.npz", x=x, mask=mask, c=c)
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)
    found = arrays_of(folder / "output.npz")
    model, guide = pyro_nbvae.load(folder, "cpu")
    with torch.no_grad(), guide.exact():
        q = guide.posterior(torch.from_numpy(x), mask=torch.from_numpy(mask), covariates=torch.from_numpy(c))
        mean = model.observation(q.rate.round(), covariates=torch.from_numpy(c)).mean
    for name, expected in (("rate", q.rate), ("nu", q.nu), ("mean", mean)):
        np.testing.assert_allclose(found[name], expected.numpy(), rtol=1e-5, atol=1e-6)


def test_scores_and_plots_of_a_run(run, capsys):
    folder, _, _ = run
    main(["evaluate", str(folder), "--device", "cpu"])
    table = capsys.readouterr().out
    assert all(name in table for name in ("bits/spike", "co-bits/spike", "NLB co-bps", "PSTH R²", "PIT distance"))
    main(["spikes", str(folder), "--device", "cpu"])
    written = [path.split("/")[-1] for path in capsys.readouterr().out.split()]
    names = ("rasters", "psths", "dispersion", "pit", "latents", "trajectories")
    assert written == [f"spikes-{name}.png" for name in names]


@pytest.mark.filterwarnings("always:.*no spikes-dispersion")
def test_a_plot_that_needs_more_trials_is_named(tmp_path, capsys):
    np.savez(tmp_path / "r.npz", counts=np.random.default_rng(0).poisson(2.0, (12, 4, 6)))
    flags = ["--likelihood", "poisson", "--folds", "12", *SMALL]
    main(["train", "--data", str(tmp_path / "r.npz"), *flags, "--out", str(tmp_path / "run")])
    main(["spikes", str(tmp_path / "run"), "--device", "cpu"])
    shown = capsys.readouterr()
    assert "no spikes-dispersion.png" in shown.err and "spikes-dispersion" not in shown.out


def test_an_artefact_is_named_by_its_place_in_the_file(tmp_path, capsys):
    """In every fold, also that which is held out."""
    for trial in range(0, 60, 7):
        counts = np.random.default_rng(0).poisson(1.0, (60, 4, 6))
        counts[trial, 2, 3] = 500
        np.savez(tmp_path / "r.npz", counts=counts)
        text = "\n".join(describe_counts(load(str(tmp_path / "r.npz")).joined(), compare=False))
        assert f"1 counts look like artefacts, the first at counts[{trial}, 2, 3]: 500" in text


def test_psths_of_model_and_counts_are_over_the_same_trials(tmp_path, monkeypatch):
    """A neuron that is lost in most trials of the half with high rates."""
    rng = np.random.default_rng(0)
    counts = rng.poisson(np.repeat([1.0, 9.0], 60)[:, None], (120, 5))
    mask = np.ones(counts.shape, bool)
    mask[60:, 0] = rng.random(60) < 0.2
    np.savez(tmp_path / "lost.npz", counts=counts, mask=mask)
    flags = ["--likelihood", "poisson", "--variant", "P-VAE", "--folds", "3", "--batch-size", "16", "--epochs", "40"]
    flags += ["--latents", "3", "--encoder", "linear", "--decoder", "linear", "--device", "cpu"]
    main(["train", "--data", str(tmp_path / "lost.npz"), *flags, "--out", str(tmp_path / "run")])
    found = []
    monkeypatch.setattr(spike_plots, "_psths", lambda shown: found.append(shown) or Figure())
    main(["spikes", str(tmp_path / "run"), "--device", "cpu"])
    (shown,) = found
    assert torch.equal(shown.rates.isnan(), shown.counts.isnan())
    model, seen = (float(x[:, 0, 0].nanmean()) for x in (shown.rates, shown.counts))
    assert model == pytest.approx(seen, rel=0.4)


def test_latents_of_one_seed_predict_themselves_and_not_noise():
    z = np.random.default_rng(0).normal(size=(2000, 5))
    weight = np.ones(5)
    turned = z @ np.linalg.qr(np.random.default_rng(1).normal(size=(5, 5)))[0]
    noise = np.random.default_rng(2).normal(size=(2000, 5))
    assert _linear_r2(z, turned, weight) > 0.95 and _linear_r2(z, noise, weight) < 0.05
    np.testing.assert_allclose(_matched(z, -z[:, ::-1]), 1)


def test_the_check_of_counts_reports_what_matters(file, capsys):
    """Underdispersed counts, an artefact, a neuron without a second spike and one without any."""
    rng = np.random.default_rng(0)
    counts = rng.binomial(3, 0.5, (200, 12))
    counts[:, 0] = np.minimum(counts[:, 0], 1)
    counts[:, 1] = 0
    labels = np.arange(200) % 2
    main(["data", "check", file(counts=counts, labels=labels)])
    clean = capsys.readouterr().out
    assert "suggested: --likelihood com_poisson" in clean and "1 of 12 neurons have no spike" in clean
    assert "2 of 12 neurons never have more than one spike" in clean and "artefact" not in clean
    counts[17, 5] = 50
    main(["data", "check", file(counts=counts, labels=labels)])
    assert "1 counts look like artefacts, the first at counts[" in capsys.readouterr().out
    main(["data", "check", file(counts=rng.poisson(2.0, (200, 12)), labels=labels)])
    assert "suggested: --likelihood poisson" in capsys.readouterr().out


def test_a_run_of_a_condition_resumes(run, tmp_path):
    folder, _, _ = run
    from pyro_nbvae.study.folder import Run
    from pyro_nbvae.study.training import train

    config, _ = Run(folder).config()
    assert config.covariates == 3 and config.conditions == ("left", "right", "up")
    assert config.given == ("mask", "covariates")
    fresh = dataclasses.replace(config, covariates=0, conditions=None, given=())
    again = train(fresh, folder, resume=True, progress=False)
    assert len(again.read_checkpoint()["log"]) == 2


# --- what a run knows of its data is used everywhere ------------------------------------------------------------------

SMALL = ["--variant", "CMP", "--latents", "3", "--encoder", "linear", "--decoder", "linear", "--epochs", "1"]
SMALL += ["--device", "cpu"]


@pytest.fixture
def exposed(tmp_path):
    """A run on counts of 1,000 neuron-seconds a trial, some of them not observed; and the file."""
    rng = np.random.default_rng(0)
    exposure = rng.uniform(500, 1500, 60)
    counts = rng.poisson(0.003 * exposure[:, None], (60, 5)).astype(float)
    mask = rng.random((60, 5)) > 0.2
    path = tmp_path / "exposed.npz"
    np.savez(path, counts=np.where(mask, counts, np.nan), mask=mask, exposure=exposure)
    main(["train", "--data", str(path), "--likelihood", "poisson", *SMALL, "--out", str(tmp_path / "run")])
    return tmp_path / "run", path, counts


@pytest.mark.parametrize("given", [[], ["--given", "left"], ["--sampler", "posterior"]])
def test_generated_counts_are_a_recording(given, tmp_path, capsys):
    """Draws of the likelihood about their means, in the recorded shape, with labels; a run can be trained on them."""
    arrays = recording()
    np.savez(tmp_path / "real.npz", **arrays)
    flags = ["--labels", "stimulus", "--condition", "labels", "--likelihood", "poisson", *SMALL]
    main(["train", "--data", str(tmp_path / "real.npz"), *flags, "--out", str(tmp_path / "run")])
    capsys.readouterr()
    out = ["--out", str(tmp_path / "simulated.npz")]
    main(["generate", str(tmp_path / "run"), "--count", "600", "--device", "cpu", *given, *out])
    plot, path = map(Path, capsys.readouterr().out.split())
    assert (plot, path) == (tmp_path / "simulated.png", tmp_path / "simulated.npz")
    found = arrays_of(path)
    assert plot.is_file() and found["counts"].dtype == np.int64 and found["counts"].shape == (600, 4, 6)
    assert set(found["stimulus"]) == ({"left"} if "left" in given else set(arrays["stimulus"]))
    excess = (found["counts"] - found["mean"]).sum() / np.sqrt(found["mean"].sum())
    assert abs(excess) < 5  # standard errors of a sum of independent Poissons
    main(["data", "check", str(path)])
    assert ": 4 bins x 6 neurons (int16, counts)" in capsys.readouterr().out
    main(["train", "--data", str(path), *flags, "--out", str(tmp_path / "again")])
    main(["predict", str(tmp_path / "run"), str(path), "--samples", "2", "--device", "cpu"])


def test_reconstructions_are_at_the_exposure_of_the_observation(exposed, monkeypatch):
    folder, _, counts = exposed
    drawn = {}
    monkeypatch.setattr(generation, "plot_recordings", lambda sets, *_, **__: drawn.update(sets))
    main(["reconstruct", str(folder), "--device", "cpu"])
    assert float(drawn["reconstructions"].mean()) == pytest.approx(counts.mean(), rel=0.5)
    assert bool(drawn["originals"].isnan().any())  # nothing is shown where nothing was observed


@pytest.mark.parametrize("session, lines", [([5, 5, 5, 2, 2, 7], [2.5, 4.5]), ([5, 2, 7, 5, 2, 7], []), ([1] * 6, [])])
def test_lines_are_between_sessions_that_follow_each_other(session, lines, tmp_path):
    np.savez(tmp_path / "r.npz", counts=np.ones((6, 2), int), session=session)
    axes = Figure().subplots()
    _mark_sessions(axes, load(str(tmp_path / "r.npz"), reading=Reading(whole=True)))
    assert [line.get_xdata()[0] for line in axes.lines] == lines


def test_data_without_the_exposure_of_the_training_are_refused(exposed, tmp_path, capsys):
    folder, path, counts = exposed
    np.savez(tmp_path / "plain.npz", counts=counts.astype(int))
    for command in ("encode", "predict"):
        with pytest.raises(SystemExit):
            main([command, str(folder), str(tmp_path / "plain.npz"), "--device", "cpu"])
        assert "has no exposure, and the data of the training have one" in capsys.readouterr().err
    main(["data", "check", str(path)])
    text = capsys.readouterr().out
    shown = float(text.split("mean ")[1].split(",")[0])
    seen = arrays_of(path)["mask"]
    assert shown == pytest.approx(counts[seen].mean(), rel=0.1) and "% not observed" in text


def test_new_data_need_no_labels_or_groups_that_are_not_used(tmp_path, capsys):
    arrays = recording()
    np.savez(tmp_path / "all.npz", **arrays)
    flags = ["--labels", "stimulus", "--group", "session", "--folds", "3", "--likelihood", "poisson", *SMALL]
    main(["train", "--data", str(tmp_path / "all.npz"), *flags, "--out", str(tmp_path / "run")])
    np.savez(tmp_path / "new.npz", counts=arrays["counts"][:2])
    main(["encode", str(tmp_path / "run"), str(tmp_path / "new.npz"), "--device", "cpu"])
    assert arrays_of(tmp_path / "run/latents.npz")["mean"].shape == (2, 3)


def test_images_may_be_conditional(tmp_path, capsys):
    """Evaluated, sampled with the conditions of the data, and given one; its encoder knows the labels."""
    flags = ["--data", "digits", "--train-size", "200", "--condition", "labels", *SMALL]
    main(["train", *flags, "--out", str(tmp_path / "run")])
    main(["evaluate", str(tmp_path / "run"), "--samples", "20", "--device", "cpu"])
    assert "FID-c" in capsys.readouterr().out
    for given in ([], ["--given", "3"], ["--sampler", "posterior"]):
        main(["generate", str(tmp_path / "run"), "--count", "4", "--device", "cpu", *given])
    main(["reconstruct", str(tmp_path / "run"), "--count", "4", "--device", "cpu"])
    with pytest.raises(SystemExit):
        main(["generate", str(tmp_path / "run"), "--given", "12", "--device", "cpu"])
    assert "--given" in capsys.readouterr().err
    with pytest.raises(InputError, match="an encoder that does not read the labels"):
        evaluate(Run(tmp_path / "run"), ["logistic_200"], progress=False, device="cpu")


def test_counts_without_a_held_out_spike_are_evaluated(tmp_path, capsys):
    counts = np.zeros((60, 4), int)
    counts[0, 0] = 1
    np.savez(tmp_path / "silent.npz", counts=counts, labels=np.arange(60) % 2)
    flags = ["--likelihood", "negative_binomial", "--held-out-neurons", "0.25", *SMALL]
    main(["train", "--data", str(tmp_path / "silent.npz"), *flags, "--out", str(tmp_path / "run")])
    main(["evaluate", str(tmp_path / "run"), "--device", "cpu"])
    assert "ELBO" in capsys.readouterr().out


def test_blocks_need_enough_of_each_label():
    with pytest.raises(InputError, match="a label has 4 observations: blocks in 10 folds need 10 or more of each"):
        fold_of(32, Reading(split="blocks"), np.repeat(np.arange(8), 4))


def test_an_exposure_of_neurons_or_of_bins_is_not_guessed(file):
    counts = np.ones((20, 6, 6), int)
    with pytest.raises(InputError, match="of neurons or of bins: give it the shape of counts"):
        load(file(counts=counts, exposure=np.ones((20, 6))))


@pytest.mark.parametrize("order", ["sorted", "cyclic"])
def test_validation_has_about_as_many_of_each_label(tmp_path, order):
    """Data sorted by class, of which more than are logged validate; conditions in a cycle of the validated part."""
    number = 22_000 if order == "sorted" else 400
    labels = np.arange(number) * 10 // number if order == "sorted" else np.arange(number) % 10
    np.savez(tmp_path / "x.npz", counts=labels[:, None] * np.ones((1, 2), int), labels=labels)
    config = configure("P-VAE", data=str(tmp_path / "x.npz"), likelihood="poisson", latents=2)
    config = replace(config, validate=True, encoder="linear", decoder="linear", epochs=1, device="cpu")
    data = load_data(config)
    config = resolve(config, data.event_shape, data)
    trainer = Trainer(Run(tmp_path / "run"), config, data, torch.device("cpu"), Processes())
    for part in (trainer.validation_set, trainer.test_set):
        counts = torch.bincount(part.x[:, 0].long(), minlength=10).double()
        expected = len(part) / 10
        assert ((counts - expected).abs() < 4.5 * expected**0.5 + 1).all()


@pytest.mark.parametrize("folds, number, validated", [(10, 30, 2), (4, 4, 1)])
def test_validation_does_not_divide_groups(folds, number, validated, tmp_path):
    """A tenth of many groups validates, or one of a few sessions."""
    rng = np.random.default_rng(0)
    trial = np.repeat(np.arange(number), 120 // number)
    arrays = {"counts": rng.poisson(2.0, (120, 3)), "trial": trial, "covariates": trial[:, None].astype(float)}
    np.savez(tmp_path / "rows.npz", **arrays)
    config = configure("CMP", data=str(tmp_path / "rows.npz"), likelihood="poisson", condition="covariates", latents=2)
    config = replace(config, validate=True, encoder="linear", decoder="linear", epochs=1, device="cpu", folds=folds)
    data = load_data(config)
    config = resolve(config, data.event_shape, data)
    trainer = Trainer(Run(tmp_path / "run"), config, data, torch.device("cpu"), Processes())
    parts = [set(part.covariates[:, 0].tolist()) for part in (trainer.train_set, trainer.validation_set)]
    assert not parts[0] & parts[1] and len(parts[1]) == validated  # of 27 groups, or of 3


def test_the_log_is_not_of_the_first_condition(tmp_path):
    """Held-out trials in the order of two conditions, whose posteriors have other Fano factors."""
    rate = np.repeat([0.1, 300.0], 400)
    counts = np.random.default_rng(0).poisson(rate[:, None], (800, 3))
    np.savez(tmp_path / "split.npz", train=counts, test=counts)
    config = configure("EX-C", data=str(tmp_path / "split.npz"), likelihood="poisson", latents=2)
    config = replace(config, encoder="linear", decoder="linear", epochs=1, device="cpu")
    data = load_data(config)
    trainer = Trainer(
        Run(tmp_path / "run"), resolve(config, data.event_shape, data), data, torch.device("cpu"), Processes()
    )
    with torch.no_grad():
        every = fano_factor(trainer.guide.posterior(trainer.model.to_input(data.held_out).x))
    error = float(every.std()) / DISPERSED**0.5
    assert abs(float(every[:DISPERSED].mean() - every.mean())) > 6 * error
    assert abs(trainer.tested(0)["test_fano"] - float(every.mean())) < 4 * error


def test_the_seconds_of_a_step_are_of_the_steps_that_were_made(tmp_path):
    """Groups of unequal size: not a tenth of the rows validate."""
    trial = np.repeat(np.arange(40), np.arange(40) % 7 * 5 + 1)
    np.savez(tmp_path / "rows.npz", counts=np.ones((len(trial), 3), int), trial=trial)
    run, flags = tmp_path / "run", ["--validate", *SMALL, "--batch-size", "10"]
    main(["train", "--data", str(tmp_path / "rows.npz"), "--likelihood", "poisson", *flags, "--out", str(run)])
    this = Evaluation(Run(run), device="cpu", progress=False)
    trainer = Trainer(Run(run), this.config, this.data, torch.device("cpu"), Processes())
    assert len(trainer.train_set) != len(trial) * 81 // 100
    assert this.seconds_per_step() * trainer.steps == pytest.approx(np.median([row["seconds"] for row in this.log]))


def test_a_score_of_a_single_group_does_not_have_the_error_of_an_earlier_one(tmp_path):
    arrays = {"counts": recording()["counts"][:, 0], "trial": np.arange(60) // 20}
    np.savez(tmp_path / "r.npz", **arrays)
    flags = ["--folds", "3", "--likelihood", "poisson", *SMALL, "--out", str(tmp_path / "run")]
    main(["train", "--data", str(tmp_path / "r.npz"), *flags])
    run = Run(tmp_path / "run")
    found = evaluate(run, device="cpu", importance_samples=2, progress=False)
    run.write_json("metrics.json", {**found, "bits_per_spike_error": 0.1})
    found = evaluate(run, device="cpu", importance_samples=2, progress=False)
    assert found["bits_per_spike_error"] is None and found["bits_per_spike"] is not None


def test_a_run_that_learned_its_trials_by_heart_says_so(tmp_path, capsys):
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "noise.npz", counts=rng.poisson(1.0, (40, 30)))
    flags = ["--data", str(tmp_path / "noise.npz"), "--likelihood", "poisson", "--variant", "P-VAE", "--latents", "16"]
    flags += ["--encoder", "mlp", "--decoder", "mlp", "--epochs", "60", "--batch-size", "12", "--device", "cpu"]
    for options, said in (([], True), (["--patience", "3"], False)):
        folder = str(tmp_path / f"run{len(options)}")
        main(["train", *flags, *options, "--out", folder])
        main(["evaluate", folder, "--device", "cpu"])
        assert ("train with --patience 10" in capsys.readouterr().err) is said


def test_labels_under_another_name_are_pointed_out(file, capsys):
    path = file(**recording())
    main(["data", "check", path])
    assert "the file has stimulus; give --labels NAME" in capsys.readouterr().out
    main(["data", "check", path, "--labels", "stimulus"])
    assert "give --labels" not in capsys.readouterr().out
    with pytest.raises(InputError, match=r"3 groups of observations are too few: .* give --folds 3"):
        load(path, reading=Reading(labels="stimulus", group="session"))


def test_the_benchmarks_null_is_at_the_exposure(tmp_path):
    """Rates that are one constant times the exposure have a score of 0: exposure alone earns nothing."""
    rng = np.random.default_rng(0)
    exposure = rng.uniform(0.2, 5, 80)
    np.savez(tmp_path / "e.npz", counts=rng.poisson(exposure[:, None] * np.ones(6)), exposure=exposure)
    flags = ["--likelihood", "poisson", "--held-out-neurons", "0.4", *SMALL]
    main(["train", "--data", str(tmp_path / "e.npz"), *flags, "--out", str(tmp_path / "run")])
    evaluation = Evaluation(Run(tmp_path / "run"), device="cpu", progress=False)
    score, rates = evaluation.co_smoothing
    flat = evaluation.test.exposure.double() * torch.ones_like(rates)
    evaluation.__dict__["co_smoothing"] = score, flat
    assert METRICS["nlb_co_bits"].compute(evaluation) == pytest.approx(0, abs=0.05)


def test_files_have_the_suffix_that_says_what_they_are(run, capsys):
    for command in ("encode", "predict"):
        with pytest.raises(SystemExit):
            main([command, str(run[0]), "--out", "latents.csv", "--device", "cpu"])
        assert "the file is a .npz" in capsys.readouterr().err


def test_a_condition_without_a_training_trial_is_pointed_out(file):
    arrays = recording()
    arrays["stimulus"] = arrays["stimulus"].astype(object)
    data = load(file(**{**arrays, "stimulus": arrays["stimulus"].astype(str)}), reading=Reading(labels="stimulus"))
    only = dataclasses.replace(data, train_labels=data.train_labels.clamp(max=1))
    with pytest.warns(UserWarning, match="no training observation has the label up"):
        only.conditioned("labels")


def test_generated_counts_have_the_exposures_of_the_recording(tmp_path):
    """Bins of a twentieth and of half a second: the counts are as few as recorded, and the file is one of the run."""
    rng = np.random.default_rng(0)
    widths = np.array([0.05, 0.5, 0.05, 0.5])
    counts = rng.poisson(8 * widths[:, None] * rng.gamma(5, 0.2, (200, 1, 6)))
    np.savez(tmp_path / "real.npz", counts=counts, exposure=widths)
    flags = ["--data", str(tmp_path / "real.npz"), "--likelihood", "poisson", *SMALL, "--epochs", "30"]
    main(["train", *flags, "--out", str(tmp_path / "run")])
    for sampler in ("prior", "posterior"):
        _, path = generation.generate(Run(tmp_path / "run"), count=500, sampler=sampler, device="cpu")
        found = arrays_of(path)
        assert found["exposure"].shape[0] == 500
        for b in range(4):
            assert found["counts"][:, b].mean() == pytest.approx(counts[:, b].mean(), rel=0.35)
    main(["predict", str(tmp_path / "run"), str(path), "--samples", "2", "--device", "cpu"])


@pytest.mark.filterwarnings("default:.*never observed")
def test_files_of_latents_say_what_was_held_out(tmp_path, capsys, monkeypatch):
    """And what was never observed has no prediction."""
    arrays = recording()
    mask = np.ones(arrays["counts"].shape, bool)
    mask[:, :, 2] = False
    arrays["stimulus"] = np.array([45, 90, 135])[np.arange(60) % 3]
    path = tmp_path / "r.npz"
    np.savez(path, **arrays, mask=mask)
    flags = ["--data", str(path), "--labels", "stimulus", "--likelihood", "poisson", *SMALL]
    main(["train", *flags, "--out", str(tmp_path / "run")])
    assert "r.npz are never observed in the training data" in capsys.readouterr().err
    main(["encode", str(tmp_path / "run"), "--device", "cpu"])
    main(["predict", str(tmp_path / "run"), "--samples", "2", "--device", "cpu"])
    latents, predicted = (arrays_of(tmp_path / "run" / f"{name}.npz") for name in ("latents", "predictions"))
    data = load(str(path), reading=Reading(labels="stimulus"))
    assert np.array_equal((arrays["counts"] * mask)[latents["held_out"]], data.test)
    assert np.array_equal(latents["held_out"], predicted["held_out"]) and latents["labels"].tolist()[:3] == [
        45,
        90,
        135,
    ]
    for name in ("rates", "low", "high", "filled"):
        assert np.isnan(predicted[name][..., 2]).all() and np.isfinite(np.delete(predicted[name], 2, -1)).all()
    np.savez(tmp_path / "new.npz", **arrays)  # in a new recording the neuron is observed
    main(["predict", str(tmp_path / "run"), str(tmp_path / "new.npz"), "--samples", "2", "--device", "cpu"])
    predicted = arrays_of(tmp_path / "run/predictions.npz")
    drawn = {}
    monkeypatch.setattr(generation, "plot_recordings", lambda parts, path, **_: drawn.update(parts))
    main(["generate", str(tmp_path / "run"), "--count", "5", "--device", "cpu"])
    simulated = arrays_of(tmp_path / "run/samples.npz")
    assert np.isnan(simulated["mean"][..., 2]).all() and (simulated["mask"] == (np.arange(6) != 2)).all()
    for part in drawn["means"], drawn["draws"]:
        assert torch.equal(part.isnan(), torch.arange(6).expand(5, 4, 6) == 2)
    assert np.isnan(predicted["rates"][..., 2]).all() and np.isfinite(predicted["rates"][..., 3]).all()
    assert np.array_equal(predicted["filled"], arrays["counts"])
    capsys.readouterr()
    main(["data", "check", str(path), "--labels", "stimulus"])
    printed = capsys.readouterr().out
    assert "4 bins x 6 neurons" in printed and "with mask, session" in printed
    assert "1 of 6 neurons are never observed" in printed


def test_an_array_of_nearly_a_known_name_is_pointed_out(file):
    for name, meant in (("masks", "mask"), ("Exposure", "exposure"), ("covariate", "covariates")):
        with pytest.raises(InputError, match=rf"the array {name} is not read: rename it to {meant}"):
            load(file(**recording(), **{name: np.ones(60)}))
    load(file(**recording(), depth=np.ones(60)))
    load(file(**recording(), exposure_id=np.arange(60) % 3), reading=Reading(labels="exposure_id"))


def test_an_exposure_of_each_bin_or_of_all(file):
    arrays, widths = recording(), np.array([0.1, 0.2, 0.3, 0.4])
    for given in (widths, np.float64(0.1)):
        whole = load(file(**arrays, exposure=given), reading=Reading(whole=True)).training
        expected = np.broadcast_to(given[:, None] if given.ndim else given, (60, 4, 6))
        np.testing.assert_allclose(whole.exposure.expand(60, 4, 6), expected)
    square = {"counts": arrays["counts"][:4]}
    with pytest.raises(InputError, match="of trials or of bins"):
        load(file(**square, exposure=widths), reading=Reading(whole=True))


def test_counts_of_0_and_1_are_counts(file, capsys):
    path = file(counts=np.random.default_rng(0).integers(0, 2, (100, 3, 5)))
    assert load(path).values == "counts"
    main(["data", "check", path])
    assert "Fano factors" in capsys.readouterr().out


def test_large_numbers_are_not_compared_as_spikes(file, capsys):
    main(["data", "check", file(counts=np.random.default_rng(0).poisson(9000, (100, 5)))])
    assert "likelihoods are not compared: counts up to" in capsys.readouterr().out


def test_an_unfinished_run_says_so(tmp_path, capsys):
    np.savez(tmp_path / "r.npz", counts=recording()["counts"])
    flags = ["--data", str(tmp_path / "r.npz"), "--likelihood", "poisson", *SMALL]
    main(["train", *flags, "--out", str(tmp_path / "run")])
    run = Run(tmp_path / "run")
    assert run.unfinished() is None
    stored = run.read_json("config.json")
    epochs = stored["config"]["training"]["epochs"]
    stored["config"]["training"]["epochs"] = epochs + 5
    (tmp_path / "run/config.json").write_text(json.dumps(stored))
    capsys.readouterr()
    main(["encode", str(tmp_path / "run"), "--device", "cpu"])
    assert f"{epochs} of {epochs + 5} epochs are trained: nbvae train --resume continues" in capsys.readouterr().err


def test_what_was_held_out_is_said_of_the_trainings_data_only(tmp_path, capsys):
    """By their content, under any name; not of a file that has grown, whose folds are others."""
    counts = recording()["counts"]
    path, copy = tmp_path / "r.npz", tmp_path / "copy.npz"
    for place in (path, copy):
        np.savez(place, counts=counts)
    np.savez(tmp_path / "more.npz", counts=np.concatenate([counts, counts[:6]]))
    run = tmp_path / "run"
    main(["train", "--data", str(path), "--likelihood", "poisson", *SMALL, "--out", str(run)])
    found = {}
    for name, words in (("own", []), ("copy", [str(copy)]), ("more", [str(tmp_path / "more.npz")])):
        main(["encode", str(run), *words, "--device", "cpu"])
        found[name] = arrays_of(run / "latents.npz").get("held_out")
    assert found["own"].sum() == 6 and np.array_equal(found["own"], found["copy"]) and found["more"] is None
    np.savez(path, counts=np.concatenate([counts, counts[:6]]))
    with pytest.raises(SystemExit):
        main(["encode", str(run), "--device", "cpu"])
    assert "does not hold the data that" in capsys.readouterr().err


def test_held_out_images_and_rows_are_said_too(tmp_path):
    rows = np.random.default_rng(0).normal(size=(50, 4)).astype(np.float32)
    np.save(tmp_path / "x.npy", rows)
    for name in (str(tmp_path / "x.npy"), "digits"):
        run = tmp_path / f"run-{len(name)}"
        main(["train", "--data", name, *SMALL, "--out", str(run)])
        main(["encode", str(run), "--device", "cpu"])
        held_out, data = arrays_of(run / "latents.npz")["held_out"], load(name)
        assert held_out.sum() == len(data.test) and len(held_out) == len(data.train) + len(data.test)
        if name != "digits":
            assert np.array_equal(rows[held_out], data.test)


def test_counts_that_were_observed_in_a_held_out_trial_only_stay(tmp_path):
    arrays = {"counts": recording()["counts"]}
    np.savez(tmp_path / "r.npz", **arrays)
    last = load(str(tmp_path / "r.npz")).is_held_out.numpy().nonzero()[0][0]
    mask = np.ones(arrays["counts"].shape, bool)
    mask[:, 3] = False
    mask[last, 3] = True
    np.savez(tmp_path / "r.npz", **arrays, mask=mask)
    main(
        ["train", "--data", str(tmp_path / "r.npz"), "--likelihood", "poisson", *SMALL, "--out", str(tmp_path / "run")]
    )
    main(["predict", str(tmp_path / "run"), "--samples", "2", "--device", "cpu"])
    predicted = arrays_of(tmp_path / "run/predictions.npz")
    assert np.isnan(predicted["rates"][:, 3]).all()
    assert np.array_equal(predicted["filled"][last], arrays["counts"][last])
    assert np.isnan(np.delete(predicted["filled"][:, 3], last, 0)).all()


def test_names_of_classes_are_numbers_only_if_nothing_is_lost():
    assert names_of(("0", "45", "-3")).tolist() == [0, 45, -3]
    for text in (("007", "12"), ("1" * 20, "2"), ("left", "1"), ("1.5",)):
        assert names_of(text).tolist() == list(text)


def test_labels_named_like_an_array_of_the_samples(tmp_path):
    arrays = recording()
    np.savez(tmp_path / "r.npz", counts=arrays["counts"], mean=arrays["stimulus"])
    flags = ["--labels", "mean", "--condition", "labels", "--likelihood", "poisson", *SMALL]
    main(["train", "--data", str(tmp_path / "r.npz"), *flags, "--out", str(tmp_path / "run")])
    main(["generate", str(tmp_path / "run"), "--count", "9", "--device", "cpu"])
    found = arrays_of(tmp_path / "run/samples.npz")
    assert found["mean"].shape == (9, 4, 6) and set(found["labels"]) <= set(arrays["stimulus"])
