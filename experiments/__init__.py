"""Scripts that make the tables and figures; run them as ``python -m experiments.NAME``."""
