"""The safetensors files, against the modules that the app builds from config.json.

What a loader does with them was read in mlx-swift-examples 2.21.2 (`MLXLMCommon/Load.swift`) and mlx-swift 0.21.2
(`MLXNN/Module.swift`): it reads every *.safetensors below the model's folder, and `update(parameters:verify: [.all])`
throws for a key that no module has, and for another shape. A missing key it doesn't notice (`allModelKeysSet` came with
mlx-swift 0.25): the module keeps its random numbers.
"""

import ast
import operator
from collections.abc import Iterable, Mapping
from typing import Any

from safetensors import SafetensorError, safe_open

from app_bridge.app.facts import Layer
from app_bridge.subject import NUMBERS, Subject, is_finite, kind_of, listed
from app_bridge.validation.check_config import integer
from app_bridge.validation.check_quantization import (
    FLOATING,
    Groups,
    Setting,
    Shape,
    Stored,
    check_block,
    quantized_parts,
    read_block,
    stored_otherwise,
    triple_fault,
)
from model_export import contract
from quantization.catalogue import Loader
from quantization.recipe import layer_count

_QUANTIZABLE = ("Linear", "Embedding")


def check_weights(subject: Subject, config: dict[str, Any] | None, channels: int | None, loader: Loader) -> int | None:
    """Everything about the weights; returns the rows of the embedding table, None where they are unknown.

    `channels` is what the encoder gives, None where that isn't known.
    """
    index = subject.read_json(contract.WEIGHTS_INDEX) if (subject.folder / contract.WEIGHTS_INDEX).exists() else {}
    names = (index or {}).get("weight_map")
    files = {name: file for name, file in names.items() if isinstance(file, str)} if isinstance(names, dict) else {}
    tensors, whole = _read(subject, files.values())
    if index:
        _check_index(subject, files, tensors)
    embedding = tensors.get("language_model.model.embed_tokens.weight")
    rows = embedding.shape[0] if embedding is not None and embedding.shape else None
    if config is None or not tensors:
        subject.checked.append("weights: not compared with config.json, one of them can't be read")
        return rows
    values = {
        key.path: key.default if config.get(key.path) is None else config[key.path] for key in subject.facts.config
    }
    _check_width(subject, values, channels)
    _check_layer_count(subject, values, tensors, whole)
    block, usable = read_block(subject, config, loader)
    groups = Groups()
    used: set[str] = set()
    modules = _modules(subject, config, values, tensors, whole, groups, used)
    quantized = {
        path for path, (layer, _) in modules.items() if layer.kind in _QUANTIZABLE and f"{path}.scales" in tensors
    }
    missing: dict[str, Shape] = {}
    readable = usable and check_block(subject, block, quantized, loader)
    for path, (layer, shape) in modules.items():
        parts = {leaf: tensors[f"{path}.{leaf}"] for leaf in _leaves(layer) if f"{path}.{leaf}" in tensors}
        used.update(f"{path}.{leaf}" for leaf in parts)
        setting = block.of(path) if block else None
        if path in quantized and (setting is None or not readable):
            continue
        missing |= _check_module(path, layer, shape, parts, setting if path in quantized else None, groups)
    if not whole:  # a part may be in the file that can't be read
        missing = {}
        groups.found.pop("quantized-triple", None)
    _check_names(tensors, missing, used, groups)
    groups.tell(subject, _REMEDIES)
    subject.checked.append(
        f"weights: {len(tensors)} tensors of {len(modules)} modules, {loader.name}'s loader ({loader.source})"
    )
    return rows


_REMEDIES = {
    "weight-missing": "export again: the app would run with random numbers in its place, or refuse to load",
    "weight-unknown": "remove what belongs to another model or layout, or export again with `--layout app`",
    "quantization-mismatch": "export again: config.json has to say how the weights are stored",
    "tied-embeddings": "let tie_word_embeddings in config.json say whether the model has an lm_head of its own",
}


