"""`document`: docs/BENCHMARKS.md from what the benchmarks with bars measured.

The page has a section for each suite between two comments, `<!-- SUITE -->` and `<!-- /SUITE -->`; a section is
replaced by the table of a saved run, and what stands around them stays.
"""

import argparse
import re
from pathlib import Path
from typing import Any

from benchmarks import environment
from benchmarks.suites.suite import cells
from fastvlm.common import documents
from fastvlm.common.errors import UserError
from fastvlm.common.files import Output, read_text
from fastvlm.common.staging import write_file

PAGE = Path("docs/BENCHMARKS.md")


def add_document(verbs: Any) -> None:
    """Add `document`."""
    parser = verbs.add_parser(
        "document",
        description="Replace the sections of docs/BENCHMARKS.md by the tables of saved runs: the last line of stdout of"
        " `fastvlm bench-export --json`, and of its siblings.",
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN.json", help="saved documents")
    parser.add_argument(
        "--output", type=Output(file=True), default=PAGE, metavar="PAGE.md", help="the page (default: %(default)s)"
    )
    parser.set_defaults(run=run_document)


def run_document(args: argparse.Namespace) -> dict[str, Any]:
    """Write the page; UserError for a file that is no run of a suite, or a page without its section."""
    if not args.output.is_file():
        raise UserError(f"--output {args.output}: no such page: run it in the project's folder, or name the page")
    page, suites = read_text(args.output), []
    for path in args.runs:
        try:
            document = documents.load(path)
            suites.append(document["suite"])
            page = with_section(page, document["suite"], section(document))
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}: is no saved run of a benchmark with bars: {error}") from None
    write_file(args.output, page.encode())
    print(f"{args.output}: {', '.join(suites)}")
    return {"page": str(args.output), "suites": suites}


def with_section(page: str, suite: str, text: str) -> str:
    """The page with `text` between the two comments of the suite. ValueError where it has no such section."""
    pattern = re.compile(rf"(<!-- {re.escape(suite)} -->\n).*(<!-- /{re.escape(suite)} -->)", re.DOTALL)
    if not pattern.search(page):
        raise ValueError(f"the page has no section <!-- {suite} -->")
    return pattern.sub(lambda match: f"{match[1]}{text}{match[2]}", page)


def section(document: dict[str, Any]) -> str:
    """The table of a run in Markdown, with the machine, the load and the packages under it."""
    rows = ["| figure | bar | measured |", "|---|---|---|", *map(_row, document["figures"].values())]
    machine = environment.machine_line(document["environment"])
    packages = ", ".join(f"{name} {version}" for name, version in document["environment"]["packages"].items())
    load = f"load before {document['load_before']['1min']:.1f}"
    return "\n".join([*rows, "", f"{machine}, {load}; {packages}", ""])


def _row(figure: dict[str, Any]) -> str:
    value, bar = cells(figure)
    missed = ": missed" if figure["passed"] is False else ""
    return f"| {figure['figure'].strip().replace('|', '∣')} | {bar or 'reported'} | {value}{missed} |"
