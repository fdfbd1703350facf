"""Data sets, by name or from the user's own files, and batches of them."""

from pyro_nbvae.data.sources import (
    BATCH,
    SOURCES,
    Data,
    Source,
    batches,
    data_root,
    describe,
    full_name,
    load,
    register_data,
    source_of,
    to_bytes,
    to_floats,
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
