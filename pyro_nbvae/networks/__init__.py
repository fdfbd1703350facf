"""Encoders and decoders by name; a model and a guide take any other module in their place."""

from pyro_nbvae.networks.build import DECODERS, ENCODERS, build_decoder, build_encoder

__all__ = ["DECODERS", "ENCODERS", "build_decoder", "build_encoder"]
