"""All tables of this folder: importing a script registers its table."""

from pyro_nbvae.experiments import main, prior, priors, latents, decoder  # noqa: F401, I001
from pyro_nbvae.experiments import beta, blocks, mc_samples, relaxation, families, precision  # noqa: F401
