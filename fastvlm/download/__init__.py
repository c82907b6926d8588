"""Checkpoints from a hub or an archive, resumable and checked.

Imports `common` and `checkpoint`.
"""
