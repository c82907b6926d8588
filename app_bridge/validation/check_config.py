"""config.json and preprocessor_config.json, as Swift's JSONDecoder and the app's own code take them."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from app_bridge.app.facts import Key
from app_bridge.subject import AGAIN, Encoder, Subject, kind_of, listed
from model_export import contract

_INT = 2**63  # Swift's Int is 64 bits wide
_FLOAT = 3.4028234663852886e38  # the largest Float
# What the app computes whatever config.json says (FastVLM.swift: silu in its MLP, GELU between two linear layers, RoPE
# in halves, attention over everything, nothing around a picture in the prompt); the export refuses other checkpoints.
_COMPUTED = {
    "hidden_act": "silu",
    "mm_projector_type": "mlp2x_gelu",
    "rope_traditional": False,
    "use_sliding_window": False,
    "mm_use_im_start_end": False,
}
# RoPE as it is, under both of its names in Qwen2's files (transformers renames "mrope" to "default"). What else an
# object `rope_scaling` says, the app leaves out, unless it decodes the key.
_UNSCALED = ("default", "mrope")
# Numbers that differ between models: where they are absent, the app takes its default without a word.
_ASSUMED = ("rms_norm_eps", "rope_theta")


def check_config(subject: Subject) -> dict[str, Any] | None:
    """config.json with every finding about it alone; None if it can't be read.

    Both numbers of heads, changed by one factor, leave every weight its shape: for them, as for rms_norm_eps and
    rope_theta, there is nothing but the manifest's sha256 of the file.
    """
    config = subject.read_json(contract.CONFIG)
    if config is None:
        return None
    facts = subject.facts
    faulty = _check_keys(subject, contract.CONFIG, config, facts.config)
    _check_name(subject, contract.CONFIG, config, "model_type", facts.model_type)
    for key in facts.config:
        value = integer(config.get(key.path))
        if key.type == "Int" and key.path != "image_token_index" and value is not None and value < 1:
            subject.error("config-value", f"{contract.CONFIG}: {key.path}", str(value), "a positive number")
        if key.path in _ASSUMED and config.get(key.path) is None and not key.required:
            subject.warning(
                "config-default",
                f"{contract.CONFIG}: {key.path}",
                f"nothing, so the app takes {key.default}",
                "the model's own value",
                "write the value that the model was trained with",
            )
    for name, computed in _COMPUTED.items():
        if config.get(name, computed) not in (computed, None):
            subject.error(
                "config-value",
                f"{contract.CONFIG}: {name}",
                kind_of(config[name]),
                f"{kind_of(computed)}, which the app computes",
                "the app can't run another model than Qwen2 with FastVLM's projector and prompt",
            )
    if not any(path.partition(".")[0] == "rope_scaling" for path in faulty):
        _check_rope(subject, config.get("rope_scaling"))
    subject.checked.append(
        f"{contract.CONFIG}: {len(facts.config)} keys, model_type, what the app computes; the numbers of heads, "
        "rms_norm_eps and rope_theta only by a manifest's sha256 of the file: no weight's shape tells them"
    )
    return config


def _check_rope(subject: Subject, scaling: Any) -> None:
    """Nothing in rope_scaling that a model computes with and the app doesn't."""
    read = {key.path for key in subject.facts.config}
    ignored = [
        f"{name} {kind_of(value)}"
        for name, value in (scaling.items() if isinstance(scaling, dict) else ())
        if name != "mrope_section"
        and f"rope_scaling.{name}" not in read
        and not (name in ("type", "rope_type") and value in _UNSCALED)
    ]
    if ignored:
        subject.error(
            "config-value",
            f"{contract.CONFIG}: rope_scaling",
            listed(ignored),
            "no scaling: the app computes RoPE without it, and would answer wrongly",
            "use a model that was trained without it; the app can't run this one",
        )


