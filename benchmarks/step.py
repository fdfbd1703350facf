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
    taken: dict[Any, float] = {}
    with pyro.validation_enabled(False), pyro.get_param_store().scope():
        for network, batch, repeats in (("linear", SMALL, 25), ("conv", BATCH, 7)):
            cases: dict[Any, Callable[[], object]] = {}
            for name in progress(list(VARIANTS), f"preparing {network} networks"):
                steps = steps_of(name, x[:batch], data, network)
                cases |= {(network, name, kind): step for kind, step in steps.items()}
            if network == "conv":
                cases["exact KL"] = forward_backward(exact_kl, *parameters())
                cases["COM-Poisson, sample"] = forward_backward(com_poisson, *parameters())
                cases["COM-Poisson, KL"] = forward_backward(com_poisson_kl, *parameters())
            taken |= seconds(cases, repeats=repeats)

    def columns(network: str, name: str) -> dict[str, object]:
        t = {kind: taken.get((network, name, kind)) for kind in ("Pyro", "by hand", "networks", "bfloat16")}
        assert t["Pyro"] and t["networks"] and t["bfloat16"]
        return {
            f"{network}: step, ms": round(1e3 * t["Pyro"], 1),
            "/ G-VAE's": round(t["Pyro"] / taken[network, "G-VAE", "Pyro"], 2),
            "/ by hand": round(t["Pyro"] / t["by hand"], 2) if t["by hand"] else "",
            "networks alone, ms": round(1e3 * t["networks"], 1),
            "in bfloat16, ms": round(1e3 * t["bfloat16"], 1),
        }

    rows = []
    for name in VARIANTS:
        linear = columns("linear", name)
        renamed = {f"linear {key}" if key[0] == "/" else key: value for key, value in list(linear.items())[:3]}
        rows.append({"variant": name, **columns("conv", name), **renamed})
    share = taken["exact KL"] / taken["conv", "EX-C", "Pyro"]
    both = taken["COM-Poisson, sample"] + taken["COM-Poisson, KL"]
    of_step = both / taken["conv", "CMP", "Pyro"]
    report(
        "step",
        rows,
        f"Training steps on {data}, 256 latents, {RELAXATION}; batch {BATCH} with convolutional networks, {SMALL} with "
        f"linear ones; the exact KL alone, forward and backward, takes {share:.1%} of EX-C's step, a COM-Poisson's "
        f"sample and KL {1e3 * both:.0f} ms, {of_step:.1%} of CMP's",
    )


if __name__ == "__main__":
    tyro.cli(main)
