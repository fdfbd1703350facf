"""Data of a user's own, as people have them: folders of images, arrays, tables, labels."""

import math
import os
import struct
import warnings
import zlib

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from pyro_nbvae.batching import to_bytes, to_floats
from pyro_nbvae.errors import InputError
from pyro_nbvae.study.cli import main
from pyro_nbvae.study.config import configure
from pyro_nbvae.study.data import Data, describe, load
from pyro_nbvae.study.evaluation import evaluate
from pyro_nbvae.study.folder import Run
from pyro_nbvae.study.generation import generate, reconstruct
from pyro_nbvae.study.recordings import encode_run
from pyro_nbvae.study.training import train
from pyro_nbvae.study.tree import Reading

TINY = {"latents": 3, "encoder": "linear", "decoder": "linear", "epochs": 1, "batch_size": 20, "device": "cpu"}


def picture(path, value, mode="L", size=(9, 9)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, value).save(path)


def shades(x):
    return sorted(x[:, 0, 0, 0].tolist())


# --- folders ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("above", ["", "archive/images/"])
@pytest.mark.parametrize("held_out", ["test", "Test", "val", "valid", "validation", "testing"])
def test_train_and_test_folders_are_the_split(held_out, above, tmp_path):
    for k in range(12):
        picture(tmp_path / above / "train" / f"{k}.png", k)
    for k in range(3):
        picture(tmp_path / above / held_out / f"{k}.png", 200 + k)
    data = load(str(tmp_path))
    assert shades(data.train) == list(range(12)) and shades(data.test) == [200, 201, 202]
    assert data.train_labels is None and data.classes is None


def test_with_test_and_val_the_test_is_held_out_and_val_is_named(tmp_path):
    for part, shade in (("train", 0), ("val", 100), ("test", 200)):
        for k in range(4):
            picture(tmp_path / part / f"{k}.png", shade + k)
    with pytest.warns(UserWarning, match=r"4 files were not read: val/0.png, val/1.png, val/2.png, …"):
        data = load(str(tmp_path))
    assert shades(data.train) == [0, 1, 2, 3] and shades(data.test) == [200, 201, 202, 203]


def test_folders_of_classes_are_labels(tmp_path):
    for k in range(10):
        picture(tmp_path / "flat" / "images" / ("dogs" if k % 2 else "cats") / "deeper" / f"{k}.png", k)
        picture(tmp_path / "split" / "train" / ("dogs" if k % 2 else "cats") / f"{k}.png", k)
        picture(tmp_path / "split" / "test" / ("dogs" if k % 2 else "birds") / f"{k}.png", 100 + k)
        picture(tmp_path / "loose" / ("dogs" if k % 2 else ".") / f"{k}.png", k)
    flat = load(str(tmp_path / "flat"))
    assert flat.classes == ("cats", "dogs") and len(flat.test) == 1
    for x, labels in ((flat.train, flat.train_labels), (flat.test, flat.test_labels)):
        assert (x[:, 0, 0, 0] % 2).tolist() == labels.tolist()
    split = load(str(tmp_path / "split"))
    assert split.classes == ("birds", "cats", "dogs")
    assert [split.classes[k] for k in split.train_labels] == ["cats"] * 5 + ["dogs"] * 5
    assert [split.classes[k] for k in split.test_labels] == ["birds"] * 5 + ["dogs"] * 5
    assert "3 classes (birds, cats, dogs) with 0 to 5 images each" in describe(split)
    assert load(str(tmp_path / "loose")).classes is None  # some images have no class
    again = load(str(tmp_path / "split"))  # from the cache
    assert again.classes == split.classes and torch.equal(again.test_labels, split.test_labels)
    (tmp_path / "flat" / "images" / "cats").rename(tmp_path / "flat" / "images" / "zebras")
    assert load(str(tmp_path / "flat")).classes == ("dogs", "zebras")


def test_links_are_followed_once_and_hidden_folders_are_not_read(tmp_path):
    for k in range(12):
        picture(tmp_path / "own" / "cats" / f"{k}.png", k)
        picture(tmp_path / "elsewhere" / f"{k}.png", 100 + k)
        picture(tmp_path / "own" / "cats" / ".ipynb_checkpoints" / f"{k}.png", 250)
        picture(tmp_path / "own" / "__MACOSX" / f"{k}.png", 251)
    picture(tmp_path / "own" / "cats" / "._0.png", 252)
    picture(tmp_path / "one.png", 50)
    os.symlink(tmp_path / "elsewhere", tmp_path / "own" / "dogs")
    os.symlink(tmp_path / "one.png", tmp_path / "own" / "dogs" / "linked.png")
    os.symlink(tmp_path / "own", tmp_path / "own" / "cats" / "round")
    os.symlink(tmp_path / "own" / "cats" / "0.png", tmp_path / "own" / "cats" / "twice.png")
    data = load(str(tmp_path / "own"))
    assert sorted(shades(data.train) + shades(data.test)) == [*range(12), 50, *range(100, 112)]
    assert data.classes == ("cats", "dogs")


def test_what_is_not_read_is_named(tmp_path):
    for k in range(10):
        picture(tmp_path / "a" / f"{k}.png", k)
    (tmp_path / "a" / "notes.txt").write_text("")
    with pytest.warns(UserWarning, match=r"a: 1 file was not read: notes.txt$"):
        load(str(tmp_path / "a"))
    (tmp_path / "a" / "array.h5").write_text("")
    os.symlink(tmp_path / "nowhere.png", tmp_path / "a" / "broken.png")
    with pytest.warns(UserWarning, match=r"a: 3 files were not read: array.h5, broken.png, notes.txt$"):  # and cached
        load(str(tmp_path / "a"))


