"""Any likelihood, network and data: every figure is of the model's own likelihood."""

import copy
import json
import math
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from PIL import Image
from pyro.infer import Predictive, Trace_ELBO
from torch import nn

import pyro_nbvae
from pyro_nbvae import likelihoods
from pyro_nbvae.errors import InputError
from pyro_nbvae.guides import GaussianGuide, NegativeBinomialGuide, PoissonGuide
from pyro_nbvae.infer import AnalyticKL_ELBO
from pyro_nbvae.metrics import held_out, importance_weighted_bound
from pyro_nbvae.models import GaussianModel, NegativeBinomialModel, PoissonModel
from pyro_nbvae.study.build import build, resolve
from pyro_nbvae.study.cli import main
from pyro_nbvae.study.config import configure
from pyro_nbvae.study.data import SOURCES, Data, Source, load, register_data
from pyro_nbvae.study.evaluation import evaluate
from pyro_nbvae.study.folder import SCHEMA, Run
from pyro_nbvae.study.training import train
from pyro_nbvae.study.tree import VAE, Estimator, MonteCarloKL, options
from pyro_nbvae.study.variants import GaussianVAE, NegativeBinomialVAE, register_variant
from pyro_nbvae.vae import evaluating

SHIPPED = {
    "gaussian": likelihoods.Gaussian(0.5),
    "bernoulli": likelihoods.Bernoulli(),
    "poisson": likelihoods.Poisson(),
    "negative_binomial": likelihoods.NegativeBinomial(),
}


def textbook(name, h, x):
    """log p(x | h) by torch's own classes, summed over what is no batch."""
    d = {
        "gaussian": lambda: torch.distributions.Normal(h, 0.5),  # beta 0.5: variance 1/4
        "bernoulli": lambda: torch.distributions.Bernoulli(torch.sigmoid(h)),
        "poisson": lambda: torch.distributions.Poisson(torch.log1p(torch.exp(h))),
        "negative_binomial": lambda: torch.distributions.NegativeBinomial(
            torch.ones(()), logits=torch.log(torch.log1p(torch.exp(h)))
        ),
    }[name]()
    return d.log_prob(x).flatten(1).sum(1)


def test_a_likelihood_that_a_model_gets_later_says_what_it_needs():
    model = NegativeBinomialModel((5,), 3, decoder="linear")
    model.likelihood = likelihoods.NegativeBinomial()
    with pytest.raises(ValueError, match=r"call setup\(event_shape\)"):
        model(torch.ones(2, 5))
    model.likelihood.setup((5,))
    assert model(torch.ones(2, 5)).shape == (2, 3)


@pytest.mark.parametrize("h", [-100.0, -61.0, 100.0])
def test_a_negative_binomial_takes_all_outputs(h):
    """Whatever the dispersion: its logits stay in the range that the distribution accepts."""
    likelihood = likelihoods.NegativeBinomial()
    likelihood.setup((3,))
    likelihood.dispersion.value.data[:] = torch.tensor([-6.0, 0.0, 6.0])
    assert (likelihood(torch.full((2, 3), h)).log_prob(torch.zeros(2, 3)) <= 0).all()


@pytest.mark.parametrize("name", SHIPPED)
@pytest.mark.parametrize("shape", [(7,), (2, 3, 4)], ids=str)
def test_the_bounds_are_of_the_models_own_likelihood(name, shape):
    """ELBO and importance-weighted bound of one sample against the textbook's log p(x | z) on the same samples."""
    model = NegativeBinomialModel(shape, 5, decoder="linear", likelihood=copy.deepcopy(SHIPPED[name]))
    guide = NegativeBinomialGuide(model, encoder="linear")
    x = torch.poisson(torch.ones(40, *shape)).clamp(max=1 if name == "bernoulli" else 9)
    ours = held_out(model, guide, x, seed=3)
    with evaluating(model, guide, 3):
        q = guide.posterior(x)
        z = q.sample()
        likelihood = textbook(name, model.decode(z), x)
        kl = torch.distributions.kl_divergence(q, model.prior_distribution().expand(q.batch_shape)).sum(1)
        log_ratio = (model.prior_distribution().log_prob(z) - q.log_prob(z)).sum(1)
    assert ours.log_likelihood == pytest.approx(float(likelihood.mean()), rel=1e-4)
    assert ours.elbo == pytest.approx(float((likelihood - kl).mean()), rel=1e-4)
    mean = model.observation(z).mean.detach()
    assert ours.mse == pytest.approx(float((x - mean).square().mean()), rel=1e-4)
    assert ours.ssim is None
    bound = importance_weighted_bound(model, guide, x, 1, seed=3)
    torch.testing.assert_close(bound, likelihood + log_ratio, rtol=1e-4, atol=1e-3, check_dtype=False)


