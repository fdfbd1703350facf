"""Training: reproducible, resumable, and on the schedules it says."""

import json
import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pyro
import pytest
import torch

from pyro_nbvae.batching import to_floats
from pyro_nbvae.errors import InputError
from pyro_nbvae.metrics import HeldOut
from pyro_nbvae.study import training
from pyro_nbvae.study.build import build, resolve, validate
from pyro_nbvae.study.config import TrainConfig
from pyro_nbvae.study.data import load
from pyro_nbvae.study.evaluation import evaluate
from pyro_nbvae.study.files import write_atomically
from pyro_nbvae.study.folder import LOCK, Run
from pyro_nbvae.study.generation import generate, reconstruct
from pyro_nbvae.study.training import kl_weight, temperature, train
from pyro_nbvae.study.variants import VARIANTS

TINY = TrainConfig(
    variant="EX-C",
    data="digits",
    latents=8,
    encoder="linear",
    decoder="linear",
    batch_size=300,
    epochs=4,
    lr=0.01,
    device="cpu",
)


def numbers(run):
    return pd.read_csv(run.folder / "log.csv").drop(columns="seconds")


def same_parameters(a, b):
    first, second = (run.read_checkpoint() for run in (a, b))
    return all(torch.equal(first[part][k], second[part][k]) for part in ("model", "guide") for k in first[part])


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_trains(name, tmp_path):
    run = train(replace(TINY, variant=name, epochs=2), tmp_path / name, progress=False)
    log = numbers(run)
    assert list(log["epoch"]) == [1, 2] and log.notna().all().all()
    assert log["loss"][1] < log["loss"][0]
    assert sorted(p.name for p in run.folder.iterdir()) == [LOCK, "checkpoint.pt", "config.json", "log.csv"]


def test_same_seed_same_numbers_other_seed_others(tmp_path):
    runs = [train(replace(TINY, seed=s), tmp_path / str(k), progress=False) for k, s in enumerate((5, 5, 6))]
    pd.testing.assert_frame_equal(numbers(runs[0]), numbers(runs[1]))
    assert same_parameters(runs[0], runs[1]) and not same_parameters(runs[0], runs[2])


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


def test_a_finished_run_can_be_given_more_epochs(tmp_path):
    run = train(replace(TINY, epochs=2), tmp_path, progress=False)
    assert run.config()[0].anneal_epochs == 1
    train(replace(TINY, epochs=3), tmp_path, resume=True, progress=False)
    assert len(numbers(run)) == 3 and run.config()[0].anneal_epochs == 1


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
    config = replace(TINY, variant="G-VAE", encoder="conv", decoder="conv", lr=3e-3, batch_size=100)
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
    train(replace(TINY, variant="DS-G"), tmp_path / "b", progress=False)
    again = train(TINY, tmp_path / "c", progress=False)
    assert same_parameters(alone, again)
    assert list(pyro.get_param_store().keys()) == ["prior$$$logits"]


def test_a_command_of_the_version_before_resumes_its_run(tmp_path):
    """Version 4: conv named the released network, and there was no preset published."""
    published = replace(TINY, encoder="released_conv", decoder="released_linear", preset="published")
    whole = train(published, tmp_path / "whole", progress=False)
    run = train(replace(published, epochs=2, anneal_epochs=2.0), tmp_path / "run", progress=False)
    stored = json.loads(run.config_path.read_text())
    del stored["lr_schedule"]
    older = {**stored, "schema_version": 4, "encoder": "conv", "decoder": "linear", "preset": "default"}
    run.config_path.write_text(json.dumps(older))
    train(replace(TINY, encoder="conv", decoder="linear", preset=None), run.folder, resume=True, progress=False)
    assert same_parameters(whole, run)


def test_schedules():
    config = resolve(replace(TINY, epochs=20), (1, 16, 16))
    assert [kl_weight(config, e) for e in (0, 1, 2, 10)] == [0, 0.5, 1, 1]
    assert [temperature(config, e) for e in (0, 5, 10, 15)] == pytest.approx([0.24, 0.145, 0.05, 0.05])
    assert kl_weight(replace(config, kl_warmup=0.0), 0) == 1


