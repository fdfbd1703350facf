"""The two feature extractors: what ships, what a user may bring, and what is said where neither is to be had."""

import sys

import pytest
import torch

from pyro_nbvae.batching import batches
from pyro_nbvae.errors import InputError
from pyro_nbvae.metrics.classifier import WEIGHTS, ImageClassifier
from pyro_nbvae.metrics.features import INCEPTION_BATCH
from pyro_nbvae.study.data import SOURCES, load
from pyro_nbvae.study.features import INCEPTION, build_features, check_features

# What each is promised to reach on its own test images.
PROMISED = {"digits": 0.95, "mnist": 0.992, "fashion_mnist": 0.92, "cifar16-blocks": 0.78, "cifar32": 0.86}


@pytest.mark.parametrize("name", PROMISED)
def test_the_weights_that_ship(name):
    path = WEIGHTS / f"{name}.safetensors"
    assert path.stat().st_size <= 2_000_000
    classifier, facts = ImageClassifier.load(path)
    assert facts["data"] == name and float(facts["test_accuracy"]) >= PROMISED[name]
    assert not classifier.training and 64 <= classifier.num_features <= 128


@pytest.mark.parametrize("name", SOURCES)
def test_every_data_set_has_features(name):
    features = build_features("classifier", name)
    channels = 1 if name in ("digits", "mnist", "fashion_mnist") else 3
    for side in (8, 28, 64):
        images = torch.randint(0, 256, (3, channels, side, side), dtype=torch.uint8)
        found = features(images)
        assert found.shape == (3, features.num_features) and found.isfinite().all()


def test_the_digits_classifier_reads_digits():
    """On the one set that ships the recorded accuracy can be measured again."""
    data = load("digits")
    features = build_features("classifier", "digits")
    head = features.classifier.head
    with torch.no_grad():
        read = torch.cat([head(features((x * 255).byte())).argmax(-1) for x in batches(data.test, 100)])
    share = float((read == data.test_labels).double().mean())
    assert share == pytest.approx(float(features.facts["test_accuracy"]), abs=1e-4)


def test_a_classifier_comes_back_from_its_file(tmp_path):
    torch.manual_seed(1)
    classifier = ImageClassifier((3, 12, 12), classes=4)
    x = torch.rand(64, 3, 12, 12)
    classifier(x)  # normalisation has seen something
    path = tmp_path / "weights"
    with path.open("wb") as file:
        classifier.save(file, {"note": "a"})
    again, facts = ImageClassifier.load(path)
    assert facts["note"] == "a"
    torch.testing.assert_close(again(x), classifier.eval().half().float()(x))


@pytest.mark.parametrize("channels", [1, 3])
def test_inception_features_are_torchmetrics(inception_weights, channels):
    """torchmetrics' own copy of the network, with the resizing of the original, on the same weights."""
    from torchmetrics.image.fid import NoTrainInceptionV3

    theirs = NoTrainInceptionV3("inception-v3-compat", ["2048"], str(inception_weights), antialias=False)
    images = torch.randint(0, 256, (INCEPTION_BATCH["cpu"] + 1, channels, 28, 28), dtype=torch.uint8)
    ours = build_features("inception", "mnist", inception_weights=inception_weights)
    found = ours(images)
    assert found.std(0).mean() > 1e-3  # the images are told apart
    # folded normalisations round differently
    torch.testing.assert_close(found, theirs(images.expand(-1, 3, -1, -1)), rtol=2e-5, atol=2e-5 * float(found.max()))


def test_inception_in_bfloat16_is_the_same_network(inception_weights):
    images = torch.randint(0, 256, (INCEPTION_BATCH["cpu"] + 1, 1, 28, 28), dtype=torch.uint8)
    exact, rounded = (
        build_features(name, "mnist", inception_weights=inception_weights)
        for name in ("inception", "inception_bfloat16")
    )
    a, b = exact(images), rounded(images)
    assert b.dtype == torch.float32 and exact.digest != rounded.digest  # their statistics are cached apart
    assert 0 < float((a - b).norm() / a.norm()) < 0.05


def test_two_kinds_of_inception_would_give_the_same_names():
    check_features(["classifier", "inception_bfloat16"])
    with pytest.raises(InputError, match="name each once, and of Inception's"):
        check_features(["inception", "inception_bfloat16"])


def test_inception_weights_in_the_data_root(inception_weights, tmp_path):
    (tmp_path / INCEPTION).parent.mkdir()
    (tmp_path / INCEPTION).symlink_to(inception_weights)
    features = build_features("inception", "mnist", data_root=tmp_path)
    assert features.digest == build_features("inception", "mnist", inception_weights=inception_weights).digest


def test_inception_that_is_not_to_be_had(tmp_path, monkeypatch, offline):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    broken = tmp_path / "broken.pth"
    broken.write_bytes(b"no weights")
    other = tmp_path / "other.pth"
    torch.save({"a": torch.zeros(1)}, other)
    for weights in (None, tmp_path / "nowhere.pth", broken, other):
        with pytest.raises(InputError) as error:
            build_features("inception", "mnist", data_root=tmp_path, inception_weights=weights)
        message = str(error.value)
        assert message.startswith("no Inception weights") and "--inception-weights" in message and "\n" not in message
        assert weights is None or str(weights) in message
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", None)
    with pytest.raises(InputError, match="need torch-fidelity: pip install"):
        build_features("inception", "mnist", data_root=tmp_path)


def test_unknown_features():
    with pytest.raises(InputError, match="unknown features 'vgg': choose from classifier, inception"):
        build_features("vgg", "mnist")
