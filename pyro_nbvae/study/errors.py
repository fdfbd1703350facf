"""Checks of the command line's options, and the first line of an error."""

from __future__ import annotations

from collections.abc import Iterable

from pyro_nbvae.errors import InputError


def check_seed(seed: int) -> None:
    """Raise InputError unless a seed is from 0 to 2^32 - 1."""
    if not 0 <= seed < 2**32:
        raise InputError(f"--seed must be 0 to {2**32 - 1}, got {seed}")


def check_number(name: str, value: int, least: int, most: int = 1_000_000_000) -> None:
    """Raise InputError unless a whole number is within its limits."""
    if not least <= value <= most:
        raise InputError(f"{name} must be {least} to {most:,}, got {value}")


def check_member(what: str, value: object, known: Iterable[object], otherwise: str = "") -> None:
    """Raise InputError unless a value is one of the known ones, which the message lists.

    Args:
        what: kind of the value, for the message.
        value: the value to check.
        known: the known values.
        otherwise: text to append to the message.
    """
    known = list(known)
    if value not in known:
        names = ", ".join(repr(each) if "," in str(each) else str(each) for each in known)
        raise InputError(f"unknown {what} {value!r}: choose from {names}{otherwise}")


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or the name of its class if it has none.

    (Pyro appends tables of shapes to its messages, and the operating system's begin with a number.)
    """
    text = (isinstance(error, OSError) and error.strerror) or str(error).strip()
    return text.splitlines()[0].strip().rstrip(":.") if text else type(error).__name__
