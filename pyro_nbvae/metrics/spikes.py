"""Scores of models of spike counts: bits per spike, co-smoothing, PSTHs and calibration, with integer latents.

Two scores are in bits per spike, and differ: :func:`nlb_bits` scores rates under a Poisson, relative to the mean of the
evaluated counts, as the Neural Latents Benchmark does; :func:`bits_per_spike` and :func:`co_smoothing` score log
probabilities under the model's own likelihood, relative to a Poisson at rates of the training data. The first cannot
see a dispersion.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from pyro.distributions import TorchDistribution, ZeroInflatedDistribution
from torch import Tensor
from torch.distributions import Independent

from pyro_nbvae.batching import Observations, Recording, evaluation_batches
from pyro_nbvae.distributions.com_poisson import MeanConwayMaxwellPoisson
from pyro_nbvae.distributions.count_distribution import CountDistribution
from pyro_nbvae.distributions.elementwise import double
from pyro_nbvae.distributions.negative_binomial import NegativeBinomial
from pyro_nbvae.errors import InputError
from pyro_nbvae.infer.elbo import base_distribution
from pyro_nbvae.metrics.bound import importance_weighted_bound
from pyro_nbvae.metrics.dispersion import Score, fano_factors, poisson_log_mass
from pyro_nbvae.vae import AmortizedGuide, GenerativeModel, evaluating

# Number of samples whose log masses are computed at once.
_CHUNK = 16


def _over_bins(x: Tensor) -> Tensor:
    """Sum (trials, bins, neurons) over bins."""
    return x.sum(1) if x.dim() == 3 else x


def _null(data: Recording, rates: Tensor) -> Tensor:
    """Return log Poisson of the null, 0 where no count was observed, (N, *event_shape)."""
    rates = rates.to(data.x.device)
    means = rates if data.exposure is None else rates * double(data.exposure)
    log_mass = poisson_log_mass(data.filled(0), means)
    return log_mass if data.mask is None else log_mass.masked_fill(~data.mask, 0)


def _check_rates(rates: Tensor, counts: Tensor) -> None:
    if rates.shape != counts.shape:
        raise InputError(
            f"rates have shape {tuple(rates.shape)} and counts {tuple(counts.shape)}: they must be the same"
        )


def nlb_bits(rates: Tensor, counts: Tensor, null: Tensor | None = None) -> float:
    r"""Compute bits per spike of the Neural Latents Benchmark: rates under a Poisson, relative to mean rates.

    .. math:: \frac{1}{n_{sp} \log 2} \sum_{n, t} \log \frac{\mathrm{Poisson}(x_{nt}; \lambda_{nt})}{
        \mathrm{Poisson}(x_{nt}; \bar x_n)}

    It is that of ``nlb_tools.evaluation.bits_per_spike``. The null is the mean of the *evaluated* counts of each
    neuron, over trials and bins.

    Args:
        rates: expected counts of each bin, (trials, bins, neurons) or (trials, neurons); posterior means, for a model.
        counts: counts of the same shape; nan where none was observed.
        null: rates of the null, which broadcast to the counts. Default: the mean count of each neuron.

    Raises:
        InputError: for another shape, and for rates below 0.

    Reference: Pei et al., 2021.

    Example::

        >>> counts = torch.tensor([[0.0, 1.0], [2.0, 1.0]])
        >>> round(nlb_bits(torch.tensor([[0.1, 1.0], [1.9, 1.0]]), counts), 4)
        0.463
    """
    _check_rates(rates, counts)
    rates, counts = double(rates), double(counts)
    seen = ~counts.isnan()
    if bool((rates[seen] < 0).any()) or bool(rates[seen].isnan().any()):
        raise InputError("rates must be at least 0 and not nan")
    rates = rates.clamp_min(1e-9)  # as in nlb_tools
    if null is None:
        null = counts.flatten(0, -2).nanmean(0)
    null = double(null).expand(counts.shape)
    difference = poisson_log_mass(counts, rates) - poisson_log_mass(counts, null)
    spikes = float(counts[seen].sum())
    return float(difference[seen].sum()) / spikes / math.log(2) if spikes else math.nan


def bits_per_spike(
    model: GenerativeModel,
    guide: AmortizedGuide,
    data: Observations,
    null: Tensor,
    *,
    samples: int = 100,
    seed: int = 0,
    progress: bool = False,
) -> Score:
    r"""Score whole trials by the importance-weighted bound on log p(x), relative to a Poisson at training rates.

    .. math:: \frac{\sum_n \log p(x_n) - \log \mathrm{Poisson}(x_n; \mathrm{null})}{\log 2 \, \sum_n \sum_i x_{ni}}

    Args:
        model, guide: the trained pair.
        data: held-out counts (N, *event_shape), or a :class:`~pyro_nbvae.batching.Recording` of them.
        null: rates of the null (:func:`null_rates` of the training data).
        samples: number of importance samples per trial.
        seed: random seed.
        progress: show a progress bar.

    Returns:
        The score, with one value for each trial.

    See also: :func:`~pyro_nbvae.metrics.importance_weighted_bound`.

    Example::

        >>> from pyro_nbvae.guides import PoissonGuide
        >>> from pyro_nbvae.likelihoods import Poisson
        >>> from pyro_nbvae.metrics import null_rates
        >>> from pyro_nbvae.models import PoissonModel
        >>> model = PoissonModel((5,), latents=3, decoder="linear", likelihood=Poisson())
        >>> x = torch.poisson(torch.ones(20, 5))
        >>> score = bits_per_spike(model, PoissonGuide(model, encoder="linear"), x, null_rates(x))
        >>> score.nats.shape
        torch.Size([20])
    """
    if not isinstance(data, Tensor | Recording):
        data = list(evaluation_batches(data, "data"))  # read once: a loader may give another order each time
    bounds = importance_weighted_bound(model, guide, data, samples, seed=seed, progress=progress)
    return relative_to_null(bounds, model.input_batches(data), null)


def relative_to_null(log_probabilities: Tensor, batches: Iterable[Recording], null: Tensor) -> Score:
    """Return the score of log probabilities of whole trials, (N,), in nats, relative to a Poisson at the null.

    Args:
        log_probabilities: of each trial.
        batches: the trials, as :meth:`~pyro_nbvae.vae.GenerativeModel.input_batches` gives them.
        null: rates of the null.
    """
    nulls, spikes = [], []
    for batch in batches:
        nulls.append(_null(batch, null).flatten(1).sum(1))
        spikes.append(double(batch.filled(0)).masked_fill(absent(batch), 0).flatten(1).sum(1))
    return Score(log_probabilities - torch.cat(nulls), torch.cat(spikes))


def absent(batch: Recording) -> Tensor:
    """Return where no count was observed, of the shape of the observations."""
    if batch.mask is None:
        return torch.zeros_like(batch.x, dtype=torch.bool)
    return ~batch.mask.expand(batch.x.shape)


def predictive(
    model: GenerativeModel,
    guide: AmortizedGuide,
    batch: Recording,
    samples: int,
    of: Callable[[TorchDistribution], Tensor],
) -> Tensor:
    """Return a function of p(x | z) at samples of the posterior, stacked, (samples, B, ...).

    Args:
        model, guide: the trained pair, in the context of :func:`~pyro_nbvae.vae.evaluating`.
        batch: a batch as the model takes it.
        samples: number of samples.
        of: maps p(x | z), of batch shape (B, *event_shape), to a tensor.
    """
    return torch.stack(list(_predicted(model, guide, batch, samples, of)))


def _predicted(
    model: GenerativeModel,
    guide: AmortizedGuide,
    batch: Recording,
    samples: int,
    of: Callable[[TorchDistribution], Tensor],
) -> Iterator[Tensor]:
    """Iterate over what :func:`predictive` returns."""
    q = guide.posterior(batch.x, **batch.given)
    for z in q.sample(torch.Size([samples])):
        observed = model.observation(z, **batch.conditions)
        yield of(observed.base_dist if isinstance(observed, Independent) else observed)


def co_smoothing(
    model: GenerativeModel,
    guide: AmortizedGuide,
    data: Observations,
    null: Tensor,
    *,
    samples: int = 100,
    seed: int = 0,
    progress: bool = False,
) -> tuple[Score, Tensor]:
    r"""Score the neurons that the guide does not read, given those that it reads.

    .. math:: \log \frac{1}{S} \sum_s p(x_{out} \mid z_s), \qquad z_s \sim q(z \mid x_{in})

    for each neuron of each trial (its bins together), minus a Poisson at the null, in bits per spike.

    Args:
        model, guide: the trained pair; ``guide.reads`` must leave out some elements.
        data: held-out trials, as :func:`bits_per_spike`.
        null: rates of the null (:func:`null_rates` of the training data).
        samples, seed, progress: as :func:`bits_per_spike`.

    Returns:
        The score of each trial and held-out neuron; and the posterior means of the rates of all neurons, for
        :func:`nlb_bits`.

    Raises:
        InputError: for a guide that reads all elements.

    Example::

        >>> from pyro_nbvae.guides import PoissonGuide
        >>> from pyro_nbvae.likelihoods import Poisson
        >>> from pyro_nbvae.metrics import null_rates
        >>> from pyro_nbvae.models import PoissonModel
        >>> model = PoissonModel((5,), latents=3, decoder="linear", likelihood=Poisson())
        >>> reads = torch.tensor([True, True, True, True, False])
        >>> guide = PoissonGuide(model, encoder="linear", reads=reads)
        >>> x = torch.poisson(torch.ones(20, 5))
        >>> co_smoothing(model, guide, x, null_rates(x))[0].nats.shape
        torch.Size([20, 1])
    """
    if guide.reads is None or bool(guide.reads.all()):
        raise InputError("co-smoothing needs a guide that does not read all neurons: give it reads=")
    reads = guide.reads.reshape(-1, guide.reads.shape[-1])
    if bool((reads != reads[:1]).any()):
        raise InputError("co-smoothing needs a guide that reads the same neurons in each bin")
    out = ~reads[0]
    scores, rates = [], []
    with evaluating(model, guide, seed):
        for batch in model.input_batches(data, "data", progress):
            missing = absent(batch)
            x = double(batch.x).masked_fill(missing, 0)
            number = 0
            total, mean = torch.tensor(0.0), torch.tensor(0.0)
            for start in range(0, samples, _CHUNK):
                several = min(_CHUNK, samples - start)
                found = predictive(model, guide, batch, several, functools.partial(_log_and_mean, x))
                log_mass, means = found.unbind(1)
                masses = _by_neuron(log_mass.masked_fill(missing, 0))[..., out]
                total = torch.logaddexp(total, masses.logsumexp(0)) if number else masses.logsumexp(0)
                mean = mean + means.sum(0)
                number += several
            of_null = _by_neuron(_null(batch, null)[None])[0][..., out]
            scores.append(Score(total - math.log(number) - of_null, _over_bins(x)[..., out]))
            rates.append(mean / number)
    return Score.pooled(scores), torch.cat(rates)


def _log(observed: TorchDistribution, x: Tensor) -> Tensor:
    return double(observed.log_prob(x.to(torch.get_default_dtype())))


def _log_and_mean(x: Tensor, observed: TorchDistribution) -> Tensor:
    return torch.stack([_log(observed, x), double(observed.mean)])


def _below_and_at(x: Tensor, observed: TorchDistribution) -> Tensor:
    return torch.stack([_cdf(observed, x - 1), _log(observed, x).exp(), double(observed.mean)])


def _by_neuron(log_mass: Tensor) -> Tensor:
    """Sum (samples, trials, bins, neurons) over bins."""
    return log_mass.sum(2) if log_mass.dim() == 4 else log_mass


def psth_r2(rates: Tensor, counts: Tensor, labels: Tensor) -> float:
    r"""Compute R^2 of the PSTHs of held-out trials: of mean rates by condition, against mean counts.

    .. math:: 1 - \frac{\sum_{c, t, i} (\bar x_{cti} - \bar \lambda_{cti})^2}{
        \sum_{c, t, i} (\bar x_{cti} - \bar x_i)^2}

    Args:
        rates: expected counts, (trials, bins, neurons) or (trials, neurons).
        counts: held-out counts of the same shape; nan where none was observed.
        labels: the condition of each trial, (trials,).

    Raises:
        InputError: for rates of another shape than the counts.

    Example::

        >>> counts = torch.tensor([[0.0], [2.0], [4.0], [6.0]])
        >>> psth_r2(torch.tensor([[1.0], [1.0], [5.0], [5.0]]), counts, torch.tensor([0, 0, 1, 1]))
        1.0
    """
    _check_rates(rates, counts)
    rates, counts = double(rates).masked_fill(counts.isnan(), math.nan), double(counts)
    means = [(counts[labels == c].nanmean(0), rates[labels == c].nanmean(0)) for c in labels.unique()]
    observed, expected = (torch.stack(parts) for parts in zip(*means, strict=True))
    seen = ~observed.isnan()
    center = observed.flatten(0, -2).nanmean(0).expand(observed.shape)
    unexplained, total = ((observed - other)[seen].square().sum() for other in (expected, center))
    return 1 - float(unexplained / total) if float(total) else math.nan


@dataclass(frozen=True)
class Calibration:
    """How well a posterior predictive distribution describes held-out counts.

    Args:
        pit: randomised probability integral transforms of observed counts, uniform for a calibrated model, (n,).
        fano, predicted_fano: Fano factors of each neuron, of counts and of a posterior predictive draw: variance over
            mean within condition and bin, pooled; nan without a spike.
        rates: posterior predictive means, (N, *event_shape).

    Example::

        >>> found = Calibration(torch.tensor([0.2, 0.7]), torch.ones(1), torch.ones(1), torch.ones(1, 1))
        >>> round(found.pit_distance, 4)
        0.3
    """

    pit: Tensor
    fano: Tensor
    predicted_fano: Tensor
    rates: Tensor

    @property
    def pit_distance(self) -> float:
        """Largest distance of the distribution function of ``pit`` from that of a uniform distribution."""
        ordered = self.pit.double().sort().values
        steps = torch.arange(len(ordered) + 1, dtype=torch.float64) / len(ordered)
        return round(float(torch.maximum((ordered - steps[:-1]).max(), (steps[1:] - ordered).max())), 12)


def calibration(
    model: GenerativeModel,
    guide: AmortizedGuide,
    data: Observations,
    labels: Tensor | None = None,
    *,
    samples: int = 50,
    seed: int = 0,
    progress: bool = False,
) -> Calibration:
    r"""Compare held-out counts with the posterior predictive distribution.

    A randomised PIT is :math:`F(x - 1) + u\, p(x)` with u uniform, F the mean of the likelihood's distribution
    functions over samples of the posterior. A posterior that reads x itself makes it narrower than uniform; with
    neurons that the guide does not read (``reads``), only these are compared.

    Args:
        model, guide: the trained pair.
        data: held-out trials, as :func:`bits_per_spike`.
        labels: the condition of each trial, within which Fano factors are computed.
        samples: number of posterior samples per trial.
        seed, progress: as :func:`bits_per_spike`.

    Example::

        >>> from pyro_nbvae.guides import PoissonGuide
        >>> from pyro_nbvae.likelihoods import Poisson
        >>> from pyro_nbvae.metrics import null_rates
        >>> from pyro_nbvae.models import PoissonModel
        >>> model = PoissonModel((5,), latents=3, decoder="linear", likelihood=Poisson())
        >>> x = torch.poisson(torch.ones(20, 5))
        >>> calibration(model, PoissonGuide(model, encoder="linear"), x).pit.shape
        torch.Size([100])
    """
    pits, counts, drawn, rates = [], [], [], []
    with evaluating(model, guide, seed):
        for batch in model.input_batches(data, "data", progress):
            missing = absent(batch)
            x = batch.x.masked_fill(missing, 0)
            each = _predicted(model, guide, batch, samples, functools.partial(_below_and_at, x))
            below, mass, mean = (functools.reduce(torch.add, each) / samples).unbind(0)
            uniform = torch.rand(x.shape, dtype=torch.float64, device=x.device)
            compared = ~missing
            if guide.reads is not None:
                compared = compared & ~guide.reads
            pits.append((below + uniform * mass)[compared].cpu())
            nan = double(x).masked_fill(missing, math.nan)
            counts.append(nan)
            draw = predictive(model, guide, batch, 1, lambda d: double(d.sample()))[0]
            drawn.append(draw.masked_fill(missing, math.nan))
            rates.append(mean)
    fano, predicted = (fano_factors(torch.cat(parts).cpu(), labels) for parts in (counts, drawn))
    return Calibration(torch.cat(pits), fano, predicted, torch.cat(rates))


def _cdf(observed: TorchDistribution, x: Tensor) -> Tensor:
    """Return P(count <= x), 0 below 0."""
    base = base_distribution(observed)
    k = double(x).clamp_min(0)
    if isinstance(base, ZeroInflatedDistribution):
        gate = double(base.gate)
        found = gate + (1 - gate) * _cdf(base.base_dist, x.clamp_min(0))
    elif isinstance(base, NegativeBinomial | torch.distributions.NegativeBinomial):
        r, p = double(base.total_count), double(base.logits).neg().sigmoid()
        found = _regularised_beta(r, k + 1, p)
    elif isinstance(base, torch.distributions.Poisson):
        found = torch.special.gammaincc(k + 1, double(base.rate))
    elif isinstance(base, CountDistribution | MeanConwayMaxwellPoisson):
        found = double(base.cdf(x.clamp_min(0)))
    else:  # the masses of the counts up to x: other distributions have no distribution function, or a wrong one
        counts = x.clamp_min(0)
        found = torch.zeros_like(k)
        for one in range(int(counts.max()) + 1):
            mass = double(base.log_prob(counts.clamp_max(one))).exp()
            found = torch.where(k >= one, found + mass, found)
    return torch.where(x < 0, 0.0, found)


def _regularised_beta(a: Tensor, b: Tensor, x: Tensor) -> Tensor:
    from scipy.special import betainc

    shape = torch.broadcast_shapes(a.shape, b.shape, x.shape)
    return torch.as_tensor(betainc(*(t.expand(shape).cpu().numpy() for t in (a, b, x)))).to(a.device)
