import copy
import math

import numpy as np
import pyro
import pytest
import torch
from pyro.infer import SVI
from pyro.optim import Adam, ClippedAdam
from torch import nn

from pyro_nbvae import likelihoods, vae
from pyro_nbvae.batching import Recording, random_subset, to_floats
from pyro_nbvae.guides import GaussianGuide, PoissonGuide
from pyro_nbvae.infer import AnalyticKL_ELBO, learning_rates
from pyro_nbvae.metrics import held_out
from pyro_nbvae.models import GaussianModel, PoissonModel
from pyro_nbvae.networks import DECODERS, ENCODERS, build_decoder, build_encoder
from pyro_nbvae.networks.initialization import initialize
from pyro_nbvae.study.data import load
from tests.pairs import pair

IMAGES = [(1, 28, 28), (1, 16, 16), (3, 16, 16), (3, 8, 8), (1, 11, 30), (3, 64, 64)]
SMALL = [(1, 1, 1), (1, 1, 7), (3, 2, 5), (2, 3, 3)]
STARTING = ["conv", "mlp", "linear"]
RELEASED = [name for name in ENCODERS if name.startswith("released")]
# not the dense block at 64 pixels: its projection is covered below, at a smaller cost
ANY = [name for name in ENCODERS if "temporal" not in name]
CASES = [(n, shape) for n in ANY for shape in IMAGES if not ("mlp" in n and shape[1] == 64)]
CASES += [(name, shape) for name in STARTING for shape in SMALL]


@pytest.mark.parametrize("name, shape", CASES, ids=str)
def test_shapes_both_ways(name, shape):
    encoder, decoder = build_encoder(name, shape, 5, 2), build_decoder(name, shape, 5, nn.Sigmoid())
    h = encoder(torch.rand(3, *shape))
    assert h.shape == (3, 2, 5)
    x = decoder(torch.poisson(torch.ones(3, 5)))
    assert x.shape == (3, *shape)
    assert ((x >= 0) & (x <= 1)).all()
    (h.sum() + x.sum()).backward()
    assert all(p.grad is not None for p in (*encoder.parameters(), *decoder.parameters()))


@pytest.mark.parametrize("name", ["mlp", "released_mlp"])
def test_mlp_of_large_images_is_narrower_than_the_image(name):
    encoder = build_encoder(name, (3, 20, 20), 4, 1)
    assert encoder(torch.rand(2, 3, 20, 20)).shape == (2, 1, 4)
    assert max(p.numel() for p in encoder.parameters()) == 8 * 1024 * 1024


def test_the_papers_sizes():
    """No padding at 28 pixels (13, then 5 to a side), padding elsewhere; 128 maps of a quarter's side."""
    for side, smallest in ((28, 5), (16, 4), (64, 16)):
        heads = build_encoder("released_conv", (3, side, side), 256, 2).heads
        assert heads[0][0].in_features == 64 * smallest**2
        for name in ("conv", "released_conv"):
            decoder = build_decoder(name, (3, side, side), 256, nn.Identity())
            assert decoder.start == (128, side // 4, side // 4)


@pytest.mark.parametrize("shape", [(1,), (7,), (5, 12), (2, 3, 4, 5)], ids=str)
@pytest.mark.parametrize("name", [name for name in ANY if "conv" not in name])
def test_observations_of_any_shape(name, shape):
    assert build_encoder(name, shape, 5, 2)(torch.rand(3, *shape)).shape == (3, 2, 5)
    assert build_decoder(name, shape, 5, nn.Identity())(torch.rand(3, 5)).shape == (3, *shape)


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("released_conv", (1, 7, 28), "at least 8 pixels a side"),
        ("released_conv", (10,), "at least 8 pixels a side"),
        ("conv", (3, 64), "of shape \\(channels, height, width\\)"),
        ("conv", (10,), "use mlp, linear or a module of your own"),
    ],
)
def test_what_a_convolution_does_not_take(name, shape, message):
    for build in (lambda: build_encoder(name, shape, 4, 1), lambda: build_decoder(name, shape, 4, nn.Identity())):
        with pytest.raises(ValueError, match=message):
            build()


