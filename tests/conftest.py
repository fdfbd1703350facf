import pyro
import pytest
import torch


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path_factory):
    """Tests neither read nor fill the user's cache of prepared data."""
    monkeypatch.setenv("NBVAE_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(autouse=True)
def fresh_state():
    """Every test starts from one seed and an empty parameter store, and leaves torch's defaults as they were."""
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    yield
    torch.set_default_dtype(torch.float32)
    pyro.clear_param_store()
