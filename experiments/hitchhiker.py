r"""Gradients through counts on the tasks of "A hitchhiker's guide to Poisson gradient estimation".

python -m experiments.hitchhiker    two hours on one core; a run that is stopped goes on

A linear model with 8 latent and 32 observed counts generates 1,000 training, 500 validation and 500 test observations;
a model of the same form, with a linear encoder, is fitted to them for 300 epochs with batches of 100 and AdamW at 1e-3.
Rates are 10 sigma(linear). All counts of a task are Poisson, negative binomial or COM-Poisson; their dispersion is
learned for each unit. The seed of a fit is that of its initial weights and its batches. The data are drawn here, as
the paper's code draws them, so they are not the same numbers. (For its negative binomials that code has 100 epochs
and 20 counts of Gumbel-softmax.)

All gradient estimators share the exact KL, and differ in the gradient of E[log p(x | z)] alone, from one sample:

- integer: :class:`~pyro_nbvae.distributions.Integer`;
- arrival times (sigmoid; smoothstep, their "cubic") and Gumbel-softmax, each at five temperatures, of which the best on
  validation data is reported; for a COM-Poisson, the posterior of arrival times is a Poisson, as in the paper's code;
- straight-through: :math:`f'(z) \, \partial m`, m the mean of the posterior;
- ReinMax-like: :math:`f'(z) \, [\partial m + s(z)(z - m)] / 2`, s the score: the trapezoidal rule of ReinMax (Liu et
  al., 2023), derived here for counts;
- score function: :math:`f(z) \, s(z)`.

Reference: Ibrahim et al., 2026; Wang and Bui, 2026 (estimators beyond ReinMax, for categories).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import torch
from torch import Tensor
from torch.distributions import kl_divergence
from tqdm.auto import tqdm

from pyro_nbvae.distributions import (
    ArrivalTimes,
    ConwayMaxwellPoisson,
    Integer,
    Relaxation,
    RelaxedNegativeBinomial,
    RelaxedPoisson,
)
from pyro_nbvae.study.commandline import script
from pyro_nbvae.study.errors import check_member
from pyro_nbvae.study.files import write_text
from pyro_nbvae.study.provenance import COMMIT, write_page

LATENT, OBSERVED, TRAIN, HELD_OUT = 8, 32, 1_000, 500
EPOCHS, BATCH, SEEDS, DRAWS = 300, 100, (0, 1, 2, 3, 4), 10
TEMPERATURES = (0.02, 0.05, 0.1, 0.2, 0.5)
# The counts of Gumbel-softmax: up to 10 + 10 sqrt(10), as in the paper's code.
COUNTS = torch.arange(41.0)
LOG_FACTORIALS = torch.lgamma(COUNTS + 1)
Parameters = dict[str, Tensor]
Family = Literal["poisson", "negative_binomial", "com_poisson"]


def com_rate(mean: Tensor, nu: Tensor) -> Tensor:
    """Return mu of a COM-Poisson of this approximate mean."""
    return (mean + (1 - 1 / nu) / 2).clamp(min=1e-8)


@dataclass(frozen=True)
class Counts:
    """Counts of a family, as a distribution of this package with a relaxation, or with log weights.

    Args:
        family: the family.
        rate: the mean; of a COM-Poisson the approximate mean mu + (1 / nu - 1) / 2.
        log_dispersion: log r of a negative binomial, log nu of a COM-Poisson; broadcasts with the rate.
    """

    family: Family
    rate: Tensor
    log_dispersion: Tensor

    def distribution(self, relaxation: Relaxation | None = None) -> Any:
        """Return the distribution."""
        rate, log_dispersion = torch.broadcast_tensors(self.rate, self.log_dispersion)
        options: dict[str, Any] = {"relaxation": relaxation, "validate_args": False}
        if self.family == "poisson":
            return RelaxedPoisson(rate, **options)
        if self.family == "negative_binomial":
            return RelaxedNegativeBinomial(log_dispersion.exp(), logits=rate.log() - log_dispersion, **options)
        nu = log_dispersion.exp()
        return ConwayMaxwellPoisson(com_rate(rate, nu), nu, **options)

    def log_weights(self) -> Tensor:
        """Return the log masses of all counts up to a constant, (..., 41)."""
        rate, dispersion = self.rate[..., None], self.log_dispersion[..., None].exp()
        if self.family == "poisson":
            return COUNTS * rate.log() - LOG_FACTORIALS
        if self.family == "negative_binomial":
            return torch.lgamma(COUNTS + dispersion) - LOG_FACTORIALS + COUNTS * (rate / (rate + dispersion)).log()
        return dispersion * (COUNTS * com_rate(rate, dispersion).log() - LOG_FACTORIALS)


# --- the gradient estimators: each samples from a posterior, with a gradient -----------------------------------------


def with_gradient(z: Tensor, of: Tensor) -> Tensor:
    """Return the value z with the gradient of another tensor."""
    return z + (of - of.detach())


def integer(q: Counts, temperature: Tensor) -> Tensor:
    """Return integer counts with the gradient of this package."""
    return q.distribution(Integer()).rsample()


def _arrivals(indicator: Literal["sigmoid", "smoothstep"]) -> Callable[[Counts, Tensor], Tensor]:
    return lambda q, temperature: q.distribution(ArrivalTimes(temperature, indicator=indicator)).rsample()


def gumbel(q: Counts, temperature: Tensor) -> Tensor:
    """Return Gumbel-softmax counts."""
    weights = q.log_weights()
    race = weights - torch.empty_like(weights).exponential_().log()
    return (torch.softmax(race / temperature[..., None], -1) * COUNTS).sum(-1)


def straight_through(q: Counts, temperature: Tensor) -> Tensor:
    """Return integer counts with the gradient of the mean."""
    exact = q.distribution()
    return with_gradient(exact.sample(), exact.mean)


def reinmax_like(q: Counts, temperature: Tensor) -> Tensor:
    """Return integer counts with the gradient of the trapezoidal rule."""
    exact = q.distribution()
    z, mean = exact.sample(), exact.mean
    return with_gradient(z, (mean + exact.log_prob(z) * (z - mean).detach()) / 2)


def score_function(q: Counts, temperature: Tensor) -> Tensor:
    """Return integer counts without a gradient; the loss has the score."""
    return q.distribution().sample()


ESTIMATORS: dict[str, Callable[[Counts, Tensor], Tensor]] = {
    "integer": integer,
    "arrival, sigmoid": _arrivals("sigmoid"),
    "arrival, smoothstep": _arrivals("smoothstep"),
    "Gumbel-softmax": gumbel,
    "straight-through": straight_through,
    "ReinMax-like": reinmax_like,
    "score function": score_function,
}
RELAXED = ("arrival, sigmoid", "arrival, smoothstep", "Gumbel-softmax")


# --- the tasks -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    """A data set: the family of all counts, and mean and deviation of its true log dispersions (log r, or log nu)."""

    family: Family
    weight: float = 0.5
    log_dispersion: tuple[float, float] = (0.0, 0.0)
    seed: int = 0


TASKS = {
    "Poisson": Task("poisson"),
    "negative binomial": Task("negative_binomial", 0.8, (math.log(10), 0.3)),
    "COM-Poisson, mixed": Task("com_poisson", 0.5, (0.0, 0.5), 0),
    "COM-Poisson, wide": Task("com_poisson", 0.5, (-1.0, 0.0), 1),
    "COM-Poisson, narrow": Task("com_poisson", 0.5, (1.0, 0.0), 2),
}


def rates(weight: Tensor, bias: Tensor, x: Tensor) -> Tensor:
    """Return 10 sigma(W x + b), at least 1e-8."""
    return (10 * torch.sigmoid(x @ weight.mT + bias[..., None, :])).clamp(min=1e-8)


def draw(task: Task) -> tuple[Tensor, Tensor]:
    """Draw the latents and observations of a task, for training, validation and test in this order."""
    torch.manual_seed(task.seed)
    weight = task.weight * torch.nn.init.xavier_normal_(torch.empty(OBSERVED, LATENT))
    bias = -0.5 + 0.3 * torch.randn(OBSERVED)
    mean, deviation = task.log_dispersion
    of_latents, of_observed = (mean + deviation * torch.randn(size) for size in (LATENT, OBSERVED))
    rate = torch.full((TRAIN + 2 * HELD_OUT, LATENT), math.e)
    z = Counts(task.family, rate, of_latents).distribution().sample()
    return z, Counts(task.family, rates(weight, bias, z), of_observed).distribution().sample()


def initial(seed: int) -> Parameters:
    """Return the parameters of a fit before training; linear layers are those of PyTorch."""
    torch.manual_seed(seed)
    encoder, decoder = torch.nn.Linear(OBSERVED, LATENT), torch.nn.Linear(LATENT, OBSERVED)
    layers = {
        f"{n}.{k}": p.detach() for n, each in (("q", encoder), ("x", decoder)) for k, p in each.named_parameters()
    }
    zeros = {"q.log_dispersion": LATENT, "x.log_dispersion": OBSERVED, "p.log_rate": LATENT, "p.log_dispersion": LATENT}
    return layers | {name: torch.zeros(size) for name, size in zeros.items()}


def posterior(family: Family, at: Parameters, x: Tensor) -> Counts:
    """Return q(z | x), (runs, observations, 8)."""
    return Counts(family, rates(at["q.weight"], at["q.bias"], x), at["q.log_dispersion"][:, None])


def kl_to_prior(family: Family, at: Parameters, q: Any) -> Tensor:
    """Return the exact KL, (runs, observations)."""
    p = Counts(family, at["p.log_rate"][:, None].exp(), at["p.log_dispersion"][:, None]).distribution()
    return kl_divergence(q, p.expand(q.batch_shape)).sum(-1)


def log_likelihood(family: Family, at: Parameters, z: Tensor, x: Tensor) -> Tensor:
    """Return log p(x | z), (runs, observations)."""
    counts = Counts(family, rates(at["x.weight"], at["x.bias"], z), at["x.log_dispersion"][:, None])
    return counts.distribution().log_prob(x).sum(-1)


def train(task: Task, estimator: str, x: Tensor, bar: tqdm) -> tuple[list[dict[str, float]], Parameters]:
    """Fit all seeds and temperatures of one estimator at once; return them, and their parameters."""
    runs = [
        {"seed": s, "temperature": t} for s in SEEDS for t in (TEMPERATURES if estimator in RELAXED else (math.nan,))
    ]
    start = [initial(int(run["seed"])) for run in runs]
    at = {name: torch.stack([each[name] for each in start]).requires_grad_() for name in start[0]}
    temperature = torch.tensor([run["temperature"] for run in runs])[:, None, None]
    optimizer = torch.optim.AdamW(at.values(), lr=1e-3)
    shuffles = {seed: torch.Generator().manual_seed(seed) for seed in SEEDS}
    of_latents = latent_family(task, estimator)
    for _ in range(EPOCHS):
        orders = {seed: torch.randperm(TRAIN, generator=each) for seed, each in shuffles.items()}
        order = torch.stack([orders[int(run["seed"])] for run in runs])
        for batch in order.split(BATCH, 1):
            counts = posterior(of_latents, at, x[batch])
            z, q = ESTIMATORS[estimator](counts, temperature), counts.distribution()
            likelihood = log_likelihood(task.family, at, z, x[batch])
            loss = kl_to_prior(of_latents, at, q) - likelihood
            if estimator == "score function":
                loss = loss - likelihood.detach() * q.log_prob(z).sum(-1)
            optimizer.zero_grad()
            loss.mean(1).sum().backward()
            optimizer.step()
        bar.update()
    return runs, {name: each.detach() for name, each in at.items()}


def latent_family(task: Task, estimator: str) -> Family:
    """Return the family of prior and posterior in training: that of the task, or the only one that an estimator has."""
    return "poisson" if task.family == "com_poisson" and estimator.startswith("arrival") else task.family


@torch.no_grad()
def evaluate(task: Task, at: Parameters, z_true: Tensor, x: Tensor) -> dict[str, Tensor]:
    """Return means over observations for each run: the ELBO from 10 integer samples, and the paper's metrics."""
    torch.manual_seed(0)
    q = posterior(task.family, at, x[None]).distribution()
    likelihoods = [log_likelihood(task.family, at, z, x) for z in q.sample(torch.Size([DRAWS]))]
    bound = torch.stack(likelihoods).mean(0) - kl_to_prior(task.family, at, q)
    fano = (q.variance / q.mean).flatten(1)
    return {
        "elbo": bound.mean(1),
        "cll": log_likelihood(task.family, at, z_true[None], x).mean(1),
        "hll": q.log_prob(z_true[None]).sum(-1).mean(1),
        "fano_low": fano.amin(1),
        "fano_high": fano.amax(1),
    }


