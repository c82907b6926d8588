"""The expectations of Apple's Swift engine of a bundle: our table of it (engine.json), or read from a checkout of
apple/coreai-models (runner.py)."""

import json
from dataclasses import dataclass
from pathlib import Path

from app_bridge.app.facts import Changed, Key

TABLE = Path(__file__).parent / "engine.json"


@dataclass(frozen=True)
class EngineFacts:
    """What decides whether the engine loads a bundle, beside the interfaces of `model_export.coreai.contract`.

    metadata: the keys of metadata.json that it decodes, but for `kind`. metadata_version, kind: the only ones that it
    takes. strategies: `image_strategy`'s values. stop_token: ends an answer, beside the tokenizer's eos.
    fallback_token: is counted where the template gives no image token. answer: tokens at most, by default.
    inputs, states: of the decoder, exactly. grows_from: positions that a growing cache begins with.
    changed: declarations that differ from the published engine's.
    """

    metadata: tuple[Key, ...]
    metadata_version: str
    kind: str
    strategies: tuple[str, ...]
    stop_token: str
    fallback_token: str
    answer: int
    inputs: int
    states: int
    grows_from: int
    changed: tuple[Changed, ...] = ()


def engine() -> EngineFacts:
    """Our table: the engine as published (apple/coreai-models 86b363d)."""
    facts = json.loads(TABLE.read_text(encoding="utf-8"))["facts"]
    lists = {"metadata": tuple(Key(**key) for key in facts["metadata"]), "strategies": tuple(facts["strategies"])}
    return EngineFacts(**{**facts, **lists})
