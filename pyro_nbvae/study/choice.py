"""``--relaxation auto``: select the relaxation and temperature with the smallest gradient error at initialisation."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from pyro_nbvae.batching import random_subset
from pyro_nbvae.metrics.gradients import gradient_errors
from pyro_nbvae.study.build import build, resolve
from pyro_nbvae.study.data import Data
from pyro_nbvae.study.tree import (
    AnnealedArrivalTimes,
    AnnealedGumbelSoftmax,
    IntegerCounts,
    TrainConfig,
    options,
    replace,
)
from pyro_nbvae.study.variants import variant_of

CANDIDATES: tuple[AnnealedArrivalTimes | AnnealedGumbelSoftmax | IntegerCounts, ...] = (
    IntegerCounts(),
    *(AnnealedArrivalTimes(temperature_start=t, temperature=t) for t in (1.0, 0.5, 0.24, 0.1, 0.05)),
    *(AnnealedGumbelSoftmax(temperature_start=t, temperature=t) for t in (1.0, 0.5, 0.25)),
)
# Number of observations for the comparison, of draws per candidate, and of draws of the exact gradient.
OBSERVATIONS, DRAWS, EXACT_DRAWS = 16, 20, 10


def choose(config: TrainConfig[Any], data: Data, device: torch.device) -> tuple[TrainConfig[Any], list[dict[str, Any]]]:
    """Select the relaxation whose gradient has the smallest mean squared error before training.

    The error is the squared bias plus the variance of a batch, relative to the gradient of the objective with integer
    counts (:func:`~pyro_nbvae.metrics.gradient_errors`). The temperature is then constant during training.

    Returns:
        The configuration with the selected relaxation, and one row per candidate, best first.

    See also: docs/mathematics.md, section 5.6 (`--relaxation auto`).
    """
    torch.manual_seed(config.seed)
    own = getattr(variant_of(config.variant), "relaxation", IntegerCounts())
    plain = resolve(replace(config, relaxation=own), data.event_shape, data)
    model, guide, _ = build(plain, data.event_shape)
    model.to(device)
    guide.to(device)
    train_set = data.training[: config.train_size]
    x = random_subset(train_set, OBSERVATIONS).floats().to(device)
    guide.initialize(train_set.to(device))
    model.initialize(train_set.to(device))
    size = plain.training.batch_size
    candidates, draws = [part.build() for part in CANDIDATES], {"samples": DRAWS, "unbiased_samples": EXACT_DRAWS}
    errors = gradient_errors(model, guide, x, candidates, **draws, batch_size=size, seed=config.seed)
    rows = [
        {
            "relaxation": part.kind,
            "temperature": getattr(part, "temperature", None),
            **dataclasses.asdict(error),
            "total": error.total,
        }
        for part, error in zip(CANDIDATES, errors, strict=True)
    ]
    best = CANDIDATES[min(range(len(rows)), key=lambda k: rows[k]["total"])]
    # the initial mean count is that at which the errors were measured
    chosen = replace(config, relaxation=best, prior_mean=options(plain)["prior_mean"])
    return chosen, sorted(rows, key=lambda row: row["total"])


def explain(rows: list[dict[str, Any]]) -> str:
    """Return one line that states which relaxation was selected and why."""

    def name(row: dict[str, Any]) -> str:
        return row["relaxation"] + ("" if row["temperature"] is None else f" at {row['temperature']:g}")

    best, second = rows[:2]
    return (
        f"relaxation: {name(best)} has the smallest mean squared error of the gradient, {best['total']:.3g} of its "
        f"squared norm (squared bias {max(best['squared_bias'], 0):.2g}, variance {best['variance']:.2g}); second is "
        f"{name(second)} with {second['total']:.3g}"
    )
