"""Is the artefact still the model it was made from? Both sides compared stage by stage.

Imports `benchmarks.metrics`, `measure` and `environment`.
"""
