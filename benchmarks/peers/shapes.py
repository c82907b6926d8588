"""The shapes of the paper's models, and its claims about them: `peers.json`."""

import json
from functools import cache
from pathlib import Path
from typing import Any

TEXT_TOKENS = 18  # of Qwen2's template and "Describe the image."; with 256 of the picture 274


@cache
def data() -> dict[str, Any]:
    """peers.json: claims, explanations, and the models' shapes, each with its source."""
    return json.loads(Path(__file__).with_name("peers.json").read_text(encoding="utf-8"))


def names() -> list[str]:
    """The models that the paper compares FastVLM with."""
    return list(data()["claims"])


def against(name: str) -> str:
    """The FastVLM that the paper compares with this peer."""
    return data()["models"][name]["against"]
