"""A comparison of FastVLM with a peer (`claims.compare`) as a table on the terminal."""

from collections.abc import Mapping
from typing import Any

from rich.table import Table

from fastvlm.common.terminal import Console


def print_peers(comparison: Mapping[str, Any]) -> None:
    """Print a comparison as a table on stdout, with its explanation."""
    console = Console(highlight=False)
    table = Table(title=comparison["title"], title_justify="left")
    for column in ("figure", "FastVLM", "peer", "ratio", "the paper's"):
        table.add_column(column, justify="left" if column == "figure" else "right", overflow="fold")
    for row in comparison["rows"]:
        ratios = (f"{row[key]:.3g} ×" if row[key] else "–" for key in ("ratio", "claimed"))
        table.add_row(row["label"], *(_figure(row[side]) for side in ("fastvlm", "peer")), *ratios)
    console.print(table)
    for line in filter(None, (comparison.get("error"), *comparison["explanation"])):
        console.print(f"- {line}", markup=False)


def _figure(value: float | None) -> str:
    return "–" if value is None else f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"
