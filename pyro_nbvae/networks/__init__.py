"""Encoders and decoders by name; models and guides also accept any other module."""

from pyro_nbvae.networks.build import DECODERS, ENCODERS, build_decoder, build_encoder

__all__ = ["DECODERS", "ENCODERS", "build_decoder", "build_encoder"]
