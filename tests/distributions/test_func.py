"""log_prob and KL under torch.func, against torch's own operations and against autograd."""

import pytest
import torch
from torch import func
from torch.distributions import NegativeBinomial, Poisson

from pyro_nbvae.distributions import negative_binomial_kl, shared_dispersion_kl
from pyro_nbvae.distributions.families.negative_binomial import log_prob as negative_binomial_log_prob
from pyro_nbvae.distributions.families.poisson import log_prob as poisson_log_prob

torch_version = {
    "negative binomial": lambda z, r, logits: NegativeBinomial(r, logits=logits, validate_args=False).log_prob(z),
    "poisson": lambda z, r: Poisson(r, validate_args=False).log_prob(z),
}
R = torch.tensor([0.3, 1.0, 7.0], dtype=torch.float64)
L = torch.tensor([0.4, -1.0, 0.2], dtype=torch.float64)
Z = torch.tensor([0.0, 2.0, 11.0], dtype=torch.float64)

# name: (function, the same in torch's operations or None, arguments that are differentiated)
CASES = {
    "negative binomial": (
        lambda r, logits: negative_binomial_log_prob(Z, r, logits),
        torch_version["negative binomial"],
        (R, L),
    ),
    "poisson": (lambda r: poisson_log_prob(Z, r), torch_version["poisson"], (R,)),
    "kl": (negative_binomial_kl, None, (R, L, R.flip(0), L.flip(0))),
    "shared kl": (shared_dispersion_kl, None, (R, L, L.flip(0))),
}


@pytest.fixture(params=CASES)
def case(request):
    """A function to a number, what it should be, and its arguments."""
    function, theirs, arguments = CASES[request.param]

    def of(f):
        return lambda *a: (torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64) * f(*a)).sum()

    reference = of(function) if theirs is None else of(lambda *a: theirs(Z, *a))
    return of(function), reference, arguments


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-8)


def test_gradients_forward_and_backward(case):
    function, reference, arguments = case
    every = tuple(range(len(arguments)))
    expected = torch.autograd.functional.jacobian(reference, arguments)
    for transform in (func.grad, func.jacrev, func.jacfwd):
        close(transform(function, argnums=every)(*arguments), expected)
    tangents = tuple(torch.linspace(-1, 1, 3, dtype=torch.float64) + k for k in range(len(arguments)))
    value, tangent = func.jvp(function, arguments, tangents)
    close(value, reference(*arguments))
    close(tangent, sum((t * e).sum() for t, e in zip(tangents, expected, strict=True)))


@pytest.mark.parametrize("outer", [func.jacfwd, func.jacrev])
@pytest.mark.parametrize("inner", [func.jacfwd, func.jacrev])
def test_hessians_forward_and_backward(case, outer, inner):
    function, reference, arguments = case
    every = tuple(range(len(arguments)))
    expected = torch.autograd.functional.hessian(reference, arguments)
    close(outer(inner(function, argnums=every), argnums=every)(*arguments), expected)
    assert any(block.any() for row in expected for block in row)


def test_vmap(case):
    """Over a batch of arguments, over one of them, and of per-sample gradients."""
    function, _, arguments = case
    batch = [torch.stack([a, a * 1.1, a * 0.9]) for a in arguments]
    close(func.vmap(function)(*batch), torch.stack([function(*row) for row in zip(*batch, strict=True)]))
    one = func.vmap(function, in_dims=(0, *(None for _ in arguments[1:])))(batch[0], *arguments[1:])
    close(one, torch.stack([function(row, *arguments[1:]) for row in batch[0]]))
    second = func.vmap(function, in_dims=(1, *(None for _ in arguments[1:])))(batch[0].T, *arguments[1:])
    close(second, one)
    gradients = func.vmap(func.grad(function))(*batch)
    close(gradients, torch.stack([func.grad(function)(*row) for row in zip(*batch, strict=True)]))
