"""Encoders and decoders (DESIGN 3.7): images of 1 or 3 channels and 8 to 64 pixels a side."""

from pyro_nbvae.networks.build import DECODERS, ENCODERS, build_decoder, build_encoder

__all__ = ["DECODERS", "ENCODERS", "build_decoder", "build_encoder"]
