"""`python -m quantization`: recipes, and which of them to ship."""

from fastvlm.common import start

if __name__ == "__main__":
    start.begin()

import argparse

from fastvlm.common.cli import main
from fastvlm.common.verbs import Verb, room

VERBS = (
    Verb(
        "recipes", "quantization.catalogue:add_recipes", "list the recipes, their sizes and what loads them", "Quantize"
    ),
    Verb(
        "sweep",
        "benchmarks.quality.sweep:add_sweep",
        "export and measure many recipes, and say which to ship",
        "Quantize",
    ),
    Verb(
        "evaluate",
        "benchmarks.quality.evaluate:add_evaluate",
        "measure what a candidate keeps of its reference: logits, perplexity, answers",
        "Quantize",
    ),
)


def build_parser() -> argparse.ArgumentParser:
    """The command line of the room."""
    return room("python -m quantization", "Recipes: list them, judge them, choose among them.", VERBS)


if __name__ == "__main__":
    main(build_parser)
