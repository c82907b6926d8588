"""The printed form of `plan`: the parts beside the limits, and the verdict."""

from typing import Any

from app_bridge.memory.limits import FITS, NOT, STATES, TIGHT
from fastvlm.common.cli import wide_console
from fastvlm.common.terminal import print_table
from fastvlm.common.units import format_bytes

Document = dict[str, Any]
_STATE = {"increased": "with the entitlement", "default": "without"}
_STYLE = {FITS: "green", TIGHT: "yellow", NOT: "red"}


def print_plan(document: Document) -> None:
    """Print the parts, their sum, the limits, the verdict, and what would fit."""
    console = wide_console(150)
    memory = f" with {document['memory_gb']:g} GB" if document["memory_gb"] else ""
    rows = [
        [part["name"], format_bytes(part["low"]), format_bytes(part["high"]), part["how"]] for part in document["parts"]
    ]
    together = ["together", *(format_bytes(document["need"][end]) for end in ("low", "high")), ""]
    title, columns = f"{document['model']} in the app on {document['name']}{memory}", ("part", "least", "most", "how")
    print_table(title, columns, [*rows, together], ("least", "most"), console)
    alike = _alike(document)
    for state in STATES[1:] if alike else STATES:
        limit, name = document["limits"][state], "" if alike else f" {_STATE[state]}"
        console.print(f"limit{name}: {_range(limit)}: {limit['verdict']}", style=_STYLE[limit["verdict"]])
    sources = [source for limit in document["limits"].values() for source in limit["sources"]]
    measured = next((source["says"] for source in sources if source["url"] == "--limit"), None)
    console.print(f"  {measured or 'as developers have reported it; --json has the sources'}", markup=False)
    if len(document["sold_with_gb"]) > 1:
        sizes = ", ".join(f"{size:g}" for size in document["sold_with_gb"])
        console.print(f"{document['name']} is sold with {sizes} GB: --memory says which")
    console.print(verdict(document), markup=False)


def verdict(document: Document) -> str:
    """Return the verdict in a line: for the app's entitlement, for the other state, and what would fit."""
    state, limits = document["state"], document["limits"]
    line = f"{document['model']} {_sentence(limits[state]['verdict'])}"
    if not _alike(document):
        other = next(name for name in STATES if name != state)
        has = "has the entitlement" if state == "increased" else "lacks the entitlement"
        line += f" (the published app {has})" if not document["bundle"] else " without the entitlement"
        line += f"; {_STATE[other]} it {_sentence(limits[other]['verdict'])}"
    if document["passed"] or document["bundle"]:
        return f"{line}."
    best, in_app = document["largest"], document["largest_in_app"]
    app = next(part for part in document["parts"] if part["name"] == "app")
    if best is None and app["high"] > limits[state]["low"]:
        return f"{line}. No model fits for sure: the app alone takes {_range(app)}."
    if best is None:
        return f"{line}. No named recipe of this model fits for sure: take a smaller model."
    line += f". The largest recipe that fits for sure: {best['recipe']} ({_range(best)})"
    if in_app is None:
        return f"{line}; none that the published app reads."
    if in_app != best:
        line += f"; of those that the published app reads: {in_app['recipe']} ({_range(in_app)})"
    return f"{line}."


def _alike(document: Document) -> bool:
    """Whether the entitlement changes nothing, as on a Mac."""
    first, second = ({**document["limits"][state], "sources": None} for state in STATES)
    return first == second


def _sentence(word: str) -> str:
    return "may fit or not: the ranges overlap" if word == TIGHT else word


def _range(entry: Document) -> str:
    low, high = format_bytes(entry["low"]), format_bytes(entry["high"])
    return low if low == high else f"{low} to {high}"
