"""Time to first token, stage by stage, of every runner, and the comparison of two runs.

Imports `benchmarks.peers`, and the shared exports. `runner` (the clock, the stages), `models`
and `figures` may be imported from elsewhere.
"""
