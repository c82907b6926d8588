"""Reading a saved run of `fastvlm ttft`, with a check of every value that is shown or compared."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fastvlm.common.documents import Unreadable, load
from fastvlm.common.errors import UserError

FORMAT = 2
_NAMED = 5  # faults at most in the message
_ANY = object()
# What a value must be: an object with these keys (`str`: whatever keys), a list of such that isn't empty, a tuple for
# one that may be, a number, or anything.
_STAGES = {str: float}
_FAILED: dict[Any, Any] = {"name": _ANY, "kind": _ANY, "error": _ANY}
_RUNNER: dict[Any, Any] = {
    "name": _ANY, "kind": _ANY, "settings": {}, "peak_bytes": float,
    "cold": {"dropped": _ANY, "load_s": float, "round": {"stages": _STAGES}},
    "launches": [{"load_s": _ANY, "rounds": [{"stages": _STAGES, "waited": _STAGES, "yardstick_s": _ANY}]}],
}  # fmt: skip
_RUN = {
    "date": _ANY, "command": _ANY, "commit": _ANY, "delay": _ANY, "picture": _ANY, "tokens": float, "threads": _ANY,
    "checkpoint": {"name": _ANY, "sha256": _ANY}, "effort": {"launches": float, "rounds": float},
    "environment": {"cpu": _ANY, "cores": _ANY, "memory_gib": _ANY, "system": _ANY, "packages": {}},
    "load_before": {"1min": float}, "load_after": {"1min": float},
    "search": ({"device": _ANY, "rows": ({"setting": _ANY, "value": _ANY, "kept": _ANY},)},),
    "points": [{"resolution": _ANY, "text_tokens": _ANY, "prompt": _ANY, "question": _ANY, "turns": _ANY,
                "runners": [_RUNNER]}],
}  # fmt: skip


def load_document(path: Path) -> dict[str, Any]:
    """A saved run. UserError if it is none of this format, or lacks something, in a line that names it."""
    try:
        document: dict[str, Any] = load(path)
    except Unreadable as error:
        raise UserError(f"{path}: {error}: expected what `ttft --save` wrote") from None
    if not isinstance(document, dict) or (document.get("benchmark"), document.get("format")) != ("ttft", FORMAT):
        raise UserError(f"{path}: not a run of `fastvlm ttft` in format {FORMAT}: measure again with --save")
    if faults := [*_faults(document, _RUN, "")]:
        more = f" and {len(faults) - _NAMED} more" if len(faults) > _NAMED else ""
        raise UserError(f"{path}: damaged: {', '.join(faults[:_NAMED])}{more}: measure again with --save")
    return document


def _faults(value: Any, form: Any, where: str) -> Iterator[str]:
    """The places in `value` that differ from its form."""
    if isinstance(form, dict):
        if not isinstance(value, dict):
            yield f"{where} is no object"
            return
        form = _FAILED if form is _RUNNER and "error" in value else form
        for key in value if str in form else form:
            place = f"{where}.{key}".lstrip(".")
            yield from _faults(value[key], form.get(str, form.get(key)), place) if key in value else [f"no {place}"]
    elif isinstance(form, list | tuple):
        if not isinstance(value, list):
            yield f"{where} is no list"
        elif not value and isinstance(form, list):
            yield f"{where} is empty"
        else:
            for i, item in enumerate(value):
                yield from _faults(item, form[0], f"{where}[{i}]")
    elif form is float and (isinstance(value, bool) or not isinstance(value, int | float)):
        yield f"{where} is no number"
