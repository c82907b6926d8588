"""An artefact without export.json, as Apple's ready-made models and mlx-vlm's converter have it, described from its own
bytes in the terms of a manifest. What only a manifest has is left out, as `UNKNOWN` notes.
"""

import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fastvlm.checkpoint.exported import BUNDLE, Exported
from fastvlm.common.documents import Unreadable, load_object
from fastvlm.common.errors import UserError
from fastvlm.data.preprocessing import read_preprocessor
from model_export import contract, encoder_forms

UNKNOWN = ("the checkpoint it was made from", "the recipe", "the proof against the checkpoint", "its files' sha256")
_BUILT_WITH = {6: "iOS15", 7: "iOS16", 8: "iOS17", 9: "iOS18", 10: "iOS26"}  # specification -> deployment target


def listed(folder: Path, exported: Exported, ignored: Iterable[str]) -> dict[str, Any]:
    """The files (without `ignored` and hidden ones), the halves and the layout; nothing is opened.

    UserError for links that leave the folder, but into the hub cache's own blobs.
    """
    root = folder.resolve()
    inside = (root, root.parent.parent / "blobs")
    files, outside = {}, []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_dir() or name.split("/")[0] in ignored or any(part.startswith(".") for part in name.split("/")):
            continue
        target = Path(os.path.realpath(path))
        if path.is_symlink() and not (target.is_file() and any(map(target.is_relative_to, inside))):
            outside.append(name)
        files[name] = {"size": target.stat().st_size if target.exists() else 0}
    if outside:
        raise UserError(f"{folder}: links out of the folder: {', '.join(outside)}: put the files there instead")
    weights = [name for name in files if name.endswith(".safetensors")]
    made = {"format": "coreai"} if exported.layout == "coreai" else {}
    return {
        "parts": list(exported.parts),
        "config": {"layout": exported.layout, **made},
        "llm": {"layout": exported.layout, "files": weights},
        "files": files,
        "unknown": list(UNKNOWN),
    }


def described(folder: Path, document: dict[str, Any]) -> dict[str, Any]:
    """`listed`'s document with what the package and the weights say. UserError for a half that can't be read."""
    whole = dict(document)
    if document["config"].get("format") == "coreai":
        return whole | _of_metadata(folder)
    if "vision" in document["parts"]:
        whole |= _of_package(folder, document["config"])
    if "llm" in document["parts"]:
        whole["llm"] = document["llm"] | _of_weights(folder)
    return whole


def _of_metadata(folder: Path) -> dict[str, Any]:
    path = folder / BUNDLE
    try:
        vision = load_object(path)["vision"]
        names = {
            "image_size": "image_size",
            "image_strategy": "image_strategy",
            "image_token_count": "tokens_per_image",
        }
        return {"image": {ours: vision[theirs] for theirs, ours in names.items()}}
    except (Unreadable, KeyError, TypeError) as error:
        raise UserError(f"{path}: {error} is missing or wrong: `fastvlm validate {folder}` says all") from None


def _of_package(folder: Path, config: dict[str, Any]) -> dict[str, Any]:
    from model_export.mil import MILError, read_package

    package = folder / contract.PACKAGE
    try:
        program = read_package(package)
        function = program.functions[program.default_function]
        (_, _, side, _), (_, tokens, channels) = (
            function.described_inputs[contract.INPUT].shape,
            function.described_outputs[contract.OUTPUT].shape,
        )
    except MILError as error:
        raise UserError(f"{package}: {error}" if str(package) not in str(error) else str(error)) from None
    except (KeyError, ValueError):
        raise UserError(
            f"{package}: is not a FastVLM encoder: expected {contract.INPUT} [1, 3, S, S] in and {contract.OUTPUT}"
            " [1, tokens, channels] out"
        ) from None
    types = (item.type for operation in function.block.operations for item in operation.outputs)
    half = any(type_ is not None and type_.dtype == "fp16" for type_ in types)
    compressed = any(operation.type.startswith("constexpr_") for operation in function.block.operations)
    return {
        "config": config
        | {
            "compute_precision": "float16" if half else "float32",
            "minimum_deployment_target": _BUILT_WITH.get(program.specification_version),
            "resolutions": [],
            "vision_quant": "compressed" if compressed else encoder_forms.NONE,
        },
        "image": {
            "image_size": side,
            "image_strategy": read_preprocessor(folder).image_strategy,
            "tokens_per_image": tokens,
        },
        "vision": {"image_size": side, "resolutions": [side], "channels": channels},
    }


def _of_weights(folder: Path) -> dict[str, Any]:
    from model_export.stored import StoredTensors

    stored = StoredTensors(folder)
    parameters = sum(math.prod(stored.shape(name)) for name in stored.names())
    size = stored.nbytes()
    return {
        "stored_as": stored.label,
        "parameters": parameters,
        "bytes": size,
        "bits_per_weight": round(8 * size / max(parameters, 1), 3),
        "quantization": stored.quantization or None,
    }
