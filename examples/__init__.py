"""Programs that a user would write, a page each. Run one as ``python -m examples.NAME``."""
