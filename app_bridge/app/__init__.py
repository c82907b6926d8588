"""What an app expects of an artefact: read from its sources (`sources`), or our table of Apple's demo app (`facts`).

Imports `fastvlm.common` and `quantization.catalogue`; nothing else of this room.
"""
