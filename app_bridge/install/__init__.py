"""An artefact put into an app's project, and taken out of it.

Imports `app_bridge.app` and `app_bridge.validation`.
"""
