"""Files of a run that are cut or overwritten: refused in a line, or read as they were."""

import json

import pytest
import torch
from hypothesis import given, note
from hypothesis import strategies as st

import pyro_nbvae
from pyro_nbvae.errors import InputError
from pyro_nbvae.study.folder import Run, config_json

from .common import TINY, call, check_message, check_refused, damage, damages, same, share

pytestmark = pytest.mark.filterwarnings("ignore")


def weights(path):
    """Parameters of a pair by name, and what else makes it; None if it is refused in one line."""
    try:
        pair = pyro_nbvae.load(path)
    except InputError as error:
        note(str(error))
        check_message(error)
        return None
    return {f"{k}.{name}": tensor for k, part in enumerate(pair) for name, tensor in part.state_dict().items()}


def equal(ours, theirs):
    return ours.keys() == theirs.keys() and all(torch.equal(v, theirs[k]) for k, v in ours.items())


@share(200)
@given(damages)
def test_a_damaged_checkpoint(trained, new_folder, damaged):
    run = new_folder(trained)
    damage(run / "checkpoint.pt", *damaged)
    found = weights(run)
    assert found is None or equal(found, weights(trained))


@share(80)
@given(damages)
def test_damaged_exported_weights(trained, new_folder, damaged):
    path = Run(trained).export(new_folder() / "weights.safetensors")
    damage(path, *damaged)
    found = weights(path)
    assert found is None or equal(found, weights(trained))


@share(120)
@given(damages)
def test_a_damaged_configuration(trained, new_folder, damaged):
    run = new_folder(trained)
    damage(run / "config.json", *damaged)
    code, _, err = call("export", run)
    if code:
        check_refused(code, err)
    else:
        assert same(config_json(*Run(run).config()), json.loads((run / "config.json").read_text()))


@share(40)
@given(st.sampled_from(["metrics.json", "log.csv", "config.json.123.part"]), damages)
def test_other_damaged_files_do_no_harm(trained, new_folder, name, damaged):
    run = new_folder(trained)
    if name.endswith(".part"):  # of a process that was killed
        (run / name).write_bytes((run / "config.json").read_bytes())
    damage(run / name, *damaged)
    code, _, err = call("evaluate", run, "--samples", 10, "--importance-samples", 0)
    assert code == 0, err
    assert json.loads((run / "metrics.json").read_text())["epochs"] == 2
    code, _, err = call("train", *TINY, "--epochs", 3, "--out", run, "--resume")
    assert code == 0 and not list(run.glob("*.part")), err
    assert len((run / "log.csv").read_text().splitlines()) == 4
