"""FID and KID against their formulas, and what they are for: worse images are further away."""

import importlib

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import nn

from pyro_nbvae import metrics
from pyro_nbvae.errors import InputError
from pyro_nbvae.metrics import Features
from pyro_nbvae.seeds import stream_seed
from pyro_nbvae.study.build import build, resolve
from pyro_nbvae.study.config import configure
from pyro_nbvae.study.data import load
from pyro_nbvae.study.features import build_features, distances
from pyro_nbvae.study.files import cache_root
from pyro_nbvae.study.generation import prior_samples
from pyro_nbvae.study.training import train
from pyro_nbvae.vae import evaluating


def test_a_reference_is_not_changed_by_what_it_is_compared_with():
    torch.manual_seed(0)
    features = build_features("classifier", "digits")
    real, one, other = (torch.randint(0, high, (60, 1, 16, 16), dtype=torch.uint8) for high in (256, 80, 250))
    reference = metrics.reference_statistics(features, real)
    expected = metrics.distances(features, real, other, kid_subsets=0)
    for each in (one, other, other):
        found = metrics.distances(features, reference, each, kid_subsets=0)
    assert found == pytest.approx(expected, rel=1e-5)


class Projections(Features):
    """A few fixed combinations of the pixels."""

    num_features, suffix, network = 6, "", "projections"

    def __init__(self, pixels, seed=0):
        super().__init__()
        table = torch.randn(pixels, 6, generator=torch.Generator().manual_seed(seed)) / pixels**0.5
        self.table = nn.Parameter(table, requires_grad=False)
        self.digest = str(seed)
        self.seen = 0

    def forward(self, images):
        self.seen += len(images)
        return images.flatten(1).float() / 255 @ self.table


@pytest.fixture
def sets():
    real = torch.randint(0, 256, (700, 1, 4, 4), dtype=torch.uint8)
    fake = torch.randint(0, 200, (500, 1, 4, 4), dtype=torch.uint8)
    return Projections(16), real, fake


def test_frechet_distance_is_its_formula(sets):
    features, real, fake = sets
    a, b = (features(images).double().numpy() for images in (real, fake))
    covariances = [np.cov(x, rowvar=False) for x in (a, b)]
    root = scipy.linalg.sqrtm(covariances[0] @ covariances[1]).real
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(covariances[0] + covariances[1] - 2 * root)
    assert distances(features, real, fake)["fid"] == pytest.approx(expected, rel=1e-4)


def test_kernel_distance_is_its_formula():
    """With as many images as a subset takes, KID is the unbiased MMD^2 of the kernel (x.y / d + 1)^3 itself."""
    features = Projections(16)
    real = torch.randint(0, 256, (300, 1, 4, 4), dtype=torch.uint8)
    fake = torch.randint(0, 200, (300, 1, 4, 4), dtype=torch.uint8)
    a, b = (features(images).double().numpy() for images in (real, fake))

    def kernel(x, y):
        return (x @ y.T / x.shape[1] + 1) ** 3

    n = 300
    within = sum((kernel(x, x).sum() - np.trace(kernel(x, x))) / (n * (n - 1)) for x in (a, b))
    found = distances(features, real, fake)
    assert found["kid"] == pytest.approx(within - 2 * kernel(a, b).mean(), rel=1e-3)
    # all subsets are the whole
    assert "kid_std" not in found
    assert distances(features, real, fake, kid_subsets=0) == {"fid": found["fid"]}


def test_the_same_seed_gives_the_same_figures(sets, monkeypatch):
    monkeypatch.setattr(importlib.import_module("pyro_nbvae.metrics.distances"), "KID_SUBSET_SIZE", 200)
    features, real, fake = sets
    first = distances(features, real, fake, seed=3)
    torch.rand(5)
    assert distances(features, real, fake, seed=3) == first
    other = distances(features, real, fake, seed=4)
    assert other["kid"] != first["kid"] and other["fid"] == first["fid"]
    assert other["kid"] == pytest.approx(first["kid"], abs=4 * first["kid_std"] / 10)  # over 100 subsets


