"""A checkpoint and an adapter written as one checkpoint, in the base's layout and names, some rows at a time."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastvlm.checkpoint import naming
from fastvlm.checkpoint.adapter import Adapter
from fastvlm.checkpoint.checkpoint import Checkpoint
from fastvlm.checkpoint.weights import TensorInfo
from fastvlm.common.documents import dump, load_object
from fastvlm.common.dtypes import ITEMSIZE, LARGEST, kind_of
from fastvlm.common.errors import UserError
from fastvlm.common.files import read_small, small_files
from fastvlm.common.staging import staged
from fastvlm.common.version import VERSION
from fastvlm.data import default_questions
from model_export import artefact
from model_export.language.tensor_file import TensorFile
from quantization.mlx.casting import cast

RECORD = "merge.json"  # what was merged; a folder with it may be replaced by --overwrite
_CHUNK = 1 << 22  # values that are read, merged, converted and written at a time
_TOKENIZER = {
    "tokenizer.json", "vocab.json", "merges.txt", "added_tokens.json", "special_tokens_map.json",
    "tokenizer_config.json", "chat_template.jinja", "chat_template.json", "tokenizer.model",
}  # fmt: skip
_PROCESSOR = {"preprocessor_config.json", "processor_config.json"}
_QUESTIONS = (default_questions.EVALUATION, default_questions.TRAINING)
# What the base's folder or the adapter's may have besides, and no checkpoint needs.
_LEFT = ("*.index.json", "adapter_config.json", "export.json", RECORD)


@dataclass(frozen=True)
class Merge:
    """What will be written: each weight file's tensors (canonical name -> dtype), and the small files' sources."""

    checkpoint: Checkpoint
    files: dict[str, dict[str, str]]
    small: dict[str, Path]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(
            ITEMSIZE[dtype] * math.prod(shape_of(self.checkpoint.tensors[name]))
            for tensors in self.files.values()
            for name, dtype in tensors.items()
        )

    def document(self) -> dict[str, Any]:
        """What is merged, as JSON-ready data."""
        adapter = self.checkpoint.adapter
        assert adapter is not None
        changed = sum(_is_changed(info, adapter) for info in self.checkpoint.tensors.values())
        return {
            "made_by": f"fastvlm {VERSION}",
            "base": self.checkpoint.path.resolve().name,
            "adapter": artefact.adapter_facts(adapter),
            "tensors": len(self.checkpoint.tensors),
            "changed_tensors": changed,
            "files": sorted(self.files),
            "bytes": self.nbytes,
            "warnings": list(self.checkpoint.warnings),
        }


def _is_changed(info: TensorInfo, adapter: Adapter) -> bool:
    return info.change is not None or info.file in adapter.files


def shape_of(info: TensorInfo) -> tuple[int, ...]:
    """A tensor's shape without the row that is added for the image token, which whoever reads the folder adds again."""
    return (info.shape[0] - 1, *info.shape[1:]) if info.extended else info.shape


