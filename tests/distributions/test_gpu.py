"""The kernels of a GPU, checked without one."""

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from pyro_nbvae.distributions.kernels.reference import TAIL

triton = pytest.importorskip("triton")
gpu = pytest.importorskip("pyro_nbvae.distributions.kernels.gpu")


def test_kernels_in_the_interpreter():
    """Triton's interpreter has to be chosen before Triton is imported: so in a process of its own."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    options = ["-q", "-W", "ignore", "-p", "no:cacheprovider", "-p", "no:xdist", "--override-ini=addopts="]
    command = [sys.executable, "-m", "pytest", *options, str(Path(__file__).with_name("gpu_on_cpu.py"))]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-6000:]


def compiled(kernel, arguments, options):
    """Return the registers and the bytes of stack that a kernel takes on an H100, without one."""
    from triton.backends import nvidia
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    types = {torch.int64: "*i64", torch.float32: "*fp32"}
    values = dict(zip(kernel.arg_names, arguments, strict=False)) | options
    kinds = {name: types.get(getattr(values[name], "dtype", None), "i32") for name in kernel.arg_names}
    kinds |= {p.name: "constexpr" for p in kernel.params if p.is_constexpr}
    constants = {name: values[name] for name, kind in kinds.items() if kind == "constexpr"}
    target = GPUTarget("cuda", 90, 32)
    built = triton.compile(ASTSource(kernel, kinds, constants), target=target, options={"num_warps": 1})
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        command = [Path(nvidia.__file__).with_name("bin") / "cuobjdump", "-res-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return int(re.search(r"REG:(\d+)", text)[1]), int(re.search(r"STACK:(\d+)", text)[1])


def launched(call):
    """Return the kernels that a call launches, with their arguments and options."""
    found = []

    def launch(kernel, like, *arguments, **options):
        found.append((kernel, (*arguments, *gpu.layout(like.shape)), options | {"SIZE": gpu.SIZE}))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu, "launch", launch)
        call()
    return found


X, T, SEED = (torch.empty(shape, device="meta") for shape in ((512, 256), (), ()))
CALLS = {
    **{
        f"arrivals, {i}, {h}, {r is None}": (lambda i=i, h=h, r=r: gpu.arrivals(SEED.long(), T, r, X, i, h))
        for i in TAIL
        for h in (False, True)
        for r in (None, X)
    },
    **{f"races, {h}": (lambda h=h: gpu.races(SEED.long(), T, X, X, X, h)) for h in (False, True)},
    "negative_binomial_log_q_over_p": lambda: gpu.negative_binomial_log_q_over_p(*[X] * 9),
    **{
        name: (lambda name=name, number=number: getattr(gpu, name)(*[X] * number))
        for name, number in {
            "com_poisson_integers": 3,
            "negative_binomial_integers": 3,
            "com_poisson_mean": 2,
            "com_poisson_variance": 2,
            "com_poisson_entropy": 2,
            "negative_binomial_entropy": 2,
            "com_poisson_kl": 4,
            "negative_binomial_kl": 4,
            "shared_dispersion_kl": 3,
            "poisson_kl": 2,
            "negative_binomial_log_mass": 3,
            "poisson_log_mass": 2,
        }.items()
    },
}


@pytest.mark.parametrize("name", CALLS)
def test_a_kernel_compiles_without_a_stack(name):
    """A warp of every scheduler needs registers: 128 in double precision, 80 in single leave room for 16 and 24."""
    ((kernel, arguments, options),) = launched(CALLS[name])
    registers, stack = compiled(kernel, arguments, options)
    in_double = name in ("negative_binomial_kl", "negative_binomial_log_q_over_p")
    assert stack == 0 and registers <= (128 if in_double else 80)


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
