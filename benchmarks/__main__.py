"""Run every benchmark."""

from benchmarks import contention, kl, samplers, scaling, step

for benchmark in (samplers, kl, step, scaling, contention):
    benchmark.main()
