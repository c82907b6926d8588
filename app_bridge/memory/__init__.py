"""Whether an artefact fits into a device's memory.

Imports `app_bridge.app` and `benchmarks.estimate`.
"""
