"""What self-contained pages are made of: pictures and plots inline, in the page's own colours."""

import base64
import io
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

if TYPE_CHECKING:
    from jinja2 import Environment


def templates(folder: Path) -> "Environment":
    """The pages' templates in a folder: everything is escaped, and an unknown name is an error."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    return Environment(
        loader=FileSystemLoader(folder), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip


def data_url(image: Image.Image) -> str:
    """A picture as a data URL."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=88)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def inline_svg(svg: str, variables: Mapping[str, str]) -> str:
    """Matplotlib's SVG for an HTML page: no prologue, metadata or addresses, as wide as its place, the page's font.

    `variables`: stand-in colour ("#010203") -> CSS variable in its place, so that one plot serves light and dark.
    """
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg, count=2)
    svg = svg.replace("xlink:href", "href")  # HTML knows SVG, and nothing in the page names an address
    svg = re.sub(r"font: ([^;\"]*)'[^\"]*\"", r'font: \1inherit"', svg)
    for colour, name in variables.items():
        svg = svg.replace(colour, f"var(--{name})")
    return svg
