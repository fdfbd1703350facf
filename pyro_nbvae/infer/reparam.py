"""Relaxing the counts of a Pyro program from outside, by :func:`pyro.poutine.reparam`."""

from __future__ import annotations

from typing import Any

import pyro.distributions
import torch
from pyro.infer.reparam.reparam import Reparam, ReparamMessage, ReparamResult

from pyro_nbvae.distributions import NegativeBinomial, Relaxation, RelaxedNegativeBinomial, RelaxedPoisson
from pyro_nbvae.distributions.relaxations.base import check_relaxation
from pyro_nbvae.infer.elbo import family

# Not their subclasses, which may have another law.
NEGATIVE_BINOMIALS = (
    NegativeBinomial,
    RelaxedNegativeBinomial,
    pyro.distributions.NegativeBinomial,
    torch.distributions.NegativeBinomial,
)
POISSONS = (RelaxedPoisson, pyro.distributions.Poisson, torch.distributions.Poisson)


class RelaxReparam(Reparam):
    """Draws a count site from the relaxed distribution, so that any program over counts has pathwise gradients.

    ``poutine.reparam(program, config={"z": RelaxReparam(ArrivalTimes(0.24))})`` of both model and guide trains with
    relaxed counts at ``z``; the programs themselves stay exact, and are exact without it. Sites may be
    ``NegativeBinomial`` or ``Poisson``, ours, Pyro's or torch's; an observed site is left as it is.

    Args:
        relaxation: how the counts are differentiated; a plain attribute, to be annealed between steps
            (``relax.relaxation = relax.relaxation.at(0.1)``). With None they are integers without a gradient.

    Raises:
        TypeError: at a site of another distribution.

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
        """The site's message with the relaxed distribution in it."""
        if msg["is_observed"]:
            return {"fn": msg["fn"], "value": msg["value"], "is_observed": True}
        fn: Any = msg["fn"]
        event_dim = len(fn.event_shape)
        while isinstance(fn, torch.distributions.Independent):
            fn = fn.base_dist
        relaxed: RelaxedNegativeBinomial | RelaxedPoisson
        if type(fn) in NEGATIVE_BINOMIALS:
            relaxed = RelaxedNegativeBinomial(fn.total_count, logits=fn.logits, relaxation=self.relaxation)
        elif type(fn) in POISSONS:
            relaxed = RelaxedPoisson(fn.rate, relaxation=self.relaxation)
        else:
            raise TypeError(
                f"site {msg['name']!r}: RelaxReparam relaxes NegativeBinomial and Poisson, not {family(fn)}"
            )
        return {"fn": self._wrap(relaxed, event_dim), "value": msg["value"], "is_observed": False}