@pytest.mark.parametrize(
    "build", [lambda n: build_encoder(n, (1, 8, 8), 4, 1), lambda n: build_decoder(n, (1, 8, 8), 4, nn.Identity())]
)
def test_unknown_names(build):
    with pytest.raises(ValueError, match=r"unknown .* 'resnet': choose from conv, mlp, linear"):
        build("resnet")


def test_the_table_of_encoders_and_decoders_agrees():
    assert list(ENCODERS) == list(DECODERS)


# --- nothing is lost -----------------------------------------------------------------------------------------------


def rank(matrix):
    """The numerical rank of a matrix in double precision."""
    return int(torch.linalg.matrix_rank(matrix, rtol=1e-7))


def jacobian(network, point):
    return torch.autograd.functional.jacobian(network, point).reshape(-1, point.numel())


@pytest.mark.parametrize("shape", [(1,), (2,), (3,), (8,), (2, 3), (1, 1, 1), (1, 2, 3), (1, 4, 4), (3, 5, 7)], ids=str)
@pytest.mark.parametrize("name", STARTING)
def test_an_encoder_passes_every_direction_of_its_input(name, shape):
    """With more latents than numbers, the rank of the Jacobian is the number of numbers (the released: two less)."""
    if name == "conv" and len(shape) != 3:
        return
    torch.manual_seed(0)
    x = torch.randn(200, *shape, dtype=torch.double)
    encoder = build_encoder(name, shape, 2 * math.prod(shape) + 2, 1).double().eval()
    initialize(encoder, x)
    # where a unit of a ReLU is off at one point it is on at another
    assert max(rank(jacobian(encoder, point[None])) for point in x[:20]) == math.prod(shape)


@pytest.mark.parametrize("side", [(1, 1), (4, 4), (5, 6), (7, 9), (28, 28)], ids=str)
def test_a_convolution_sees_every_pixel(side):
    torch.manual_seed(0)
    encoder = build_encoder("conv", (1, *side), 40, 1).double()
    x = torch.rand(50, 1, *side, dtype=torch.double, requires_grad=True)
    encoder(x).square().sum().backward()
    assert (x.grad.abs().amax(0) > 0).all()


@pytest.mark.parametrize("latents", [1, 2, 8, 31])
@pytest.mark.parametrize("name", STARTING)
def test_every_latent_is_a_direction_of_its_own(name, latents):
    """Fewer than 32 latents: the outputs for 500 images have as many directions as there are latents."""
    torch.manual_seed(0)
    x = torch.rand(500, 1, 12, 12, dtype=torch.double)
    encoder = build_encoder(name, (1, 12, 12), latents, 1).double().eval()
    initialize(encoder, x)
    outputs = encoder(x)[:, 0].detach()
    assert rank(outputs - outputs.mean(0)) == latents
    assert (outputs.std(0) > 0.1).all() or name != "conv"


@pytest.mark.parametrize("latents", [1, 2, 8])
@pytest.mark.parametrize("name", STARTING)
def test_a_decoder_reads_every_latent(name, latents):
    torch.manual_seed(0)
    decoder = build_decoder(name, (1, 8, 8), latents, nn.Identity()).double().eval()
    for _ in range(5):
        assert rank(jacobian(decoder, torch.randn(1, latents, dtype=torch.double))) == latents
    # also the length of z: two points of one direction have different outputs
    z = torch.randn(1, latents, dtype=torch.double)
    outputs = torch.cat([decoder(k * z) for k in (1, 2, 3)]).flatten(1)
    assert torch.linalg.vector_norm(outputs[1:] - outputs[:-1], dim=1).min() > 1e-3


# --- starts from data ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1.0, 0.5])
@pytest.mark.parametrize("name", ["mlp", "linear"])
def test_heads_are_initialised_with_mean_zero_and_the_output_scale(name, scale):
    torch.manual_seed(0)
    x = torch.randn(400, 6) * torch.tensor([1, 10, 0.1, 1000, 1, 1]) + torch.tensor([0, 5, -3, 1e4, 0, 0])
    encoder = build_encoder(name, (6,), 3, 2, scale).eval()
    initialize(encoder, x)
    outputs = encoder(x).detach()
    torch.testing.assert_close(outputs.mean(0), torch.zeros(2, 3), atol=1e-4, rtol=0)
    torch.testing.assert_close(outputs.std(0, correction=0), torch.full((2, 3), 0.15 * scale), atol=0, rtol=1e-4)


