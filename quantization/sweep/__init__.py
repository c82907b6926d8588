"""The engine of sweeps: points, workers, recommendation and report."""
