"""What an app of one's own has to do with a bundle: a short JSON beside the model, from the artefact and the facts."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from app_bridge import licence
from app_bridge.facts import AppFacts
from fastvlm.prompt import render_prompt
from model_export import contract

NAME = "bundle.json"
FORMAT, FORMAT_VERSION = "fastvlm-bundle", 1


def guide(artefact: Path, manifest: Mapping[str, Any], wanted: AppFacts) -> dict[str, Any]:
    """As JSON. Shapes in rows, columns order as Core ML and MLX have them; sizes in pixels."""
    config = json.loads((artefact / contract.CONFIG).read_text(encoding="utf-8"))
    pixels = json.loads((artefact / contract.PREPROCESSOR_CONFIG).read_text(encoding="utf-8"))
    functions = contract.functions(manifest["vision"]["image_size"], manifest["config"]["resolutions"])
    channels, token = manifest["vision"]["channels"], wanted.image_token
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "core_ml": {
            "package": contract.PACKAGE,
            "class": f"{wanted.model_class}, which Xcode makes from the package's name",
            "minimum_deployment_target": manifest["config"]["minimum_deployment_target"],
            "functions": {
                name: {
                    "input": _feature(wanted.input_name, wanted.input_dtype, contract.input_shape(size)),
                    "output": _feature(wanted.output_name, wanted.output_dtype, contract.output_shape(size, channels)),
                }
                for name, size in functions.items()
            },
        },
        "preprocessing": {
            "image_strategy": manifest["image"]["image_strategy"],
            "size": manifest["image"]["image_size"],
            "mean": pixels["image_mean"],
            "std": pixels["image_std"],
            "pixels": "RGB, planes first, bicubic, divided by 255, then (x - mean) / std",
        },
        "language_model": {
            "files": manifest["llm"]["files"],
            "keys": {
                "decoder": f"{contract.LANGUAGE_PREFIX}* (Qwen2's names)",
                "projector": [*contract.PROJECTOR_KEYS, "a GELU between the two layers"],
            },
            "quantization": config.get("quantization"),
            "checked_for": {package.name: package.minimum for package in wanted.packages},
            "config": {key.path: key.type for key in wanted.config if key.required and "." not in key.path},
        },
        "prompt": {
            "image_token": token,
            "image_token_index": config["image_token_index"],
            "image_tokens": manifest["image"]["tokens_per_image"],
            "text": render_prompt("{question}"),
            "do": f"replace {token} by that many image tokens, and their embeddings by the projected image features",
            "demo_app": "puts them after the question, without the line break",
        },
        "licence": licence.term(artefact),
    }


def _feature(name: str, dtype: str, shape: tuple[int, ...]) -> dict[str, Any]:
    return {"name": name, "dtype": dtype, "shape": list(shape)}
