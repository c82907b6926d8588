"""What a path is when it is not what was asked for: adapters, shards, other formats, caches, a hub id; and the remedy.

Names of files and tensors and a key of the small JSON files decide, never weights. The rules are data:
folder_kinds.json. Nothing imports torch here.
"""

import json
import os
import re
import shlex
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Any

from fastvlm.checkpoint.exported import recognise
from fastvlm.common.documents import Unreadable, load
from fastvlm.common.files import is_macs
from fastvlm.common.findings import Finding

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
    """What a folder is. `evidence`: the file, key or tensor that shows it; `base`: an adapter's, as it names it."""

    name: str
    path: Path
    what: str
    evidence: str
    remedy: str
    base: str | None = None

    def finding(self, expected: str = CHECKPOINT) -> Finding:
        """For someone who was asked for a checkpoint, or an artefact."""
        got = f"{self.what} (it has {self.evidence})"
        return Finding(f"folder-is-{self.name}", str(self.path), got, expected, self.remedy)


@cache
def _rules() -> dict[str, Any]:
    document: dict[str, Any] = json.loads(Path(__file__).with_name("folder_kinds.json").read_text(encoding="utf-8"))
    return document


def identify(path: Path, config: Any = None, tensors: Collection[str] = ()) -> FolderKind | None:
    """The kind of the folder by what is known of it, None if no rule's evidence is all there.

    `config` is its config.json, `tensors` the names in its weight files, as far as they were read.
    """
    if (made := recognise(path)) is not None:
        name = "artefact" if made.ours else "artefact-elsewhere"
        uses = "model_export inspect and generate, benchmarks, app_bridge validate, plan and bundle take it"
        return FolderKind(name, path, made.name, made.holds, uses)
    names = _names(path)
    weights = bool(_first(names, _rules()["weights"]))
    for rule in _rules()["kinds"]:
        if rule.get("without_weights") and weights:
            continue
        evidence = [_evidence(path, names, config, tensors, key, rule[key]) for key in _EVIDENCE if key in rule]
        if all(evidence) and not _first(tensors, rule.get("no_tensors", ())):
            return _kind(rule, path, next(one for one in evidence if one), names)
    return None


def _evidence(path: Path, names: Collection[str], config: Any, tensors: Collection[str], key: str, value: Any) -> str:
    """What of the folder meets one condition of a rule, "" if nothing does."""
    if key == "files":
        return _first(names, value) or next((one for one in value if "/" in one and any(path.glob(one))), "")
    if key == "all_files":
        return " and ".join(value) if set(value) <= set(names) else ""
    if key == "config":
        found = config.get(value) if isinstance(config, Mapping) else None
        return f"{value} in config.json" if isinstance(found, Mapping) else ""
    first = _first(tensors, value)
    return f"the tensor {first}" if first else ""


def _first(names: Collection[str], patterns: Collection[str]) -> str:
    return next((name for pattern in patterns for name in sorted(names) if fnmatchcase(name, pattern)), "")


def _names(path: Path) -> frozenset[str]:
    try:
        return frozenset(name for name in os.listdir(path) if not is_macs(name))
    except OSError:  # whoever reads the folder says so
        return frozenset()


def _kind(rule: Mapping[str, Any], path: Path, found: str, names: Collection[str]) -> FolderKind:
    base = _base(path) if "adapter_config.json" in names else None
    words = {
        "path": shlex.quote(str(path)),
        "text": json.dumps(str(path), ensure_ascii=False),
        "inside": shlex.quote(str(path / found)),
        "base": base or "the model that it was trained on",
        "of": f" of {base}" if base else "",
        "snapshot": _snapshots(path),
    }
    what, remedy = (rule[key].format(**words) for key in ("what", "remedy"))
    return FolderKind(rule["name"], path, what, found, remedy, base)


def _base(path: Path) -> str | None:
    """The model that an adapter says it was trained on."""
    said = _small_json(path / "adapter_config.json")
    found = [said.get(key) for key in _BASE_KEYS] if isinstance(said, dict) else []
    return next((one[:200] for one in found if isinstance(one, str) and one), None)


def _small_json(file: Path) -> Any:
    """A JSON document of ordinary size, None for whatever else is there."""
    try:
        return load(file, _JSON_LIMIT)
    except Unreadable:
        return None


# --- the hub's cache and its ids -------------------------------------------------------------------------------------


def snapshot(repository: Path, revision: str = "main") -> Path | None:
    """The snapshot in the hub cache's folder of a repository that `revision` (a branch or a commit) stands for."""
    reference = repository / "refs" / revision
    commit = revision
    if reference.is_file() and reference.stat().st_size <= 100:
        commit = reference.read_text(encoding="utf-8", errors="replace").strip()
    found = repository / "snapshots" / commit
    return found if re.fullmatch(r"[\w.-]*\w[\w.-]*", commit) and found.is_dir() else None


def _snapshots(path: Path) -> str:
    """What to give instead of a folder of the hub's cache."""
    if path.name.startswith("models--") or (path / "snapshots").is_dir():
        inner = snapshot(path)
        if inner:
            return f"give its snapshot: {inner}"
        return f"it has no snapshot of refs/main: {_download(_id_of(path) or 'ORG/NAME')}"
    found = sorted(one for pattern in ("models--*", "hub/models--*") for one in path.glob(pattern))
    held = [str(inner) for one in found if (inner := snapshot(one))]
    more = f" and {len(held) - _SHOWN} more" if len(held) > _SHOWN else ""
    return f"give one snapshot of those in it: {', '.join(held[:_SHOWN])}{more}" if held else "it has no snapshots"


def _id_of(repository: Path) -> str | None:
    name = repository.name.removeprefix("models--").replace("--", "/")
    return name if REPOSITORY.fullmatch(name) else None


def _download(name: str) -> str:
    return f"`python -m fastvlm download {name}` downloads it to checkpoints/{name.partition('@')[0]}"


def instead_of_artefact(path: Path) -> Finding | None:
    """The finding about a path that was given as an artefact and is none, None if nothing is known of it."""
    if not path.exists():
        return hub_name(path)
    config = _small_json(path / "config.json")
    kind = identify(path, config)
    if kind is not None:
        return kind.finding(ARTEFACT)
    if isinstance(config, dict) and _first(_names(path), _rules()["weights"]):
        export = f"python -m model_export all --checkpoint {shlex.quote(str(path))} --output-dir OUT"
        got = f"{CHECKPOINT}, without export.json"
        return Finding("folder-is-checkpoint", str(path), got, ARTEFACT, f"export it: `{export}`")
    return None


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
    from huggingface_hub import constants

    cached = snapshot(Path(constants.HF_HUB_CACHE) / f"models--{name.replace('/', '--')}", revision or "main")
    here = next((str(one) for one in (Path("checkpoints") / name, cached) if one is not None and one.is_dir()), None)
    remedy = f"it is on this machine: give {here}" if here else f"if it is {what}, {_download(repository)}"
    return Finding("path-is-hub-id", typed, what if here else "no such folder", "a folder", remedy)