def check_preprocessor(subject: Subject, encoder: Encoder | None, config: Mapping[str, Any] | None) -> None:
    """preprocessor_config.json, against the encoder's input and the prompt, too. `config` is config.json, which says in
    LLaVA's way how pictures become square."""
    document = subject.read_json(contract.PREPROCESSOR_CONFIG)
    if document is None:
        return
    name = contract.PREPROCESSOR_CONFIG
    faulty = _check_keys(subject, name, document, subject.facts.preprocessor)
    _check_name(subject, name, document, "processor_class", subject.facts.processor_class)
    for key in subject.facts.preprocessor:
        value = _value(document, key.path)
        if key.type == "[CGFloat]" and key.path not in faulty and isinstance(value, list) and len(value) < 3:
            subject.error(
                "list-length",
                f"{name}: {key.path}",
                f"{len(value)} numbers",
                "3, one for each colour: the app reads the third",
                AGAIN,
            )
            faulty.add(key.path)
    _check_normalisation(subject, document, faulty)
    trained = "pad" if (config or {}).get("image_aspect_ratio") == "pad" else contract.APP_IMAGE_STRATEGY
    strategy = document.get("image_strategy", trained)
    if strategy != contract.APP_IMAGE_STRATEGY:
        subject.warning(
            "image-strategy",
            f"{name}: image_strategy",
            kind_of(strategy),
            f"{contract.APP_IMAGE_STRATEGY}: the demo app crops whatever the file says",
            "expect other answers at the edges of wide pictures, or let the app pad",
        )
    if encoder is None or encoder.side is None:
        subject.checked.append(f"{name}: keys; not compared with the encoder's input, which is unknown")
        return
    _check_size(subject, document, encoder.side, faulty)
    subject.checked.append(f"{name}: {len(subject.facts.preprocessor)} keys, processor_class, sizes of pictures")


def _check_size(subject: Subject, document: Mapping[str, Any], side: int, faulty: set[str]) -> None:
    name = contract.PREPROCESSOR_CONFIG
    height, width, edge = (
        None if path in faulty else integer(_value(document, path))
        for path in ("crop_size.height", "crop_size.width", "size.shortest_edge")
    )
    if height is not None and width is not None and (height, width) != (side, side):
        subject.error(
            "crop-size",
            f"{name}: crop_size",
            f"{height} x {width}",
            f"{side} x {side}, as the encoder in the package takes it",
        )
    if edge is not None and edge < side:
        subject.error(
            "shortest-edge",
            f"{name}: size.shortest_edge",
            str(edge),
            f"{side}: a smaller picture can't be cropped to the encoder's input",
        )
    elif edge is not None and edge > side:
        subject.warning(
            "shortest-edge",
            f"{name}: size.shortest_edge",
            str(edge),
            f"{side}: of a larger picture only the middle is seen",
        )


def _check_normalisation(subject: Subject, document: Mapping[str, Any], faulty: set[str]) -> None:
    """Mean and deviation are what the export took from the checkpoint, whatever that was, unless the file changed."""
    for path, published in (("image_mean", 0.0), ("image_std", 1.0)):
        value = document.get(path)
        if path in faulty or not isinstance(value, list) or not all(_fits("CGFloat", item) for item in value):
            continue
        where = f"{contract.PREPROCESSOR_CONFIG}: {path}"
        if path == "image_std" and any(item == 0 for item in value[:3]):
            subject.error("normalisation", where, str(value), "nothing that divides by zero")
        elif contract.PREPROCESSOR_CONFIG in subject.changed and any(item != published for item in value[:3]):
            expected = (
                f"what the export wrote ({published} in every published FastVLM): the encoder was trained with it"
            )
            subject.error("normalisation", where, str(value), expected)


def _check_name(subject: Subject, file: str, document: Mapping[str, Any], key: str, expected: str) -> None:
    """A name that the app's registries are asked for; the decoder of the library throws without it."""
    value = document.get(key)
    if isinstance(value, str):
        if value != expected:
            registered = f"{expected!r}, the one that the app registers"
            subject.error(key.replace("_", "-"), f"{file}: {key}", repr(value), registered)
    elif not any(found.where == f"{file}: {key}" for found in subject.findings):
        _report(subject, file, key, "String", document)


