"""config.json and preprocessor_config.json, as Swift's JSONDecoder and the app's own code take them."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

from app_bridge.app.facts import Key
from app_bridge.rules import finding
from app_bridge.validation.subject import Encoder, Subject, kind_of, listed
from fastvlm.common.findings import Finding, Steps
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
# Types of Apple's engine that decode as another (FunctionMap.swift, ImagePreprocessor.swift of coreai-models).
_ALIASES = {"FunctionMap": "[String: [String]]", "ImageStrategy": "String"}
# Numbers that differ between models: where they are absent, the app takes its default without a word.
_ASSUMED = ("rms_norm_eps", "rope_theta")


def check_config(subject: Subject) -> Steps[dict[str, Any] | None]:
    """Check config.json alone; return it, None if it can't be read.

    Both numbers of heads, changed by one factor, leave every weight its shape: for them, as for rms_norm_eps and
    rope_theta, there is nothing but the manifest's sha256 of the file.
    """
    config = yield from subject.read_json(contract.CONFIG)
    if config is None:
        return None
    keys = subject.facts.config
    faulty = yield from check_keys(contract.CONFIG, config, keys, "model_type", subject.facts.model_type)
    for key in keys:
        where, value = f"{contract.CONFIG}: {key.path}", integer(config.get(key.path))
        if key.type == "Int" and key.path != "image_token_index" and value is not None and value < 1:
            yield finding("config-value", where, value)
        if key.path in _ASSUMED and config.get(key.path) is None and not key.required:
            yield finding("config-default", where, f"nothing, so the app takes {key.default}")
    for name, computed in _COMPUTED.items():
        if config.get(name, computed) not in (computed, None):
            where = f"{contract.CONFIG}: {name}"
            yield finding("config-value/computed", where, kind_of(config[name]), computed=kind_of(computed))
    scaling, decoded = config.get("rope_scaling"), {key.path for key in keys}
    ignored = [
        f"{name} {kind_of(value)}"
        for name, value in (scaling.items() if isinstance(scaling, dict) else ())
        if name != "mrope_section"
        and f"rope_scaling.{name}" not in decoded
        and not (name in ("type", "rope_type") and value in _UNSCALED)
    ]
    if ignored and not any(path.partition(".")[0] == "rope_scaling" for path in faulty):
        yield finding("config-value/rope", f"{contract.CONFIG}: rope_scaling", listed(ignored))
    subject.checked.append(
        f"{contract.CONFIG}: {len(keys)} keys, model_type, what the app computes; the numbers of heads, "
        "rms_norm_eps and rope_theta only by a manifest's sha256 of the file: no weight's shape tells them"
    )
    return config


def check_preprocessor(subject: Subject, encoder: Encoder | None, config: Mapping[str, Any] | None) -> Steps[None]:
    """Check preprocessor_config.json, alone and against the encoder's input.

    Args:
        subject: the artefact.
        encoder: the package's interface, None without a package.
        config: config.json, which says in LLaVA's way how pictures become square.
    """
    name, facts = contract.PREPROCESSOR_CONFIG, subject.facts
    document = yield from subject.read_json(name)
    if document is None:
        return
    faulty = yield from check_keys(name, document, facts.preprocessor, "processor_class", facts.processor_class)
    for key in facts.preprocessor:
        value = value_at(document, key.path)
        if key.type == "[CGFloat]" and key.path not in faulty and isinstance(value, list) and len(value) < 3:
            yield finding("list-length", f"{name}: {key.path}", f"{len(value)} numbers")
            faulty.add(key.path)
    # Mean and deviation are what the export took from the checkpoint, whatever that was, unless the file changed.
    for path, published in (("image_mean", 0.0), ("image_std", 1.0)):
        value = document.get(path)
        if path in faulty or not isinstance(value, list):
            continue
        if path == "image_std" and 0 in value[:3]:
            yield finding("normalisation/zero", f"{name}: {path}", value[:3])
        elif name in subject.changed and any(item != published for item in value[:3]):
            yield finding("normalisation", f"{name}: {path}", value[:3], published=published)
    trained = "pad" if (config or {}).get("image_aspect_ratio") == "pad" else contract.APP_IMAGE_STRATEGY
    if (strategy := document.get("image_strategy", trained)) != contract.APP_IMAGE_STRATEGY:
        where = f"{name}: image_strategy"
        yield finding("image-strategy", where, kind_of(strategy), strategy=contract.APP_IMAGE_STRATEGY)
    if encoder is None or encoder.side is None:
        subject.checked.append(f"{name}: keys; not compared with the encoder's input, which is unknown")
        return
    height, width, edge = (
        None if path in faulty else integer(value_at(document, path))
        for path in ("crop_size.height", "crop_size.width", "size.shortest_edge")
    )
    side = encoder.side
    if height is not None and width is not None and (height, width) != (side, side):
        yield finding("crop-size", f"{name}: crop_size", f"{height} x {width}", side=side)
    if edge is not None and edge != side:
        rule = "shortest-edge" if edge < side else "shortest-edge/longer"
        yield finding(rule, f"{name}: size.shortest_edge", edge, side=side)
    subject.checked.append(f"{name}: {len(facts.preprocessor)} keys, processor_class, sizes of pictures")


def check_keys(
    file: str, document: Mapping[str, Any], keys: Iterable[Key], registry: str, registered: str
) -> Steps[set[str]]:
    """Hold every key to its type, and the key that the app's registry is asked for to its value.

    Returns:
        The paths that are missing or wrong; what is missing around several keys is one finding.
    """
    by_path = {registry: Key(registry, "String", True)} | {key.path: key for key in keys}
    optional = {path: key for path, key in by_path.items() if not key.required}
    faulty: set[str] = set()
    reported: set[str] = set()
    for key in by_path.values():
        owner, absent = _absent(document, key.path)
        if absent in optional and owner is None:
            taken = optional[absent]
            default = taken.default or {}
            if ":" in taken.type and absent != key.path and key.path[len(absent) + 1 :] not in default:
                faulty.add(key.path)
                got = f"nothing, so the app takes {kind_of(default) if default else 'nothing'}"
                yield finding("key-missing/default", f"{file}: {key.path}", got, type=key.type)
        elif absent is not None:
            faulty.add(key.path)
            if absent not in reported:
                yield _wrong(document, file, absent, key.type if absent == key.path else "object")
            reported.add(absent)
        elif (fits := _fits(key.type, value_at(document, key.path))) is None:
            yield finding("type-unknown", f"{file}: {key.path}", f"Swift type {key.type}")
        elif not fits:
            faulty.add(key.path)
            reported.add(key.path)
            yield _wrong(document, file, key.path, key.type)
    value = document.get(registry)
    if isinstance(value, str) and value != registered:
        yield finding(registry.replace("_", "-"), f"{file}: {registry}", repr(value), registered=repr(registered))
    return faulty


def _wrong(document: Mapping[str, Any], file: str, path: str, kind: str) -> Finding:
    owner, _, leaf = path.rpartition(".")
    parent = value_at(document, owner) if owner else document
    wanted = {"object": "an object", "Int": "an integer (Swift's Int)"}.get(kind, f"Swift's {kind}")
    if leaf not in parent:
        return finding("key-missing", f"{file}: {path}", "nothing", wanted=wanted)
    return finding("key-type", f"{file}: {path}", kind_of(parent[leaf]), wanted=wanted)


def _absent(document: Mapping[str, Any], path: str) -> tuple[Any, str | None]:
    """(value there, path) of the first part that is missing, null, or no object although more follows; (…, None)."""
    value: Any = document
    parts = path.split(".")
    for number, part in enumerate(parts, 1):
        value = value.get(part)
        if value is None or (number < len(parts) and not isinstance(value, dict)):
            return value, ".".join(parts[:number])
    return value, None


def value_at(document: Mapping[str, Any], path: str) -> Any:
    """The value at a dotted path; None where there is none."""
    value: Any = document
    for part in path.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def integer(value: Any) -> int | None:
    """A JSON number as Swift's Int decodes it: 896 and 896.0, not true, "896" or 896.5."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return value if type(value) is int and -_INT <= value < _INT else None


