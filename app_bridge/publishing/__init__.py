"""Publishes an artefact on a hub, with its model card."""
