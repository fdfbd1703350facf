"""Example programs, one page each. Run one with ``python -m examples.NAME``."""
