"""Image data: sources by name, and batches of them."""

from pyro_nbvae.data.sources import SOURCES, ImageData, batches, describe, load, to_unit_interval

__all__ = ["SOURCES", "ImageData", "batches", "describe", "load", "to_unit_interval"]
