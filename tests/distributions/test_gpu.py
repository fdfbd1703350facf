"""The kernels of a GPU, checked without one."""

import os
import subprocess
import sys

import pytest
import torch


def test_kernels_equal_the_textbook_on_their_noise():
    """In Triton's interpreter, which has to be chosen before Triton is imported: so in a process of its own."""
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-m", "tests.distributions.gpu_on_cpu"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stdout.strip() == "ok", done.stderr


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", ["arrival", "gumbel"])
def test_samples_on_a_gpu_have_the_law_of_those_on_a_cpu(name):
    from pyro_nbvae.distributions import RelaxedNegativeBinomial
    from pyro_nbvae.distributions.relaxations import RELAXATIONS

    figures = {}
    for device in ("cpu", "cuda"):
        r = torch.full((200_000,), 0.7, device=device, requires_grad=True)
        logits = torch.full((200_000,), 0.5, device=device, requires_grad=True)
        z = RelaxedNegativeBinomial(r, logits=logits, relaxation=RELAXATIONS[name](0.3)).rsample()
        gradients = torch.autograd.grad(z.sum(), (r, logits))
        figures[device] = torch.stack([z.detach(), z.detach().square(), *gradients]).cpu().double()
    a, b = figures.values()
    error = (a.var(1) + b.var(1)).div(200_000).sqrt()
    assert ((a.mean(1) - b.mean(1)).abs() < 4 * error).all()
