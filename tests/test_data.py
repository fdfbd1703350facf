import hashlib
import os
import pickle
import struct

import numpy as np
import pytest
import torch
import torchvision.datasets
from PIL import Image

from pyro_nbvae.batching import batches, to_floats
from pyro_nbvae.errors import InputError
from pyro_nbvae.study.data import SOURCES, Source, load
from pyro_nbvae.study.data.sources import data_root
from pyro_nbvae.study.files import cache_root


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


def test_digits_are_scikit_learns():
    from sklearn.datasets import load_digits

    data = load("digits")
    assert data.train.shape == (1500, 1, 16, 16) and data.test.shape == (297, 1, 16, 16)
    assert data.event_shape == (1, 16, 16) and data.train.dtype == torch.uint8
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


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist", "cifar16", "cifar16-blocks", "cifar32", "celeba64"])
def test_missing_data_with_no_network(name, tmp_path, offline):
    for download in (True, False):
        with pytest.raises(InputError) as error:
            load(name, tmp_path, download=download)
        message = str(error.value)
        assert f"no {name} in {tmp_path}" in message and "NBVAE_DATA" in message and "\n" not in message


def test_damaged_data(mnist):
    path = mnist / "MNIST/raw/train-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(InputError, match=r"mnist in .* cannot be read .*: replace the four"):
        load("mnist", mnist)


def cifar_records(number, seed):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (number, 3072), dtype=np.uint8), rng.integers(0, 10, number, dtype=np.uint8)


def are_official(monkeypatch, folder):
    """The files of a folder are the official ones."""
    listed = [[p.name, hashlib.md5(p.read_bytes(), usedforsecurity=False).hexdigest()] for p in folder.iterdir()]
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "train_list", listed)
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "test_list", [])


class Calls:
    """Runs something when it is unpickled."""

    def __reduce__(self):
        return print, ("harm is done",)


def test_a_pickle_that_runs_code_is_refused(tmp_path, monkeypatch, capsys):
    """Neither because its checksum is not CIFAR's, nor, if it were, by being unpickled."""
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for part in [*(f"data_batch_{k}" for k in range(1, 6)), "test_batch"]:
        (folder / part).write_bytes(pickle.dumps({"data": Calls(), "labels": []}))
    with pytest.raises(InputError, match="data_batch_1 is not the official file"):
        load("cifar16", tmp_path)
    are_official(monkeypatch, folder)
    with pytest.raises(InputError, match=r"it names builtins\.print, which no array needs"):
        load("cifar16", tmp_path)
    assert "harm" not in capsys.readouterr().out


def test_cifar_binary_and_pickled_are_the_same(tmp_path, monkeypatch):
    for k, part in enumerate(
        ["data_batch_1", "data_batch_2", "data_batch_3", "data_batch_4", "data_batch_5", "test_batch"]
    ):
        pixels, labels = cifar_records(4, k)
        for folder, name, content in (
            ("bin", f"{part}.bin", np.concatenate([labels[:, None], pixels], 1).tobytes()),
            ("py", part, pickle.dumps({"data": pixels, "labels": labels.tolist()})),
        ):
            path = tmp_path / folder / f"cifar-10-batches-{folder}" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
    are_official(monkeypatch, tmp_path / "py" / "cifar-10-batches-py")
    binary, pickled = load("cifar16", tmp_path / "bin"), load("cifar16", tmp_path / "py")
    assert binary.train.shape == (20, 3, 16, 16) and binary.test.shape == (4, 3, 16, 16)
    assert torch.equal(binary.train, pickled.train) and torch.equal(binary.test, pickled.test)
    assert torch.equal(binary.train_labels, pickled.train_labels)
    pixels, labels = cifar_records(4, 5)
    assert torch.equal(binary.test_labels, torch.as_tensor(labels).long())
    # torchvision's Resize(16) of a picture, as in the paper's code
    pictures = [Image.fromarray(each.transpose(1, 2, 0)) for each in pixels.reshape(4, 3, 32, 32)]
    resized = np.stack([np.asarray(torchvision.transforms.Resize(16)(each)) for each in pictures])
    assert np.array_equal(binary.test.numpy(), resized.transpose(0, 3, 1, 2))
    areas = pixels.reshape(4, 3, 16, 2, 16, 2).astype(float).mean((3, 5))
    assert np.abs(load("cifar16-blocks", tmp_path / "bin").test.numpy() - areas).max() <= 0.5


def write_faces(root, number, size):
    """Faces that are one colour inside the paper's crop and another outside it."""
    folder = root / "celeba" / "img_align_celeba"
    folder.mkdir(parents=True)
    width, height = size
    for k in range(number):
        pixels = np.zeros((height, width, 3), np.uint8)
        left, right = round(15 / 178 * width), round(163 / 178 * width)
        upper, lower = round(40 / 218 * height), round(188 / 218 * height)
        pixels[upper:lower, left:right] = (k * 10, 200, 100)
        Image.fromarray(pixels).save(folder / f"{k + 1:06d}.jpg", quality=95)