@pytest.mark.parametrize("name", STARTING)
def test_the_units_of_the_data_do_not_matter(name):
    """An encoder that starts from a x + b maps it to what it maps x to."""
    torch.manual_seed(0)
    shape = (2, 6, 6)
    x = torch.randn(100, *shape, dtype=torch.double)
    encoder = build_encoder(name, shape, 3, 1).double().eval()
    other = copy.deepcopy(encoder)
    initialize(encoder, x)
    factor, shift = torch.tensor([1e-3, 1e4]).double()[:, None, None], torch.tensor([7.0, -1e4]).double()[:, None, None]
    initialize(other, factor * x + shift)
    torch.testing.assert_close(other(factor * x + shift), encoder(x), rtol=1e-6, atol=1e-6)


def test_what_is_constant_or_nearly_always_silent_does_no_harm():
    """A constant is divided by 1; log(1 + x) by .1 at least: one spike in 10,000 bins is 7 deviations, not 100."""
    x = torch.zeros(10_000, 3)
    x[:, 1], x[0, 2] = 5.0, 1.0
    real, discrete = (build_encoder("linear", (3,), 2, 1, discrete=flag) for flag in (False, True))
    initialize(real, x)
    assert real.inputs.deviation.tolist()[:2] == [1.0, 1.0]
    initialize(discrete, x)
    assert float(discrete.inputs(x).abs().max()) == pytest.approx(math.log(2) / 0.1, rel=1e-3)
    torch.testing.assert_close(discrete.inputs(x)[:, 1], torch.zeros(10_000))


LIKELIHOODS = [
    (likelihoods.Poisson, lambda g: g.poisson([0.01, 1, 50, 1e4], (500, 4))),
    (likelihoods.NegativeBinomial, lambda g: g.negative_binomial(2, 2 / (2 + np.array([0.01, 1, 50, 1e4])), (500, 4))),
    (likelihoods.Bernoulli, lambda g: g.random((500, 4)) < [0.01, 0.3, 0.5, 0.9]),
    (likelihoods.Gaussian, lambda g: g.normal([0, 1e3, -1, 0], [1, 5, 1e-3, 1e4], (500, 4))),
    (likelihoods.Gaussian, lambda g: g.random((500, 1, 2, 2))),
    (likelihoods.Gaussian, lambda g: g.normal(size=(500, 3, 2, 2))),
]


@pytest.mark.parametrize("kind, draw", LIKELIHOODS, ids=lambda k: getattr(k, "__name__", ""))
def test_a_decoder_starts_at_the_mean_of_the_data(kind, draw):
    """Where the network's output is 0 the likelihood's mean is that of the data; of rare ones within half a count."""
    x = torch.as_tensor(draw(np.random.default_rng(0))).float()
    likelihood = kind()
    likelihood.setup(tuple(x.shape[1:]))
    output = likelihood.output(tuple(x.shape[1:]))
    initialize(output, x)
    mean = likelihood(output(torch.zeros(x.shape[1:]))).mean
    torch.testing.assert_close(mean, x.mean(0), rtol=1e-4, atol=0.5 / 500)


@pytest.mark.parametrize("mean", [1e-3, 1.0, 1e4])
def test_rates_are_multiples_of_the_mean(mean):
    """softplus(h) = mean * log2(1 + 4^a), to 1e-6 and with its slope, from a = -50 to 60."""
    output = likelihoods.Poisson().output((1,)).float()
    initialize(output, torch.full((10_000, 1), mean))
    a = torch.linspace(-50, 60, 111)[:, None].requires_grad_()
    rate = likelihoods.Poisson()(output(a)).mean
    exact = a.detach().double()
    expected = float(output.mean) * np.logaddexp(0, exact.numpy() * math.log(4)) / math.log(2)
    np.testing.assert_allclose(rate.detach().double().numpy(), expected, rtol=2e-5)
    (slope,) = torch.autograd.grad(rate.sum(), a)
    np.testing.assert_allclose(
        slope.double().numpy(), float(output.mean) * 2 * torch.sigmoid(exact * math.log(4)).numpy(), rtol=1e-4
    )


