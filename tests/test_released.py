"""The losses of the early version of the released code are the formulas that they are said to be."""

import importlib
import math
from contextlib import ExitStack
from unittest.mock import patch

import pandas as pd
import pytest
import torch
from PIL import Image
from torch.distributions import kl_divergence

import pyro_nbvae.experiments.tables  # noqa: F401
from pyro_nbvae.distributions import NegativeBinomial, RelaxedNegativeBinomial
from pyro_nbvae.errors import InputError
from pyro_nbvae.infer.elbo import registered_kl
from pyro_nbvae.metrics import held_out
from pyro_nbvae.study.build import build, resolve
from pyro_nbvae.study.config import configure
from pyro_nbvae.study.evaluation import METRICS
from pyro_nbvae.study.scales import Reproduction
from pyro_nbvae.study.tables import TABLES, cells
from pyro_nbvae.study.variants import KINDS, VARIANTS
from pyro_nbvae.vae import evaluating

GRID = torch.cartesian_prod(torch.tensor([0.3, 1.0, 7.0]), torch.linspace(-2, 2, 3), torch.linspace(-2, 2, 3)).double()


@pytest.fixture
def released():
    """The script, whose variants, metric and table are registered for one test only."""
    with ExitStack() as stack:
        for known in (VARIANTS, KINDS, METRICS, TABLES):
            stack.enter_context(patch.dict(known))
        yield importlib.reload(importlib.import_module("pyro_nbvae.experiments.released"))


def test_the_term_of_shared_dispersion_is_a_kl_of_other_distributions(released):
    """Of NB(r) with success probability p q from one with p, by summing over counts; the counts are drawn at q."""
    for r, logits, prior_logits in GRID:
        p, q = torch.sigmoid(prior_logits), torch.sigmoid(logits)
        other, prior = (NegativeBinomial(r, probs=1 - each) for each in (p * q, p))
        counts = torch.arange(20_000.0, dtype=torch.float64)
        log_mass = other.log_prob(counts)
        expected = (log_mass.exp() * (log_mass - prior.log_prob(counts))).sum()
        assert float(released.shared_dispersion_term(r, logits, prior_logits)) == pytest.approx(float(expected), 1e-6)
    r, prior_logits, logits = torch.tensor(2.0), torch.tensor(0.5), torch.tensor([4.0, 8.0, 12.0])
    values = released.shared_dispersion_term(r, logits, prior_logits)
    assert values[0] > values[1] > values[2] and values[2] < 1e-4  # while the true KL grows
    true = torch.distributions.kl_divergence(
        NegativeBinomial(r, logits=logits), NegativeBinomial(r, logits=prior_logits).expand([3])
    )
    assert true[0] < true[1] < true[2]


def test_the_term_of_the_rates_is_summed_over_latents(released):
    for r, logits, prior_logits in GRID:
        a, b = torch.exp(-logits), torch.exp(-prior_logits)  # rates of the Gammas
        expected = r * (torch.log(a / b) + b / a - 1)
        found = released.rates_term(r, logits.expand(5), prior_logits.expand(5))
        assert found.tolist() == pytest.approx([5 * float(expected)] * 5, rel=1e-9, abs=1e-9)


def test_counts_that_are_cut_off(released):
    """Masses, moments and samples against draws of the two steps: a Gamma rate, and a Poisson of at most 4."""
    torch.manual_seed(0)
    number = 50_000
    r, logits = torch.tensor([0.05, 1.0, 30.0, 3e3, 1e5]), torch.tensor([1.0, 0.3, -2.0, -7.6, -11.0])
    q = released.CutOffNegativeBinomial(r, logits=logits)
    masses = q.masses
    assert masses.sum(-1).tolist() == pytest.approx([1.0] * 5)
    rates = torch.distributions.Gamma(r, torch.exp(-logits)).sample((number,)).clamp(min=1e-30)
    counts = torch.arange(5.0)
    given = torch.softmax(torch.distributions.Poisson(rates[..., None]).log_prob(counts), -1).double()
    error = given.std(0) / math.sqrt(number)
    assert bool(((masses - given.mean(0)).abs() < 5 * error + 1e-7).all())
    z = q.sample(torch.Size([number]))
    share = torch.stack([(z == k).double().mean(0) for k in range(5)], -1)
    assert bool(((share - masses).abs() < 5 * (masses * (1 - masses) / number).sqrt() + 1e-7).all())
    assert q.mean.tolist() == pytest.approx((masses * counts).sum(-1).tolist(), rel=1e-6)
    assert float((q.variance - z.var(0)).abs().max()) < 0.03
    assert torch.equal(q.log_prob(torch.tensor([2.0])), masses[:, 2].log().float())
    p = released.CutOffNegativeBinomial(torch.ones(5), logits=torch.zeros(5))
    kl = (masses * (masses / p.masses).log()).sum(-1)
    assert torch.allclose(registered_kl(q, p), kl) and bool((kl < registered_kl(uncut(q), uncut(p))).all())
    wider = uncut(p).log_prob(counts[:, None]).movedim(0, -1)
    assert torch.allclose(kl_divergence(q, uncut(p)), (masses * (masses.log() - wider)).sum(-1))
    assert torch.allclose(q.entropy().double(), -(masses * masses.log()).sum(-1))
    assert torch.allclose(q.cdf(torch.tensor(2.0)).double(), masses[:, :3].sum(-1))
    assert torch.allclose(q.cdf(torch.tensor(9.0)), torch.ones(5)) and torch.equal(q.mode, masses.argmax(-1).float())


