"""Evaluation against direct computation, and against a model small enough to sum."""

import json
import math

import matplotlib.image
import pandas as pd
import pytest
import torch
from pyro.distributions import FoldedDistribution, Normal
from torch.distributions import kl_divergence
from torchmetrics.functional.image import structural_similarity_index_measure

from pyro_nbvae import sampling
from pyro_nbvae.batching import to_bytes, to_floats
from pyro_nbvae.guides import GaussianGuide
from pyro_nbvae.infer import AnalyticKL_ELBO
from pyro_nbvae.likelihoods import Gaussian
from pyro_nbvae.metrics import (
    HeldOut,
    gradient_moments,
    held_out,
    importance_weighted_bound,
)
from pyro_nbvae.models import GaussianModel
from pyro_nbvae.sampling import PriorSampler, generated, reconstructed
from pyro_nbvae.study import evaluation
from pyro_nbvae.study.build import build
from pyro_nbvae.study.cli import main
from pyro_nbvae.study.config import configure
from pyro_nbvae.study.data import SOURCES, Source, load
from pyro_nbvae.study.evaluation import GRADIENT_DRAWS, METRICS, evaluate, register_metric
from pyro_nbvae.study.features import build_features, distances
from pyro_nbvae.study.folder import Run
from pyro_nbvae.study.generation import fit_prior, generate, reconstruct
from pyro_nbvae.study.plots import plot_pairs
from pyro_nbvae.study.training import train
from pyro_nbvae.study.variants import VARIANTS
from pyro_nbvae.vae import evaluating
from tests import pairs


def pair(latents=8, name="EX-C", beta=0.5):
    return pairs.pair(name, (1, 8, 8), latents, likelihood=Gaussian(beta))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    config = configure("DS-C", latents=8, encoder="linear", decoder="linear", epochs=3, lr=0.01, batch_size=300)
    return train(config, tmp_path_factory.mktemp("runs") / "run", progress=False)


@pytest.mark.parametrize("name", VARIANTS)
def test_the_elbo_is_pyros_on_integer_counts(name):
    """Averaged over noise, held_out's ELBO is the one that the estimator gives at temperature 0."""
    model, guide = pair(name=name)
    images = torch.randint(0, 256, (40, 1, 8, 8), dtype=torch.uint8)
    x = to_floats(images)
    ours = torch.tensor([held_out(model, guide, images, seed=s).elbo for s in range(30)])
    with guide.exact():
        pyros = torch.tensor([-AnalyticKL_ELBO().loss(model, guide, x) / 40 for _ in range(30)])
    error = math.hypot(float(ours.std()), float(pyros.std())) / math.sqrt(30)
    assert abs(float(ours.mean() - pyros.mean())) < 4 * error


def test_importance_weighted_bound_reaches_the_evidence():
    """With one unit log p(x) is a sum over its counts; the bound lies between the ELBO and it, and closes in."""
    model, guide = pair(latents=1, beta=2.0)
    images = torch.randint(0, 256, (6, 1, 8, 8), dtype=torch.uint8)
    x = to_floats(images)
    counts = torch.arange(200.0)[:, None]
    with torch.no_grad():
        log_joint = model.observation(counts[:, None]).log_prob(x) + model.prior_distribution().log_prob(counts)
        evidence = torch.logsumexp(log_joint, 0)
        q = guide.posterior(x)
        kl = kl_divergence(q, model.prior_distribution().expand(torch.Size([6, 1]))).sum(-1)
        mass = q.log_prob(counts[:, None]).exp()[..., 0]
        elbo = (mass * model.observation(counts[:, None]).log_prob(x)).sum(0) - kl
    assert (elbo < evidence).all()
    bounds = {
        n: torch.stack([importance_weighted_bound(model, guide, images, n, seed=s) for s in range(40)])
        for n in (1, 200)
    }
    error = {n: b.std(0) / math.sqrt(40) for n, b in bounds.items()}
    assert ((bounds[1].mean(0) - elbo).abs() < 4 * error[1] + 1e-3).all()
    assert (bounds[200].mean(0) <= evidence + 4 * error[200] + 1e-3).all()
    assert (bounds[200].mean(0) > bounds[1].mean(0) - 4 * (error[1] + error[200])).all()
    assert (evidence - bounds[200].mean(0) < 0.1 * (evidence - elbo) + 4 * error[200] + 1e-3).all()


