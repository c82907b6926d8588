"""Checkpoints of any published shape with random weights."""
