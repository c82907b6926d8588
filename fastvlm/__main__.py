"""`python -m fastvlm predict | doctor | download | demo`."""

from fastvlm.common import start

if __name__ == "__main__":
    start.begin()

import argparse

from fastvlm.checkpoint import doctor
from fastvlm.common.cli import Parser, main
from fastvlm.demo import page
from fastvlm.download import download
from fastvlm.model import predict


def build_parser() -> argparse.ArgumentParser:
    """The command line of the package."""
    parser = Parser(prog="python -m fastvlm", description="The PyTorch reference model and its checkpoints.")
    subparsers = parser.add_subparsers(required=True, metavar="VERB")
    for module in (predict, doctor, download, page):
        module.add_parser(subparsers)
    return parser


if __name__ == "__main__":
    main(build_parser)
