"""The parity page: one self-contained HTML file, everything inline, nothing fetched."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup
from PIL import Image

from benchmarks import environment
from benchmarks.parity.plot import error_plot
from fastvlm.common import page
from fastvlm.common.staging import write_file
from fastvlm.common.terminal import Console, mark, print_table

TEMPLATE = Path(__file__).parent / "templates" / "parity.html.j2"
SOURCES = {"demo": "questions of the demo set", "drawn": "drawn pictures", "yours": "pictures of yours"}


def write(path: Path, result: dict[str, Any], thumbnails: Sequence[Image.Image], command: str | None = None) -> None:
    """Write the page of `parity.document`'s `result` to `path`, atomically; one thumbnail for each of its rows."""
    write_file(path, render(result, thumbnails, command).encode())


def render(result: dict[str, Any], thumbnails: Sequence[Image.Image], command: str | None = None) -> str:
    """The page as text. Names, prompts and answers are data: all of them are escaped."""
    cards = [{**row, "image": page.data_url(image)} for row, image in zip(result["rows"], thumbnails, strict=True)]
    cards.sort(key=lambda card: card["divergence"] is None)  # stable: those that part come first
    return page.render(
        TEMPLATE,
        {"figure": figure, "bound": bound},
        result=result,
        cards=cards,
        plot=_plot(result),
        pictures=" and ".join(f"{count} {SOURCES[source]}" for source, count in result["pictures"].items()),
        command=command,
        notes=environment.notes(result["environment"]),
    )


def _plot(result: dict[str, Any]) -> Markup | None:
    """The errors along the encoder; None where no operation was compared."""
    if "absent" in result["operations"]:
        return None
    return Markup(error_plot(result["operations"], result["metrics"], result["first_operation"]))


def figure(value: float | str | None, unit: str = "") -> str:
    """A figure for people: four digits, shares in percent, what is equal in words."""
    if value is None:
        return "not compared"
    number = float(value)
    if number == float("inf") and unit == "dB":
        return "exact"
    if unit.startswith("of ") and unit != "of the largest feature":
        return f"{100 * number:.4g} %"
    if 0.999 < number < 1 and not unit:
        return f"1 − {1 - number:.1e}"
    return f"{number:.4g} {unit}".strip() if unit != "of the largest feature" else f"{100 * number:.2g} %"


def bound(metric: dict[str, Any]) -> str:
    """A metric's tolerance for people."""
    if metric["tolerance"] is None:
        return "reported"
    return f"{'≥' if metric['sense'] == '>=' else '≤'} {figure(metric['tolerance'], metric['unit'])}"


def print_result(result: dict[str, Any]) -> None:
    """The figures as a table on stdout, what ran each side, and the verdicts."""
    rows = [
        (mark(metric["passed"]), metric["label"], figure(metric["value"], metric["unit"]), bound(metric))
        for metric in result["metrics"].values()
    ]
    print_table("parity", ("", "figure", "measured", "tolerance"), rows)
    if absent := result["operations"].get("absent"):
        print(absent)
    for side in ("reference", "candidate"):
        runners = ", ".join(f"{part}: {name}" for part, name in result[side]["runners"].items())
        print(f"{side} {result[side]['name']}: {runners}")
    if exact := result["exact"]:
        print(f"exact answers: reference {exact['reference']}, candidate {exact['candidate']} of {exact['questions']}")
    print(environment.machine_line(result["environment"]))
    print_verdicts(result)


def print_verdicts(result: dict[str, Any]) -> None:
    """Whether the export is faithful, and what its recipe changed."""
    console = Console(highlight=False)
    console.print(result["verdict"], style="green" if result["passed"] else "red", markup=False, soft_wrap=True)
    if recipe := result["recipe"]:
        colour = "green" if recipe["unchanged"] else "yellow"
        console.print(recipe["sentence"], style=colour, markup=False, soft_wrap=True)
