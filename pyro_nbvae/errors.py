"""The error for invalid input."""


class InputError(ValueError):
    """Invalid input, described in one line: the problem, the value received and the remedy."""