@pytest.mark.parametrize("name", SHIPPED)
def test_the_estimators_loss_is_of_it_too(name):
    model = PoissonModel((6,), 4, decoder="linear", likelihood=copy.deepcopy(SHIPPED[name]))
    guide = PoissonGuide(model, encoder="linear", relaxation=None)
    x = torch.poisson(torch.ones(30, 6)).clamp(max=1 if name == "bernoulli" else 9)
    losses = torch.tensor([[e.loss(model, guide, x) for e in (AnalyticKL_ELBO(), Trace_ELBO())] for _ in range(300)])
    difference = losses[:, 0] - losses[:, 1]
    assert abs(float(difference.mean())) < 4 * float(difference.std()) / math.sqrt(300)


def test_any_callable_and_any_network():
    """A decoder of two outputs an element, a likelihood that reads both, a distribution with an event shape already."""

    class Decoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 10)

        def forward(self, z):
            return self.layer(z).unflatten(1, (2, 5))

    def laplace(h):
        location, log_scale = h.unbind(-2)
        return dist.Laplace(location, log_scale.exp()).to_event(1)

    model = NegativeBinomialModel((5,), 3, decoder=Decoder(), likelihood=laplace)
    guide = NegativeBinomialGuide(model, encoder=nn.Sequential(nn.Linear(5, 6), nn.Unflatten(1, (2, 3))))
    x = torch.randn(8, 5)
    loss = AnalyticKL_ELBO().differentiable_loss(model, guide, x)
    loss.backward()
    assert model.decoder.layer.weight.grad.abs().sum() > 0
    assert Predictive(model, num_samples=6)(None)["x"].shape == (6, 1, 5)
    assert model(None, 4).shape == (4, 3)
    assert math.isfinite(held_out(model, guide, x).elbo)


def test_networks_of_the_wrong_shape_are_refused():
    wrong = NegativeBinomialModel((5,), 3, decoder=nn.Linear(3, 4))
    with pytest.raises(ValueError, match=r"observations of shape \(4,\): the model's event_shape is \(5,\)"):
        wrong(torch.randn(2, 5))
    model = NegativeBinomialModel((5,), 3, decoder="linear")
    guide = NegativeBinomialGuide(model, encoder=nn.Linear(5, 3))
    with pytest.raises(ValueError, match=r"needs \(batch, 2, 3\), 2 numbers per latent"):
        guide(torch.randn(2, 5))


def test_a_guide_of_another_family_is_refused():
    with pytest.raises(TypeError, match=r"NegativeBinomialGuide needs .*NegativeBinomialPrior, got GaussianModel"):
        NegativeBinomialGuide(GaussianModel((5,), 3, decoder="linear"), encoder="linear")


class NoMean(dist.Normal):
    @property
    def mean(self):
        raise NotImplementedError


@pytest.mark.parametrize(
    "likelihood", [lambda h: NoMean(h, 1.0), lambda h: dist.Cauchy(h, 1.0), lambda h: dist.StudentT(1.0, h)]
)
def test_a_likelihood_without_a_mean_leaves_reconstruction_out(likelihood):
    model = GaussianModel((5,), 3, decoder="linear", likelihood=likelihood)
    found = held_out(model, GaussianGuide(model, encoder="linear"), torch.randn(10, 5))
    assert found.mse is None and found.squared_error is None and math.isfinite(found.elbo)