def _fits(kind: str, value: Any) -> bool | None:
    """Whether JSONDecoder takes the value for a Swift type; None for a type that isn't known here."""
    kind = _ALIASES.get(kind.removesuffix("?"), kind.removesuffix("?"))
    if kind.startswith("[") and ":" not in kind:
        inner = [_fits(kind[1:-1], item) for item in value] if isinstance(value, list) else [False]
        return None if None in inner else all(inner)
    if kind.startswith("[String: "):
        inner = (
            [_fits(kind[len("[String: ") : -1], item) for item in value.values()]
            if isinstance(value, dict)
            else [False]
        )
        return None if None in inner else all(inner)
    number = type(value) in (int, float) and (type(value) is int or math.isfinite(value))
    return {
        "Int": integer(value) is not None,
        "Int32": (whole := integer(value)) is not None and -(2**31) <= whole < 2**31,
        "Bool": isinstance(value, bool),
        "String": isinstance(value, str),
        "Double": number,
        "CGFloat": number,
        "Float": number and abs(value) <= _FLOAT,
        # MLXLMCommon/StringOrNumber.swift of mlx-swift-examples 2.21.2: a number, a list of numbers, or text
        "StringOrNumber": number
        or isinstance(value, str)
        or (isinstance(value, list) and all(_fits("Float", item) for item in value)),
    }.get(kind)