def test_moments_of_units():
    model, guide = pair(latents=4)
    images = torch.randint(0, 256, (3000, 1, 8, 8), dtype=torch.uint8)
    units = held_out(model, guide, images)
    with torch.no_grad():
        q = guide.posterior(to_floats(images))
        kl = kl_divergence(q, model.prior_distribution().expand(torch.Size([3000, 4]))).mean(0)
        variance = q.variance.mean(0) + q.mean.var(0)  # the law of total variance
    torch.testing.assert_close(units.unit_kl, kl, rtol=1e-4, atol=1e-5, check_dtype=False)
    assert ((units.unit_mean - q.mean.mean(0)).abs() < 4 * (variance / 3000).sqrt()).all()
    torch.testing.assert_close(units.unit_variance, variance, rtol=0.25, atol=0.0, check_dtype=False)
    few = images[:40]  # one batch, so that its draws are known
    with evaluating(model, guide, seed=0):
        z = guide.posterior(to_floats(few)).sample()
    found = held_out(model, guide, few)
    torch.testing.assert_close(found.unit_variance, z.double().var(0), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.unit_mean, z.double().mean(0), rtol=1e-5, atol=1e-6)
    fano = (q.variance / q.mean).mean()
    torch.testing.assert_close(torch.tensor(units.fano), fano, rtol=1e-4, atol=0.0)


def test_dispersion_of_units():
    """Four units: collapsed; less variance than a Poisson; a Poisson; more. The first never fired."""
    nan = float("nan")
    found = HeldOut(
        **dict.fromkeys(("log_likelihood", "squared_error", "kl", "elbo", "mse", "ssim"), nan),
        fano=1.0,
        unit_mean=torch.tensor([0.0, 2.0, 4.0, 5.0]),
        unit_variance=torch.tensor([0.0, 3.0, 4.0, 25.0]),
        unit_kl=torch.tensor([5.0, 1.0, 1.0, 1.0]),
        unit_information=torch.tensor([0.0, 1.0, 1.0, 1.0]),
        posterior_mean=torch.tensor([1.0, 2.0, 4.0, 5.0]),
        posterior_variance=torch.tensor([0.1, 1.0, 4.0, 6.0]),
    )
    assert found.overdispersion == pytest.approx((3 / 2 + 4 / 4 + 25 / 5) / 3)
    assert found.underdispersed_active_units == pytest.approx(1 / 3)
    assert found.collapsed_units == 1