def test_every_format_of_pillow(tmp_path):
    names = [
        "0.pgm",
        "1.ppm",
        "2.pnm",
        "3.bmp",
        "4.tga",
        "5.tif",
        "6.jp2",
        "7.PNG",
        "8.webp",
        "9.pcx",
        "10.dib",
        "11.sgi",
    ]
    for k, name in enumerate(names):
        picture(tmp_path / name, (10 * k, 0, 0), "RGB")
    (tmp_path / "0.pgm").rename(tmp_path / "0.ppm")
    picture(tmp_path / "folder.png" / "12.png", (120, 0, 0), "RGB")  # a folder with the name of an image
    data = load(str(tmp_path))
    assert np.allclose(shades(torch.cat([data.train, data.test])), np.arange(13) * 10, atol=2)
    for k in range(10):
        picture(tmp_path / "bits" / f"{k}.pbm", k % 2, "1")
    bits = load(str(tmp_path / "bits"))
    assert set(shades(bits.train)) == {0, 255} and bits.values == "binary" and bits.images


def png16(path, pixels):
    """Write a PNG file with 16 bits per channel, (height, width, channels)."""
    height, width, channels = pixels.shape

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    kind = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    lines = b"".join(b"\0" + line.astype(">u2").tobytes() for line in pixels)
    header = struct.pack(">IIBBBBB", width, height, 16, kind, 0, 0, 0)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")
    )


def tif16(path, pixels):
    """Write a TIFF file of 16-bit colours."""
    height, width, channels = pixels.shape
    bits, content = struct.pack("<3H", 16, 16, 16), pixels.astype("<u2").tobytes()
    tags = {256: width, 257: height, 258: 8, 259: 1, 262: 2, 273: 14, 277: channels, 278: height, 279: len(content)}
    entries = b"".join(
        struct.pack("<HHII", tag, 3 if tag == 258 else 4, 3 if tag == 258 else 1, value) for tag, value in tags.items()
    )
    head = struct.pack("<2sHI", b"II", 42, 14 + len(content))
    path.write_bytes(head + bits + content + struct.pack("<H", len(tags)) + entries + struct.pack("<I", 0))


def ppm16(path, pixels, largest=65535):
    height, width, channels = pixels.shape
    kind = "P6" if channels == 3 else "P5"
    path.write_bytes(f"{kind}\n# made by hand\n{width} {height}\n{largest}\n".encode() + pixels.astype(">u2").tobytes())


@pytest.mark.parametrize(
    "channels, write, name",
    [
        (1, png16, "png"),
        (3, png16, "png"),
        (2, lambda path, x: png16(path, np.concatenate([x[..., :1], np.full_like(x[..., :1], 65535)], -1)), "png"),
        (4, lambda path, x: png16(path, np.concatenate([x, np.full_like(x[..., :1], 65535)], -1)), "png"),
        (1, ppm16, "pgm"),
        (3, ppm16, "ppm"),
        (1, lambda path, x: Image.fromarray(x[..., 0]).save(path), "tif"),
    ],
)
def test_sixteen_bits_keep_their_depth(channels, write, name, tmp_path):
    colours = {2: 1, 4: 3}.get(channels, channels)
    pixels = np.random.default_rng(0).integers(0, 65536, (12, 10, 9, colours)).astype(np.uint16)
    for k in range(12):
        write(tmp_path / f"{k:02d}.{name}", pixels[k])
    data = load(str(tmp_path))
    assert data.train.dtype == torch.float32 and data.values == "unit" and data.images and data.limits == (0, 1)
    found = np.concatenate([data.train.numpy(), data.test.numpy()])
    expected = pixels.transpose(0, 3, 1, 2) / 65535
    nearest = np.abs(found[:, None] - expected[None]).max((2, 3, 4))
    assert nearest.min(1).max() < 1e-6 and sorted(nearest.argmin(1)) == list(range(12))


def test_eight_and_sixteen_bits_in_one_folder(tmp_path):
    for k in range(10):
        picture(tmp_path / f"{k}.png", 25 * k) if k % 2 else png16(
            tmp_path / f"{k}.png", np.full((9, 9, 1), 6425 * k, np.uint16)
        )
    data = load(str(tmp_path))
    np.testing.assert_allclose(shades(torch.cat([data.train, data.test])), np.arange(10) * 25 / 255, atol=1e-6)


def test_images_of_floating_point_numbers(tmp_path):
    pixels = np.random.default_rng(0).normal(size=(10, 9, 9)).astype(np.float32)
    for k in range(10):
        Image.fromarray(pixels[k]).save(tmp_path / f"{k}.tif")
    data = load(str(tmp_path))
    assert data.values == "real" and data.images
    assert sorted(torch.cat([data.train, data.test]).flatten().tolist()) == sorted(pixels.flatten().tolist())
    pixels[3, 2, 1] = np.nan
    Image.fromarray(pixels[3]).save(tmp_path / "3.tif")
    with pytest.raises(InputError, match=r"3.tif holds 1 values that are NaN or infinite, the first at pixel \[2, 1\]"):
        load(str(tmp_path))


