"""An app's expectations of an artefact: read from its sources, or our table of Apple's demo app."""
