"""`python -m fastvlm predict | doctor | download | demo`."""

import argparse
import sys

from fastvlm import demo_page, doctor, download, predict
from fastvlm.cli import Parser, run


def build_parser() -> argparse.ArgumentParser:
    """The command line of the package."""
    parser = Parser(prog="python -m fastvlm", description="The PyTorch reference model and its checkpoints.")
    subparsers = parser.add_subparsers(required=True, metavar="VERB")
    for module in (predict, doctor, download, demo_page):
        module.add_parser(subparsers)
    return parser


if __name__ == "__main__":
    sys.exit(run(build_parser))
