"""Ships an artefact in an app: what the app will do with it, checked before Xcode opens."""
