"""The error for what a user can put right."""


class InputError(ValueError):
    """Bad input. Its message is one line: what is wrong, and what would be right; the command prints it and exits 2."""
