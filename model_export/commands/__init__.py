"""The verbs of model_export that are about a whole artefact: export, inspect, verify, generate."""
