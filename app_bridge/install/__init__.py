"""Puts an artefact into an app's project, and takes it out."""
