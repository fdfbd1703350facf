"""Components of a mixture prior as clusters, beside k-means and a Gaussian mixture on the same latents."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pyro_nbvae.batching import Batch, random_subset
from pyro_nbvae.distributions import TiltedMixture
from pyro_nbvae.errors import InputError
from pyro_nbvae.metrics.latents import Labels, represent
from pyro_nbvae.vae import AmortizedGuide, GenerativeModel

# Maximum number of observations from which clusters are learned, and that are assigned to them.
_MAX_TRAIN, _MAX_TEST = 20_000, 10_000


def cluster_scores(train: Labels, train_labels: Labels, test: Labels, test_labels: Labels) -> dict[str, float]:
    r"""Compare clusters with labels.

    Args:
        train, test: the cluster of each observation, whole numbers (N,).
        train_labels, test_labels: the labels, (N,).

    Returns:
        ``accuracy``: the part of the held-out observations with the label that most training observations of their
        cluster have (0 for a cluster without any); ``nmi``: the normalised mutual information of clusters and labels of
        held-out observations, :math:`I(c; y)` over the mean of the two entropies.

    Example::

        >>> clusters, labels = np.array([5, 5, 2, 2]), np.array([0, 0, 1, 1])
        >>> cluster_scores(clusters, labels, clusters, labels)
        {'accuracy': 1.0, 'nmi': 1.0}
    """
    from sklearn.metrics import normalized_mutual_info_score

    majority = {each: _most_frequent(train_labels[train == each]) for each in np.unique(train)}
    right = [majority.get(each) == label for each, label in zip(test, test_labels, strict=True)]
    return {"accuracy": float(np.mean(right)), "nmi": float(normalized_mutual_info_score(test_labels, test))}


def _most_frequent(labels: Labels) -> object:
    values, counts = np.unique(labels, return_counts=True)
    return values[counts.argmax()]


def latent_clusters(
    model: GenerativeModel,
    guide: AmortizedGuide,
    train: tuple[Batch, Tensor],
    test: tuple[Batch, Tensor],
    *,
    components: int = 100,
    seed: int = 0,
) -> dict[str, dict[str, float]]:
    """Compare clusters of latents with labels, from one sample of the posterior for each observation.

    Args:
        model, guide: the trained pair.
        train, test: observations (N, *event_shape) and their labels (N,), training set and held-out data; of more
            than 20,000 and 10,000, random ones.
        components: number of clusters of k-means and of the Gaussian mixture; with a mixture as prior, the number of
            its components.
        seed: random seed.

    Returns:
        :func:`cluster_scores` by method: ``components``, the most probable component of a mixture prior, if the model
        has one; ``kmeans``, of the square roots of counts or of real latents; ``gaussians``, a Gaussian mixture with
        diagonal covariances.

    Raises:
        InputError: for fewer training observations than clusters.

    Example::

        >>> from pyro_nbvae.guides import PoissonGuide
        >>> from pyro_nbvae.models import PoissonModel
        >>> from pyro_nbvae.priors import Mixture
        >>> model = PoissonModel((5,), latents=3, decoder="linear", prior=Mixture(4))
        >>> guide = PoissonGuide(model, encoder="linear")
        >>> x, labels = torch.rand(60, 5), torch.arange(2).repeat(30)
        >>> sorted(latent_clusters(model, guide, (x, labels), (x, labels)))
        ['components', 'gaussians', 'kmeans']
    """
    from sklearn.cluster import MiniBatchKMeans
    from sklearn.mixture import GaussianMixture

    # the first may all have one label
    x, labels = random_subset(train[0], _MAX_TRAIN), random_subset(train[1], _MAX_TRAIN)
    x_test, test_labels = random_subset(test[0], _MAX_TEST), random_subset(test[1], _MAX_TEST)
    # with another noise, since clusters may fit to the noise of each unit
    z, z_test = (represent(model, guide, d, "counts", seed=(seed + k) % 2**32) for k, d in enumerate((x, x_test)))
    assign: dict[str, Callable[[NDArray[np.float32]], Labels]] = {}
    with torch.no_grad():
        prior = model.prior_distribution()
    if isinstance(prior, TiltedMixture):
        components = len(prior.component_logits)
        assign["components"] = lambda values: _components(prior, values)
    if len(z) < components:
        raise InputError(f"{components} clusters need as many training observations, got {len(z)}")
    integers = bool((z >= 0).all() and (z == z.round()).all())

    def coordinates(values: NDArray[np.float32]) -> NDArray[np.float32]:
        return np.sqrt(values) if integers else values

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # fewer distinct latents than clusters; no convergence
        kmeans = MiniBatchKMeans(components, random_state=seed, n_init=3).fit(coordinates(z))
        gaussians = GaussianMixture(components, covariance_type="diag", max_iter=30, reg_covar=1e-3, random_state=seed)
        gaussians.fit(z)
    assign["kmeans"] = lambda values: kmeans.predict(coordinates(values))
    assign["gaussians"] = gaussians.predict
    y, y_test = labels.numpy(), test_labels.numpy()
    return {name: cluster_scores(of(z), y, of(z_test), y_test) for name, of in assign.items()}


@torch.no_grad()
def _components(prior: TiltedMixture, values: NDArray[np.float32]) -> Labels:
    z = torch.as_tensor(values, device=prior.component_logits.device)
    return torch.cat([prior.responsibilities(part).argmax(-1) for part in z.split(1000)]).cpu().numpy()
