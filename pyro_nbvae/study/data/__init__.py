"""Data sets, by name or from the user's own files, and batches of them."""

from pyro_nbvae.batching import BATCH, batches, to_bytes, to_floats
from pyro_nbvae.study.data.base import Data, Source
from pyro_nbvae.study.data.sources import (
    SOURCES,
    data_root,
    describe,
    full_name,
    load,
    register_data,
    source_of,
)

__all__ = [
    "BATCH",
    "SOURCES",
    "Data",
    "Source",
    "batches",
    "data_root",
    "describe",
    "full_name",
    "load",
    "register_data",
    "source_of",
    "to_bytes",
    "to_floats",
]
