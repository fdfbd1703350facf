"""Promises of docs/reliability.md that are no damage to a file: tests/attack has those."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import pyro_nbvae
from pyro_nbvae.errors import InputError
from pyro_nbvae.study import training
from pyro_nbvae.study.build import resolve
from pyro_nbvae.study.config import configure
from pyro_nbvae.study.files import read_tensors, write_tensors
from pyro_nbvae.study.folder import Run, config_json, parse_config
from pyro_nbvae.study.training import train
from pyro_nbvae.study.tree import AnnealedGumbelSoftmax, Training

TINY = {"data": "digits", "latents": 4, "encoder": "linear", "decoder": "linear", "train_size": 100, "batch_size": 50}
FLAGS = [f"--{k.replace('_', '-')}={v}" for k, v in TINY.items()]


def test_one_training_a_folder(tmp_path):
    config = configure("EX-I", epochs=1, **TINY)
    with Run(tmp_path / "run").locked(), pytest.raises(InputError, match="another process is training in"):
        train(config, tmp_path / "run", progress=False)
    assert train(config, tmp_path / "run", progress=False).checkpoint_path.exists()


def poisoned_step(step):
    """Trainer.step, which leaves a parameter that is not a number."""

    def poisoned(self, x):
        terms = step(self, x)
        with torch.no_grad():
            self.parameters[0].view(-1)[0] = float("nan")
        return terms

    return poisoned


def test_a_command_that_failed_may_be_corrected_and_given_again(tmp_path, monkeypatch):
    run = tmp_path / "run"
    with monkeypatch.context() as patch, pytest.raises(InputError, match="diverged in epoch 1"):
        patch.setattr(training.Trainer, "step", poisoned_step(training.Trainer.step))
        train(configure("EX-I", epochs=1, lr=0.1, **TINY), run, progress=False)
    assert not (run / "checkpoint.pt").exists()
    for resume in (False, True):
        config = configure("EX-I", epochs=1, **TINY)
        assert train(config, run, resume=resume, progress=False).config()[0].training.lr == Training().lr
        (run / "checkpoint.pt").unlink()


def test_a_last_step_that_diverges_keeps_the_epoch_before(tmp_path, monkeypatch):
    config = configure("EX-I", epochs=1, **TINY)
    run = train(config, tmp_path / "run", progress=False)
    good = run.checkpoint_path.read_bytes()
    monkeypatch.setattr(training.Trainer, "step", poisoned_step(training.Trainer.step))
    with pytest.raises(InputError, match="diverged in epoch 2"):
        train(configure("EX-I", epochs=2, **TINY), run.folder, resume=True, progress=False)
    assert run.checkpoint_path.read_bytes() == good and len(run.read_checkpoint()["log"]) == 1


@given(st.floats(1e-30, 100), st.floats(1e-30, 100), st.floats(0.1, 1000), st.floats(0, 2000))
def test_the_temperature_stays_between_its_ends(start, end, epochs, epoch):
    end, start = sorted((start, end))
    relaxation = AnnealedGumbelSoftmax(temperature_start=start, temperature=end, anneal_epochs=epochs)
    now = relaxation.temperature_at(epoch)
    assert end * (1 - 1e-12) <= now <= start * (1 + 1e-12) and now > 0
    assert epoch < epochs or now == end


@pytest.mark.parametrize("turned", range(0, 600, 37))
def test_a_bit_that_turned_is_noticed(tmp_path, turned):
    path = tmp_path / "x.pt"
    write_tensors(path, {"a": torch.arange(5.0), "b": [1, "x"]})
    assert torch.equal(read_tensors(path)["a"], torch.arange(5.0))
    content = bytearray(path.read_bytes())
    content[turned % len(content)] ^= 1
    path.write_bytes(bytes(content))
    with pytest.raises(ValueError):
        read_tensors(path)


def test_config_json_has_all_keys_and_no_other():
    stored = config_json(resolve(configure("EX-C"), (1, 16, 16)), (1, 16, 16))
    assert parse_config(stored)[0].variant == "EX-C"
    with pytest.raises(InputError, match="unknown key 'note'"):
        parse_config({**stored, "note": 1})
    del stored["config"]["vae"]["relaxation"]["temperature"]
    with pytest.raises(InputError, match=r"vae\.relaxation\.temperature: Field required"):
        parse_config(stored)


def test_exported_weights_have_a_checksum(tmp_path):
    path = train(configure("EX-I", epochs=1, **TINY), tmp_path / "run", progress=False).export()
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(bytes(content))
    with pytest.raises(InputError, match="checksum is wrong"):
        pyro_nbvae.load(path)


def command(*arguments, **options):
    words = [sys.executable, "-m", "pyro_nbvae", *map(str, arguments)]
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


def test_terminals_and_environments(tmp_path):
    """ASCII output, torchrun's variables by halves, and SIGTERM: each is one line or none."""
    ascii_only = {**os.environ, "PYTHONIOENCODING": "ascii", "LC_ALL": "C"}
    train(configure("EX-I", epochs=1, **TINY), tmp_path / "a", progress=False)
    process = command("evaluate", tmp_path / "a", "--samples=10", "--importance-samples=0", env=ascii_only)
    err = process.communicate()[1]
    assert process.returncode == 0 and "Traceback" not in err

    run = [*FLAGS, "--variant=EX-I", "--out", tmp_path / "b"]
    process = command("train", *run, env={**os.environ, "WORLD_SIZE": "2"})
    err = process.communicate()[1]
    assert process.returncode == 2 and err.startswith("nbvae: WORLD_SIZE is set and RANK") and err.count("\n") == 1

    process = command("train", *run, "--epochs=100000", env=ascii_only)
    try:
        while not (tmp_path / "b" / "checkpoint.pt").exists():
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        err = process.communicate()[1]
    finally:
        process.kill()
    assert process.returncode == 143 and "Traceback" not in err
    assert err.splitlines()[-1].startswith("nbvae: terminated; what was finished is kept")


FINALIZER = """
class Finalized:
    def __del__(self):  # Python ignores exceptions of finalizers
        signal.raise_signal(signal.SIGTERM)
        time.sleep(0.01)

def command():
    Finalized()
    while True:
        time.sleep(0.01)
"""
DEADLOCK = """
def command():
    threading.Timer(0.1, os.kill, [os.getpid(), signal.SIGTERM]).start()
    libc, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(256)
    libc.pthread_mutex_lock(mutex)
    libc.pthread_mutex_lock(mutex)
"""
CALL = """
import ctypes, os, signal, threading, time
from pyro_nbvae.study import commandline
commandline.GRACE = 0.2
{}
commandline.run(lambda: command, "program")
"""


@pytest.mark.parametrize("command", [FINALIZER, DEADLOCK])
def test_a_termination_is_not_lost(command):
    process = subprocess.run([sys.executable, "-c", CALL.format(command)], capture_output=True, text=True)
    assert process.returncode == 143 and process.stderr.splitlines()[-1].startswith("program: terminated")