DEFAULTS = {
    "prior_lr": 0.5,
    "prior_mean": 3.0,
    "kl_samples": 7,
    "beta": 0.2,
    "temperature": 0.3,
    "temperature_start": 0.9,
    "anneal_epochs": 4.0,
    "kl_warmup": 1.0,
    "clip": 3.0,
    "epochs": 6,
}


@pytest.mark.parametrize("field", DEFAULTS)
def test_a_variants_defaults_hold_where_no_flag_does(field, monkeypatch):
    """Each field that a variant may decide; a flag comes before, and another preset does not ask."""
    mine = replace(VARIANTS["MC-C"], defaults={field: DEFAULTS[field]})
    monkeypatch.setitem(VARIANTS, "MINE", mine)
    config = TrainConfig(variant="MINE")
    assert getattr(resolve(config, (1, 16, 16)), field) == DEFAULTS[field]
    assert getattr(resolve(replace(config, **{field: 2}), (1, 16, 16)), field) == 2
    plain = resolve(TrainConfig(variant="MC-C", preset="paper"), (1, 16, 16))
    assert getattr(resolve(replace(config, preset="paper"), (1, 16, 16)), field) == getattr(plain, field)


def test_a_variant_cannot_decide_what_is_never_open(monkeypatch):
    monkeypatch.setitem(VARIANTS, "MINE", replace(VARIANTS["CMP"], defaults={"seed": 3}))
    with pytest.raises(InputError, match="unknown default of variant MINE 'seed': choose from"):
        resolve(TrainConfig(variant="MINE"), (1, 16, 16))


@pytest.mark.parametrize("variant", ["MC-G", "EX-C", "P-VAE"])
def test_gumbel_softmax_starts_from_small_counts_and_cuts_off_none(variant):
    config = resolve(TrainConfig(variant=variant, relaxation="gumbel"), (1, 16, 16))
    assert config.max_count is None
    assert resolve(TrainConfig(variant=variant, relaxation="gumbel", max_count=50), (1, 16, 16)).max_count == 50
    assert resolve(TrainConfig(variant="EX-C"), (1, 16, 16)).max_count is None
    assert resolve(replace(config, prior_mean=9.0), (1, 16, 16)).prior_mean == 9.0
    assert resolve(TrainConfig(variant="CMP"), (1, 16, 16)).prior_mean > config.prior_mean


@pytest.mark.parametrize(
    ("relaxation", "end", "start"),
    [("arrival", None, 0.24), ("arrival", 0.1, 0.24), ("arrival", 0.5, 0.5), ("gumbel", None, 1.0), ("gumbel", 2, 2)],
)
def test_temperatures_never_rise_by_default(relaxation, end, start):
    config = resolve(TrainConfig(variant="EX-C", relaxation=relaxation, temperature=end), (1, 16, 16))
    assert config.temperature_start == start >= config.temperature
    assert resolve(replace(config, temperature_start=0.01), (1, 16, 16)).temperature_start == 0.01


def test_the_papers_preset():
    """The released code's: KL weight min(1, 5 e / 250), temperature max(1 - 0.95 e / 250, 0.05) ..."""
    config = resolve(TrainConfig(variant="MC-C", data="mnist", preset="paper"), (1, 28, 28))
    assert (config.epochs, config.batch_size, config.lr, config.latents, config.kl_samples) == (200, 512, 1e-3, 256, 5)
    for epoch in (0, 3, 60, 199):
        assert kl_weight(config, epoch) == pytest.approx(min(1, 5 * epoch / 250))
        assert temperature(config, epoch) == pytest.approx(max(1 - 0.95 * epoch / 250, 0.05))
    assert config.beta == 28 / 256 and config.clip == 28
    for shape, decoder, beta in (((3, 16, 16), "conv", 48), ((3, 64, 64), "conv", 192), ((3, 64, 64), "mlp", 1)):
        assert resolve(TrainConfig(decoder=decoder, preset="paper"), shape).beta == beta / 256
    gumbel = resolve(TrainConfig(variant="MC-G", preset="paper"), (1, 28, 28))
    assert temperature(gumbel, 199) == 1
    assert resolve(TrainConfig(preset="paper", epochs=3, beta=2.0), (1, 28, 28)).beta == 2.0


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
    config = replace(TINY, variant=name)
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
        taken.append({"x": x.clone(), "kl_weight": self.elbo.kl_weight, "rng": torch.get_rng_state()})
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


