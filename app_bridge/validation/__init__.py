"""Checks an artefact against what the app will do with it."""
