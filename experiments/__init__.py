"""Scripts that make the tables and figures; each runs as ``python -m experiments.NAME``."""
