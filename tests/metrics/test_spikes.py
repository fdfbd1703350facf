"""Scores of spike counts, against the benchmark's own tool, direct sums and simulations."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy import stats
from torch.utils.data import DataLoader, TensorDataset

from pyro_nbvae import likelihoods
from pyro_nbvae.batching import Recording
from pyro_nbvae.distributions import ConwayMaxwellPoisson, NegativeBinomial, RelaxedPoisson
from pyro_nbvae.errors import InputError
from pyro_nbvae.guides import PoissonGuide
from pyro_nbvae.metrics import (
    Score,
    bits_per_spike,
    calibration,
    co_smoothing,
    compare_likelihoods,
    condition_rates,
    fano_factors,
    fit_dispersion,
    importance_weighted_bound,
    leave_one_out_rates,
    nlb_bits,
    null_rates,
    psth_r2,
)
from pyro_nbvae.metrics.spikes import _cdf
from pyro_nbvae.models import PoissonModel


def test_a_loader_that_shuffles_scores_each_trial_against_its_own_null():
    """The deviation of the scores over trials is that of data in order."""
    pyro.set_rng_seed(0)
    x = torch.poisson(torch.rand(200, 1) * 8 * torch.ones(200, 5))
    model, guide = trained(x)
    null = null_rates(Recording(x))
    loader = DataLoader(TensorDataset(x), batch_size=50, shuffle=True)
    one, other = (bits_per_spike(model, guide, data, null, samples=20) for data in (x, loader))
    assert sorted(other.spikes.tolist()) == sorted(one.spikes.tolist())
    assert float(other.nats.std()) == pytest.approx(float(one.nats.std()), rel=0.1)


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def trained(x, reads=None, latents=2, likelihood=None):
    pyro.set_rng_seed(0)
    model = PoissonModel(tuple(x.shape[1:]), latents, decoder="linear", likelihood=likelihood or likelihoods.Poisson())
    guide = PoissonGuide(model, encoder="linear", reads=reads)
    model.initialize(x)
    guide.initialize(x)
    return model, guide


@pytest.mark.parametrize("shape", [(20, 6, 7), (50, 1, 9)])
def test_nlb_bits_are_those_of_the_benchmark(shape, rng):
    """nlb_tools 0.0.4, trials x bins x neurons; also with counts that were not observed."""
    from nlb_tools.evaluation import bits_per_spike as theirs

    rates = rng.gamma(1.0, 1.0, shape)
    counts = rng.poisson(rates).astype(float)
    assert nlb_bits(torch.tensor(rates), torch.tensor(counts)) == pytest.approx(theirs(rates, counts), rel=1e-10)
    counts[rng.random(shape) < 0.2] = np.nan
    assert nlb_bits(torch.tensor(rates), torch.tensor(counts)) == pytest.approx(theirs(rates, counts), rel=1e-10)
    for wrong, message in ((rates[1:], "they must be the same"), (-rates, "rates must be at least 0")):
        with pytest.raises(InputError, match=message):
            nlb_bits(torch.tensor(wrong), torch.tensor(counts))


def test_a_whole_trial_is_scored_by_its_bound_minus_a_poisson(rng):
    x = torch.tensor(rng.poisson(2.0, (40, 5))).float()
    model, guide = trained(x)
    null = null_rates(x)
    np.testing.assert_allclose(null, (x.double().sum(0) + 0.5) / 41)
    score = bits_per_spike(model, guide, x, null, samples=8, seed=3)
    bounds = importance_weighted_bound(model, guide, x, 8, seed=3)
    poisson = stats.poisson(null.numpy()).logpmf(x.numpy()).sum(1)
    expected = (bounds.numpy() - poisson).sum() / (math.log(2) * float(x.sum()))
    assert score.bits == pytest.approx(expected, rel=1e-9)
    mask = torch.tensor(rng.random((40, 5)) > 0.3)
    masked = bits_per_spike(model, guide, Recording(x.masked_fill(~mask, math.nan), mask=mask), null, samples=8)
    assert masked.spikes.tolist() == torch.where(mask, x, 0).sum(1).tolist()


def test_co_smoothing_is_the_log_of_the_mean_over_the_posterior(rng):
    """Against the sum over all counts of one latent, weighted by the posterior given the held-in neurons."""
    x = torch.tensor(rng.poisson(2.0, (6, 4))).float()
    reads = torch.tensor([True, True, False, False])
    model, guide = trained(x, reads, latents=1)
    null = null_rates(x)
    score, rates = co_smoothing(model, guide, x, null, samples=1500)
    z = torch.arange(120.0)[:, None]
    with torch.no_grad(), guide.exact():
        model.eval()
        q = guide.posterior(x)
        weight = q.log_prob(z[:, None]).squeeze(-1).double()  # (counts, trials)
        observed = model.observation(z).base_dist
        log_mass = torch.distributions.Poisson(observed.rate.double()[:, None]).log_prob(x.double())
        expected = (weight[..., None] + log_mass).logsumexp(0)
        mean = (weight.exp()[..., None] * observed.rate.double()[:, None]).sum(0)
    expected = expected - torch.tensor(stats.poisson(null.numpy()).logpmf(x.numpy()))
    torch.testing.assert_close(score.nats, expected[:, 2:], atol=0.05, rtol=0)
    torch.testing.assert_close(rates, mean, atol=0.05, rtol=0.05)
    # what is held out does not matter for the latents
    other = co_smoothing(model, guide, torch.where(reads, x, x + 3), null, samples=50)[1]
    torch.testing.assert_close(other, co_smoothing(model, guide, x, null, samples=50)[1])
    with pytest.raises(InputError, match="needs a guide that does not read all neurons"):
        co_smoothing(*trained(x), x, null)


def test_bins_of_a_neuron_are_scored_together(rng):
    x = torch.tensor(rng.poisson(1.0, (6, 3, 4))).float()
    reads = torch.tensor([True, True, False, False]).expand(3, 4).clone()
    model, guide = trained(x, reads)
    score, rates = co_smoothing(model, guide, x, null_rates(x), samples=20)
    assert score.nats.shape == (6, 2) and rates.shape == x.shape
    assert torch.equal(score.spikes, x[..., 2:].sum(1).double())


def test_scores_are_pooled_and_their_errors_are_those_of_the_ratio(rng):
    """The standard error over trials, against the spread over many simulated data sets."""

    def simulated():
        spikes = rng.poisson(3.0, (60, 4)).astype(float)
        return Score(torch.tensor(0.2 * spikes + rng.normal(0, 1, spikes.shape)), torch.tensor(spikes))

    scores = [simulated() for _ in range(300)]
    spread = np.std([s.bits for s in scores])
    assert np.mean([s.over_trials for s in scores]) == pytest.approx(spread, rel=0.15)
    pooled = Score.pooled(scores[:2])
    total = (scores[0].nats.sum() + scores[1].nats.sum()) / (scores[0].spikes.sum() + scores[1].spikes.sum())
    assert pooled.bits == pytest.approx(float(total) / math.log(2))
    difference = scores[0] - Score(scores[0].nats - scores[0].spikes, scores[0].spikes)
    assert difference.bits == pytest.approx(1 / math.log(2)) and difference.over_trials == pytest.approx(0, abs=1e-9)
    with pytest.raises(InputError, match="other counts"):
        scores[0] - scores[1]


def test_fano_factors_are_within_condition_and_bin(rng):
    means = rng.uniform(0.5, 5, (2, 3, 4))
    labels = np.repeat([0, 1], 400)
    x = rng.binomial(10, means[labels] / 10).astype(float)
    expected = np.mean([x[labels == c].var(0, ddof=1).sum(0) for c in (0, 1)], 0) / np.mean(
        [x[labels == c].mean(0).sum(0) for c in (0, 1)], 0
    )
    found = fano_factors(torch.tensor(x), torch.tensor(labels))
    np.testing.assert_allclose(found, expected)
    assert (found < 0.85).all() and (fano_factors(torch.tensor(x)) > found).all()
    x[rng.random(x.shape) < 0.3] = np.nan
    np.testing.assert_allclose(fano_factors(torch.tensor(x), torch.tensor(labels)), found, atol=0.1)
    assert fano_factors(torch.zeros(5, 2)).isnan().all()


def test_psths_of_the_truth_explain_all(rng):
    labels = torch.arange(40) % 2
    rates = torch.tensor(rng.uniform(1, 5, (2, 6, 3)))
    counts = rates[labels]
    assert psth_r2(counts, counts, labels) == 1
    assert psth_r2(counts.mean((0, 1)).expand(counts.shape), counts, labels) == pytest.approx(0, abs=1e-9)
    counts[::5] = math.nan
    assert psth_r2(rates[labels], counts, labels) == pytest.approx(1)


@pytest.mark.parametrize(
    "likelihood", [likelihoods.Poisson, likelihoods.NegativeBinomial, likelihoods.ConwayMaxwellPoisson]
)
@pytest.mark.parametrize("inflated", [None, "shared"])
def test_the_pit_of_the_models_own_counts_is_uniform(likelihood, inflated):
    """Counts that the guide does not read, drawn from the model at the guide's posterior: a Kolmogorov-Smirnov test."""
    pyro.set_rng_seed(0)
    x = torch.poisson(torch.full((200, 4), 1.5))
    reads = torch.tensor([True, True, False, False])
    model, guide = trained(x, reads, likelihood=likelihood(zero_inflation=inflated))
    for name, p in model.likelihood.named_parameters():
        p.data.fill_({"dispersion.value": 0.8}.get(name, -1.0))
    with torch.no_grad(), guide.exact():
        drawn = model.observation(guide.posterior(x).sample()).sample()
    found = calibration(model, guide, torch.where(reads, x, drawn), samples=50)
    assert len(found.pit) == 400
    assert stats.kstest(found.pit.numpy(), "uniform").pvalue > 1e-3
    assert found.pit_distance == pytest.approx(stats.kstest(found.pit.numpy(), "uniform").statistic, abs=1e-6)
    wrong = calibration(model, guide, torch.where(reads, x, drawn + 1), samples=10)
    assert stats.kstest(wrong.pit.numpy(), "uniform").pvalue < 1e-6


