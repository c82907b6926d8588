"""The part of an export.json that is read by something: what is of another type, and where.

In a form a dictionary has keys (all of them, where it is there), a list one element, anything else is a type. At the
top, and in `BESIDE` below `vision`, each key may be missing. The rest of a manifest is for people.
"""

from collections.abc import Mapping
from typing import Any

_NUMBER = (int, float)
FORM: dict[str, Any] = {
    "parts": [str],
    "config": {},
    "image": {"image_size": int, "image_strategy": str, "tokens_per_image": int},
    "vision": {"image_size": int, "channels": int, "resolutions": [int]},
    "llm": {"files": [str], "recipe": {"name": str}, "bits_per_weight": _NUMBER, "decisions": {}},
}
BESIDE: dict[str, Any] = {  # below `vision`
    "fp16": {"stage_exponents": [int], "headroom": {"before": {"least": _NUMBER}, "after": {"least": _NUMBER}}},
    "compression": {"weight_bytes": int, "float16_weight_bytes": int, "forms": {}, "wide": [str]},
    "mixed": {"operations": int, "mac_share": _NUMBER},
}


def faults(document: Mapping[str, Any]) -> list[str]:
    """One line for each value that isn't as the forms say."""
    found = [fault for key, form in FORM.items() if key in document for fault in _faults(document[key], form, key)]
    vision = document.get("vision")
    beside = vision if isinstance(vision, dict) else {}
    for key, form in BESIDE.items():
        if beside.get(key) is not None:
            found += _faults(beside[key], form, f"vision.{key}")
    return found


def _faults(value: Any, form: Any, where: str) -> list[str]:
    if isinstance(form, dict):
        if not isinstance(value, dict):
            return [f"{where} is no object"]
        found = (
            [f"no {where}.{key}"] if key not in value else _faults(value[key], inner, f"{where}.{key}")
            for key, inner in form.items()
        )
        return [fault for faults in found for fault in faults]
    if isinstance(form, list):
        if not isinstance(value, list):
            return [f"{where} is no list"]
        return [fault for place, one in enumerate(value) for fault in _faults(one, form[0], f"{where}[{place}]")]
    wrong = not isinstance(value, form) or isinstance(value, bool)
    return [f"{where} is {str(value)[:40]!r}, expected {'text' if form is str else 'a number'}"] if wrong else []
