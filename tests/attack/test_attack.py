"""A tenth of every group of attacks; all of them with NBVAE_ATTACK=all (make attack), which writes their counts."""

import os
from pathlib import Path

import pandas as pd
import pytest

from pyro_nbvae.study.files import write_text

from .cases import GROUPS

ALL = os.environ.get("NBVAE_ATTACK") == "all"
COUNTS = Path(__file__).parents[2] / "results" / "attack.csv"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", GROUPS)
def test_attack(name, tmp_path_factory):
    cases = list(GROUPS[name]())[:: 1 if ALL else 10]
    failures = {}
    for title, attack in cases:
        folder = tmp_path_factory.mktemp("attack")
        try:
            problem = attack(folder)
        except BaseException as error:
            problem = f"{type(error).__name__}: {error}"
        if problem:
            failures[title] = problem
    if ALL:
        before = pd.read_csv(COUNTS).set_index("group") if COUNTS.exists() else pd.DataFrame()
        row = pd.DataFrame({"tried": [len(cases)], "failed": [len(failures)]}, index=pd.Index([name], name="group"))
        rows = pd.concat([before[before.index != name], row])
        write_text(COUNTS, rows.to_csv())
    listed = "\n".join(f"{title}: {problem}" for title, problem in list(failures.items())[:40])
    assert not failures, f"{len(failures)} of {len(cases)} attacks succeeded:\n{listed}"
