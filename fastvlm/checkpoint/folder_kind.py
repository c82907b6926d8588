"""Kinds of paths that are given instead of a checkpoint (adapters, shards, other formats, caches), and remedies.

Names of files and tensors and a key of the small JSON files decide, never weights. The rules are data:
folder_kinds.json. Nothing imports torch here.
"""

import json
import os
import re
import shlex
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Any

from fastvlm.checkpoint.exported import recognise
from fastvlm.checkpoint.weights import scan
from fastvlm.common.documents import Unreadable, load, load_object
from fastvlm.common.errors import UserError
from fastvlm.common.files import is_macs, some_path
from fastvlm.common.findings import Finding, collect, errors

CHECKPOINT, ARTEFACT = "a checkpoint", "an artefact"  # what may be asked for
REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)  # a hub id
_HUB_URL = re.compile(r"https?:/+(?:www\.)?(?:huggingface\.co|hf\.co)/")
_JSON_LIMIT = 1 << 20  # bytes of a small file that are read
_EVIDENCE = ("files", "all_files", "config", "tensors")  # a rule's conditions
_SHOWN = 5  # repositories of a cache that are named
# Where an adapter's own configuration names its base: PEFT's key, mlx-lm's.
_BASE_KEYS = ("base_model_name_or_path", "model")
_FILES = {
    ".gguf": "a GGUF model for llama.cpp, which can't be turned back into a checkpoint; give the original weights",
    ".onnx": "an ONNX graph, which can't be turned back into a checkpoint; give the checkpoint that it was made from",
    ".safetensors": "one file of weights; give the folder that has config.json and the tokenizer beside it",
    ".bin": "one file of weights; give the folder that has config.json and the tokenizer beside it",
    ".pt": "one file of weights; give the folder that has config.json and the tokenizer beside it",
    ".pth": "one file of weights; give the folder that has config.json and the tokenizer beside it",
    ".zip": "an archive; unpack it and give the folder",
    ".gz": "an archive; unpack it and give the folder",
    ".tar": "an archive; unpack it and give the folder",
}


@dataclass(frozen=True)
class FolderKind:
    """The kind of a folder. `evidence`: the file, key or tensor that shows it; `base`: an adapter's, as it names it."""

    name: str
    path: Path
    what: str
    evidence: str
    remedy: str
    base: str | None = None

    def finding(self, expected: str = CHECKPOINT) -> Finding:
        """The finding for a path where `expected`, a checkpoint or an artefact, belongs."""
        got = f"{self.what} (it has {self.evidence})"
        return Finding(f"folder-is-{self.name}", str(self.path), got, expected, self.remedy)


@cache
def _rules() -> dict[str, Any]:
    document: dict[str, Any] = json.loads(Path(__file__).with_name("folder_kinds.json").read_text(encoding="utf-8"))
    return document


def identify(path: Path, config: Any = None, tensors: Collection[str] = ()) -> FolderKind | None:
    """The kind of a folder by its files; None where no rule has all of its evidence.

    `config` is its config.json, `tensors` the names in its weight files, as far as they were read.
    """
    if (made := recognise(path)) is not None:
        name = "artefact" if made.ours else "artefact-elsewhere"
        uses = "fastvlm inspect, generate, parity, ttft, validate, plan and bundle take it"
        return FolderKind(name, path, made.name, made.holds, uses)
    names = _names(path)
    weights = bool(_first(names, _rules()["weights"]))
    for rule in _rules()["kinds"]:
        if rule.get("without_weights") and weights:
            continue
        evidence = [_evidence(path, names, config, tensors, key, rule[key]) for key in _EVIDENCE if key in rule]
        if all(evidence) and not _first(tensors, rule.get("no_tensors", ())):
            return _kind(rule, path, next(filter(None, evidence)), names)
    return None


def _evidence(path: Path, names: Collection[str], config: Any, tensors: Collection[str], key: str, value: Any) -> str:
    """The part of the folder that meets one condition of a rule, "" if nothing does."""
    if key == "files":
        return _first(names, value) or next(
            (pattern for pattern in value if "/" in pattern and any(path.glob(pattern))), ""
        )
    if key == "all_files":
        return " and ".join(value) if set(value) <= set(names) else ""
    if key == "config":
        section = config.get(value) if isinstance(config, Mapping) else None
        return f"{value} in config.json" if isinstance(section, Mapping) else ""
    first = _first(tensors, value)
    return f"the tensor {first}" if first else ""


def _first(names: Collection[str], patterns: Collection[str]) -> str:
    return next((name for pattern in patterns for name in sorted(names) if fnmatchcase(name, pattern)), "")


def _names(path: Path) -> frozenset[str]:
    try:
        return frozenset(name for name in os.listdir(path) if not is_macs(name))
    except OSError:  # whoever reads the folder says so
        return frozenset()


def _kind(rule: Mapping[str, Any], path: Path, evidence: str, names: Collection[str]) -> FolderKind:
    base = _base(path) if "adapter_config.json" in names else None
    words = {
        "path": shlex.quote(str(path)),
        "text": json.dumps(str(path), ensure_ascii=False),
        "inside": shlex.quote(str(path / evidence)),
        "base": base or "the model that it was trained on",
        "of": f" of {base}" if base else "",
        "snapshot": _snapshots(path),
    }
    what, remedy = (rule[key].format(**words) for key in ("what", "remedy"))
    return FolderKind(rule["name"], path, what, evidence, remedy, base)


