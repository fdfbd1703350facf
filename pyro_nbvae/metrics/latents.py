"""Classification from the latents: representations of data, and classifiers trained on few of them.

The protocol is that of the paper's released code: labelled observations are sampled from the training set, and accuracy
is measured on the held-out data. The classifiers are those of scikit-learn; the representations are not scaled.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import combinations
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pyro_nbvae.batching import Batch, Observations, Recording
from pyro_nbvae.vae import AmortizedGuide, GenerativeModel, evaluating

if TYPE_CHECKING:
    from sklearn.base import ClassifierMixin

Representation = Literal["encoder", "means", "counts"]
Labels = NDArray[np.generic]
Indices = NDArray[np.intp]
_REPRESENTATIONS: dict[str, Callable[[AmortizedGuide, Recording], Tensor]] = {
    "encoder": lambda guide, data: guide.encode(data.x, **data.given)[0],
    "means": lambda guide, data: guide.posterior(data.x, **data.given).mean,
    "counts": lambda guide, data: guide.posterior(data.x, **data.given).sample(),
}
# Numbers of labelled observations in all, and per class; maximum number of held-out observations.
LABELLED = (200, 1000, 5000)
SHOTS = (1, 5, 10, 20)
_MAX_TEST = 5000


def represent(
    model: GenerativeModel, guide: AmortizedGuide, data: Observations, representation: Representation, *, seed: int = 0
) -> NDArray[np.float32]:
    """Represent data by the latents of a guide.

    Args:
        model, guide: the trained pair.
        data: (N, *event_shape), as a data set holds them, or a DataLoader (:func:`~pyro_nbvae.metrics.held_out`).
        representation: ``"encoder"``, the encoder's first output, which determines the mean (logits of the negative
            binomial, the argument of a rate multiplier, locations); ``"means"``, the posterior's mean; or
            ``"counts"``, one sample of the posterior (integer counts).
        seed: random seed.

    Returns:
        (N, K).

    Raises:
        KeyError: for an unknown representation.
        InputError: for data of the wrong shape, without an observation or outside the likelihood's support.

    Example::

        >>> from pyro_nbvae.guides import PoissonGuide
        >>> from pyro_nbvae.models import PoissonModel
        >>> model = PoissonModel((5,), latents=3, decoder="linear")
        >>> guide = PoissonGuide(model, encoder="linear")
        >>> represent(model, guide, torch.zeros(4, 5), "means").shape
        (4, 3)
    """
    with evaluating(model, guide, seed):
        parts = [_REPRESENTATIONS[representation](guide, batch).flatten(1) for batch in model.input_batches(data)]
    return torch.cat(parts).float().cpu().numpy()


def _balanced_splits(classes: int) -> Iterator[tuple[int, ...]]:
    """Return one half of every split of the classes into two halves (126 splits for ten classes).

    If the number of classes is odd, it is the smaller half.
    """
    halves = combinations(range(classes), classes // 2)
    return halves if classes % 2 else (half for half in halves if 0 in half)


def classification(
    train: NDArray[np.floating],
    train_labels: Labels,
    test: NDArray[np.floating],
    test_labels: Labels,
    *,
    splits: int = 5,
    repeats: int = 10,
    seed: int = 0,
) -> dict[str, float]:
    """Compute accuracies of classifiers trained on few labelled representations, on up to 5,000 held-out ones.

    Args:
        train, test: representations (N, K).
        train_labels, test_labels: labels (N,), of at least two classes.
        splits, repeats: numbers of random training sets; see below.
        seed: random seed.

    Returns:
        Mean accuracies, by name. ``knn_N``, ``logistic_N`` and ``svm_N`` (five nearest neighbours, logistic regression,
        linear support vector machine) are trained on N = 200, 1000 and 5000 random observations, and averaged over
        ``splits``. ``shattering`` is the accuracy of linear support vector machines that separate the two halves of a
        balanced split of the classes, trained on 200 observations, and averaged over all balanced splits and over
        ``splits``. ``few_shot_N`` is logistic regression on N = 1, 5, 10 and 20 observations per class, averaged over
        ``repeats``. Values of N that need a larger training set are omitted.

    Raises:
        ValueError: by scikit-learn, for training labels of a single class.

    Example::

        >>> x, labels = np.eye(2).repeat(30, axis=0), np.arange(2).repeat(30)
        >>> classification(x, labels, x, labels, splits=1, repeats=1)["few_shot_5"]
        1.0
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.neighbors import KNeighborsClassifier
    from sklearn.svm import LinearSVC

    def logistic() -> LogisticRegression:
        return LogisticRegression(max_iter=5000)

    def svm() -> LinearSVC:
        return LinearSVC(dual=False)

    classes = np.unique(train_labels)
    random = np.random.default_rng(seed)
    accuracies: dict[str, list[float]] = {}

    def score(
        name: str,
        classifier: ClassifierMixin,
        chosen: Indices,
        tested: Indices,
        relabel: Callable[..., Labels] = np.asarray,
    ) -> None:
        classifier.fit(train[chosen], relabel(train_labels[chosen]))
        accuracy = np.mean(classifier.predict(test[tested]) == relabel(test_labels[tested]))
        accuracies.setdefault(name, []).append(float(accuracy))

    for _ in range(splits):
        order = random.permutation(len(train))
        tested = random.permutation(len(test))[:_MAX_TEST]
        for number in (n for n in LABELLED if n <= len(train)):
            chosen = order[:number]
            score(f"knn_{number}", KNeighborsClassifier(), chosen, tested)
            score(f"logistic_{number}", logistic(), chosen, tested)
            score(f"svm_{number}", svm(), chosen, tested)
        for half in _balanced_splits(len(classes)) if len(train) >= LABELLED[0] else ():
            inside = classes[list(half)]
            score(
                "shattering", svm(), order[: LABELLED[0]], tested, lambda labels, inside=inside: np.isin(labels, inside)
            )
    for _ in range(repeats):
        order = random.permutation(len(train))
        tested = random.permutation(len(test))[:_MAX_TEST]
        for number in SHOTS:
            members = [order[train_labels[order] == label][:number] for label in classes]
            if min(map(len, members)) == number:
                score(f"few_shot_{number}", logistic(), np.concatenate(members), tested)
    return {name: float(np.mean(values)) for name, values in accuracies.items()}


