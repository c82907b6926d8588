"""The models that the FastVLM paper compares with: its claims recomputed, and runners with random weights.

Imports no other wing. `shapes` is the data, `claims` counts and compares, `models` has the runners of `benchmarks ttft
--against`; `shapes` and `claims` may be imported from elsewhere.
"""