def test_a_likelihood_that_two_models_share_keeps_its_dispersion():
    likelihood = likelihoods.NegativeBinomial()
    first = PoissonModel((5,), 3, decoder="linear", likelihood=likelihood)
    with torch.no_grad():
        likelihood.dispersion.value.add_(2)
    trained = likelihood.dispersion.value
    second = PoissonModel((5,), 4, decoder="linear", likelihood=likelihood)
    assert first.likelihood.dispersion.value is second.likelihood.dispersion.value is trained and (trained == 2).all()
    with pytest.raises(InputError, match=r"observations of shape \(5,\), got \(6,\)"):
        PoissonModel((6,), 3, decoder="linear", likelihood=likelihood)


def test_a_batch_larger_than_the_data_set_is_refused():
    model = PoissonModel((5,), 3, decoder="linear", data_size=4)
    guide = PoissonGuide(model, encoder="linear")
    for program in (model, guide):
        assert program(torch.rand(4, 5)).shape == (4, 3)
        with pytest.raises(InputError, match="at most data_size=4, got 8"):
            program(torch.rand(8, 5))


# --- runs ------------------------------------------------------------------------------------------------------------

TINY = {"latents": 6, "encoder": "linear", "decoder": "linear", "batch_size": 50, "epochs": 2, "lr": 0.01}


@pytest.fixture
def data(monkeypatch):
    """Binary vectors and counts under names of their own."""
    for name, top in (("binary", 1), ("counts", 50)):
        x = torch.poisson(torch.full((120, 7), 2.0), generator=torch.Generator().manual_seed(1)).clamp(max=top)
        monkeypatch.setitem(SOURCES, name, None)
        register_data(name, Source((7,), lambda root, x=x: (x[:100], x[100:], None, None)))


@pytest.mark.filterwarnings("ignore:.*holds counts")
@pytest.mark.parametrize(
    "likelihood, name",
    [("bernoulli", "binary"), ("poisson", "counts"), ("negative_binomial", "counts"), ("gaussian", "counts")],
)
def test_runs_of_every_likelihood(likelihood, name, data, tmp_path, capsys):
    """Training, evaluation, generation, reconstruction, checkpoints and export by the command."""
    folder = str(tmp_path / "run")
    flags = [word for key, value in TINY.items() for word in (f"--{key.replace('_', '-')}", str(value))]
    main(["train", "--data", name, "--likelihood", likelihood, *flags, "--out", folder])
    main(["evaluate", folder, "--samples", "20", "--importance-samples", "2"])
    headings = {line.split("  ")[0] for line in capsys.readouterr().out.splitlines()}
    assert "ELBO" in headings and not {"SSIM", "FID-c", "KID-c"} & headings
    metrics = json.loads((tmp_path / "run/metrics.json").read_text())
    assert (
        metrics["ssim"] is None
        and metrics["fid_c"] is None
        and metrics["importance_weighted_bound"] > metrics["elbo"] - 1
    )
    main(["generate", folder, "--count", "9"])
    main(["reconstruct", folder])
    main(["export", folder])
    for picture in ("samples.png", "reconstructions.png"):
        with Image.open(tmp_path / "run" / picture) as image:
            assert min(image.size) > 100
    model, guide = pyro_nbvae.load(folder)
    again, _ = pyro_nbvae.load(tmp_path / "run/weights.safetensors")
    assert not model.training and not guide.training and model.event_shape == (7,)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))
    _, loaded, its_guide = Run(folder).load()
    test = load(name).test
    assert held_out(loaded, its_guide, test).elbo == pytest.approx(metrics["elbo"])


