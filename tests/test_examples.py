"""The examples run, in small; what they print are finite numbers, and their pictures show something."""

import re

import numpy as np
import pytest
import torch
from PIL import Image

from examples import bernoulli_vae, cuda_graph, hierarchy, neurons, own_family, own_prior, state_space
from pyro_nbvae.metrics import fano_factors
from pyro_nbvae.study.cli import main
from pyro_nbvae.study.variants import VARIANTS
from tests.pairs import pair


@pytest.mark.parametrize(
    "run, says",
    [
        (lambda out: own_family.main(epochs=2, out=out / "run"), "held-out ELBO"),
        (lambda out: own_prior.main(epochs=2), "shared gain: held-out ELBO"),
        (lambda out: bernoulli_vae.main(epochs=1, out=out), "after training"),
        (lambda out: neurons.main(steps=30, trials=500, neurons=12, out=out), "correlation"),
        (lambda out: hierarchy.main(steps=3), "AnalyticKL_ELBO on the bottom-up guide"),
        (lambda out: state_space.main(steps=4, out=out), "score function"),
        (lambda out: cuda_graph.main(steps=3), "of the counts differ"),
    ],
    ids=["own_family", "own_prior", "bernoulli_vae", "neurons", "hierarchy", "state_space", "cuda_graph"],
)
def test_every_example_runs(run, says, tmp_path, capsys):
    run(tmp_path)
    printed = capsys.readouterr().out
    assert says in printed and not re.search(r"\b(nan|inf)\b", printed)
    for path in tmp_path.glob("*.png"):
        with Image.open(path) as picture:
            assert min(picture.size) > 100 and np.asarray(picture.convert("L")).std() > 5


def test_noise_differs_from_replay_to_replay(capsys):
    cuda_graph.main(steps=3)
    (differ,) = re.findall(r"(\d+)% of the counts differ", capsys.readouterr().out)
    assert int(differ) > 50


def test_the_decoder_of_the_papers_baselines_reads_a_sigmoid(tmp_path, capsys, monkeypatch):
    for name in ("G-VAE-sigmoid", "L-VAE-sigmoid"):
        monkeypatch.setitem(VARIANTS, name, VARIANTS[name[:5]])  # restored afterwards
    from examples import sigmoid_latents

    sigmoid_latents.main(epochs=2, out=tmp_path)
    assert re.search(r"G-VAE-sigmoid: held-out ELBO -?\d", capsys.readouterr().out)
    z = torch.randn(4, 3)
    for name in ("G-VAE", "L-VAE"):
        model, plain = (pair(one, (5,), 3)[0] for one in (f"{name}-sigmoid", name))
        torch.testing.assert_close(model.decode(z), model.decoder(1 / (1 + (-z).exp())))
        assert type(model.prior_distribution()) is type(plain.prior_distribution())


def test_bernoulli_vae_learns(tmp_path, capsys):
    bernoulli_vae.main(epochs=3, out=tmp_path)
    before, after = (float(x) for x in re.findall(r"(-[\d.]+) nats", capsys.readouterr().out))
    assert after > before + 10  # before training the decoder is at the mean of the first batches


def test_the_population_has_the_dispersion_it_says():
    """Regular neurons are below, bursting ones above a Fano factor of 1, within a grating; some counts are missing."""
    data, grating, log_nu = neurons.population(4000, 30)
    fano = fano_factors(data.x, grating)
    assert (fano[log_nu > 0] < 0.8).all() and (fano[log_nu < 0] > 1.3).all()
    assert torch.equal(data.x.isnan(), ~data.mask) and 0 < float((~data.mask).double().mean()) < 0.2


def test_a_family_of_ones_own_by_the_command(tmp_path, capsys, monkeypatch):
    monkeypatch.delitem(VARIANTS, "GEOMETRIC")
    sizes = ["--latents", "4", "--encoder", "linear", "--decoder", "linear", "--epochs", "1"]
    arguments = ["train", "--variant", "GEOMETRIC", *sizes, "--out", str(tmp_path / "run")]
    with pytest.raises(SystemExit):
        main(arguments)
    assert "invalid choice 'GEOMETRIC' for argument '--variant'" in capsys.readouterr().err
    import sys

    monkeypatch.delitem(sys.modules, "examples.own_family")
    main(["--import", "examples.own_family", *arguments])
    assert (tmp_path / "run" / "checkpoint.pt").exists()
    capsys.readouterr()
    main(["generate", str(tmp_path / "run"), "--import=examples.own_family", "--count", "2"])  # behind the command too
    assert "samples.png" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["--import", "no_such_module", "train", "--out", str(tmp_path / "other")])
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("nbvae: --import no_such_module: ModuleNotFoundError")
