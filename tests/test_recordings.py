"""Masks, exposures and covariates in models, guides and their evaluation."""

import itertools
import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI
from pyro.optim import Adam
from scipy import stats
from torch import nn

from pyro_nbvae import likelihoods
from pyro_nbvae.batching import Recording
from pyro_nbvae.encoding import encode, export_programs, predict
from pyro_nbvae.errors import InputError
from pyro_nbvae.guides import ConwayMaxwellPoissonGuide, GaussianGuide, NegativeBinomialGuide, PoissonGuide
from pyro_nbvae.infer import AnalyticKL_ELBO, MonteCarloKL_ELBO
from pyro_nbvae.metrics import held_out, importance_weighted_bound, null_rates
from pyro_nbvae.metrics.gradients import unbiased_gradient
from pyro_nbvae.models import GaussianModel, NegativeBinomialModel, PoissonModel

LIKELIHOODS = {
    "Gaussian": likelihoods.Gaussian,
    "Bernoulli": likelihoods.Bernoulli,
    "Poisson": likelihoods.Poisson,
    "NB": likelihoods.NegativeBinomial,
    "COM-Poisson": likelihoods.ConwayMaxwellPoisson,
    "zero-inflated": lambda: likelihoods.ConwayMaxwellPoisson(zero_inflation="neuron"),
    "decoder": lambda: likelihoods.NegativeBinomial("decoder", zero_inflation="decoder"),
}
PAIRS = [
    (NegativeBinomialModel, ConwayMaxwellPoissonGuide),
    (NegativeBinomialModel, NegativeBinomialGuide),
    (PoissonModel, PoissonGuide),
    (GaussianModel, GaussianGuide),
]


def pair(likelihood, shape=(5,), network="linear", classes=PAIRS[0], latents=3, **options):
    pyro.set_rng_seed(0)
    model = classes[0](shape, latents, decoder=network, likelihood=likelihood, **options)
    return model, classes[1](model, encoder=network)


def loss_and_gradients(model, guide, x, **given):
    """The loss of one seed, and all gradients; in training mode, without a parameter store."""
    elbo = AnalyticKL_ELBO()
    pyro.set_rng_seed(1)
    for part in (model, guide):
        part.zero_grad()
    loss = elbo.loss_and_grads(model, guide, x, **given)
    return loss, [p.grad.clone() for part in (model, guide) for p in part.parameters() if p.grad is not None]


@pytest.mark.parametrize("network", ["mlp", "temporal_bins"])
@pytest.mark.parametrize("name", LIKELIHOODS)
def test_a_mask_of_ones_is_no_mask_bit_for_bit(name, network):
    x = torch.randint(0, 2, (6, 4, 5)).float()
    model, guide = pair(LIKELIHOODS[name](), (4, 5), network, latents=4)
    model.initialize(x)
    guide.initialize(x)
    model.eval()  # without dropout
    guide.eval()
    plain = loss_and_gradients(model, guide, x)
    masked = loss_and_gradients(model, guide, x, mask=torch.ones_like(x, dtype=torch.bool))
    assert plain[0] == masked[0]
    assert all(torch.equal(a, b) for a, b in zip(plain[1], masked[1], strict=True))


@pytest.mark.parametrize("classes", PAIRS[::2], ids=lambda pair: pair[1].__name__)
@pytest.mark.parametrize("name", LIKELIHOODS)
def test_what_was_not_observed_may_be_nan_and_changes_nothing(name, classes):
    x, mask = torch.randint(0, 2, (6, 5)).float(), torch.rand(6, 5) > 0.4
    results = []
    for hidden in (math.nan, 0.0, 1e6):
        model, guide = pair(LIKELIHOODS[name](), classes=classes)
        data = Recording(x.masked_fill(~mask, hidden), mask=mask)
        model.initialize(data)
        guide.initialize(data)
        results.append(loss_and_gradients(model, guide, data.x, **data.given))
    assert math.isfinite(results[0][0]) and all(bool(g.isfinite().all()) for g in results[0][1])
    for loss, gradients in results[1:]:
        assert loss == results[0][0]
        assert all(torch.equal(a, b) for a, b in zip(gradients, results[0][1], strict=True))


