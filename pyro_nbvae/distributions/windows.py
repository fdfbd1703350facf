r"""Sums over windows of counts, for any count family; everything here is of flat tensors.

A family over the counts 0, 1, 2, ... is :math:`q(k) = w_k / \sum_j w_j`. With its scores :math:`T_k = \partial \log w_k
/ \partial \theta`, every expectation and every derivative is a sum over a window of counts,

.. math:: E[f] = \sum_k q_k f_k, \qquad \frac{\partial E[f]}{\partial \theta} = \sum_k q_k (T_k - E[T]) f_k,

exact up to the mass outside the window, :math:`e^{-18}` in single and :math:`e^{-36}` in double precision. The elements
of a tensor are grouped by their windows: on a CPU by their first counts too, so that functions of the count are
computed once for a group, in chunks that fit in a core's cache; on a GPU by their widths only, so that there are few
groups and the host seldom waits for the device.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torch.distributions.constraints import is_dependent

from pyro_nbvae.distributions.elementwise import register_part
from pyro_nbvae.distributions.families import Family

# A window leaves out mass of exp(-NATS), up to a small factor.
NATS = {torch.float32: 18.0, torch.float64: 36.0}
# Lower limit of log weights relative to the largest: single-precision numbers below 1e-38 are slow.
_LOWEST = -80.0
# Devices on which the elements of a group share their counts.
SHARING = ("cpu",)
# Largest width of a window: a Poisson reaches it at a mean of about 4e9.
_WIDEST = 1 << 20
# Numbers in one chunk, which limits the memory at any rate. On a CPU, a few chunks fit in a core's cache.
NOISE_CHUNK_SIZE = {"cpu": 1 << 16, "cuda": 1 << 22}


def elements_per_chunk(width: int, device: torch.device) -> int:
    """Return how many elements are one chunk of about NOISE_CHUNK_SIZE numbers, ``width`` for each element."""
    return max(1, NOISE_CHUNK_SIZE.get(device.type, NOISE_CHUNK_SIZE["cuda"]) // max(1, width))


def chunks(count: int, width: int, device: torch.device) -> Iterator[slice]:
    """Return slices of ``count`` elements, one chunk each, with ``width`` numbers for each element."""
    size = elements_per_chunk(width, device)
    return (slice(start, min(start + size, count)) for start in range(0, max(1, count), size))


def _running_sum(x: Tensor) -> Tensor:
    """Cumulative sum along the first axis; in place if the axis is short, which is faster than a scan."""
    if (len(x) > 8 and x[0].numel() < 512) or len(x) > 64:
        return x.cumsum(0)
    for k in range(1, len(x)):
        x[k] += x[k - 1]
    return x


def _sizes() -> Iterator[int]:
    size = 4
    while True:
        yield size
        if size > 4:
            yield size + size // 2
        size *= 2


def _allowed(family: Family, parameters: Sequence[Tensor]) -> Tensor:
    """Return which elements have parameters that satisfy the family's constraints."""
    constraints = family.arg_constraints.values()
    checks = [c.check(p.detach()) for c, p in zip(constraints, parameters, strict=True) if not is_dependent(c)]
    return functools.reduce(torch.logical_and, checks, torch.ones_like(parameters[0], dtype=torch.bool))


def _fits(low: Tensor, high: Tensor) -> Tensor:
    """Return which windows are finite, not empty, at most _WIDEST counts wide, and of counts that are exact numbers."""
    width = high - low
    return (width >= 0) & (width < _WIDEST) & (high <= 2 / torch.finfo(high.dtype).eps)


