"""``--relaxation auto``: select the relaxation and temperature with the smallest gradient error at initialisation."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from pyro_nbvae.batching import to_floats
from pyro_nbvae.distributions import ArrivalTimes, GumbelSoftmax, Integer, Relaxation
from pyro_nbvae.distributions.relaxations import RELAXATIONS
from pyro_nbvae.metrics.gradients import gradient_errors
from pyro_nbvae.study.build import build, resolve
from pyro_nbvae.study.config import TrainConfig
from pyro_nbvae.study.data import Data

CANDIDATES: tuple[Relaxation, ...] = (
    Integer(),
    *(ArrivalTimes(t) for t in (1.0, 0.5, 0.24, 0.1, 0.05)),
    *(GumbelSoftmax(t) for t in (1.0, 0.5, 0.25)),
)
# Number of observations for the comparison, of draws per candidate, and of draws of the exact gradient.
OBSERVATIONS, DRAWS, EXACT_DRAWS = 16, 20, 10


def choose(config: TrainConfig, data: Data, device: torch.device) -> tuple[TrainConfig, list[dict[str, Any]]]:
    """Select the relaxation whose gradient has the smallest mean squared error before training.

    The error is the squared bias plus the noise of a batch, with respect to the gradient of the objective with integer
    counts (:func:`~pyro_nbvae.metrics.gradient_errors`). The temperature is then constant during training.

    Returns:
        The configuration with the selected relaxation, and one row per candidate, best first.

    See also: docs/mathematics.md, section 5.6 (`--relaxation auto`).
    """
    torch.manual_seed(config.seed)
    plain = resolve(dataclasses.replace(config, relaxation=None), data.event_shape, data)
    model, guide, _ = build(plain, data.event_shape)
    model.to(device)
    guide.to(device)
    generator = torch.Generator().manual_seed(config.seed * 1_000_003)
    train_set = data.train[: config.train_size]
    first = torch.randperm(len(train_set), generator=generator)[:OBSERVATIONS]
    x = to_floats(train_set[first]).to(device)
    guide.initialize(train_set.to(device))
    model.initialize(train_set.to(device))
    assert plain.batch_size is not None
    options = {"samples": DRAWS, "unbiased_samples": EXACT_DRAWS, "batch_size": plain.batch_size, "seed": config.seed}
    errors = gradient_errors(model, guide, x, CANDIDATES, **options)
    rows = [
        {
            "relaxation": next(name for name, kind in RELAXATIONS.items() if isinstance(one, kind)),
            "temperature": getattr(one, "temperature", None),
            **dataclasses.asdict(error),
            "total": error.total,
        }
        for one, error in zip(CANDIDATES, errors, strict=True)
    ]
    rows.sort(key=lambda row: row["total"])
    best = rows[0]
    chosen = {
        "relaxation": best["relaxation"],
        "temperature": best["temperature"],
        "temperature_start": best["temperature"],
        "prior_mean": plain.prior_mean,  # the start at which it was measured
    }
    return dataclasses.replace(config, **chosen), rows


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