def test_every_step_follows_the_schedules(steps, tmp_path):
    """KL weight and temperature of each step, also within an epoch, and in the log those of the epoch's last step."""
    config = replace(TINY, train_size=250, batch_size=60, epochs=3, kl_warmup=2.0, anneal_epochs=2.5)
    run = train(config, tmp_path, progress=False)
    resolved = run.config()[0]
    epochs = [e + k / 5 for e in range(3) for k in range(5)]
    assert [s["kl_weight"] for s in steps] == pytest.approx([kl_weight(resolved, e) for e in epochs])
    assert [s["temperature"] for s in steps] == pytest.approx([temperature(resolved, e) for e in epochs])
    log = numbers(run)
    assert log["kl_weight"].tolist() == pytest.approx([kl_weight(resolved, e + 0.8) for e in range(3)])
    assert log["temperature"].tolist() == pytest.approx([temperature(resolved, e + 0.8) for e in range(3)])


def test_every_epoch_holds_every_image_once_in_an_order_of_its_own(steps, tmp_path):
    train(replace(TINY, variant="G-VAE", train_size=250, batch_size=60, epochs=2), tmp_path, progress=False)
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
    config = replace(TINY, variant="EX-C", train_size=100, batch_size=40, epochs=1, beta=0.1, clip=1e-3, kl_warmup=0.5)
    run = train(replace(config, preset=preset), tmp_path, progress=False)
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
    run.config_path.write_text(json.dumps({**stored, "variant": "X"}))
    with pytest.raises(InputError, match="unknown variant 'X'"):
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
    guide = VARIANTS["P-VAE"].guide
    original = guide.posterior
    monkeypatch.setattr(guide, "posterior", lambda self, x: calls.append(0) or original(self, x))
    numbers_of_calls = []
    for shown in (False, True):
        calls.clear()
        train(replace(TINY, variant="P-VAE", epochs=2, batch_size=20), tmp_path / str(shown), progress=shown)
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
    config = TrainConfig(variant="P-VAE", relaxation="auto", latents=6, encoder="linear", decoder="linear", epochs=1)
    run = train(config, tmp_path / "run")
    candidates = run.read_json("relaxation.json")["candidates"]
    assert candidates == sorted(candidates, key=lambda row: row["total"])
    resolved = run.config()[0]
    assert resolved.relaxation == candidates[0]["relaxation"]
    assert resolved.temperature == resolved.temperature_start == candidates[0]["temperature"]
    assert f"relaxation: {resolved.relaxation}" in capsys.readouterr().err
    train(replace(config, epochs=2), tmp_path / "run", resume=True, progress=False)
    assert len(run.read_checkpoint()["log"]) == 2 and run.config()[0].relaxation == resolved.relaxation


@pytest.mark.parametrize("flag", [{"temperature": 0.1}, {"indicator": "smoothstep"}, {"temperature_start": 0.5}])
def test_relaxation_auto_chooses_the_options_itself(flag):
    with pytest.raises(InputError, match="relaxation auto, which does not take it"):
        validate(TrainConfig(variant="P-VAE", relaxation="auto", **flag))


@pytest.mark.parametrize("variant", ["CMP", "EX-C", "P-VAE"])
def test_the_prior_learns_at_its_own_rate(variant, tmp_path):
    """One Adam step moves every parameter with a gradient by its learning rate."""
    config = TrainConfig(variant=variant, latents=4, encoder="linear", decoder="linear", batch_size=2_000, epochs=1)
    run = train(replace(config, lr=1e-3, prior_lr=0.04, prior_mean=3.0), tmp_path / "run", progress=False)
    model, _ = run.load("cpu")[1:]
    learned = model.prior.log_rate if variant == "P-VAE" else model.prior.log_total_count
    torch.testing.assert_close((learned - math.log(3.0)).abs(), torch.full((4,), 0.04), rtol=1e-3, atol=0)


