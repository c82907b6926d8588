"""Compares an artefact with the model that it was made from, stage by stage."""
