"""The mathematics of each count family: one module of pure functions per family.

A module states what sums over counts need of a :data:`Family`, and what has a closed form: moments, KL divergences. A
:class:`~pyro_nbvae.distributions.CountDistribution` states the same as static methods of its class.
"""

from typing import Any, TypeAlias

# A module or a class with these attributes:
#
# log_weight(k, *parameters)   log mass of the counts k up to a constant
# scores(k, *parameters)       its derivatives; None for a parameter without one
# window(nats, *parameters)    first and last count outside which the mass is at most exp(-nats)
# arg_constraints              constraints of the parameters by name; sums are nan where one is violated
# normalized                   whether the weights sum to 1
# smooth                       whether the log weight is a smooth function of the count, from 1 on
# kernels                      first part of the names of its kernels, such as "com_poisson"; None for a family without
# kernel_parameters(*parameters)  what these kernels take: first its own parameters
# key                          its name in PARTS (elementwise.py)
Family: TypeAlias = Any
