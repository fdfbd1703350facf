"""Check the functions that define a count family against each other."""

from __future__ import annotations

import contextlib
import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pyro_nbvae.distributions.windows import NATS
from pyro_nbvae.errors import InputError

if TYPE_CHECKING:
    from pyro_nbvae.distributions.count_distribution import CountDistribution

# At most this many elements of a distribution are checked, and only those with windows of at most this many counts.
_ELEMENTS, _COUNTS = 32, 4096
# A window may leave out e^_SLACK times its bound, and scores may have this relative error.
_SLACK, _TOLERANCE = 3.0, 1e-3


def check_family(distribution: CountDistribution) -> None:
    r"""Check the weights, scores and window of a family against each other, at the parameters of a distribution.

    It checks that ``log_weight`` is nowhere nan; that ``scores`` are its derivatives, and not None for a parameter that
    requires a gradient; and that the window leaves out a mass of at most about :math:`e^{-\mathrm{nats}}`, as far as
    the weights within one width of the window show. A subclass of
    :class:`~pyro_nbvae.distributions.CountDistribution` is checked with validation on, whenever the number of times
    that it was made is a power of two. Call this function to check it at
    parameters of your choice.

    Args:
        distribution: a distribution of the family. Up to 32 of its elements are checked, evenly spaced, without those
            whose windows are wider than 4,096 counts.

    Raises:
        InputError: a ValueError, if one of the functions is wrong.

    See also: docs/mathematics.md, section 4 (Families that are given by their weights).

    Example::

        >>> import torch
        >>> from pyro_nbvae.distributions import ConwayMaxwellPoisson
        >>> check_family(ConwayMaxwellPoisson(torch.tensor([0.1, 1.0, 10.0]), 2.0))
    """
    if not distribution.batch_shape.numel():
        return
    family, names = type(distribution), tuple(distribution.arg_constraints)
    nats = NATS.get(distribution.parameters[0].dtype, NATS[torch.float32])

    def fail(problem: str) -> None:
        raise InputError(f"{family.__name__}.{problem}")

    own = [p.detach().reshape(-1) for p in distribution.parameters]
    chosen = torch.linspace(0, len(own[0]) - 1, min(len(own[0]), _ELEMENTS), dtype=torch.float64).long()
    own = [p[chosen.to(p.device)].double() for p in own]
    low, high = (end.detach() for end in family.window(nats, *own))
    if bool((high < low).any()):
        fail("window ends before it begins: return (first, last)")
    low, high = low.clamp(min=0), high.clamp(min=0)
    kept = high - low < _COUNTS  # without nan
    if not bool(kept.any()):
        return
    own, low, high = [p[kept] for p in own], low[kept].floor(), high[kept].ceil()
    width = high - low + 1
    first = (low - width - 1).clamp(min=0)
    k = first + torch.arange(int((high - first + width).max()) + 2, device=low.device, dtype=low.dtype)[:, None]
    parameters = [p.expand(k.shape).clone().requires_grad_() for p in own]
    with torch.enable_grad():
        log_weight = family.log_weight(k, *parameters)
        derivatives = _derivatives(log_weight, parameters)
    log_weight = log_weight.detach()
    mass = torch.softmax(log_weight, 0)

    def fail_where(where: Tensor, problem: str) -> None:
        if bool(where.any()):
            row, column = where.nonzero()[0].tolist()
            at = ", ".join(f"{name} = {float(p[column]):.4g}" for name, p in zip(names, own, strict=True))
            fail(f"{problem} (count {float(k[row, column]):g}, {at})")

    fail_where(log_weight.isnan(), "log_weight is nan: return -inf for no mass")
    fail_where((log_weight == -torch.inf).all(0).expand(k.shape), "log_weight is -inf in the whole window")
    left_out = mass.masked_fill((k >= low) & (k <= high), 0)
    lost = left_out.sum(0).log()
    worst = lost.max()
    too_much = lost > _SLACK - nats
    fail_where(
        (left_out == left_out.amax(0)) & too_much,
        f"window({nats:g}, ...) leaves out a mass of e^{float(worst):.1f}, above e^-{nats:g}",
    )
    scores = family.scores(k, *(p.detach() for p in parameters))
    if len(scores) != len(names):
        fail(f"scores returns {len(scores)} values: expected one for each of {names}")
    for name, given, score, derivative in zip(names, distribution.parameters, scores, derivatives, strict=True):
        if score is None and given.requires_grad:
            fail(
                f"scores returns None for {name}, which requires a gradient: return the derivative of log_weight, or "
                "detach the parameter"
            )
        if score is not None and derivative is not None:
            wrong = (score - derivative).abs() > _TOLERANCE * (1 + derivative.abs())
            fail_where(wrong & (mass > math.exp(-nats)), f"scores: not the derivative of log_weight in {name}")


def _derivatives(log_weight: Tensor, parameters: list[Tensor]) -> tuple[Tensor | None, ...]:
    """The derivative of log_weight in each parameter; None for all if it cannot be differentiated."""
    if not log_weight.requires_grad:
        return (None,) * len(parameters)
    finite = log_weight.masked_fill(log_weight == -torch.inf, 0)
    found = torch.autograd.grad(finite.sum(), parameters, allow_unused=True)
    return tuple(torch.zeros_like(p) if d is None else d for d, p in zip(found, parameters, strict=True))


def check_often(distribution: CountDistribution) -> None:
    """Check a family on its first, second, fourth, eighth, ... use: in training, at parameters of all stages.

    Uses of different shapes, such as prior and posterior, and with and without gradients are counted apart. Inside a
    transform of torch.func, where the check cannot run, nothing is counted.
    """
    uses = type(distribution).uses
    key = distribution.batch_shape, tuple(p.requires_grad for p in distribution.parameters)
    number = uses[key] + 1
    with contextlib.suppress(RuntimeError):
        if number.bit_count() == 1:
            check_family(distribution)
        uses[key] = number
