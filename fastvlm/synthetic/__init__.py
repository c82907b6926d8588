"""Checkpoints of any published shape with random weights.

Imports `common`, `data` and `checkpoint`.
"""
