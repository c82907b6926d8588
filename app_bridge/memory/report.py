"""The printed form of `plan`: the parts beside the limits, the table of devices and recipes, a measurement."""

from typing import Any

from rich.markup import escape
from rich.table import Table

from app_bridge.memory.limits import FITS, NOT, STATES, TIGHT
from fastvlm.common.cli import wide_console
from quantization.catalogue import human

Document = dict[str, Any]
_STATE = {"increased": "with the entitlement", "default": "without"}
_KINDS = {"phone": "iPhone", "tablet": "iPad", "mac": "Mac"}
_WORD = {FITS: "yes", TIGHT: "tight", NOT: "no"}
_STYLE = {FITS: "green", TIGHT: "yellow", NOT: "red"}


def print_plan(document: Document) -> None:
    """Print the parts, their sum, the limits, the verdict, and what would fit."""
    console = wide_console(150)
    memory = f" with {document['memory_gb']:g} GB" if document["memory_gb"] else ""
    table = Table(title=f"{escape(document['model'])} in the app on {document['name']}{memory}", title_justify="left")
    for column, justify in (("part", "left"), ("least", "right"), ("most", "right"), ("how", "left")):
        table.add_column(column, justify=justify, overflow="fold")  # type: ignore[arg-type]
    for part in document["parts"]:
        table.add_row(part["name"], human(part["low"]), human(part["high"]), part["how"])
    table.add_row("together", human(document["need"]["low"]), human(document["need"]["high"]), "")
    console.print(table)
    alike = _alike(document)
    for state in STATES[1:] if alike else STATES:
        limit, name = document["limits"][state], "" if alike else f" {_STATE[state]}"
        console.print(f"limit{name}: {_range(limit)}: {limit['verdict']}", style=_STYLE[limit["verdict"]])
    sources = [source for limit in document["limits"].values() for source in limit["sources"]]
    if measured := next((source["says"] for source in sources if source["url"] == "--limit"), None):
        console.print(f"  {measured}", markup=False)
    else:
        console.print("  as developers have reported it; --json has the sources", markup=False)
    if len(document["sold_with_gb"]) > 1:
        sizes = ", ".join(f"{size:g}" for size in document["sold_with_gb"])
        console.print(f"{document['name']} is sold with {sizes} GB: --memory says which")
    console.print(verdict(document), markup=False)


def verdict(document: Document) -> str:
    """Return the verdict in a line: for the app's entitlement, for the other state, and what would fit."""
    state, limits = document["state"], document["limits"]
    line = f"{document['model']} {_sentence(limits[state]['verdict'])}"
    if not _alike(document):
        other = next(one for one in STATES if one != state)
        has = "has the entitlement" if state == "increased" else "lacks the entitlement"
        line += f" (the published app {has}); {_STATE[other]} it {_sentence(limits[other]['verdict'])}"
    if document["passed"]:
        return f"{line}."
    best, in_app = document["largest"], document["largest_in_app"]
    if best is None:
        return f"{line}. No named recipe of this model fits for sure: take a smaller model."
    line += f". The largest recipe that fits for sure: {best['recipe']} ({_range(best)})"
    if in_app is None:
        return f"{line}; none that the published app reads."
    if in_app != best:
        line += f"; of those that the published app reads: {in_app['recipe']} ({_range(in_app)})"
    return f"{line}."


def print_overview(document: Document) -> None:
    """Print the table in Markdown, columns with the same verdicts together, and which devices they are."""
    merged: dict[tuple[str, tuple[str, ...]], list[Document]] = {}
    for index, column in enumerate(document["columns"]):
        cells = tuple(_cell(row["verdicts"][index]) for row in document["rows"])
        merged.setdefault((column["kind"], cells), []).append(column)
    heads = [_heading(kind, columns) for (kind, _), columns in merged.items()]
    print(f"| model and recipe | needs | {' | '.join(heads)} |")
    print("|---|---|" + "---|" * len(merged))
    for row, cells in zip(document["rows"], zip(*(cells for _, cells in merged), strict=True), strict=True):
        print(f"| {row['model']} {row['recipe']} | {_range(row)} | {' | '.join(cells)} |")
    print()
    for head, ((kind, _), columns) in zip(heads, merged.items(), strict=True):
        names = ", ".join(dict.fromkeys(name for column in columns for name in column["devices"]))
        print(f"- {head}: {'' if kind == 'mac' else names + '; '}{'; '.join(map(_limits, columns))}")


def print_measurement(document: Document) -> None:
    """Print predicted beside measured."""
    console, predicted, measured = wide_console(150), document["predicted"], document["measured"]
    table = Table(title=f"{document['runner']}, {document['tokens']} tokens", title_justify="left")
    for column in ("", "predicted", "measured"):
        table.add_column(column, justify="right" if column else "left")
    rest = predicted["KV cache"] + predicted["prefill"]
    table.add_row("language model", human(predicted["language model"]), human(measured["language model"]))
    table.add_row("KV cache and prefill", human(rest), human(measured["KV cache and prefill"]))
    peak = document["peak"]
    table.add_row("MLX's peak", human(peak["predicted"]), f"{human(peak['measured'])} ({100 * peak['off']:+.1f} %)")
    console.print(table)
    console.print(f"the process's own peak: {human(document['process_peak'])}")


def _alike(document: Document) -> bool:
    """Whether the entitlement changes nothing, as on a Mac."""
    first, second = ({**document["limits"][state], "sources": None} for state in STATES)
    return first == second


def _sentence(word: str) -> str:
    return "may fit or not: the ranges overlap" if word == TIGHT else word


def _limits(column: Document) -> str:
    """A column's limits, of its memory."""
    memory = f"{column['memory_gb']:g} GB"
    if not column["limits"]:
        return f"{memory}: not known"
    raised, plain = (_range(column["limits"][state]) for state in STATES)
    return f"{memory}: {plain}" if raised == plain else f"{memory}: {raised} with the entitlement, {plain} without"


def _heading(kind: str, columns: list[Document]) -> str:
    if len(columns) == 1 and len(columns[0]["devices"]) == 1:
        return f"{columns[0]['devices'][0]}, {columns[0]['memory_gb']:g} GB"
    sizes = [f"{size:g}" for size in sorted({column["memory_gb"] for column in columns})]
    return f"{_KINDS[kind]}, {f'{sizes[0]} to {sizes[-1]}' if len(sizes) > 2 else ' or '.join(sizes)} GB"


def _cell(verdicts: dict[str, str]) -> str:
    """With the entitlement / without; once where they are the same."""
    return " / ".join(dict.fromkeys(_WORD[verdicts[state]] for state in STATES if state in verdicts)) or "?"


def _range(entry: Document) -> str:
    low, high = human(entry["low"]), human(entry["high"])
    return low if low == high else f"{low} to {high}"