def test_the_bound_with_a_mask_is_that_of_the_marginal():
    """log p of the observed counts, by the direct sum over all counts that were not observed, and over the latent."""
    pyro.set_rng_seed(0)
    model = PoissonModel((3,), 1, decoder="linear", likelihood=likelihoods.Poisson(), prior_mean=1.0)
    guide = PoissonGuide(model, encoder="linear")
    x = torch.poisson(torch.full((4, 3), 1.5))
    mask = torch.tensor([[1, 0, 1], [0, 0, 1], [1, 1, 0], [1, 1, 1]]).bool()
    z, hidden = torch.arange(40.0)[:, None], torch.arange(60.0)
    prior = model.prior_distribution().log_prob(z).sum(-1)
    with torch.no_grad():
        observed = model.observation(z).base_dist
    expected = []
    for row, seen in zip(x, mask, strict=True):
        total = prior.clone()
        for neuron in range(3):
            one = dist.Poisson(observed.rate[:, neuron])
            # of what was not observed, the sum over all its counts
            each = one.log_prob(row[neuron]) if seen[neuron] else one.log_prob(hidden[:, None]).logsumexp(0)
            total = total + each
        expected.append(total.logsumexp(0))
    found = importance_weighted_bound(model, guide, Recording(x, mask=mask), 1500)
    torch.testing.assert_close(found, torch.stack(expected).double().detach(), atol=0.03, rtol=0)
    with torch.no_grad():  # and the program's own log mass at a latent
        masked = model.observation(z[:4], mask=mask).log_prob(x)
    by_hand = torch.where(mask, observed.log_prob(x[:, None])[range(4), range(4)], 0.0).sum(1)
    torch.testing.assert_close(masked, by_hand)


def test_an_absent_count_is_not_zero_to_the_encoder():
    _, guide = pair(likelihoods.Poisson())
    x = torch.poisson(torch.full((200, 5), 4.0))
    guide.initialize(x)
    one = x[:1].clone()
    zero, absent = one.clone(), torch.ones(1, 5, dtype=torch.bool)
    zero[0, 2], absent[0, 2] = 0.0, False
    at_mean = torch.tensor(float(x[:, 2].log1p().mean())).expm1()
    means = one.clone()
    means[0, 2] = at_mean
    found = guide.encode(one, mask=absent)[0]
    assert not torch.allclose(found, guide.encode(zero)[0], atol=1e-3)
    torch.testing.assert_close(found, guide.encode(means)[0], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("likelihood", "log_mass"),
    [
        (likelihoods.Poisson(), lambda x, m: stats.poisson(m).logpmf(x)),
        (likelihoods.NegativeBinomial(), lambda x, m: stats.nbinom(1.0, 1 / (1 + m)).logpmf(x)),
        (likelihoods.ConwayMaxwellPoisson(), lambda x, m: stats.poisson(m).logpmf(x)),  # nu is 1 at first
    ],
    ids=["Poisson", "NB", "COM-Poisson"],
)
def test_an_exposure_multiplies_the_mean_and_leaves_the_dispersion(likelihood, log_mass):
    likelihood.setup((5,))
    h, exposure = torch.randn(4, 5), torch.rand(4, 1) + 0.2
    x = torch.arange(20.0).reshape(4, 5) % 4
    found = likelihood(h, exposure=exposure)
    mean = np.log1p(np.exp(h.double().numpy())) * exposure.double().numpy()
    np.testing.assert_allclose(found.mean.detach().numpy(), mean, rtol=1e-5)
    np.testing.assert_allclose(found.log_prob(x).detach().numpy(), log_mass(x.numpy(), mean), rtol=1e-4, atol=1e-5)


