"""Relaxation, temperature and KL form, which the paper leaves to the user.

The gradient noise is that of the run's estimator and relaxation at the final temperature, at the checkpoint of the run.
"""

from typing import Any

from pyro_nbvae.errors import InputError
from pyro_nbvae.study.report import run_script
from pyro_nbvae.study.tables import Table, register_table

ARRIVALS, GUMBEL = ("EX-C", "DS-C", "MC-C", "P-VAE"), ("EX-G", "DS-G", "MC-G")


def _relaxations(base: Any) -> dict[str, dict[str, Any]]:
    if base.variant not in ARRIVALS + GUMBEL:
        raise InputError(f"{base.variant} has no temperature; {', '.join(ARRIVALS + GUMBEL)} have one")
    default, arrivals = base.relaxation, base.variant in ARRIVALS
    ends = {f"τ {t}": (t, t) for t in (1.0, 0.24, 0.05)} | ({"annealed from 1": (1.0, 0.05)} if arrivals else {})
    schedules: dict[str, dict[str, Any]] = {"default": {}} | {
        name: {"temperature_start": start, "temperature": end}
        for name, (start, end) in ends.items()
        if (start, end) != (default.temperature_start, default.temperature)
    }
    if not arrivals:
        return schedules
    varied = {
        f"{indicator} {name}": {**changes, "indicator": indicator}
        for indicator in ("sigmoid", "smoothstep")
        for name, changes in schedules.items()
    }
    return {"integer": {"relaxation": "integer"}, **varied}


TABLE = Table(
    name="relaxation",
    title="Temperature, indicator and KL form; default: arrivals annealed from 0.24 to 0.05, Gumbel-softmax from 1 "
    "to 0.25; at scale paper as in the paper",
    variants=(*ARRIVALS, *GUMBEL),
    data=("mnist", "cifar16"),
    metrics=("elbo", "mse", "fid_c", "fid", "kl", "fano", "gradient_noise", "seconds_per_step"),
    varied=_relaxations,
    compare={
        **{(f"{one} sigmoid default", f"{one} sigmoid annealed from 1"): ("elbo",) for one in ARRIVALS},
        ("P-VAE integer", "P-VAE sigmoid default"): ("elbo",),
        ("EX-C sigmoid τ 0.24", "EX-C sigmoid default"): ("elbo",),
        **{(f"{one} τ 1.0", f"{one} default"): ("fid_c",) for one in GUMBEL},
    },
)
register_table(TABLE)

if __name__ == "__main__":
    run_script(TABLE)