def _check_keys(subject: Subject, file: str, document: Mapping[str, Any], keys: Sequence[Key]) -> set[str]:
    """Hold every key to its type; returns the paths that are missing or wrong."""
    optional = {key.path: key for key in keys if not key.required}
    faulty, reported = set(), set()
    for key in keys:
        owner, absent = _absent(document, key.path)
        if absent is not None:  # the path ends early, at `absent`
            if absent in optional and owner is None:
                taken = optional[absent]
                if (
                    ":" in taken.type
                    and absent != key.path
                    and key.path[len(absent) + 1 :] not in (taken.default or {})
                ):
                    faulty.add(key.path)
                    default = f"nothing, so the app takes {kind_of(taken.default) if taken.default else 'nothing'}"
                    subject.error("key-missing", f"{file}: {key.path}", default, f"Swift's {key.type}: the app ends")
                continue
            faulty.add(key.path)
            if absent not in reported:
                reported.add(absent)
                _report(subject, file, absent, key.type if absent == key.path else "object", document)
            continue
        kind = key.type.removesuffix("?")
        try:
            fits = _fits(kind, _value(document, key.path))
        except KeyError:
            subject.warning(
                "type-unknown",
                f"{file}: {key.path}",
                f"Swift type {key.type}",
                "one that this check knows",
                "compare it by hand",
            )
            continue
        if not fits:
            faulty.add(key.path)
            reported.add(key.path)
            _report(subject, file, key.path, kind, document)
    return faulty


def _report(subject: Subject, file: str, path: str, kind: str, document: Mapping[str, Any]) -> None:
    owner, _, leaf = path.rpartition(".")
    parent = _value(document, owner) if owner else document
    wanted = {"object": "an object", "Int": "an integer (Swift's Int)"}.get(kind, f"Swift's {kind}")
    if leaf not in parent:
        subject.error("key-missing", f"{file}: {path}", "nothing", f"{wanted}: the app's decoder throws without it")
    else:
        subject.error("key-type", f"{file}: {path}", kind_of(parent[leaf]), wanted)


def _absent(document: Mapping[str, Any], path: str) -> tuple[Any, str | None]:
    """(value there, path) of the first part that is missing, null, or no object although more follows; (…, None)."""
    value: Any = document
    parts = path.split(".")
    for number, part in enumerate(parts, 1):
        value = value.get(part)
        if value is None or (number < len(parts) and not isinstance(value, dict)):
            return value, ".".join(parts[:number])
    return value, None


def _value(document: Mapping[str, Any], path: str) -> Any:
    """What is at a dotted path whose parents exist; None where nothing is."""
    value: Any = document
    for part in path.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def integer(value: Any) -> int | None:
    """A JSON number as Swift's Int decodes it: 896 and 896.0, not true, "896" or 896.5."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return value if type(value) is int and -_INT <= value < _INT else None


def _fits(kind: str, value: Any) -> bool:
    """Whether JSONDecoder takes the value for a Swift type. KeyError for a type that isn't known here."""
    if kind.startswith("[") and ":" not in kind:
        return isinstance(value, list) and all(_fits(kind[1:-1], item) for item in value)
    if kind == "[String: StringOrNumber]":
        return isinstance(value, dict) and all(_fits("StringOrNumber", item) for item in value.values())
    number = type(value) in (int, float) and (type(value) is int or math.isfinite(value))
    return {
        "Int": integer(value) is not None,
        "Bool": isinstance(value, bool),
        "String": isinstance(value, str),
        "Double": number,
        "CGFloat": number,
        "Float": number and abs(value) <= _FLOAT,
        # MLXLMCommon/StringOrNumber.swift of mlx-swift-examples 2.21.2: a number, a list of numbers, or text
        "StringOrNumber": number
        or isinstance(value, str)
        or (isinstance(value, list) and all(_fits("Float", item) for item in value)),
    }[kind]