@pytest.mark.parametrize("flag", [{"prior_lr": 0.1}, {"prior_mean": 2.0}])
def test_a_fixed_prior_has_no_pace(flag):
    with pytest.raises(InputError, match=r"the prior of G-VAE is not learned|the model of G-VAE does not take it"):
        validate(TrainConfig(variant="G-VAE", **flag))


@pytest.mark.filterwarnings("ignore:a Poisson rate is close")
def test_a_sampled_kl_that_runs_away_ends_the_run(tmp_path):
    """Counts that are cut off far below their mean make log q - log p as negative as training likes; no KL is."""
    tiny = {"latents": 6, "encoder": "linear", "decoder": "linear", "epochs": 6, "batch_size": 50, "kl_warmup": 0.0}
    config = TrainConfig(variant="MC-G", data="digits", prior_mean=30.0, max_count=3, lr=1e-3, **tiny)
    with pytest.raises(InputError, match=r"diverged in epoch 1 \(the sampled KL is -.* a KL is never negative"):
        train(config, tmp_path / "run", progress=False)
    assert not (tmp_path / "run" / "checkpoint.pt").exists()
    # the exact KL of the same counts is a KL
    exact = train(replace(config, variant="EX-G"), tmp_path / "exact", progress=False)
    assert all(row["kl"] > 0 for row in exact.read_checkpoint()["log"])


def test_a_run_knows_its_data_again(tmp_path, monkeypatch):
    """One observation more, in front: held-out ones would be among those that were trained on."""
    path = tmp_path / "x.npy"
    x = np.random.default_rng(0).random((100, 5), dtype=np.float32)
    np.save(path, x)
    tiny = {"data": str(path), "latents": 3, "encoder": "linear", "decoder": "linear", "variant": "G-VAE"}
    run = train(TrainConfig(**tiny, epochs=1), tmp_path / "run", progress=False)
    np.save(path, x.copy())
    train(TrainConfig(**tiny, epochs=2), run.folder, resume=True, progress=False)
    before = run.read_json("metrics.json") or evaluate(run, ["mse"], samples=2, progress=False)
    np.save(path, np.concatenate([x[:1] + 0.1, x]))
    with pytest.raises(InputError, match=r"does not hold the data that .*run was trained on: restore them"):
        train(TrainConfig(**tiny, epochs=3), run.folder, resume=True, progress=False)
    readers = [
        lambda: evaluate(run, ["mse"], samples=2, progress=False),
        lambda: reconstruct(run, count=2),
        lambda: generate(run, count=2, sampler="mixture"),
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
    tiny = {"variant": variant, "train_size": 300, "batch_size": 20, "latents": 8, "epochs": 3}
    with pytest.raises(InputError, match="training diverged in epoch"):
        train(TrainConfig(**tiny, encoder="linear", decoder="linear"), tmp_path / "run", progress=True)


def test_a_damaged_run_with_pictures_is_set_aside(tmp_path):
    tiny = {"train_size": 50, "latents": 3, "encoder": "linear", "decoder": "linear", "epochs": 1}
    run = train(TrainConfig(**tiny), tmp_path / "run", progress=False)
    generate(run, count=2)
    generate(run, count=2, sampler="posterior")
    reconstruct(run, count=2)
    run.export()
    run.checkpoint_path.write_bytes(b"damaged")
    assert run.set_aside()
    assert len(train(TrainConfig(**tiny), run.folder, resume=True, progress=False).read_checkpoint()["log"]) == 1


def test_a_data_root_is_valid_in_every_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = TrainConfig(train_size=50, latents=3, encoder="linear", decoder="linear", epochs=1, data_root="root")
    assert train(config, "run", progress=False).config()[0].data_root == str(tmp_path / "root")
