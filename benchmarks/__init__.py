"""Measurements of checkpoints and artefacts: parity, time to first token, quality, and the project's own bars."""
