"""What stands beside a figure: the commit of the checkout, the machine, the threads."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch

from pyro_nbvae.study import provenance


def test_the_commit_is_the_checkouts():
    root = Path(__file__).parents[1]
    head = subprocess.run(["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    found = provenance.COMMIT
    if head.returncode:  # an unpacked archive
        assert found is None
    else:
        assert head.stdout.startswith(found.rstrip("+")) and len(found.rstrip("+")) >= 10


COMMITTED_MEANWHILE = """
import subprocess, torch
from pyro_nbvae.study.provenance import COMMIT, provenance
subprocess.run([*GIT, "commit", "-q", "--allow-empty", "-m", "later"], check=True)
later = subprocess.run([*GIT, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout
print(provenance(torch.device("cpu"))["commit"], later.strip())
"""


def test_a_commit_that_is_made_while_a_process_works_is_not_its_own(tmp_path):
    shutil.copytree(
        Path(provenance.__file__).parents[1], tmp_path / "pyro_nbvae", ignore=shutil.ignore_patterns("*.pyc")
    )
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "first"]):
        subprocess.run([*git, *command], check=True)
    first = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout
    done = subprocess.run(
        [sys.executable, "-B", "-c", f"GIT = {git!r}" + COMMITTED_MEANWHILE],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    recorded, later = done.stdout.split()
    assert first.startswith(recorded) and not later.startswith(recorded)


def test_the_threads_are_those_at_work():
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert provenance.provenance(torch.device("cpu"))["threads"] == 1
    finally:
        torch.set_num_threads(before)
