"""The Conway-Maxwell-Poisson and every family that states its weights, against sums of their own."""

import itertools
import math

import mpmath
import numpy as np
import pytest
import scipy.special
import scipy.stats
import torch
from pyro.distributions import constraints
from torch.distributions import kl_divergence

from pyro_nbvae.distributions import (
    ConwayMaxwellPoisson,
    CountDistribution,
    Integer,
    NegativeBinomial,
    RelaxedNegativeBinomial,
    RelaxedPoisson,
    kernels,
    windows,
)
from pyro_nbvae.distributions.kernels import cpu, reference
from pyro_nbvae.distributions.relaxations import DivergedError

TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-4}
MEANS = (1e-3, 0.05, 0.7, 3.0, 40.0, 1e3)
NUS = tuple(math.exp(x) for x in (-3, -1, 0, 1.5, 3, 5))


class Binomial(CountDistribution):
    arg_constraints = {"total_count": constraints.nonnegative_integer, "logits": constraints.real}
    support = constraints.nonnegative_integer
    log_weight = staticmethod(lambda k, n, logits: k * logits - torch.lgamma(k + 1) - torch.lgamma(n - k + 1))
    scores = staticmethod(lambda k, n, logits: (None, k))
    window = staticmethod(lambda nats, n, logits: (torch.zeros_like(n), n))


def rate_of(mean, nu):
    """A rate whose mean is about that."""
    return mean if mean >= 1 else mean ** (1 / nu)


def masses(rate, nu):
    """Counts and log masses by direct summation in double precision, about the mode."""
    reach = int(rate + 60 * math.sqrt(rate / nu) + 100 / nu + 60)
    k = np.arange(reach + 1.0)
    mode = math.floor(rate)
    log_w = nu * ((k - mode) * math.log(rate) - (scipy.special.gammaln(k + 1) - scipy.special.gammaln(mode + 1)))
    return k, log_w - scipy.special.logsumexp(log_w)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("nu", NUS, ids=lambda nu: f"nu {nu:.3g}")
@pytest.mark.parametrize("mean", MEANS)
def test_accuracy(mean, nu, dtype):
    rate = rate_of(mean, nu)
    if torch.tensor(rate, dtype=dtype) < torch.finfo(dtype).tiny:
        pytest.skip("the rate is below the smallest number")
    d = ConwayMaxwellPoisson(torch.tensor(rate, dtype=dtype), torch.tensor(nu, dtype=dtype))
    k, log_q = masses(float(d.rate), float(d.nu))
    q = np.exp(log_q)
    m = float((q * k).sum())
    likely = log_q > -30
    at = torch.tensor(k[likely], dtype=dtype)
    p = NegativeBinomial(torch.tensor(1.7, dtype=dtype), logits=torch.tensor(math.log(max(m, 0.1)), dtype=dtype))
    log_p = scipy.stats.nbinom.logpmf(k, float(p.total_count), float(torch.sigmoid(-p.logits.double())))
    expected = {
        "mean": (d.mean, m),
        "variance": (d.variance, (q * (k - m) ** 2).sum()),
        "entropy": (d.entropy(), -(q * log_q).sum()),
        "log_prob": (d.log_prob(at), log_q[likely]),
        "cdf": (d.cdf(torch.tensor(math.floor(m) + 1.0, dtype=dtype)), q[: math.floor(m) + 2].sum()),
        "kl": (kl_divergence(d, p), (q * (log_q - log_p)).sum()),
    }
    for name, (ours, theirs) in expected.items():
        theirs = np.asarray(theirs)
        error = np.abs(ours.double().numpy() - theirs) / np.maximum(1, np.abs(theirs))
        assert error.max() < TOLERANCE[dtype], (name, error.max())


def test_normalizer_against_mpmath():
    """Where the counts are few and nu is no integer: sum (mu^k / k!)^nu e^(-mu nu) to 30 digits."""
    mpmath.mp.dps = 30
    for rate, nu in ((0.3, 0.7), (2.5, 1.9), (6.0, 0.2)):
        series = mpmath.nsum(lambda k, a=rate, b=nu: (mpmath.mpf(a) ** k / mpmath.factorial(k)) ** b, [0, mpmath.inf])
        d = ConwayMaxwellPoisson(torch.tensor(rate, dtype=torch.float64), torch.tensor(nu, dtype=torch.float64))
        expected = float(-mpmath.log(series))
        assert abs(float(d.log_prob(torch.tensor(0.0).double())) - expected) < 1e-12


