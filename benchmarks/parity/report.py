"""The parity page: one self-contained HTML file, everything inline, nothing fetched."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup
from PIL import Image

from benchmarks import environment
from benchmarks.parity.plot import error_plot
from fastvlm.common.page import data_url, templates
from fastvlm.common.staging import write_file

_TEMPLATES = Path(__file__).parent / "templates"
SOURCES = {"demo": "questions of the demo set", "drawn": "drawn pictures", "yours": "pictures of yours"}


def write(path: Path, result: dict[str, Any], thumbnails: Sequence[Image.Image], command: str | None = None) -> None:
    """Write the page of `parity.document`'s `result` to `path`, atomically; one thumbnail for each of its rows."""
    write_file(path, render(result, thumbnails, command).encode())


def render(result: dict[str, Any], thumbnails: Sequence[Image.Image], command: str | None = None) -> str:
    """The page as text. Names, prompts and answers are data: all of them are escaped."""
    pages = templates(_TEMPLATES)
    pages.filters |= {"figure": figure, "bound": bound}
    cards = [{**row, "image": data_url(image)} for row, image in zip(result["rows"], thumbnails, strict=True)]
    cards.sort(key=lambda card: card["divergence"] is None)  # stable: those that part come first
    plot = error_plot(result["operations"], result["metrics"], result["first_operation"])
    machine = environment.machine_line(result["environment"])
    pictures = " and ".join(f"{count} {SOURCES[source]}" for source, count in result["pictures"].items())
    template = pages.get_template("parity.html.j2")
    return template.render(
        result=result, cards=cards, plot=Markup(plot), machine=machine, pictures=pictures, command=command
    )


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