@pytest.mark.parametrize("log_r", [-0.5, 1.0])
def test_a_dispersion_is_recovered_by_its_maximum(log_r, rng):
    r = math.exp(log_r)
    means = rng.uniform(1, 6, (4000, 2))
    x = torch.tensor(rng.poisson(rng.gamma(r, means / r)))
    fitted = fit_dispersion(likelihoods.NegativeBinomial(), x, torch.tensor(means))
    # of 4,000 counts each: the error of log r is below .15
    assert (fitted - log_r).abs().max() < 0.15

    def score(a):
        p = r_of(a) / (r_of(a) + means[:, 0])
        return stats.nbinom(r_of(a), p).logpmf(x[:, 0].numpy()).sum()

    def r_of(a):
        return math.exp(a)

    best = float(fitted[0])
    assert score(best) > max(score(best - 0.02), score(best + 0.02))
    shared = fit_dispersion(likelihoods.NegativeBinomial(), x, torch.tensor(means), shared=True)
    assert shared.shape == () and abs(float(shared) - log_r) < 0.15


def test_rare_neurons_do_not_decide_between_likelihoods(rng):
    """Without a spike in training a dispersion is that of the prior, nearly a Poisson's."""
    over = rng.poisson(rng.gamma(1.0, 2.0, (400, 20)))
    x = torch.tensor(np.concatenate([over, rng.poisson(0.005, (400, 100))], 1)).float()
    scores = compare_likelihoods(x, None, [torch.arange(400) % 5 == k for k in range(5)])
    rare = {name: float(score.nats[:, 20:].sum()) for name, score in scores.items()}
    assert all(abs(nats) < 3 for nats in rare.values())
    assert scores["negative_binomial"].bits > 0.02


