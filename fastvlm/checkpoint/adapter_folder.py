"""An adapter's folder: which kind it is, its files, and what is in them."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from fastvlm.checkpoint import adapter_mlx, adapter_peft, folder_kind, naming
from fastvlm.checkpoint.adapter import Adapter, Parts
from fastvlm.checkpoint.weights import TensorInfo, Weights, scan_file
from fastvlm.common.documents import Unreadable, load_object
from fastvlm.common.dtypes import DTYPES
from fastvlm.common.files import check_small_files
from fastvlm.common.findings import Finding, Steps, collect, errors

_CONFIG = adapter_peft.CONFIG
_PEFT = ("adapter_model.safetensors", "adapter_model.bin")
_MLX = ("adapters.safetensors",)
_OLD_MLX = "adapters.npz"
_OTHERS = "non_lora_trainables.bin"
_PROJECTOR = ("mm_projector.safetensors", "mm_projector.bin")
_STEP = re.compile(r"checkpoint-([0-9]{1,9})\.bin")  # in LLaVA's mm_projector/, saved while it was trained
_BROUGHT = {
    "config": ("config.json",),
    "processor": ("preprocessor_config.json", "processor_config.json"),
    "tokenizer": ("tokenizer.json", "vocab.json", "added_tokens.json", "tokenizer_config.json", "chat_template.jinja"),
}
_QUANTIZED = re.compile(r"(?i)\b[348]-?bit\b|bnb|gptq|awq|nf4")  # in the names of models


def read(path: Path) -> Steps[Adapter | None]:
    """The adapter in a folder; None after a finding that nothing can be read of it."""
    if not path.is_dir():
        yield replace(folder_kind.not_a_folder(path), expected="an adapter's folder")
        return None
    yield from check_small_files(path)
    files = _files(path)
    if files is None:
        yield _no_adapter(path)
        return None
    document: dict[str, Any] = {}
    if files.config is not None:
        try:
            document = load_object(files.config)
        except Unreadable as error:
            yield error.finding(_CONFIG)
            return None
    entries: dict[str, TensorInfo] = {}
    others: dict[str, TensorInfo] = {}
    weights, broken = Weights(path), False
    for file, held in ((files.weights, entries), (files.others, others)):
        if file is not None:
            read, findings = collect(scan_file(weights, file))
            yield from findings
            broken |= bool(errors(findings))
            held.update(read or {})
    if broken:
        return None
    adapter = yield from _adapter(path, files, document, entries, others)
    yield from _value_findings(weights, {**entries, **others})
    brings = yield from _brings(path)
    return None if adapter is None else replace(adapter, brings=brings)


@dataclass(frozen=True)
class _Files:
    kind: str  # "peft", "mlx" or "projector"
    weights: Path
    config: Path | None = None
    others: Path | None = None  # LLaVA's non_lora_trainables.bin

    def all(self) -> tuple[Path, ...]:
        return tuple(file for file in (self.config, self.weights, self.others) if file is not None)


def _files(path: Path) -> _Files | None:
    """The files of the adapter in a folder, None where there is none."""

    def first(names: tuple[str, ...]) -> Path | None:
        return next((path / name for name in names if (path / name).is_file()), None)

    config, mlx, peft, projector = first((_CONFIG,)), first(_MLX), first(_PEFT), first(_PROJECTOR)
    if config is not None and mlx is not None:
        return _Files("mlx", mlx, config)
    if config is not None and peft is not None:
        return _Files("peft", peft, config, first((_OTHERS,)))
    if projector is None and (path / "mm_projector").is_dir():
        steps = [
            (int(step[1]), file) for file in (path / "mm_projector").iterdir() if (step := _STEP.fullmatch(file.name))
        ]
        projector = max(steps, default=(0, None))[1]
    return None if projector is None else _Files("projector", projector)


def _no_adapter(path: Path) -> Finding:
    """The finding about a folder without an adapter."""
    expected = (
        f"{_CONFIG} with {' or '.join(_PEFT + _MLX)}, or {' or '.join(_PROJECTOR)}: what PEFT, LLaVA and MLX save"
    )
    names = {file.name for file in path.iterdir()} & {_CONFIG, *_PEFT, *_MLX, _OTHERS, _OLD_MLX, "config.json"}
    got = f"a folder with {', '.join(sorted(names))} alone" if names else "a folder without an adapter"
    inner = sorted(file.parent.name for file in path.glob(f"*/{_CONFIG}"))
    remedy = f"did you mean its folder {inner[-1]}?" if inner else ""
    if _OLD_MLX in names:
        remedy = f"`mx.save_safetensors('{_MLX[0]}', mx.load('{_OLD_MLX}'))` saves it as MLX does today"
    elif "config.json" in names and not inner:
        remedy = "a checkpoint is given as --checkpoint"
    return Finding("adapter-missing", str(path), got, expected, remedy)


def _adapter(
    path: Path,
    files: _Files,
    document: dict[str, Any],
    entries: Mapping[str, TensorInfo],
    others: Mapping[str, TensorInfo],
) -> Steps[Adapter | None]:
    """The adapter with its parts; None after a finding about its settings."""
    if files.kind == "projector":
        parts = Parts(whole={adapter_peft.inner_name(name): info for name, info in entries.items()}, tied=True)
        return Adapter(path, "projector", None, files.all(), parts=parts)
    reader = adapter_mlx if files.kind == "mlx" else adapter_peft
    config, findings = collect(reader.read_config(document))
    yield from findings
    base = config.get("model" if files.kind == "mlx" else "base_model_name_or_path")
    if base and _QUANTIZED.search(base):
        expected = "the weights before quantization: the adapter was trained on rounded ones, and is added to these"
        yield Finding("adapter-base-quantized", _CONFIG, base, expected, severity="warning")
    if errors(findings):
        return None
    parts = yield from reader.read_parts(entries, config)
    if others:
        parts.whole = {adapter_peft.inner_name(name): info for name, info in others.items()} | parts.whole
        parts.tied = True  # load_state_dict fills the one tensor that both are
    return Adapter(path, reader.kind_of(config, bool(others)), base, files.all(), parts=parts)


def _value_findings(weights: Weights, entries: Mapping[str, TensorInfo]) -> Steps[None]:
    """Types that no merge computes with, and values that are not finite."""
    entries = {name: info for name, info in entries.items() if not naming.is_ignored(name)}
    other = tuple(name for name, info in entries.items() if info.dtype not in DTYPES)
    if other:
        found = ", ".join(sorted({entries[name].dtype for name in other}))
        yield Finding("dtype-unsupported", "adapter's tensors", found, ", ".join(DTYPES), details=other)
    bad = []
    for name, info in entries.items():
        if info.dtype in DTYPES and info.size:
            step = max(1, (1 << 22) * (info.shape or (1,))[0] // info.size)
            rows = (info.shape or (1,))[0]
            if not all(np.isfinite(weights.floats(info, at, at + step)).all() for at in range(0, rows, step)):
                bad.append(name)
    if bad:
        got = f"NaN or infinite values in {len(bad)} tensors"
        yield Finding("weights-not-finite", "adapter's tensors", got, "finite weights", details=tuple(bad))


def _brings(path: Path) -> Steps[frozenset[str]]:
    """What the folder has of a checkpoint's small files; a part of a tokenizer is a finding."""
    held = {kind: [name for name in names if (path / name).is_file()] for kind, names in _BROUGHT.items()}
    tokenizer = held["tokenizer"]
    whole = "tokenizer.json" in tokenizer or ("vocab.json" in tokenizer and (path / "merges.txt").is_file())
    if tokenizer and not whole:
        expected = "a whole tokenizer (tokenizer.json, or vocab.json with merges.txt), or no file of one"
        yield Finding("adapter-tokenizer", str(path), f"{', '.join(tokenizer)} alone", expected)
        held["tokenizer"] = []
    return frozenset(kind for kind, names in held.items() if names)
