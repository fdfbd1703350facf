"""The page on a lab's own files runs, on an NWB file that is made here."""

import re
from datetime import datetime, timezone
from pathlib import Path

import numpy as np
import pynwb
import pytest

from pyro_nbvae.study.cli import main

PAGE = Path(__file__).parents[1] / "docs/tutorials/your_files.md"


def arrays_of(path):
    with np.load(path) as file:
        return dict(file)


@pytest.fixture
def session(tmp_path, monkeypatch):
    """An NWB file of 40 trials and 5 units, and the counts that it should give."""
    rng = np.random.default_rng(0)
    nwb = pynwb.NWBFile("a session", "0", datetime(2026, 1, 1, tzinfo=timezone.utc))
    nwb.add_trial_column("stimulus", "the grating")
    starts = 2.0 * np.arange(40)
    for k, start in enumerate(starts):
        nwb.add_trial(start_time=start, stop_time=start + 1.5, stimulus=("left", "right")[k % 2])
    counts = np.zeros((40, 10, 5), int)
    for unit in range(5):
        times = np.sort(rng.uniform(0, 80, 300))
        nwb.add_unit(spike_times=times)
        for trial, start in enumerate(starts):
            for b in range(10):
                counts[trial, b, unit] = ((times >= start + b / 10) & (times < start + (b + 1) / 10)).sum()
    with pynwb.NWBHDF5IO(tmp_path / "session.nwb", "w") as io:
        io.write(nwb)
    monkeypatch.chdir(tmp_path)
    return counts


@pytest.mark.filterwarnings("ignore")
def test_spike_times_become_counts_a_run_and_latents(session, capsys):
    blocks = re.findall(r"```(python|bash)\n(.*?)```", PAGE.read_text(), re.DOTALL)
    names: dict[str, object] = {}
    for kind, code in blocks:
        if kind == "python":
            exec(compile(code, PAGE.name, "exec"), names)
            continue
        for line in code.strip().splitlines():
            command = line.removeprefix("nbvae ").split()
            main([*command, "--epochs", "2", "--device", "cpu"] if command[0] == "train" else command)
    found = arrays_of("recording.npz")
    np.testing.assert_array_equal(found["counts"], session)
    assert (found["exposure"] == 0.1).all() and found["stimulus"][:2].tolist() == ["left", "right"]
    assert arrays_of("latents.npz")["mean"].shape == (40, 8)
    assert "suggested: --likelihood" in capsys.readouterr().out
