"""Relaxations: ways to differentiate through a count, one file each."""

from pyro_nbvae.distributions.relaxations.arrival_times import ArrivalTimes
from pyro_nbvae.distributions.relaxations.base import DivergedError, Relaxation
from pyro_nbvae.distributions.relaxations.gumbel_softmax import GumbelSoftmax
from pyro_nbvae.distributions.relaxations.integer import Integer

# Names in configurations and on the command line.
RELAXATIONS: dict[str, type[Relaxation]] = {"arrival": ArrivalTimes, "gumbel": GumbelSoftmax, "integer": Integer}

__all__ = ["RELAXATIONS", "ArrivalTimes", "DivergedError", "GumbelSoftmax", "Integer", "Relaxation"]
