"""An artefact held against what the app will do with it.

Imports `app_bridge.app`.
"""
