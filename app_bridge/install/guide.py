"""bundle.json: what an app of one's own has to do with the model beside it."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from app_bridge import licence
from app_bridge.app import facts, packages
from fastvlm.common.documents import load_object
from fastvlm.data.prompt import render_prompt
from model_export import contract

NAME = "bundle.json"
FORMAT, FORMAT_VERSION = "fastvlm-bundle", 1


def own_app() -> facts.AppFacts:
    """Return what every app has to do: the published app's facts without its fixed shapes, with the newest packages."""
    newest = json.loads(packages.TABLE.read_text(encoding="utf-8"))["sets"][-1]["pins"]
    return replace(
        facts.table(),
        input_shape=(1, 3, None, None),
        output_shape=(1, None, None),
        packages=tuple(facts.Package(name, "", "exactVersion", version) for name, version in newest.items()),
        api=(),
    )


def guide(artefact: Path, manifest: Mapping[str, Any], wanted: facts.AppFacts) -> dict[str, Any]:
    """Return the content of bundle.json. Shapes as Core ML has them; sizes in pixels."""
    config = load_object(artefact / contract.CONFIG)
    pixels = load_object(artefact / contract.PREPROCESSOR_CONFIG)
    image, channels, token = manifest["image"], manifest["vision"]["channels"], wanted.image_token

    def feature(name: str, dtype: str, shape: tuple[int, ...]) -> dict[str, Any]:
        return {"name": name, "dtype": dtype, "shape": list(shape)}

    functions = {
        name: {
            "input": feature(wanted.input_name, wanted.input_dtype, contract.input_shape(size)),
            "output": feature(wanted.output_name, wanted.output_dtype, contract.output_shape(size, channels)),
        }
        for name, size in contract.functions(
            manifest["vision"]["image_size"], manifest["config"]["resolutions"]
        ).items()
    }
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "core_ml": {
            "package": contract.PACKAGE,
            "class": f"{wanted.model_class}, which Xcode makes from the package's name",
            "minimum_deployment_target": manifest["config"]["minimum_deployment_target"],
            "functions": functions,
        },
        "preprocessing": {
            "image_strategy": image["image_strategy"],
            "size": image["image_size"],
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
        },
        "prompt": {
            "image_token": token,
            "image_token_index": config["image_token_index"],
            "image_tokens": image["tokens_per_image"],
            "text": render_prompt("{question}"),
            "do": f"replace {token} by that many image tokens, and their embeddings by the projected image features",
        },
        "licence": licence.research_term(artefact),
    }
