"""Classifiers on latents: what is known of them from chance, from perfect representations, and from the protocol."""

import math
from itertools import combinations

import numpy as np
import pytest
import torch

from pyro_nbvae.data import Data, load
from pyro_nbvae.errors import InputError
from pyro_nbvae.metrics import classification, latent_classification, represent
from pyro_nbvae.metrics.latents import balanced_splits
from pyro_nbvae.variants import VARIANTS

NAMES = {
    *(f"{name}_{n}" for name in ("knn", "logistic", "svm") for n in (200, 1000)),
    "shattering",
    *(f"few_shot_{n}" for n in (1, 5, 10, 20)),
}


def one_hot(labels):
    return np.eye(10, dtype=np.float32)[labels]


def labels(number, seed):
    return np.random.default_rng(seed).permutation(np.arange(number) % 10)


def test_a_representation_that_is_the_label_gives_1():
    train, test = labels(1200, 0), labels(400, 1)
    found = classification(one_hot(train), train, one_hot(test), test, splits=2, repeats=2)
    assert set(found) == NAMES  # 5,000 labelled images are more than there are
    assert all(value == 1 for value in found.values())


def test_shuffled_labels_give_chance():
    """The representation of another label: one in ten, and one in two for the halves, within 5 standard errors."""
    train, test = labels(1200, 0), labels(4000, 1)
    shuffled = np.random.default_rng(2).permutation(train)
    found = classification(one_hot(train), shuffled, one_hot(test), test, splits=15, repeats=15)
    for name, value in found.items():
        # all test images of a class are told the same: each of 15 classifiers makes ten choices
        chance = 0.5 if name == "shattering" else 0.1
        assert abs(value - chance) < 5 * math.sqrt(chance * (1 - chance) / 150), name


def test_no_test_image_is_ever_trained_on():
    """Test images are represented by the label after theirs: right on any of them only if one was trained on."""
    train, test = labels(1200, 0), labels(400, 1)
    found = classification(one_hot(train), train, one_hot((test + 1) % 10), test, splits=2, repeats=2)
    assert {value for name, value in found.items() if name != "shattering"} == {0.0}


def test_the_halves_are_all_and_each_once():
    halves = [frozenset(half) for half in balanced_splits(10)]
    assert len(set(halves)) == len(halves) == 126
    everything = {frozenset((frozenset(c), frozenset(range(10)) - frozenset(c))) for c in combinations(range(10), 5)}
    assert {frozenset((half, frozenset(range(10)) - half)) for half in halves} == everything


@pytest.mark.parametrize("name", VARIANTS)
def test_representations_are_of_the_posterior(name):
    model = VARIANTS[name].model((1, 16, 16), 16, decoder="linear")
    guide = VARIANTS[name].guide(model, encoder="linear", **VARIANTS[name].options)
    images = load("digits").test[:20]
    x = images.float() / 255
    with torch.no_grad():
        q = guide.posterior(x)
    encoder, means, counts = (represent(model, guide, images, kind) for kind in ("encoder", "means", "counts"))
    assert encoder.shape == means.shape == counts.shape == (20, 16)
    np.testing.assert_allclose(means, q.mean.flatten(1).numpy(), rtol=1e-5)
    parameters = {
        # the inverse of the gain log2(1 + 4^h)
        **dict.fromkeys(("P-VAE", "P-NB", "CMP"), lambda: (2 ** (q.rate / model.prior.mean) - 1).log2() / 2),
        "G-VAE": lambda: q.loc,
        "GS-VAE": lambda: q.loc / model.prior.scale,
        "L-VAE": lambda: q.loc,
        "C-VAE": lambda: q.logits,
    }
    expected = parameters.get(name, lambda: q.logits - model.prior.logits)().detach().flatten(1).numpy()
    if name == "C-VAE":  # logits are up to a constant
        expected, encoder = (
            a.reshape(20, 2, 8) - a.reshape(20, 2, 8).mean(2, keepdims=True) for a in (expected, encoder)
        )
    np.testing.assert_allclose(encoder, expected, atol=1e-5)
    if name not in ("G-VAE", "GS-VAE", "L-VAE"):
        assert np.array_equal(counts, np.round(counts))
    assert np.array_equal(counts, represent(model, guide, images, "counts"))


def test_data_without_labels_are_refused():
    images = torch.zeros(3, 1, 16, 16, dtype=torch.uint8)
    with pytest.raises(InputError, match="faces has no labels"):
        latent_classification(None, None, Data("faces", images, images, None, None))
