"""The project's own bars, measured.

Imports the other parts of `benchmarks`.
"""