def plan(checkpoint: Checkpoint, dtype: str | None = None) -> Merge:
    """Decide the files of the merged checkpoint: as many shards as the base has, of about one size.

    `dtype` is that of every tensor; None: the base's own, where the adapter changes one, that of most of the base's.
    """
    adapter = checkpoint.adapter
    assert adapter is not None
    dtypes = {}
    for name, info in checkpoint.tensors.items():
        dtypes[name] = dtype or (checkpoint.dtype if _is_changed(info, adapter) else info.dtype)
    sizes = {name: ITEMSIZE[dtypes[name]] * math.prod(shape_of(checkpoint.tensors[name])) for name in dtypes}
    shards, total = len(checkpoint.files) - len(adapter.files), sum(sizes.values())
    parts: list[dict[str, str]] = [{} for _ in range(shards)]
    done = 0
    for name, size in sizes.items():
        parts[min(shards - 1, done * shards // total)][name] = dtypes[name]
        done += size
    parts = [part for part in parts if part]
    count = len(parts)
    names = [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
    files = dict(zip(names if count > 1 else ["model.safetensors"], parts, strict=True))
    return Merge(checkpoint, files, _small(checkpoint))


def _small(checkpoint: Checkpoint) -> dict[str, Path]:
    """The small files by name: the base's, but the adapter's tokenizer and processor where it brings them."""
    adapter = checkpoint.adapter
    assert adapter is not None
    chosen = {path.name: path for path in small_files(checkpoint.path) if not any(map(path.match, _LEFT))}
    for kind, names in (("tokenizer", _TOKENIZER), ("processor", _PROCESSOR)):
        if kind in adapter.brings:
            chosen = {name: path for name, path in chosen.items() if name not in names}
            chosen |= {path.name: path for path in small_files(adapter.path) if path.name in names}
    chosen = {name: path for name, path in chosen.items() if name not in _QUESTIONS}  # of another fine-tune
    chosen |= {path.name: path for path in small_files(adapter.path) if path.name in _QUESTIONS}
    chosen.pop("config.json", None)
    return chosen


def check_target(target: Path, overwrite: bool) -> None:
    """Refuse a target that is there, but for a merged checkpoint with `overwrite`."""
    artefact.check_replaced(target, overwrite, RECORD, "merged checkpoint")


def write(
    merge: Merge, target: Path, overwrite: bool = False, advance: Callable[[int], Any] | None = None
) -> dict[str, Any]:
    """Write the merged checkpoint whole or not at all, and return its record. `advance(n)` after every n bytes.

    Raises UserError where a value is too large for its type.
    """
    checkpoint, adapter = merge.checkpoint, merge.checkpoint.adapter
    assert adapter is not None
    name = naming.to_llava if checkpoint.layout == "llava_qwen2" else str
    with staged(target, replace=overwrite) as folder:
        large = []
        for file, dtypes in merge.files.items():
            specs = {name(tensor): (dtype, shape_of(checkpoint.tensors[tensor])) for tensor, dtype in dtypes.items()}
            with TensorFile(folder / file, specs, made_for="pt") as output:
                large += _stream(checkpoint, dtypes, output, name, advance)
            checkpoint.unmap()
        if large:
            raise UserError(f"{', '.join(large[:5])}: values beyond the type: choose --dtype bfloat16 or float32")
        if len(merge.files) > 1:
            weight_map = {name(tensor): file for file, dtypes in merge.files.items() for tensor in dtypes}
            index = {"metadata": {"total_size": merge.nbytes}, "weight_map": dict(sorted(weight_map.items()))}
            dump(folder / "model.safetensors.index.json", index)
        for small, source in merge.small.items():
            (folder / small).write_bytes(read_small(source))
        dump(folder / "config.json", _config(merge))
        change = f"{adapter.kind}: the adapter {adapter.path.resolve().name} was merged into the weights, in float32."
        artefact.carry_licences(checkpoint.path, folder, [change], adapter.path)
        document = merge.document()
        hashes = {file.name: artefact.hash_file(file) for file in adapter.files}
        dump(folder / RECORD, document | {"adapter_files": hashes})
    return document


def _stream(
    checkpoint: Checkpoint,
    dtypes: Mapping[str, str],
    output: TensorFile,
    rename: Callable[[str], str],
    advance: Callable[[int], Any] | None,
) -> list[str]:
    """Write the tensors of one file; returns the names of those with values that their type can't hold."""
    large = []
    for name, dtype in dtypes.items():
        shape = shape_of(checkpoint.tensors[name])
        rows = shape[0] if shape else 1
        step = max(1, _CHUNK * rows // max(1, math.prod(shape)))
        for start in range(0, rows, step):
            values = checkpoint.rows(name, start, min(start + step, rows))
            if kind_of(values) != dtype:
                values, largest = cast(values, dtype)
                if not largest <= LARGEST[dtype]:
                    large.append(name)
            output.write(rename(name), values, start)
            if advance is not None:
                advance(values.nbytes)
    return list(dict.fromkeys(large))


def _config(merge: Merge) -> dict[str, Any]:
    """config.json as it was read, with what the merge made of it."""
    checkpoint = merge.checkpoint
    document = load_object(checkpoint.config_path)
    for key in ("quantization_config", "quantization"):  # how an adapter's base was loaded while it was trained
        document.pop(key, None)
    llava = checkpoint.layout == "llava_qwen2"
    text = document if llava else document.setdefault("text_config", {})
    text["vocab_size"] = shape_of(checkpoint.tensors[naming.EMBEDDINGS])[0]
    for level in (document, text):
        if level.get("tie_word_embeddings", False) != checkpoint.tied:
            level["tie_word_embeddings"] = checkpoint.tied
    kinds = {dtype for dtypes in merge.files.values() for dtype in dtypes.values()}
    for level in (document, text):
        for key in {"dtype", "torch_dtype"} & level.keys() if len(kinds) == 1 else ():
            level[key] = min(kinds)
    if not llava:
        vision = document.setdefault("vision_config", {})
        vision["model_args"] = {**(vision.get("model_args") or {}), "inference_mode": checkpoint.form == "folded"}
    return document
