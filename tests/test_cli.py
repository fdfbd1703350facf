"""The command, as a user meets it."""

import re
import shutil

import numpy as np
import pytest
import torch

from pyro_nbvae.study.cli import main
from pyro_nbvae.study.folder import LOCK, Run
from pyro_nbvae.study.tree import replace

TINY = [
    "--data",
    "digits",
    "--latents",
    "6",
    "--encoder",
    "linear",
    "--decoder",
    "linear",
    "--batch-size",
    "500",
    "--epochs",
    "1",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("cli") / "run"
    main(["train", "--variant", "EX-C", *TINY, "--out", str(out)])
    return out


def refused(capsys, *arguments):
    """The one line that a refused command prints."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main([str(a) for a in arguments])
    assert stop.value.code == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith("nbvae: ")
    return err


def unread(capsys, *arguments):
    """What the parser prints of a command that it cannot read, without its box and its breaks of lines."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main([str(a) for a in arguments])
    assert stop.value.code == 2
    out, err = capsys.readouterr()
    assert out == "" and "Traceback" not in err
    return " ".join(err.translate(dict.fromkeys(map(ord, "╭╮╰╯─│"), " ")).split())


def test_the_four_commands(folder, capsys):
    main(["evaluate", str(folder), str(folder), "--importance-samples", "2", "--samples", "40"])
    out = capsys.readouterr().out
    assert out.count("EX-C") == 2
    for heading in (
        "MSE",
        "SSIM",
        "FID-c",
        "KID-c",
        "ELBO",
        "bits/dim",
        "IW bound",
        "KL",
        "information",
        "collapsed",
        "Fano",
    ):
        assert f"\n{heading}  " in out
    assert out.splitlines()[0].split() == ["run", str(folder), str(folder)]
    main(["generate", str(folder), "--count", "4"])
    main(["reconstruct", str(folder), "--count", "4"])
    written = ["samples.png", "samples.npz", "reconstructions.png"]
    assert capsys.readouterr().out.split() == [str(folder / name) for name in written]
    names = {"checkpoint.pt", "config.json", "log.csv", "metrics.json", "samples.npz"}
    pictures = {"samples.png", "reconstructions.png", "dispersion.png"}
    assert {p.name for p in folder.iterdir()} == names | pictures | {LOCK}


def test_a_table_is_one_command(tmp_path, capsys):
    out = tmp_path / "tables"
    grid = ["--data", "digits", "--variants", "L-VAE", "--samples", "30", "--out", str(out)]
    main(["reproduce", "main", "--scale", "smoke", *grid])
    printed = capsys.readouterr().out
    assert printed.strip() == (out / "smoke/main.md").read_text().strip()
    assert "| L-VAE " in printed and "FID-c" in printed
    assert re.search("unknown table 'all': choose from .*main", refused(capsys, "reproduce", "all"))


def test_the_bar_shows_the_run(tmp_path, capfd):
    main(["train", *TINY, "--out", str(tmp_path / "run")])
    out, err = capfd.readouterr()
    assert out == f"{tmp_path / 'run'}\n"
    for word in ("loss=", "log p(x|z)=", "KL=", "Fano="):
        assert word in err


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--epochs 0", "training.epochs: Input should be greater than or equal to 1"),
        ("--seed -1", "seed: Input should be greater than or equal to 0"),
        ("--latents -5", "latents: Input should be greater than or equal to 1"),
        ("--lr nan", "training.lr: Input should be "),
        ("--beta 0", "likelihood.gaussian.beta: Input should be greater than 0"),
        ("--beta inf", "likelihood.gaussian.beta: Input should be less than or equal to "),
        ("--kl-warmup -1", ".estimator.AnalyticKL_ELBO.kl_warmup: Input should be greater than or equal to 0"),
        ("--variant EX-C --temperature 0", ".relaxation.arrival.temperature: Input should be greater than "),
        ("--variant C-VAE --categories 0", "vae.categorical.categories: Input should be greater than or equal to 2"),
        ("--data imagenet", "unknown data 'imagenet': choose from digits, "),
        ("--data some/where", "some/where does not exist"),
        ("--data ~nobody-here/x.npy", "~nobody-here/x.npy: "),
        ("--device abacus", "device 'abacus' is not available"),
        ("--device meta", "device 'meta' is not available"),
    ],
)
def test_values_out_of_range(capsys, tmp_path, flags, message):
    assert message in refused(capsys, "train", "--out", tmp_path / "run", *flags.split())
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "flags, parts",
    [
        ("--variant NB", ["'NB'", "--variant", "EX-C"]),
        ("--preset nature", ["'nature'", "--preset", "paper"]),
        ("--variant EX-C --relaxation cold", ["'cold'", "--relaxation", "gumbel"]),
        ("--encoder resnet", ["'resnet'", "--encoder", "conv"]),
        ("--variant EX-C --indicator step", ["'step'", "--indicator", "smoothstep"]),
        ("--epochs many", ["--epochs", "'many'"]),
        ("--epochs 1.5", ["--epochs", "'1.5'"]),
        ("--epochs", ["--epochs", "Missing value"]),
        ("--lr fast", ["--lr", "'fast'"]),
        ("--colour red", ["Unrecognized options", "--colour"]),
        ("--temperature 0.1", ["Unrecognized options", "--temperature"]),  # CMP has none
        ("--variant EX-C --max-count 9", ["Unrecognized options", "--max-count"]),
        ("--variant EX-C --temperature 0.5", ["temperature must be at most temperature_start (0.24), got 0.5"]),
        ("--variant MC-C --temperature-start 0.01", ["temperature must be at most temperature_start (0.01), got 0.05"]),
    ],
)
def test_flags_that_cannot_be_read(capsys, tmp_path, flags, parts):
    message = unread(capsys, "train", "--out", tmp_path / "run", *flags.split())
    assert all(part in message for part in parts), message
    assert not (tmp_path / "run").exists()


