"""The sweep engine: points, workers, cluster, report.

Imports `quantization`'s recipes.
"""
