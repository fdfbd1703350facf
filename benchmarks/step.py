"""Time of a training step of every variant, compared with the same step without Pyro and with the networks alone.

python -m benchmarks.step [--data mnist]    some minutes on two cores
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import torch
import tyro
from torch import Tensor, nn

from benchmarks.measure import device, forward_backward, progress, report, seconds
from benchmarks.samplers import com_poisson, com_poisson_kl, exact_kl, parameters
from pyro_nbvae.batching import to_floats
from pyro_nbvae.distributions import (
    ArrivalTimes,
    RelaxedNegativeBinomial,
    RelaxedPoisson,
    negative_binomial_kl,
    poisson_kl,
    shared_dispersion_kl,
)
from pyro_nbvae.distributions.bounds import rate_multiplier
from pyro_nbvae.study.build import build, resolve
from pyro_nbvae.study.config import configure
from pyro_nbvae.study.data import load
from pyro_nbvae.study.variants import VARIANTS

RELAXATION = ArrivalTimes(0.1)
BATCH, SMALL = 512, 200
# Steps before the measurement, so that the counts are those of a model that has started to learn.
BEGUN = 20

Loss = Callable[[Tensor], Tensor]


def _negative_binomial(model: Any, guide: Any, x: Tensor, shared: bool) -> tuple[Tensor, Tensor]:
    log_r, logits = model.prior.log_total_count, model.prior.logits
    heads = guide.encode(x)
    r_q = (log_r.expand_as(heads[0]) if shared else log_r + heads[0]).exp()
    l_q = logits + heads[-1]
    z = RelaxedNegativeBinomial(r_q, logits=l_q, relaxation=RELAXATION).rsample()
    kl = shared_dispersion_kl(r_q, l_q, logits) if shared else negative_binomial_kl(r_q, l_q, log_r.exp(), logits)
    return z, kl


def _poisson(model: Any, guide: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    rate = model.prior.mean * rate_multiplier(guide.encode(x)[0])
    return RelaxedPoisson(rate, relaxation=RELAXATION).rsample(), poisson_kl(rate, model.prior.mean)


def _gaussian(model: Any, guide: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    mean, log_scale = guide.encode(x)
    variance = torch.exp(2 * log_scale)
    z = mean + log_scale.exp() * torch.randn_like(mean)
    return z, 0.5 * (mean.square() + variance - 1) - log_scale


BY_HAND: dict[str, Callable[[Any, Any, Tensor], tuple[Tensor, Tensor]]] = {
    "DS-C": lambda model, guide, x: _negative_binomial(model, guide, x, shared=True),
    "EX-C": lambda model, guide, x: _negative_binomial(model, guide, x, shared=False),
    "P-VAE": _poisson,
    "G-VAE": _gaussian,
}


def stepper(parameters: list[nn.Parameter], loss_of: Loss, x: Tensor) -> Callable[[], Tensor]:
    """Return a function that takes one step of Adam with clipped gradients, as in training."""
    optimizer = torch.optim.Adam(parameters, lr=1e-3)

    def step() -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        loss = loss_of(x)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 25.0)
        optimizer.step()
        return loss

    return step


def steps_of(name: str, x: Tensor, data: str, network: Any = "conv") -> dict[str, Callable[[], Tensor]]:
    """Return the steps of a variant: through Pyro, by hand (if it is in BY_HAND), and of its networks alone."""
    torch.manual_seed(0)
    shape = tuple(x.shape[1:])
    config = resolve(configure(name, data=data, encoder=network, decoder=network), shape)
    model, guide, elbo = build(config, shape)
    if isinstance(guide.relaxation, ArrivalTimes):
        guide.relaxation = RELAXATION
    through_pyro = elbo(model, guide).to(x.device)
    learned = list(through_pyro.parameters())
    beta = model.loss_scale
    scale = beta / len(x)

    def by_hand(x: Tensor) -> Tensor:
        z, kl = BY_HAND[name](model, guide, x)
        return ((x - model.decode(z)).square().sum() / beta + kl.sum()) * scale

    def networks(x: Tensor) -> Tensor:
        h = guide.encoder(x)
        return (x - model.decoder(h[:, 0])).square().sum() * scale + 1e-3 * h.square().sum() * scale

    steps = {"Pyro": stepper(learned, lambda x: through_pyro(x) * scale, x)}
    for _ in range(BEGUN):
        steps["Pyro"]()

    def in_bfloat16(x: Tensor) -> Tensor:
        model.mixed_precision = guide.mixed_precision = True
        loss = through_pyro(x) * scale
        model.mixed_precision = guide.mixed_precision = False
        return loss

    steps["bfloat16"] = stepper(learned, in_bfloat16, x)
    if name in BY_HAND:
        steps["by hand"] = stepper(learned, by_hand, x)
    steps["networks"] = stepper(learned, networks, x)
    return steps


def main(data: str = "mnist") -> None:
    """Time training steps.

    Args:
        data: name of the data set; its first 512 images are used.
    """
    x = to_floats(load(data).train[:BATCH]).to(device())
    with pyro.validation_enabled(False), pyro.get_param_store().scope():
        steps = {name: steps_of(name, x, data) for name in progress(list(VARIANTS), "preparing")}
        cases = {(name, kind): step for name, kinds in steps.items() for kind, step in kinds.items()}
        cases["exact KL", "alone"] = forward_backward(exact_kl, *parameters())
        cases["COM-Poisson", "sample"] = forward_backward(com_poisson, *parameters())
        cases["COM-Poisson", "KL"] = forward_backward(com_poisson_kl, *parameters())
        small = steps_of("G-VAE", x[:SMALL], data, "linear")
        cases |= {("linear", kind): small[kind] for kind in ("Pyro", "by hand")}
        taken = seconds(cases, repeats=9)  # type: ignore[arg-type]
    rows = []
    for name, kinds in steps.items():
        t = {kind: taken[name, kind] for kind in kinds}  # type: ignore[index]
        rows.append(
            {
                "variant": name,
                "step, ms": round(1e3 * t["Pyro"], 1),
                "by hand, ms": round(1e3 * t["by hand"], 1) if "by hand" in t else "",
                "Pyro / by hand": round(t["Pyro"] / t["by hand"], 3) if "by hand" in t else "",
                "networks alone, ms": round(1e3 * t["networks"], 1),
                "step / G-VAE's": round(t["Pyro"] / taken["G-VAE", "Pyro"], 3),  # type: ignore[index]
                "in bfloat16, ms": round(1e3 * t["bfloat16"], 1),
            }
        )
    share = taken["exact KL", "alone"] / taken["DS-C", "Pyro"]  # type: ignore[index]
    t = {kind: taken["linear", kind] for kind in ("Pyro", "by hand")}  # type: ignore[index]
    rows.append(
        {
            "variant": f"G-VAE, linear networks, batch {SMALL}",
            "step, ms": round(1e3 * t["Pyro"], 1),
            "by hand, ms": round(1e3 * t["by hand"], 1),
            "Pyro / by hand": round(t["Pyro"] / t["by hand"], 3),
        }
    )
    both = taken["COM-Poisson", "sample"] + taken["COM-Poisson", "KL"]  # type: ignore[index]
    of_step = both / taken["CMP", "Pyro"]  # type: ignore[index]
    note = f"Training steps on {data}, batch {BATCH}, 256 latents, {RELAXATION}"
    report(
        "step",
        rows,
        f"{note}; the exact KL alone, forward and backward, takes {share:.1%} of DS-C's "
        f"step, a COM-Poisson's sample and KL {1e3 * both:.0f} ms, {of_step:.1%} of CMP's",
    )


if __name__ == "__main__":
    tyro.cli(main)
