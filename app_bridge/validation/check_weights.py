"""The safetensors files, against the modules that the app builds from config.json.

What a loader does with them was read in mlx-swift-examples 2.21.2 (`MLXLMCommon/Load.swift`) and mlx-swift 0.21.2
(`MLXNN/Module.swift`): it reads every *.safetensors below the model's folder, and `update(parameters:verify: [.all])`
throws for a key that no module has, and for another shape. A missing key it doesn't notice (`allModelKeysSet` came with
mlx-swift 0.25): the module keeps its random numbers.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from app_bridge.app.facts import Layer, arithmetic
from app_bridge.rules import finding
from app_bridge.validation.check_config import integer
from app_bridge.validation.check_quantization import (
    FLOATING,
    Setting,
    Shape,
    Stored,
    check_block,
    check_setting,
    quantized_parts,
    read_block,
    triple_fault,
)
from app_bridge.validation.finite import is_finite
from app_bridge.validation.subject import Subject, kind_of, listed
from fastvlm.common.dtypes import Array
from fastvlm.common.findings import Finding, Steps, collect
from model_export import contract
from quantization.catalogue import Loader
from quantization.recipe import layer_count

_QUANTIZABLE = ("Linear", "Embedding")
_EMBEDDING = "language_model.model.embed_tokens.weight"


@dataclass
class _Weights:
    """The stored tensors by name; whether all of them could be read; the names that modules have."""

    tensors: dict[str, Stored]
    whole: bool
    used: set[str] = field(default_factory=set)

    def home(self, path: str) -> str:
        """The files that hold that half of the model."""
        half = path.partition(".")[0] + "."
        files = {tensor.file for name, tensor in self.tensors.items() if name.startswith(half)}
        return " or ".join(sorted(files)) or "*.safetensors"


def check_weights(
    subject: Subject, config: dict[str, Any] | None, channels: int | None, loader: Loader
) -> Steps[int | None]:
    """Check the weights.

    Args:
        subject: the artefact.
        config: config.json, None where it can't be read.
        channels: that the encoder gives, None where unknown.
        loader: what reads the weights in the app.

    Returns:
        The rows of the embedding table, None where unknown.
    """
    index: dict[str, Any] | None = {}
    if (subject.folder / contract.WEIGHTS_INDEX).exists():
        index = yield from subject.read_json(contract.WEIGHTS_INDEX)
    names = (index or {}).get("weight_map")
    files = {name: file for name, file in names.items() if isinstance(file, str)} if isinstance(names, dict) else {}
    weights = yield from _read(subject, files.values())
    tensors = weights.tensors
    if index:
        yield from _check_index(files, tensors)
    embedding = tensors.get(_EMBEDDING)
    rows = embedding.shape[0] if embedding is not None and embedding.shape else None
    if config is None or not tensors:
        subject.checked.append("weights: not compared with config.json, one of them can't be read")
        return rows
    values = {
        key.path: key.default if config.get(key.path) is None else config[key.path] for key in subject.facts.config
    }
    width, count = integer(values.get("mm_hidden_size")), integer(values.get("num_hidden_layers"))
    if channels is not None and width is not None and width != channels:
        yield finding("encoder-width", f"{contract.CONFIG}: mm_hidden_size", width, channels=channels)
        values["mm_hidden_size"] = channels  # the projector is held to the encoder
    stored = layer_count(tensors)
    if count is not None and count > 0 and count != stored and weights.whole:
        home = sorted({tensor.file for name, tensor in tensors.items() if name.startswith(contract.LANGUAGE_PREFIX)})
        where = f"{contract.CONFIG}: num_hidden_layers, with {listed(home) or 'the weights'}"
        yield finding("layer-count", where, count, stored=stored)
    # Nothing more is expected of layers that nobody stored; a name may have any number in it.
    values["num_hidden_layers"] = min(stored, len(tensors))
    block, usable = yield from read_block(config, loader)
    modules, findings = collect(_modules(subject.facts.layers, config, values, weights))
    quantized = {
        path for path, (layer, _) in modules.items() if layer.kind in _QUANTIZABLE and f"{path}.scales" in tensors
    }
    readable = usable and (yield from check_block(block, quantized, loader))
    missing: dict[str, Shape] = {}
    for path, (layer, shape) in modules.items():
        leaves = ("weight", *["bias"] * layer.bias, *(("scales", "biases") if layer.kind in _QUANTIZABLE else ()))
        parts = {leaf: tensors[f"{path}.{leaf}"] for leaf in leaves if f"{path}.{leaf}" in tensors}
        weights.used.update(f"{path}.{leaf}" for leaf in parts)
        setting = block.of(path) if block and path in quantized else None
        if path not in quantized or (setting is not None and readable):
            lacking, wrong = collect(_check_module(path, layer, shape, parts, setting))
            missing |= lacking
            findings += wrong
    if not weights.whole:  # a part may be in the file that can't be read
        missing = {}
        findings = [each for each in findings if each.rule != "quantized-triple"]
    yield from _grouped([*findings, *_check_names(weights, missing)])
    source = f"{loader.name}'s loader ({loader.source})"
    subject.checked.append(f"weights: {len(tensors)} tensors of {len(modules)} modules, {source}")
    return rows


def _grouped(findings: Iterable[Finding]) -> Iterator[Finding]:
    """One finding a rule: the first, with how many more there are."""
    by_rule: dict[str, list[Finding]] = {}
    for each in findings:
        by_rule.setdefault(each.rule, []).append(each)
    for first, *others in by_rule.values():
        yield replace(first, where=f"{first.where} and {len(others)} more") if others else first


def _read(subject: Subject, indexed: Iterable[str]) -> Steps[_Weights]:
    """Read the headers of all safetensors files, and look whether their values are finite."""
    tensors: dict[str, Stored] = {}
    twice: dict[str, list[str]] = {}
    infinite: list[str] = []
    paths = sorted(subject.folder.rglob("*.safetensors"))
    meant = {*subject.weights, *indexed, *(name for name in subject.changed if name.endswith(".safetensors"))}
    missing = sorted(name for name in meant if not (subject.folder / name).exists())
    if missing or not paths:
        got = "no such file" if len(missing) < 2 else f"{len(missing)} files that aren't there"
        yield finding("file-missing/weights", ", ".join(missing) or "*.safetensors", got)
    whole = bool(paths) and not missing
    for path in paths:
        name = path.relative_to(subject.folder).as_posix()
        try:
            if not path.is_file():
                raise OSError("no plain file")
            for key, (stored, raw) in _stored(path, name).items():
                if key in tensors:
                    twice.setdefault(key, [tensors[key].file]).append(name)
                tensors[key] = stored
                if stored.dtype in FLOATING and not is_finite(raw, stored.dtype):
                    infinite.append(f"{name}: {key}")
        except (OSError, SafetensorError) as error:
            whole = False
            yield finding("weights-unreadable", name, " ".join(str(error).split()))
    if twice:
        key, files = next(iter(twice.items()))
        where = " and ".join(sorted({file for names in twice.values() for file in names}))
        got = f"{len(twice)} tensors more than once, such as {key}"
        yield finding("weight-twice", where, got, files=listed(files))
    if infinite:
        yield finding("weight-value", listed(infinite), "NaN or infinite values")
    return _Weights(tensors, whole)


def _stored(path: Path, name: str) -> dict[str, tuple[Stored, Array]]:
    """Each tensor of a safetensors file and its bytes. Raises SafetensorError for a file that isn't whole."""
    with safe_open(path, "np"):  # which checks header and size
        raw = np.memmap(path, np.uint8, "r")
    start = 8 + int.from_bytes(raw[:8], "little")
    entries = json.loads(raw[8:start].tobytes())
    return {
        key: (
            Stored(name, entry["dtype"], tuple(entry["shape"])),
            raw[start + entry["data_offsets"][0] : start + entry["data_offsets"][1]],
        )
        for key, entry in entries.items()
        if key != "__metadata__"
    }


