"""Self-contained HTML pages: one base template and its macros, everything escaped, pictures and plots inline."""

import base64
import io
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

if TYPE_CHECKING:
    from jinja2 import Environment

_COMMON = Path(__file__).with_name("templates")


def templates(folder: Path) -> "Environment":
    """The templates of a folder, which may extend `base.html.j2` and import from `macros.html.j2`.

    Values are escaped, and an unknown name is an error.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    return Environment(
        loader=FileSystemLoader([folder, _COMMON]), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip


def render(template: Path, filters: Mapping[str, Callable[..., Any]] | None = None, **values: Any) -> str:
    """The page that a template makes of `values`; `notes`, the (word, sentence) pairs of its foot, may be left out."""
    pages = templates(template.parent)
    pages.filters |= filters or {}
    return pages.get_template(template.name).render({"notes": ()} | values)


def data_url(image: Image.Image) -> str:
    """A picture as a data URL."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=88)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
