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


class FakeEvent:
    """An event of a copy to the host that ends when a test says so."""

    ended = False

    def record(self, stream):
        pass

    def query(self):
        return self.ended


@pytest.fixture
def events(monkeypatch):
    """Tensors claim to be on a GPU; yields the events of their copies, which do not end by themselves."""
    made, empty = [], torch.empty

    def event():
        made.append(FakeEvent())
        return made[-1]

    def pinned(*shape, pin_memory, device, **options):
        assert pin_memory and device == "cpu"  # else the copy waits, and a default device cannot be pinned
        return empty(*shape, device="cpu", **options)

    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    monkeypatch.setattr(torch, "empty", pinned)
    monkeypatch.setattr(torch.cuda, "Event", event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    return made


def test_copies_that_have_not_ended_are_not_read(events, monkeypatch):
    arriving = Arriving()
    for number in range(3):
        arriving.send(torch.ones(2) * number, number)
    assert arriving.arrived() == []
    events[0].ended = events[2].ended = True
    assert [about for _, about in arriving.arrived()] == [0]  # in order
    events[1].ended = True
    with monkeypatch.context() as patch:  # a capture allows neither copies nor questions
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        arriving.send(torch.ones(2), "captured")
        assert arriving.arrived() == []
    assert [(values.tolist(), about) for values, about in arriving.arrived()] == [([1.0] * 2, 1), ([2.0] * 2, 2)]


def test_two_threads_may_read(events):
    """Here the other thread reads while the first one asks whether the copy has ended."""
    arriving = Arriving()
    arriving.send(torch.ones(2), "once")
    others = []

    def query():
        others.extend(arriving.arrived())
        return True

    events[0].query = query
    assert [about for _, about in arriving.arrived() + others] == ["once"]


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
