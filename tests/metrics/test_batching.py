"""Metrics take a tensor or a DataLoader, in the precision of the model; how data are batched changes nothing."""

import dataclasses

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from pyro_nbvae import batching
from pyro_nbvae.batching import RandomSubset, random_subset
from pyro_nbvae.errors import InputError
from pyro_nbvae.metrics import held_out, importance_weighted_bound, represent, standard_error
from pyro_nbvae.sampling import PosteriorSampler, fit_prior
from pyro_nbvae.study.variants import VARIANTS
from tests import pairs


def pair(name="P-VAE", shape=(5,), latents=3):
    torch.manual_seed(0)
    return pairs.pair(name, shape, latents)


def same(a, b):
    for field in dataclasses.fields(a):
        first, second = getattr(a, field.name), getattr(b, field.name)
        torch.testing.assert_close(first, second, rtol=1e-6, atol=1e-9)


# 501 observations in batches of 100 or 250 end in one observation
@pytest.mark.parametrize("size", [1, 100, 250, 2000])
@pytest.mark.parametrize("pixels", [False, True])
def test_a_data_loader_gives_what_a_tensor_gives(size, pixels):
    model, guide = pair(shape=(1, 8, 8) if pixels else (5,))
    x = torch.randint(0, 256, (501, 1, 8, 8), dtype=torch.uint8) if pixels else torch.rand(501, 5)
    labelled = DataLoader(TensorDataset(x, torch.arange(501)), batch_size=size)
    uneven = [x[:7], x[7:7], x[7:300], x[300:]]
    whole = held_out(model, guide, x)
    assert (whole.ssim is not None) == pixels
    for data in (labelled, DataLoader(x, batch_size=size), uneven):
        same(held_out(model, guide, data), whole)
        bounds = [importance_weighted_bound(model, guide, each, 3) for each in (data, x)]
        torch.testing.assert_close(*bounds)
        np.testing.assert_array_equal(*(represent(model, guide, each, "counts") for each in (data, x)))
    means = []
    for data in (labelled, x):
        fitted, _ = fit_prior(model, guide, data, components=2)
        means.append(fitted.distribution.components.mean)
    torch.testing.assert_close(*means)


@pytest.mark.parametrize("name", VARIANTS)
def test_models_in_double_precision(name):
    model, guide = pair(name, latents=24 if name == "C-VAE" else 3)
    x = torch.rand(20, 5, dtype=torch.float64)
    single = held_out(model, guide, x)
    model.double(), guide.double()
    found = held_out(model, guide, x)
    assert found.elbo == pytest.approx(single.elbo, abs=6 * np.hypot(found.elbo_error, single.elbo_error))
    assert importance_weighted_bound(model, guide, x, 3).dtype == torch.float64
    assert represent(model, guide, x, "means").shape == (20, model.latents)
    assert PosteriorSampler(model, guide, x).sample(3).dtype == torch.float64


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "no observation"),
        (DataLoader(torch.zeros(0, 5)), "no observation"),
        ([torch.zeros(0, 5)], "no observation"),
        ([np.zeros((2, 5))], "got .*ndarray|Tensor"),
        (torch.zeros(5).unbind(), "0-d tensor"),
        ([torch.zeros(2, 5), torch.zeros(2, 6)], "one shape and dtype"),
        ([torch.zeros(2, 5), torch.zeros(2, 5, dtype=torch.uint8)], "one shape and dtype"),
        (3, "'int' object is not iterable"),
    ],
)
def test_what_is_no_data_is_refused_in_one_line(data, message):
    for measure in (held_out, lambda *a: importance_weighted_bound(*a, 2), lambda *a: represent(*a, "means")):
        with pytest.raises((InputError, TypeError), match=message) as error:
            measure(*pair(), data)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("number", [1, 9, 10, 11, 37, 81])
@pytest.mark.parametrize("size", [1, 3, 50])
def test_a_subset_of_a_stream_does_not_depend_on_its_batches(number, size):
    subset = RandomSubset(10)
    for batch in torch.arange(number).split(size):
        subset.add(batch)
    found = subset.observations.tolist()
    assert len(found) == min(number, 10) and found == sorted(set(found)) and set(found) <= set(range(number))
    assert torch.equal(subset.observations, random_subset(torch.arange(number), 10))


def test_a_subset_of_a_long_stream_is_seldom_copied(monkeypatch):
    """What is stored is joined once for each doubling, not for each batch."""
    joins = []
    monkeypatch.setattr(batching, "joined", lambda parts: joins.append(len(parts)) or torch.cat(list(parts)))
    subset = RandomSubset(1000)
    for batch in torch.arange(100_000).split(50):
        subset.add(batch)
    assert len(subset.observations) == 1000 and len(joins) < 20


@pytest.mark.parametrize("period", [2, 4, 10, 1000])
def test_a_subset_has_every_part_of_a_period(period):
    """Conditions that alternate, or blocks of them: the mean phase within four standard errors."""
    phase = torch.arange(4000.0) % period if period < 1000 else torch.arange(4000.0).div(1000, rounding_mode="floor")
    found = random_subset(phase, 1000)
    error = float(phase.std()) / 1000**0.5 * 0.75**0.5  # without replacement
    assert abs(float(found.mean() - phase.mean())) < 4 * error


def test_standard_errors_are_of_means_over_observations():
    model, guide = pair()
    x = torch.rand(400, 5)
    found = held_out(model, guide, x)
    each = torch.tensor([held_out(model, guide, x, seed=s).elbo for s in range(1, 40)])
    assert found.elbo_error > float(each.std())  # which is only the noise of the latents
    kl = torch.stack([held_out(model, guide, one).unit_kl.sum() for one in x.split(1)])
    assert found.kl == pytest.approx(float(kl.mean())) and found.kl_error == pytest.approx(float(kl.std()) / 20)
    assert found.mse_error == pytest.approx(found.squared_error_error / 5)
    assert held_out(model, guide, x[:1]).elbo_error is None


def test_standard_errors_are_over_groups():
    """Copies of an observation say nothing new: as one group they change no error of what is theirs alone."""
    model, guide = pair()
    x = torch.rand(60, 5)
    single, copied = held_out(model, guide, x), x.repeat_interleave(4, 0)
    groups = torch.arange(60).repeat_interleave(4)
    found = held_out(model, guide, copied, groups=groups)
    assert (found.kl, found.kl_error) == pytest.approx((single.kl, single.kl_error))
    assert held_out(model, guide, copied).kl_error == pytest.approx(found.kl_error / 2, rel=0.02)
    assert held_out(model, guide, copied, groups=groups * 0).kl_error is None
    with pytest.raises(InputError, match=r"groups have shape \(60,\): expected \(240,\)"):
        held_out(model, guide, copied, groups=torch.arange(60))


def test_the_standard_error_is_the_deviation_of_the_estimate():
    """Groups of unequal size that share an effect, with weights; over 600 draws."""
    rng = np.random.default_rng(0)
    found, errors = [], []
    for _ in range(600):
        groups = np.repeat(np.arange(80), rng.integers(1, 9, 80))
        weights = rng.integers(1, 4, len(groups))
        values = weights * (2 + rng.normal(size=80)[groups] + rng.normal(size=len(groups)))
        found.append(values.sum() / weights.sum())
        errors.append(standard_error(*map(torch.from_numpy, (values, weights, groups))))
    deviation = np.std(found)
    assert np.sqrt(np.mean(np.square(errors))) == pytest.approx(deviation, rel=4 / np.sqrt(2 * 600))
    values = torch.randn(50)
    assert standard_error(values) == pytest.approx(float(values.std()) / 50**0.5)
