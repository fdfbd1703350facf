import struct

import numpy as np
import pytest
import torch

from pyro_nbvae.data import batches, load, to_unit_interval
from pyro_nbvae.data.sources import data_root
from pyro_nbvae.errors import InputError


def write_idx(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    header = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
    path.write_bytes(header + array.astype(np.uint8).tobytes())


@pytest.fixture
def mnist(tmp_path):
    """A data root with an MNIST of 30 + 20 random images in torchvision's layout."""
    rng = np.random.default_rng(0)
    for part, number in (("train", 30), ("t10k", 20)):
        write_idx(tmp_path / "MNIST/raw" / f"{part}-images-idx3-ubyte", rng.integers(0, 256, (number, 28, 28)))
        write_idx(tmp_path / "MNIST/raw" / f"{part}-labels-idx1-ubyte", rng.integers(0, 10, number))
    return tmp_path


@pytest.fixture
def offline(monkeypatch):
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")


def test_digits_are_scikit_learns():
    from sklearn.datasets import load_digits

    data = load("digits")
    assert data.train.shape == (1500, 1, 16, 16) and data.test.shape == (297, 1, 16, 16)
    assert data.image_shape == (1, 16, 16) and data.train.dtype == torch.uint8
    bunch = load_digits()
    assert torch.equal(torch.cat([data.train_labels, data.test_labels]), torch.as_tensor(bunch.target))
    # enlarging keeps the mean
    means = torch.cat([data.train, data.test]).float().mean((1, 2, 3)) / 255
    np.testing.assert_allclose(means, bunch.images.mean((1, 2)) / 16, atol=0.01)


def test_mnist_in_torchvisions_layout(mnist, monkeypatch):
    data = load("mnist", mnist)
    assert data.train.shape == (30, 1, 28, 28) and data.test.shape == (20, 1, 28, 28)
    assert data.train_labels.shape == (30,)
    raw = (mnist / "MNIST/raw/t10k-images-idx3-ubyte").read_bytes()[16:]
    assert data.test.flatten().tolist() == list(raw)
    monkeypatch.setenv("NBVAE_DATA", str(mnist))
    assert torch.equal(load("mnist").test, data.test)


def test_data_root_argument_before_variable_before_platform(monkeypatch, tmp_path):
    monkeypatch.setenv("NBVAE_DATA", "/from/variable")
    assert data_root(tmp_path) == tmp_path
    assert str(data_root()) == "/from/variable"
    monkeypatch.delenv("NBVAE_DATA")
    assert data_root().name == "nbvae"


def test_missing_data_with_no_network(tmp_path, offline):
    with pytest.raises(InputError) as error:
        load("mnist", tmp_path)
    message = str(error.value)
    assert str(tmp_path / "MNIST" / "raw") in message and "NBVAE_DATA" in message and "\n" not in message


def test_damaged_data(mnist, offline):
    path = mnist / "MNIST/raw/train-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(InputError, match="no usable MNIST"):
        load("mnist", mnist)


def test_unknown_data():
    with pytest.raises(InputError, match="unknown data 'imagenet': choose from digits, mnist"):
        load("imagenet")


def test_batches_cover_everything_once_in_order():
    images = torch.arange(10, dtype=torch.uint8).reshape(10, 1, 1, 1)
    order = torch.randperm(10)
    parts = list(batches(images, 4, order))
    assert [len(p) for p in parts] == [4, 4, 2]
    torch.testing.assert_close(torch.cat(parts).flatten() * 255, order.float())
    torch.testing.assert_close(torch.cat(list(batches(images, 3))), to_unit_interval(images))
