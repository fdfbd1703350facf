"""Seeds of the package's own random numbers, apart from those of its users."""

from __future__ import annotations

import hashlib


def stream_seed(seed: int, name: str) -> int:
    """Return the seed, of 32 bits, of a stream of random numbers with this name.

    Data that a user draws after ``torch.manual_seed(0)`` would have the same noise as what the package draws with seed
    0: an evaluation would know the noise of its data, and a random subset would prefer some of their values.

    Example::

        >>> stream_seed(0, "evaluation") == stream_seed(0, "evaluation")
        True
        >>> len({0, stream_seed(0, "evaluation"), stream_seed(1, "evaluation"), stream_seed(0, "subset")})
        4
    """
    return int.from_bytes(hashlib.sha256(f"{name} {seed}".encode()).digest()[:4], "little")
