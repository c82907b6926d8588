"""Finding, reading and judging checkpoints, whatever their layout. Nothing here writes.

Imports `fastvlm.common` and `fastvlm.data`.
"""
