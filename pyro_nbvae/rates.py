"""Learning rates of the networks and of a learned prior, in one rule. This module imports quickly."""

from __future__ import annotations

from collections.abc import Callable

# Learning rate of a learned prior in multiples of that of the networks: its few parameters are far from their optimum.
PRIOR_RATE = 10.0


def learning_rates(lr: float, **options: float) -> Callable[[str], dict[str, float]]:
    """Return the options of a Pyro optimizer for each parameter: a learned prior learns 10 times as fast.

    Adam moves a parameter by about its learning rate per step, and the optimum of a prior's parameters may lie several
    units from their start. ``nbvae train`` has the same rule.

    Args:
        lr: learning rate of the networks.
        **options: more options, the same for all parameters.

    See also: docs/mathematics.md, section 8 (The prior's start and pace).

    Example::

        >>> rates = learning_rates(1e-3, clip_norm=10.0)
        >>> rates("decoder.layers.0.weight"), rates("prior.logits")["lr"]
        ({'lr': 0.001, 'clip_norm': 10.0}, 0.01)
    """

    def of(name: str) -> dict[str, float]:
        parts = name.replace("$$$", ".").split(".")  # Pyro's store joins the names of plain modules with $$$
        return {"lr": PRIOR_RATE * lr if "prior" in parts else lr, **options}

    return of
