"""`python -m model_export`: a checkpoint into an artefact, and what to do with an artefact."""

from fastvlm.common import start

if __name__ == "__main__":
    start.begin()

import argparse

from fastvlm.common.cli import main
from fastvlm.common.verbs import Verb, room

VERBS = (
    Verb(
        "all",
        "benchmarks.parity.proved_export:add_all",
        "export a checkpoint, prove the artefact against it, publish it whole or not at all",
        "Export",
        front="export",
    ),
    Verb(
        "vision",
        "model_export.commands.export:add_vision",
        "export the vision encoder alone",
        "Export",
        front="export-vision",
    ),
    Verb(
        "llm",
        "model_export.commands.export:add_llm",
        "export the language model and the projector alone",
        "Export",
        front="export-llm",
    ),
    Verb("generate", "model_export.commands.generate:add_generate", "ask an artefact about pictures", "Ask a model"),
    Verb(
        "inspect", "model_export.commands.inspect:add_inspect", "show what is in an artefact or an .mlpackage", "Prove"
    ),
    Verb(
        "verify",
        "model_export.commands.inspect:add_verify",
        "name every file of an artefact that changed by a byte, is missing or is extra",
        "Prove",
    ),
    Verb(
        "audit",
        "model_export.audit.command:add_audit",
        "check an .mlpackage against the rules for the Neural Engine",
        "Prove",
    ),
    Verb(
        "ranges",
        "model_export.audit.ranges_report:add_ranges",
        "show each operation's headroom to float16's largest value",
        "Prove",
    ),
    Verb(
        "mac",
        "model_export.audit.mac:add_mac",
        "compare Core ML with the executor on a Mac, on every compute unit",
        "Prove",
    ),
)


def build_parser() -> argparse.ArgumentParser:
    """The command line of the room."""
    return room("python -m model_export", "A checkpoint into an artefact, and what to do with an artefact.", VERBS)


if __name__ == "__main__":
    main(build_parser)
