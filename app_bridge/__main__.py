"""`python -m app_bridge bundle | restore | validate | plan | card | publish`."""

from fastvlm.common import start

if __name__ == "__main__":
    start.begin()

import argparse

from app_bridge.install import bundle
from app_bridge.memory import plan
from app_bridge.publishing import verbs as publishing
from app_bridge.validation import validate
from fastvlm.common.cli import Parser, main


def build_parser() -> argparse.ArgumentParser:
    """The command line of the package."""
    parser = Parser(
        prog="python -m app_bridge",
        description="Put an artefact into an app: check it, plan its memory, bundle, describe and publish it.",
    )
    verbs = parser.add_subparsers(required=True, metavar="VERB")
    bundle.add_parsers(verbs)
    validate.add_parser(verbs)
    plan.add_parser(verbs)
    publishing.add_parsers(verbs)
    return parser


if __name__ == "__main__":
    main(build_parser)