def test_a_run_inside_its_data_is_not_data(tmp_path):
    for k in range(20):
        picture(tmp_path / "data" / f"{k}.png", 10 * k)
    before = load(str(tmp_path / "data")).fingerprint
    run = train(configure(data=str(tmp_path / "data"), **TINY), tmp_path / "data" / "run.png", progress=False)
    generate(run, count=4)
    reconstruct(run, count=4)
    evaluate(run, ["elbo"], features=(), importance_samples=0, progress=False)
    generate(run, count=4, sampler="posterior")
    assert load(str(tmp_path / "data")).fingerprint == before
    train(configure(data=str(tmp_path / "data"), **{**TINY, "epochs": 2}), run.folder, resume=True, progress=False)
    with pytest.raises(InputError, match="is a run folder, not data"):
        load(str(run.folder))


def test_float_images_are_trained_on_generated_and_scored_as_bytes_are(tmp_path):
    images = load("digits").train[:60]
    np.save(tmp_path / "bytes.npy", images.numpy())
    np.save(tmp_path / "floats.npy", to_floats(images).numpy())
    found = []
    for name in ("bytes", "floats"):
        run = train(configure(data=str(tmp_path / f"{name}.npy"), **TINY), tmp_path / name, progress=False)
        found.append(evaluate(run, ["mse", "ssim", "fid_c"], samples=20, importance_samples=0, progress=False))
        assert generate(run, count=4)[0].is_file() and reconstruct(run, count=4).is_file()
    for metric in ("mse", "ssim", "fid_c"):
        assert found[0][metric] is not None and math.isclose(found[0][metric], found[1][metric], rel_tol=1e-5)


# --- values ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "values, array",
    [
        ("unit", np.array([0, 7, 255], np.uint8).reshape(3, 1, 1, 1)),
        ("binary", np.array([0, 255, 255], np.uint8).reshape(3, 1, 1, 1)),
        ("unit", np.array([0.0, 0.3, 1.0]).reshape(3, 1, 1, 1)),
        ("real", np.array([0.0, 0.3, 1.0]).reshape(3, 1)),
        ("binary", np.array([0.0, 1.0, 1.0]).reshape(3, 1, 1, 1)),
        ("binary", np.array([0, 1, 1]).reshape(3, 1)),
        ("counts", np.array([0, 1, 2]).reshape(3, 1)),
        ("counts", np.array([0.0, 1.0, 2.0]).reshape(3, 1)),
        ("counts", np.array([0, 1, 2], np.uint8).reshape(3, 1)),
        ("real", np.array([0.0, 1.5, 2.0]).reshape(3, 1)),
        ("real", np.array([0, -1, 2]).reshape(3, 1)),
        ("real", np.array([-1.0, 0.0, 1.0]).reshape(3, 1, 1, 1)),
    ],
)
def test_what_values_are(values, array):
    x = torch.from_numpy(array)
    assert Data("x", x, x).values == values
    assert Data("x", torch.zeros_like(x), x).values == values  # the held-out values count too


@pytest.mark.parametrize("shape", [(40, 1, 8, 8), (40, 3, 8, 8), (40, 9, 10), (40, 9, 10, 3), (40, 6)])
def test_zeros_and_ones_are_themselves_in_any_type(shape, tmp_path):
    bits = np.random.default_rng(0).integers(0, 2, shape)
    for dtype in ("u1", "i8", "f4", "?"):
        np.save(tmp_path / "x.npy", bits.astype(dtype))
        data = load(str(tmp_path / "x.npy"))
        assert data.event_shape == shape[1:] and data.values == "binary"
        assert float(to_floats(torch.cat([data.train, data.test])).sum()) == bits.sum()


