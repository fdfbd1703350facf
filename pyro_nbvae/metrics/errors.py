"""Standard errors of means and ratios over observations, or over groups of them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pyro_nbvae.distributions.elementwise import double
from pyro_nbvae.errors import InputError


def standard_error(values: Tensor, weights: Tensor | None = None, groups: Tensor | None = None) -> float | None:
    r"""Compute the standard error of a mean over observations, or of a ratio of sums.

    With :math:`r = \sum_n v_n / \sum_n w_n` and sums :math:`V_g, W_g` over the observations of a group,

    .. math:: \mathrm{SE}(r)^2 = \frac{G}{G - 1} \frac{\sum_g (V_g - r W_g)^2}{(\sum_g W_g)^2}.

    It is the standard deviation over :math:`\sqrt N` if the weights are 1 and each observation is a group. Observations
    that are not independent, such as the bins of a trial, are one group.

    Args:
        values: (N,).
        weights: (N,). Default: 1.
        groups: the group of each observation, (N,). Default: each is one.

    Returns:
        The standard error; None for a single group, and for weights whose sum is 0.

    Raises:
        InputError: for groups of another number of observations.

    Reference: Cochran, Sampling Techniques, 1977, sections 6.4 (ratio) and 9A.

    Example::

        >>> values = torch.tensor([1.0, 1.0, 3.0, 3.0])
        >>> round(standard_error(values), 3), round(standard_error(values, groups=torch.tensor([0, 0, 1, 1])), 3)
        (0.577, 1.0)
    """
    values = double(values)
    weights = torch.ones_like(values) if weights is None else double(weights).to(values.device)
    total = float(weights.sum())
    if groups is not None:
        if groups.shape != values.shape:
            raise InputError(
                f"groups have shape {tuple(groups.shape)}: expected ({len(values)},), one of each observation"
            )
        known, group = groups.to(values.device).unique(return_inverse=True)
        values, weights = (v.new_zeros(len(known)).index_add(0, group, v) for v in (values, weights))
    if len(values) < 2 or not total:
        return None
    residual = values - values.sum() / total * weights
    return math.sqrt(len(values) / (len(values) - 1) * float(residual.square().sum())) / total
