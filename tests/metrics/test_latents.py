"""Classifiers on latents: what is known of them from chance, from perfect representations, and from the protocol."""

import math
from itertools import combinations

import numpy as np
import pytest
import torch

from pyro_nbvae.metrics import classification, latent_classification, represent
from pyro_nbvae.metrics.latents import _balanced_splits
from pyro_nbvae.study.data import load
from pyro_nbvae.study.variants import VARIANTS
from tests.pairs import pair

NAMES = {
    *(f"{name}_{n}" for name in ("knn", "logistic", "svm") for n in (200, 1000)),
    "shattering",
    *(f"few_shot_{n}" for n in (1, 5, 10, 20)),
}


@pytest.mark.parametrize("name", ["P-VAE", "CMP", "G-VAE"])
def test_noise_alone_does_not_tell_labels(name):
    """Equal posteriors, and labels in the same order in training and test: chance, within five standard errors."""
    torch.manual_seed(0)
    model, guide = pair(name, (5,), 4)
    x, labels = torch.ones(1200, 5), torch.arange(1200) % 10
    found = latent_classification(model, guide, (x, labels), (x, labels), "counts")
    for score in ("knn_1000", "logistic_1000"):
        assert abs(found[score] - 0.1) < 5 * (0.09 / 1200) ** 0.5


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


@pytest.mark.parametrize("classes", [2, 3, 4, 5, 7, 10])
def test_the_halves_are_all_and_each_once(classes):
    halves = [frozenset(half) for half in _balanced_splits(classes)]
    splits = {frozenset((half, frozenset(range(classes)) - half)) for half in halves}
    assert len(splits) == len(halves)
    everyone = frozenset(range(classes))
    assert splits == {frozenset((frozenset(c), everyone - set(c))) for c in combinations(range(classes), classes // 2)}


def test_shattering_does_not_depend_on_the_names_of_classes():
    """Three clusters on a line: the one in the middle cannot be separated from the others."""
    place, test_place = (np.random.default_rng(seed).permutation(np.arange(600) % 3) for seed in (0, 1))
    accuracies = {
        classification(place[:, None] * 1.0, names[place], test_place[:, None] * 1.0, names[test_place], repeats=1)[
            "shattering"
        ]
        for names in map(np.array, ([0, 1, 2], [1, 0, 2], [2, 1, 0]))
    }
    assert len(accuracies) == 1


def test_an_accuracy_of_more_examples_than_there_are_is_left_out():
    few = labels(150, 0)
    found = classification(one_hot(few), few, one_hot(few), few, splits=1, repeats=1)
    assert set(found) == {"few_shot_1", "few_shot_5", "few_shot_10"}


def test_seeds_draw_other_training_sets():
    model, guide = pair("P-VAE")
    digits = load("digits")
    train, test = (digits.train[:150], digits.train_labels[:150]), (digits.test, digits.test_labels)
    first, again, other = (latent_classification(model, guide, train, test, "counts", seed=s) for s in (0, 0, 7))
    assert first == again and first["few_shot_5"] != other["few_shot_5"]


@pytest.mark.parametrize("name", VARIANTS)
def test_representations_are_of_the_posterior(name):
    model, guide = pair(name, latents=16)
    images = load("digits").test[:20]
    x = images.float() / 255
    with torch.no_grad():
        q = guide.posterior(x)
    encoder, means, counts = (represent(model, guide, images, kind) for kind in ("encoder", "means", "counts"))
    assert encoder.shape == means.shape == counts.shape == (20, 16)
    np.testing.assert_allclose(means, q.mean.flatten(1).numpy(), rtol=1e-5)
    parameters = {
        # the inverse of the rate multiplier log2(1 + 4^h)
        **dict.fromkeys(("P-VAE", "P-NB", "CMP", "CMP-MAR"), lambda: (2 ** (q.rate / model.prior.mean) - 1).log2() / 2),
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
