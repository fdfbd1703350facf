"""A whole training step as a CUDA graph: one launch instead of some hundreds.

    python -m examples.cuda_graph

The loss, the gradients, clipping and Adam are captured once and replayed for every batch. Replays need no Python, and
the host launches one graph. Nothing in a step of this package asks the device for a number, and the seeds of the noise
are on the device, so each replay samples new counts. Without CUDA, the sampling is compiled with torch.compile instead,
which also samples new counts at each call.
"""

import time
from collections.abc import Callable

import pyro
import torch
import tyro
from torch import Tensor

from pyro_nbvae.guides import ConwayMaxwellPoissonGuide
from pyro_nbvae.infer import AnalyticKL_ELBO
from pyro_nbvae.models import NegativeBinomialModel

PIXELS, LATENTS, BATCH = 64, 32, 256
# Steps before the capture: they compile the kernels, and create the gradients and the state of Adam.
WARM_UP = 3


def capture(function: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
    """Return the replay of a function as a CUDA graph, and the tensor that each replay overwrites with the result."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UP):
            function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = function()
    return graph.replay, result


def milliseconds(step: Callable[[], object], steps: int) -> float:
    """Return the mean time of a step."""
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(steps):
        step()
    torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - began) / steps


def train(model: NegativeBinomialModel, guide: ConwayMaxwellPoissonGuide, x: Tensor, steps: int) -> None:
    """Train with a graph, and compare the time of a replay with that of a step without it."""
    elbo = AnalyticKL_ELBO()
    # The guide has the prior of the model: each parameter is listed once.
    parameters = list({id(p): p for program in (model, guide) for p in program.parameters()}.values())
    optimizer = torch.optim.Adam(parameters, lr=1e-3, capturable=True)
    static = x[:BATCH].clone()  # a graph reads its input from one place

    def step() -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        loss = elbo.differentiable_loss(model, guide, static) / BATCH
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 25.0)
        optimizer.step()
        return loss.detach()

    replay, loss = capture(step)
    for i in range(steps):
        static.copy_(x[torch.randint(len(x), (BATCH,), device=x.device)])
        replay()
        if i in (0, steps - 1):
            print(f"step {i + 1}: negative ELBO {loss.item():.2f} nats per observation")
    print(f"a step: {milliseconds(replay, 20):.2f} ms as a graph, {milliseconds(step, 20):.2f} ms without")


def main(steps: int = 500) -> None:
    """Train with a CUDA graph (with CUDA), and sample the same batch twice.

    Args:
        steps: training steps with the graph.
    """
    pyro.set_rng_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    # Two groups of observations, each about a pattern of its own.
    patterns = torch.rand(2, PIXELS, device=device)
    x = patterns[torch.randint(2, (2000,), device=device)] + 0.1 * torch.randn(2000, PIXELS, device=device)
    model = NegativeBinomialModel((PIXELS,), latents=LATENTS, decoder="mlp")
    guide = ConwayMaxwellPoissonGuide(model, encoder="mlp")
    model.to(device)
    guide.to(device)
    model.initialize(x)
    guide.initialize(x)
    batch = x[:BATCH].clone()

    def sample() -> Tensor:
        with torch.no_grad():
            return guide.posterior_from(guide.encode(batch)).rsample()

    # A check of values would read them from the device, and a capture does not allow that.
    with pyro.validation_enabled(False):
        if device.type == "cuda":
            train(model, guide, x, steps)
            replay, counts = capture(sample)
            draws = []
            for _ in range(2):
                replay()
                draws.append(counts.clone())
            way = "replays of a CUDA graph"
        else:
            encoded = [output.detach() for output in guide.encode(batch)]

            def sampled(first: Tensor, second: Tensor) -> Tensor:
                with torch.no_grad():
                    return guide.posterior_from((first, second)).rsample()

            # "aot_eager" needs no C++ compiler; leave it out for the default, which fuses operations
            compiled = torch.compile(sampled, backend="aot_eager")
            draws = [compiled(*encoded) for _ in range(2)]
            way = "calls of a compiled function"
    differ = (draws[0] != draws[1]).float().mean().item()
    means = " and ".join(f"{draw.mean().item():.2f}" for draw in draws)
    print(f"two {way} on the same batch: {differ:.0%} of the counts differ, their means are {means}")


if __name__ == "__main__":
    tyro.cli(main)
