"""A training step of every variant on the meta device, whose tensors have no values.

Whatever asks for a value raises an error at its line: on a GPU, the host would wait for the device there. Each
operation that computes is a launch on a GPU; their number decides the time of a step, because each takes a few
microseconds.
"""

import contextlib
import dataclasses
import io

import pyro
import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from tqdm.auto import tqdm

from pyro_nbvae.batching import Recording
from pyro_nbvae.study.build import build, resolve
from pyro_nbvae.study.config import configure
from pyro_nbvae.study.data import load
from pyro_nbvae.study.folder import Run
from pyro_nbvae.study.processes import Processes
from pyro_nbvae.study.training import Trainer
from pyro_nbvae.study.variants import VARIANTS

gpu = pytest.importorskip("pyro_nbvae.distributions.kernels.gpu")

# PyTorch has no version of this operation for the meta device.
META = torch.library.Library("aten", "IMPL", "Meta")
META.impl("_standard_gamma_grad", lambda shape, draw: torch.empty_like(shape))

# Operations that launch no kernel: they reserve memory or look at it in another way.
RESERVING = ("empty", "new_empty", "empty_like", "empty_strided", "detach", "_unsafe_view", "resize_", "lift", "alias")
# Launches of a step, forward and backward, of 512 images of 28 x 28 pixels with 256 latents.
GAUSSIANS = ("G-VAE", "GS-VAE", "L-VAE", "C-VAE")
LIMITS = {"CMP": 200, "P-NB": 200, "CMP-MAR": 340, "MC-C": 320, "MC-G": 320}
LIMIT = 260


def on_device(things):
    return any(isinstance(t, torch.Tensor) and t.is_meta for t in tree_leaves(things))


class Launches(TorchDispatchMode):
    """Counts the operations on the meta device, and raises an error for a copy of host memory, which waits."""

    number = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        result = function(*arguments, **(options or {}))
        name = function._schema.name.split("::")[1]
        if name in ("_to_copy", "copy_") and on_device(result) and not on_device((arguments[-1],)):
            asynchronous = (options or {}).get("non_blocking") or (name == "copy_" and arguments[2:] == (True,))
            assert asynchronous, "a copy from the host's memory to the device waits"
        viewed = any(r.alias_info is not None and not r.alias_info.is_write for r in function._schema.returns)
        if not viewed and name not in RESERVING and on_device((arguments, options, result)):
            self.number += 1
        return result


@contextlib.contextmanager
def launches(monkeypatch):
    """Context that yields the counter; it counts the kernels in Triton as well."""
    counter, launch = Launches(), gpu.launch

    def counted(*arguments, **options):
        counter.number += 1
        launch(*arguments, **options)

    def tensor(data, *arguments, device=None, _tensor=torch.tensor, **options):
        assert device is None or torch.device(device).type != "meta", "torch.tensor waits: use torch.full"
        return _tensor(data, *arguments, device=device, **options)

    with monkeypatch.context() as patch:
        patch.setattr(gpu, "launch", counted)
        patch.setattr(torch, "tensor", tensor)
        with pyro.get_param_store().scope(), pyro.validation_enabled(False), counter:
            yield counter


def step(name, monkeypatch, **options):
    """Return the launches of one step of a variant."""
    shape = (1, 28, 28)
    model, guide, elbo = build(resolve(configure(name, data="mnist", device="cpu", **options), shape), shape)
    images = torch.rand(8, *shape)
    guide.initialize(images)
    model.initialize(images)
    model.to("meta")
    guide.to("meta")
    x = torch.empty(512, *shape, device="meta")
    with launches(monkeypatch) as counter:
        elbo.differentiable_loss(model, guide, x).backward()
    return counter.number


# without those that other tests register
OURS = [name for name, variant in VARIANTS.items() if type(variant).__module__.startswith("pyro_nbvae.")]


@pytest.mark.parametrize("name", OURS)
def test_a_step_asks_the_device_for_nothing_and_has_few_launches(name, monkeypatch):
    number = step(name, monkeypatch)
    assert number <= LIMITS.get(name, LIMIT)


@pytest.mark.parametrize(("name", "likelihood"), [("G-VAE", "gaussian"), ("EX-C", "poisson"), ("CMP-MAR", "gaussian")])
def test_no_step_of_an_epoch_waits(name, likelihood, tmp_path, monkeypatch):
    """Annealing, clipping, Adam, the schedule and the progress bar too; the row of the log at the end may wait."""
    data = load("digits")
    config = configure(name, data="digits", train_size=300, device="cpu", likelihood=likelihood, epochs=1)
    if likelihood == "poisson":
        data = dataclasses.replace(data, train=(data.train > 127).float(), test=(data.test > 127).float())
    config = resolve(config, data.event_shape, data)
    trainer = Trainer(Run(tmp_path), config, data, torch.device("cpu"), Processes())
    # parameters on the meta device are others, so that the optimiser needs them anew
    trainer.device = torch.device("meta")
    trainer.model.to("meta")
    trainer.guide.to("meta")
    trainer.parameters = list(trainer.elbo(trainer.model, trainer.guide).parameters())
    trainer.optimizer = torch.optim.Adam(trainer.parameters, lr=config.training.lr)
    trainer.scheduler = LambdaLR(trainer.optimizer, trainer.lr_factor)
    batch = Recording(torch.empty(100, *data.event_shape, device="meta"))
    monkeypatch.setattr(trainer, "batches", lambda epoch: iter([batch] * 3))
    monkeypatch.setattr(trainer, "means", lambda values: {"loss": 0.0})
    with launches(monkeypatch), tqdm(file=io.StringIO(), mininterval=0) as bar:
        assert trainer.train_epoch(0, bar)["epoch"] == 1
    assert trainer.scheduler.last_epoch == bar.n == 3


if __name__ == "__main__":
    for variant in VARIANTS:
        print(variant, step(variant, pytest.MonkeyPatch()))
