"""Image data: sources by name, and batches of them."""

from pyro_nbvae.data.sources import (
    BATCH,
    SOURCES,
    ImageData,
    batches,
    data_root,
    describe,
    load,
    to_bytes,
    to_unit_interval,
)

__all__ = [
    "BATCH",
    "SOURCES",
    "ImageData",
    "batches",
    "data_root",
    "describe",
    "load",
    "to_bytes",
    "to_unit_interval",
]
