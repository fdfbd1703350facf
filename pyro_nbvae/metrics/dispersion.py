"""Likelihoods of spike counts without latents: Fano factors, dispersions by neuron, and held-out scores.

Rates are means by condition and bin. Which likelihood describes the counts best is decided by held-out scores
(:func:`compare_likelihoods`), not by Fano factors: a Fano factor below 1 may be due to rare spikes alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm.auto import tqdm

from pyro_nbvae.batching import Batch, Recording
from pyro_nbvae.distributions.elementwise import double
from pyro_nbvae.errors import InputError
from pyro_nbvae.likelihoods import ConwayMaxwellPoisson, CountLikelihood, NegativeBinomial, fit_dispersion
from pyro_nbvae.metrics.errors import standard_error

# Pseudo-observations with which a condition's mean is moved towards that of all conditions.
_PSEUDO = 1.0


@dataclass(frozen=True)
class Score:
    """Bits per spike, pooled: a sum over trials and neurons, over the number of spikes.

    Standard errors are those of this ratio if trials, or neurons, are a random sample.

    Args:
        nats: differences of log probabilities, of the model minus the null, in nats: (trials,) or (trials, neurons).
        spikes: numbers of spikes, of the same shape.

    Example::

        >>> score = Score(torch.tensor([2.0, 1.0]), torch.tensor([3.0, 1.0]))
        >>> round(score.bits, 3), round(score.over_trials, 3)
        (1.082, 0.18)
    """

    nats: Tensor
    spikes: Tensor

    @property
    def bits(self) -> float:
        """Bits per spike; nan without a spike."""
        return float(self.nats.sum() / self.spikes.sum()) / math.log(2) if float(self.spikes.sum()) else math.nan

    def _error(self, dim: int) -> float:
        nats, spikes = (t.movedim(dim, 0).reshape(t.shape[dim], -1).sum(1) for t in (self.nats, self.spikes))
        error = standard_error(nats, spikes)
        return math.nan if error is None else error / math.log(2)

    @property
    def over_trials(self) -> float:
        """Standard error over trials."""
        return self._error(0)

    @property
    def over_neurons(self) -> float:
        """Standard error over neurons; nan if there is one value for all neurons of a trial."""
        return self._error(1) if self.nats.dim() > 1 else math.nan

    def grouped(self, groups: Tensor | None) -> Score:
        """Return the score with one value for each group of trials, (trials,): standard errors are those over groups.

        Rows that are not independent, such as the bins of a trial, are one draw together. None for no groups.
        """
        if groups is None:
            return self
        known, group = groups.to(self.nats.device).unique(return_inverse=True)
        nats, spikes = (t.new_zeros(len(known), *t.shape[1:]).index_add(0, group, t) for t in (self.nats, self.spikes))
        return Score(nats, spikes)

    def __sub__(self, other: Score) -> Score:
        """Return the paired difference of two scores of the same counts."""
        if not torch.equal(self.spikes, other.spikes):
            raise InputError("scores of other counts cannot be compared")
        return Score(self.nats - other.nats, self.spikes)

    @staticmethod
    def pooled(scores: list[Score]) -> Score:
        """Join the scores of folds: sums over sums."""
        return Score(torch.cat([s.nats for s in scores]), torch.cat([s.spikes for s in scores]))


def null_rates(train: Batch) -> Tensor:
    r"""Return the rates of the null: smoothed means of training counts, one for each neuron and bin.

    .. math:: \frac{\sum_n x_n + 1/2}{\sum_n e_n + \bar e}

    over observed counts, with exposures e of mean :math:`\bar e`, 1 by default. A rate is never 0, so that a spike that
    training data never had has a finite log probability.

    Args:
        train: training counts (N, *event_shape), or a recording of them.

    Raises:
        InputError: for exposures that are not positive and finite.

    Example::

        >>> null_rates(torch.tensor([[0.0, 2.0], [0.0, 4.0], [0.0, 6.0]])).tolist()
        [0.125, 3.125]
    """
    data = Recording.of(train)
    data.check()
    x = double(data.filled(0))
    exposure = torch.ones_like(x) if data.exposure is None else double(data.exposure).expand(x.shape)
    if data.mask is not None:
        exposure = exposure.masked_fill(~data.mask, 0)
    return (x.sum(0) + 0.5) / (exposure.sum(0) + data.mean_exposure)


def poisson_log_mass(x: Tensor, rate: Tensor) -> Tensor:
    """Return log Poisson(x; rate) in float64, in nats.

    Args:
        x: counts.
        rate: rates, which broadcast with x.
    """
    x, rate = double(x), double(rate)
    return torch.special.xlogy(x, rate) - rate - torch.lgamma(x + 1)


def fano_factors(counts: Tensor, labels: Tensor | None = None) -> Tensor:
    """Compute the Fano factor of each neuron, within condition and bin.

    The variances and the means of conditions and bins are summed before they are divided, with weights n - 1, so that
    rare spikes do not bias it.

    Args:
        counts: (trials, neurons) or (trials, bins, neurons); nan where none was observed.
        labels: the condition of each trial, (trials,). Default: one for all.

    Returns:
        (neurons,); nan for a neuron without a spike, or without two trials of a condition.

    Example::

        >>> x = torch.tensor([[0.0], [2.0], [10.0], [10.0]])
        >>> round(float(fano_factors(x, torch.tensor([0, 0, 1, 1]))), 4)
        0.1818
    """
    x = double(counts)
    labels = torch.zeros(len(x), dtype=torch.long) if labels is None else labels
    variance, mean = torch.zeros(x.shape[-1]).double(), torch.zeros(x.shape[-1]).double()
    for c in labels.unique():
        own = x[labels == c]
        number = (~own.isnan()).sum(0)
        weight = (number - 1).clamp_min(0)
        center = own.nanmean(0)
        squares = (own - center).square().nansum(0)
        several = number > 1
        variance += torch.where(several, squares, 0.0).reshape(-1, x.shape[-1]).sum(0)
        mean += torch.where(several, center * weight, 0.0).reshape(-1, x.shape[-1]).sum(0)
    return torch.where(mean > 0, variance / mean, math.nan)


@dataclass(frozen=True)
class _Sums:
    """Sums of counts and of exposures, where a count was observed, (N, *event_shape), and smoothed rates of all."""

    x: Tensor
    exposures: Tensor
    overall: Tensor
    pseudo: float

    @staticmethod
    def of(train: Batch) -> _Sums:
        data = Recording.of(train)
        x = double(data.filled(0))
        exposures = torch.ones_like(x) if data.exposure is None else double(data.exposure).expand(x.shape)
        if data.mask is not None:
            exposures = exposures.masked_fill(~data.mask, 0)
        return _Sums(x, exposures, null_rates(data), _PSEUDO * data.mean_exposure)

    def rates(self, own: Tensor, without: Tensor | None = None) -> Tensor:
        """Return the smoothed rates of some trials, bool (N,), or indices; without one trial each, if it is given."""
        spikes, exposure = self.x[own].sum(0), self.exposures[own].sum(0)
        if without is not None:
            spikes, exposure = spikes - self.x[without], exposure - self.exposures[without]
        return (spikes + self.pseudo * self.overall) / (exposure + self.pseudo)


def condition_rates(train: Batch, labels: Tensor | None, asked: Tensor | None) -> Tensor:
    """Return rates of training data by condition, smoothed, for trials of given conditions.

    A condition's mean has one pseudo-trial at the mean of all conditions, which is itself smoothed
    (:func:`null_rates`), so that no rate is 0.

    Args:
        train: training counts (N, *event_shape), or a recording of them.
        labels: the condition of each training trial, (N,); None for one condition.
        asked: the conditions for which the rates are returned, (M,); None without conditions.

    Returns:
        (M, *event_shape), or (1, *event_shape), in float64, at an exposure of 1.

    Example::

        >>> x = torch.tensor([[0.0], [1.0], [5.0], [6.0]])
        >>> condition_rates(x, torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1])).tolist()
        [[1.1666666666666667], [4.5]]
    """
    sums = _Sums.of(train)
    if labels is None or asked is None:
        return sums.overall[None]
    found = {c: sums.rates(labels == c) for c in asked.unique().tolist()}
    return torch.stack([found[c] for c in asked.tolist()])


def leave_one_out_rates(train: Batch, labels: Tensor | None) -> Tensor:
    """Return, for each training trial, the smoothed rates of the other trials of its condition.

    A dispersion must not be fitted to deviations from means that contain the trial itself: with n trials of a condition
    they are too small by a factor of 1 - 1/n.

    Args:
        train: training counts (N, *event_shape), or a recording of them.
        labels: the condition of each trial, (N,); None for one condition.

    Returns:
        (N, *event_shape), in float64, at an exposure of 1.

    Example::

        >>> x = torch.tensor([[0.0], [2.0], [4.0]])
        >>> [round(float(r), 3) for r in leave_one_out_rates(x, None)]
        [2.542, 1.875, 1.208]
    """
    sums = _Sums.of(train)
    labels = torch.zeros(len(sums.x), dtype=torch.long) if labels is None else labels
    found = torch.empty_like(sums.x)
    for c in labels.unique():
        own = labels == c
        found[own] = sums.rates(own, own)
    return found


def _families() -> dict[str, CountLikelihood]:
    return {"negative_binomial": NegativeBinomial(), "com_poisson": ConwayMaxwellPoisson()}


def compare_likelihoods(
    data: Batch,
    labels: Tensor | None,
    folds: Iterable[Tensor],
    *,
    groups: Tensor | None = None,
    shared: bool = False,
    progress: bool = False,
) -> dict[str, Score]:
    """Score likelihoods of counts on held-out trials, with means by condition and bin, relative to a Poisson.

    The Poisson has the same means. Dispersions are one for each neuron, fitted to the training trials around the means
    of the others (:func:`leave_one_out_rates`): they include the uncertainty of the means.

    Args:
        data: counts (N, *event_shape), or a recording of them.
        labels: the condition of each trial, (N,), or None.
        folds: for each fold, which trials are held out, bool (N,).
        groups: the group of each trial, (N,), which no fold divides; scores have one value for each. Default: none.
        shared: whether all neurons share one dispersion parameter.
        progress: show a progress bar.

    Returns:
        The scores by likelihood, ``negative_binomial`` and ``com_poisson``, of each trial, or group, and neuron.

    Raises:
        InputError: for exposures that are not positive and finite.

    Example::

        >>> x = torch.distributions.Binomial(4, torch.full((200, 3), 0.5)).sample()
        >>> fold = torch.arange(200) % 4
        >>> scores = compare_likelihoods(x, None, [fold == k for k in range(4)])
        >>> scores["com_poisson"].bits > 0 > scores["negative_binomial"].bits - 0.01
        True
    """
    recording = Recording.of(data)
    recording.check()
    found: dict[str, list[Score]] = {name: [] for name in _families()}
    for held_out in tqdm(folds, desc="likelihoods", unit="fold", disable=not progress, leave=False):
        if not bool(held_out.any()):
            continue
        train, test = recording[~held_out], recording[held_out]
        own = None if labels is None else labels[~held_out]
        of_train = leave_one_out_rates(train, own)
        of_test = condition_rates(train, own, None if labels is None else labels[held_out])
        means = [
            (rates * (1.0 if part.exposure is None else double(part.exposure))).expand(part.x.shape)
            for rates, part in ((of_train, train), (of_test, test))
        ]
        x = double(test.filled(0))
        poisson = poisson_log_mass(x, means[1])
        for name, likelihood in _families().items():
            a = fit_dispersion(likelihood, train.filled(0), means[0], shared=shared, mask=train.mask)
            nats = likelihood.of_mean(means[1], a).log_prob(x) - poisson
            spikes = x
            if test.mask is not None:
                nats, spikes = (t.masked_fill(~test.mask, 0) for t in (nats, spikes))
            if x.dim() == 3:
                nats, spikes = nats.sum(1), spikes.sum(1)
            found[name].append(Score(nats, spikes).grouped(None if groups is None else groups[held_out]))
    return {name: Score.pooled(scores) for name, scores in found.items()}
