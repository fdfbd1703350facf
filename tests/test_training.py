"""Training: reproducible, resumable, and on the schedules it says."""

import contextlib
import json
import math
import os
import sys

import numpy as np
import pandas as pd
import pyro
import pytest
import torch

from pyro_nbvae.batching import to_floats
from pyro_nbvae.errors import InputError
from pyro_nbvae.guides import PoissonGuide
from pyro_nbvae.metrics import HeldOut, held_out
from pyro_nbvae.study import training
from pyro_nbvae.study.build import build, resolve
from pyro_nbvae.study.config import configure
from pyro_nbvae.study.data import SOURCES, Source, load
from pyro_nbvae.study.evaluation import evaluate
from pyro_nbvae.study.files import write_atomically
from pyro_nbvae.study.folder import LOCK, Run
from pyro_nbvae.study.generation import fit_prior, generate, reconstruct
from pyro_nbvae.study.processes import Processes
from pyro_nbvae.study.results import stored_config
from pyro_nbvae.study.training import train
from pyro_nbvae.study.tree import options, replace
from pyro_nbvae.study.variants import VARIANTS, register_variant
from pyro_nbvae.vae import GenerativeModel

SMALL = {"data": "digits", "latents": 8, "encoder": "linear", "decoder": "linear", "device": "cpu"}


def tiny(variant="EX-C", **changes):
    return configure(variant, **{**SMALL, "batch_size": 300, "epochs": 4, "lr": 0.01, **changes})


TINY = tiny()


def numbers(run):
    return pd.read_csv(run.folder / "log.csv").drop(columns="seconds")


def same_parameters(a, b):
    first, second = (run.read_checkpoint() for run in (a, b))
    kept = [(first, second)] + ([(first["best"], second["best"])] if first["best"] else [])
    return all(torch.equal(a[part][k], b[part][k]) for a, b in kept for part in ("model", "guide") for k in a[part])


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_trains(name, tmp_path):
    run = train(tiny(name, epochs=2), tmp_path / name, progress=False)
    log = numbers(run)
    assert list(log["epoch"]) == [1, 2] and log.notna().all().all()
    assert log["loss"][1] < log["loss"][0]
    assert sorted(p.name for p in run.folder.iterdir()) == [LOCK, "checkpoint.pt", "config.json", "log.csv"]


def test_same_seed_same_numbers_other_seed_others(tmp_path):
    runs = [train(replace(TINY, seed=s), tmp_path / str(k), progress=False) for k, s in enumerate((5, 5, 6))]
    pd.testing.assert_frame_equal(numbers(runs[0]), numbers(runs[1]))
    assert same_parameters(runs[0], runs[1]) and not same_parameters(runs[0], runs[2])


def global_settings():
    enabled, warns = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    return enabled, warns, torch.backends.cudnn.benchmark, os.environ.get("CUBLAS_WORKSPACE_CONFIG")