@pytest.mark.parametrize("likelihood, name", [("bernoulli", "counts"), ("bernoulli", "digits"), ("poisson", "digits")])
def test_data_out_of_the_likelihoods_support_are_refused(likelihood, name, data, tmp_path):
    config = configure(data=name, likelihood=likelihood, **TINY)
    with pytest.raises(InputError, match=f"training data of {name} lie in .* and not in the support of"):
        train(config, tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("estimator", ["Trace_ELBO", "TraceMeanField_ELBO", "TraceGraph_ELBO", "RenyiELBO"])
def test_any_elbo_of_pyros_trains(estimator, tmp_path):
    run = train(
        configure("P-VAE", estimator=estimator, prior_lr_multiplier=0.1, prior_mean=1.0, **TINY),
        tmp_path,
        progress=False,
    )
    log = run.read_checkpoint()["log"]
    assert log[1]["loss"] < log[0]["loss"] and "kl_weight" not in log[0]
    assert "kl_warmup" not in options(run.config()[0])


def test_a_family_without_a_registered_kl(tmp_path, own_variants):
    """Trained and evaluated with the Monte Carlo KL, whose standard error is beside it; the true KL is the normals'."""

    class Model(GaussianModel):
        def prior_distribution(self):
            return dist.Weibull(self.prior.zeros + 1, self.prior.zeros + 1)

    class Guide(GaussianGuide):
        def posterior(self, x):
            location, log_scale = self.encode(x)
            return dist.LogNormal(location, (log_scale / 5).exp())

    @dataclass(frozen=True, kw_only=True)
    class Mine(VAE):
        kind: Literal["log_normal"] = "log_normal"
        estimator: Estimator = field(default_factory=MonteCarloKL)

        def build(self, event_shape, latents, *, encoder, **options):
            model = Model(event_shape, latents, **options)
            return model, Guide(model, encoder=encoder)

    register_variant("MINE", Mine())
    run = train(configure("MINE", **TINY), tmp_path, progress=False)
    metrics = evaluate(run, samples=20, importance_samples=0, progress=False)
    guide = run.load()[2]
    x = load("digits").test.float() / 255
    q = guide.posterior(x)
    # KL(LogNormal(a, s) || Weibull(1, 1)) = E[e^y] - E[y] - entropy of y, less E[y] from the change of variables
    kl = (q.mean - q.loc - 0.5 * torch.log(2 * math.pi * math.e * q.scale**2)).sum(1).mean().detach()
    assert metrics["kl_error"] > 0
    assert abs(metrics["kl"] - float(kl)) < 4 * metrics["kl_error"]


# --- data of a user's own --------------------------------------------------------------------------------------------


def test_a_folder_of_images(tmp_path):
    rng = np.random.default_rng(0)
    for k in range(20):
        (tmp_path / "images" / f"{k % 2}").mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 256, (9, 11, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / f"{k % 2}" / f"{k:02d}.png")
    found = load(str(tmp_path / "images"))
    assert found.train.shape == (18, 3, 9, 11) and found.test.shape == (2, 3, 9, 11) and found.images
    run = train(configure(data=str(tmp_path / "images"), **TINY), tmp_path / "run", progress=False)
    metrics = evaluate(run, samples=20, importance_samples=0, progress=False)
    assert metrics["ssim"] is not None and metrics["fid_c"] is not None
    Image.fromarray(pixels[:5]).save(tmp_path / "images" / "odd.png")
    with pytest.raises(InputError, match=r"odd.png is \(3, 5, 11\).* must be of one size"):
        load(str(tmp_path / "images"))
    (tmp_path / "images" / "0" / "00.png").write_text("no")
    with pytest.raises(InputError, match=r"00\.png cannot be read as an image"):
        load(str(tmp_path / "images"))


def test_arrays(tmp_path):
    counts = np.random.default_rng(0).poisson(3, (50, 6)).astype(np.uint8)
    np.save(tmp_path / "counts.npy", counts)
    found = load(str(tmp_path / "counts.npy"))
    assert found.train.shape == (45, 6) and not found.images
    assert len(found.test) == len(counts) // 10
    pixels = np.random.default_rng(0).integers(0, 256, (30, 1, 8, 8), dtype=np.uint8)
    np.savez(
        tmp_path / "both.npz",
        train=pixels[:20],
        test=pixels[20:],
        train_labels=np.arange(20),
        test_labels=np.arange(10),
    )
    both = load(str(tmp_path / "both.npz"))
    assert both.images and both.train_labels.tolist() == list(range(20)) and len(both.test) == 10
    run = train(
        configure(data=str(tmp_path / "counts.npy"), likelihood="negative_binomial", **TINY),
        tmp_path / "run",
        progress=False,
    )
    config, shape = run.config()
    assert shape == (6,)
    assert config.likelihood.kind == "negative_binomial" and config.data == str(tmp_path / "counts.npy")


def test_pixels_are_scaled_and_nothing_else_is():
    from pyro_nbvae.batching import to_floats

    counts = torch.tensor([[3, 255]], dtype=torch.uint8)
    assert to_floats(counts).tolist() == [[3.0, 255.0]]
    assert to_floats(counts.reshape(1, 1, 1, 2)).flatten().tolist() == pytest.approx([3 / 255, 1.0])
    assert Data("x", counts, counts).event_shape == (2,)


@pytest.mark.parametrize(
    "write, message",
    [
        (lambda p: np.save(p / "x.npy", np.array(["a"] * 20)), "expected numbers of shape"),
        (lambda p: np.save(p / "x.npy", np.zeros(20)), "expected numbers of shape"),
        (lambda p: np.save(p / "x.npy", np.full((20, 2), np.nan)), "40 values that are NaN or infinite"),
        (lambda p: np.save(p / "x.npy", np.zeros((5, 2))), "too few"),
        (lambda p: (p / "x.npy").write_bytes(b"no"), "cannot be read as a .npy array: it has another format"),
        (lambda p: np.save(p / "x.npy", np.zeros((50, 0))), "expected numbers of shape"),
        (lambda p: None, "does not exist"),
    ],
)
def test_arrays_that_are_no_data(write, message, tmp_path):
    write(tmp_path)
    with pytest.raises(InputError, match=message) as error:
        load(str(tmp_path / "x.npy"))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "arrays, message",
    [
        ({"x_train": np.zeros((30, 2)), "y_train": np.zeros(30)}, "holds x_train, y_train: expected the array counts"),
        ({"train": np.zeros((30, 2)), "test": np.zeros((30, 2), int)}, "save them with one type"),
        ({"x": np.zeros((30, 2)), "labels": np.zeros(29, int)}, r"have shape \(29,\), expected \(30,\)"),
    ],
)
def test_files_of_several_arrays_that_are_no_data(arrays, message, tmp_path):
    np.savez(tmp_path / "x.npz", **arrays)
    with pytest.raises(InputError, match=message):
        load(str(tmp_path / "x.npz"))