def test_narrow_counts_in_single_precision():
    """Of large nu: two large numbers of nearly the same size make the log mass, which is at most 0 all the same."""
    rng = np.random.default_rng(5)
    rate = torch.tensor(np.exp(rng.uniform(-8, 4, 2000)), dtype=torch.float32)
    nu = torch.tensor(np.exp(rng.uniform(3, 5, 2000)), dtype=torch.float32)
    k = torch.stack([rate.floor(), rate.floor() + 1])
    single, double = ConwayMaxwellPoisson(rate, nu), ConwayMaxwellPoisson(rate.double(), nu.double())
    ours, true = single.log_prob(k), double.log_prob(k.double())
    assert ours.dtype == torch.float32 and (ours <= 1e-12).all()
    assert ((ours - true).abs() <= 1e-6 * true.abs().clamp(min=1)).all()


def test_the_smallest_rate_has_moments():
    single, double = (
        ConwayMaxwellPoisson(torch.tensor(1.2e-37, dtype=t), 1e-3) for t in (torch.float32, torch.float64)
    )
    for name in ("mean", "variance"):
        assert float(getattr(single, name)) == pytest.approx(float(getattr(double, name)), rel=1e-4)


def test_it_is_the_poisson_at_one():
    rate = torch.tensor([0.01, 0.7, 5.0, 300.0]).double()
    one, poisson = ConwayMaxwellPoisson(rate, 1.0), torch.distributions.Poisson(rate)
    k = torch.arange(400.0).double()[:, None]
    torch.testing.assert_close(one.log_prob(k), poisson.log_prob(k), rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(one.mean, rate)
    torch.testing.assert_close(one.variance, rate)


def test_a_binomial_in_five_lines():
    n, logits = torch.tensor([1.0, 5.0, 30.0, 30.0]).double(), torch.tensor([0.3, -1.0, 0.0, 4.0]).double()
    d = Binomial(n, logits)
    theirs = scipy.stats.binom(n.numpy(), torch.sigmoid(logits).numpy())
    k = torch.arange(2.0).double()[:, None]
    np.testing.assert_allclose(d.mean, theirs.mean(), rtol=1e-10)
    np.testing.assert_allclose(d.variance, theirs.var(), rtol=1e-10)
    np.testing.assert_allclose(d.entropy(), theirs.entropy(), rtol=1e-10)
    np.testing.assert_allclose(d.cdf(k), theirs.cdf(k.numpy()), rtol=1e-10, atol=1e-30)
    np.testing.assert_allclose(d.log_prob(k), theirs.logpmf(k.numpy()), rtol=1e-10)
    assert (
        kl_divergence(RelaxedPoisson(torch.ones(2).double()), Binomial(n[:2], logits[:2])).isinf().all()
    )  # mass beyond n


def families():
    """One of each kind, with overlapping counts."""
    a = torch.tensor([0.3, 2.0, 9.0]).double()
    return {
        "poisson": RelaxedPoisson(a),
        "torch's poisson": torch.distributions.Poisson(a + 0.5),
        "nb": NegativeBinomial(torch.tensor(1.5).double(), logits=(a / 2).log()),
        "torch's nb": torch.distributions.NegativeBinomial(torch.tensor(4.0).double(), logits=(a / 5).log()),
        "relaxed nb": RelaxedNegativeBinomial(torch.tensor(2.5).double(), logits=(a / 3).log()),
        "com-poisson": ConwayMaxwellPoisson(a, torch.tensor([0.4, 3.0, 1.2]).double()),
        "binomial": Binomial(torch.tensor([4.0, 9.0, 30.0]).double(), a.log() - 1),
    }


@pytest.mark.parametrize(("q", "p"), list(itertools.product(families(), families())))
def test_every_pair_has_its_kl(q, p):
    """Against the sum of q (log q - log p); infinite where p lacks counts that q has."""
    q, p = families()[q], families()[p]
    k = torch.arange(400.0).double()[:, None]
    for d in (q, p):
        d._validate_args = False
    log_q, log_p = q.log_prob(k), p.log_prob(k)
    terms = torch.where(log_q < -600, 0, log_q.exp() * (log_q - log_p))
    expected = terms.sum(0)
    torch.testing.assert_close(kl_divergence(q, p), expected, rtol=1e-8, atol=1e-9)


class Pairs(CountDistribution):
    """A Poisson whose even counts are more likely than the odd ones: its log weight is no smooth function."""

    arg_constraints = {"rate": constraints.positive}
    log_weight = staticmethod(lambda k, rate: k * rate.log() - torch.lgamma(k + 1) + torch.cos(math.pi * k))
    scores = staticmethod(lambda k, rate: (k / rate,))
    window = staticmethod(lambda nats, rate: ConwayMaxwellPoisson.window(nats + 2, rate, torch.ones_like(rate)))


@pytest.mark.parametrize("rate", [5.0, 20.0, 100.0, 900.0])
@pytest.mark.parametrize("nu", [0.3, 1.0, 8.0])
def test_kl_to_a_family_whose_masses_are_not_smooth(rate, nu):
    """All counts of the window are read for it."""
    k, log_q = masses(rate, nu)
    log_w = k * math.log(rate) - scipy.special.gammaln(k + 1) + np.cos(math.pi * k)
    exact = float((np.exp(log_q) * (log_q - log_w + scipy.special.logsumexp(log_w))).sum())
    for rows in (1, 64):  # a table for a few, a loop for many
        q = ConwayMaxwellPoisson(*(torch.full((rows,), v, dtype=torch.float64) for v in (rate, nu)))
        kl = kl_divergence(q, Pairs(torch.tensor(rate, dtype=torch.float64)))
        assert float(kl[-1]) == pytest.approx(exact, rel=1e-8)


@pytest.mark.parametrize("p", ["nb", "poisson", "com-poisson"])
def test_kl_derivatives(p):
    """Once and twice, in q's and in p's parameters, against finite differences."""

    def kl(rate, nu, a, b):
        prior = {
            "nb": lambda: NegativeBinomial(a, logits=b),
            "poisson": lambda: RelaxedPoisson(a),
            "com-poisson": lambda: ConwayMaxwellPoisson(a, b.exp()),
        }[p]()
        return kl_divergence(ConwayMaxwellPoisson(rate, nu), prior)

    points = [torch.tensor(x).double() for x in ([0.4, 6.0], [2.5, 0.6], [1.3, 2.0], [0.2, -0.5])]
    points = [x.requires_grad_() for x in points]
    assert torch.autograd.gradcheck(kl, points)
    assert torch.autograd.gradgradcheck(kl, points)


def test_derivatives_of_moments():
    def all_of(rate, nu):
        d = ConwayMaxwellPoisson(rate, nu)
        return (
            d.mean,
            d.variance,
            d.entropy(),
            d.cdf(torch.tensor(2.0).double()),
            d.log_prob(torch.tensor(3.0).double()),
        )

    points = [torch.tensor(x).double().requires_grad_() for x in ([0.4, 6.0, 2.0], [2.5, 0.6, 1.0])]
    assert torch.autograd.gradcheck(all_of, points)
    assert torch.autograd.gradgradcheck(all_of, points)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-4)], ids=str)
