"""Data files that are damaged, and arrays of any shape and type: read as they are, or refused in one line."""

import numpy as np
import pytest
import torch
from hypothesis import given, note
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import Image

from pyro_nbvae.errors import InputError
from pyro_nbvae.study.data import load

from .common import check_message, damage, damages, share

pytestmark = pytest.mark.filterwarnings("ignore")
GOOD = np.random.default_rng(0).random((30, 4)).astype(np.float32)


def loaded(path):
    """The data of a path, or None if they are refused in one line."""
    try:
        return load(str(path))
    except InputError as error:
        note(str(error))
        check_message(error)
        assert "\n" not in str(error)
        return None


def rows(data):
    """All observations in one array, in the order of their values."""
    x = torch.cat([data.train, data.test]).flatten(1).numpy()
    return x[np.lexsort(x.T)]


def written(folder, kind):
    """The path of good data, and the file of it that is damaged."""
    path = folder / f"x{kind}"
    if kind == ".npy":
        np.save(path, GOOD)
    elif kind == ".npz":
        np.savez_compressed(path, train=GOOD, test=GOOD)
    elif kind == ".stored.npz":
        np.savez(path, train=GOOD, test=GOOD)
    elif kind == ".csv":
        np.savetxt(path, GOOD, delimiter=",", header="a,b,c,d")
    else:
        for number, picture in enumerate((GOOD * 255).astype(np.uint8)):
            Image.fromarray(picture.reshape(2, 2)).save(folder / f"{number}.png")
        return folder, folder / "7.png"
    return path, path


@share(200)
@given(st.sampled_from([".npy", ".npz", ".stored.npz", ".csv", ".png"]), damages)
def test_damaged_data(new_folder, kind, damaged):
    path, file = written(new_folder(), kind)
    good = rows(load(str(path)))
    damage(file, *damaged)
    found = loaded(path)
    if found is not None and kind.endswith(".npz"):  # these have checksums
        assert np.array_equal(rows(found), good)


SHAPES = arrays.array_shapes(min_dims=0, max_dims=5, min_side=0, max_side=12)


@share(120)
@given(arrays.arrays(arrays.scalar_dtypes() | arrays.unicode_string_dtypes(), SHAPES))
def test_arrays_of_any_shape_and_type(new_folder, array):
    path = new_folder() / "x.npy"
    np.save(path, array)
    found = loaded(path)
    if found is not None:
        ours, theirs = (np.sort(x.astype(np.float32), axis=None) for x in (rows(found), array))
        assert len(found.train) + len(found.test) == len(array) and len(found.train) and len(found.test)
        assert np.array_equal(ours, theirs)


@share(80)
@given(arrays.arrays(arrays.scalar_dtypes() | arrays.unicode_string_dtypes(), st.just(20) | SHAPES))
def test_labels_of_any_shape_and_type(new_folder, labels):
    path = new_folder() / "x.npz"
    np.savez(path, x=np.arange(20.0)[:, None], labels=labels)
    found = loaded(path)
    if found is not None:
        x, codes = torch.cat([found.train, found.test]), torch.cat([found.train_labels, found.test_labels])
        assert labels.shape == (20,)
        for row, code in zip(x[:, 0].long().tolist(), codes.tolist(), strict=True):
            expected = labels[row] if labels.dtype.kind != "f" else int(labels[row])
            assert found.classes[code] == str(expected)