def pairs():
    torch.manual_seed(0)
    model = PoissonModel((6,), 3, decoder="mlp", likelihood=likelihoods.Poisson())
    return model, PoissonGuide(model, encoder="mlp")


def test_the_first_step_of_training_initialises_a_pair_and_no_later_one():
    counts = torch.poisson(torch.full((40, 6), 30.0))
    model, guide = pairs()
    state = copy.deepcopy(guide.state_dict())
    svi = SVI(model, guide, Adam({"lr": 1e-3}), AnalyticKL_ELBO())
    svi.evaluate_loss(counts)  # without gradients
    model.eval(), guide.eval()
    guide(counts), AnalyticKL_ELBO().loss(model, guide, counts)
    model.train(), guide.train()
    assert all(torch.equal(v, state[k]) for k, v in guide.state_dict().items())
    svi.step(counts)
    torch.testing.assert_close(guide.encoder.inputs.mean, counts.log1p().mean(0))
    torch.testing.assert_close(model.decoder.output.mean, counts.mean(0))
    svi.step(counts + 100)
    torch.testing.assert_close(model.decoder.output.mean, counts.mean(0))
    model.initialize(counts + 100)  # but a call does
    torch.testing.assert_close(model.decoder.output.mean, counts.mean(0) + 100)


def test_the_first_step_of_a_loop_without_svi_initialises_a_pair():
    counts = torch.poisson(torch.full((40, 6), 30.0))
    model, guide = pairs()
    AnalyticKL_ELBO().differentiable_loss(model, guide, counts).backward()
    torch.testing.assert_close(guide.encoder.inputs.mean, counts.log1p().mean(0))
    torch.testing.assert_close(model.decoder.output.mean, counts.mean(0))


def test_a_start_is_saved_with_the_parameters(tmp_path):
    counts = torch.poisson(torch.full((40, 6), 30.0))
    model, guide = pairs()
    model.initialize(counts), guide.initialize(counts)
    torch.save({"model": model.state_dict(), "guide": guide.state_dict()}, tmp_path / "pair.pt")
    other, other_guide = pairs()
    state = torch.load(tmp_path / "pair.pt")
    other.load_state_dict(state["model"]), other_guide.load_state_dict(state["guide"])
    SVI(other, other_guide, Adam({"lr": 0.0}), AnalyticKL_ELBO()).step(counts * 2)  # has started
    for one, two in ((model, other), (guide, other_guide)):
        assert all(torch.equal(v, two.state_dict()[k]) for k, v in one.state_dict().items())


def test_images_of_any_range():
    """[0, 1] is kept as it is; another range is that of the data, and comes back with the parameters."""
    torch.manual_seed(0)
    for x, ends in ((torch.rand(30, 1, 4, 4) * 0.5, (0, 1)), (3 * torch.randn(30, 1, 4, 4), None)):
        model = GaussianModel((1, 4, 4), 2, decoder="linear")
        assert model.unit_interval
        model.initialize(x)
        low, high = ends or (float(x.min()), float(x.max()))
        assert model.unit_interval is (ends is not None)
        far = model.decoder.output(torch.tensor([-100.0, 100.0])[:, None, None, None].expand(2, 1, 4, 4))
        torch.testing.assert_close(far[:, 0, 0, 0], torch.tensor([float(low), float(high)]))
        other = GaussianModel((1, 4, 4), 2, decoder="linear")
        other.load_state_dict(model.state_dict())
        z = torch.randn(5, 2)
        assert torch.equal(other.decode(z), model.decode(z))
        guide = GaussianGuide(model, encoder="linear")
        assert math.isfinite(AnalyticKL_ELBO().loss(model, guide, x))


