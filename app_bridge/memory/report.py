"""What `plan` prints: the parts beside the limits, the table of devices and recipes, a measurement."""

from typing import Any

from rich.markup import escape
from rich.table import Table

from app_bridge.app.facts import table as app_facts
from app_bridge.memory import model as memory_model
from app_bridge.memory import plan
from app_bridge.memory.plan import FITS, NOT, STATES, TIGHT
from benchmarks.estimate.estimate import devices
from benchmarks.peers.shapes import TEXT_TOKENS
from fastvlm.common.cli import wide_console
from quantization.catalogue import PUBLISHED_APP, SIZES, human

_STATE = {"increased": "with the entitlement", "default": "without"}
_KINDS = {"phone": "iPhone", "tablet": "iPad", "mac": "Mac"}
_WORD = {FITS: "yes", TIGHT: "tight", NOT: "no"}


def print_plan(document: dict[str, Any]) -> None:
    """The parts, their sum, the limits with their sources, the verdict, and what would fit."""
    console = wide_console(150)
    memory = f" with {document['memory_gb']:g} GB" if document["memory_gb"] else ""
    table = Table(title=f"{escape(document['model'])} in the app on {document['name']}{memory}", title_justify="left")
    for column, justify in (("part", "left"), ("least", "right"), ("most", "right"), ("how", "left")):
        table.add_column(column, justify=justify, overflow="fold")  # type: ignore[arg-type]
    for part in document["parts"]:
        table.add_row(part["name"], human(part["low"]), human(part["high"]), part["how"])
    need = document["need"]
    table.add_row("together", human(need["low"]), human(need["high"]), "")
    console.print(table)
    for state in STATES[1:] if _alike(document) else STATES:
        limit, of = document["limits"][state], "" if _alike(document) else f" {_STATE[state]}"
        console.print(f"limit{of}: {_range(limit)}: {limit['verdict']}", style=_style(limit["verdict"]))
    for source in {
        source["url"]: source for limit in document["limits"].values() for source in limit["sources"]
    }.values():
        console.print(f"  {source['url']}: {source['says']}", markup=False)
    if len(document["sold_with_gb"]) > 1:
        sizes = ", ".join(f"{size:g}" for size in document["sold_with_gb"])
        console.print(f"{document['name']} is sold with {sizes} GB: --memory says which")
    console.print(said(document), markup=False)


def said(document: dict[str, Any]) -> str:
    """The verdict in a line: for the entitlement that the app has, then for the other state, and what would fit."""
    state = document["state"]
    line = f"{document['model']} {_sentence(document['limits'][state]['verdict'])}"
    if not _alike(document):
        other = next(one for one in STATES if one != state)
        has = "has the entitlement" if state == "increased" else "lacks the entitlement"
        line += f" (the published app {has}); {_STATE[other]} it {_sentence(document['limits'][other]['verdict'])}"
    line += "."
    if document["passed"]:
        return line
    best, in_app = document["largest"], document["largest_in_app"]
    if best is None:
        return f"{line} No named recipe of this model fits for sure: take a smaller model."
    line += f" The largest recipe that fits for sure: {best['recipe']} ({_range(best)})"
    if in_app is None:
        return f"{line}; none that the published app reads."
    return line + (
        "." if in_app == best else f"; of those that the published app reads: {in_app['recipe']} ({_range(in_app)})."
    )


def _alike(document: dict[str, Any]) -> bool:
    """Whether the entitlement changes nothing, as on a Mac."""
    first, second = ({**document["limits"][state], "sources": None} for state in STATES)
    return first == second


def _sentence(verdict: str) -> str:
    return "may fit or not: the ranges overlap" if verdict == TIGHT else verdict


