"""The version of the project, which pyproject.toml reads from here."""

VERSION = "0.1.0"