def rows_of(name: str, estimator: str, bar: tqdm) -> list[dict[str, object]]:
    """Fit and evaluate all runs of one estimator on one task."""
    task = TASKS[name]
    z, x = draw(task)
    runs, at = train(task, estimator, x[:TRAIN], bar)
    parts = {"validation": slice(TRAIN, TRAIN + HELD_OUT), "test": slice(TRAIN + HELD_OUT, None)}
    found = {part: evaluate(task, at, z[s], x[s]) for part, s in parts.items()}
    return [
        {
            "task": name,
            "estimator": estimator,
            "epochs": EPOCHS,
            "commit": COMMIT,
            **run,
            "validation_elbo": float(found["validation"]["elbo"][k]),
            **{key: float(each[k]) for key, each in found["test"].items()},
        }
        for k, run in enumerate(runs)
    ]


def chosen(rows: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of each estimator at its temperature with the best mean ELBO on validation data.

    A temperature at which a fit has diverged is the worst.
    """
    means = (
        rows.fillna({"validation_elbo": -math.inf})
        .groupby(["task", "estimator", "temperature"], dropna=False)["validation_elbo"]
        .transform("mean")
    )
    best = means.groupby([rows["task"], rows["estimator"]]).transform("max")
    return rows[means == best]


def table(rows: pd.DataFrame) -> list[dict[str, object]]:
    """Return a line for each task and estimator: means ± deviation over seeds, and differences ± their error."""
    lines: list[dict[str, object]] = []
    best = chosen(rows)
    for name in (name for name in TASKS if name in set(best["task"])):
        of_task = best[best["task"] == name].set_index(["estimator", "seed"])
        known = set(of_task.index.get_level_values("estimator"))
        for estimator in (estimator for estimator in ESTIMATORS if estimator in known):
            each = of_task.loc[estimator]
            line: dict[str, object] = {"counts": name, "gradient": estimator}
            temperature = each["temperature"].iloc[0]
            line["temperature"] = "" if math.isnan(temperature) else f"{temperature:g}"
            for key, heading in (("elbo", "ELBO"), ("cll", "CLL"), ("hll", "HLL")):
                line[heading] = f"{each[key].mean():.2f} ± {each[key].std():.2f}"
            if estimator != "integer" and "integer" in known:
                gain = of_task.loc["integer"]["elbo"] - each["elbo"]
                line["ELBO of integer minus this"] = f"{gain.mean():.2f} ± {gain.std() / math.sqrt(len(gain)):.2f}"
            line["Fano factors"] = f"{each['fano_low'].mean():.2f} to {each['fano_high'].mean():.2f}"
            lines.append(line)
    return lines


def main(
    tasks: tuple[str, ...] = tuple(TASKS), estimators: tuple[str, ...] = tuple(ESTIMATORS), out: Path = Path("results")
) -> None:
    """Fit all estimators on all tasks; write rows (hitchhiker.csv) and their table (hitchhiker.md).

    Args:
        tasks: names of the tasks.
        estimators: names of the gradient estimators.
        out: folder of both files.
    """
    for name in tasks:
        check_member("task", name, TASKS)
    for estimator in estimators:
        check_member("estimator", estimator, ESTIMATORS)
    path = out / "hitchhiker.csv"
    rows = (
        pd.read_csv(path, dtype={"commit": str})
        if path.exists()
        else pd.DataFrame(columns=["task", "estimator", "epochs"])
    )
    rows = rows[rows["epochs"] == EPOCHS]
    done = set(zip(rows["task"], rows["estimator"], strict=True))
    missing = [(name, estimator) for name in tasks for estimator in estimators if (name, estimator) not in done]
    out.mkdir(parents=True, exist_ok=True)
    with tqdm(total=EPOCHS * len(missing), unit="epoch") as bar:
        for name, estimator in missing:
            bar.set_description(f"{name}, {estimator}")
            new = pd.DataFrame(rows_of(name, estimator, bar))
            rows = pd.concat([rows, new], ignore_index=True) if len(rows) else new
            write_text(path, rows.to_csv(index=False, float_format="%.6g"))
    caption = (
        f"Held-out nats per observation after {EPOCHS} epochs; {HELD_OUT} test observations; ± is the standard "
        f"deviation over {len(SEEDS)} seeds of the fits. Differences of ELBOs are paired by seed, ± standard error. "
        "Relaxations are at the temperature of the best mean ELBO on validation data. CLL and HLL: log p(x | z) and "
        "log q(z | x) at the true z. Fano factors of the posterior: range over observations and units, mean over "
        "seeds. On the COM-Poisson tasks, arrival times have Poisson latents in training. Fitted at commit "
        f"{', '.join(sorted(set(rows['commit'].dropna())))}."
    )
    print(write_page(out / "hitchhiker.md", table(rows), caption, "python -m experiments.hitchhiker"))


if __name__ == "__main__":
    script(main)