def overview() -> dict[str, Any]:
    """Verdicts for the published models: `rows` (model and recipe) by `columns` (devices with the same limits).

    A recipe is left out that the published app can't read, or that is another's size.
    """
    from fastvlm.synthetic.checkpoint import SHAPES

    columns, rows = _columns(), []
    for key, name in SIZES.items():
        seen = set()
        for recipe, model in plan.candidates(SHAPES[key]):
            if PUBLISHED_APP not in recipe["loads_in"] or model.language in seen:
                continue
            seen.add(model.language)
            low, high = memory_model.total(plan.parts(model, TEXT_TOKENS, app_facts()))
            verdicts = [
                {state: limit.verdict(low, high) for state, limit in column["limits"].items()} for column in columns
            ]
            rows.append({"model": name, "recipe": recipe["name"], "low": low, "high": high, "verdicts": verdicts})
    for column in columns:
        column["limits"] = {state: vars(limit) for state, limit in column["limits"].items()}
    return {"columns": columns, "rows": rows}


def _columns() -> list[dict[str, Any]]:
    """The devices by kind and limits; {"kind", "memory_gb", "devices", "limits"}, `limits` empty where not known."""
    found: dict[Any, dict[str, Any]] = {}
    for device in devices().values():
        for size in device.memory_gb:
            limits = plan.limits_of(device, size)
            key = (device.kind, size, *limits.values())
            column = found.setdefault(
                key, {"kind": device.kind, "memory_gb": size, "devices": [], "limits": limits}
            )  # fmt: skip
            column["devices"].append(device.name)
    order = ("phone", "tablet", "mac")
    return sorted(found.values(), key=lambda column: (order.index(column["kind"]), column["memory_gb"]))


def print_overview(document: dict[str, Any]) -> None:
    """The table in Markdown, columns with the same verdicts together, and which devices they are."""
    merged = _merged(document)
    print("| model and recipe | needs | " + " | ".join(head for head, _, _ in merged) + " |")
    print("|---|---|" + "---|" * len(merged))
    for row, cells in zip(document["rows"], zip(*(cells for _, cells, _ in merged), strict=True), strict=True):
        print(f"| {row['model']} {row['recipe']} | {_range(row)} | " + " | ".join(cells) + " |")
    print()
    for head, _, columns in merged:
        names = ", ".join(dict.fromkeys(name for column in columns for name in column["devices"]))
        print(f"- {head}: {'' if columns[0]['kind'] == 'mac' else names + '; '}{'; '.join(map(_limits, columns))}")


def _limits(column: dict[str, Any]) -> str:
    """A column's limits, of its memory."""
    memory = f"{column['memory_gb']:g} GB"
    if not column["limits"]:
        return f"{memory}: not known"
    raised, plain = (_range(column["limits"][state]) for state in STATES)
    return f"{memory}: {plain}" if raised == plain else f"{memory}: {raised} with the entitlement, {plain} without"


def _merged(document: dict[str, Any]) -> list[tuple[str, tuple[str, ...], list[dict[str, Any]]]]:
    """Columns as (heading, cells, what they hold): those of a kind that have the same cells are one."""
    found: dict[tuple[str, tuple[str, ...]], list[dict[str, Any]]] = {}
    for index, column in enumerate(document["columns"]):
        cells = tuple(_cell(row["verdicts"][index]) for row in document["rows"])
        found.setdefault((column["kind"], cells), []).append(column)
    return [(_heading(kind, columns), cells, columns) for (kind, cells), columns in found.items()]


def _heading(kind: str, columns: list[dict[str, Any]]) -> str:
    if len(columns) == 1 and len(columns[0]["devices"]) == 1:
        return f"{columns[0]['devices'][0]}, {columns[0]['memory_gb']:g} GB"
    sizes = [f"{size:g}" for size in sorted({column["memory_gb"] for column in columns})]
    return f"{_KINDS[kind]}, {f'{sizes[0]} to {sizes[-1]}' if len(sizes) > 2 else ' or '.join(sizes)} GB"


def _cell(verdicts: dict[str, str]) -> str:
    """With the entitlement / without; once where they are the same."""
    return " / ".join(dict.fromkeys(_WORD[verdicts[state]] for state in STATES if state in verdicts)) or "?"


def print_measurement(document: dict[str, Any]) -> None:
    """Predicted beside measured."""
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


def _range(entry: dict[str, Any]) -> str:
    low, high = human(entry["low"]), human(entry["high"])
    return low if low == high else f"{low} to {high}"


def _style(verdict: str) -> str:
    return {FITS: "green", TIGHT: "yellow", NOT: "red"}[verdict]
