"""An artefact on a hub, with its model card.

Imports `app_bridge.validation`.
"""
