"""All tables of this folder: importing a script registers its table."""

from pyro_nbvae.experiments import (  # noqa: F401
    beta,
    decoder,
    families,
    latents,
    main,
    mc_samples,
    precision,
    prior,
    relaxation,
)
