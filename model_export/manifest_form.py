"""The part of an export.json that is read by something: what is of another type, and where.

In a form a dictionary has keys, a list one element, anything else is a type. A manifest that is asked only for its
files may lack any key; a `complete` one lacks none of a part that it has. The rest of a manifest is for people.
"""

from collections.abc import Mapping
from typing import Any

_NUMBER = (int, float)
FORM: dict[str, Any] = {
    "parts": [str],
    "config": {},
    "sources": {},
    "image": {"image_size": int, "image_strategy": str, "tokens_per_image": int},
    "vision": {"image_size": int, "channels": int, "resolutions": [int]},
    "llm": {"files": [str], "recipe": {"name": str}, "bits_per_weight": _NUMBER, "decisions": {}},
}
BESIDE: dict[str, Any] = {  # below `vision`
    "fp16": {
        "layer_exponents": {},
        "activation_exponents": {},
        "headroom": {"before": {"least": _NUMBER}, "after": {"least": _NUMBER}},
    },
    "compression": {"weight_bytes": int, "float16_weight_bytes": int, "forms": {}, "wide": (list, dict)},
    "scaling": {"operations": int, "byte_share": _NUMBER},
}


def faults(document: Mapping[str, Any], complete: bool = False) -> list[str]:
    """One line for each value that isn't as the forms say."""
    held = [key for key in FORM if key in document]
    wrong_values = [fault for key in held for fault in _faults(document[key], FORM[key], key, complete)]
    vision = document.get("vision")
    beside = vision if isinstance(vision, dict) else {}
    for key, form in BESIDE.items():
        if beside.get(key) is not None:
            wrong_values += _faults(beside[key], form, f"vision.{key}", complete)
    return wrong_values


def _faults(value: Any, form: Any, where: str, complete: bool) -> list[str]:
    if isinstance(form, dict):
        if not isinstance(value, dict):
            return [f"{where} is no object"]
        absent = [f"no {where}.{key}" for key in form if key not in value] if complete else []
        held = [key for key in form if key in value]
        return absent + [f for key in held for f in _faults(value[key], form[key], f"{where}.{key}", complete)]
    if isinstance(form, list):
        if not isinstance(value, list):
            return [f"{where} is no list"]
        return [
            fault for place, item in enumerate(value) for fault in _faults(item, form[0], f"{where}[{place}]", complete)
        ]
    wrong = not isinstance(value, form) or isinstance(value, bool)
    expected = "text" if form is str else "a number" if form in (int, _NUMBER) else "a list or an object"
    return [f"{where} is {str(value)[:40]!r}, expected {expected}"] if wrong else []
