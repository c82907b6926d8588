"""The models that the FastVLM paper compares with.

Imports `benchmarks.ttft`.
"""