@pytest.mark.parametrize("rate", [30.0, 200.0, 900.0, 6000.0])
@pytest.mark.parametrize("nu", [math.exp(-3), 0.3, 1.0, 8.0])
def test_wide_windows_of_smooth_masses(nu, rate, dtype, tolerance):
    """A sum over every h-th count: the KL and its derivatives in log rate and log nu against sums over all counts."""
    leaves = [torch.full((1024,), math.log(v), dtype=dtype, requires_grad=True) for v in (rate, nu)]
    nu = leaves[1].exp()[0].item()  # with its rounding, to which the derivatives of wide sums are sensitive
    k, log_q = (torch.from_numpy(v) for v in masses(leaves[0].exp()[0].item(), nu))
    log_p = torch.distributions.NegativeBinomial(3.0, logits=torch.tensor(2.0).double()).log_prob(k)
    q, ratio = log_q.exp(), log_q - log_p
    kl = (q * ratio).sum()
    by_rate, by_nu = nu * (k - (q * k).sum()), log_q - (q * log_q).sum()
    exact = [kl, (q * by_rate * ratio).sum(), (q * by_nu * ratio).sum()]
    prior = NegativeBinomial(torch.tensor(3.0, dtype=dtype), logits=torch.tensor(2.0, dtype=dtype))
    found = kl_divergence(ConwayMaxwellPoisson(*(x.exp() for x in leaves)), prior.expand((1024,)))
    gradients = torch.autograd.grad(found.sum(), leaves)
    for ours, theirs in zip((found, *gradients), exact, strict=True):
        assert ours[5].item() == pytest.approx(theirs.item(), rel=tolerance, abs=tolerance)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("p", ["nb", "poisson"])
