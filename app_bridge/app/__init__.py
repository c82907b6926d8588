"""What an app expects of an artefact, read from its sources.

Imports `app_bridge.findings` and `subject`.
"""
