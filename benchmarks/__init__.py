"""Metrics, tolerances, parity and timing."""