def _read(subject: Subject, indexed: Iterable[str]) -> tuple[dict[str, Stored], bool]:
    """Every tensor of every safetensors file, and whether all that there should be could be read."""
    tensors: dict[str, Stored] = {}
    twice: dict[str, list[str]] = {}
    infinite: list[str] = []
    paths = sorted(subject.folder.rglob("*.safetensors"))
    meant = {*subject.weights, *indexed, *(name for name in subject.changed if name.endswith(".safetensors"))}
    gone = sorted(name for name in meant if not (subject.folder / name).exists())
    if gone or not paths:
        got = "no such file" if len(gone) < 2 else f"{len(gone)} files that aren't there"
        expected = "the language model's and the projector's weights"
        subject.error("file-missing", ", ".join(gone) or "*.safetensors", got, expected)
    whole = bool(paths) and not gone
    for path in paths:
        name = path.relative_to(subject.folder).as_posix()
        if not path.is_file():
            whole = False
            subject.error("weights-unreadable", name, "no plain file", "a whole safetensors file")
            continue
        try:
            with safe_open(path, "pt") as file:
                for key in file.keys():  # noqa: SIM118 (the handle is no mapping)
                    part = file.get_slice(key)
                    if key in tensors:
                        twice.setdefault(key, [tensors[key].file]).append(name)
                    tensors[key] = Stored(name, part.get_dtype(), tuple(part.get_shape()))
                    if part.get_dtype() in FLOATING and not is_finite(file.get_tensor(key)):
                        infinite.append(f"{name}: {key}")
        except (OSError, SafetensorError) as error:
            whole = False
            subject.error("weights-unreadable", name, " ".join(str(error).split()), "a whole safetensors file")
    if twice:
        key, files = next(iter(twice.items()))
        subject.error(
            "weight-twice",
            " and ".join(sorted({file for names in twice.values() for file in names})),
            f"{len(twice)} tensors more than once, such as {key}",
            "one model: the app loads every *.safetensors that it finds",
            f"remove the file that isn't this model's ({listed(files)})",
        )
    if infinite:
        subject.error("weight-value", listed(infinite), "NaN or infinite values", NUMBERS)
    return tensors, whole


def _check_index(subject: Subject, names: Mapping[str, str], tensors: Mapping[str, Stored]) -> None:
    """An index (tensor -> file) beside shards: the app doesn't read it, mlx-lm and Transformers do."""
    shards = {*names.values()}
    wrong = [name for name, file in names.items() if name in tensors and tensors[name].file != file]
    unlisted = [name for name, stored in tensors.items() if stored.file in shards and name not in names]
    if not names or wrong or unlisted:
        got = f"{len(wrong)} tensors in another file, {len(unlisted)} not named" if names else "no weight_map"
        subject.warning(
            "index-stale",
            contract.WEIGHTS_INDEX,
            got,
            "each tensor and its file; the app doesn't ask, other loaders do",
        )


def _check_width(subject: Subject, values: dict[str, Any], channels: int | None) -> None:
    """The projector reads what the encoder gives; sets it in `values`, so that the projector is held to the encoder."""
    said = integer(values.get("mm_hidden_size"))
    if channels is not None and said is not None and said != channels:
        subject.error(
            "encoder-width",
            f"{contract.CONFIG}: mm_hidden_size",
            str(said),
            f"{channels}, the channels that the encoder gives",
        )
        values["mm_hidden_size"] = channels


def _check_layer_count(subject: Subject, values: dict[str, Any], tensors: Mapping[str, Stored], whole: bool) -> None:
    """As many layers as are stored; sets that in `values`: nothing more is expected of layers that nobody stored."""
    said, stored = integer(values.get("num_hidden_layers")), layer_count(tensors)
    if said is not None and said > 0 and said != stored and whole:
        files = sorted({one.file for name, one in tensors.items() if name.startswith(contract.LANGUAGE_PREFIX)})
        where = f"{contract.CONFIG}: num_hidden_layers, with {listed(files) or 'the weights'}"
        subject.error("layer-count", where, str(said), f"{stored}, as many as are stored")
    values["num_hidden_layers"] = min(stored, len(tensors))  # a name may have any number in it


def _modules(
    subject: Subject,
    config: Mapping[str, Any],
    values: Mapping[str, Any],
    tensors: Mapping[str, Stored],
    whole: bool,
    groups: Groups,
    used: set[str],
) -> dict[str, tuple[Layer, Shape]]:
    """Path of each module that the app builds -> its layer and the shape of its weight (None: config.json is wrong)."""
    found: dict[str, tuple[Layer, Shape]] = {}
    for layer in subject.facts.layers:
        shape = tuple(_size(expression, values) for expression in layer.shape)
        if layer.unless is not None:
            tied, name = values.get(layer.unless), f"{layer.path}.weight"
            if not isinstance(tied, bool):  # said already
                tied = name not in tensors
            if tied == (name in tensors) and (tied or whole):
                said = config.get(layer.unless) is not None
                got = kind_of(tied) if said else f"nothing, so the app takes {kind_of(tied)}"
                held = f"{name} in {tensors[name].file}" if tied else f"no {name} in {_home(name, tensors)}"
                where = f"{contract.CONFIG}: {layer.unless}, with {held}"
                groups.add("tied-embeddings", where, got, kind_of(not tied))
                used.update(key for key in tensors if key.startswith(f"{layer.path}."))
                continue
            if tied:
                continue
        count = values["num_hidden_layers"] if "{layer}" in layer.path else 1
        found |= {layer.path.replace("{layer}", str(number)): (layer, shape) for number in range(count)}
    return found