def test_an_export_into_a_folder(capsys, folder, tmp_path):
    assert "is a folder: --out must be the path of a file" in refused(capsys, "export", folder, "--out", tmp_path)


def test_latents_that_tell_nothing_are_pointed_out(capsys, folder, tmp_path):
    """With heads of zeros all posteriors are alike; the table still comes."""
    run = Run(shutil.copytree(folder, tmp_path / "run"))
    state = run.read_checkpoint()
    for name, parameter in state["guide"].items():
        if "heads" in name:
            parameter.zero_()
    run.write_checkpoint(state)
    for path, warned in ((run.folder, True), (folder, False)):
        main(["evaluate", str(path), "--importance-samples", "0", "--samples", "2"])
        out, err = capsys.readouterr()
        assert "EX-C" in out and bool(re.search(r"all \d+ units are collapsed .* --beta", err)) == warned


def test_missing_words(capsys):
    assert "--out" in unread(capsys, "train")
    assert "no run named" in refused(capsys, "evaluate")
    assert "a run folder" in unread(capsys, "generate")
    assert "nbvae --help" in unread(capsys, "frobnicate")
    assert "--import needs the name of a module" in refused(capsys, "train", "--import")


def test_missing_data_with_no_network(capsys, tmp_path, monkeypatch):
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    message = refused(capsys, "train", "--data", "mnist", "--data-root", tmp_path, "--out", tmp_path / "run")
    assert f"no mnist in {tmp_path}" in message and "NBVAE_DATA" in message
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("command", ["evaluate", "generate", "reconstruct", "encode", "predict"])
def test_a_folder_that_holds_no_run(capsys, tmp_path, command):
    for folder in (tmp_path, tmp_path / "nothing"):
        assert f"{folder} holds no run" in refused(capsys, command, folder)


def test_a_checkpoint_of_another_shape(capsys, folder, tmp_path):
    config, shape = Run(folder).config()
    other = Run(tmp_path)
    other.write_config(replace(config, latents=7), shape)
    other.write_checkpoint(Run(folder).read_checkpoint())
    assert "does not match" in refused(capsys, "evaluate", tmp_path)


@pytest.mark.parametrize(
    "array, part",
    [
        (np.zeros((2, 1, 28, 28), np.float32), "expected (N, 1, 16, 16)"),
        (np.zeros((16, 16), np.float32), "expected (N, 1, 16, 16)"),
        (np.full((2, 1, 16, 16), 7.0), "not in [0, 1]"),
        (np.full((2, 1, 16, 16), 3, np.int64), "not in [0, 1]"),
        (np.full((2, 1, 16, 16), np.nan), "512 values that are NaN or infinite, the first at array[0, 0, 0, 0]"),
    ],
)
def test_images_of_the_wrong_shape_or_range(capsys, folder, tmp_path, array, part):
    np.save(tmp_path / "images.npy", array)
    assert part in refused(capsys, "reconstruct", folder, "--input", tmp_path / "images.npy")


def test_images_that_are_no_array(capsys, folder, tmp_path):
    (tmp_path / "images.npy").write_text("no")
    assert "cannot be read as a .npy array" in refused(
        capsys, "reconstruct", folder, "--input", tmp_path / "images.npy"
    )
    assert "cannot be read" in refused(capsys, "reconstruct", folder, "--input", tmp_path / "none.npy")


@pytest.mark.parametrize("command", ["generate", "reconstruct"])
def test_no_images_asked_for(capsys, folder, command):
    assert "--count must be 1 to 10,000, got 0" in refused(capsys, command, folder, "--count", "0")
    assert "seed must be 0 to" in refused(capsys, command, folder, "--seed", "-1")


def test_a_folder_that_cannot_be_written(capsys, tmp_path):
    (tmp_path / "file").write_text("")
    message = refused(capsys, "train", *TINY, "--out", tmp_path / "file" / "run")
    assert str(tmp_path / "file") in message


def test_interrupted(tmp_path, monkeypatch, capsys):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(torch.optim.Adam, "step", interrupt)
    with pytest.raises(SystemExit) as stop:
        main(["train", *TINY, "--out", str(tmp_path / "run")])
    assert stop.value.code == 130 and "--resume" in capsys.readouterr().err


def test_data_check(capsys, tmp_path):
    main(["data", "check", "digits"])
    out = capsys.readouterr().out
    assert (
        "digits: 1 x 16 x 16" in out
        and "train: 1500 images, pixels 0 to 255" in out
        and "10 classes (0, 1, 2, …, 9)" in out
    )
    message = refused(capsys, "data", "check", "cifar16", "--data-root", tmp_path)
    assert f"no cifar16 in {tmp_path}" in message and "cifar-10-batches-bin" in message
    assert "unknown data" in refused(capsys, "data", "check", "imagenet")
