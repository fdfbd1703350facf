"""A state-space program over counts, relaxed without changing the program.

    python -m examples.state_space

A population of spikes changes in time: z_t ~ Poisson(0.9 z_{t-1} + 0.5), observed as x_t ~ Normal(z_t, 1). Model and
guide are written with exact counts, which have no pathwise gradient. ``RelaxReparam`` adds one without changing them;
the score function (Pyro's Trace_ELBO on the unchanged programs) needs none, but is noisier. Both take the same number
of steps, and both bounds are those of the exact program.
"""

from pathlib import Path

import pyro
import pyro.distributions as dist
import torch
import tyro
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from pyro.optim import ClippedAdam
from torch import Tensor
from torch.distributions import constraints
from tqdm.auto import trange

from pyro_nbvae.distributions import ArrivalTimes
from pyro_nbvae.infer import RelaxReparam
from pyro_nbvae.study.plots import Panel, plot_curves

LENGTH = 20


def model(x: Tensor) -> None:
    rate = torch.tensor(3.0)
    for t in pyro.markov(range(len(x))):
        z = pyro.sample(f"z_{t}", dist.Poisson(rate))
        pyro.sample(f"x_{t}", dist.Normal(z, 1.0), obs=x[t])
        rate = 0.9 * z + 0.5


def guide(x: Tensor) -> None:
    rate = pyro.param("rate", lambda: torch.full((len(x),), 3.0), constraint=constraints.positive)
    for t in range(len(x)):
        pyro.sample(f"z_{t}", dist.Poisson(rate[t]))


def simulate() -> Tensor:
    """Return the observations of one run of the model."""
    z, seen = torch.tensor(3.0), []
    for _ in range(LENGTH):
        z = torch.poisson(0.9 * z + 0.5)
        seen.append(z + torch.randn(()))
    return torch.stack(seen)


def main(steps: int = 300, out: Path = Path("runs/examples")) -> None:
    """Fit the program both ways and plot the bounds.

    Args:
        steps: training steps for each way.
        out: folder of the picture.
    """
    pyro.set_rng_seed(3)
    x = simulate()
    relax = RelaxReparam(ArrivalTimes(0.24))
    config = {f"z_{t}": relax for t in range(LENGTH)}
    relaxed = [poutine.reparam(program, config=config) for program in (model, guide)]
    every = max(1, steps // 20)
    curves = {}
    for name, programs in (("relaxed counts, pathwise", relaxed), ("exact counts, score function", [model, guide])):
        pyro.clear_param_store()
        pyro.set_rng_seed(4)
        svi = SVI(*programs, ClippedAdam({"lr": 0.02}), loss=Trace_ELBO(num_particles=4))
        taken, bounds = [], []
        for step in trange(steps + 1, desc=name):
            if step % every == 0:
                taken.append(float(step))
                bounds.append(sum(-Trace_ELBO().loss(model, guide, x) for _ in range(20)) / 20)
            svi.step(x)
        curves[name] = (taken, bounds)
        print(f"{name}: bound {bounds[-1]:.1f} nats after {taken[-1]:.0f} steps, from {bounds[0]:.1f}")
    out.mkdir(parents=True, exist_ok=True)
    panel = Panel(curves, "step", "ELBO of the exact program, nats")
    plot_curves([panel], out / "state_space.png", title="Spike counts over time")
    print(out / "state_space.png")


if __name__ == "__main__":
    tyro.cli(main)
