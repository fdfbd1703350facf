"""Model and guide of a variant, as tests want them."""

from pyro_nbvae.distributions import ArrivalTimes, GumbelSoftmax
from pyro_nbvae.likelihoods import Gaussian
from pyro_nbvae.study.tree import options, replace
from pyro_nbvae.study.variants import VARIANTS

# Relaxations at the temperatures that a program of a user's has if none is given.
WARM = {"arrival": ArrivalTimes(0.24), "gumbel": GumbelSoftmax(1.0), "categories": GumbelSoftmax(1.0)}


def pair(name, event_shape=(1, 16, 16), latents=4, *, encoder="linear", decoder="linear", likelihood=None, **changes):
    """The model and the guide of a variant, with its relaxation at the temperature that programs start with.

    Options of the variant are changed by name, as ``prior_mean=2.0``; ``relaxation=None`` gives integer counts.
    """
    relaxed = changes.pop("relaxation", "own")
    vae = replace(VARIANTS[name], **changes)
    if "prior_mean" in options(vae) and options(vae)["prior_mean"] is None:
        vae = replace(vae, prior_mean=20.0)
    networks = {"encoder": encoder, "decoder": decoder, "likelihood": likelihood or Gaussian()}
    model, guide = vae.build(event_shape, latents, **networks)
    own = getattr(vae, "relaxation", None)
    if relaxed != "own":
        guide.relaxation = relaxed
    elif own is not None:
        guide.relaxation = WARM.get(own.kind, own.build())
    return model, guide


def estimator(name):
    """The ELBO estimator of a variant."""
    return VARIANTS[name].estimator.build()
