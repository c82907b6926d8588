"""`python -m benchmarks peers`: the paper's comparisons with other models, as far as they need no clock."""

import argparse
from typing import Any

from benchmarks.peers.claims import compare
from benchmarks.peers.report import print_peers
from benchmarks.peers.shapes import TEXT_TOKENS, names
from fastvlm.common.arguments import whole_number
from fastvlm.common.cli import progress


def add_parser(subparsers: Any) -> None:
    """Add `peers`."""
    parser = subparsers.add_parser(
        "peers",
        description="Parameters, visual tokens and multiply-accumulates of FastVLM and of the models that its paper"
        " compares it with, counted without weights. `ttft --against` also times them.",
    )
    parser.add_argument("name", nargs="*", type=peer, metavar="PEER", help=f"{' or '.join(names())} (default: both)")
    parser.add_argument(
        "--prompt-length",
        type=whole_number(),
        default=TEXT_TOKENS,
        metavar="N",
        help="tokens of the prompt without its picture (default: %(default)s)",
    )
    parser.set_defaults(run=run)


def peer(text: str) -> str:
    """The argparse type of a peer's name."""
    if text not in names():
        raise argparse.ArgumentTypeError(f"got {text}, expected one of {', '.join(names())}")
    return text


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Count, and print a table for each peer."""
    comparisons, chosen = [], dict.fromkeys(args.name or names())
    with progress("count parameters and MACs (peers)", len(chosen)) as advance:
        for name in chosen:
            comparisons.append(compare(name, args.prompt_length))
            advance()
    if not args.json:
        for comparison in comparisons:
            print_peers(comparison)
    return {"comparisons": comparisons}
