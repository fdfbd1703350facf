import pytest
import torch
from torch import nn

from pyro_nbvae.networks import DECODERS, ENCODERS, build_decoder, build_encoder

SHAPES = [(1, 28, 28), (1, 16, 16), (3, 16, 16), (3, 8, 8), (1, 11, 30), (3, 64, 64)]


# not the dense block at 64 pixels: its projection is covered below, at a smaller cost
CASES = [(name, shape) for name in ENCODERS for shape in SHAPES if (name, shape[1]) != ("mlp", 64)]


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


def test_mlp_of_large_images_is_narrower_than_the_image():
    encoder = build_encoder("mlp", (3, 20, 20), 4, 1)
    assert encoder(torch.rand(2, 3, 20, 20)).shape == (2, 1, 4)
    assert max(p.numel() for p in encoder.parameters()) == 8 * 1024 * 1024


def test_the_papers_sizes():
    """No padding at 28 pixels (13, then 5 to a side), padding elsewhere; 128 maps of a quarter's side."""
    assert build_encoder("conv", (1, 28, 28), 256, 2).heads[0][0].in_features == 64 * 5 * 5
    assert build_encoder("conv", (3, 16, 16), 256, 2).heads[0][0].in_features == 64 * 4 * 4
    assert build_encoder("conv", (3, 64, 64), 256, 2).heads[0][0].in_features == 64 * 16 * 16
    for side in (28, 16, 64):
        assert build_decoder("conv", (3, side, side), 256, nn.Identity()).start == (128, side // 4, side // 4)


@pytest.mark.parametrize("shape", [(7,), (5, 12), (2, 3, 4, 5)], ids=str)
@pytest.mark.parametrize("name", ["mlp", "linear"])
def test_observations_of_any_shape(name, shape):
    assert build_encoder(name, shape, 5, 2)(torch.rand(3, *shape)).shape == (3, 2, 5)
    assert build_decoder(name, shape, 5, nn.Identity())(torch.rand(3, 5)).shape == (3, *shape)


@pytest.mark.parametrize("shape", [(1, 7, 28), (3, 64), (10,)], ids=str)
def test_what_a_convolution_does_not_take(shape):
    for build in (lambda: build_encoder("conv", shape, 4, 1), lambda: build_decoder("conv", shape, 4, nn.Identity())):
        with pytest.raises(ValueError, match="8 pixels a side or more"):
            build()


@pytest.mark.parametrize(
    "build", [lambda n: build_encoder(n, (1, 8, 8), 4, 1), lambda n: build_decoder(n, (1, 8, 8), 4, nn.Identity())]
)
def test_unknown_names(build):
    with pytest.raises(ValueError, match=r"unknown .* 'resnet': choose from conv, mlp, linear"):
        build("resnet")


def test_the_table_of_encoders_and_decoders_agrees():
    assert list(ENCODERS) == list(DECODERS)