def test_exposures_enter_the_start_the_encoder_and_the_null():
    """Ten times the exposure and ten times the counts: the same rates, the same null, and nearly the same latents."""
    base = torch.poisson(torch.full((400, 5), 3.0))
    short, long = Recording(base, exposure=torch.ones(400)), Recording(10 * base, exposure=torch.full((400,), 10.0))
    torch.testing.assert_close(null_rates(short), null_rates(long), atol=0.01, rtol=0)
    encoded = []
    for data in (short, long):
        model, guide = pair(likelihoods.Poisson())
        model.initialize(data)
        guide.initialize(data)
        rates = model.observation(model.prior.mean[None]).mean
        torch.testing.assert_close(rates.detach().flatten(), base.mean(0), atol=2.0, rtol=0.8)
        encoded.append(guide.encode(base[:5], exposure=torch.ones(5, 1))[0] if data is short else None)
        mixed = guide.encode(data.x[:5], exposure=data.exposure[:5])[0]
        # half the bin, half the spikes: the encoder reads the same rate
        half = guide.encode(data.x[:5] / 2, exposure=data.exposure[:5] / 2)[0]
        torch.testing.assert_close(mixed, half)
    with pytest.raises(InputError, match="takes no exposure: use a likelihood of counts"):
        pair(likelihoods.Bernoulli())[0].observation(torch.ones(2, 3), exposure=torch.ones(2, 1))


@pytest.mark.parametrize("network", ["linear", "temporal", "temporal_bins"])
def test_model_and_guide_are_conditional_on_covariates(network):
    """A stimulus that explains all: with it the latents are not needed, and generation follows it."""
    labels = torch.arange(300) % 3
    c = nn.functional.one_hot(labels).float()
    rates = torch.tensor([[1.0, 6.0, 1.0], [6.0, 1.0, 1.0], [1.0, 1.0, 6.0]])
    x = torch.poisson(rates[labels])
    shape = (3,)
    if network.startswith("temporal"):
        x, shape = x[:, None].repeat(1, 2, 1), (2, 3)
    model, guide = pair(likelihoods.Poisson(), shape, network, latents=2, covariates=3)
    data = Recording(x, covariates=c)
    model.initialize(data)
    guide.initialize(data)
    svi = SVI(model, guide, Adam({"lr": 0.02}), AnalyticKL_ELBO())
    for _ in range(80):
        batch = data[torch.randint(300, (40,))]
        svi.step(batch.x, **batch.given)
    model.eval()
    _, mean = model.generate(500, covariates=torch.tensor([[0.0, 1.0, 0.0]]))
    found = mean.mean(0).reshape(-1, 3).mean(0)
    assert found[0] > 1.5 + found[1:].max()  # of rates of 6 and 1
    with pytest.raises(InputError, match=r"the model has 3 covariates, got 0: pass covariates="):
        model.generate(2)
    with pytest.raises(InputError, match=r"needs covariates \(batch, 3\)"):
        guide.posterior(x)
    with pytest.raises(InputError, match="leave covariates out"):
        pair(likelihoods.Poisson())[0].generate(2, covariates=torch.ones(2, 3))


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("elbo", [AnalyticKL_ELBO, MonteCarloKL_ELBO, pyro.infer.Trace_ELBO])
def test_svi_trains_with_all_that_is_given(elbo):
    x = torch.poisson(torch.full((80, 5), 2.0))
    given = {
        "mask": torch.rand(80, 5) > 0.2,
        "exposure": torch.rand(80, 1) + 0.5,
        "covariates": nn.functional.one_hot(torch.arange(80) % 2).float(),
    }
    likelihood = likelihoods.ConwayMaxwellPoisson("condition", zero_inflation="shared")
    model, guide = pair(likelihood, covariates=2, data_size=80)
    svi = SVI(model, guide, Adam({"lr": 0.01}), elbo())
    losses = [svi.step(x.masked_fill(~given["mask"], math.nan), **given) for _ in range(60)]
    assert np.mean(losses[-10:]) < np.mean(losses[:10])
    assert likelihood.dispersion.value.shape == (2, 5) and likelihood.gate.value.shape == ()
    found = held_out(model, guide, Recording(x, **given))
    assert math.isfinite(found.elbo)


