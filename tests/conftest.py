import os

import pyro
import pytest
import torch
from hypothesis import HealthCheck, settings
from torch import nn

from pyro_nbvae.study import plugins

# no limit on the time of an example: a busy machine may stop any of them for long
settings.register_profile(
    "any machine", deadline=None, derandomize="CI" in os.environ, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile("attack", settings.get_profile("any machine"), max_examples=2000)
settings.load_profile("any machine")


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path_factory):
    """Tests neither read nor fill the user's cache of prepared data."""
    monkeypatch.setenv("NBVAE_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(autouse=True)
def fresh_state():
    """Every test starts from one seed, an empty parameter store and validation, and leaves defaults as they were."""
    pyro.clear_param_store()
    pyro.enable_validation(True)
    pyro.set_rng_seed(0)
    imported = list(plugins.imported)
    yield
    plugins.imported[:] = imported
    torch.set_default_dtype(torch.float32)
    pyro.clear_param_store()


@pytest.fixture
def own_variants():
    """Variants that a test registers are gone after it."""
    from pyro_nbvae.study.variants import KINDS, VARIANTS

    before = [(table, dict(table)) for table in (VARIANTS, KINDS)]
    yield
    for table, content in before:
        table.clear()
        table.update(content)


@pytest.fixture
def offline(monkeypatch):
    """No network: every proxy is one that does not answer."""
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")


def write_inception_weights(path):
    """Weights of the right names and shapes that all look at one small table of random numbers."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)
        patch.setattr(torch, "load", lambda *_, **__: None)
        shapes = {k: v.shape for k, v in nn.Module.state_dict(FeatureExtractorInceptionV3("", ["2048"], "-")).items()}
    table = torch.randn(40_000, generator=torch.Generator().manual_seed(0))
    state = {}
    for name, shape in shapes.items():
        if len(shape) >= 2:
            strides = (13, 5, 3, 1)[: len(shape)]
            state[name] = table.as_strided(shape, strides)
            fan_in = shape[1:].numel()
        elif "running_var" in name:
            state[name] = torch.full((), fan_in / 2).expand(shape)
        elif "bn.weight" in name:
            state[name] = torch.ones(()).expand(shape)
        else:
            state[name] = torch.zeros((), dtype=torch.int64 if "tracked" in name else None).expand(shape)
    torch.save(state, path)
    return path


@pytest.fixture(scope="session")
def inception_weights(tmp_path_factory):
    """A small file that torch-fidelity takes for its Inception weights."""
    path = write_inception_weights(tmp_path_factory.mktemp("inception") / "weights.pth")
    assert path.stat().st_size < 1_000_000
    return path
