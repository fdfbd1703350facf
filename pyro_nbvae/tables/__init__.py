"""Grids of runs: their cells, the processes that train them, the tables and the report."""
