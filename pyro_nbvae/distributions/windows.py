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
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.distributions.constraints import Constraint, is_dependent

from pyro_nbvae.distributions.elementwise import KERNELS, Kernel, evaluate, unexpanded
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

    ``key`` is the name of the family in ``PARTS``. Where a parameter violates its constraint, sums are nan.
    """

    key: str
    arg_constraints: dict[str, Constraint]

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


def allowed(family: Any, parameters: Sequence[Tensor]) -> Tensor:
    """Return which elements have parameters that satisfy the family's constraints."""
    constraints = family.arg_constraints.values()
    checks = [c.check(p.detach()) for c, p in zip(constraints, parameters, strict=True) if not is_dependent(c)]
    return functools.reduce(torch.logical_and, checks, torch.ones_like(parameters[0], dtype=torch.bool))


def fits(low: Tensor, high: Tensor) -> Tensor:
    """Return which windows are finite, not empty, at most WIDEST counts wide, and of counts that are exact numbers."""
    width = high - low
    return (width >= 0) & (width < WIDEST) & (high <= 2 / torch.finfo(high.dtype).eps)


def only_where(
    fine: Tensor, work: Callable[..., Sequence[Tensor]], own: Sequence[Tensor], *others: Tensor
) -> list[Tensor]:
    """Return ``work(own, *others)`` of the elements (n,) that are fine, and nan for the others."""
    if bool(fine.all()):
        return list(work(own, *others))
    chosen = fine.nonzero()[:, 0]
    some = work([p[chosen] for p in own], *(x[chosen] for x in others))
    return [torch.full_like(own[0], torch.nan).index_copy(0, chosen, part) for part in some]


