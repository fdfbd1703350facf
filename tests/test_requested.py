"""A metric that is asked for is computed, or an error before the work; what nobody asked for is None."""

import math

import numpy as np
import pytest
import torch

from pyro_nbvae.errors import InputError
from pyro_nbvae.study import evaluation
from pyro_nbvae.study.cli import main
from pyro_nbvae.study.config import configure
from pyro_nbvae.study.data import SOURCES, Source, register_data
from pyro_nbvae.study.evaluation import METRICS, evaluate, plain
from pyro_nbvae.study.features import FEATURES
from pyro_nbvae.study.training import train

TINY = {"latents": 3, "encoder": "linear", "decoder": "linear", "epochs": 1, "batch_size": 50}


@pytest.fixture(scope="module")
def vectors(tmp_path_factory):
    x = torch.poisson(torch.full((60, 7), 2.0), generator=torch.Generator().manual_seed(0))
    register_data("vectors", Source((7,), lambda root: (x[:50], x[50:], None, None)))
    config = configure(data="vectors", likelihood="poisson", variant="G-VAE", **TINY)
    yield train(config, tmp_path_factory.mktemp("vectors") / "run", progress=False)
    del SOURCES["vectors"]


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    folder = tmp_path_factory.mktemp("digits") / "run"
    return train(configure(data="digits", variant="P-VAE", estimator="TraceGraph_ELBO", **TINY), folder, progress=False)


@pytest.mark.parametrize(
    ("run", "metric", "options", "reason"),
    [
        ("vectors", "ssim", {}, "needs images, vectors holds observations of shape (7,)"),
        ("vectors", "fid_c", {}, "needs images, vectors"),
        ("vectors", "kid", {}, "needs images, vectors"),
        ("vectors", "knn_200", {}, "needs labels, vectors has none"),
        ("vectors", "means_few_shot_1", {}, "needs labels, vectors has none"),
        ("vectors", "fano", {}, "needs latents that are counts, G-VAE has none"),
        ("vectors", "overdispersion", {}, "needs latents that are counts"),
        ("vectors", "objective", {}, "needs a Gaussian likelihood"),
        ("vectors", "beta", {}, "needs a Gaussian likelihood"),
        ("vectors", "importance_weighted_bound", {"importance_samples": 0}, "needs --importance-samples of at least 1"),
        ("vectors", "dead_units", {}, "is computed as collapsed_units now"),
        ("digits", "fid", {}, "needs --features inception"),
        ("digits", "fid_c", {"features": ()}, "needs --features classifier"),
        ("digits", "kid_std_c", {"samples": 30}, "needs 2,000 samples and training images, got 30"),
        ("digits", "svm_5000", {}, "needs 5000 training observations, got 1500"),
        ("digits", "gradient_noise", {}, "needs an ELBO with a differentiable_loss, TraceGraph_ELBO has none"),
    ],
)
def test_a_metric_that_a_run_does_not_have_is_refused_before_the_work(
    run, metric, options, reason, request, monkeypatch
):
    run = request.getfixturevalue(run)
    monkeypatch.setattr(evaluation, "held_out", None)  # no work
    with pytest.raises(InputError) as error:
        evaluate(run, ["elbo", metric], progress=False, device="cpu", **options)
    assert str(error.value).startswith(f"metric {metric} of {run.folder}: ") and reason in str(error.value)
    assert "\n" not in str(error.value) and not (run.folder / "metrics.json").exists()


def test_features_of_what_are_no_images_are_refused(vectors, capsys):
    for name in FEATURES:
        with pytest.raises(SystemExit):
            main(["evaluate", str(vectors.folder), "--features", name])
        error = capsys.readouterr().err
        assert f"--features {name} of {vectors.folder}: needs images, vectors holds" in error


def test_standard_metrics_are_none_where_they_are_not_defined(vectors):
    found = evaluate(vectors, progress=False)
    standard = {name for name, one in METRICS.items() if one.standard}
    none = {name for name in standard if found[name] is None}
    of_images = {name for name in standard if METRICS[name].in_features}
    counts = {"fano", "overdispersion", "underdispersed_active_units"}
    spikes = {
        "co_bits_per_spike",
        "co_bits_per_spike_error",
        "nlb_co_bits",
        "psth_r2",
    }  # without labels and held-out neurons
    assert none == of_images | counts | spikes | {"ssim", "beta", "objective"}
    assert not {"dead_units", "underdispersed_units"} & set(found)


def test_a_label_of_too_few_observations(monkeypatch, tmp_path):
    x, labels = torch.rand(300, 4), torch.arange(300) // 4 % 75
    monkeypatch.setitem(SOURCES, "rare", Source((4,), lambda root: (x, x, labels, labels)))
    run = train(configure(data="rare", **TINY), tmp_path / "run", progress=False)
    with pytest.raises(InputError, match=r"few_shot_5 of .*: needs 5 training observations per class, got 4"):
        evaluate(run, ["few_shot_1", "few_shot_5"], progress=False)


def test_values_have_the_digits_that_their_errors_leave():
    row = {"variant": "P-VAE", "data": "digits", "epochs": 3}
    rows = [
        row | {"elbo": -1234.5678, "elbo_error": 1.2345, "mse": 0.0123456, "mse_error": 0.00012345, "kl": 12.3456},
        row | {"elbo": 5678.9, "elbo_error": 123.4, "mse": math.nan, "mse_error": 0.1, "kl": 1.0, "kl_error": 0.0},
    ]
    lines = [line.split("  ") for line in plain(rows, ["runs/a", "b"]).splitlines()]
    table = {line[0]: [cell.strip() for cell in line[1:] if cell.strip()] for line in lines}
    assert table["run"] == ["runs/a", "b"] and table["variant"] == ["P-VAE", "P-VAE"]
    assert table["ELBO"] == ["-1234.6 ± 1.2", "5680 ± 120"]
    assert table["MSE"] == ["0.01235 ± 0.00012", "nan"] and table["KL"] == ["12.35", "1.00"]
    assert not any(name.startswith("±") for name in table)


def test_errors_are_beside_the_means(vectors):
    found = evaluate(vectors, progress=False, importance_samples=3)
    for name in ("elbo", "mse", "kl", "log_likelihood", "squared_error", "importance_weighted_bound", "bits_per_dim"):
        assert np.isfinite(found[name]) and found[f"{name}_error"] > 0
    assert found["bits_per_dim_error"] / found["elbo_error"] == pytest.approx(1 / (7 * math.log(2)))