def test_ssim_is_torchmetrics_of_the_reconstructions():
    """A decoder that says the same whatever the counts are: its SSIM needs no samples."""
    model, guide = pair()
    with torch.no_grad():
        for parameter in model.decoder.parameters():
            parameter.zero_()
    images = torch.randint(0, 100, (7, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    x, same = to_floats(images), model.observation(torch.ones(7, 8)).mean.detach()
    expected = structural_similarity_index_measure(same, x, data_range=1.0)
    assert held_out(model, guide, images).ssim == pytest.approx(float(expected), rel=1e-4)
    # of other floats the range is that of all, in any order, or the one that is given
    x = torch.randn(600, 1, 8, 8).mul(torch.linspace(0.1, 3, 600)[:, None, None, None]).clamp(-4, 4)
    model.initialize(x)
    with torch.no_grad():
        for parameter in model.decoder.parameters():
            parameter.zero_()
    same = model.observation(torch.ones(600, 8)).mean.detach()
    for given, span in ((None, float(x.max() - x.min())), ((-2.0, 3.0), 5.0)):
        expected = float(structural_similarity_index_measure(same, x, data_range=span))
        for order in (x, x.flip(0)):
            assert held_out(model, guide, order, limits=given).ssim == pytest.approx(expected, rel=1e-4)


def test_metrics_of_a_run_are_what_they_say(tmp_path, monkeypatch):
    """Dark training images and bright held-out ones: samples are compared with the former, mixtures fitted to them."""

    def read(root):
        draw = torch.Generator().manual_seed(0)
        dark, bright = (torch.randint(a, a + 40, (60, 1, 16, 16), dtype=torch.uint8, generator=draw) for a in (0, 200))
        return dark, bright, None, None

    monkeypatch.setitem(SOURCES, "shaded", Source((1, 16, 16), read))
    config = configure(data="shaded", latents=4, encoder="linear", decoder="linear", epochs=3, batch_size=25)
    run = train(config, tmp_path / "run", progress=False)
    _, model, guide = run.load()
    features, data = build_features("classifier", "shaded"), load("shaded")
    evaluate(run, samples=40, progress=False)
    metrics = evaluate(run, ["gradient_noise"], samples=40, progress=False)
    assert metrics["objective"] == pytest.approx(metrics["squared_error"] + metrics["beta"] * metrics["kl"])
    seconds = pd.read_csv(run.folder / "log.csv")["seconds"]
    assert metrics["seconds_per_step"] == pytest.approx(seconds.median() / 3)  # batches of 25, 25 and 10
    _, _, elbo = build(run.config()[0], (1, 16, 16))
    moments = gradient_moments(elbo, model, guide, to_floats(data.test), GRADIENT_DRAWS, seed=0)
    assert metrics["gradient_noise"] == pytest.approx(moments.variance / moments.squared_norm)
    bound = importance_weighted_bound(model, guide, data.test, 5, seed=0)
    assert metrics["importance_weighted_bound"] == pytest.approx(float(bound.double().mean()), rel=1e-5)

    def fid(sampler, real):
        images = [to_bytes(part.mean) for part in generated(model, guide, sampler, 40, seed=0)]
        return distances(features, real, torch.cat(images))["fid_c"]

    assert metrics["fid_c"] == pytest.approx(fid(PriorSampler(model), data.train), rel=1e-6)
    assert metrics["fid_c"] != pytest.approx(fid(PriorSampler(model), data.test), rel=0.1)
    again = to_bytes(torch.cat([*reconstructed(model, guide, data.test, seed=0)]))
    assert metrics["rfid_c"] == pytest.approx(distances(features, data.test, again)["fid_c"], rel=1e-6)
    fit_prior(run, components=8)
    mixture = evaluate(run, samples=40, sampler="mixture", progress=False)
    fitted, _ = sampling.fit_prior(model, guide, data.train, components=8)
    model.set_joint_prior(fitted)
    assert mixture["fid_c"] == pytest.approx(fid(PriorSampler(model), data.train), rel=1e-6)
    assert mixture["elbo"] == pytest.approx(held_out(model, guide, data.test).elbo, rel=1e-6)


def test_a_unit_that_says_nothing_is_collapsed(run):
    """Whatever its KL: here the posterior is not the prior, and the same for all observations."""
    config, model, guide = run.load()
    with torch.no_grad():
        guide.encoder.heads[0].weight[2].zero_()
        guide.encoder.heads[0].bias[2] = 1.0
    state = run.read_checkpoint()
    state["guide"] = guide.state_dict()
    broken = type(run)(run.folder.parent / "dead")
    broken.folder.mkdir()
    broken.write_config(config, model.event_shape)
    broken.write_checkpoint(state)
    before, after = (evaluate(r, importance_samples=1, samples=40, progress=False) for r in (run, broken))
    assert after["kl_per_unit"][2] > 0.02 and after["information_per_unit"][2] == pytest.approx(0, abs=1e-6)
    for found in (before, after):
        assert found["collapsed_units"] == sum(each < 0.01 for each in found["information_per_unit"])
        assert found["information"] == pytest.approx(sum(found["information_per_unit"]))
        assert found["information"] < found["kl"]
    assert after["collapsed_units"] >= 1
    zeros = torch.zeros(3)
    of_units = torch.tensor([0.009, 0.0099, 0.0101])
    assert HeldOut(-2.0, 1.0, 0.5, -2.5, 0.2, None, None, zeros, zeros, zeros, of_units).collapsed_units == 2


def test_evaluation_leaves_everything_as_it_was():
    model, guide = pair()
    before = guide.relaxation
    model.train()
    guide.eval()
    torch.manual_seed(4)
    expected = torch.rand(1)
    torch.manual_seed(4)
    with evaluating(model, guide, seed=0):
        assert not model.training and guide.relaxation is None and not torch.is_grad_enabled()
        torch.rand(10)
    assert model.training and not guide.training and guide.relaxation is before is not None
    assert torch.rand(1) == expected


def test_metrics_are_consistent_and_repeatable(run):
    metrics = evaluate(run, importance_samples=4, samples=40, progress=False)
    assert evaluate(run, importance_samples=4, samples=40, progress=False) == metrics
    assert json.loads((run.folder / "metrics.json").read_text()) == metrics
    assert metrics["mse"] == pytest.approx(metrics["squared_error"] / 256)
    constant = 256 / 2 * math.log(math.pi * metrics["beta"])
    assert metrics["elbo"] == pytest.approx(-metrics["squared_error"] / metrics["beta"] - constant - metrics["kl"])
    assert metrics["bits_per_dim"] == pytest.approx(-metrics["elbo"] / 256 / math.log(2))
    assert metrics["importance_weighted_bound"] > metrics["elbo"]
    assert sum(metrics["kl_per_unit"]) == pytest.approx(metrics["kl"], rel=1e-4)
    assert -1 <= metrics["ssim"] <= 1
    assert evaluate(run, importance_samples=4, samples=40, seed=1, progress=False)["mse"] != metrics["mse"]


def test_figures_in_inceptions_features_are_named_so(tmp_path, monkeypatch, inception_weights, capsys):
    """Both feature sets in one evaluation by the command; neither is taken for the other."""

    def read(root):
        images = torch.randint(0, 256, (9, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
        return images[:6], images[6:], None, None

    monkeypatch.setitem(SOURCES, "random", Source((3, 8, 8), read))
    config = configure(data="random", latents=2, encoder="linear", decoder="linear", epochs=1)
    folder = str(train(config, tmp_path / "run", progress=False).folder)
    both = ["--features", "classifier", "inception", "--inception-weights", str(inception_weights)]
    main(["evaluate", folder, *both, "--samples", "5"])
    headings = {line.split("  ")[0] for line in capsys.readouterr().out.splitlines()}
    assert {"FID-c", "KID-c", "FID", "KID"} <= headings
    metrics = json.loads((tmp_path / "run/metrics.json").read_text())
    assert metrics["feature_networks"] == ["cifar32", "inception-2015-12-05"]
    assert all(math.isfinite(metrics[k]) for k in ("fid", "kid", "fid_c", "kid_c"))
    assert metrics["fid"] != metrics["fid_c"]
    # an evaluation in fewer features keeps the others' figures, and one of other samples does not
    main(["evaluate", folder, "--samples", "5"])
    again = json.loads((tmp_path / "run/metrics.json").read_text())
    assert again == metrics
    # nor does one of no samples say anything of features
    for features in (("classifier",), ("inception_bfloat16",)):
        evaluate(
            Run(folder), ["mse"], features=features, inception_weights=inception_weights, samples=5, progress=False
        )
        assert json.loads((tmp_path / "run/metrics.json").read_text()) == metrics
    capsys.readouterr()
    main(["evaluate", folder, "--samples", "4"])
    assert "FID" not in {line.split("  ")[0] for line in capsys.readouterr().out.splitlines()}
    assert json.loads((tmp_path / "run/metrics.json").read_text())["feature_sets"] == ["classifier"]


def test_pictures_are_written_and_show_what_they_say(run):
    paths = [generate(run, count=10)[0], reconstruct(run, count=20), run.folder / "dispersion.png"]
    evaluate(run, importance_samples=1, samples=40, progress=False)
    for path in paths:
        picture = matplotlib.image.imread(path)
        assert picture.shape[0] > 100 and picture.shape[1] > 100 and picture[..., :3].std() > 0.05
    first = paths[0].read_bytes()
    assert generate(run, count=10)[0].read_bytes() == first
    assert generate(run, count=10, seed=1)[0].read_bytes() != first


def test_ones_own_images(run, tmp_path):
    import numpy as np

    images = load("digits").test[:5]
    np.save(tmp_path / "bytes.npy", images.numpy())
    np.save(tmp_path / "floats.npy", to_floats(images).numpy())
    pictures = [reconstruct(run, input=tmp_path / name).read_bytes() for name in ("bytes.npy", "floats.npy")]
    assert pictures[0] == pictures[1]


@pytest.mark.parametrize("side", [1, 4, 5, 6])
def test_images_smaller_than_the_window_of_ssim_have_none(side):
    model, guide = pairs.pair("P-VAE", (1, side, side), 3)
    found = held_out(model, guide, torch.randint(0, 256, (9, 1, side, side), dtype=torch.uint8))
    assert math.isfinite(found.mse) and (found.ssim is not None) == (side > 5)


def test_the_kl_of_folded_posteriors_is_of_the_folded(monkeypatch):
    """KL(|N(1.5, 1)| || |N(0, 1)|) by quadrature, within 4 standard errors; of the normals before it is 1.125 nats."""
    loc = torch.tensor(1.5)

    class Folded(GaussianGuide):
        def posterior(self, x):
            return FoldedDistribution(Normal(loc.expand(len(x), 3), 1.0))

    model = GaussianModel((5,), 3, decoder="linear")
    monkeypatch.setattr(model, "prior_distribution", lambda: FoldedDistribution(Normal(torch.zeros(3), 1.0)))
    found = held_out(model, Folded(model, encoder="linear"), torch.randn(200, 5))
    z = torch.linspace(1e-9, 12, 200_001, dtype=torch.float64)
    q, p = (FoldedDistribution(Normal(torch.tensor(m, dtype=torch.float64), 1.0)) for m in (1.5, 0.0))
    true = float(torch.trapezoid(q.log_prob(z).exp() * (q.log_prob(z) - p.log_prob(z)), z))
    assert found.kl_error is not None and abs(found.kl - 3 * true) < 4 * found.kl_error
    assert true < 1.0


def test_columns_of_tables_have_headings_of_their_own():
    headings = [one.heading for one in METRICS.values()]
    assert len(set(headings)) == len(headings)
    with pytest.raises(ValueError, match="heading 'KL' of metric mine is that of kl"):
        register_metric(METRICS["kl"]._replace(name="mine"))
    assert "mine" not in METRICS
    register_metric(METRICS["kl"])  # the same metric again


def test_a_metric_that_is_no_number_is_named(run, monkeypatch):
    tensor = METRICS["kl"]._replace(name="mine", heading="mine", compute=lambda e: e.held_out.unit_kl.sum())
    monkeypatch.setitem(METRICS, "mine", tensor)
    with pytest.raises(ValueError, match="metric mine gave a Tensor: its function must return a float, or None"):
        evaluate(run, ["mine"], samples=2, progress=False)


@pytest.mark.parametrize("signal", [1e6, 3.0, 1.5, 1e-9])
def test_a_gradient_that_noise_hides_has_no_noise_to_signal_ratio(signal, tmp_path, monkeypatch):
    """Draws have a ratio if the squared norm of their mean is above twice that of its own noise."""
    config = configure(data="digits", latents=4, encoder="linear", decoder="linear", epochs=1, train_size=100)
    run = train(config, tmp_path / "run", progress=False)
    noise = 1e-6 * 50 / 49
    rate = math.sqrt(signal * noise / 50 + noise / 50)  # the mean's own noise is taken off its square
    draws = iter(rate + 1e-3 * (-1.0) ** k for k in range(100))

    class Loss:
        def differentiable_loss(self, model, guide, x):
            return next(draws) * len(x) * sum(p.sum() for p in guide.parameters())

    monkeypatch.setattr(evaluation, "build", lambda *_: (None, None, Loss()))
    found = evaluate(run, ["gradient_noise"], samples=2, progress=False)["gradient_noise"]
    assert found == (pytest.approx(50 / signal, rel=1e-2) if signal > 2 else None)


def test_pictures_of_values_beyond_the_pixels_are_on_one_scale(tmp_path):
    """A count of 0 is black, the largest white, and a quarter of it between: originals and reconstructions alike."""
    x, again = torch.zeros(1, 1, 8, 8), torch.full((1, 1, 8, 8), 5.0)
    x[..., 4:] = 20.0
    for images, others in ((x, again), (x / 20, again / 20)):
        plot_pairs(images, others, tmp_path / "pairs.png", title="counts")
        shades = matplotlib.image.imread(tmp_path / "pairs.png")[..., 0].round(2)
        assert {0.0, 0.25, 1.0} <= set(shades[60:-20].flatten().tolist())
