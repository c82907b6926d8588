"""Checkpoint to artefact, and the artefact run from its bytes."""
