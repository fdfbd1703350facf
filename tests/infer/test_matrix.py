"""Every loss on variants and examples; with NBVAE_ATTACK=all (make attack) on all of them, with every option."""

import os

import pytest

from tests.infer import matrix

ALL = os.environ.get("NBVAE_ATTACK") == "all"
# counts that are relaxed, integer and exact; not counts; categories; several sites, in and out of the model's order
SOME = ("EX-C", "CMP", "CMP exact", "G-VAE", "C-VAE", "EX-C relaxed prior", "example hierarchy bottom-up")
SOME_LOSSES = ("Trace_ELBO", "TraceGraph_ELBO", "TraceMeanField_ELBO", "AnalyticKL_ELBO")
NO_SCORE = ("MeanField", "AnalyticKL", "MonteCarloKL", "TailAdaptive")


def is_refused(case, loss, option):
    """Whether a combination has no gradient, so that it must end in one line."""
    if loss == "Trace_MMD":  # the prior must have a pathwise gradient too
        continuous = case in ("G-VAE", "GS-VAE", "L-VAE") or "sigmoid" in case
        return option != "condition z" and not (continuous or "relaxed prior" in case or case.endswith("relaxed"))
    if option == "condition z":
        return False
    return ("exact" in case and any(word in loss for word in NO_SCORE)) or (
        loss == "AnalyticKL_ELBO" and "bottom-up" in case
    )


def chosen(case, loss, option):
    if ALL:
        return True
    return case in SOME and (option == "plain" or (case == "CMP" and loss in SOME_LOSSES))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("loss", matrix.LOSSES)
@pytest.mark.parametrize("case", matrix.CASES if ALL else SOME)
def test_every_loss_has_its_gradient_or_one_line(case, loss):
    wrong = {}
    for option in matrix.OPTIONS:
        if chosen(case, loss, option) and matrix.plan(case, loss, option):
            line = matrix.run(case, loss, option)
            if not line.startswith("refused" if is_refused(case, loss, option) else "ok"):
                wrong[option] = line
    assert not wrong