def latent_classification(
    model: GenerativeModel,
    guide: AmortizedGuide,
    train: tuple[Batch, Tensor],
    test: tuple[Batch, Tensor],
    representation: Representation = "encoder",
    *,
    seed: int = 0,
) -> dict[str, float]:
    """Run :func:`classification` on the representations of labelled observations.

    Args:
        model, guide: the trained pair.
        train, test: observations (N, *event_shape) and their labels (N,), training set and held-out data.
        representation: as for :func:`represent`.
        seed: random seed of the counts and of the labelled training sets.

    Returns:
        Mean accuracies, as :func:`classification`.

    Example::

        >>> from pyro_nbvae.guides import PoissonGuide
        >>> from pyro_nbvae.models import PoissonModel
        >>> model = PoissonModel((5,), latents=3, decoder="linear")
        >>> guide = PoissonGuide(model, encoder="linear")
        >>> x, labels = torch.rand(60, 5), torch.arange(2).repeat(30)
        >>> accuracies = latent_classification(model, guide, (x, labels), (x, labels))
        >>> sorted(accuracies)
        ['few_shot_1', 'few_shot_10', 'few_shot_20', 'few_shot_5']
    """
    # with noise of their own: a classifier of training data in the same order would recognise it
    each = enumerate((train[0], test[0]))
    z_train, z_test = (represent(model, guide, x, representation, seed=(seed + k) % 2**32) for k, x in each)
    return classification(z_train, train[1].numpy(), z_test, test[1].numpy(), seed=seed)