def test_the_compiled_loop_is_the_sum(p, dtype):
    """A batch over one prior, which the compiled loop takes, against the same elements without their batch."""
    generator = torch.Generator().manual_seed(0)
    log_rate, log_nu = (torch.randn(300, 4, generator=generator, dtype=dtype) for _ in range(2))
    a = torch.linspace(0.5, 3.0, 4, dtype=dtype)

    def gradients(rows):
        leaves = [x.clone().requires_grad_() for x in (log_rate[rows], log_nu[rows], a)]
        prior = NegativeBinomial(leaves[2], logits=leaves[2] / 5) if p == "nb" else RelaxedPoisson(leaves[2])
        q = ConwayMaxwellPoisson((2 * leaves[0]).exp(), leaves[1].exp())
        kl = kl_divergence(q, prior.expand(q.batch_shape))
        return kl, torch.autograd.grad(kl.sum(), leaves)

    kl, whole = gradients(slice(None))
    rows = [gradients(slice(i, i + 1)) for i in range(0, 300, 13)]
    for i, (one, parts) in zip(range(0, 300, 13), rows, strict=True):
        torch.testing.assert_close(kl[i : i + 1], one, rtol=1e-5, atol=2e-6)
        for both, single in zip(whole[:2], parts[:2], strict=True):
            torch.testing.assert_close(both[i : i + 1], single, rtol=1e-4, atol=2e-5)
    everything = [gradients(slice(i, i + 1))[1][2] for i in range(300)]
    torch.testing.assert_close(whole[2], torch.stack(everything).sum(0), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("nu", [0.2, 1.0, 6.0])
@pytest.mark.parametrize("rate", [0.4, 5.0, 60.0])
def test_samples_fit_the_masses(rate, nu):
    d = ConwayMaxwellPoisson(rate, torch.tensor(nu), relaxation=Integer())
    k, log_q = masses(float(d.rate), float(d.nu))
    z = d.rsample(torch.Size([100_000])).numpy()
    edges = [0, *np.flatnonzero(np.diff(np.floor(np.exp(log_q).cumsum() * 20))) + 1, len(k)]
    observed = np.histogram(z, bins=np.array(edges) - 0.5)[0]
    expected = np.add.reduceat(np.exp(log_q), edges[:-1]) * len(z)
    kept = expected > 5
    statistic = ((observed - expected) ** 2 / expected)[kept].sum()
    assert scipy.stats.chi2.sf(statistic, max(1, kept.sum() - 1)) > 1e-4


def test_the_compiled_draw_is_the_general_one():
    """On the same uniforms, where none falls on a boundary of two counts."""
    generator = torch.Generator().manual_seed(0)
    rate, nu = (torch.randn(5_000, generator=generator, dtype=torch.float64).exp() for _ in range(2))
    uniform = torch.rand(5_000, generator=generator, dtype=torch.float64)
    ours, theirs = (place.com_poisson_integers(rate, nu, uniform) for place in (cpu, reference))
    torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("nu", [0.3, 1.0, 8.0])
@pytest.mark.parametrize("mean", [600.0, 5e3, 1e5])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_the_draw_by_blocks_is_the_one_count_by_count(mean, nu, dtype):
    """On the same uniforms: where counts are many, only those of one block are summed one by one."""
    generator = torch.Generator().manual_seed(0)
    u = torch.linspace(1e-5, 1 - 1e-5, 400, dtype=dtype)
    rate = (mean * (1 + torch.rand(400, generator=generator))).to(dtype)
    ours = cpu.com_poisson_integers(rate, torch.full_like(rate, nu), u)
    theirs = reference.com_poisson_integers(*(x.double() for x in (rate, torch.full_like(rate, nu), u)))
    assert torch.equal(ours[0].double(), theirs[0])
    tolerance = {torch.float64: 1e-8, torch.float32: 1e-3}[dtype]
    torch.testing.assert_close([x.double() for x in ours[1:]], theirs[1:], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("counts", [16, 1024])
def test_the_quadrature_of_a_block_is_exact_for_polynomials(counts):
    nodes, weights = cpu._gauss(counts)
    x = np.arange(counts) / counts
    for power in range(2 * len(nodes)):
        assert (weights * (nodes / counts) ** power).sum() == pytest.approx((x**power).sum(), rel=1e-12)


@pytest.mark.parametrize("sharing", [("cpu",), ()], ids=["as on a CPU", "as on a GPU"])
def test_every_window_is_in_one_group(sharing, monkeypatch):
    monkeypatch.setattr(windows, "SHARING", sharing)
    low = torch.tensor([0.0, 0, 3, 90, 95, 1000, 7, 0])
    high = low + torch.tensor([0.0, 5, 11, 40, 17, 700, 3, 300])
    seen = torch.zeros(len(low))
    for k, index in windows.groups(low, high):
        assert (k[0] <= low[index]).all() and (k[-1] >= high[index]).all()
        seen[index] += 1
    assert (seen == 1).all()


@pytest.mark.parametrize("relaxation", [Integer(), None])
def test_sums_by_width_are_those_of_shared_counts(relaxation, monkeypatch):
    """Samples, KL and log normalizer with their derivatives, in pieces: what a GPU computes is what a CPU computes."""
    monkeypatch.setattr(kernels, "_module", lambda name: None)
    monkeypatch.setitem(windows.NOISE_CHUNK_SIZE, "cpu", 1 << 10)
    prior = NegativeBinomial(torch.linspace(0.3, 40, 10), logits=torch.tensor(0.5))
    found = []
    for sharing in (("cpu",), ()):
        monkeypatch.setattr(windows, "SHARING", sharing)
        rate = torch.logspace(-3, 3, 300, dtype=torch.float64).reshape(30, 10).requires_grad_()
        nu = torch.logspace(1, -1, 300, dtype=torch.float64).reshape(30, 10).requires_grad_()
        q = ConwayMaxwellPoisson(rate, nu, relaxation=relaxation)
        torch.manual_seed(0)
        z = q.sample() if relaxation is None else q.rsample()
        total = z.sum() + kl_divergence(q, prior).sum() + q.log_prob(z.detach().round()).sum()
        found.append([z.detach(), total.detach(), *torch.autograd.grad(total, (rate, nu))])
    torch.testing.assert_close(*found)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_computes_the_sums_of_a_cpu():
    found = []
    for device in ("cpu", "cuda"):
        rate = torch.logspace(-3, 3, 300, dtype=torch.float64, device=device).requires_grad_()
        nu = torch.logspace(1, -1, 300, dtype=torch.float64, device=device).requires_grad_()
        q = ConwayMaxwellPoisson(rate, nu)
        prior = NegativeBinomial(rate.new_tensor(3.0), logits=rate.new_tensor(0.5))
        divergence = kl_divergence(q, prior)
        found.append([x.cpu() for x in (divergence.detach(), *torch.autograd.grad(divergence.sum(), (rate, nu)))])
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("use", ["rsample", "mean", "variance", "entropy", "log_normalizer", "mode"])
def test_parameters_that_cannot_be_summed(use):
    """With validation they are refused."""
    d = ConwayMaxwellPoisson(torch.tensor([1.0, 1e14]), 0.5, relaxation=Integer(), validate_args=True)
    with pytest.raises(DivergedError, match=r"too extreme for a sum over counts"):
        value = getattr(d, use)
        value() if callable(value) else value
    with pytest.raises(DivergedError, match="too extreme for a sum over counts"):
        kl_divergence(d, RelaxedPoisson(1.0))


def test_wrong_parameters():
    with pytest.raises(TypeError, match="takes the parameters rate, nu"):
        ConwayMaxwellPoisson(1.0)
    with pytest.raises(ValueError, match="nu"):
        ConwayMaxwellPoisson(1.0, -1.0, validate_args=True)
    with pytest.raises(ValueError, match="support"):
        ConwayMaxwellPoisson(1.0, 1.0, validate_args=True).log_prob(torch.tensor(0.5))


class Tilted(ConwayMaxwellPoisson):
    """A subclass with other weights: e^(k / 2) times as large, which are those of the rate times e^(1 / (2 nu))."""

    log_weight = staticmethod(lambda k, rate, nu: ConwayMaxwellPoisson.log_weight(k, rate, nu) + 0.5 * k)
    window = staticmethod(lambda nats, rate, nu: ConwayMaxwellPoisson.window(nats, rate * (0.5 / nu).exp(), nu))


def test_a_subclass_with_other_weights_does_not_use_the_kernels_of_its_base():
    rate, nu = torch.tensor([0.3, 4.0, 30.0]).double(), torch.tensor([0.7, 1.0, 2.0]).double()
    ours, same = Tilted(rate, nu), ConwayMaxwellPoisson(rate * (0.5 / nu).exp(), nu)
    prior = NegativeBinomial(torch.tensor(2.0).double(), logits=torch.tensor(1.0).double()).expand((3,))
    for a, b in (
        (ours.mean, same.mean),
        (ours.variance, same.variance),
        (ours.entropy(), same.entropy()),
        (kl_divergence(ours, prior), kl_divergence(same, prior)),
    ):
        torch.testing.assert_close(a, b)
    torch.manual_seed(0)
    drawn = Tilted(rate, nu, relaxation=Integer()).rsample(torch.Size([20_000]))
    assert ((drawn.mean(0) - same.mean).abs() < 5 * (same.variance / 20_000).sqrt()).all()