@pytest.mark.parametrize("workspace", [None, ":16:8"])
def test_deterministic_training_gives_the_same_numbers_and_restores_the_settings(workspace, tmp_path, monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    if workspace:
        monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", workspace)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    before, during = global_settings(), []
    config = tiny(epochs=2, deterministic=True)
    runs = [
        train(config, tmp_path / k, progress=False, on_epoch=lambda row: during.append(global_settings())) for k in "ab"
    ]
    assert same_parameters(*runs) and global_settings() == before
    assert set(during) == {(True, False, False, workspace or ":4096:8")}

    def ends(row):
        raise EndedError

    with pytest.raises(EndedError):
        train(config, tmp_path / "ended", progress=False, on_epoch=ends)
    assert global_settings() == before
    # the option may change when a run is resumed, and rows of results are of both
    other = replace(config, deterministic=False)
    train(other, tmp_path / "ended", resume=True, progress=False, on_epoch=lambda row: during.append(global_settings()))
    assert during[-1] == before and same_parameters(runs[0], Run(tmp_path / "ended"))
    assert stored_config(other) == stored_config(config)


def test_a_variable_with_which_cublas_is_not_deterministic_is_an_error_on_a_gpu_only(monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":0:0")
    before = global_settings()
    with training.deterministic(True, torch.device("cpu")):
        assert torch.are_deterministic_algorithms_enabled()
    for chosen in (False, True):
        message = r"needs CUBLAS_WORKSPACE_CONFIG=:4096:8 or :16:8, got ':0:0'"
        refused = pytest.raises(InputError, match=message) if chosen else contextlib.nullcontext()
        with refused, training.deterministic(chosen, torch.device("cuda")):
            assert global_settings() == before
    assert global_settings() == before


def test_a_killed_run_resumes_to_the_same_numbers(tmp_path, monkeypatch):
    whole = train(TINY, tmp_path / "whole", progress=False)
    evaluate, calls = training.held_out, []

    def killed_in_the_third_epoch(*arguments, **options):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return evaluate(*arguments, **options)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(training, "held_out", killed_in_the_third_epoch)
        train(TINY, tmp_path / "killed", progress=False)
    killed = Run(tmp_path / "killed")
    assert len(numbers(killed)) == 2
    torch.manual_seed(999)  # whatever happened in between
    train(TINY, killed.folder, resume=True, progress=False)
    pd.testing.assert_frame_equal(numbers(killed), numbers(whole))
    assert same_parameters(killed, whole)
    stamp = killed.checkpoint_path.stat().st_mtime_ns
    train(TINY, killed.folder, resume=True, progress=False)  # finished: nothing to do
    assert killed.checkpoint_path.stat().st_mtime_ns == stamp


class EndedError(Exception):
    """What a function that is called after each epoch may raise."""


@pytest.mark.filterwarnings("ignore:a Poisson rate is close")
@pytest.mark.parametrize(
    "changes",
    [
        {"variant": "CMP", "validate": True, "lr_schedule": "linear", "kl_warmup": 2.5},
        {"variant": "CMP-MAR", "components": 5, "groups": 3, "lr_schedule": "constant"},
        {"variant": "EX-C", "patience": 1, "temperature_start": 0.5, "anneal_epochs": 2.5, "straight_through": True},
        {"variant": "EX-G", "max_count": 90, "prior_mean": 1.0, "prior_lr_multiplier": 3.0, "lr_schedule": "constant"},
        {"variant": "MC-C", "kl_samples": 2, "encoder": "mlp", "train_size": 300, "indicator": "smoothstep"},
        {"variant": "G-VAE", "encoder": "conv", "decoder": "conv", "train_size": 60, "mixed_precision": True},
        {"variant": "DS-I", "preset": "published", "encoder": "released_mlp", "train_size": 300, "batch_size": 100},
        {"variant": "P-VAE", "estimator": "Trace_ELBO", "beta": 0.5, "clip": 1.0, "seed": 7},
        {"variant": "C-VAE", "categories": 4, "train_size": 250},
        {"variant": "P-VAE", "relaxation": "auto", "train_size": 250},
    ],
    ids=lambda changes: changes["variant"],
)
def test_a_run_that_ends_early_resumes_bit_for_bit(changes, tmp_path):
    """A function that is called with each row ends the training; what was complete is kept."""
    config, seen = tiny(**{"epochs": 3, **changes}), []
    whole = train(config, tmp_path / "whole", progress=False, on_epoch=seen.append)
    rows = whole.read_checkpoint()["log"]
    assert seen == rows and [row["epoch"] for row in rows] == [*range(1, len(rows) + 1)]

    def ends(row):
        if row["epoch"] == 2:
            raise EndedError

    with pytest.raises(EndedError):
        train(config, tmp_path / "ended", progress=False, on_epoch=ends)
    ended = Run(tmp_path / "ended")
    assert len(numbers(ended)) == len(ended.read_checkpoint()["log"]) == 2
    torch.manual_seed(999)
    train(config, ended.folder, resume=True, progress=False)
    pd.testing.assert_frame_equal(numbers(ended), numbers(whole))
    assert same_parameters(ended, whole) and ended.config() == whole.config()


def test_a_finished_run_can_be_given_more_epochs(tmp_path):
    run = train(replace(TINY, epochs=2), tmp_path, progress=False)
    assert run.config()[0].relaxation.anneal_epochs == 1
    train(replace(TINY, epochs=3), tmp_path, resume=True, progress=False)
    assert len(numbers(run)) == 3 and run.config()[0].relaxation.anneal_epochs == 1


def test_the_log_is_the_loss_it_says(tmp_path):
    """loss = -log p(x | z) + kl_weight * KL, nats per image."""
    run = train(replace(TINY, kl_warmup=0.0, epochs=2), tmp_path, progress=False)
    log = numbers(run)
    pd.testing.assert_series_equal(log["loss"], log["kl"] - log["log_likelihood"], rtol=1e-4, check_names=False)


def test_evaluation_does_not_disturb_training(tmp_path, monkeypatch):
    plain = train(TINY, tmp_path / "a", progress=False)
    nothing = HeldOut(0.0, 0.0, 0.0, None, 0.0, 0.0, 0.0, None, *torch.zeros(3, 8))
    monkeypatch.setattr(training, "held_out", lambda *_, **__: nothing)
    silent = train(TINY, tmp_path / "b", progress=False)
    assert same_parameters(plain, silent)


def test_mixed_precision_trains_as_well_and_is_evaluated_in_full_precision(tmp_path):
    config = tiny("G-VAE", encoder="conv", decoder="conv", lr=3e-3, batch_size=100)
    plain = train(config, tmp_path / "a", progress=False)
    half = train(replace(config, mixed_precision=True), tmp_path / "b", progress=False)
    assert not same_parameters(plain, half)
    assert numbers(half)["test_mse"].iloc[-1] < 0.8 * numbers(half)["test_mse"].iloc[0]
    np.testing.assert_allclose(numbers(half)["test_mse"], numbers(plain)["test_mse"], rtol=0.05)
    _, model, guide = half.load()
    x = torch.rand(20, 1, 16, 16)
    with torch.no_grad():
        z = guide(x)
        images = model.decode(z)
        assert images.dtype == torch.float32 and not torch.equal(images, images.bfloat16().float())
        model.train()
        rough = model.decode(z)
        assert rough.dtype == torch.float32 and not torch.equal(rough, images)
        torch.testing.assert_close(rough, images, atol=0.02, rtol=0.05)


def test_two_runs_in_one_process_do_not_share_parameters(tmp_path):
    pyro.get_param_store().setdefault("prior$$$logits", torch.full((8,), 3.0))
    alone = train(TINY, tmp_path / "a", progress=False)
    train(tiny("DS-G"), tmp_path / "b", progress=False)
    again = train(TINY, tmp_path / "c", progress=False)
    assert same_parameters(alone, again)
    assert list(pyro.get_param_store().keys()) == ["prior$$$logits"]


def test_schedules():
    config = resolve(tiny(epochs=20), (1, 16, 16))
    assert config.vae.estimator.kl_warmup == 2
    temperatures = [config.relaxation.temperature_at(e) for e in (0, 5, 10, 15)]
    assert temperatures == pytest.approx([0.24, 0.145, 0.05, 0.05])


OWN = {
    "prior_lr_multiplier": 0.5,
    "prior_mean": 3.0,
    "kl_samples": 7,
    "temperature": 0.3,
    "temperature_start": 0.9,
    "anneal_epochs": 4.0,
    "kl_warmup": 1.0,
}


def test_a_variants_defaults_hold_where_no_flag_does(own_variants):
    """A flag comes before, and so does what another preset sets."""
    register_variant("MINE", replace(VARIANTS["MC-C"], **OWN))
    assert options(resolve(configure("MINE"), (1, 16, 16))).items() >= OWN.items()
    flags = {name: 2 * value for name, value in OWN.items()}
    assert options(resolve(configure("MINE", **flags), (1, 16, 16))).items() >= flags.items()
    paper, plain = (options(resolve(configure(name, preset="paper"), (1, 16, 16))) for name in ("MINE", "MC-C"))
    set_by_paper = {"prior_lr_multiplier", "prior_mean", "temperature_start", "anneal_epochs", "kl_warmup"}
    assert {name for name in OWN if paper[name] == plain[name]} == set_by_paper


@pytest.mark.parametrize("variant", ["MC-G", "EX-C", "P-VAE"])
def test_gumbel_softmax_starts_from_small_counts_and_cuts_off_none(variant):
    config = resolve(configure(variant, relaxation="gumbel"), (1, 16, 16))
    assert config.relaxation.max_count is None and config.vae.prior.prior_mean == 2
    assert resolve(configure(variant, relaxation="gumbel", max_count=50), (1, 16, 16)).relaxation.max_count == 50
    assert resolve(configure(variant, relaxation="gumbel", prior_mean=9.0), (1, 16, 16)).vae.prior.prior_mean == 9
    for other in (configure("CMP"), configure("EX-C"), configure(variant, relaxation="integer")):
        assert resolve(other, (1, 16, 16)).vae.prior.prior_mean == 20


def test_the_papers_preset():
    """The released code's: KL weight min(1, 5 e / 250), temperature max(1 - 0.95 e / 250, 0.05) ..."""
    config = resolve(configure("MC-C", data="mnist", preset="paper"), (1, 28, 28))
    found = options(config)
    assert [found[n] for n in ("epochs", "batch_size", "lr", "latents", "kl_samples")] == [200, 512, 1e-3, 256, 5]
    assert found["kl_warmup"] == 250 / 5 and found["lr_schedule"] == "constant" and found["loss"] == "squared_error"
    for epoch in (0, 3, 60, 199):
        assert config.relaxation.temperature_at(epoch) == pytest.approx(max(1 - 0.95 * epoch / 250, 0.05))
    assert found["beta"] == 28 / 256 and found["clip"] == 28
    gumbel = resolve(configure("MC-G", preset="paper"), (1, 28, 28))
    assert gumbel.relaxation.temperature_at(199) == 1
    assert resolve(configure(preset="paper", epochs=3, beta=2.0), (1, 28, 28)).likelihood.beta == 2.0


@pytest.mark.parametrize("decoder", ["conv", "mlp", "linear"])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("variant", ["P-VAE", "DS-C", "EX-C", "G-VAE"])
def test_the_papers_loss(variant, channels, decoder):
    """One batch's loss is the released one times the number of squared errors that are its unit, up to a constant.

    Released: squared errors summed over the last axis (a row of pixels, or the flattened image) and averaged over the
    others, plus the KL averaged over latents; colours in [-1, 1].
    """
    shape, latents = (channels, 12, 8), 6
    config = resolve(configure(variant, preset="paper", decoder=decoder, latents=latents), shape)
    model, guide, elbo = build(config, shape)
    torch.manual_seed(0)
    x = torch.rand(5, *shape)
    torch.manual_seed(1)
    with torch.no_grad():
        loss = model.loss_scale * float(elbo.differentiable_loss(model, guide, x)) / len(x)
        torch.manual_seed(1)
        guide_trace = pyro.poutine.trace(guide).get_trace(x)
        y = model.observation(guide_trace.nodes["z"]["value"]).mean
        kl = torch.distributions.kl_divergence(guide.posterior(x), model.prior_distribution())
    if channels == 3:
        x, y = 2 * x - 1, 2 * y - 1
    if decoder != "conv":
        x, y = x.flatten(1), y.flatten(1)
    released = float((x - y).square().sum(-1).mean() + kl.mean())
    beta = config.likelihood.beta
    unit = beta * latents  # squared errors in [0, 1] that are one unit of the released loss
    assert unit == {1: 1.0, 3: 0.25}[channels] * (channels * 12 if decoder == "conv" else 1) == config.training.clip
    constant = beta * math.prod(shape) / 2 * math.log(math.pi * beta)
    assert loss == pytest.approx(unit * released + constant, rel=1e-5)


def test_a_folder_in_the_way(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="exists and holds no run"):
        train(TINY, tmp_path, progress=False)
    run = train(replace(TINY, epochs=1), tmp_path / "run", progress=False)
    before = run.checkpoint_path.read_bytes()
    with pytest.raises(InputError, match="already holds a run: continue it with --resume"):
        train(replace(TINY, epochs=1), run.folder, progress=False)
    with pytest.raises(InputError, match="latents 8 there, 9 here"):
        train(replace(TINY, latents=9), run.folder, resume=True, progress=False)
    assert run.checkpoint_path.read_bytes() == before


@pytest.mark.parametrize("name", ["CMP", "EX-C", "EX-G", "EX-I", "G-VAE"])
def test_a_run_that_diverges_ends_with_one_line_and_keeps_what_was(name, tmp_path):
    config = tiny(name)
    run = train(replace(config, epochs=1), tmp_path, progress=False)
    state = run.read_checkpoint()
    state["model"]["decoder.layers.0.weight"].fill_(float("nan"))
    run.write_checkpoint(state)
    with pytest.raises(InputError, match=r"diverged in epoch 2 \(the loss is not finite\)") as error:
        train(replace(config, epochs=2), tmp_path, resume=True, progress=False)
    assert "\n" not in str(error.value)
    assert len(numbers(run)) == 1


def test_atomic_writing_leaves_the_old_file_on_failure(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")

    def fails(file):
        file.write(b"half")
        raise OSError("disk full")

    with pytest.raises(OSError):
        write_atomically(path, fails)
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["file"]


def test_metrics_of_a_run_whose_checkpoint_is_gone_are_not_those_of_the_next(tmp_path):
    run = train(replace(TINY, epochs=1), tmp_path / "run", progress=False)
    for name in ("metrics.json", "metrics-mixture.json"):
        run.write_json(name, {"epochs": 1, "mse": 0.5})
    train(replace(TINY, epochs=1), run.folder, resume=True, progress=False)
    assert run.read_json("metrics.json") == run.read_json("metrics-mixture.json") == {"epochs": 1, "mse": 0.5}
    run.checkpoint_path.unlink()
    train(replace(TINY, epochs=1, lr=0.5), run.folder, resume=True, progress=False)
    assert run.read_json("metrics.json") == run.read_json("metrics-mixture.json") == {}


def test_checkpoints_are_read_by_torchs_safe_loader(tmp_path):
    run = train(replace(TINY, epochs=1), tmp_path, progress=False)
    state = torch.load(run.checkpoint_path, weights_only=True)
    _, model, _ = run.load()
    assert state["model"].keys() == model.state_dict().keys()
    assert all(torch.equal(value, state["model"][name]) for name, value in model.state_dict().items())


@pytest.fixture
def steps(monkeypatch):
    """What each training step is given, and the gradients before and after they are clipped."""
    taken = []
    step, clip, adam = training.Trainer.step, torch.nn.utils.clip_grad_norm_, torch.optim.Adam.step

    def recorded_step(self, x):
        taken.append({"x": x.x.clone(), "kl_weight": self.elbo.kl_weight, "rng": torch.get_rng_state()})
        taken[-1]["lr"] = [group["lr"] for group in self.optimizer.param_groups]
        taken[-1]["temperature"] = getattr(self.guide.relaxation, "temperature", None)
        terms = step(self, x)
        return terms

    def recorded_clip(parameters, norm):
        taken[-1]["gradients"] = [p.grad.clone() for p in parameters]
        taken[-1]["parameters"] = [p.detach().clone() for p in parameters]
        return clip(parameters, norm)

    def recorded_adam(self, *arguments):
        squares = [p.grad.square().sum() for group in self.param_groups for p in group["params"]]
        taken[-1]["norm"] = float(sum(squares) ** 0.5)
        return adam(self, *arguments)

    monkeypatch.setattr(training.Trainer, "step", recorded_step)
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", recorded_clip)
    monkeypatch.setattr(torch.optim.Adam, "step", recorded_adam)
    return taken


# five steps an epoch
STEPS = {"train_size": 250, "batch_size": 60, "epochs": 3}


def test_every_step_follows_the_schedules(steps, tmp_path):
    """KL weight and temperature of each step, also within an epoch, and in the log those of the epoch's last step."""
    run = train(tiny(**STEPS, kl_warmup=2.0, anneal_epochs=2.5), tmp_path, progress=False)

    def weight(epoch):
        return min(1, epoch / 2)

    def temperature(epoch):
        return 0.24 + (0.05 - 0.24) * min(1, epoch / 2.5)

    epochs = [e + k / 5 for e in range(3) for k in range(5)]
    assert [s["kl_weight"] for s in steps] == pytest.approx([weight(e) for e in epochs])
    assert [s["temperature"] for s in steps] == pytest.approx([temperature(e) for e in epochs])
    log = numbers(run)
    assert log["kl_weight"].tolist() == pytest.approx([weight(e + 0.8) for e in range(3)])
    assert log["temperature"].tolist() == pytest.approx([temperature(e + 0.8) for e in range(3)])


@pytest.mark.parametrize(
    ("schedule", "factor"),
    [
        ("constant", lambda done: 1),
        ("linear", lambda done: 1 - done),
        ("cosine", lambda done: (1 + math.cos(math.pi * done)) / 2),
    ],
)
def test_learning_rates_follow_their_schedule(schedule, factor, steps, tmp_path):
    """Those of the networks and of the prior alike; a run that is given more epochs goes on with their schedule."""
    config = tiny(**STEPS, lr=0.01, lr_schedule=schedule, prior_lr_multiplier=3.0)
    train(config, tmp_path, progress=False)
    train(replace(config, epochs=4), tmp_path, resume=True, progress=False)
    done = [k / 15 for k in range(15)] + [k / 20 for k in range(15, 20)]
    for step, share in zip(steps, done, strict=True):
        assert step["lr"] == pytest.approx([0.01 * factor(share), 0.03 * factor(share)], rel=1e-12)


def test_data_are_checked_on_the_host(tmp_path, monkeypatch):
    """A GPU would get all of them as floats; the model comes to them instead, and returns."""
    happened, move, check = [], GenerativeModel.to, GenerativeModel.check_support

    def to(model, device):
        happened.append(str(device))
        return move(model, device)

    def checked(model, x, what="data"):
        happened.append(what.split()[0])
        check(model, x, what)

    monkeypatch.setattr(GenerativeModel, "to", to)
    monkeypatch.setattr(GenerativeModel, "check_support", checked)
    data = load("digits")
    device = torch.device("cpu", 0)  # which differs from the host by its name
    training.Trainer(Run(tmp_path), resolve(TINY, data.event_shape, data), data, device, Processes())
    assert list(dict.fromkeys(happened[1:-1])) == ["cpu", "training", "held-out"]
    assert happened[0] == happened[-1] == "cpu:0"


def test_every_epoch_holds_every_image_once_in_an_order_of_its_own(steps, tmp_path):
    train(tiny("G-VAE", **{**STEPS, "epochs": 2}), tmp_path, progress=False)
    images = to_floats(load("digits").train[:250])
    orders = []
    for epoch in (steps[:5], steps[5:]):
        assert [len(s["x"]) for s in epoch] == [60, 60, 60, 60, 10]
        seen = torch.cat([s["x"] for s in epoch])
        places = (seen.flatten(1)[:, None] == images.flatten(1)).all(-1).float().argmax(1)
        assert torch.equal(images[places], seen)
        expected, found = (x.flatten(1)[:, :].sum(1).sort().values for x in (images, seen))
        torch.testing.assert_close(found, expected)
        orders.append(places.tolist())
    assert orders[0] != orders[1]


@pytest.mark.parametrize(("preset", "scale"), [("default", 1.0), ("published", 0.1)])
def test_gradients_are_of_the_scaled_loss_per_observation_and_clipped(preset, scale, steps, tmp_path):
    """Before clipping they are those of the negative ELBO over the batch, times beta in published runs."""
    sizes = {"train_size": 100, "batch_size": 40, "epochs": 1}
    run = train(tiny(preset=preset, **sizes, beta=0.1, clip=1e-3, kl_warmup=0.5), tmp_path, progress=False)
    model, guide, elbo = build(run.config()[0], (1, 16, 16))
    model.initialize(load("digits").train[:100]), guide.initialize(load("digits").train[:100])
    parameters = list(elbo(model, guide).parameters())
    for step in steps:
        assert step["norm"] <= 1e-3 * (1 + 1e-4)
        with torch.no_grad():
            for p, value in zip(parameters, step["parameters"], strict=True):
                p.copy_(value)
        elbo.kl_weight = step["kl_weight"]
        guide.relaxation = guide.relaxation.at(step["temperature"])
        torch.set_rng_state(step["rng"])
        with pyro.get_param_store().scope(), pyro.validation_enabled(False):
            loss = scale * elbo.differentiable_loss(model, guide, step["x"]) / len(step["x"])
        expected = torch.autograd.grad(loss, parameters)
        torch.testing.assert_close(step["gradients"], list(expected), rtol=1e-4, atol=1e-5 * scale)
    assert max(s["norm"] for s in steps) > 0.99e-3


def test_broken_run_folders(tmp_path):
    run = train(replace(TINY, epochs=1), tmp_path / "run", progress=False)
    with pytest.raises(InputError, match="holds no run"):
        Run(tmp_path / "nothing").load()
    state = run.read_checkpoint()
    earlier = Run(tmp_path / "earlier")
    earlier.folder.mkdir()
    earlier.write_config(*run.config())
    earlier.write_checkpoint({name: part for name, part in state.items() if name != "never_observed"})
    with pytest.raises(InputError, match=r"it has no entry never_observed.: train the run again"):
        earlier.load()
    state["model"]["prior.logits"] = torch.zeros(9)
    run.write_checkpoint(state)
    with pytest.raises(InputError, match=r"does not match .*size mismatch for prior.logits"):
        run.load()
    run.checkpoint_path.write_bytes(b"nonsense")
    with pytest.raises(InputError, match="cannot be read"):
        run.load()
    run.checkpoint_path.unlink()
    with pytest.raises(InputError, match="no checkpoint yet"):
        run.load()
    stored = json.loads(run.config_path.read_text())
    for change, message in (
        ({"vae": {"kind": "x"}}, "config.json: vae: .*'x'.*\n.*--import MODULE"),
        ({"latents": 0}, "config.json: latents: Input should be greater than or equal to 1"),
        ({"encoder": None}, "config.json: encoder: a trained run has a value"),
    ):
        run.config_path.write_text(json.dumps({**stored, "config": {**stored["config"], **change}}))
        with pytest.raises(InputError, match=message):
            run.load()
    run.config_path.write_text(json.dumps({**stored, "event_shape": [16, -16]}))
    with pytest.raises(InputError, match=r"event_shape must be a list of positive whole numbers, got \[16, -16\]"):
        run.load()
    run.config_path.write_text("{")
    with pytest.raises(InputError, match="not a valid configuration"):
        run.load()


def test_unknown_device(tmp_path):
    with pytest.raises(InputError, match="device 'abacus' is not available"):
        train(replace(TINY, device="abacus"), tmp_path / "run", progress=False)


def test_the_progress_bar_changes_nothing(tmp_path):
    """Its figures come from a forward pass whose dropout leaves training's random numbers alone."""
    config = replace(TINY, encoder="mlp", epochs=1)
    runs = [train(config, tmp_path / str(shown), progress=shown) for shown in (False, True)]
    pd.testing.assert_frame_equal(*map(numbers, runs))
    assert same_parameters(*runs)


def test_the_progress_bar_evaluates_no_network(tmp_path, monkeypatch):
    """Its Fano factor is the log's: as many posteriors are computed with a bar as without."""
    calls = []
    original = PoissonGuide.posterior
    monkeypatch.setattr(PoissonGuide, "posterior", lambda self, x: calls.append(0) or original(self, x))
    numbers_of_calls = []
    for shown in (False, True):
        calls.clear()
        train(tiny("P-VAE", epochs=2, train_size=200, batch_size=20), tmp_path / str(shown), progress=shown)
        numbers_of_calls.append(len(calls))
    assert numbers_of_calls[0] == numbers_of_calls[1] > 2


def test_fewer_epochs_than_are_trained_are_refused_and_change_nothing(tmp_path):
    run = train(replace(TINY, epochs=2), tmp_path / "run", progress=False)
    before = run.config_path.read_text()
    with pytest.raises(InputError, match="is already trained for 2 epochs"):
        train(replace(TINY, epochs=1, anneal_epochs=1.0), run.folder, resume=True, progress=False)
    assert run.config_path.read_text() == before


def test_relaxation_auto_takes_the_least_error_and_says_so(tmp_path, capsys):
    """The choice is recorded with all candidates, trained with at a constant temperature, and kept on resuming."""
    config = configure("P-VAE", **{**SMALL, "latents": 6}, relaxation="auto", epochs=1)
    run = train(config, tmp_path / "run")
    candidates = run.read_json("relaxation.json")["candidates"]
    assert candidates == sorted(candidates, key=lambda row: row["total"])
    chosen = run.config()[0].relaxation
    assert chosen.kind == candidates[0]["relaxation"]
    if chosen.kind != "integer":
        assert chosen.temperature == chosen.temperature_start == candidates[0]["temperature"]
    assert f"relaxation: {chosen.kind}" in capsys.readouterr().err
    train(replace(config, epochs=2), tmp_path / "run", resume=True, progress=False)
    assert len(run.read_checkpoint()["log"]) == 2 and run.config()[0].relaxation == chosen


@pytest.mark.parametrize("variant", ["CMP", "EX-C", "P-VAE"])
def test_the_prior_learns_at_its_own_rate(variant, tmp_path):
    """One Adam step moves every parameter with a gradient by its learning rate."""
    config = configure(variant, **{**SMALL, "latents": 4}, batch_size=2_000, epochs=1, lr=1e-3, prior_mean=3.0)
    run = train(replace(config, prior_lr_multiplier=40.0), tmp_path / "run", progress=False)
    model, _ = run.load("cpu")[1:]
    learned = model.prior.log_rate if variant == "P-VAE" else model.prior.log_total_count
    torch.testing.assert_close((learned - math.log(3.0)).abs(), torch.full((4,), 0.04), rtol=1e-3, atol=0)


@pytest.mark.filterwarnings("ignore:a Poisson rate is close")
def test_a_sampled_kl_that_runs_away_ends_the_run(tmp_path):
    """Counts that are cut off far below their mean make log q - log p as negative as training likes; no KL is."""
    small = {"latents": 6, "epochs": 6, "batch_size": 50, "kl_warmup": 0.0, "prior_mean": 30.0, "max_count": 3}
    with pytest.raises(
        InputError, match=r"diverged in epoch 1 \(the Monte Carlo KL is -.* never negative: counts are truncated at 3\)"
    ):
        train(tiny("MC-G", lr=1e-3, **small), tmp_path / "run", progress=False)
    assert not (tmp_path / "run" / "checkpoint.pt").exists()
    # the exact KL of the same counts is a KL
    exact = train(tiny("EX-G", lr=1e-3, **small), tmp_path / "exact", progress=False)
    assert all(row["kl"] > 0 for row in exact.read_checkpoint()["log"])


def test_a_run_knows_its_data_again(tmp_path, monkeypatch):
    """One observation more, in front: held-out ones would be among those that were trained on."""
    path = tmp_path / "x.npy"
    x = np.random.default_rng(0).random((100, 5), dtype=np.float32)
    np.save(path, x)
    config = tiny("G-VAE", data=str(path), epochs=1)
    run = train(config, tmp_path / "run", progress=False)
    np.save(path, x.copy())
    train(replace(config, epochs=2), run.folder, resume=True, progress=False)
    before = run.read_json("metrics.json") or evaluate(run, ["mse"], samples=2, progress=False)
    np.save(path, np.concatenate([x[:1] + 0.1, x]))
    with pytest.raises(InputError, match=r"does not hold the data that .*run was trained on: restore them"):
        train(replace(config, epochs=3), run.folder, resume=True, progress=False)
    readers = [
        lambda: evaluate(run, ["mse"], samples=2, progress=False),
        lambda: reconstruct(run, count=2),
        lambda: fit_prior(run, components=2),
        lambda: generate(run, count=2, sampler="posterior"),
    ]
    for read in readers:
        with pytest.raises(InputError, match=r"does not hold the data that .*run was trained on: restore them"):
            read()
    generate(run, count=2)  # of the prior, which needs no data
    assert len(run.read_checkpoint()["log"]) == 2 and run.read_json("metrics.json") == before


@pytest.mark.parametrize("variant", ["CMP", "EX-I", "P-VAE"])
def test_divergence_is_one_line_beside_a_progress_bar(variant, tmp_path, monkeypatch):
    """After a step that leaves a parameter of the encoder that is not a number."""
    step = training.Trainer.step

    def poisoned(self, x):
        terms = step(self, x)
        with torch.no_grad():
            next(iter(self.guide.encoder.parameters())).view(-1)[0] = float("nan")
        return terms

    monkeypatch.setattr(training.Trainer, "step", poisoned)
    with pytest.raises(InputError, match="training diverged in epoch"):
        train(tiny(variant, train_size=300, batch_size=20), tmp_path / "run", progress=True)


def test_a_damaged_run_with_pictures_is_set_aside(tmp_path):
    pytest.importorskip("tensorboard")
    config = tiny(train_size=50, epochs=1, tensorboard=True)
    run = train(config, tmp_path / "run", progress=False)
    generate(run, count=2)
    generate(run, count=2, sampler="posterior")
    reconstruct(run, count=2)
    run.export()
    run.checkpoint_path.write_bytes(b"damaged")
    assert run.set_aside()
    assert len(train(config, run.folder, resume=True, progress=False).read_checkpoint()["log"]) == 1


def test_a_data_root_is_valid_in_every_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = train(tiny(train_size=50, epochs=1, data_root="root"), "run", progress=False)
    assert run.config()[0].data_root == str(tmp_path / "root")


# --- held-out tenth --------------------------------------------------------------------------------------------------


@pytest.fixture
def noise(monkeypatch):
    """Vectors of which no two are alike and none says anything of another: training on some worsens the rest."""
    x = torch.randn(120, 20, generator=torch.Generator().manual_seed(0))
    monkeypatch.setitem(SOURCES, "noise", Source((20,), lambda root: (x[:100], x[100:], None, None)))
    return x


def overfitting(**changes):
    networks = {"encoder": "mlp", "decoder": "mlp", "lr_schedule": "constant"}
    return tiny("G-VAE", **{"data": "noise", "batch_size": 30, "epochs": 30, **networks, **changes})


def test_the_best_epoch_on_a_held_out_tenth_is_kept(noise, steps, tmp_path):
    config = overfitting(patience=3)
    run = train(config, tmp_path / "run", progress=False)
    found = numbers(run)["validation_elbo"].tolist()
    best = found.index(max(found))
    assert best > 0 and len(found) == best + 1 + 3 < 30  # three epochs without a better one

    # the held-out tenth is neither trained on nor among the data of the evaluation
    seen = torch.cat([step["x"] for step in steps[:3]])
    assert len(seen) == 90
    left = torch.stack([x for x in noise[:100] if not (seen == x).all(-1).any()])
    assert len(left) == 10 and not any((noise[100:] == x).all(-1).any() for x in left)
    assert (torch.cat([seen, left]).sort(0).values == noise[:100].sort(0).values).all()

    # what is loaded, exported and evaluated is the best epoch's
    _, model, guide = run.load("cpu")
    assert held_out(model, guide, left, units=False, seed=config.seed).elbo == found[best]
    state = run.read_checkpoint()
    assert state["best"]["epoch"] == best + 1
    assert any(not torch.equal(value, state["model"][name]) for name, value in model.state_dict().items())
    metrics = evaluate(run, ["elbo", "seconds_per_step"], importance_samples=0, progress=False)
    assert metrics["elbo"] == pytest.approx(numbers(run)["test_elbo"][best])
    assert metrics["seconds_per_step"] == pytest.approx(pd.read_csv(run.folder / "log.csv")["seconds"].median() / 3)

    # a run that has stopped stays as it is, until it is given more patience; then it goes on as if never stopped
    train(config, run.folder, resume=True, progress=False)
    assert len(numbers(run)) == len(found)
    train(replace(config, patience=6), run.folder, resume=True, progress=False)
    other = train(overfitting(patience=6), tmp_path / "other", progress=False)
    assert len(numbers(run)) > len(found)
    pd.testing.assert_frame_equal(numbers(run), numbers(other))
    assert same_parameters(run, other)


def test_observations_that_were_trained_on_are_not_held_out_later(noise, tmp_path):
    configs = {"plain": overfitting(epochs=1), "validated": overfitting(epochs=1, validate=True)}
    plain, validated = (train(config, tmp_path / name, progress=False) for name, config in configs.items())
    for run, changes in ((plain, {"validate": True}), (plain, {"patience": 2}), (validated, {})):
        with pytest.raises(InputError, match=r"another run \(validate (False there, True|True there, False) here\)"):
            train(overfitting(epochs=2, **changes), run.folder, resume=True, progress=False)
    train(overfitting(epochs=2, patience=5), validated.folder, resume=True, progress=False)  # the same tenth
    assert len(numbers(validated)) == 2


def test_a_part_of_too_few(noise, tmp_path):
    with pytest.raises(InputError, match="--validate and --patience need at least two training observations, got 1"):
        train(overfitting(train_size=1, validate=True), tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


# --- TensorBoard -----------------------------------------------------------------------------------------------------


def test_tensorboard_shows_the_log(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = tiny(epochs=2, tensorboard=True, train_size=300)
    run = train(config, tmp_path / "run", progress=False)
    train(replace(config, epochs=3), run.folder, resume=True, progress=False)
    events = EventAccumulator(str(run.folder / "tensorboard")).Reload()
    log = pd.read_csv(run.folder / "log.csv")
    assert set(events.Tags()["scalars"]) == set(log.columns)
    for name in log.columns:
        shown = [(event.step, event.value) for event in events.Scalars(name)]
        assert shown == [(epoch, pytest.approx(value)) for epoch, value in zip(log["epoch"], log[name], strict=True)]


def test_without_tensorboard_one_line_says_so_and_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(InputError, match=r"--tensorboard needs TensorBoard: pip install") as error:
        train(tiny(tensorboard=True), tmp_path / "run", progress=False)
    assert "\n" not in str(error.value) and not (tmp_path / "run").exists()


@pytest.mark.parametrize("prior", ["factorised", "mixture", "mixture_autoregressive"])
def test_the_log_says_what_of_the_prior_is_used(prior, tmp_path):
    """Components begin apart after the first epoch; active units and used components are columns of the log."""
    config = configure(
        "CMP", prior=prior, data="digits", latents=8, encoder="mlp", decoder="mlp", epochs=2, train_size=300
    )
    run = train(config, tmp_path, progress=False)
    rows = numbers(run)
    assert rows["test_active_units"].between(0, 8).all()
    if prior == "factorised":
        assert "test_components" not in rows
        return
    assert rows["test_components"].between(2, 100).all()
    (shift,) = run.load()[1].joint_prior.shift
    assert float(shift.detach().std(0).min()) > 0
