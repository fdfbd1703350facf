r"""Sums over windows of counts, for the families that are defined by their weights.

A family over the counts 0, 1, 2, ... is :math:`q(k) = w_k / \sum_j w_j`. With its scores :math:`T_k = \partial \log w_k
/ \partial \theta`, every expectation and every derivative is a sum over a window of counts,

.. math:: E[f] = \sum_k q_k f_k, \qquad \frac{\partial E[f]}{\partial \theta} = \sum_k q_k (T_k - E[T]) f_k,

exact up to the mass outside the window, :math:`e^{-18}` in single and :math:`e^{-36}` in double precision. The elements
of a tensor are grouped by their windows: on a CPU by their first counts too, so that functions of the count are
computed once for a group, in pieces that fit in a core's cache; on a GPU by their widths only, so that there are few
groups and the host seldom waits for the device.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from pyro_nbvae.distributions.elementwise import elementwise, unexpanded
from pyro_nbvae.distributions.relaxations.base import DivergedError
from pyro_nbvae.distributions.relaxations.noise import number_in_piece, running_sum
from pyro_nbvae.distributions.threads import compiled, in_pieces, is_compiled_for, unsplit

# A window leaves out mass of exp(-NATS), up to a small factor.
NATS = {torch.float32: 18.0, torch.float64: 36.0}
# Lower limit of log weights relative to the largest: single-precision numbers below 1e-38 are slow.
LOWEST = -80.0
# Devices on which the elements of a group share their counts.
SHARING = ("cpu",)
# Largest width of a window: a Poisson reaches it at a mean of about 4e9.
WIDEST = 1 << 20


class Weights(Protocol):
    """Interface of a count family, as functions of its parameters.

    :class:`~pyro_nbvae.distributions.CountDistribution` provides it. A family with the weights of a
    Conway-Maxwell-Poisson may define ``as_com_poisson(*parameters)``, which returns the rate and nu; its own parameters
    must be the first of these. On a CPU it then uses the compiled loops.
    """

    def window(self, nats: float, *parameters: Tensor) -> tuple[Tensor, Tensor]: ...

    def log_weight(self, k: Tensor, *parameters: Tensor) -> Tensor: ...

    def scores(self, k: Tensor, *parameters: Tensor) -> tuple[Tensor | None, ...]: ...


def _sizes() -> Iterator[int]:
    size = 4
    while True:
        yield size
        if size > 4:
            yield size + size // 2
        size *= 2


def check_width(widest: float) -> None:
    """Raise DivergedError if the width of a window is not finite or is above WIDEST."""
    if not widest <= WIDEST:
        raise DivergedError(
            f"a count distribution needs a window of {widest:.3g} counts: its mean or its variance is too large"
            if math.isfinite(widest)
            else "a parameter of a count distribution is not finite"
        )


def groups(low: Tensor, high: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Group elements of similar windows, and cut the groups into pieces that fit in a core's cache.

    Args:
        low, high: first and last count of each element's window, (n,).

    Yields:
        Counts, (width, 1) if the elements share them (the same tensor for all pieces of a group) and else (width, m),
        and the indices (m,) of elements whose windows lie within them; each element once.

    Raises:
        DivergedError: for windows that are not finite, end before they begin, or are wider than 2^20 counts.
    """
    if not len(low):
        return
    widths = high - low
    most, least, last = torch.stack([widths.max(), widths.min(), high.max()]).tolist()
    check_width(most + 1)
    if least < 0:
        raise DivergedError("a count distribution's window ends before it begins: return (first, last)")
    if last > 2 / torch.finfo(high.dtype).eps:
        raise DivergedError(f"a count distribution has counts up to {last:.3g}: too large to be exact in {high.dtype}")
    low, high = low.clamp(min=0).floor(), high.ceil()
    yield from (_sharing if low.device.type in SHARING else _by_width)(low, high)


