"""Time to first token, stage by stage, of every runner.

Imports `benchmarks.metrics`, `measure` and `environment`.
"""
