"""Checkpoints from a hub or an archive, resumable and checked."""