@functools.lru_cache(maxsize=8)
def _widths(dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.tensor(list(itertools.takewhile(lambda size: size < 2 * WIDEST, _sizes())), dtype=dtype, device=device)


def _by_width(low: Tensor, high: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    widths = _widths(low.dtype, low.device)
    kind, order = torch.bucketize(high - low + 1, widths).sort()
    ends = torch.searchsorted(kind, torch.arange(len(widths), device=low.device), right=True).tolist()
    for size, start, end in zip(_sizes(), [0, *ends], ends, strict=False):
        for chosen in order[start:end].split(number_in_piece(size, low.device)) if end > start else ():
            yield low[chosen] + torch.arange(size, dtype=low.dtype, device=low.device)[:, None], chosen


def _sharing(low: Tensor, high: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    left: Tensor | None = None  # all
    for size in _sizes():
        if left is not None and not len(left):
            return
        # windows start at multiples of a quarter of their size, so that there are few different ones
        begin = (low / (size // 4)).floor() * (size // 4)
        fits = high < begin + size
        inside = fits.nonzero()[:, 0]
        if len(inside):
            chosen, begin = inside if left is None else left[inside], begin[inside]
            firsts = begin.unique().tolist() if bool(begin.any()) else [0.0]
            for first in firsts:
                k = torch.arange(size, dtype=low.dtype, device=low.device)[:, None] + first
                group = chosen[begin == first] if len(firsts) > 1 else chosen
                for part in group.split(number_in_piece(size, low.device)):
                    yield k, part
            outside = (~fits).nonzero()[:, 0]
            left = outside if left is None else left[outside]
            low, high = low[outside], high[outside]


def masses(family: Weights, k: Tensor, *parameters: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return log weights and masses of counts ``k``, both (width, n), and the log normalizers, (n,).

    ``k`` is (width, 1) or (width, n).
    """
    log_weight = family.log_weight(k, *parameters)
    top = log_weight.detach().amax(0)
    if bool(top.isnan().any()):
        first = k.expand_as(log_weight)[log_weight.detach().isnan()][0]
        name = getattr(family, "__name__", type(family).__name__)
        raise DivergedError(f"{name}.log_weight is nan at a count of {float(first):g}: return -inf for no mass")
    weight = (log_weight - top).clamp(min=LOWEST).exp()
    total = weight.sum(0)
    return log_weight, weight * total.reciprocal(), top + total.log()


class Integrand(Protocol):
    """The integrand of an expectation: a function of the count, of log q and of its own arguments."""

    def tables(self, k: Tensor, *arguments: Tensor) -> tuple[Tensor, ...]:
        """Return the tensors (width, n) that it needs, from counts (width, 1) or (width, n) and its arguments (n,).

        Both may also be of one flat shape; each element then belongs to a count and its arguments.
        """
        ...

    def value(self, k: Tensor, log_mass: Tensor, *tables: Tensor) -> Tensor:
        """Return f_k, (width, n), from log q_k."""
        ...

    def gradient(self, *tables: Tensor) -> tuple[Tensor | None, ...]:
        """Return the derivatives in its arguments, (width, n)."""
        ...


@runtime_checkable
class LogRatio(Integrand, Protocol):
    """The integrand log q - log p; its tables are log p and the derivatives of log p."""

    smooth: bool  # whether log p is a smooth function of the count, from 1 on


def _elementwise(
    work: Callable[..., tuple[Tensor, ...]],
    window: Callable[..., tuple[Tensor, Tensor]],
    parameters: int,
    tables: Callable[..., tuple[Tensor, ...]],
    compiled_form: Callable[..., list[Tensor] | None] | None = None,
) -> Callable[..., Tensor]:
    """Make an elementwise function that is a sum over windows.

    Args:
        work: maps the counts (width, 1) or (width, m), a family's parameters (m,) each, and tables (width, m) to the
            value and the derivatives in all arguments, (m,) each.
        window: maps the parameters to the windows.
        parameters: number of arguments that are the family's parameters.
        tables: maps the counts and the other arguments to the tables.
        compiled_form: maps the parameters, the other arguments (both flat) and each element's index in the latter to
            the value and the derivatives, by a compiled loop; returns None if that would not be faster.
    """

    def run(*arguments: Tensor) -> tuple[Tensor, ...]:
        shape = arguments[0].shape
        own, (rest, column) = (
            [a.reshape(-1) for a in arguments[:parameters]],
            unexpanded(arguments[parameters:], shape),
        )
        if compiled_form is not None and not torch.is_grad_enabled():
            with unsplit():
                direct = compiled_form(own, rest, column)
            if direct is not None:
                return tuple(r.reshape(shape) for r in direct)
        if not own[0].numel():
            return tuple(torch.zeros_like(arguments[0]) for _ in range(1 + len(arguments)))
        with torch.no_grad():
            bounds = window(NATS[arguments[0].dtype], *(a.detach() for a in own))
        # a prior's parameters are the same for every observation, so one small table serves a batch
        few = rest and 4 * len(rest[0]) <= len(own[0])
        results: list[tuple[Tensor, ...]] = []
        indices: list[Tensor] = []
        last: Tensor | None = None
        for k, index in groups(*bounds):
            if few and k.shape[1] == 1:
                if k is not last:
                    table, last = [t.expand(len(k), len(rest[0])) for t in tables(k, *rest)], k
                read = [t.index_select(1, column[index]) for t in table]
            else:
                read = list(tables(k, *(a[column[index]] for a in rest)))
            results.append(work(k, *(a[index] for a in own), *read))
            indices.append(index)
        order = torch.cat(indices)
        place = torch.empty_like(order)
        place[order] = torch.arange(len(order), device=order.device)
        return tuple(torch.cat(part)[place].reshape(shape) for part in zip(*results, strict=True))

    def gradient(*arguments_and_wanted: Any) -> tuple[Tensor, ...]:
        return run(*arguments_and_wanted[:-1])[1:]

    return elementwise(run, gradient)


@functools.cache
def log_normalizer(family: Weights, parameters: int) -> Callable[..., Tensor]:
    r"""Return the function :math:`\log \sum_k w_k` of the parameters; elementwise, differentiable twice."""

    def work(k: Tensor, *own: Tensor) -> tuple[Tensor, ...]:
        _, q, log_sum = masses(family, k, *own)
        scores = family.scores(k, *own)
        return log_sum, *(torch.zeros_like(log_sum) if t is None else (q * t).sum(0) for t in scores)

    return _elementwise(work, family.window, parameters, lambda k: ())


@functools.cache
def expectation(family: Weights, parameters: int, integrand: Integrand) -> Callable[..., Tensor]:
    r"""Return the function :math:`\sum_k q_k f_k` of a family's parameters and an integrand's arguments.

    It is elementwise and differentiable twice. That ``f`` may depend on :math:`\log q_k` adds nothing to the
    derivative: :math:`E[\partial \log q_k] = 0`.
    """

    def work(k: Tensor, *arguments: Tensor) -> tuple[Tensor, ...]:
        own, tables = arguments[:parameters], arguments[parameters:]
        log_weight, q, log_sum = masses(family, k, *own)
        f = integrand.value(k, log_weight - log_sum, *tables)
        value = (q * f).sum(0)
        centred = q * (f - value)
        derivatives = [None if t is None else (centred * t).sum(0) for t in family.scores(k, *own)]
        derivatives += [None if d is None else (q * d).sum(0) for d in integrand.gradient(*tables)]
        return value, *(torch.zeros_like(value) if d is None else d for d in derivatives)

    form = None
    if hasattr(family, "as_com_poisson") and isinstance(integrand, LogRatio):
        form = functools.partial(_compiled_log_ratio, family, integrand)
    return _elementwise(work, family.window, parameters, integrand.tables, form)


def _check_reach(rate: Tensor, nu: Tensor) -> Tensor:
    """Return counts above the windows of Conway-Maxwell-Poissons, (n,); raise DivergedError as :func:`groups`."""
    nats = NATS[rate.dtype] / nu
    spread = nats + torch.sqrt(2 * nats * rate)  # Bernstein's bound
    check_width(2 * float(spread.max()) if len(rate) else 0.0)
    return rate + spread


def _compiled_log_ratio(
    family: Any, integrand: LogRatio, own: list[Tensor], rest: list[Tensor], column: Tensor
) -> list[Tensor] | None:
    rate, nu = family.as_com_poisson(*own)
    if not is_compiled_for(rate):
        return None
    reach = rate.new_zeros(len(rest[0])).scatter_reduce_(0, column, _check_reach(rate, nu), "amax")
    counts = reach.long() + 2
    ends = counts.cumsum(0)
    total = int(ends[-1]) if len(ends) else 0
    if total > 16 * len(rate):  # many counts, few latents: the tables would be most of the work
        return None
    starts, row = ends - counts, torch.repeat_interleave(counts)
    k = torch.arange(total) - starts[row]
    read = [t.expand(total) for t in integrand.tables(k.double(), *(a.double()[row] for a in rest))]
    value, derivatives = torch.empty_like(rate), rate.new_empty(len(rate), 1 + len(read))
    options = torch.stack(read).numpy(), starts.numpy(), integrand.smooth, -NATS[rate.dtype]
    arrays = rate.contiguous(), nu.contiguous(), column.contiguous(), value, derivatives
    in_pieces(compiled().com_poisson_log_ratio, len(rate), *arrays, options=options)
    return [value, *derivatives[:, : len(own)].unbind(1), *derivatives[:, 2:].unbind(1)]


def draw(
    family: Weights, parameters: Sequence[Tensor], uniform: Tensor | None = None, gradient: bool = True
) -> list[Tensor]:
    r"""Draw counts by inversion, with the derivatives of :class:`~pyro_nbvae.distributions.Integer`.

    .. math:: \frac{dz}{d\theta} = -\frac{1}{q_z} \sum_k m_k\, q_k\, (T_k - E[T]), \qquad
        m_k = 1 \text{ below } z,\ \tfrac12 \text{ at } z.

    The sum over all counts is 0, so above the median it is computed from the other side, which avoids cancellation.

    Args:
        parameters: (n,) each.
        uniform: uniform numbers in (0, 1) that determine the counts, (n,); by default they are drawn.
        gradient: whether to compute the derivatives.

    Returns:
        The counts and, with ``gradient``, their derivative in each parameter, (n,) each.

    Raises:
        DivergedError: as :func:`groups`.
    """
    like = parameters[0]
    u = torch.rand_like(like) if uniform is None else uniform
    out = [torch.zeros_like(like) for _ in range(1 + gradient * len(parameters))]

    if hasattr(family, "as_com_poisson") and is_compiled_for(like):
        rate, nu = family.as_com_poisson(*parameters)
        _check_reach(rate, nu)
        arrays = [a.contiguous() for a in (rate, nu, u)], [torch.empty_like(like) for _ in range(3)]
        in_pieces(compiled().com_poisson_integers, len(like), *arrays[0], *arrays[1], options=(-NATS[like.dtype],))
        return arrays[1][: len(out)]
    for k, index in groups(*family.window(NATS[like.dtype], *parameters)):
        own = [p[index] for p in parameters]
        _, q, _ = masses(family, k, *own)
        level = u[index]
        summed = running_sum(q.clone())
        z = k[0] + torch.lt(summed, level, out=summed).sum(0).clamp_(max=len(k) - 1)
        out[0].index_copy_(0, index, z)
        if not gradient:
            continue
        side = torch.where(level > 0.5, -1.0, 1.0).to(level.dtype)  # 1: sum from below
        share_of = (z - k).mul_(side).add_(0.5).clamp_(0, 1).mul_(q)
        scale = side.neg().div_(q.gather(0, (z - k[0]).long()[None])[0].clamp(min=torch.finfo(q.dtype).tiny))
        for derivative, t in zip(out[1:], family.scores(k, *own), strict=True):
            if t is not None:
                part = (share_of * t).sum(0) - share_of.sum(0) * (q * t).sum(0)
                derivative.index_copy_(0, index, part.mul_(scale))
    return out
