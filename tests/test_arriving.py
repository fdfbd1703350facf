"""Values that are read on the host once they have arrived."""

import pytest
import torch

from pyro_nbvae.arriving import Arriving
from pyro_nbvae.distributions import GumbelSoftmax, RelaxedPoisson

on_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=on_a_gpu)])
def test_values_arrive_in_order_as_they_were_sent(device):
    arriving, values = Arriving(), torch.zeros(2, device=device, requires_grad=True)
    for number in range(3):
        arriving.send(values, number)
        with torch.no_grad():
            values += 1
    if device == "cuda":
        torch.cuda.synchronize()
    found = arriving.arrived()
    assert [(x.tolist(), number) for x, number in found] == [([float(k)] * 2, k) for k in range(3)]
    assert all(x.device.type == "cpu" and not x.requires_grad for x, _ in found) and arriving.arrived() == []


def test_values_of_the_meta_device_never_arrive():
    arriving = Arriving()
    arriving.send(torch.zeros(2, device="meta"), None)
    assert arriving.arrived() == []


@on_a_gpu
def test_nothing_is_sent_while_a_graph_is_captured():
    arriving, values = Arriving(), torch.zeros(2, device="cuda")
    arriving.send(values, "before")
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        arriving.send(values + 1, "within")
        assert arriving.arrived() == []
    torch.cuda.synchronize()
    assert [about for _, about in arriving.arrived()] == ["before"]


def test_a_warning_names_the_max_count_of_its_own_draw():
    for limit in (30, 40):
        with pytest.warns(RuntimeWarning, match=f"max_count={limit}"):
            RelaxedPoisson(torch.tensor([35.0]), relaxation=GumbelSoftmax(max_count=limit)).rsample()
