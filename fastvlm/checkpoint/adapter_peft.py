"""PEFT's adapters: adapter_config.json beside adapter_model.safetensors or adapter_model.bin.

The formulas are PEFT's own (peft/tuners/lora: layer.py, dora.py, variants.py of 0.21): W + s·B·A with s = alpha/r, or
alpha/√r for rsLoRA; DoRA brings each row of that, of an embedding each column, to a length that was learnt.
"""

import json
import math
import re
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from fastvlm.checkpoint.adapter import Parts
from fastvlm.checkpoint.merging import Factors
from fastvlm.checkpoint.weights import TensorInfo
from fastvlm.common.documents import shown
from fastvlm.common.findings import Finding, Steps
from fastvlm.common.settings import checked

CONFIG = "adapter_config.json"
_WRAPPERS = re.compile(r"^(base_model\.model\.|module\.)+|_orig_mod\.|_fsdp_wrapped_module\.")
# With or without the adapter's name, which PEFT's save_pretrained leaves out.
_LORA = re.compile(
    r"(?P<module>.+)\.lora_(?P<part>A|B|embedding_A|embedding_B|magnitude_vector)"
    r"(\.(?!weight$|bias$)(?P<name>[^.]+))?(\.(?P<leaf>weight|bias))?"
)
_TOKENS = re.compile(r"(?P<module>.+?)(\.token_adapter)?\.trainable_tokens_delta(\..+)?")
_UNUSED = re.compile(r"\.original_module\.|\.trainable_tokens_original")
_WRAPPED = re.compile(r"\.base_layer\b|\.modules_to_save(\.default)?\b")
_PATTERN = 500  # characters of a regular expression


@cache
def _kinds() -> dict[str, Any]:
    document: dict[str, Any] = json.loads(Path(__file__).with_name("adapter_kinds.json").read_text(encoding="utf-8"))
    return document


def inner_name(name: str) -> str:
    """A name without the prefixes of PEFT's model and of what wraps models for training."""
    return _WRAPPERS.sub("", name)


def read_config(document: dict[str, Any]) -> Steps[dict[str, Any]]:
    """adapter_config.json's checked settings; yields a finding about each that no merge can honour."""
    config = yield from checked(document, CONFIG, "PEFT adapter")
    kinds = _kinds()
    kind = config.get("peft_type")
    if kind not in kinds["types"]:
        got = shown(document.get("peft_type"))
        expected = f"{' or '.join(kinds['types'])}: no weights are the sum of the base's and this adapter's"
        yield Finding("adapter-type", f"{CONFIG}: peft_type", got, expected)
        return config
    for key, why in kinds["refused"].items():
        if document.get(key):
            yield Finding("adapter-unmergeable", f"{CONFIG}: {key}", shown(document[key]), f"none: {why}")
    started = config.get("init_lora_weights")
    if isinstance(started, str) and started.lower().startswith(tuple(kinds["bases"])):
        remedy = "save it again with PEFT's path_initial_model_for_weight_conversion"
        expected = "an initialisation that leaves the base as it is"
        yield Finding("adapter-base-changed", f"{CONFIG}: init_lora_weights", started, expected, remedy)
    unknown = sorted(key for key in set(document) - set(kinds["neutral"]) - set(kinds["refused"]) if document[key])
    if unknown:
        got = f"{len(unknown)} keys that PEFT 0.21 doesn't have"
        yield Finding("adapter-key-unknown", CONFIG, got, "none", details=tuple(unknown), severity="warning")
    if kind == "LORA":
        for key in ("r", "lora_alpha"):
            if document.get(key) is None:
                yield Finding("setting-missing", CONFIG, f"no {key}", "the adapter's rank and alpha")
            elif config.get(key) == 0:
                yield Finding("setting-invalid", f"{CONFIG}: {key}", "0", "a number that is not 0")
        yield from _pattern_findings(config)
    if config.get("use_dora") and config.get("lora_bias"):
        yield Finding("adapter-unmergeable", CONFIG, "use_dora and lora_bias", "one of them: PEFT has no sum for both")
    if config.get("fan_in_fan_out"):
        expected = "false, which is used: FastVLM's layers store (out, in)"
        yield Finding("config-ignored", f"{CONFIG}: fan_in_fan_out", "true", expected, severity="warning")
    return config


def kind_of(config: Mapping[str, Any], others: bool) -> str:
    """The kind in a few words; `others`: LLaVA's other trained weights are beside it."""
    if config["peft_type"] != "LORA":
        return "PEFT trainable tokens"
    name = "DoRA" if config.get("use_dora") else "rsLoRA" if config.get("use_rslora") else "LoRA"
    return f"{'LLaVA' if others else 'PEFT'} {name}"


def _pattern_findings(config: Mapping[str, Any]) -> Iterator[Finding]:
    for key in ("rank_pattern", "alpha_pattern"):
        for pattern, value in config.get(key, {}).items():
            number = type(value) is int if key == "rank_pattern" else type(value) in (int, float)
            if not number or not math.isfinite(value) or value == 0 or (key == "rank_pattern" and value < 0):
                yield Finding("setting-invalid", f"{CONFIG}: {key}", shown({pattern: value}), "a number that is not 0")
            if not _is_simple(pattern):
                expected = "a name, or a regular expression with at most two groups and two repetitions"
                yield Finding("setting-invalid", f"{CONFIG}: {key}", shown(pattern), expected)