@pytest.mark.parametrize("given", ["mask", "exposure"])
def test_the_range_of_images_is_that_of_all_that_was_observed(given, monkeypatch):
    """Also where a part of the data initialises: per exposure, and whatever stands where nothing was observed."""
    monkeypatch.setattr(vae, "random_subset", lambda x, most: random_subset(x, 50))
    torch.manual_seed(0)
    x = torch.rand(400, 1, 8, 8) * 5.2 - 5
    x[9, 0, 0, 0], x[11, 0, 0, 0] = 0.7, -6.0
    if given == "mask":
        mask = torch.rand(400, 1, 8, 8) > 0.1
        mask[9, 0, 0, 0] = mask[11, 0, 0, 0] = True
        data = Recording(torch.where(mask, x, math.nan), mask)
    else:
        exposure = torch.where((torch.arange(400) == 9) | (torch.arange(400) == 11), 1.0, 10.0)
        data = Recording(x * exposure.reshape(-1, 1, 1, 1), exposure=exposure)
    model = GaussianModel((1, 8, 8), 2, decoder="linear")
    model.initialize(data)
    assert (model.decoder.output.low, model.decoder.output.high) == pytest.approx((-6.0, 0.7))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (torch.rand(40, 1, 15, 16), "expected \\(N, 1, 16, 16\\)"),
        (torch.rand(40, 16, 16), "expected \\(N, 1, 16, 16\\)"),
        (torch.rand(0, 1, 16, 16), "at least one observation"),
        (torch.full((4, 1, 16, 16), math.nan), "finite values"),
        ([[0.0]], "x must be a tensor, got list"),
    ],
)
def test_data_that_cannot_start_a_pair(data, message):
    model = GaussianModel((1, 16, 16), 2, decoder="linear")
    for part in (model, GaussianGuide(model, encoder="linear")):
        with pytest.raises(ValueError, match=message):
            part.initialize(data)


def test_pixels_and_doubles_start_a_pair_alike():
    pixels = torch.randint(0, 256, (40, 1, 6, 6), dtype=torch.uint8)
    torch.manual_seed(0)
    model = GaussianModel((1, 6, 6), 2, decoder="mlp")
    guide = GaussianGuide(model, encoder="mlp")
    other, other_guide = copy.deepcopy((model, guide))
    other.double(), other_guide.double()
    for part, data in (
        (model, pixels),
        (guide, pixels),
        (other, pixels.double() / 255),
        (other_guide, pixels.double() / 255),
    ):
        part.eval().initialize(data)
    x = pixels.float() / 255
    torch.testing.assert_close(other_guide.encode(x.double())[0].float(), guide.encode(x)[0], rtol=1e-4, atol=1e-5)
    z = torch.randn(3, 2)
    torch.testing.assert_close(other.decode(z.double()).float(), model.decode(z), rtol=1e-5, atol=1e-5)


def test_sorted_data_start_as_shuffled_ones():
    """The heads start by random observations, four standard errors, and the range of images by all."""
    x = torch.linspace(-3, 3, 1000)[:, None].expand(1000, 4).contiguous()
    encoder = build_encoder("linear", (4,), 3, 1).eval()
    initialize(encoder, x)
    torch.testing.assert_close(encoder(x).mean(0), torch.zeros(1, 3), atol=4 * 0.15 / 512**0.5, rtol=0)
    images = torch.rand(40_000, 1, 32, 32)
    images[1], images[2] = 9.0, -4.0
    model = GaussianModel((1, 32, 32), 2, decoder="linear")
    model.initialize(images)
    assert (model.decoder.output.low, model.decoder.output.high) == (-4.0, 9.0)


def test_a_constant_head_keeps_its_scale():
    encoder = build_encoder("linear", (4,), 3, 1, initial_output_scale=0.5)
    before = encoder.heads[0].weight.clone()
    initialize(encoder, torch.ones(10, 4))
    torch.testing.assert_close(encoder.heads[0].weight, before)


def test_few_latents_of_dense_networks_do_not_collapse():
    """After 120 steps on digits every unit has information, and the squared error is well below that of the mean."""
    torch.manual_seed(0)
    data = load("digits")
    networks = {"encoder": "mlp", "decoder": "mlp", "likelihood": likelihoods.Gaussian(0.1)}
    model, guide = pair("CMP", data.event_shape, 6, **networks)
    x = to_floats(data.train)
    pyro.clear_param_store()
    svi = SVI(model, guide, ClippedAdam(learning_rates(3e-3)), AnalyticKL_ELBO())
    for step in range(120):
        svi.step(x[torch.randint(len(x), (100,), generator=torch.Generator().manual_seed(step))])
    found = held_out(model, guide, data.test)
    assert found.collapsed_units == 0 and found.mse < 0.75 * float(to_floats(data.test).var(0).mean())
