"""Configurations: valid ones are read back and train or are refused; changed ones are read as they are or refused."""

import dataclasses
import json
import math

import pytest
import torch
from hypothesis import given, note
from hypothesis import strategies as st

from pyro_nbvae.errors import InputError
from pyro_nbvae.study.build import resolve
from pyro_nbvae.study.config import from_json, to_json
from pyro_nbvae.study.data import SOURCES, Source
from pyro_nbvae.study.folder import Run, config_json, parse_config
from pyro_nbvae.study.training import train
from pyro_nbvae.study.tree import TrainConfig
from pyro_nbvae.study.variants import VARIANTS

from .common import check_message, same, share
from .trees import parts

GENERATOR = torch.Generator().manual_seed(0)
DATA = {
    "images": torch.rand(30, 1, 8, 8, generator=GENERATOR),
    "numbers": torch.randn(30, 5, generator=GENERATOR),
    "counts": torch.poisson(torch.full((30, 2, 3), 4.0), generator=GENERATOR),
    "bits": torch.rand(30, 7, generator=GENERATOR).round(),
}
# What a run needs to be small; the other options have all their values.
SMALL = {
    "data": st.sampled_from(sorted(DATA)),
    "device": st.just("cpu"),
    "data_root": st.none(),
    "epochs": st.just(1),
    "tensorboard": st.just(False),
    "latents": st.integers(1, 6),
    "categories": st.integers(2, 6),
    "kl_samples": st.integers(1, 5),
    "max_count": st.none() | st.integers(1, 50),
    "prior_mean": st.none() | st.floats(0, 50, exclude_min=True),
}
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(), inner, max_size=2),
    max_leaves=3,
)


@share(150)
@given(parts(TrainConfig, {}))
def test_a_configuration_is_read_as_it_was_written(config):
    assert from_json(json.loads(json.dumps(to_json(config)))) == config


@pytest.mark.filterwarnings("ignore")
@share(150)
@given(parts(TrainConfig, SMALL))
def test_a_configuration_trains_or_is_refused(new_folder, config):
    with pytest.MonkeyPatch.context() as patch:
        for name, x in DATA.items():
            patch.setitem(SOURCES, name, Source(tuple(x.shape[1:]), lambda _, x=x: (x[:20], x[20:], None, None)))
        folder = new_folder() / "run"
        config = dataclasses.replace(config, variant=next(k for k, v in VARIANTS.items() if v.kind == config.vae.kind))
        try:
            run = train(config, folder, progress=False)
        except InputError as error:
            note(str(error))
            check_message(error)
            assert not (folder / "checkpoint.pt").exists()
        else:
            resolved, model, guide = Run(folder).load()
            assert resolved == run.config()[0] and resolved.vae.kind == config.vae.kind
            assert all(p.isfinite().all() for part in (model, guide) for p in part.state_dict().values())
            assert all(math.isfinite(v) for row in run.read_checkpoint()["log"] for v in row.values())


def places(tree):
    """Every dictionary in a tree and every list, with a key of it."""
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
        yield tree, key
        if isinstance(value, dict | list):
            yield from places(value)


PLACES = {"data": st.just("digits"), "data_root": st.none()}


@share(350)
@given(parts(TrainConfig, PLACES).map(lambda config: resolve(config, (1, 16, 16))), st.data())
def test_a_changed_tree_is_read_as_it_is_or_refused(config, data):
    stored = json.loads(json.dumps(config_json(config, (1, 16, 16))))
    holder, key = data.draw(st.sampled_from(list(places(stored))), "place")
    change = data.draw(st.sampled_from(["replace", "remove", "add"]), "change")
    if change == "remove":
        del holder[key]
    elif change == "replace":
        holder[key] = data.draw(JSON)
    elif isinstance(holder, dict):
        holder[data.draw(st.text())] = data.draw(JSON)
    else:
        holder.append(data.draw(JSON))
    note(json.dumps(stored))
    try:
        read, shape = parse_config(stored)
    except InputError as error:
        note(str(error))
        check_message(error)
    else:
        assert same(config_json(read, shape), stored)
