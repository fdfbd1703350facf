"""Latents of observations, and predicted observations, of a trained pair; and both networks as plain programs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pyro
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn
from torch.distributions import Independent

from pyro_nbvae.batching import GIVEN, Observations, RandomSubset, Recording
from pyro_nbvae.distributions.elementwise import double
from pyro_nbvae.errors import InputError
from pyro_nbvae.networks.initialization import evaluation_mode
from pyro_nbvae.vae import AmortizedGuide, GenerativeModel, evaluating

# Number of predicted values that are held at once.
_HELD = 1 << 24


@dataclass(frozen=True)
class Latents:
    """The posterior of each of N observations.

    Args:
        mean, variance: of the posterior, (N, *latent_shape).
        sample: one sample of it, integers for counts, (N, *latent_shape).
        information: of each unit about the observation, in nats, from at most 1,000 observations
            (:func:`~pyro_nbvae.metrics.unit_information`).

    Example::

        >>> zeros = torch.zeros(2, 3)
        >>> Latents(zeros, zeros, zeros, torch.zeros(3)).mean.shape
        torch.Size([2, 3])
    """

    mean: Tensor
    variance: Tensor
    sample: Tensor
    information: Tensor


@dataclass(frozen=True)
class Prediction:
    """The posterior predictive distribution of each value of N observations.

    Args:
        mean: its mean, such as the expected count at the observation's exposure, (N, *event_shape).
        low, high: bounds of the central interval of this probability, (N, *event_shape).

    Example::

        >>> one = torch.ones(2, 3)
        >>> Prediction(one, one - 1, one + 1).filled(Recording(torch.tensor([[5.0, 5, 5]] * 2))).tolist()[0]
        [5.0, 5.0, 5.0]
    """

    mean: Tensor
    low: Tensor
    high: Tensor

    def filled(self, data: Recording) -> Tensor:
        """Return the observations, with the predicted mean where no value was observed."""
        if data.mask is None:
            return data.x
        return torch.where(data.mask.to(data.x.device), data.x, self.mean.to(data.x))


def encode(
    model: GenerativeModel, guide: AmortizedGuide, data: Observations, *, seed: int = 0, progress: bool = False
) -> Latents:
    """Return the posteriors of observations.

    Args:
        model, guide: a trained pair.
        data: (N, *event_shape), as a data set holds them, a :class:`~pyro_nbvae.batching.Recording`, or a DataLoader
            (:func:`~pyro_nbvae.metrics.held_out`).
        seed: random seed of the sample.
        progress: show a progress bar.

    Raises:
        InputError: for data of the wrong shape, without an observation or outside the likelihood's support.

    Example::

        >>> from pyro_nbvae.guides import PoissonGuide
        >>> from pyro_nbvae.models import PoissonModel
        >>> model = PoissonModel((5,), latents=3, decoder="linear")
        >>> encode(model, PoissonGuide(model, encoder="linear"), torch.zeros(4, 5)).mean.shape
        torch.Size([4, 3])
    """
    from pyro_nbvae.metrics.information import OBSERVATIONS, unit_information

    found: list[list[Tensor]] = []
    compared = RandomSubset(OBSERVATIONS)
    with evaluating(model, guide, seed):
        for batch in model.input_batches(data, "data", progress):
            q = guide.posterior(batch.x, **batch.given)
            compared.add(batch)
            found.append([part.cpu() for part in (q.mean, q.variance, q.sample())])
        information = unit_information(guide, compared.observations)
    mean, variance, sample = (torch.cat(parts) for parts in zip(*found, strict=True))
    return Latents(mean, variance, sample, information)


def predict(
    model: GenerativeModel,
    guide: AmortizedGuide,
    data: Observations,
    *,
    samples: int = 100,
    level: float = 0.9,
    seed: int = 0,
    progress: bool = False,
) -> Prediction:
    """Return the posterior predictive distribution of observations, also of values that were not observed.

    Args:
        model, guide: a trained pair.
        data: as :func:`encode`. Values that a mask leaves out, or that the guide does not read, are predicted from the
            others.
        samples: number of samples of the posterior, and of observations, for each.
        level: probability of the interval.
        seed: random seed.
        progress: show a progress bar.

    Raises:
        InputError: as :func:`encode`, for fewer than two samples, and for a level that is not between 0 and 1.

    Example::

        >>> from pyro_nbvae.guides import PoissonGuide
        >>> from pyro_nbvae.likelihoods import Poisson
        >>> from pyro_nbvae.models import PoissonModel
        >>> model = PoissonModel((5,), latents=3, decoder="linear", likelihood=Poisson())
        >>> found = predict(model, PoissonGuide(model, encoder="linear"), torch.zeros(4, 5))
        >>> bool((found.low <= found.high).all())
        True
    """
    if samples < 2:
        raise InputError(f"samples must be at least 2, got {samples}")
    if not 0 < level < 1:
        raise InputError(f"level must be between 0 and 1, got {level}")
    ends = torch.tensor([0.5 - level / 2, 0.5 + level / 2])
    found: list[list[Tensor]] = []
    rows = max(1, _HELD // (samples * model.event_shape.numel()))
    with evaluating(model, guide, seed):
        for whole in model.input_batches(data, "data", progress):
            for batch in whole.split(rows):
                q = guide.posterior(batch.x, **batch.given)
                total, drawn = torch.zeros((), dtype=torch.float64), []
                for z in q.sample(torch.Size([samples])):
                    observed = _elements(model.observation(z, **batch.conditions))
                    total = total + double(observed.mean)
                    drawn.append(observed.sample())
                # an element of the sample, as a count has no values in between
                low, high = torch.stack(drawn).quantile(ends.to(batch.x), 0, interpolation="nearest")
                found.append([(total / samples).to(low).cpu(), low.cpu(), high.cpu()])
    return Prediction(*(torch.cat(parts) for parts in zip(*found, strict=True)))


def _elements(observed: TorchDistribution) -> Any:
    return observed.base_dist if isinstance(observed, Independent) else observed


# Attributes that hold the parameters of a posterior, by family; see docs/distributions.md.
_PARAMETERS = (("rate", "nu"), ("total_count", "logits"), ("rate",), ("loc", "scale"), ("logits",))


class _Encoding(nn.Module):
    """From observations to the parameters of their posterior."""

    def __init__(self, guide: AmortizedGuide, given: tuple[str, ...]) -> None:
        super().__init__()
        self.guide, self.given = guide, given

    def forward(self, x: Tensor, *known: Tensor) -> dict[str, Tensor]:
        q: Any = _elements(self.guide.posterior(x, **dict(zip(self.given, known, strict=True))))
        for names in _PARAMETERS:
            if all(isinstance(getattr(q, name, None), Tensor) for name in names):
                return {name: getattr(q, name) for name in names}
        raise InputError(f"the parameters of {type(q).__name__} are not known: export the weights")


class _Decoding(nn.Module):
    """From latents to the mean of the observation."""

    def __init__(self, model: GenerativeModel, given: tuple[str, ...]) -> None:
        super().__init__()
        self.model, self.given = model, given

    def forward(self, z: Tensor, *known: Tensor) -> Tensor:
        return self.model.observation(z, **dict(zip(self.given, known, strict=True))).mean


def export_programs(
    model: GenerativeModel, guide: AmortizedGuide, given: tuple[str, ...] = ()
) -> dict[str, torch.export.ExportedProgram]:
    """Return encoder and decoder as programs of plain PyTorch, which run without this package.

    Args:
        model, guide: a trained pair.
        given: what the data have besides their values, of ``mask``, ``exposure`` and ``covariates``; further arguments
            of the programs, in this order. A mask is of the shape of x, an exposure (B, 1, ...), and the decoder takes
            no mask.

    Returns:
        ``encoder``, from x (B, *event_shape) to the parameters of the posterior by name (rate and nu of a COM-Poisson,
        total_count and logits of a negative binomial, rate of a Poisson, loc and scale of a normal); and ``decoder``,
        from latents z (B, *latent_shape) to the mean of the observation.

    Raises:
        InputError: for a posterior of another family.

    Example::

        >>> from pyro_nbvae.guides import PoissonGuide
        >>> from pyro_nbvae.models import PoissonModel
        >>> model = PoissonModel((5,), latents=3, decoder="linear")
        >>> programs = export_programs(model, PoissonGuide(model, encoder="linear"))
        >>> programs["encoder"].module()(torch.zeros(4, 5))["rate"].shape
        torch.Size([4, 3])
    """
    given = tuple(name for name in GIVEN if name in given)
    size = 3  # not 1, which torch.export would take as a constant
    x = torch.zeros(size, *model.event_shape, device=model.device)
    z = model.factorised_prior().sample(torch.Size([size])).detach()
    known = {
        "mask": torch.ones_like(x, dtype=torch.bool),
        "exposure": torch.ones(size, *(1 for _ in model.event_shape), device=model.device),
        "covariates": torch.zeros(size, model.covariates, device=model.device),
    }
    batch = torch.export.Dim("batch")
    programs = {}
    without_mask = tuple(name for name in given if name != "mask")
    parts = {
        "encoder": (_Encoding(guide, given), x, given),
        "decoder": (_Decoding(model, without_mask), z, without_mask),
    }
    with evaluation_mode(model, guide), guide.exact(), torch.no_grad(), pyro.validation_enabled(False):
        for name, (module, first, names) in parts.items():
            arguments = (first, *(known[each] for each in names))
            shapes = ({0: batch}, *([tuple({0: batch} for _ in names)] if names else []))
            programs[name] = torch.export.export(module, arguments, dynamic_shapes=shapes)
    return programs
