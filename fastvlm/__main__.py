"""The command `fastvlm`, and `python -m fastvlm`: every verb of every room."""

from fastvlm.common import start

if __name__ == "__main__":
    start.begin()

import argparse
import os
import sys
from pathlib import Path

from fastvlm.common.cli import main
from fastvlm.common.verbs import front

COMMAND = "fastvlm"


def build_parser() -> argparse.ArgumentParser:
    """The command line of all rooms."""
    called = Path(sys.argv[0]).name
    parser = front(COMMAND if called == COMMAND else "python -m fastvlm")
    if "_ARGCOMPLETE" in os.environ:  # a shell asks for what may come next
        import argcomplete

        argcomplete.autocomplete(parser)
    return parser


if __name__ == "__main__":
    main(build_parser)