def uncut(q):
    """The negative binomial before it is cut off."""
    return RelaxedNegativeBinomial(q.total_count, logits=q.logits)


@pytest.mark.filterwarnings("ignore:a Poisson rate is close to max_count")
def test_metrics_of_counts_that_are_cut_off_are_theirs(released):
    """KL, Fano factor and information are those of the masses."""
    config = resolve(configure("MC-G-early", latents=3, decoder="linear", encoder="linear"), (1, 4, 4))
    model, guide, _ = build(config, (1, 4, 4))
    x = torch.rand(40, 1, 4, 4)
    with torch.no_grad():
        guide(x)
        guide.encoder.heads[0].bias += 2.0
    found = held_out(model, guide, x)
    with evaluating(model, guide, 0):
        posterior = guide.posterior(x)
        q, p = posterior.masses, model.prior_distribution().masses
        fano = float((posterior.variance / posterior.mean).mean())
    assert found.kl == pytest.approx(float((q * (q / p).log()).sum((-1, -2)).mean()), rel=1e-6)
    assert found.fano == pytest.approx(fano, rel=1e-4)
    aggregate = q.mean(0)
    assert found.information == pytest.approx(float((q * (q / aggregate).log()).sum(-1).mean(0).sum()), rel=1e-4)


@pytest.mark.filterwarnings("ignore:a Poisson rate is close to max_count")
@pytest.mark.parametrize("name", ["DS-C-early", "MC-G-early", "MC-C-early"])
def test_the_encoder_has_the_gradient_of_its_term(released, name):
    """The loss without the reconstruction; in MC-G-early the encoder has none."""
    config = resolve(configure(name, preset="paper", latents=5, decoder="linear", encoder="linear"), (1, 4, 4))
    model, guide, elbo = build(config, (1, 4, 4))
    x = torch.rand(3, 1, 4, 4)
    elbo.differentiable_loss(model, guide, x)  # the first call initialises the networks
    q, p = guide.posterior(x), model.prior_distribution()
    assert torch.allclose(q.mean, q.total_count * q.logits.exp()) or name == "MC-G-early"
    elbo.differentiable_loss(model, guide, x)
    term = elbo.terms[1]
    expected = released.TERMS[config.vae.estimator.term](p.total_count, q.logits, p.logits.expand_as(q.logits))
    assert float(term) == pytest.approx(float(expected.sum().detach()), rel=1e-5)
    assert (float(term) == 0) == (name == "MC-G-early")


def test_code_length_is_drawn_of_the_logs_that_are_there(released, tmp_path):
    code_length = importlib.import_module("pyro_nbvae.experiments.code_length")
    with pytest.raises(InputError, match="no runs of cifar16 in"):
        code_length.main(str(tmp_path))
    chosen = {"full": ("main", "P-VAE"), "paper": ("released", "DS-C-early")}
    for scale, (table, variant) in chosen.items():
        options = Reproduction(scale=scale, data=("cifar16",), variants=(variant,), seeds=(0,), out=str(tmp_path))
        (cell,) = cells(TABLES[table], options)
        cell.folder.mkdir(parents=True)
        log = {"epoch": range(1, 11), "test_kl": range(60, 160, 10), "test_ssim": 0.5, "test_mse": 0.01}
        pd.DataFrame(log).to_csv(cell.folder / "log.csv")
    logs = code_length.curves(str(tmp_path), 0)
    assert list(logs) == ["P-VAE", "DS-C-early"]
    assert list(logs["P-VAE"]["epoch"]) == [1, 2, 3, 4, 5, 8, 10] and logs["P-VAE"]["test_kl"].iloc[-1] == 150
    code_length.main(str(tmp_path), tmp_path / "picture.png")
    with Image.open(tmp_path / "picture.png") as picture:
        assert min(picture.size) > 200
