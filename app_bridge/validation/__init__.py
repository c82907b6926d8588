"""An artefact held against what the app will do with it: `validate.validate`, and the verb.

Imports `app_bridge.app`; `app_bridge.app` imports nothing from here.
"""