def _base(path: Path) -> str | None:
    """The model that an adapter says it was trained on."""
    adapter = _small_json(path / "adapter_config.json")
    bases = [adapter.get(key) for key in _BASE_KEYS] if isinstance(adapter, dict) else []
    return next((base[:200] for base in bases if isinstance(base, str) and base), None)


def _small_json(file: Path) -> Any:
    """A JSON document of ordinary size, None for whatever else is there."""
    try:
        return load(file, _JSON_LIMIT)
    except Unreadable:
        return None


# --- the hub's cache and its ids -------------------------------------------------------------------------------------


def _snapshots(path: Path) -> str:
    """The remedy for a folder of the hub's cache."""
    patterns = [f"{above}snapshots/*" for above in ("", "models--*/", "hub/models--*/")]
    snapshots = sorted(str(entry) for pattern in patterns for entry in path.glob(pattern) if entry.is_dir())
    more = f" and {len(snapshots) - _SHOWN} more" if len(snapshots) > _SHOWN else ""
    return f"give a snapshot in it: {', '.join(snapshots[:_SHOWN])}{more}" if snapshots else "it has no snapshots"


def instead_of_artefact(path: Path) -> Finding | None:
    """The finding about a path that was given as an artefact and is none, None if nothing is known of it."""
    if not path.exists():
        return hub_name(path)
    try:
        config = load_object(path / "config.json")
    except Unreadable as error:
        if error.rule != "file-missing":
            return error.finding(str(path / "config.json"))
        config = {}
    if any(path.glob("model*.safetensors")) and (damaged := errors(collect(scan(path))[1])):
        return replace(damaged[0], where=str(path / damaged[0].where))
    kind = identify(path, config)
    if kind is not None:
        return kind.finding(ARTEFACT)
    if config and _first(_names(path), _rules()["weights"]):
        export = f"fastvlm export --checkpoint {shlex.quote(str(path))} --output-dir OUT"
        got = f"{CHECKPOINT}, without export.json"
        return Finding("folder-is-checkpoint", str(path), got, ARTEFACT, f"export it: `{export}`")
    return None


def checkpoint_folder(text: str) -> Path:
    """The argparse type of a checkpoint's folder: refuses what is none by its names alone."""
    path = some_path(text)
    if not path.is_dir():
        raise UserError(not_a_folder(text))
    if not (path / "config.json").is_file():
        raise UserError(kind.finding() if (kind := identify(path)) else without_config(path))
    return path


def without_config(path: Path) -> Finding:
    """The finding about a folder that was given as a checkpoint and has no config.json."""
    inner = sorted(child.parent.name for child in path.glob("*/config.json"))
    remedy = f"did you mean its folder {inner[0]}?" if inner else ""
    return Finding("config-missing", str(path), "a folder without config.json", CHECKPOINT, remedy)


def not_a_folder(path: str | os.PathLike[str]) -> Finding:
    """The finding about a path that was given as a checkpoint and is no folder."""
    where, expected = as_typed(path), "a checkpoint's folder"
    if Path(path).exists():
        got, _, remedy = _FILES.get(Path(path).suffix.lower(), "a file; give the folder that it is in").partition("; ")
        return Finding("path-is-file", where, got, expected, remedy)
    if (named := hub_name(path)) is not None:
        return named
    if re.match(r"https?://", where):
        return Finding("path-is-address", where, "an address", expected, "download it first")
    return Finding("path-missing", where, "nothing there", expected)


def as_typed(path: str | os.PathLike[str]) -> str:
    """A path as text, and an address that became a `Path`, which has one slash of two, as it was typed."""
    return re.sub(r"^(https?):/+", r"\1://", os.fspath(path))


def hub_name(path: str | os.PathLike[str]) -> Finding | None:
    """The finding about a hub id, or a published checkpoint's name, that was given as a path; None for a mere path."""
    typed = as_typed(path)
    name, _, revision = (repository := _HUB_URL.sub("", typed)).partition("@")
    published = json.loads(Path(__file__).with_name("zoo.json").read_text(encoding="utf-8"))["checkpoints"]
    if name in published and not revision:
        what = "a published checkpoint's name"
    elif REPOSITORY.fullmatch(name) and not os.path.isdir(name.partition("/")[0]):
        what = "a hub id"
    else:
        return None
    from huggingface_hub import constants, try_to_load_from_cache

    cached = (
        try_to_load_from_cache(name, "config.json", constants.HF_HUB_CACHE, revision or None) if "/" in name else ""
    )
    local = Path("checkpoints") / name
    copy = str(local) if local.is_dir() else str(Path(cached).parent) if isinstance(cached, str) and cached else ""
    download = f"if it is {what}, `fastvlm download {repository}` downloads it to checkpoints/{name}"
    remedy = f"it is on this machine: give {copy}" if copy else download
    return Finding("path-is-hub-id", typed, what if copy else "no such folder", "a folder", remedy)
