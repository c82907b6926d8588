"""Exports a checkpoint to an artefact, and runs the artefact from its bytes; `runtime.load` is the way in."""