def _is_simple(pattern: str) -> bool:
    """Whether a regular expression has no error, and little to try at a name: it comes from a stranger."""
    repetitions, groups = len(re.findall(r"[*+{]|(?<!\()\?", pattern)), pattern.count("(")
    if len(pattern) > _PATTERN or repetitions > 2 or groups > 2 or re.search(r"\)[*+{]", pattern):
        return False
    try:
        re.compile(pattern)
    except re.error:
        return False
    return True


def _of(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    """The value of the first pattern that is the end of a module's name, as PEFT looks it up."""
    return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", module)), default)


def read_parts(entries: Mapping[str, TensorInfo], config: Mapping[str, Any]) -> Steps[Parts]:
    """The parts of an adapter whose settings have no fault, from the tensors of its file."""
    tied = bool(config.get("ensure_weight_tying"))  # then one of two that are tied is saved
    parts, names = Parts(tied=tied, saved=() if tied else tuple(config.get("modules_to_save", ()))), set()
    modules: dict[str, dict[str, TensorInfo]] = {}
    rows: dict[str, TensorInfo] = {}
    twice: list[str] = []
    for source, info in entries.items():
        name = inner_name(source)
        if lora := _LORA.fullmatch(name):
            names.add(lora["name"])
            key = lora["part"] + (".bias" if lora["leaf"] == "bias" else "")
            modules.setdefault(lora["module"], {})[key] = info
        elif tokens := _TOKENS.fullmatch(name):
            rows[tokens["module"]] = info
        elif not _UNUSED.search(name):
            inner = _WRAPPED.sub("", name)
            twice += [source] if inner in parts.whole else []
            parts.whole[inner] = info
    if len(names) > 1:
        listed = ", ".join(sorted(map(str, names)))
        yield Finding("adapter-several", "adapter's tensors", f"adapters {listed}", "one: save the one that is meant")
    yield from _read_modules(parts, modules, config)
    if twice:
        got = f"{len(twice)} tensors that another name stands for, too"
        yield Finding("adapter-twice", "adapter's tensors", got, "each once", details=tuple(twice))
    for module, values in rows.items():
        index = _indices(config, module)
        if not index or values.shape[:1] != (len(index),):
            got = f"{values.shape[0] if values.shape else 0} rows for {len(index)} tokens"
            yield Finding("adapter-tokens", f"{module}: trainable_tokens_delta", got, "one for each of the tokens")
            continue
        parts.tokens[module] = (index, values)
    return parts


def _indices(config: Mapping[str, Any], module: str) -> tuple[int, ...]:
    """The tokens of `trainable_token_indices` (or TRAINABLE_TOKENS' own setting) whose rows a module has."""
    given = config.get("trainable_token_indices") or config.get("token_indices") or []
    if isinstance(given, Mapping):
        given = next((value for key, value in given.items() if f".{module}".endswith(f".{key}")), [])
    return tuple(given) if all(type(index) is int for index in given) else ()


def _read_modules(
    parts: Parts, modules: Mapping[str, Mapping[str, TensorInfo]], config: Mapping[str, Any]
) -> Iterator[Finding]:
    """Put each module's factors into `parts`; yields findings about modules without a half or of another rank."""
    half, rank, wrong = [], [], []
    dora, biased = bool(config.get("use_dora")), bool(config.get("lora_bias"))
    for module, held in modules.items():
        embedding = "embedding_A" in held or "embedding_B" in held
        a, b = (held.get(f"{'embedding_' * embedding}{half}") for half in "AB")
        if a is None or b is None or min(len(a.shape), len(b.shape)) < 2:
            half.append(module)
            continue
        stated = _of(config.get("rank_pattern", {}), module, config.get("r"))
        if not a.shape[0] == b.shape[1] == stated:
            rank.append(f"{module}: lora_A has {a.shape[0]}, lora_B {b.shape[1]}, {CONFIG} {stated}")
            continue
        if dora != ("magnitude_vector" in held) or biased != ("B.bias" in held):
            wrong.append(module)
            continue
        alpha = _of(config.get("alpha_pattern", {}), module, config.get("lora_alpha"))
        scale = alpha / (math.sqrt(stated) if config.get("use_rslora") else stated)
        left, right = (a, b) if embedding else (b, a)
        magnitude = held.get("magnitude_vector")
        parts.factors[module] = Factors(left, right, scale, embedding, magnitude, "columns" if embedding else "rows")
        if biased:
            parts.added[f"{module}.bias"] = (held["B.bias"], scale)
    if half:
        got = f"{len(half)} modules with one of lora_A and lora_B, or with empty ones"
        remedy = "save it again with all of its shards gathered"
        yield Finding("adapter-half", "adapter's tensors", got, "both, as matrices", remedy, details=tuple(half))
    if rank:
        got = f"{len(rank)} modules of another rank"
        yield Finding("adapter-rank", "adapter's tensors", got, f"the rank of {CONFIG}", details=tuple(rank))
    if wrong:
        got = f"{len(wrong)} modules"
        expected = f"{'a' if dora else 'no'} lora_magnitude_vector and {'a' if biased else 'no'} lora_B.bias in each"
        yield Finding(
            "adapter-contradictory", "adapter's tensors", got, f"{expected}, by {CONFIG}", details=tuple(wrong)
        )
