"""What the latents tell about the labels: representations of data, and classifiers trained on few of them.

The protocol is that of the paper's released code: labelled observations are drawn from the training set,
accuracy is on the held-out set, so that nothing of that is ever trained on. The classifiers are scikit-learn's, on the
representations as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import combinations
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pyro_nbvae.data import Data, to_floats
from pyro_nbvae.errors import InputError
from pyro_nbvae.metrics.batching import shown
from pyro_nbvae.vae import AmortizedGuide, GenerativeModel, evaluating

Representation = Literal["encoder", "means", "counts"]
REPRESENTATIONS: dict[str, Callable[[AmortizedGuide, Tensor], Tensor]] = {
    "encoder": lambda guide, x: guide.encode(x)[0],
    "means": lambda guide, x: guide.posterior(x).mean,
    "counts": lambda guide, x: guide.posterior(x).sample(),
}
LABELLED = (200, 1000, 5000)
SHOTS = (1, 5, 10, 20)
TESTED = 5000


def represent(
    model: GenerativeModel, guide: AmortizedGuide, data: Tensor, representation: Representation, *, seed: int = 0
) -> NDArray[np.float32]:
    """Data (N, *event_shape) to (N, K): the encoder's first outputs (what moves the mean: logits of the negative
    binomial, log rates, locations), means of the posterior, or one exact sample of it (integer counts)."""
    device = model.device
    with evaluating(model, guide, seed):
        parts = [
            REPRESENTATIONS[representation](guide, to_floats(batch.to(device))).flatten(1)
            for batch in shown(data, representation, False)
        ]
    return torch.cat(parts).cpu().numpy()


def balanced_splits(classes: int) -> Iterator[tuple[int, ...]]:
    """Every way to part the classes into two halves, once: the half that holds class 0 (126 of ten classes)."""
    for others in combinations(range(1, classes), classes // 2 - 1):
        yield (0, *others)


def classification(
    train: NDArray[Any],
    train_labels: NDArray[Any],
    test: NDArray[Any],
    test_labels: NDArray[Any],
    *,
    splits: int = 5,
    repeats: int = 10,
    seed: int = 0,
) -> dict[str, float]:
    """Accuracies of classifiers trained on few labelled representations (N, K), on up to 5,000 others.

    ``knn_N``, ``logistic_N`` and ``svm_N`` (five nearest neighbours, logistic regression, linear support vector
    machine) are trained on N = 200, 1000 and 5000 at random and averaged over ``splits``; ``shattering`` is the mean
    accuracy of linear support vector machines trained on 200 to tell all balanced halves of the classes apart, averaged
    over ``splits``; ``few_shot_N`` is logistic regression on N a class, averaged over ``repeats``. N that the training
    set does not hold are left out.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.neighbors import KNeighborsClassifier
    from sklearn.svm import LinearSVC

    def logistic() -> Any:
        return LogisticRegression(max_iter=5000)

    def svm() -> Any:
        return LinearSVC(dual=False)

    random = np.random.default_rng(seed)
    accuracies: dict[str, list[float]] = {}

    def score(
        name: str, classifier: Any, chosen: NDArray[Any], tested: NDArray[Any], relabel: Any = np.asarray
    ) -> None:
        classifier.fit(train[chosen], relabel(train_labels[chosen]))
        accuracy = np.mean(classifier.predict(test[tested]) == relabel(test_labels[tested]))
        accuracies.setdefault(name, []).append(float(accuracy))

    classes = np.unique(train_labels)
    for _ in range(splits):
        order = random.permutation(len(train))
        tested = random.permutation(len(test))[:TESTED]
        for number in (n for n in LABELLED if n <= len(train)):
            chosen = order[:number]
            score(f"knn_{number}", KNeighborsClassifier(), chosen, tested)
            score(f"logistic_{number}", logistic(), chosen, tested)
            score(f"svm_{number}", svm(), chosen, tested)
        for half in balanced_splits(len(classes)):
            inside = classes[list(half)]
            score("shattering", svm(), order[:200], tested, lambda labels, inside=inside: np.isin(labels, inside))
    for _ in range(repeats):
        order = random.permutation(len(train))
        tested = random.permutation(len(test))[:TESTED]
        for number in SHOTS:
            members = [order[train_labels[order] == label][:number] for label in classes]
            if min(map(len, members)) == number:
                score(f"few_shot_{number}", logistic(), np.concatenate(members), tested)
    return {name: float(np.mean(values)) for name, values in accuracies.items()}


def latent_classification(
    model: GenerativeModel, guide: AmortizedGuide, data: Data, representation: Representation = "encoder"
) -> dict[str, float]:
    """:func:`classification` of a pair's representations of a data set.

    Raises:
        InputError: for data without labels.
    """
    if data.train_labels is None or data.test_labels is None:
        raise InputError(f"{data.name} has no labels: name data that has, such as mnist or cifar16")
    train, test = (represent(model, guide, images, representation) for images in (data.train, data.test))
    return classification(train, data.train_labels.numpy(), test, data.test_labels.numpy())
