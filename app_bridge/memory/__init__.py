"""Estimates whether an artefact fits into a device's memory."""
