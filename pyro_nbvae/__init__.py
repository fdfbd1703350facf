"""Variational autoencoders whose latents are overdispersed spike counts, as Pyro programs."""

from importlib.metadata import version

__version__ = version("pyro-nbvae")