def groups(low: Tensor, high: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Group elements of similar windows, and cut the groups into pieces that fit in a core's cache.

    Args:
        low, high: first and last count of each element's window, (n,).

    Yields:
        Counts, (width, 1) if the elements share them (the same tensor for all pieces of a group) and else (width, m),
        and the indices (m,) of elements whose windows lie within them; each element once. All windows must fit
        (:func:`fits`).
    """
    if not len(low):
        return
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
    weight = (log_weight - top).clamp(min=LOWEST).exp().masked_fill(log_weight == -torch.inf, 0)
    total = weight.sum(0)
    return log_weight, weight * total.reciprocal(), top + total.log()


class Integrand(Protocol):
    """The integrand of an expectation: a function of the count, of log q and of its own arguments.

    ``key`` is its name in ``PARTS``.
    """

    key: str

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


def _sums(
    name: str,
    work: Callable[..., tuple[Tensor, ...]],
    family: Weights,
    tables: Callable[..., tuple[Tensor, ...]],
    compiled_form: Callable[..., list[Tensor] | None] | None = None,
) -> Kernel:
    """Make a kernel that is a sum over windows; it is nan where a parameter is not allowed or a window does not fit.

    Args:
        name: name of the kernel.
        work: maps the counts (width, 1) or (width, m), a family's parameters (m,) each, and tables (width, m) to the
            value and the derivatives in all arguments, (m,) each.
        family: its parameters are the first arguments.
        tables: maps the counts and the other arguments to the tables.
        compiled_form: maps the parameters, the other arguments (both flat) and each element's index in the latter to
            the value and the derivatives, by a compiled loop; returns None if that would not be faster.
    """
    parameters = len(family.arg_constraints)

    def run(*arguments: Tensor) -> tuple[Tensor, ...]:
        shape = arguments[0].shape
        own = [a.reshape(-1) for a in arguments[:parameters]]
        rest, column = unexpanded(arguments[parameters:], shape)
        results = None
        if compiled_form is not None and not torch.is_grad_enabled() and is_compiled_for(own[0]):
            with unsplit():
                results = compiled_form(own, rest, column)
        if results is None:
            with torch.no_grad():
                low, high = family.window(NATS[own[0].dtype], *own)
                fine = fits(low, high) & allowed(family, own)
            results = only_where(fine, lambda own, *more: within(own, rest, *more), own, column, low, high)
        return tuple(r.reshape(shape) for r in results)

    def within(own: list[Tensor], rest: list[Tensor], column: Tensor, low: Tensor, high: Tensor) -> list[Tensor]:
        if not own[0].numel():
            return [torch.zeros_like(own[0]) for _ in range(1 + len(own) + len(rest))]
        # a prior's parameters are the same for every observation, so one small table serves a batch
        few = rest and 4 * len(rest[0]) <= len(own[0])
        results: list[tuple[Tensor, ...]] = []
        indices: list[Tensor] = []
        last: Tensor | None = None
        for k, index in groups(low, high):
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
        return [torch.cat(part)[place] for part in zip(*results, strict=True)]

    def gradient(*arguments_and_wanted: Any) -> tuple[Tensor, ...]:
        return run(*arguments_and_wanted[:-1])[1:]

    return Kernel(name, run, gradient)


def _log_normalizer(name: str, family: Weights) -> Kernel:
    def work(k: Tensor, *own: Tensor) -> tuple[Tensor, ...]:
        _, q, log_sum = masses(family, k, *own)
        scores = family.scores(k, *own)
        return log_sum, *(torch.zeros_like(log_sum) if t is None else (q * t).sum(0) for t in scores)

    return _sums(name, work, family, lambda k: ())


def _expectation(name: str, family: Weights, integrand: Integrand) -> Kernel:
    parameters = len(family.arg_constraints)

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
    return _sums(name, work, family, integrand.tables, form)


def _variance(name: str, family: Weights) -> Kernel:
    def work(k: Tensor, *own: Tensor) -> tuple[Tensor, ...]:
        _, q, _ = masses(family, k, *own)
        square = (k - (q * k).sum(0)).square()
        value = (q * square).sum(0)
        centred = q * (square - value)
        scores = family.scores(k, *own)
        return value, *(torch.zeros_like(value) if t is None else (centred * t).sum(0) for t in scores)

    return _sums(name, work, family, lambda k: ())


def _mode(name: str, family: Any) -> Kernel:
    def value(*own: Tensor) -> tuple[Tensor]:
        return (most_probable(family, own),)

    def gradient(*own_and_wanted: Any) -> tuple[Tensor, ...]:
        return tuple(torch.zeros_like(p) for p in own_and_wanted[:-1])

    return Kernel(name, value, gradient)


KERNELS.makers |= {"log_normalizer": _log_normalizer, "expectation": _expectation, "variance": _variance, "mode": _mode}


def log_normalizer(family: Any, *parameters: Tensor) -> Tensor:
    r"""Return :math:`\log \sum_k w_k`; elementwise in the parameters, differentiable twice."""
    return evaluate(f"log_normalizer/{family.key}", *parameters)


def mode(family: Any, *parameters: Tensor) -> Tensor:
    """Return the most probable count; elementwise in the parameters, of which its derivatives are 0."""
    return evaluate(f"mode/{family.key}", *parameters)


def variance(family: Any, *parameters: Tensor) -> Tensor:
    """Return the variance of the count; elementwise in the parameters, differentiable twice."""
    return evaluate(f"variance/{family.key}", *parameters)


def expectation(family: Any, integrand: Any, *arguments: Tensor) -> Tensor:
    r"""Return :math:`\sum_k q_k f_k`, of a family's parameters and an integrand's arguments.

    It is elementwise and differentiable twice. That ``f`` may depend on :math:`\log q_k` adds nothing to the
    derivative: :math:`E[\partial \log q_k] = 0`.
    """
    return evaluate(f"expectation/{family.key}/{integrand.key}", *arguments)


def _compiled_log_ratio(
    family: Any, integrand: LogRatio, own: list[Tensor], rest: list[Tensor], column: Tensor
) -> list[Tensor] | None:
    rate, nu = (p.contiguous() for p in family.as_com_poisson(*own))
    end = -NATS[rate.dtype]
    high = torch.empty_like(rate, dtype=torch.float64)
    in_pieces(compiled().com_poisson_reach, len(rate), rate, nu, high, options=(end,))
    reach = high.new_zeros(len(rest[0])).scatter_reduce_(0, column, high, "amax")
    counts = reach.long() + 2
    ends = counts.cumsum(0)
    total = int(ends[-1]) if len(ends) else 0
    if total > 16 * len(rate):  # many counts, few latents: the tables would be most of the work
        return None
    starts, row = ends - counts, torch.repeat_interleave(counts)
    k = torch.arange(total) - starts[row]
    read = [t.expand(total) for t in integrand.tables(k.double(), *(a.double()[row] for a in rest))]
    value, derivatives = torch.empty_like(rate), rate.new_empty(len(rate), 1 + len(read))
    options = torch.stack(read).numpy(), starts.numpy(), integrand.smooth, end
    arrays = rate, nu, high, column.contiguous(), value, derivatives
    in_pieces(compiled().com_poisson_log_ratio, len(rate), *arrays, options=options)
    return [value, *derivatives[:, : len(own)].unbind(1), *derivatives[:, 2:].unbind(1)]


def most_probable(family: Any, parameters: Sequence[Tensor]) -> Tensor:
    """Return the most probable count of each element, of the parameters' shape; nan as :func:`draw`."""
    own = [p.reshape(-1) for p in parameters]
    low, high = family.window(NATS[own[0].dtype], *own)

    def search(own: Sequence[Tensor], low: Tensor, high: Tensor) -> list[Tensor]:
        found = torch.zeros_like(own[0])
        for k, index in groups(low, high):
            best = family.log_weight(k, *(p[index] for p in own)).argmax(0)
            found.index_copy_(0, index, k.expand(-1, len(index)).gather(0, best[None])[0])
        return [found]

    return only_where(fits(low, high) & allowed(family, own), search, own, low, high)[0].reshape(parameters[0].shape)


def draw(family: Any, parameters: Sequence[Tensor], uniform: Tensor | None = None) -> list[Tensor]:
    r"""Draw counts by inversion, with the derivatives of :class:`~pyro_nbvae.distributions.Integer`.

    .. math:: \frac{dz}{d\theta} = -\frac{1}{q_z} \sum_k m_k\, q_k\, (T_k - E[T]), \qquad
        m_k = 1 \text{ below } z,\ \tfrac12 \text{ at } z.

    The sum over all counts is 0, so above the median it is computed from the other side, which avoids cancellation.

    Args:
        parameters: (n,) each.
        uniform: uniform numbers in (0, 1) that determine the counts, (n,); by default they are drawn.

    Returns:
        The counts and their derivative in each parameter, (n,) each. They are nan where a parameter is not allowed or a
        window does not fit.
    """
    like = parameters[0]
    u = torch.rand_like(like) if uniform is None else uniform
    if hasattr(family, "as_com_poisson") and is_compiled_for(like):
        rate, nu = family.as_com_poisson(*parameters)
        arrays = [a.contiguous() for a in (rate, nu, u)], [torch.empty_like(like) for _ in range(3)]
        in_pieces(compiled().com_poisson_integers, len(like), *arrays[0], *arrays[1], options=(-NATS[like.dtype],))
        return arrays[1][: 1 + len(parameters)]
    low, high = family.window(NATS[like.dtype], *parameters)
    fine = fits(low, high) & allowed(family, parameters)
    return only_where(fine, functools.partial(_invert, family), parameters, u, low, high)


def _invert(family: Weights, parameters: Sequence[Tensor], u: Tensor, low: Tensor, high: Tensor) -> list[Tensor]:
    out = [torch.zeros_like(u) for _ in range(1 + len(parameters))]
    for k, index in groups(low, high):
        own = [p[index] for p in parameters]
        _, q, log_sum = masses(family, k, *own)
        level = u[index]
        summed = running_sum(q.clone())
        z = k[0] + torch.lt(summed, level, out=summed).sum(0).clamp_(max=len(k) - 1)
        out[0].index_copy_(0, index, z.masked_fill(log_sum.isnan(), torch.nan))
        side = torch.where(level > 0.5, -1.0, 1.0).to(level.dtype)  # 1: sum from below
        share_of = (z - k).mul_(side).add_(0.5).clamp_(0, 1).mul_(q)
        scale = side.neg().div_(q.gather(0, (z - k[0]).long()[None])[0].clamp(min=torch.finfo(q.dtype).tiny))
        for derivative, t in zip(out[1:], family.scores(k, *own), strict=True):
            if t is not None:
                part = (share_of * t).sum(0) - share_of.sum(0) * (q * t).sum(0)
                derivative.index_copy_(0, index, part.mul_(scale))
    return out