def test_the_prior_of_dispersions_counts_once_for_all_data():
    """The gradient of the log prior in a pass over the data is that of one prior, whatever the batches."""
    x = torch.poisson(torch.full((60, 5), 2.0))

    def gradient(size, **options):
        likelihood = likelihoods.ConwayMaxwellPoisson()
        model, guide = pair(likelihood, **options)
        model.initialize(x)
        guide.initialize(x)
        likelihood.dispersion.value.data.fill_(0.7)
        with_prior, without = 0.0, 0.0
        for batch in x.split(size):
            trace = pyro.poutine.trace(model).get_trace(batch)
            trace.compute_log_prob()
            with_prior += trace.nodes["likelihood_prior"]["log_prob_sum"].item()
            without += 1
        return with_prior, without

    expected = -0.5 * 5 * 0.7**2
    for size in (60, 20, 7):
        assert gradient(size)[0] == pytest.approx(expected, rel=1e-5)
    # as in Pyro: a batch that stands for all data has the whole prior
    total, batches = gradient(20, data_size=60)
    assert total == pytest.approx(batches * expected, rel=1e-5)


@pytest.mark.parametrize("by", ["shared", "neuron", "condition", "decoder"])
@pytest.mark.parametrize("kind", [likelihoods.NegativeBinomial, likelihoods.ConwayMaxwellPoisson])
def test_dispersions_and_zero_inflation_vary_as_they_should(kind, by):
    """The mean is that of the mixture; masses sum to 1; each choice has as many parameters as it says."""
    likelihood = kind(by, zero_inflation=by)
    model, _ = pair(likelihood, (2, 5), "temporal", covariates=3)
    sizes = {"shared": 1, "neuron": 5, "condition": 15, "decoder": 0}
    assert sum(p.numel() for p in likelihood.parameters()) == 2 * sizes[by]
    model.eval()  # without dropout
    for p in likelihood.parameters():
        p.data.normal_()
    c = nn.functional.one_hot(torch.arange(4) % 3, 3).float()
    with torch.no_grad():
        z = model.prior_distribution().sample((4,))
        observed = model.observation(z, covariates=c).base_dist
        k = torch.arange(300.0).reshape(-1, 1, 1, 1)
        mass = observed.log_prob(k.expand(-1, 4, 2, 5)).exp()
        torch.testing.assert_close(mass.sum(0), torch.ones(4, 2, 5), atol=1e-4, rtol=0)
        torch.testing.assert_close((k * mass).sum(0), observed.mean, atol=1e-3, rtol=1e-3)
        h = model.decode(z, c)[..., :5]
        torch.testing.assert_close(observed.mean, nn.functional.softplus(h), atol=1e-5, rtol=1e-4)
    if by == "condition":
        with pytest.raises(InputError, match="needs a model with covariates"):
            pair(kind("condition"))


def test_parts_of_a_recording_go_together():
    x = torch.arange(24.0).reshape(4, 2, 3)
    mask, exposure, c = x > 3, torch.tensor([1.0, 2, 3, 4]), torch.eye(4)
    data = Recording(x, mask, exposure, c)
    chosen = torch.tensor([3, 1])
    for part in (data[chosen], Recording.cat([data[3:], data[1:2]])):
        assert torch.equal(part.x, x[chosen]) and torch.equal(part.mask, mask[chosen])
        assert part.exposure.flatten().tolist() == [4, 2] and torch.equal(part.covariates, c[chosen])
    assert [len(part) for part in data.split(3)] == [3, 1] and data.number.tolist() == [2, 6, 6, 6]
    for wrong, message in (
        ({"mask": torch.ones(4, 2, 3)}, "mask must be bool"),
        ({"mask": torch.ones(3, 2, 3).bool()}, r"mask has shape \(3, 2, 3\): it must broadcast"),
        ({"exposure": torch.ones(3)}, r"exposure has shape \(3, 1, 1\)"),
        ({"covariates": torch.ones(3, 2)}, r"covariates have shape \(3, 2\): expected \(4"),
    ):
        with pytest.raises(InputError, match=message):
            Recording(x, **wrong)
    for parts in ([data, Recording(x)], [Recording(x), data]):
        with pytest.raises(InputError, match="some of the recordings have mask: give it to all, or to none"):
            Recording.cat(parts)
    with pytest.raises(InputError, match=r"x must be a tensor, got ndarray: torch.as_tensor\(x\)"):
        Recording(x.numpy())
    with pytest.raises(TypeError, match="likelihood must be callable, such as"):
        PoissonModel((5,), 3, decoder="linear", likelihood="poisson")
    model, _ = pair(likelihoods.Poisson(), (2, 3))
    torch.manual_seed(0)
    _, whole = model.generate(4)
    torch.manual_seed(0)
    torch.testing.assert_close(model.generate(4, exposure=0.1)[1], 0.1 * whole)
    with pytest.raises(InputError, match="exposures must be positive and finite, got -1 to 4"):
        model.check_support(Recording(x, exposure=torch.tensor([1.0, -1, 3, 4])))
    unlike = torch.tensor([[[-3.0, math.nan, -8], [-2, -5, 9]]])  # the range in the message is of what was observed
    with pytest.raises(InputError, match=r"lie in \[-5, -2\] and not in the support of Poisson"):
        model.check_support(Recording(unlike, mask=torch.tensor([[[True, False, False], [True, True, False]]])))


