import shutil

import pytest

from .common import TINY, call


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A run that is trained and evaluated once."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    assert call("train", *TINY, "--out", folder)[0] == 0
    assert call("evaluate", folder, "--samples", 10, "--importance-samples", 0)[0] == 0
    return folder


@pytest.fixture(scope="session")
def new_folder(tmp_path_factory):
    """A function that returns a new folder, or a copy of one."""

    def new(like=None):
        folder = tmp_path_factory.mktemp("attack")
        return folder if like is None else shutil.copytree(like, folder / "copy")

    return new