def test_means_that_contain_the_trial_would_bias_dispersions(rng):
    """Poissons with five trials of each of 30 conditions: leaving a trial out, no likelihood loses to a Poisson."""
    labels = torch.arange(150) % 30
    x = torch.tensor(rng.poisson(rng.uniform(0.5, 4, (30, 30))[labels])).float()
    scores = compare_likelihoods(x, labels, [torch.arange(150) // 30 == k for k in range(5)])
    assert all(score.bits > -0.004 for score in scores.values())
    loo = leave_one_out_rates(x, labels)
    others = torch.cat([x[:7], x[8:]]).double()
    own = others[torch.cat([labels[:7], labels[8:]]) == labels[7]]
    every = null_rates(x)
    torch.testing.assert_close(loo[7], (own.sum(0) + every) / (len(own) + 1))


def test_exposures_of_what_was_not_observed_do_not_count(rng):
    x, mask = torch.tensor(rng.poisson(1.0, (50, 3))).float(), torch.tensor(rng.random((50, 3)) > 0.3)
    exposure = torch.tensor(rng.uniform(0.5, 2, (50, 3))).float()
    placed = torch.where(mask, exposure, 1e4)
    found = [null_rates(Recording(x, mask=mask, exposure=e)) for e in (exposure, placed)]
    torch.testing.assert_close(*found)
    expected = (torch.where(mask, x, 0).sum(0) + 0.5) / (torch.where(mask, exposure, 0).sum(0) + exposure[mask].mean())
    torch.testing.assert_close(found[0], expected.double(), rtol=1e-5, atol=0)


def test_scores_without_a_spike_are_nan():
    score = Score(torch.tensor([-1.0, -2.0]), torch.zeros(2))
    assert math.isnan(score.bits) and math.isnan(score.over_trials)
    assert math.isnan(nlb_bits(torch.ones(3, 2), torch.zeros(3, 2)))
    assert math.isnan(psth_r2(torch.rand(5, 3), torch.ones(5, 3), torch.zeros(5)))


def test_likelihoods_are_told_apart_on_held_out_trials(rng):
    """Underdispersed counts prefer COM-Poisson, overdispersed ones the negative binomial, Poissons neither."""
    labels = torch.arange(300) % 3
    means = rng.uniform(0.5, 3, (3, 8))[labels]
    folds = [torch.arange(300) % 5 == k for k in range(5)]
    under = torch.tensor(rng.binomial(4, means / 4)).float()
    over = torch.tensor(rng.poisson(rng.gamma(1.0, means))).float()
    poisson = torch.tensor(rng.poisson(means)).float()
    found = [compare_likelihoods(x, labels, folds) for x in (under, over, poisson)]
    assert found[0]["com_poisson"].bits > 5 * found[0]["com_poisson"].over_trials
    assert abs(found[0]["negative_binomial"].bits) < 0.01
    lead = found[1]["negative_binomial"] - found[1]["com_poisson"]
    assert found[1]["negative_binomial"].bits > 5 * found[1]["negative_binomial"].over_trials and lead.bits > 0
    assert all(score.bits < 0.01 for score in found[2].values())
    # a condition's mean has one pseudo-trial at the mean of all
    rates = condition_rates(over, labels, torch.tensor([0]))
    own, every = over[labels == 0].double(), (over.double().sum(0) + 0.5) / 301
    torch.testing.assert_close(rates[0], (own.sum(0) + every) / 101)


def test_a_dispersion_is_not_fitted_to_what_has_no_log_mass(rng):
    """Means out of range are an error; where no count was observed they do not matter."""
    x = torch.as_tensor(rng.poisson(3.0, (100, 2))).float()
    means = torch.full_like(x, 3.0)
    mask = torch.ones_like(x).bool()
    mask[0, 0] = False
    expected = fit_dispersion(likelihoods.ConwayMaxwellPoisson(), x, means, mask=mask)
    for other in (2e6, 0.0, math.nan):
        means[0, 0] = other
        assert torch.equal(fit_dispersion(likelihoods.ConwayMaxwellPoisson(), x, means, mask=mask), expected)
    with pytest.raises(InputError, match="no dispersion fits"):
        fit_dispersion(likelihoods.ConwayMaxwellPoisson(), x, torch.full_like(x, 2e6))


@pytest.mark.parametrize("wrong", [0.0, -1.0, math.inf])
def test_exposures_that_are_none_are_refused(wrong):
    exposure = torch.ones(40)
    exposure[0] = wrong
    data = Recording(torch.ones(40, 2), exposure=exposure)
    for use in (null_rates, lambda d: compare_likelihoods(d, None, [torch.arange(40) % 2 == 1])):
        with pytest.raises(InputError, match="exposures must be positive and finite"):
            use(data)


@pytest.mark.parametrize(
    ("d", "theirs"),
    [
        (dist.Poisson(torch.tensor(2.0)), stats.poisson(2.0)),
        (RelaxedPoisson(torch.tensor(2.0)), stats.poisson(2.0)),
        (NegativeBinomial(torch.tensor(3.0), logits=torch.tensor(0.3)), stats.nbinom(3, 1 / (1 + math.exp(0.3)))),
        (dist.NegativeBinomial(3, logits=torch.tensor(0.3)), stats.nbinom(3, 1 / (1 + math.exp(0.3)))),
        (dist.GammaPoisson(torch.tensor(3.0), torch.tensor(2.0)), stats.nbinom(3, 2 / 3)),
        (dist.Binomial(4, logits=torch.tensor(0.3)), stats.binom(4, 1 / (1 + math.exp(-0.3)))),
        (dist.Geometric(logits=torch.tensor(0.3)), stats.nbinom(1, 1 / (1 + math.exp(-0.3)))),
        (dist.ZeroInflatedPoisson(torch.tensor(2.0), gate=torch.tensor(0.0)), stats.poisson(2.0)),
    ],
    ids=lambda d: type(d).__name__,
)
def test_distribution_functions_are_those_of_the_family(d, theirs):
    x = torch.tensor([-1.0, 0.0, 1.0, 2.0, 4.0])
    np.testing.assert_allclose(_cdf(d.expand([5]), x), theirs.cdf(x.numpy()), rtol=1e-5)


def test_the_distribution_function_of_a_com_poisson():
    d = ConwayMaxwellPoisson(torch.tensor(2.0), torch.tensor(4.0))
    masses = d.log_prob(torch.arange(5.0)).exp()
    np.testing.assert_allclose(_cdf(d.expand([5]), torch.arange(5.0)), masses.cumsum(0), rtol=1e-5)
