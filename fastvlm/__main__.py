"""`python -m fastvlm predict | doctor | download | demo`."""

from fastvlm import start

if __name__ == "__main__":
    start.begin()

import argparse

from fastvlm import demo_page, doctor, download, predict
from fastvlm.cli import Parser, main


def build_parser() -> argparse.ArgumentParser:
    """The command line of the package."""
    parser = Parser(prog="python -m fastvlm", description="The PyTorch reference model and its checkpoints.")
    subparsers = parser.add_subparsers(required=True, metavar="VERB")
    for module in (predict, doctor, download, demo_page):
        module.add_parser(subparsers)
    return parser


if __name__ == "__main__":
    main(build_parser)
