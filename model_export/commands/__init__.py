"""The verbs of `python -m model_export` that are about a whole artefact: export, inspect, verify, generate."""