def test_byte_order(tmp_path):
    np.save(tmp_path / "x.npy", np.arange(60).reshape(30, 2).astype(">i4"))
    assert load(str(tmp_path / "x.npy")).train[1].tolist() == [2, 3]


# --- folders ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("version", "message"),
    [
        (None, "pyro-nbvae 0.1.0 reads this run; or train it again"),
        (SCHEMA - 1, "pyro-nbvae 0.1.0 reads this run; or train it again"),
        (SCHEMA + 1, "update pyro-nbvae"),
    ],
)
def test_a_run_of_another_version(version, message, tmp_path):
    """Its networks may be others: it is refused in one line, not read wrongly, by commands too."""
    run = train(configure("CMP", data="digits", **TINY), tmp_path / "run", progress=False)
    now = json.loads(run.config_path.read_text())
    run.config_path.write_text(json.dumps({**now, "schema_version": version}))
    with pytest.raises(InputError, match=f"schema_version is {version}.*{message}") as error:
        run.load()
    assert "\n" not in str(error.value)
    with pytest.raises(InputError, match=f"schema_version is {version}.*{message}"):
        train(configure(**TINY), run.folder, resume=True, progress=False)


def test_a_file_that_is_no_export(tmp_path):
    (tmp_path / "x.safetensors").write_bytes(b"no")
    with pytest.raises(InputError, match="holds no exported run"):
        pyro_nbvae.load(tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"variant": "G-VAE", "temperature": 0.1}, "unknown option temperature: G-VAE has batch_size, "),
        ({"variant": "EX-G", "indicator": "smoothstep"}, "unknown option indicator: EX-G has "),
        ({"variant": "EX-C", "max_count": 50}, "unknown option max_count: EX-C has "),
        ({"likelihood": "poisson", "beta": 0.1}, "unknown option beta: CMP-MAR has "),
        ({"estimator": "Trace_ELBO", "kl_warmup": 1.0}, "unknown option kl_warmup: CMP-MAR has "),
        ({"estimator": "SVI"}, "unknown estimator 'SVI': choose from AnalyticKL_ELBO, "),
        ({"estimator": "TraceEnum_ELBO"}, "unknown estimator 'TraceEnum_ELBO': choose from AnalyticKL_ELBO, "),
        ({"kl_samples": 7}, "unknown option kl_samples: CMP-MAR has "),
        ({"categories": 4}, "unknown option categories: CMP-MAR has "),
        ({"variant": "C-VAE", "max_count": 50}, "unknown option max_count: C-VAE has "),
        ({"variant": "G-VAE", "prior_mean": 2.0}, "unknown option prior_mean: G-VAE has "),
        ({"variant": "G-VAE", "prior_lr_multiplier": 2.0}, "unknown option prior_lr_multiplier: G-VAE has "),
        ({"variant": "P-VAE", "relaxation": "auto", "temperature": 0.1}, "unknown option temperature: P-VAE has "),
        ({"variant": "EX-C", "temperature": 0.5}, "temperature must be at most temperature_start (0.24), got 0.5"),
        ({"variant": "MINE"}, "for a variant of your own, import its module: nbvae --import MODULE"),
        ({"data": "nowhere"}, "or name a folder of images, or a .npy, .npz, .h5ad, .csv or .tsv file"),
    ],
)
def test_options_that_do_not_go_together(changes, message, tmp_path):
    with pytest.raises(InputError) as error:
        train(configure(**{**TINY, **changes}), tmp_path / "run", progress=False)
    assert message in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_a_variant_has_its_own_likelihood_and_network(own_variants):
    """What its build gives stays, whatever the configuration says; the schedules are those of its estimator."""
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(256, 12), nn.Unflatten(1, (2, 6)))

    @dataclass(frozen=True, kw_only=True)
    class Fixed(NegativeBinomialVAE):
        kind: Literal["fixed"] = "fixed"
        estimator: Estimator = field(default_factory=lambda: MonteCarloKL(kl_samples=20))

        def build(self, event_shape, latents, *, decoder, **options):
            model = NegativeBinomialModel(event_shape, latents, decoder=decoder, likelihood=likelihoods.Bernoulli())
            return model, NegativeBinomialGuide(model, encoder=encoder)

    register_variant("MINE", Fixed())
    config = resolve(configure("MINE", **TINY), (1, 16, 16))
    model, guide, elbo = build(config, (1, 16, 16))
    assert isinstance(model.likelihood, likelihoods.Bernoulli) and guide.encoder is encoder
    assert elbo.num_samples == 20
    assert config.vae.estimator.kl_warmup == config.training.epochs / 10


