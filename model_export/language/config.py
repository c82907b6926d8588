"""config.json of an artefact: what the demo app decodes and what the MLX loaders read, from a checked checkpoint."""

from typing import Any

from fastvlm.checkpoint.checkpoint import Checkpoint
from fastvlm.checkpoint.configuration import loader_faults
from fastvlm.common.errors import UserError
from fastvlm.data.prompt import eos_ids
from model_export import contract

# LLaVA's value for pictures that are cropped, not padded: anything but "pad" (llava/mm_utils.py, process_images)
_ASPECT_RATIOS = {"pad": "pad", "center_crop": "square"}
# The rotary position encodings that a layout's loaders compute as Transformers does, and what they read of each. The
# demo app's decoder has none but the plain one, whatever config.json says; mlx-vlm's reads `rope_scaling`.
_MLX_ROPES: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "mscale", "mscale_all_dim"),
}
_ROPES: dict[str, dict[str, tuple[str, ...]]] = {
    "app": {"default": ()},
    "mlx-vlm": _MLX_ROPES,
    "mlx-lm": _MLX_ROPES,
}
_PROMPT_LIMIT = 8192  # tokens; mlx-vlm cuts longer prompts (apple/FastVLM-*: tokenizer_model_max_length)


def language_config(checkpoint: Checkpoint, layout: str) -> dict[str, Any]:
    """The document without its `quantization` block. UserError with everything that these loaders don't compute."""
    text = checkpoint.model_config.text
    scaling = _rope_scaling(checkpoint, layout)
    eos = sorted(int(token) for token in eos_ids(checkpoint.tokenizer(), text.eos_token_id))
    text_alone = layout == "mlx-lm"
    document = scaling | {
        "architectures": [contract.TEXT_ARCHITECTURE if text_alone else "LlavaQwen2ForCausalLM"],
        "model_type": contract.TEXT_MODEL_TYPE if text_alone else contract.MODEL_TYPE,
        "vocab_size": text.vocab_size,
        "hidden_size": text.hidden_size,
        "intermediate_size": text.intermediate_size,
        "num_hidden_layers": text.num_hidden_layers,
        "num_attention_heads": text.num_attention_heads,
        "num_key_value_heads": text.num_key_value_heads,
        "hidden_act": text.hidden_act,
        "rms_norm_eps": float(text.rms_norm_eps),
        "rope_theta": float(text.rope["rope_theta"]),
        "max_position_embeddings": text.max_position_embeddings,
        "tie_word_embeddings": checkpoint.tied,
        "bos_token_id": text.bos_token_id,
        "eos_token_id": eos[0] if len(eos) == 1 else eos,
    }
    if text_alone:
        return document
    return document | {
        "image_token_index": contract.MLX_VLM_IMAGE_TOKEN if layout == "mlx-vlm" else checkpoint.image_token_id,
        "image_aspect_ratio": _ASPECT_RATIOS[checkpoint.image_strategy],
        "mm_hidden_size": checkpoint.model_config.vision_width,
        "mm_projector_type": "mlp2x_gelu",
        "mm_use_im_start_end": False,
        "mm_vision_tower": f"mobileclip_l_{checkpoint.image_size}",
        "tokenizer_model_max_length": min(_PROMPT_LIMIT, text.max_position_embeddings),
    }


def _rope_scaling(checkpoint: Checkpoint, layout: str) -> dict[str, Any]:
    """`rope_scaling`, where there is one. UserError with everything that the layout's loaders don't compute."""
    text = checkpoint.model_config.text
    rope = {key: value for key, value in text.rope.items() if key not in ("rope_type", "rope_theta")}
    kind, read = text.rope["rope_type"], _ROPES[layout]
    faults = loader_faults(checkpoint.model_config, read)
    other = sorted(set(rope) - set(read.get(kind, rope)))
    if other:
        faults.append(f"rotary position encoding {kind!r} has {', '.join(other)}, which {layout} doesn't read")
    if faults:
        what = "; ".join(faults)
        raise UserError(f"cannot export {checkpoint.path}: the demo app or the MLX loaders don't run it: {what}")
    if not (rope.get("mscale") and rope.get("mscale_all_dim")):  # Transformers takes both or neither
        rope = {key: value for key, value in rope.items() if not key.startswith("mscale")}
    return {} if kind == "default" else {"rope_scaling": {"type": kind, "rope_type": kind, **rope}}