def test_encodings_and_predictions_are_of_the_posterior():
    """Means and variances are the guide's; an interval has its probability; what was hidden is filled."""
    x = torch.poisson(torch.full((300, 5), 3.0))
    model, guide = pair(likelihoods.Poisson())
    model.initialize(x)
    guide.initialize(x)
    latents = encode(model, guide, x)
    with torch.no_grad():
        q = guide.posterior(x)
    torch.testing.assert_close(latents.mean, q.mean)
    torch.testing.assert_close(latents.variance, q.variance)
    assert torch.equal(latents.sample, latents.sample.round()) and latents.information.shape == (3,)
    mask = torch.rand(300, 5) > 0.3
    data = Recording(x.masked_fill(~mask, math.nan), mask=mask)
    found = predict(model, guide, data, samples=200, level=0.8)
    drawn = model.observation(guide.posterior(x, mask=mask).sample()).sample()
    inside = ((drawn >= found.low) & (drawn <= found.high)).double().mean()
    assert 0.8 <= inside < 0.95  # counts: a bound has mass of its own
    filled = found.filled(data)
    assert torch.equal(filled[mask], x[mask]) and torch.equal(filled[~mask], found.mean[~mask])


@pytest.mark.parametrize("classes", PAIRS, ids=lambda pair: pair[1].__name__)
def test_programs_give_equal_numbers(classes):
    model, guide = pair(LIKELIHOODS["decoder"](), (4, 5), "temporal", classes, covariates=2)
    x, mask, c = torch.poisson(torch.ones(7, 4, 5)), torch.rand(7, 4, 5) > 0.3, torch.rand(7, 2)
    guide.initialize(Recording(x, mask=mask, covariates=c))
    programs = export_programs(model, guide, ("mask", "covariates"))
    found = programs["encoder"].module()(x, mask, c)
    model.eval()
    guide.eval()
    with torch.no_grad(), guide.exact():
        q = guide.posterior(x, mask=mask, covariates=c)
        z = q.sample()
        mean = model.observation(z, covariates=c).mean
    for parameter, value in found.items():
        torch.testing.assert_close(value, getattr(q, parameter))
    torch.testing.assert_close(programs["decoder"].module()(z, c), mean)


def test_programs_of_observations_alone():
    model, guide = pair(likelihoods.Poisson())
    x = torch.poisson(torch.ones(7, 5))
    programs = export_programs(model, guide)
    with torch.no_grad(), guide.exact():
        q = guide.posterior(x)
        torch.testing.assert_close(programs["encoder"].module()(x)["rate"], q.rate)
        mean = model.observation(q.mean).mean
    torch.testing.assert_close(programs["decoder"].module()(q.mean), mean)


