"""`python -m app_bridge`: an artefact into an app."""

from fastvlm.common import start

if __name__ == "__main__":
    start.begin()

import argparse

from fastvlm.common.cli import main
from fastvlm.common.verbs import Verb, room

VERBS = (
    Verb(
        "validate",
        "app_bridge.validation.validate:add_parser",
        "name everything about an artefact that the app would trip over",
        "Into an app",
    ),
    Verb(
        "plan",
        "app_bridge.memory.plan:add_parser",
        "say whether a model fits the memory that a device lets the app have",
        "Into an app",
    ),
    Verb(
        "bundle",
        "app_bridge.install.bundle:add_parsers",
        "put an artefact into an app, checked, whole or not at all",
        "Into an app",
    ),
    Verb(
        "restore", "app_bridge.install.bundle:add_parsers", "bring back the model that bundle replaced", "Into an app"
    ),
    Verb("card", "app_bridge.publishing.verbs:add_parsers", "write a model card from the manifest", "Into an app"),
    Verb(
        "publish",
        "app_bridge.publishing.verbs:add_parsers",
        "upload an artefact to the hub; a dry run unless --upload",
        "Into an app",
    ),
)


def build_parser() -> argparse.ArgumentParser:
    """The command line of the room."""
    return room(
        "python -m app_bridge",
        "Put an artefact into an app: check it, plan its memory, bundle, describe and publish it.",
        VERBS,
    )


if __name__ == "__main__":
    main(build_parser)
