"""Ways to differentiate through a count, one file each."""

from pyro_nbvae.distributions.relaxations.arrival_times import ArrivalTimes
from pyro_nbvae.distributions.relaxations.base import DivergedError, Relaxation
from pyro_nbvae.distributions.relaxations.gumbel_softmax import GumbelSoftmax

# The names that configurations and the command use.
RELAXATIONS: dict[str, type[Relaxation]] = {"arrival": ArrivalTimes, "gumbel": GumbelSoftmax}

__all__ = ["RELAXATIONS", "ArrivalTimes", "DivergedError", "GumbelSoftmax", "Relaxation"]