def groups(low: Tensor, high: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Group elements of similar windows, and cut the groups into chunks that fit in a core's cache.

    Args:
        low, high: first and last count of each element's window, (n,).

    Yields:
        Counts, (width, 1) if the elements share them (the same tensor for all chunks of a group) and else (width, m),
        and the indices (m,) of elements whose windows lie within them; each element once. All windows must fit
        (:func:`_fits`).
    """
    if not len(low):
        return
    low, high = low.clamp(min=0).floor(), high.ceil()
    yield from (_sharing if low.device.type in SHARING else _by_width)(low, high)


@functools.lru_cache(maxsize=8)
def _widths(dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.tensor(
        list(itertools.takewhile(lambda size: size < 2 * _WIDEST, _sizes())), dtype=dtype, device=device
    )


def _by_width(low: Tensor, high: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    widths = _widths(low.dtype, low.device)
    kind, order = torch.bucketize(high - low + 1, widths).sort()
    ends = torch.searchsorted(kind, torch.arange(len(widths), device=low.device), right=True).tolist()
    for size, start, end in zip(_sizes(), [0, *ends], ends, strict=False):
        for chosen in order[start:end].split(elements_per_chunk(size, low.device)) if end > start else ():
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
                for part in group.split(elements_per_chunk(size, low.device)):
                    yield k, part
            outside = (~fits).nonzero()[:, 0]
            left = outside if left is None else left[outside]
            low, high = low[outside], high[outside]


def _masses(family: Family, k: Tensor, *parameters: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return log weights and masses of counts ``k``, both (width, n), and the log normalizers, (n,).

    ``k`` is (width, 1) or (width, n).
    """
    log_weight = family.log_weight(k, *parameters)
    top = log_weight.detach().amax(0)
    weight = (log_weight - top).clamp(min=_LOWEST).exp().masked_fill(log_weight == -torch.inf, 0)
    total = weight.sum(0)
    return log_weight, weight * total.reciprocal(), top + total.log()


class Integrand:
    """Base class of integrands: functions of the count, of log q and of their own arguments.

    Attributes:
        key: its name in ``PARTS``.
        name: what its mean is, for families that have a kernel of it.
        tables: returns the tensors (width, n) that it needs, from counts (width, 1) or (width, n) and its arguments
            (n,). Both may also be of one flat shape; each element then belongs to a count and its arguments.
        value: returns f_k, (width, n), from counts, log q_k and the tables.
        gradient: returns the derivatives in its arguments, (width, n), from the tables.
    """

    key: str
    name: str = ""
    value: Callable[..., Tensor]
    tables: Callable[..., tuple[Tensor, ...]] = staticmethod(lambda k: ())
    gradient: Callable[..., tuple[Tensor | None, ...]] = staticmethod(lambda: ())

    def __init_subclass__(cls, **options: object) -> None:
        super().__init_subclass__(**options)
        cls.key = register_part(cls, cls.__name__)


class Count(Integrand):
    """The count itself."""

    name = "mean"
    value = staticmethod(lambda k, log_mass: k)


class Surprise(Integrand):
    """-log q(k)."""

    name = "entropy"
    value = staticmethod(lambda k, log_mass: -log_mass.masked_fill(log_mass == -torch.inf, 0))


class AtMost(Integrand):
    """Whether the count is at most the argument."""

    tables = staticmethod(lambda k, value: ((k <= value).to(value.dtype),))
    value = staticmethod(lambda k, log_mass, indicator: indicator)
    gradient = staticmethod(lambda indicator: (None,))


class LogQOverP(Integrand):
    """log q(k) - log p(k); its arguments are p's parameters, and p's log normalizer if its weights do not sum to 1."""

    def __init__(self, family: Family) -> None:
        self.family = family
        self.key = register_part(self, f"log {family.key}")

    def tables(self, k: Tensor, *arguments: Tensor) -> tuple[Tensor, ...]:
        """Return log p and its derivatives in the arguments."""
        family = self.family
        if family.normalized:
            return family.log_weight(k, *arguments), *family.scores(k, *arguments)
        *own, log_sum = arguments
        zero = torch.zeros_like(log_sum)
        scores = (zero if t is None else zero + t for t in family.scores(k, *own))
        return family.log_weight(k, *own) - log_sum, *scores, zero - 1

    @staticmethod
    def value(k: Tensor, log_mass: Tensor, *tables: Tensor) -> Tensor:
        return (log_mass - tables[0]).masked_fill(log_mass == -torch.inf, 0)

    @staticmethod
    def gradient(*tables: Tensor) -> tuple[Tensor | None, ...]:
        return tuple(-score for score in tables[1:])


def _over_windows(
    family: Family, own: Sequence[Tensor], outputs: int, work: Callable[..., Sequence[Tensor | None]]
) -> list[Tensor]:
    """Return the results of ``work(k, index, *parameters)`` for each group of elements, put together.

    They are nan where a parameter is not allowed or a window does not fit.

    Args:
        family: the family.
        own: its parameters, (n,) each.
        outputs: number of results.
        work: maps counts (width, 1) or (width, m), the indices of m elements and their parameters to ``outputs``
            tensors (m,), of which all but the first may be None for 0.
    """
    with torch.no_grad():
        low, high = family.window(NATS[own[0].dtype], *own)
        fine = _fits(low, high) & _allowed(family, own)
        some = None if bool(fine.all()) else fine.nonzero()[:, 0]
    found: list[list[Tensor]] = []
    order: list[Tensor] = []
    for k, group in groups(low, high) if some is None else groups(low[some], high[some]):
        index = group if some is None else some[group]
        first, *others = work(k, index, *(p[index] for p in own))
        assert first is not None
        found.append([first, *(torch.zeros_like(first) if part is None else part for part in others)])
        order.append(index)
    nothing = torch.full_like(own[0], torch.nan)
    if not order:
        return [nothing] * outputs
    return [nothing.index_copy(0, torch.cat(order), torch.cat(parts)) for parts in zip(*found, strict=True)]


def log_normalizer(family: Family, own: Sequence[Tensor]) -> list[Tensor]:
    """Return the log of the sum of all weights, and its derivatives; arguments and results as :func:`expectation`."""

    def work(k: Tensor, _: Tensor, *own: Tensor) -> list[Tensor | None]:
        _, q, log_sum = _masses(family, k, *own)
        return [log_sum, *(None if t is None else (q * t).sum(0) for t in family.scores(k, *own))]

    return _over_windows(family, own, 1 + len(own), work)


def expectation(
    family: Family, integrand: Integrand, own: Sequence[Tensor], rest: Sequence[Tensor], table_row: Tensor
) -> list[Tensor]:
    """Return the mean of an integrand, and its derivatives in the family's parameters and the integrand's arguments.

    Args:
        family: the family.
        integrand: the integrand.
        own: parameters, (n,) each.
        rest: arguments of the integrand, (rows,) each.
        table_row: for each element its index in ``rest``, (n,).

    Returns:
        Tensors (n,), nan where a parameter is not allowed or a window is too wide.
    """
    # a prior's parameters are the same for every observation, so one small table serves a batch
    few = bool(rest) and 4 * len(rest[0]) <= len(own[0])
    cached: tuple[Tensor, list[Tensor]] | None = None

    def work(k: Tensor, index: Tensor, *own: Tensor) -> list[Tensor | None]:
        nonlocal cached
        row = table_row[index]
        if few and k.shape[1] == 1:
            if cached is None or cached[0] is not k:
                cached = k, [t.expand(len(k), len(rest[0])) for t in integrand.tables(k, *rest)]
            tables = [t.index_select(1, row) for t in cached[1]]
        else:
            tables = list(integrand.tables(k, *(a[row] for a in rest)))
        log_weight, q, log_sum = _masses(family, k, *own)
        f = integrand.value(k, log_weight - log_sum, *tables)
        value = (q * f).sum(0)
        centred = q * (f - value)
        of_own = (None if t is None else (centred * t).sum(0) for t in family.scores(k, *own))
        of_rest = (None if d is None else (q * d).sum(0) for d in integrand.gradient(*tables))
        return [value, *of_own, *of_rest]

    return _over_windows(family, own, 1 + len(own) + len(rest), work)


def variance(family: Family, own: Sequence[Tensor]) -> list[Tensor]:
    """Return the variance, and its derivatives; arguments and results as :func:`expectation`."""

    def work(k: Tensor, _: Tensor, *own: Tensor) -> list[Tensor | None]:
        _, q, _ = _masses(family, k, *own)
        square = (k - (q * k).sum(0)).square()
        value = (q * square).sum(0)
        centred = q * (square - value)
        return [value, *(None if t is None else (centred * t).sum(0) for t in family.scores(k, *own))]

    return _over_windows(family, own, 1 + len(own), work)


def mode(family: Family, own: Sequence[Tensor]) -> list[Tensor]:
    """Return the most probable count, the smallest if several are; nan as :func:`expectation`."""

    def work(k: Tensor, _: Tensor, *own: Tensor) -> list[Tensor | None]:
        best = family.log_weight(k, *own).argmax(0)
        return [k.expand(-1, len(best)).gather(0, best[None])[0]]

    return _over_windows(family, own, 1, work)


def invert(family: Family, own: Sequence[Tensor], uniform: Tensor) -> list[Tensor]:
    r"""Draw counts by inversion, with the derivatives of :class:`~pyro_nbvae.distributions.Integer`.

    .. math:: \frac{dz}{d\theta} = -\frac{1}{q_z} \sum_k m_k\, q_k\, (T_k - E[T]), \qquad
        m_k = 1 \text{ below } z,\ \tfrac12 \text{ at } z.

    The sum over all counts is 0, so above the median it is computed from the other side, which avoids cancellation.

    Args:
        family: the family.
        own: parameters, (n,) each.
        uniform: uniform numbers in (0, 1) that determine the counts, (n,).

    Returns:
        The counts and their derivative in each parameter, (n,) each; nan as :func:`expectation`.
    """

    def work(k: Tensor, index: Tensor, *own: Tensor) -> list[Tensor | None]:
        _, q, log_sum = _masses(family, k, *own)
        level = uniform[index]
        summed = _running_sum(q.clone())
        z = k[0] + torch.lt(summed, level, out=summed).sum(0).clamp_(max=len(k) - 1)
        side = torch.where(level > 0.5, -1.0, 1.0).to(level.dtype)  # 1: sum from below
        share_of = (z - k).mul_(side).add_(0.5).clamp_(0, 1).mul_(q)
        scale = side.neg().div_(q.gather(0, (z - k[0]).long()[None])[0].clamp(min=torch.finfo(q.dtype).tiny))
        derivatives = (
            None if t is None else ((share_of * t).sum(0) - share_of.sum(0) * (q * t).sum(0)).mul_(scale)
            for t in family.scores(k, *own)
        )
        return [z.masked_fill(log_sum.isnan(), torch.nan), *derivatives]

    return _over_windows(family, own, 1 + len(own), work)
