"""Relaxing the counts of a Pyro program from outside, by :func:`pyro.poutine.reparam`."""

from __future__ import annotations

from typing import Any

import torch.distributions
from pyro.infer.reparam.reparam import Reparam, ReparamMessage, ReparamResult
from torch import Tensor

from pyro_nbvae.distributions import NegativeBinomial, RelaxedNegativeBinomial, RelaxedPoisson
from pyro_nbvae.distributions.samplers import Indicator, Relaxation


class RelaxReparam(Reparam):
    """Draws a count site from the relaxed distribution, so that any program over counts has pathwise gradients.

    ``poutine.reparam(program, config={"z": RelaxReparam(0.24)})`` of both model and guide trains with relaxed counts at
    ``z``; the programs themselves stay exact, and are exact without it. Sites may be ``NegativeBinomial`` or
    ``Poisson``, ours, Pyro's or torch's; an observed site is left as it is.

    Args:
        temperature: non-negative, a plain attribute: to be annealed between steps.
        relaxation, indicator, max_count, straight_through: how counts are relaxed
            (:class:`~pyro_nbvae.distributions.relaxed.RelaxedCount`).

    Raises:
        TypeError: at a site of another distribution.
    """

    def __init__(
        self,
        temperature: float | Tensor,
        relaxation: Relaxation = "arrival",
        indicator: Indicator = "sigmoid",
        max_count: int = 100,
        straight_through: bool = False,
    ) -> None:
        self.temperature = temperature
        self.options: dict[str, Any] = dict(
            relaxation=relaxation, indicator=indicator, max_count=max_count, straight_through=straight_through
        )

    def apply(self, msg: ReparamMessage) -> ReparamResult:
        """The site's message with the relaxed distribution in it."""
        if msg["is_observed"]:
            return {"fn": msg["fn"], "value": msg["value"], "is_observed": True}
        fn: Any = msg["fn"]
        event_dim = len(fn.event_shape)
        while isinstance(fn, torch.distributions.Independent):
            fn = fn.base_dist
        relaxed: RelaxedNegativeBinomial | RelaxedPoisson
        if isinstance(fn, (NegativeBinomial, torch.distributions.NegativeBinomial)):
            relaxed = RelaxedNegativeBinomial(fn.total_count, fn.logits, temperature=self.temperature, **self.options)
        elif isinstance(fn, torch.distributions.Poisson):
            relaxed = RelaxedPoisson(fn.rate, temperature=self.temperature, **self.options)
        else:
            raise TypeError(
                f"site {msg['name']!r}: RelaxReparam relaxes NegativeBinomial and Poisson, not {type(fn).__name__}"
            )
        return {"fn": self._wrap(relaxed, event_dim), "value": msg["value"], "is_observed": False}
