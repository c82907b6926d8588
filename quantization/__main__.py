"""`python -m quantization`: recipes, evaluate, sweep."""

from fastvlm.common import start

if __name__ == "__main__":
    start.begin()


from benchmarks.quality.evaluate import add_evaluate
from benchmarks.quality.sweep import add_sweep
from fastvlm.common.cli import Parser, add_common, main
from quantization.catalogue import add_recipes


def build_parser() -> Parser:
    """The verbs."""
    parser = Parser(prog="python -m quantization", description="Recipes: list them, judge them, choose among them.")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB", parser_class=Parser)
    for add in (add_recipes, add_evaluate, add_sweep):
        add(verbs)
    for verb in verbs.choices.values():
        add_common(verb)
    return parser


if __name__ == "__main__":
    main(build_parser)
