"""Runs every benchmark."""

from benchmarks import kl, samplers, scaling, step

for benchmark in (samplers, kl, step, scaling):
    benchmark.main()