def test_another_run_is_named_as_such_whatever_its_flags(tmp_path):
    run = train(configure(**TINY), tmp_path / "run", progress=False)
    for changes in ({"variant": "G-VAE"}, {"likelihood": "poisson"}, {"estimator": "Trace_ELBO"}):
        with pytest.raises(InputError, match="holds another run"):
            train(configure(**{**TINY, **changes}), run.folder, resume=True, progress=False)


def test_a_pair_without_a_kl_is_refused_before_anything_is_written(tmp_path, own_variants):
    class Model(GaussianModel):
        def prior_distribution(self):
            return dist.StudentT(3.0, self.prior.zeros, self.prior.zeros + 1)

    @dataclass(frozen=True, kw_only=True)
    class Mine(GaussianVAE):
        kind: Literal["student"] = "student"

        def build(self, event_shape, latents, *, encoder, **options):
            model = Model(event_shape, latents, **options)
            return model, GaussianGuide(model, encoder=encoder)

    register_variant("MINE", Mine())
    with pytest.raises(
        InputError, match=r"MINE with AnalyticKL_ELBO cannot be trained: .* Normal \(guide\) and StudentT"
    ):
        train(configure("MINE", **TINY), tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("likelihood, name", [("poisson", "counts"), ("bernoulli", "binary")])
def test_reconstruct_checks_data_as_training_does(likelihood, name, data, tmp_path, capsys):
    train(configure(data=name, likelihood=likelihood, **TINY), tmp_path / "run", progress=False)
    for k, bad in enumerate((np.full((3, 7), 0.5), np.full((3, 7), -1.0), np.zeros((0, 7)), np.full((3, 7), np.nan))):
        np.save(tmp_path / f"{k}.npy", bad)
        with pytest.raises(SystemExit):
            main(["reconstruct", str(tmp_path / "run"), "--input", str(tmp_path / f"{k}.npy")])
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith("nbvae: ") and f"{k}.npy" in error
    np.save(tmp_path / "good.npy", np.ones((3, 7), dtype=bool))
    main(["reconstruct", str(tmp_path / "run"), "--input", str(tmp_path / "good.npy")])
