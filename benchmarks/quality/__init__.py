"""Answers and perplexity of checkpoints and artefacts, and the sweep over recipes.

Imports `benchmarks.parity` and `benchmarks.ttft`.
"""