def test_what_a_program_is_given_is_checked_in_one_line():
    x = torch.poisson(torch.full((20, 5), 2.0))
    model, guide = pair(likelihoods.Poisson(), covariates=4)
    svi = SVI(model, guide, Adam({"lr": 0.01}), AnalyticKL_ELBO())
    with pytest.raises(InputError, match=r"the guide needs covariates \(batch, 4\)"):
        svi.step(x, covariates=torch.ones(20, 3))
    with pytest.raises(InputError, match="covariates have 3 rows: expected 10, or one for all"):
        model.generate(10, covariates=torch.ones(3, 4))
    hidden = x.masked_fill(torch.rand(20, 5) < 0.2, math.nan)
    with pytest.raises(InputError, match="NaN or infinite values: give mask="), pyro.validation_enabled():
        model(hidden, covariates=torch.ones(20, 4))
    with pytest.raises(InputError, match="mask must be a tensor, got ndarray"):
        Recording(x, mask=np.ones((20, 5), bool))
    whole = Recording(x, mask=torch.arange(20) < 15, exposure=0.1)
    assert whole.mask.shape == (20, 1) and whole.exposure.shape == (20, 1) and int(whole.number.sum()) == 75


def test_a_guide_that_reads_some_neurons_does_not_depend_on_the_others():
    reads = torch.tensor([True, False, True, True, False])
    pyro.set_rng_seed(0)
    model = PoissonModel((5,), 3, decoder="linear", likelihood=likelihoods.Poisson())
    guide = PoissonGuide(model, encoder="linear", reads=reads)
    x = torch.poisson(torch.full((50, 5), 2.0))
    guide.initialize(x)
    other = torch.where(reads, x, x + 7)
    torch.testing.assert_close(guide.posterior(x).rate, guide.posterior(other).rate)
    assert not torch.equal(guide.posterior(x).rate, guide.posterior(x + 1).rate)
    with pytest.raises(InputError, match=r"reads must be bool of shape \(5,\)"):
        PoissonGuide(model, encoder="linear", reads=torch.ones(4))


def test_evaluations_take_recordings_in_any_batches():
    x, mask = torch.poisson(torch.full((30, 5), 2.0)), torch.rand(30, 5) > 0.3
    model, guide = pair(likelihoods.NegativeBinomial())
    data = Recording(x, mask=mask)
    whole = held_out(model, guide, data)
    batched = held_out(model, guide, list(itertools.chain(data.split(7))))
    assert whole.elbo == batched.elbo and whole.mse == batched.mse
    hidden = Recording(x.masked_fill(~mask, 1e3), mask=mask)
    assert held_out(model, guide, hidden).mse == whole.mse


@pytest.mark.parametrize("shape", [(5,), (5, 5), (1, 5, 5)])
def test_one_mask_for_each_observation_in_every_call(shape):
    """(N,) is of observations, also where N is the number of neurons, or the width of an image."""
    model, guide = pair(likelihoods.Poisson(), shape)
    x, flat = torch.poisson(torch.full((5, *shape), 3.0)), torch.tensor([False, True, True, True, True])
    full = flat.reshape(-1, *(1 for _ in shape)).expand(x.shape)
    for part in (model, guide):
        part.initialize(Recording(x))
        part.eval()
    found = [loss_and_gradients(model, guide, x, mask=mask)[0] for mask in (flat, full)]
    assert found[0] == found[1]
    log_prob = model.observation(torch.ones(5, 3), mask=flat).log_prob(x)
    assert log_prob[0] == 0 and (log_prob[1:] < 0).all()


@pytest.mark.parametrize("kind", [likelihoods.NegativeBinomial, likelihoods.ConwayMaxwellPoisson])
def test_dispersions_begin_at_the_same_in_any_unit_of_the_exposure(kind):
    pyro.set_rng_seed(0)
    x = torch.poisson(0.5 * torch.distributions.Gamma(2.0, 2.0).sample((200, 3)))
    found = []
    for unit in (1.0, 1e4):
        model, _ = pair(kind(), (3,))
        model.initialize(Recording(x, exposure=torch.full((200,), unit)))
        found.append(model.likelihood.dispersions())
    torch.testing.assert_close(found[1], found[0], rtol=1e-3, atol=0)


