"""What stands beside a figure: the commit of the checkout, the machine, the threads."""

import subprocess
from pathlib import Path

import torch

from pyro_nbvae.runs import provenance


def test_the_commit_is_the_checkouts():
    root = Path(__file__).parents[1]
    head = subprocess.run(["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    found = provenance.commit()
    if head.returncode:  # an unpacked archive
        assert found is None
    else:
        assert head.stdout.startswith(found.rstrip("+")) and len(found.rstrip("+")) >= 10


def test_the_threads_are_those_at_work():
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert provenance.provenance(torch.device("cpu"))["threads"] == 1
    finally:
        torch.set_num_threads(before)
