"""The bundle: three assets, the tokenizer, metadata.json, as Apple's Swift engine loads it."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastvlm.checkpoint import naming
from fastvlm.checkpoint.checkpoint import Checkpoint
from fastvlm.checkpoint.configuration import loader_faults
from fastvlm.common.errors import UserError
from fastvlm.data.prompt import CHAT_TEMPLATE
from model_export.contract import tokens_per_image
from model_export.coreai import contract
from model_export.coreai.contract import ASSETS as ASSETS
from model_export.coreai.contract import SUFFIX as SUFFIX
from model_export.coreai.packages import check_installed
from model_export.language.tokenizer import write_tokenizer
from quantization.coreai.forms import PLAIN
from quantization.coreai.plan import DECODER, EMBEDDING, VISION, Plan, stored_bytes


def shape_of(checkpoint: Checkpoint, max_context_length: int | None = None, grows: bool = False) -> contract.Shape:
    """The sizes of a checkpoint's bundle.

    Args:
        max_context_length: positions of the KV cache; None: `contract.DEFAULT_CONTEXT`, or all that the model has.
        grows: whether the engine enlarges the cache as it fills up.

    Raises:
        UserError: the context is longer than the model's positions, or too short for one picture.
    """
    text = checkpoint.model_config.text
    tokens, most = tokens_per_image(checkpoint.image_size), text.max_position_embeddings
    context = max_context_length or min(contract.DEFAULT_CONTEXT, most)
    if not tokens < context <= most:
        raise UserError(
            f"--max-context-length: got {context}, expected more than the {tokens} tokens of a picture,"
            f" and at most the language model's {most} positions"
        )
    heads = text.num_attention_heads
    return contract.Shape(
        image_size=checkpoint.image_size,
        image_tokens=tokens,
        hidden=text.hidden_size,
        vocabulary=text.vocab_size,
        layers=text.num_hidden_layers,
        kv_heads=text.num_key_value_heads or heads,
        head_dim=text.head_dim or text.hidden_size // heads,
        context=context,
        grows=grows,
    )


def check(checkpoint: Checkpoint) -> None:
    """Raise UserError with everything that the engine can't run of a checkpoint, before anything is converted."""
    check_installed()
    ropes = ("default", "linear", "llama3", "yarn")  # their frequencies don't depend on the prompt
    faults = loader_faults(checkpoint.model_config, ropes)
    tokenizer: Any = checkpoint.tokenizer()
    if checkpoint.image_token_id not in tokenizer.added_tokens_decoder:
        faults.append(f"image token {checkpoint.image_token_id} is no added token of the tokenizer")
    if contract.END_OF_TURN not in tokenizer.get_vocab():
        faults.append(f"the tokenizer has no {contract.END_OF_TURN}, at which the engine stops")
    if faults:
        raise UserError(f"cannot export {checkpoint.path}: Core AI's engine doesn't run it: {'; '.join(faults)}")


def write_files(checkpoint: Checkpoint, shape: contract.Shape, folder: Path) -> None:
    """Write the tokenizer and metadata.json into the bundle `folder`."""
    (folder / contract.TOKENIZER).mkdir()
    write_tokenizer(checkpoint, folder / contract.TOKENIZER, CHAT_TEMPLATE)
    document = metadata(checkpoint, shape)
    (folder / contract.METADATA).write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def metadata(checkpoint: Checkpoint, shape: contract.Shape) -> dict[str, Any]:
    """The document of metadata.json."""
    preprocessor = checkpoint.preprocessor
    return {
        "metadata_version": contract.METADATA_VERSION,
        "kind": contract.KIND,
        "name": contract.NAME,
        "assets": dict(contract.ASSETS),
        "language": {
            "tokenizer": contract.NAME,
            "vocab_size": shape.vocabulary,
            "max_context_length": shape.context,
            "embedded_tokenizer": True,
            "function_map": {"main": [contract.FUNCTION]},
        },
        "vision": {
            "image_size": shape.image_size,
            "patch_size": contract.PATCH_SIZE,
            "image_token_count": shape.image_tokens,
            "image_token_id": checkpoint.image_token_id,
            # The engine takes CLIP's where they are missing, and its own strategy.
            "image_mean": list(preprocessor.mean),
            "image_std": list(preprocessor.std),
            "rescale_factor": contract.RESCALE_FACTOR,
            "image_strategy": preprocessor.image_strategy,
            "include_image_info": False,
        },
    }


def planned_bytes(plan: Plan, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    """Asset -> its size in bytes, for forms of weights by the names that recipes have for them."""
    parts = {"main": DECODER, "embedding": EMBEDDING, "vision": VISION}
    return {
        contract.ASSETS[role]: stored_bytes(
            plan.forms, {name: shapes[name] for name in shapes if name.startswith(part)}
        )
        for role, part in parts.items()
    }


def language_facts(
    checkpoint: Checkpoint, shape: contract.Shape, recipe: Mapping[str, Any], plan: Plan, folder: Path
) -> dict[str, Any]:
    """The manifest's entry about the decoder and the embeddings."""
    files = [contract.ASSETS[role] for role in ("main", "embedding")]
    size = sum((folder / name / contract.PROGRAM).stat().st_size for name in files)
    named = (naming.LANGUAGE, naming.LM_HEAD)
    parameters = sum(info.size for name, info in checkpoint.tensors.items() if name.startswith(named))
    return {
        "files": files,
        "parameters": parameters,
        "recipe": dict(recipe),
        "bits_per_weight": round(8 * size / parameters, 2),
        "max_context_length": shape.context,
        "cache": "growing" if shape.grows else "fixed",
        "decisions": {
            part.rstrip("."): sorted({form.name for name, form in plan.forms.items() if name.startswith(part)})
            or [PLAIN]
            for part in (DECODER, EMBEDDING, VISION)
        },
        "uncompressed": dict(plan.kept),
    }