def _check_index(names: Mapping[str, str], tensors: Mapping[str, Stored]) -> Iterator[Finding]:
    """An index (tensor -> file) beside shards: the app doesn't read it, mlx-lm and Transformers do."""
    shards = {*names.values()}
    wrong = [name for name, file in names.items() if name in tensors and tensors[name].file != file]
    unlisted = [name for name, stored in tensors.items() if stored.file in shards and name not in names]
    if not names or wrong or unlisted:
        got = f"{len(wrong)} tensors in another file, {len(unlisted)} not named" if names else "no weight_map"
        yield finding("index-stale", contract.WEIGHTS_INDEX, got)


def _modules(
    layers: Iterable[Layer], config: Mapping[str, Any], values: Mapping[str, Any], weights: _Weights
) -> Steps[dict[str, tuple[Layer, Shape]]]:
    """Return the path of each module that the app builds -> its layer and its weight's shape (None: config.json is
    wrong)."""
    modules: dict[str, tuple[Layer, Shape]] = {}
    for layer in layers:
        shape = tuple(_size(expression, values) for expression in layer.shape)
        if layer.unless is not None:
            tied, name = values.get(layer.unless), f"{layer.path}.weight"
            stored = weights.tensors.get(name)
            if not isinstance(tied, bool):  # it has its finding
                tied = stored is None
            if tied == (stored is not None) and (tied or weights.whole):
                got = f"{'nothing, so the app takes ' * (config.get(layer.unless) is None)}{kind_of(tied)}"
                held = f"{name} in {stored.file}" if stored else f"no {name} in {weights.home(name)}"
                where = f"{contract.CONFIG}: {layer.unless}, with {held}"
                yield finding("tied-embeddings", where, got, wanted=kind_of(not tied))
                weights.used.update(key for key in weights.tensors if key.startswith(f"{layer.path}."))
                continue
            if tied:
                continue
        count = values["num_hidden_layers"] if "{layer}" in layer.path else 1
        modules |= {layer.path.replace("{layer}", str(number)): (layer, shape) for number in range(count)}
    return modules


