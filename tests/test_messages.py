"""Mistakes in a program of a user's end with one line that says what would be right."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import pytest
import torch
from pyro.distributions import constraints

from pyro_nbvae.batching import to_floats
from pyro_nbvae.distributions import (
    ConwayMaxwellPoisson,
    CountDistribution,
    GumbelSoftmax,
    Integer,
    check_family,
    poisson_window,
)
from pyro_nbvae.errors import InputError
from pyro_nbvae.guides import ConwayMaxwellPoissonGuide, GaussianGuide
from pyro_nbvae.likelihoods import Bernoulli, NegativeBinomial
from pyro_nbvae.metrics import held_out, importance_weighted_bound
from pyro_nbvae.models import GaussianModel, NegativeBinomialModel
from pyro_nbvae.study.cli import main
from pyro_nbvae.study.config import configure
from pyro_nbvae.study.training import train
from pyro_nbvae.study.tree import replace
from pyro_nbvae.study.variants import VARIANTS, ConwayMaxwellPoissonVAE, register_variant


def pair(likelihood=None):
    model = GaussianModel((5,), latents=3, decoder="linear", likelihood=likelihood)
    return model, GaussianGuide(model, encoder="linear")


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(4, 5, dtype=torch.float64), "dtype torch.float64: expected torch.float32"),
        (torch.zeros(4, 5, dtype=torch.int64), "dtype torch.int64: expected torch.float32, .* x / 255"),
        (np.zeros((4, 5)), "x must be a tensor, got ndarray"),
    ],
)
def test_data_of_another_type(x, message):
    model, guide = pair()
    for program in (model, guide):
        with pytest.raises(InputError, match=message):
            program(x)


@pytest.mark.parametrize("measure", [held_out, lambda *a: importance_weighted_bound(*a, 2)])
@pytest.mark.parametrize(
    ("likelihood", "x"),
    [
        (Bernoulli(), 255 * torch.rand(4, 5)),
        (NegativeBinomial(), torch.full((4, 5), -1.0)),
        (None, torch.full((4, 5), torch.nan)),
    ],
)
def test_no_metric_of_data_outside_the_support(measure, likelihood, x):
    with pytest.raises(InputError, match="data lie in"):
        measure(*pair(likelihood), x)


def test_arguments_of_a_model():
    with pytest.raises(TypeError, match=r"'int' object is not iterable|Size"):
        NegativeBinomialModel(40, 16)
    with pytest.raises(TypeError, match=r"likelihood must be callable, .* got 'bernoulli'"):
        NegativeBinomialModel((40,), likelihood="bernoulli", decoder="linear")


def poisson(k, rate):
    return k * rate.log() - torch.lgamma(k + 1)


def parts_of(weight=poisson, ends=poisson_window, scores=lambda k, rate: (k / rate,)):
    functions = {"log_weight": weight, "scores": scores, "window": ends}
    return {"arg_constraints": {"rate": constraints.positive}, **{k: staticmethod(f) for k, f in functions.items()}}


def family_of(parts):
    return type("Mine", (CountDistribution,), parts)


def of_weights(*functions, grad=False, **options):
    family = family_of(parts_of(*functions))
    return family(torch.tensor([2.0, 3.0], requires_grad=grad), relaxation=Integer(), **options)


def up_to_40(nats, rate):
    """A window that serves small means alone."""
    return 0 * rate, 40 + 0 * rate


@pytest.mark.parametrize("use", ["sample", "rsample", "mean", "entropy"])
def test_weights_that_are_nan_and_windows_that_end_before_they_begin(use):
    """Without validation, which would say so, they are never numbers."""
    for family in (
        of_weights(lambda k, rate: poisson(k, rate) + 0 * k.log(), poisson_window, validate_args=False),
        of_weights(poisson, lambda nats, rate: poisson_window(nats, rate)[::-1], validate_args=False),
    ):
        value = getattr(family, use)
        assert (value() if callable(value) else value).isnan().all()


def around(nats, rate):
    return rate - 3, rate + 3


@pytest.mark.parametrize(
    ("weight", "ends", "scores", "message"),
    [
        (lambda k, rate: poisson(k, rate) + 0 * k.log(), poisson_window, None, "log_weight is nan: return -inf"),
        (poisson, lambda nats, rate: poisson_window(nats, rate)[::-1], None, "window ends before it begins"),
        (poisson, around, None, r"window\(18, ...\) leaves out a mass of e\^-[0-9.]+, above e\^-18 \(count"),
        (poisson, lambda nats, rate: (rate, poisson_window(nats, rate)[1]), None, "leaves out a mass"),
        (
            poisson,
            poisson_window,
            lambda k, rate: (k / rate + 0.1,),
            "scores: not the derivative of log_weight in rate",
        ),
        (poisson, poisson_window, lambda k, rate: (k,), "scores: not the derivative of log_weight in rate"),
        (poisson, poisson_window, lambda k, rate: (), "scores returns 0 values"),
    ],
)
def test_functions_of_a_family_that_contradict_each_other(weight, ends, scores, message):
    with pytest.raises(InputError, match=message):
        of_weights(weight, ends, scores or (lambda k, rate: (k / rate,)), validate_args=True)


def test_a_learned_parameter_without_a_score():
    of_weights(poisson, poisson_window, lambda k, rate: (None,), validate_args=True)
    with pytest.raises(InputError, match="scores returns None for rate, which requires a gradient"):
        of_weights(poisson, poisson_window, lambda k, rate: (None,), grad=True, validate_args=True)


def test_a_family_is_checked_again_as_training_goes_on():
    """A window that serves small means alone is found when the means have grown."""
    family = family_of(parts_of(ends=up_to_40))
    with pytest.raises(InputError, match=r"leaves out a mass of e\^-[0-9.]+, above e\^-18 \(count 41, rate"):
        for step in range(1, 101):
            family(torch.tensor([0.5, step]), validate_args=True)


def test_prior_and_posterior_of_one_family_are_both_checked():
    """A window that is too narrow for the prior is found, though the two are made in turns."""
    family = family_of(parts_of(ends=up_to_40))
    with pytest.raises(InputError, match=r"leaves out a mass"):
        for step in range(1, 101):
            family(torch.full((3,), float(step)), validate_args=True)
            family(torch.full((7, 3), 0.5), validate_args=True)


def test_a_family_that_has_no_mass_in_its_window():
    with pytest.raises(InputError, match="log_weight is -inf in the whole window"):
        of_weights(lambda k, rate: 0 * k * rate - torch.inf, poisson_window, validate_args=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_com_poisson_passes_its_own_check_over_its_range(dtype):
    least = 10 * torch.finfo(dtype).tiny
    rate = torch.tensor([least, 1e-3, 1.0, 30.0, 1e3], dtype=dtype)[:, None]
    check_family(ConwayMaxwellPoisson(rate, torch.tensor([-3.0, 0.0, 5.0], dtype=dtype).exp()))


def test_the_check_stands_aside_inside_a_transform():
    nu = torch.tensor(1.5, dtype=torch.float64)
    slope = torch.func.grad(lambda rate: ConwayMaxwellPoisson(rate, nu, validate_args=True).mean)(2 * nu)
    step = 1e-6
    means = [ConwayMaxwellPoisson(2 * nu + s, nu).mean for s in (-step, step)]
    torch.testing.assert_close(slope, (means[1] - means[0]) / (2 * step), rtol=1e-6, atol=0)


def test_a_wrong_family_of_a_variant_is_not_trained(tmp_path, own_variants):
    """Validation, which would check it, is off in training."""

    class Wrong(ConwayMaxwellPoisson):
        scores = staticmethod(lambda k, rate, nu: (k, k))

    class WrongGuide(ConwayMaxwellPoissonGuide):
        def posterior(self, x):
            q = super().posterior(x)
            return Wrong(q.rate, q.nu, relaxation=q.relaxation)

    @dataclass(frozen=True, kw_only=True)
    class WrongVAE(ConwayMaxwellPoissonVAE):
        kind: Literal["wrong"] = "wrong"

        def build(self, event_shape, latents, *, encoder, **options):
            model, _ = super().build(event_shape, latents, encoder=encoder, **options)
            return model, WrongGuide(model, encoder=encoder)

    register_variant("wrong", WrongVAE())
    config = configure("wrong", latents=3, encoder="linear", decoder="linear", epochs=1, device="cpu")
    with pytest.raises(InputError, match=r"Wrong.scores: not the derivative of log_weight in rate"):
        train(config, tmp_path / "run", progress=False)


@pytest.mark.parametrize("missing", ["arg_constraints", "log_weight", "scores", "window"])
def test_a_family_without_one_of_its_parts(missing):
    parts = parts_of()
    parts.pop(missing)
    with pytest.raises(TypeError, match=f"Mine must define {missing}"):
        family_of(parts)(2.0)


def test_parts_of_a_variant(own_variants):
    with pytest.raises(TypeError, match="relaxation must be a Relaxation"):
        GaussianGuide(pair()[0], encoder="linear", relaxation="integer")

    @dataclass(frozen=True, kw_only=True)
    class Mine(ConwayMaxwellPoissonVAE):
        pass

    with pytest.raises(InputError, match="kind 'com_poisson' of Mine is that of ConwayMaxwellPoissonVAE: give it"):
        register_variant("MINE", Mine())
    assert "MINE" not in VARIANTS


def test_counts_under_a_gaussian_are_pointed_out(tmp_path):
    np.save(tmp_path / "counts.npy", np.random.default_rng(0).poisson(3.0, (60, 5)))
    config = configure(
        data=str(tmp_path / "counts.npy"), latents=3, encoder="linear", decoder="linear", epochs=1, device="cpu"
    )
    with pytest.warns(UserWarning, match=r"holds counts: a likelihood of counts .* \(--likelihood poisson"):
        train(config, tmp_path / "gaussian", progress=False)
    train(replace(config, likelihood="poisson"), tmp_path / "poisson", progress=False)


@pytest.mark.filterwarnings("default::UserWarning")
def test_a_warning_of_a_command_is_one_line(tmp_path, capsys):
    np.save(tmp_path / "counts.npy", np.random.default_rng(0).poisson(3.0, (60, 5)))
    flags = ["--latents", "3", "--encoder", "linear", "--decoder", "linear", "--epochs", "1", "--device", "cpu"]
    main(["train", "--data", str(tmp_path / "counts.npy"), *flags, "--out", str(tmp_path / "run")])
    warned = [line for line in capsys.readouterr().err.splitlines() if "holds counts" in line]
    assert len(warned) == 1 and warned[0].startswith("nbvae: ")


def test_advice_about_relaxations_fits_the_family():
    d = ConwayMaxwellPoisson(2.0, 1.0)
    with pytest.raises(NotImplementedError, match=r"relaxation=Integer\(\)"):
        d.rsample()
    with pytest.raises(TypeError, match=r"use Integer\(\)"):
        ConwayMaxwellPoisson(2.0, 1.0, relaxation=GumbelSoftmax(1.0)).rsample()


def test_pixels_and_zeros_and_ones_are_told_apart_by_their_type():
    """What the page on the command line says: bytes are pixels, everything else is taken unchanged."""
    ones = torch.ones(2, 1, 4, 4)
    assert torch.equal(to_floats(ones.to(torch.uint8)), ones / 255)
    assert torch.equal(to_floats(ones), ones)


def test_characters_that_move_the_cursor_are_shown(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["train", "--data", "no\rsuch.npy", "--out", str(tmp_path / "run")])
    err = capsys.readouterr().err
    assert "\r" not in err and r"no\rsuch.npy does not exist" in err
