"""The error for what a user can put right, and the checks that everything shares."""

import math
from collections.abc import Iterable


class InputError(ValueError):
    """Bad input. Its message is one line: what is wrong, and what would be right; the command prints it and exits 2."""


def check_seed(seed: int) -> None:
    """Raises InputError for a seed that a generator does not take."""
    if not 0 <= seed < 2**32:
        raise InputError(f"--seed must be 0 to {2**32 - 1}, got {seed}")


def check_positive(name: str, value: float) -> None:
    """Raises InputError for a number that is not positive and finite."""
    if not (value > 0 and math.isfinite(value)):
        raise InputError(f"{name} must be positive, got {value}")


def check_member(what: str, value: object, known: Iterable[object], otherwise: str = "") -> None:
    """Raises InputError for a name that is not among those that are known, listing them.

    Args:
        otherwise: what else would be right, added to the message.
    """
    known = list(known)
    if value not in known:
        raise InputError(f"unknown {what} {value!r}: choose from {', '.join(map(str, known))}{otherwise}")


def first_line(error: BaseException) -> str:
    """The first line of an error's message (Pyro adds tables of shapes), or its class where it has none."""
    text = str(error).strip()
    return text.splitlines()[0].strip().rstrip(":.") if text else type(error).__name__