def _size(expression: str, values: Mapping[str, Any]) -> int | None:
    """A layer's size; None where a key of config.json has no usable value."""

    def value(name: str) -> int:
        number = integer(values.get(name))
        if number is None or number < 1:
            raise ValueError(name)
        return number

    try:
        return arithmetic(expression, value)
    except (ValueError, ZeroDivisionError):
        return None


def _check_module(
    path: str, layer: Layer, shape: Shape, parts: Mapping[str, Stored], setting: Setting | None
) -> Steps[dict[str, Shape]]:
    """Check shapes and types of a module's tensors; return those that are missing."""
    wanted: dict[str, tuple[Shape, tuple[str, ...]]] = {"weight": (shape, FLOATING)}
    if setting is not None:
        wanted = quantized_parts(shape, setting)
    if layer.bias:
        wanted["bias"] = (shape[:1], FLOATING)
    if fault := triple_fault(wanted, parts):
        where = f"{next(iter(parts.values())).file}: {path}"
        yield finding("quantized-triple", where, fault)
        return {}
    missing = {f"{path}.{leaf}": size for leaf, (size, _) in wanted.items() if leaf not in parts}
    if setting is not None and (yield from check_setting(path, shape, parts, setting)):
        return missing
    for leaf, stored in parts.items():
        if leaf not in wanted:
            continue
        size, dtypes = wanted[leaf]
        where, held = f"{stored.file}: {path}.{leaf} against {contract.CONFIG}", list(stored.shape)
        if len(held) != len(size):
            yield finding("weight-rank", where, f"{len(held)} dimensions, {held}", rank=len(size), shape=list(size))
        elif any(want not in (None, number) for want, number in zip(size, held, strict=True)):
            yield finding("weight-shape", where, held, shape=list(size))
        elif stored.dtype not in dtypes:
            yield finding("weight-dtype", where, stored.dtype, dtypes=" or ".join(dtypes))
    return missing


def _check_names(weights: _Weights, missing: Mapping[str, Shape]) -> Iterator[Finding]:
    """Yield findings about missing and unknown tensors; where the two have the same shapes, the names differ."""
    unknown = {name: stored for name, stored in weights.tensors.items() if name not in weights.used}
    wrong = sorted((list(stored.shape), name) for name, stored in unknown.items())
    right = sorted((list(shape), name) for name, shape in missing.items() if None not in shape)
    if missing and len(right) == len(missing) and [shape for shape, _ in wrong] == [shape for shape, _ in right]:
        for (_, name), (_, expected) in zip(wrong, right, strict=True):
            yield finding("weight-name", f"{unknown[name].file}: {name}", "that name", name=expected)
        return
    for name, stored in unknown.items():
        yield finding("weight-unknown", f"{stored.file}: {name}", list(stored.shape))
    for name, shape in missing.items():
        yield finding("weight-missing", f"{weights.home(name)}: {name}", "nothing", shape=list(shape))
