"""Benchmarks of speed and memory.

Results are ratios of things measured side by side in one run. ``make bench`` runs all of them.
"""
