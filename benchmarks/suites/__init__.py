"""The project's own bars, measured."""
