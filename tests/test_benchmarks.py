"""The benchmarks that need a device say so in one line."""

import pytest
import torch

from benchmarks import gpu


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_the_benchmark_of_a_gpu_needs_one():
    with pytest.raises(SystemExit, match=r"^benchmarks\.gpu needs an NVIDIA GPU"):
        gpu.main()
