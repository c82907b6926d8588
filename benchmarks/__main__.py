"""`python -m benchmarks parity | export | encoder | estimate | quantization | ttft | mac-report | peers`."""

from fastvlm.common import start

if __name__ == "__main__":
    start.begin()

import argparse

from benchmarks.estimate import command as estimate
from benchmarks.mac import report as mac_report
from benchmarks.parity import command as parity
from benchmarks.peers import command as peers
from benchmarks.suites import encoder, export, quantization
from benchmarks.ttft import command as ttft
from fastvlm.common.cli import Parser, main


def build_parser() -> argparse.ArgumentParser:
    """The command line of the package."""
    parser = Parser(
        prog="python -m benchmarks",
        description="Is an artefact still the model it came from, and what does exporting cost?",
    )
    subparsers = parser.add_subparsers(required=True, metavar="VERB")
    parity.add_parser(subparsers)
    export.add_parser(subparsers)
    encoder.add_parser(subparsers)
    estimate.add_parser(subparsers)
    quantization.add_parser(subparsers)
    ttft.add_parser(subparsers)
    mac_report.add_parser(subparsers)
    peers.add_parser(subparsers)
    return parser


if __name__ == "__main__":
    main(build_parser, at_once=True)  # taking down PyTorch and what a benchmark has loaded can take seconds
