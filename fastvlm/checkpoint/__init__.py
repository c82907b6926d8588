"""Finds, reads and judges checkpoints, whatever their layout. Nothing here writes."""
