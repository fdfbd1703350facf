"""Learning rates of the networks, of learned priors and of likelihoods."""

from __future__ import annotations

from collections.abc import Callable

# Learning rate of a learned prior, and of the dispersions of a likelihood, over that of the networks: these few
# parameters are initially far from their optimum.
PRIOR_LR_MULTIPLIER = 10.0
# The same for the components of a mixture prior, and for the network of an autoregressive one.
MIXTURE_LR_MULTIPLIER, NETWORK_LR_MULTIPLIER = 5.0, 2.0
_OF_MIXTURES = {"shift", "component_logits"}


def learning_rates(lr: float, **options: float) -> Callable[[str], dict[str, float]]:
    """Return the options of a Pyro optimizer for each parameter: prior and likelihood learn 10 times as fast.

    Of a joint prior, components learn 5 times as fast as the networks, and the prior's own network twice as fast.
    Adam changes a parameter by about its learning rate per step, and the optimum of the parameters of a prior, or of a
    likelihood's dispersions, may be several units from their initial values.

    Args:
        lr: learning rate of the networks.
        **options: further options, the same for all parameters.

    Returns:
        A function from the name of a parameter to its options, which Pyro's optimizers take in the place of a dict.

    See also: docs/mathematics.md, section 8 (The prior's start and pace).

    Example::

        >>> rates = learning_rates(1e-3, clip_norm=10.0)
        >>> rates("decoder.layers.0.weight"), rates("prior.logits")["lr"]
        ({'lr': 0.001, 'clip_norm': 10.0}, 0.01)
    """

    def options_of(name: str) -> dict[str, float]:
        parts = name.replace("$$$", ".").split(".")  # Pyro's store joins the names of plain modules with $$$
        multiplier = PRIOR_LR_MULTIPLIER if {"prior", "likelihood"} & set(parts) else 1.0
        if "joint_prior" in parts:
            multiplier = MIXTURE_LR_MULTIPLIER if _OF_MIXTURES & set(parts) else NETWORK_LR_MULTIPLIER
        return {"lr": multiplier * lr, **options}

    return options_of
