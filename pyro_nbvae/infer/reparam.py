"""Relaxing the counts of a Pyro program without changing it, by :func:`pyro.poutine.reparam`."""

from __future__ import annotations

from typing import Any

import pyro.distributions
import torch
from pyro.infer.reparam.reparam import Reparam, ReparamMessage, ReparamResult

from pyro_nbvae.distributions import NegativeBinomial, Relaxation, RelaxedNegativeBinomial, RelaxedPoisson
from pyro_nbvae.distributions.relaxations.base import check_relaxation, followed
from pyro_nbvae.infer.elbo import name_of

# Subclasses are not accepted: they may be other distributions.
_NEGATIVE_BINOMIALS = (
    NegativeBinomial,
    RelaxedNegativeBinomial,
    pyro.distributions.NegativeBinomial,
    torch.distributions.NegativeBinomial,
)
_POISSONS = (RelaxedPoisson, pyro.distributions.Poisson, torch.distributions.Poisson)


class RelaxReparam(Reparam):
    """Reparametriser that draws a count site from the relaxed distribution, so that it has pathwise gradients.

    Apply ``poutine.reparam(program, config={"z": RelaxReparam(ArrivalTimes(0.24))})`` to both model and guide to train
    with relaxed counts at ``z``; the programs themselves stay exact. Sites may be ``NegativeBinomial`` or ``Poisson``,
    of this package, Pyro or torch; an observed site is left unchanged.

    Args:
        relaxation: how the counts are differentiated; a plain attribute that may be changed between steps, for
            annealing (``relax.relaxation = relax.relaxation.at(0.1)``). With None they are integers without a gradient.

    Raises:
        TypeError: at a site of another distribution, or if ``relaxation`` is not a Relaxation.

    Example::

        >>> import pyro
        >>> from pyro import poutine
        >>> from pyro_nbvae.distributions import ArrivalTimes
        >>> def program():
        ...     return pyro.sample("z", pyro.distributions.Poisson(torch.tensor(3.0)))
        >>> relaxed = poutine.reparam(program, config={"z": RelaxReparam(ArrivalTimes(0.24))})
        >>> poutine.trace(relaxed).get_trace().nodes["z"]["fn"].has_rsample
        True
    """

    def __init__(self, relaxation: Relaxation | None) -> None:
        self.relaxation = check_relaxation(relaxation)

    def apply(self, msg: ReparamMessage) -> ReparamResult:
        """Return the site's message with the relaxed distribution.

        Raises:
            TypeError: at a site of another distribution.
        """
        if msg["is_observed"]:
            return {"fn": msg["fn"], "value": msg["value"], "is_observed": True}
        fn: Any = msg["fn"]
        event_dim = len(fn.event_shape)
        while isinstance(fn, torch.distributions.Independent):
            fn = fn.base_dist
        relaxed: RelaxedNegativeBinomial | RelaxedPoisson
        if type(fn) in _NEGATIVE_BINOMIALS:
            relaxation = followed(self, fn.total_count)
            given = {"probs": fn.probs} if "probs" in vars(fn) and "logits" not in vars(fn) else {"logits": fn.logits}
            options = {"relaxation": relaxation, "validate_args": fn._validate_args}
            relaxed = RelaxedNegativeBinomial(fn.total_count, **given, **options)
        elif type(fn) in _POISSONS:
            relaxed = RelaxedPoisson(fn.rate, relaxation=followed(self, fn.rate), validate_args=fn._validate_args)
        else:
            raise TypeError(
                f"site {msg['name']!r}: RelaxReparam relaxes NegativeBinomial and Poisson, not {name_of(fn)}"
            )
        return {"fn": self._wrap(relaxed, event_dim), "value": msg["value"], "is_observed": False}
