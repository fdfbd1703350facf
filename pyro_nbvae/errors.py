"""The error for what a user can put right."""


class InputError(ValueError):
    """Bad input. Its message is one line: what is wrong, and what would be right; the command prints it and exits 2."""


def check_seed(seed: int) -> None:
    """Raises InputError for a seed that a generator does not take."""
    if not 0 <= seed < 2**32:
        raise InputError(f"--seed must be 0 to {2**32 - 1}, got {seed}")