@pytest.mark.parametrize("size", [(178, 218), (89, 109)])
def test_faces_are_cropped_as_the_paper_does(tmp_path, size):
    write_faces(tmp_path, 20, size)
    data = load("celeba64", tmp_path)
    assert data.train.shape == (18, 3, 64, 64) and data.test.shape == (2, 3, 64, 64)
    assert data.train_labels is None and data.test_labels is None
    inside = torch.cat([data.train, data.test])[..., 3:-3, 3:-3].float()
    expected = torch.tensor([[k * 10, 200, 100] for k in range(20)]).float()[..., None, None]
    assert (inside - expected).abs().max() < 12  # JPEG


def test_faces_of_the_right_size_and_the_official_partition(tmp_path):
    write_faces(tmp_path, 6, (64, 64))
    lines = "\n".join(f"{k:06d}.jpg {part}" for k, part in enumerate("001222", 1))
    (tmp_path / "celeba" / "list_eval_partition.txt").write_text(lines)
    data = load("celeba64", tmp_path)
    assert len(data.train) == 2 and len(data.test) == 3
    with Image.open(tmp_path / "celeba/img_align_celeba/000001.jpg") as image:
        assert torch.equal(data.train[0], torch.from_numpy(np.array(image)).permute(2, 0, 1))


def test_the_cache_is_keyed_by_the_files_and_mended_where_it_is_damaged(mnist):
    first = load("mnist", mnist)
    (cached,) = cache_root().iterdir()
    stamp = cached.stat().st_mtime_ns
    assert torch.equal(load("mnist", mnist).train, first.train) and cached.stat().st_mtime_ns == stamp
    cached.write_bytes(b"damaged")
    assert torch.equal(load("mnist", mnist).train, first.train)
    assert cached.stat().st_size > 1000
    path = mnist / "MNIST/raw/train-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:-1] + b"\x07")
    os.utime(path, ns=(1, 1))
    assert int(load("mnist", mnist).train.flatten()[-1]) == 7
    assert len(list(cache_root().iterdir())) == 2


def test_a_cache_that_cannot_be_written_costs_nothing_but_time(mnist, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("NBVAE_CACHE", str(tmp_path / "file" / "cache"))
    assert load("mnist", mnist).train.shape == (30, 1, 28, 28)


def test_unknown_data():
    with pytest.raises(
        InputError,
        match="unknown data 'imagenet': choose from digits, mnist, fashion_mnist, cifar16, cifar16-blocks, cifar32, ",
    ):
        load("imagenet")


def test_batches_cover_everything_once_in_order():
    images = torch.arange(10, dtype=torch.uint8).reshape(10, 1, 1, 1)
    order = torch.randperm(10)
    parts = list(batches(images, 4, order))
    assert [len(p) for p in parts] == [4, 4, 2]
    torch.testing.assert_close(torch.cat(parts).flatten() * 255, order.float())
    torch.testing.assert_close(torch.cat(list(batches(images, 3))), to_floats(images))


def test_a_tenth_is_held_out_whatever_the_order(tmp_path):
    """Labels in turn, as in clips of ten frames: every label is in both parts, and no observation in both or none."""
    for number in (10, 19, 1000):
        x, labels = np.arange(number, dtype=np.float32)[:, None], np.arange(number) % 10
        np.savez(tmp_path / "turns.npz", x=x, labels=labels)
        data = load(str(tmp_path / "turns.npz"))
        assert len(data.test) == number // 10
        assert sorted(torch.cat([data.train, data.test]).flatten().tolist()) == x.flatten().tolist()
        assert torch.equal(data.test_labels, data.test[:, 0].long() % 10)
    assert len(data.test_labels.unique()) == len(data.train_labels.unique()) == 10


def test_a_source_of_ones_own_is_read_again(tmp_path, monkeypatch):
    """Its function may have changed, where the files have not."""
    (tmp_path / "file").write_text("same")
    for scale in (1.0, 100.0):
        x = scale * torch.ones(20, 3)
        source = Source((3,), lambda root, x=x: (x, x, None, None), lambda root: [tmp_path / "file"])
        monkeypatch.setitem(SOURCES, "mine", source)
        assert torch.equal(load("mine").train, x)


def test_pictures_that_are_not_one_opaque_image(tmp_path):
    upright = Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8) * 4)
    frames, clear = [upright, upright.rotate(90)], Image.new("RGBA", (8, 8), (10, 20, 30, 0))
    for name, save, message in (
        ("a.tif", lambda path: upright.save(path, save_all=True, append_images=frames[1:]), "holds 2 images"),
        ("a.gif", lambda path: upright.save(path, save_all=True, append_images=frames[1:]), "holds 2 images"),
        ("a.png", clear.save, "has transparent pixels"),
    ):
        folder = tmp_path / name.replace(".", "-")
        folder.mkdir()
        save(folder / name)
        with pytest.raises(InputError, match=message):
            load(str(folder))
    turned, opaque = tmp_path / "turned", Image.new("RGBA", (8, 8), (10, 20, 30, 255))
    turned.mkdir()
    orientation = Image.Exif()
    orientation[0x0112] = 6  # to be shown turned to the right by a quarter
    for k in range(10):
        upright.save(turned / f"{k}.png", exif=orientation)
    shown = load(str(turned)).train[0, 0].numpy()
    np.testing.assert_array_equal(shown, np.rot90(np.asarray(upright), -1))
    whole = tmp_path / "whole"
    whole.mkdir()
    for k in range(10):
        opaque.save(whole / f"{k}.png")
    assert load(str(whole)).train[0, :, 0, 0].tolist() == [10, 20, 30]