def test_statistics_of_the_real_images_are_kept(sets):
    features, real, fake = sets
    first = distances(features, real, fake)
    features.seen = 0
    assert distances(features, real, fake) == first
    assert features.seen == len(fake)
    (kept,) = cache_root().iterdir()
    kept.write_bytes(kept.read_bytes()[:100])
    assert distances(features, real, fake) == first
    changed = real.clone()
    changed[0] = 255 - changed[0]
    for other, images in ((features, changed), (Projections(16, seed=1), real)):
        assert distances(other, images, fake)["fid"] != first["fid"]
    assert len(list(cache_root().iterdir())) == 3


def test_images_on_another_scale_are_refused(sets):
    features, real, fake = sets
    for images in ((real.float() / 255, fake), (real, fake.float() / 255), (real, [fake.float()])):
        with pytest.raises(InputError, match=r"images: FID and KID require uint8 .*, got torch.float32"):
            distances(features, *images)


def test_too_few_images(sets):
    features, real, fake = sets
    with pytest.raises(RuntimeError, match="More than one sample is required"):
        distances(features, real, fake[:1])


@pytest.fixture(scope="module")
def digits():
    return load("digits"), build_features("classifier", "digits")


def test_held_out_images_are_near_and_move_away_as_they_are_spoilt(digits):
    data, features = digits
    noise = torch.randn(data.test.shape, generator=torch.Generator().manual_seed(0)) * 255

    def blurred(width):
        from torchvision.transforms.functional import gaussian_blur

        return gaussian_blur(data.test, [9, 9], [width, width]) if width else data.test

    def noisy(share):
        return (data.test + share * noise).clamp(0, 255).to(torch.uint8)

    for spoilt in ([blurred(w) for w in (0, 1.0, 1.5, 2.5)], [noisy(s) for s in (0, 0.2, 0.4, 0.8)]):
        found = [distances(features, data.train, images) for images in spoilt]
        for name in ("fid_c", "kid_c"):
            assert [f[name] for f in found] == sorted(f[name] for f in found)
        assert found[0]["fid_c"] < found[1]["fid_c"] / 2
        assert abs(found[0]["kid_c"]) < found[1]["kid_c"] / 2


def test_a_model_that_has_learnt_nothing_is_worst(digits, tmp_path):
    data, features = digits
    config = configure("EX-C", latents=32, encoder="linear", decoder="linear", batch_size=100, lr=3e-3, epochs=8)
    torch.manual_seed(0)
    model, guide, _ = build(resolve(config, data.event_shape), data.event_shape)
    untrained = distances(features, data.train, prior_samples(model, guide, 500))
    _, model, guide = train(config, tmp_path / "run", progress=False).load()
    trained = distances(features, data.train, prior_samples(model, guide, 500))
    assert trained["fid_c"] < untrained["fid_c"] / 2 and trained["kid_c"] < untrained["kid_c"] / 2


def test_prior_samples_are_the_decoders_means_of_integer_counts():
    config = configure("EX-C", latents=8, encoder="linear", decoder="linear")
    model, guide, _ = build(resolve(config, (1, 16, 16)), (1, 16, 16))
    drawn = prior_samples(model, guide, 1003, seed=2)
    assert drawn.shape == (1003, 1, 16, 16) and drawn.dtype == torch.uint8
    assert torch.equal(drawn, prior_samples(model, guide, 1003, seed=2))
    with evaluating(model, guide, stream_seed(2, "batch 1")):  # the second batch's stream
        z, images = model.generate(500)
    assert torch.equal(z, z.round())
    assert torch.equal(drawn[500:1000], (images * 255).round().byte())
    with pytest.raises(InputError, match="must be 1 to 10,000,000, got 0"):
        prior_samples(model, guide, 0)