def _home(path: str, tensors: Mapping[str, Stored]) -> str:
    """The files that hold that half of the model."""
    half = path.partition(".")[0] + "."
    files = {one.file for name, one in tensors.items() if name.startswith(half)}
    return " or ".join(sorted(files)) or "*.safetensors"


def _leaves(layer: Layer) -> tuple[str, ...]:
    return ("weight", *(("bias",) if layer.bias else ()), *(("scales", "biases") if layer.kind in _QUANTIZABLE else ()))


_OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.FloorDiv: operator.floordiv}


def _size(expression: str, values: Mapping[str, Any]) -> int | None:
    """An integer expression over keys of config.json; None where a key has no usable value."""

    def value(node: ast.expr) -> int:
        if isinstance(node, ast.BinOp):
            return int(_OPERATORS[type(node.op)](value(node.left), value(node.right)))
        if isinstance(node, ast.Constant) and isinstance(node.value, int):
            return node.value
        found = integer(values.get(ast.unparse(node)))
        if found is None or found < 1:
            raise ValueError
        return found

    try:
        return value(ast.parse(expression, mode="eval").body)
    except (ValueError, ZeroDivisionError):
        return None


def _check_module(
    path: str,
    layer: Layer,
    shape: Shape,
    parts: Mapping[str, Stored],
    setting: Setting | None,
    groups: Groups,
) -> dict[str, Shape]:
    """A module's tensors: of the right shape and type. Returns those that are missing."""
    wanted: dict[str, tuple[Shape, tuple[str, ...]]] = {"weight": (shape, FLOATING)}
    if setting is not None:
        wanted = quantized_parts(shape, setting)
    if layer.bias:
        wanted["bias"] = (shape[:1], FLOATING)
    if fault := triple_fault(wanted, parts):
        where = f"{next(iter(parts.values())).file}: {path}"
        groups.add("quantized-triple", where, fault, "weight and scales, and for affine quantization biases")
        return {}
    missing = {f"{path}.{leaf}": size for leaf, (size, _) in wanted.items() if leaf not in parts}
    if setting is not None and stored_otherwise(path, shape, parts, setting, groups):
        return missing
    for leaf, (size, dtypes) in wanted.items():
        if leaf not in parts:
            continue
        stored, where = parts[leaf], f"{parts[leaf].file}: {path}.{leaf} against {contract.CONFIG}"
        if len(stored.shape) != len(size):
            got = f"{len(stored.shape)} dimensions, {list(stored.shape)}"
            groups.add("weight-rank", where, got, f"{len(size)}, {list(size)}")
        elif any(want not in (None, held) for want, held in zip(size, stored.shape, strict=True)):
            groups.add("weight-shape", where, str(list(stored.shape)), str(list(size)))
        elif stored.dtype not in dtypes:
            groups.add("weight-dtype", where, stored.dtype, " or ".join(dtypes))
    return missing


def _check_names(tensors: Mapping[str, Stored], missing: Mapping[str, Shape], used: set[str], groups: Groups) -> None:
    """What is missing and what is too much; where these are of the same shapes, they have other names."""
    unknown = {name: stored for name, stored in tensors.items() if name not in used}
    wrong = sorted((list(stored.shape), name) for name, stored in unknown.items())
    right = sorted((list(shape), name) for name, shape in missing.items() if None not in shape)
    if missing and len(right) == len(missing) and [shape for shape, _ in wrong] == [shape for shape, _ in right]:
        for (_, name), (_, expected) in zip(wrong, right, strict=True):
            groups.add("weight-name", f"{unknown[name].file}: {name}", "that name", expected)
        return
    for name, stored in unknown.items():
        expected = "only what the app's modules have: its loader throws for any other key"
        groups.add("weight-unknown", f"{stored.file}: {name}", str(list(stored.shape)), expected)
    for name, shape in missing.items():
        where = f"{_home(name, tensors)}: {name}"
        groups.add("weight-missing", where, "nothing", f"{list(shape)}: the app's module needs it")