def test_clear_images_need_no_axis_of_channels(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (40, 9, 11, 3), dtype=np.uint8)
    expected = {"grey": pixels[:, None, ..., 0], "colour": pixels.transpose(0, 3, 1, 2)}
    for name, array in (("grey", pixels[..., 0]), ("colour", pixels)):
        np.savez(tmp_path / "x.npz", train=array[:30], test=array[30:] // 4)
        data = load(str(tmp_path / "x.npz"))
        assert data.images and data.values == "unit"
        np.testing.assert_array_equal(data.train.numpy(), expected[name][:30])
        np.testing.assert_array_equal(data.test.numpy(), expected[name][30:] // 4)  # one layout for both


def test_images_of_any_range_are_shown_on_the_range_of_the_training_data():
    x = torch.tensor([-1.0, 0.0, 3.0]).reshape(3, 1, 1, 1)
    data = Data("signed", x, 10 * x)
    assert data.limits == (-1, 3)
    assert to_bytes(10 * x, data.limits).flatten().tolist() == [0, 64, 255]
    assert Data("unit", x.clamp(0.2, 0.9), x).limits == (0, 1)


# --- labels ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "labels, classes",
    [
        (np.arange(40) % 4 + 1, ("1", "2", "3", "4")),
        (np.arange(40) % 4 + 20_240_114, ("20240114", "20240115", "20240116", "20240117")),
        (np.arange(40) % 3 * 10.0 - 10, ("-10", "0", "10")),
        (np.array(["b", "a", "d", "c"])[np.arange(40) % 4], ("a", "b", "c", "d")),
        (np.array([b"b", b"a"])[np.arange(40) % 2], ("a", "b")),
        (np.arange(40) % 2 == 0, ("False", "True")),
    ],
)
def test_labels_of_any_kind_are_classes(labels, classes, tmp_path):
    x = np.arange(40.0)[:, None] + 0.5
    np.savez(tmp_path / "one.npz", x=x, labels=labels)
    first = labels[0]
    here, there = labels[:20], labels[20:][labels[20:] != first]  # one class is in the training labels only
    np.savez(tmp_path / "two.npz", train=x[:20], test=x[: len(there)], train_labels=here, test_labels=there)

    def text(label):
        plain = label.decode() if isinstance(label, bytes) else label.item() if hasattr(label, "item") else label
        return str(int(plain) if isinstance(plain, float) else plain)

    one, two = load(str(tmp_path / "one.npz")), load(str(tmp_path / "two.npz"))
    assert one.classes == two.classes == classes
    for part, given in ((one.train_labels, one.train), (one.test_labels, one.test)):
        assert [classes[k] for k in part] == [text(labels[int(v)]) for v in given[:, 0]]
    assert [classes[k] for k in two.train_labels] == list(map(text, here))
    assert [classes[k] for k in two.test_labels] == list(map(text, there))
    assert f"{len(classes)} classes ({classes[0]}, " in describe(one)


@pytest.mark.parametrize(
    "labels, message",
    [
        (np.arange(40) / 2, r"must be classes \(whole numbers, booleans or text\), got 0.5"),
        (np.full(40, np.nan), "must be classes .*, got nan"),
        (np.zeros(40, complex), "must be classes .*, got complex128"),
        (np.zeros(39, int), r"have shape \(39,\), expected \(40,\), one for each observation"),
        (np.eye(4)[np.arange(40) % 4], r"have shape \(40, 4\), .*one-hot, give labels.argmax\(1\)"),
    ],
)
def test_labels_that_are_not_classes(labels, message, tmp_path):
    np.savez(tmp_path / "x.npz", x=np.zeros((40, 2)), labels=labels)
    with pytest.raises(InputError, match=message) as error:
        load(str(tmp_path / "x.npz"))
    assert "x.npz" in str(error.value) and "\n" not in str(error.value)


# --- tables ----------------------------------------------------------------------------------------------------------

NUMBERS = np.random.default_rng(0).integers(0, 50, (20, 3)) / 4


def rows(data):
    return sorted(map(tuple, torch.cat([data.train, data.test]).tolist()))


@pytest.mark.parametrize(
    "name, options",
    [
        ("x.csv", {"index": False}),
        ("x.csv", {"index": False, "header": False}),
        ("x.tsv", {"index": False, "sep": "\t"}),
        ("x.csv", {"index": False, "sep": ";", "encoding": "utf-8-sig"}),
    ],
)
@pytest.mark.parametrize("columns", [["rate", "$x", "y_1"], [0, 1, 2]])
def test_tables_with_and_without_a_header(columns, name, options, tmp_path):
    pd.DataFrame(NUMBERS, columns=columns).to_csv(tmp_path / name, **options)
    data = load(str(tmp_path / name))
    assert rows(data) == sorted(map(tuple, NUMBERS.tolist())) and data.classes is None and len(data.test) == 2


@pytest.mark.parametrize("label", ["label", "Labels", "class", "target"])
@pytest.mark.parametrize("classes", [["no", "yes"], [1, 2], [10, 9], [False, True]])
def test_a_column_of_labels(label, classes, tmp_path):
    frame = pd.DataFrame(NUMBERS, columns=["a", "b", "c"])
    frame.insert(1, label, [classes[k % 2] for k in range(20)])
    frame.to_csv(tmp_path / "x.csv", index=False)
    data = load(str(tmp_path / "x.csv"))
    assert rows(data) == sorted(map(tuple, NUMBERS.tolist()))
    assert data.classes == tuple(map(str, sorted(map(int, classes)) if classes == [False, True] else sorted(classes)))
    classes_of = {
        tuple(x): str(int(c) if isinstance(c, bool) else c) for x, c in zip(NUMBERS, frame[label], strict=True)
    }
    assert [classes_of[tuple(x)] for x in data.train.tolist()] == [data.classes[k] for k in data.train_labels]


NO_USE = [
    ("x.npy", {"labels": "kind"}),
    ("x.npy", {"group": "mouse"}),
    ("split.npz", {"folds": 5}),
    ("split.npz", {"fold": 3}),
    ("pictures", {"labels": "kind"}),
    ("divided", {"split": "blocks"}),
    ("digits", {"group": "mouse"}),
    ("digits", {"fold": 2}),
    ("t.csv", {"labels": "kinds"}),
    ("t.csv", {"group": "mice"}),
    ("one.npz", {"labels": "kinds"}),
    ("one.npz", {"group": "mice"}),
]


@pytest.mark.parametrize(("name", "given"), NO_USE, ids=str)
def test_an_option_that_is_not_used_is_an_error(name, given, tmp_path):
    """It would change what is held out, or what labels are."""
    x = np.random.default_rng(0).normal(size=(40, 3))
    np.save(tmp_path / "x.npy", x)
    np.savez(tmp_path / "split.npz", train=x, test=x)
    np.savez(tmp_path / "one.npz", x=x)
    pd.DataFrame(x).assign(kind="a", mouse=1).to_csv(tmp_path / "t.csv", index=False)
    for folder in ("pictures/a", "pictures/b", "divided/train", "divided/test"):
        (tmp_path / folder).mkdir(parents=True)
        for k in range(10):
            Image.new("L", (8, 8), k).save(tmp_path / folder / f"{k}.png")
    ((option, value),) = given.items()
    with pytest.raises(InputError, match=f"--{option} {value} is not used|has no (column )?{value}"):
        load("digits" if name == "digits" else str(tmp_path / name), reading=Reading(**given))


@pytest.mark.parametrize("group", [np.arange(30), np.arange(60).reshape(60, 1), np.where(np.arange(60) < 9, np.nan, 1)])
def test_groups_have_one_value_for_each_observation(group, tmp_path):
    np.savez(tmp_path / "g.npz", x=np.ones((60, 3)), mouse=group)
    with pytest.raises(InputError, match="--group mouse needs one value for each of 60 observations, none missing"):
        load(str(tmp_path / "g.npz"), reading=Reading(group="mouse"))


def test_a_column_of_other_labels_is_no_data(tmp_path):
    x = pd.DataFrame(np.random.default_rng(0).normal(size=(40, 2)), columns=["p", "q"])
    x.assign(**{"class": np.arange(40) % 2, "kind": "a"}).to_csv(tmp_path / "t.csv", index=False)
    with pytest.warns(UserWarning, match="class is not used, because --labels is kind"):
        data = load(str(tmp_path / "t.csv"), reading=Reading(labels="kind"))
    assert data.event_shape == (2,) and data.classes == ("a",)


def test_a_column_of_groups_is_never_one_of_labels(tmp_path):
    x = pd.DataFrame(np.random.default_rng(0).normal(size=(40, 2)), columns=["p", "q"])
    mice = x.assign(**{"class": np.arange(40) % 12})
    mice.to_csv(tmp_path / "t.csv", index=False)
    data = load(str(tmp_path / "t.csv"), reading=Reading(group="class"))
    assert data.event_shape == (2,) and data.classes is None and data.groups[0] is not None
    mice.assign(label="a").to_csv(tmp_path / "t.csv", index=False)
    data = load(str(tmp_path / "t.csv"), reading=Reading(group="class"))
    assert data.event_shape == (2,) and data.classes == ("a",)


def test_labels_that_number_the_rows_are_labels(tmp_path):
    x = pd.DataFrame(np.random.default_rng(0).normal(size=(40, 2)), columns=["p", "q"])
    x.assign(id=range(40)).to_csv(tmp_path / "t.csv", index=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data = load(str(tmp_path / "t.csv"), reading=Reading(labels="id"))
    assert data.event_shape == (2,) and len(data.classes) == 40


def test_a_column_that_an_option_names_is_one(tmp_path):
    x = pd.DataFrame(np.ones((40, 3)), columns=["mouse", "mouse", "x"])
    x.to_csv(tmp_path / "t.csv", index=False)
    with pytest.raises(InputError, match="has 2 columns mouse: rename all but one"):
        load(str(tmp_path / "t.csv"), reading=Reading(group="mouse"))


@pytest.mark.parametrize("name", ["t.csv", "one.npz"])
def test_whole_data_need_no_groups(name, tmp_path):
    """Nothing is held out of new data: a group may be missing."""
    x, mouse = np.random.default_rng(0).normal(size=(40, 3)), np.array(["", *"abcdefghijklm" * 3])
    pd.DataFrame(x, columns=list("pqr")).assign(mouse=mouse).to_csv(tmp_path / "t.csv", index=False)
    np.savez(tmp_path / "one.npz", x=x, mouse=mouse)
    assert len(load(str(tmp_path / name), reading=Reading(group="mouse", whole=True)).train) == 40


def test_a_name_with_line_breaks_ends_with_one_line():
    with pytest.raises(InputError, match=r"^--labels 'a.x1e.r' is not used: .*; leave it out$") as error:
        load("digits", reading=Reading(labels="a\x1e\r"))
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize("name", ["t.csv", "one.npz"])
def test_columns_that_options_name_are_labels_and_groups(name, tmp_path):
    """Rows of a group stay together, and neither column is data."""
    x, mouse = np.random.default_rng(0).normal(size=(60, 3)).round(3), np.arange(60) % 12
    columns = {"kind": np.array(["a", "b"])[np.arange(60) // 30], "mouse": mouse}
    if name == "t.csv":
        pd.DataFrame(x, columns=list("pqr")).assign(**columns).to_csv(tmp_path / name, index=False)
    else:
        np.savez(tmp_path / name, x=x, **columns)
    data = load(str(tmp_path / name), reading=Reading(labels="kind", group="mouse", folds=4))
    assert data.event_shape == (3,) and data.classes == ("a", "b") and len(data.test_labels) == len(data.test)
    own, other = (set(part.tolist()) for part in data.groups)
    assert [line.rsplit(", ", 1)[1] for line in describe(data).splitlines()[1:3]] == ["9 groups", "3 groups"]
    assert not own & other and len(own | other) == 12 and len(other) == 3
    np.testing.assert_allclose(data.joined().train, x, rtol=1e-6)


@pytest.mark.parametrize("name", [None, "id", "Index"])
def test_a_column_that_numbers_the_rows_is_left_out_with_a_word(name, tmp_path):
    frame = pd.DataFrame(NUMBERS, columns=["a", "b", "c"])
    frame.to_csv(tmp_path / "x.csv", index_label=name)
    with pytest.warns(UserWarning, match=r"x.csv: the column .* numbers the rows and is not used: rename it to use it"):
        data = load(str(tmp_path / "x.csv"))
    assert data.event_shape == (3,) and rows(data) == sorted(map(tuple, NUMBERS.tolist()))
    frame["id"] = 7  # the same in all rows: it does not number them
    frame.to_csv(tmp_path / "y.csv", index=False)
    assert load(str(tmp_path / "y.csv")).event_shape == (4,)


@pytest.mark.parametrize(
    "text, message",
    [
        ("a,b\n1,2\n3,x\n", r"row 3, column 2 \(b\) is 'x', expected a number"),
        ("a,b\n1,2\n\n,4\n", r"row 4, column 1 \(a\) is empty, expected a number: fill it, or delete the row"),
        ("1,2\n3,nan\n", r"row 2, column 2 is 'nan', expected a number"),
        ("1.5,setosa\n2.5,setosa\n", r"row 1, column 2 is 'setosa', .*classes must be named label in a first row"),
        ("a,b\n1,2\n3,1e39\n", r"row 3, column 2 \(b\) is 1e\+39: float32 holds at most 3.4e\+38"),
        ("a,label\n1,2\n3,\n", r"row 3 has no label: fill it"),
        ("label,a,class\n1,2,3\n", r"several columns of labels, label, class: rename all but one"),
        ("a,b\n1,2\n3,4,5\n", "cannot be read as a table: .*line 3"),
        ("", "cannot be read as a table|is empty"),
    ],
)
def test_cells_that_are_wrong(text, message, tmp_path):
    (tmp_path / "x.csv").write_text(text)
    with pytest.raises(InputError, match=message) as error:
        load(str(tmp_path / "x.csv"))
    assert "\n" not in str(error.value)


# --- the advice of messages, followed to the letter ------------------------------------------------------------------


def save(path, array):
    np.savez(path, **array) if isinstance(array, dict) else np.save(path, array)


PIXELS = np.random.default_rng(0).integers(2, 100, (40, 9, 11, 3), dtype=np.uint8)
HUGE = np.random.default_rng(0).normal(size=(40, 6))
HUGE[7, 2] = 1e39
COUNTS = np.random.default_rng(0).integers(0, 50, (40, 6))
COUNTS[7, 2] = 2**24 + 1


@pytest.mark.parametrize(
    "array, message, follow",
    [
        (
            HUGE,
            r"array\[7, 2\] is 1e\+39: .*holds at most 3.4e\+38: divide the data, for example by 1e\+39",
            HUGE / 1e39,
        ),
        (COUNTS, r"array\[7, 2\] is 16777217: .*exactly up to 16777216: .*by 1.67772e\+07", COUNTS / 1.67772e7),
        (COUNTS.astype(float), r"array\[7, 2\] is 16777217: ", COUNTS / 1.67772e7),
        (
            HUGE / 1e39 * 1e-40,
            r"array\[0, 0\] is .*at least 1.2e-38: divide the data, for example by 1e-40",
            HUGE / 1e39,
        ),
        (
            np.where(HUGE > 1e38, np.nan, HUGE),
            r"first at array\[7, 2\]: remove or replace",
            np.where(HUGE > 9, 0, HUGE),
        ),
        (HUGE[:, 0], r"such as \(N, 1\) for one number each", HUGE[:, :1]),
        (PIXELS[..., 0], r"save images as .*array\[:, None\]", PIXELS[..., 0][:, None]),
        (PIXELS[..., 0], r"numbers that are not pixels as another type, such as int64", PIXELS[..., 0].astype("i8")),
        (PIXELS, r"array.transpose\(0, 3, 1, 2\)", PIXELS.transpose(0, 3, 1, 2)),
        (PIXELS, r"such as int64", PIXELS.astype("i8")),
        (PIXELS[:9, 0, 0], "10 or more are needed", PIXELS[:10, 0, 0]),
        (
            {"train": COUNTS[:7], "test": COUNTS[10:] * 1.0},
            "train is int64 and test is float64: save them with one type",
            {"train": COUNTS[:7], "test": COUNTS[10:]},
        ),
        (
            {"x_train": PIXELS[:9, 0, 0], "x_test": PIXELS[9:, 0, 0]},
            "expected the array counts",
            {"train": PIXELS[:9, 0, 0], "test": PIXELS[9:, 0, 0]},
        ),
        (
            {"x": PIXELS[:, 0, 0], "labels": np.eye(4)[np.arange(40) % 4]},
            r"give labels.argmax\(1\)",
            {"x": PIXELS[:, 0, 0], "labels": np.eye(4)[np.arange(40) % 4].argmax(1)},
        ),
        (
            {"x": PIXELS[:, 0, 0], "labels": np.arange(40) / 2},
            "convert them, or leave them out",
            {"x": PIXELS[:, 0, 0]},
        ),
        (
            {"train": COUNTS[:7], "test": COUNTS[8:], "train_labels": np.array(["1"] * 7), "test_labels": np.ones(32)},
            "both be numbers or both text: convert one of them",
            {"train": COUNTS[:7], "test": COUNTS[8:], "train_labels": np.ones(7), "test_labels": np.ones(32)},
        ),
    ],
)
def test_advice_about_arrays(array, message, follow, tmp_path):
    path = tmp_path / ("x.npz" if isinstance(array, dict) else "x.npy")
    save(path, array)
    with pytest.raises(InputError, match=message) as error:
        load(str(path))
    assert "\n" not in str(error.value)
    save(path, follow)
    assert bool(to_floats(load(str(path)).train).isfinite().all())


def test_advice_about_objects_and_names(tmp_path):
    words = np.array(["a", "b"] * 20, object)
    np.savez(tmp_path / "x.npz", x=COUNTS[:, :2], labels=words)
    with pytest.raises(
        InputError, match=r"it holds objects: save numbers as array.astype\(float\) and text as array.as"
    ):
        load(str(tmp_path / "x.npz"))
    np.savez(tmp_path / "x.npz", x=COUNTS[:, :2], labels=words.astype(str))
    assert load(str(tmp_path / "x.npz")).classes == ("a", "b")
    for wrong, right in (("npz", "npy"), ("npy", "npz")):
        with (tmp_path / f"y.{wrong}").open("wb") as file:
            np.save(file, COUNTS[:, :2]) if right == "npy" else np.savez(file, x=COUNTS[:, :2])
        with pytest.raises(InputError, match=rf"name the file \.{right}"):
            load(str(tmp_path / f"y.{wrong}"))
        (tmp_path / f"y.{wrong}").rename(tmp_path / f"z.{right}")
        assert load(str(tmp_path / f"z.{right}")).event_shape == (2,)


def _write_mat(path):
    import scipy.io

    scipy.io.savemat(path, {"NAME": NUMBERS})


WRITERS = {
    "x.mat": _write_mat,
    "x.pkl": lambda path: pd.DataFrame(NUMBERS).to_pickle(path),
    "y.pickle": lambda path: pd.to_pickle(NUMBERS, path),
    "x.pt": lambda path: torch.save(torch.from_numpy(NUMBERS), path),
    "x.json": lambda path: pd.DataFrame(NUMBERS).to_json(path),
    "x.jsonl": lambda path: pd.DataFrame(NUMBERS).to_json(path, lines=True, orient="records"),
    "x.txt": lambda path: np.savetxt(path, NUMBERS),
    "x.dat": lambda path: np.savetxt(path, NUMBERS),
}


@pytest.mark.parametrize("name", WRITERS)
def test_the_command_that_a_message_gives_converts_the_file(name, tmp_path):
    WRITERS[name](tmp_path / name)
    with pytest.raises(
        InputError, match=r"is not a .npy, .npz, .h5ad, .csv or .tsv file: convert it in Python: "
    ) as error:
        load(str(tmp_path / name))
    import numpy
    import pandas
    import scipy.io

    command = str(error.value).partition("in Python: ")[2]
    exec(command, {"numpy": numpy, "pandas": pandas, "scipy": scipy, "torch": torch})
    (converted,) = (path for path in tmp_path.iterdir() if path.name != name)
    assert rows(load(str(converted))) == sorted(map(tuple, NUMBERS.tolist()))


@pytest.mark.parametrize(
    "name, advice",
    [
        ("x.h5", 'h5py.File("'),
        ("x.parquet", 'pandas.read_parquet("'),
        ("x.xlsx", 'pandas.read_excel("'),
        ("x.zip", "unpack it"),
        ("x.png", "give the folder of the images"),
        ("x.unknown", "numpy.save("),
    ],
)
def test_other_files_in_one_line(name, advice, tmp_path, monkeypatch):
    (tmp_path / name).write_text("")
    monkeypatch.chdir(tmp_path)
    for path in (name, str(tmp_path / name)):
        with pytest.raises(InputError) as error:
            load(path)
        assert advice in str(error.value) and "\n" not in str(error.value)


def test_advice_about_folders(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 65536, (10, 8, 8, 3)).astype(np.uint16)
    for k in range(10):
        tif16(tmp_path / f"{k}.tif", pixels[k])
    with pytest.raises(InputError, match=r"0.tif has colours of 16 bits, .*: convert it to PNG"):
        load(str(tmp_path))
    for k in range(10):
        (tmp_path / f"{k}.tif").unlink()
        png16(tmp_path / f"{k}.png", pixels[k])
    assert load(str(tmp_path)).train.shape == (9, 3, 8, 8)
    Image.new("LAB", (8, 8)).save(tmp_path / "0.tif")
    with pytest.raises(InputError, match=r"0.tif has pixels of type LAB: convert it to grey or RGB"):
        load(str(tmp_path))
    Image.new("RGB", (8, 8)).save(tmp_path / "0.tif")
    assert load(str(tmp_path)).train.shape == (10, 3, 8, 8)
    picture(tmp_path / "1.tif", 3, size=(8, 8))
    with pytest.raises(InputError, match="must be of one size and all grey or all coloured"):
        load(str(tmp_path))


# --- data that have moved --------------------------------------------------------------------------------------------


@pytest.fixture
def moved(tmp_path):
    """A run, and its data at a new place."""
    for k in range(20):
        picture(tmp_path / "old" / ("a" if k % 2 else "b") / f"{k}.png", 10 * k)
        picture(tmp_path / "others" / f"{k}.png", 5 * k)
    run = train(configure(data=str(tmp_path / "old"), **TINY), tmp_path / "run", progress=False)
    (tmp_path / "old").rename(tmp_path / "new")
    return run, tmp_path / "new", tmp_path / "others"


def test_every_command_takes_the_new_place_of_the_data(moved, capsys):
    run, new, others = moved
    small = ["--samples", "4", "--importance-samples", "0"]
    commands = (["evaluate", *small], ["generate", "--sampler", "posterior"], ["reconstruct"])
    for command, *flags in commands:
        words = [command, str(run.folder), *flags, "--device", "cpu"]
        for more, part in (
            ([], "old any more: give their new place with --data"),
            (["--data", str(others)], "restore"),
        ):
            with pytest.raises(SystemExit):
                main([*words, *more])
            message = capsys.readouterr().err.splitlines()[-1]  # behind a progress bar
            assert message.startswith("nbvae: ") and part in message and "--data" in message
        main([*words, "--data", str(new)])
        assert str(run.folder) in capsys.readouterr().out
    assert evaluate(run, samples=4, importance_samples=0, progress=False, data_path=str(new))["fid_c"] is not None
    with pytest.raises(InputError, match=r"old any more: .* encode and predict: after the run"):
        encode_run(run, device="cpu")
    with np.load(encode_run(run, data=str(new), device="cpu")) as arrays:
        assert 0 < arrays["held_out"].sum() < len(arrays["mean"])  # known by their content


def test_a_run_is_resumed_with_data_that_have_moved(moved):
    run, new, others = moved
    longer = {**TINY, "epochs": 2}
    with pytest.raises(InputError, match=r"others does not hold the data that .* was trained on"):
        train(configure(data=str(others), **longer), run.folder, resume=True, progress=False)
    assert run.config()[0].data.endswith("old")
    train(configure(data=str(new), **longer), run.folder, resume=True, progress=False)
    assert len(run.read_checkpoint()["log"]) == 2 and run.config()[0].data == str(new)
    assert reconstruct(run, count=2).is_file()


def test_a_warning_is_one_line_of_the_command(tmp_path, capsys):
    pd.DataFrame(NUMBERS, columns=["a", "b", "c"]).to_csv(tmp_path / "x.csv", index_label="id")
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        main(["data", "check", str(tmp_path / "x.csv")])
    out, err = capsys.readouterr()
    assert "3 (float64, real numbers)" in out
    assert err.splitlines() == [
        f"nbvae: {tmp_path / 'x.csv'}: the column 'id' numbers the rows and is not used: rename it to use it"
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x,y\n1,2\n3,\n5,6\n", "row 3, column 2 \\(y\\) is empty"),
        ("x,y\n1,red\n3,blue\n", "row 2, column 2 \\(y\\) is 'red'"),
        ("x;y\n1,5;2,5\n3;4\n", "row 2, column 1 \\(x\\) is '1,5', expected a number: write decimals with a point"),
    ],
)
def test_a_row_of_names_does_not_hide_the_cell_that_is_wrong(text, message, tmp_path):
    (tmp_path / "x.csv").write_text(text)
    with pytest.raises(InputError, match=message):
        load(str(tmp_path / "x.csv"))


@pytest.mark.parametrize("range_", ["white", "signed", "bytes"])
def test_images_of_another_range_train_and_are_drawn_by_the_command(range_, tmp_path, capsys):
    """The range of the data is that of the decoder: means reach neither below nor above it."""
    digits = to_floats(load("digits").train[:60])
    white = (digits - digits.mean(0)) / (digits.std(0) + 0.1)
    x = {"white": white, "signed": 2 * digits - 1, "bytes": 254.7 * digits}[range_]
    np.save(tmp_path / "x.npy", x.numpy())
    out = str(tmp_path / "run")
    main(["train", "--data", str(tmp_path / "x.npy"), "--latents", "3", "--epochs", "2", "--out", out])
    main(["evaluate", out, "--samples", "60", "--importance-samples", "0"])
    main(["generate", out, "--count", "4"])
    main(["reconstruct", out, "--count", "4"])
    config, model, _ = Run(out).load()
    assert not model.unit_interval and "FID-c" in capsys.readouterr().out
    train = load(str(tmp_path / "x.npy")).train
    low, high = float(train.min()), float(train.max())
    assert config.likelihood.beta == pytest.approx(0.1 * (high - low) ** 2, rel=1e-5)
    means = model.generate(50)[1]
    assert low - 1e-3 * (high - low) <= float(means.min()) and float(means.max()) <= high + 1e-3 * (high - low)


def test_images_that_are_nearly_black_are_pointed_out(tmp_path):
    np.save(tmp_path / "x.npy", 0.01 * np.random.default_rng(0).random((20, 1, 8, 8)))
    config = configure(data=str(tmp_path / "x.npy"), latents=2, epochs=1, device="cpu")
    with pytest.warns(UserWarning, match="nearly black: their largest value is 0.0[01].* of 1"):
        train(config, tmp_path / "run", progress=False)


@pytest.mark.parametrize(("folder", "missing"), [("test", "train"), ("train", "test or val")])
def test_half_of_a_split_is_pointed_out(folder, missing, tmp_path):
    for place in (folder, "other"):
        (tmp_path / place).mkdir()
        for k in range(10):
            Image.new("L", (9, 9), k).save(tmp_path / place / f"{k}.png")
    with pytest.warns(UserWarning, match=f"the folder {folder} is data like the others.*no folder {missing} beside"):
        data = load(str(tmp_path))
    assert len(data.train) + len(data.test) == 20
