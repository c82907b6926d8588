"""Recipes and storage schemes for weights: formats, calibration, sweeps."""
