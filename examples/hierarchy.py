"""Two layers: a continuous latent variable above spike counts.

    python -m examples.hierarchy

p(h) p(z | h) p(x | z): a standard normal h of 2 dimensions sets the logits of 16 negative binomial counts z, and the
counts generate the data. One guide is top-down, q(h | x) q(z | h, x), in the model's order: the KL at z is analytic,
given h. The other is bottom-up, q(z | x) q(h | z), in another order: AnalyticKL_ELBO raises an error, and
MonteCarloKL_ELBO samples both layers together.
"""

import pyro
import pyro.distributions as dist
import torch
import tyro
from pyro.infer import SVI, Trace_ELBO
from pyro.nn import PyroModule
from pyro.optim import ClippedAdam
from torch import Tensor, nn
from tqdm.auto import trange

from pyro_nbvae.distributions import ArrivalTimes, RelaxedNegativeBinomial
from pyro_nbvae.infer import AnalyticKL_ELBO, MonteCarloKL_ELBO

WIDTH, UNITS, SIZE = 2, 16, 20


class Model(PyroModule):
    def __init__(self) -> None:
        super().__init__()
        self.logits = nn.Linear(WIDTH, UNITS)
        self.decoder = nn.Linear(UNITS, SIZE)

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            h = pyro.sample("h", dist.Normal(torch.zeros(WIDTH), 1.0).to_event(1))
            z = pyro.sample("z", RelaxedNegativeBinomial(2.0, logits=self.logits(h)).to_event(1))
            pyro.sample("x", dist.Normal(self.decoder(z), 1.0).to_event(1), obs=x)


class Guide(PyroModule):
    def __init__(self, bottom_up: bool) -> None:
        super().__init__()
        self.bottom_up = bottom_up
        self.relaxation = ArrivalTimes(0.24)
        self.to_z = nn.Linear(SIZE + (0 if bottom_up else WIDTH), 2 * UNITS)
        self.to_h = nn.Linear(UNITS if bottom_up else SIZE, 2 * WIDTH)

    def sample_h(self, below: Tensor) -> Tensor:
        location, log_scale = (3 * torch.tanh(a / 3) for a in self.to_h(below).chunk(2, -1))
        return pyro.sample("h", dist.Normal(location, log_scale.exp()).to_event(1))

    def sample_z(self, inputs: Tensor) -> Tensor:
        log_r, logits = (3 * torch.tanh(a / 3) for a in self.to_z(inputs).chunk(2, -1))
        q = RelaxedNegativeBinomial(log_r.exp(), logits=logits, relaxation=self.relaxation)
        return pyro.sample("z", q.to_event(1))

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            if self.bottom_up:
                self.sample_h(torch.log1p(self.sample_z(x)))
            else:
                h = self.sample_h(x)
                self.sample_z(torch.cat([x.expand(*h.shape[:-1], -1), h], -1))


def main(steps: int = 1500) -> None:
    """Fit both guides to data drawn from the model, and compare their bounds with integer counts.

    Args:
        steps: training steps for each guide, with batches of 100.
    """
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    with torch.no_grad():
        h = torch.randn(2000, WIDTH)
        z = RelaxedNegativeBinomial(2.0, logits=h @ (0.5 * torch.randn(WIDTH, UNITS)) - 1).sample()
        x = z @ (0.3 * torch.randn(UNITS, SIZE)) + torch.randn(2000, SIZE)
    for bottom_up, elbo in ((False, AnalyticKL_ELBO()), (True, MonteCarloKL_ELBO(2))):
        pyro.clear_param_store()
        torch.manual_seed(1)
        model, guide = Model(), Guide(bottom_up)
        svi = SVI(model, guide, ClippedAdam({"lr": 5e-3}), loss=elbo)
        for _ in trange(steps, desc="bottom-up" if bottom_up else "top-down"):
            svi.step(x[torch.randint(len(x), (100,))])
        guide.relaxation = None
        bound = sum(-Trace_ELBO().loss(model, guide, x) for _ in range(20)) / 20 / len(x)
        print(f"{'bottom-up' if bottom_up else 'top-down'} guide: {bound:.1f} nats per observation")
    try:
        AnalyticKL_ELBO().loss(model, guide, x)
    except ValueError as error:
        print("AnalyticKL_ELBO on the bottom-up guide:", error)


if __name__ == "__main__":
    tyro.cli(main)
