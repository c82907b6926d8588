"""What only a Mac can verify, in one report.

Imports the other parts of `benchmarks`.
"""
