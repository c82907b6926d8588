"""A line about a model folder, whoever made it: published size, recipe, bytes, when it was last written."""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.estimate.devices import facts
from fastvlm.common.documents import object_or_empty
from fastvlm.common.units import format_bytes
from model_export import contract
from quantization.catalogue import SIZES


def describe(folder: Path) -> dict[str, Any]:
    """Return {"name", "recipe", "bytes", "written"} as far as the folder tells; without torch, which takes seconds."""
    paths = [path for path in folder.rglob("*") if not path.is_dir() or path.is_symlink()] or [folder]
    stats = [path.lstat() for path in paths]
    config, manifest = object_or_empty(folder / contract.CONFIG), object_or_empty(folder / contract.MANIFEST)
    shape = f"{config.get('num_hidden_layers')} layers of {config.get('hidden_size')}"
    sizes = {
        "{layers} layers of {hidden}".format(**facts("published.json")["languages"][f"qwen2-{key}"]): name
        for key, name in SIZES.items()
    }
    name = f"FastVLM {sizes[shape]}" if shape in sizes else shape
    try:
        recipe = f"{manifest['llm']['recipe']['name']}, encoder {manifest['config']['vision_quant']}"
    except (KeyError, TypeError):
        quantization = config.get("quantization")
        stored = contract.stored_as(quantization) if isinstance(quantization, dict) and "bits" in quantization else None
        recipe = f"{stored or 'not quantized'}, no {contract.MANIFEST}" if config else "unknown"
    return {
        "name": name if "hidden_size" in config else "no model that we know",
        "recipe": recipe,
        "bytes": sum(stat.st_size for stat in stats),
        "written": time.strftime("%Y-%m-%d %H:%M", time.localtime(max(stat.st_mtime for stat in stats))),
    }


def line(described: Mapping[str, Any]) -> str:
    """Return `describe`'s answer as one line."""
    return f"{described['name']}, {described['recipe']}, {format_bytes(described['bytes'])}, of {described['written']}"
