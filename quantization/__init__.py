"""Recipes and storage schemes for weights, calibration, and the engine of sweeps over recipes."""
