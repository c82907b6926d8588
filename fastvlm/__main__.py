"""The command `fastvlm`, and `python -m fastvlm`: every verb of every room."""

from fastvlm.common import start

if __name__ == "__main__":
    start.begin()

import argparse
import os
import sys
from pathlib import Path

from app_bridge.__main__ import VERBS as APP
from benchmarks.__main__ import VERBS as BENCHMARKS
from fastvlm.common.cli import main
from fastvlm.common.verbs import CommandLine, Verb
from model_export.__main__ import VERBS as EXPORT
from quantization.__main__ import VERBS as QUANTIZATION

REFERENCE = (
    Verb(
        "download",
        "fastvlm.download.download:add_parser",
        "download a published model or a hub repository",
        "Get a checkpoint",
    ),
    Verb(
        "doctor",
        "fastvlm.checkpoint.doctor:add_parser",
        "say what a checkpoint is and everything that is wrong with it",
        "Get a checkpoint",
    ),
    Verb("predict", "fastvlm.model.predict:add_parser", "ask a checkpoint about pictures, in PyTorch", "Ask a model"),
    Verb(
        "demo",
        "fastvlm.demo.page:add_parser",
        "draw pictures, ask the demo checkpoint, show question, answer and truth",
        "Ask a model",
    ),
)
VERBS = {verb.front or verb.name: verb for verb in (*REFERENCE, *EXPORT, *QUANTIZATION, *BENCHMARKS, *APP)}
COMMAND = "fastvlm"


def build_parser() -> argparse.ArgumentParser:
    """The command line of all rooms."""
    called = Path(sys.argv[0]).name
    prog = COMMAND if called == COMMAND else "python -m fastvlm"
    parser = CommandLine(
        prog, "A FastVLM checkpoint to Apple devices, with the proof that what arrives is the same model.", VERBS
    )
    if "_ARGCOMPLETE" in os.environ:  # a shell asks for what may come next
        import argcomplete

        argcomplete.autocomplete(parser)
    return parser


if __name__ == "__main__":
    main(build_parser)