@pytest.mark.parametrize(("shape", "exposure"), [((1, 8, 8), 0.5), ((1, 8, 8), 4.0), ((6,), 100.0)])
def test_gaussian_means_begin_at_those_of_the_data_with_an_exposure(shape, exposure):
    """x = e h: at a = 0 the mean of each element; an image can reach its largest value."""
    torch.manual_seed(0)
    x = torch.rand(200, *shape) * 0.5 + 0.5
    model = GaussianModel(shape, 2, decoder="linear", likelihood=likelihoods.Gaussian(0.1))
    model.initialize(Recording(x, exposure=torch.full((200,), exposure)))
    output = model.decoder.output
    torch.testing.assert_close(exposure * output(torch.zeros(1, *shape))[0], x.mean(0), rtol=1e-3, atol=1e-4)
    step = (output(torch.ones(1, *shape)) - output(torch.zeros(1, *shape)))[0] * exposure
    if len(shape) == 3:
        assert float((exposure * output(torch.full((1, *shape), 50.0))).min()) >= x.max() - 1e-3
        model.check_support(Recording(x, exposure=torch.full((200,), exposure)))
    else:
        torch.testing.assert_close(step, x.std(0), rtol=0.02, atol=0)


def test_one_exposure_for_each_observation_in_every_call():
    """(N,) is of observations also where no observation is given."""
    model, _ = pair(likelihoods.Poisson(), (4,))
    exposure = torch.tensor([1.0, 10.0, 100.0, 1000.0])
    for flat in (exposure, exposure[:, None]):
        z, mean = model.generate(4, exposure=flat)
        torch.testing.assert_close(mean, exposure[:, None] * model.observation(z).mean)


def test_the_log_likelihood_of_an_estimator_is_without_the_prior_of_dispersions():
    x = torch.poisson(torch.full((20, 5), 2.0))
    model, guide = pair(likelihoods.ConwayMaxwellPoisson())
    model.initialize(x)
    guide.initialize(x)
    elbo, terms = AnalyticKL_ELBO(), []
    for a in (0.0, 3.0):
        model.likelihood.dispersion.value.data.fill_(a)
        pyro.set_rng_seed(0)
        loss = elbo.loss(model, guide, x)
        with torch.no_grad():
            pyro.set_rng_seed(0)
            expected = model.observation(guide(x)).log_prob(x).sum()
        terms.append((loss, float(elbo.terms[0]), float(elbo.terms[1])))
        assert terms[-1][1] == pytest.approx(float(expected), rel=1e-5)
    assert terms[1][0] == pytest.approx(terms[1][2] - terms[1][1] + 0.5 * 5 * 9, rel=1e-5)


def test_gradient_errors_ignore_what_was_not_observed():
    x, mask = torch.poisson(torch.full((8, 5), 2.0)), torch.rand(8, 5) > 0.3
    model, guide = pair(likelihoods.Poisson())
    guide.initialize(x)
    found = []
    for hidden in (math.nan, 7.0):
        data = Recording(x.masked_fill(~mask, hidden), mask=mask)
        pyro.set_rng_seed(0)
        found.append(unbiased_gradient(model, guide, data))
    torch.testing.assert_close(*found)
    assert bool(found[0].isfinite().all())


@pytest.mark.parametrize("kind", [likelihoods.NegativeBinomial, likelihoods.ConwayMaxwellPoisson])
@pytest.mark.parametrize("by", ["shared", "neuron"])
def test_dispersions_begin_at_those_of_the_data(kind, by):
    """Underdispersed and overdispersed neurons are apart from the first step, whatever is missing."""
    pyro.set_rng_seed(0)
    under = torch.distributions.Binomial(4, torch.full((600, 3), 0.5)).sample()
    over = torch.poisson(torch.distributions.Gamma(torch.ones(600, 3), torch.ones(())).sample() * 2)
    x, mask = torch.cat([under, over], 1), torch.rand(600, 6) > 0.2
    model, _ = pair(kind(by), (6,))
    model.initialize(Recording(x.masked_fill(~mask, math.nan), mask=mask))
    found = model.likelihood.dispersions()
    if by == "shared":
        assert found.shape == ()
        return
    assert (found[:3].min() > found[3:].max()) and model.likelihood.observations == 600
    expected = likelihoods.fit_dispersion(kind(), x, x.mean(0).expand(x.shape), mask=mask)
    value = model.likelihood.dispersion.value
    assert (value - expected).abs().max() < 0.25  # means of all counts, and of those observed
