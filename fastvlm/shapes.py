"""The names and shapes of a model's tensors."""

import copy
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastvlm import naming
from fastvlm.configuration import ModelConfig, hf_config_of

if TYPE_CHECKING:
    from transformers import FastVlmConfig, FastVlmForConditionalGeneration


def skeleton(config: "FastVlmConfig") -> "FastVlmForConditionalGeneration":
    """The model on the meta device: names and shapes, no memory."""
    import torch
    from transformers import FastVlmForConditionalGeneration, TimmWrapperConfig

    config = copy.deepcopy(config)
    vision: Any = config.vision_config
    fields = ("architecture", "do_pooling", "global_pool", "num_labels", "hidden_size", "model_args")
    config.vision_config = TimmWrapperConfig(**{name: getattr(vision, name) for name in fields})
    with torch.device("meta"):
        return FastVlmForConditionalGeneration(config)


def shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name -> shape of Transformers' FastVLM, but for what inference ignores.

    For the published vision tower without PyTorch, Transformers and timm, whose imports cost 5 s and 0.7 GB.
    """
    if set(model.vision_args) - {"inference_mode"}:
        state = skeleton(hf_config_of(model)).state_dict()
        return {name: tuple(tensor.shape) for name, tensor in state.items() if not naming.is_ignored(name)}
    text = model.text
    rest = language_shapes(
        hidden=text.hidden_size,
        inner=text.intermediate_size,
        heads=text.num_attention_heads,
        kv_heads=text.num_key_value_heads or text.num_attention_heads,
        head=text.head_dim or text.hidden_size // text.num_attention_heads,
        layers=text.num_hidden_layers,
        vocab=text.vocab_size,
        features=model.vision_width,
        bias=model.multimodal_projector_bias,
    )
    tower = tower_shapes("folded" if model.vision_args["inference_mode"] else "training")
    return {naming.VISION + name: shape for name, shape in tower.items()} | rest


def tower_shapes(form: str) -> dict[str, tuple[int, ...]]:
    """Name in timm -> shape of the published vision tower, `folded` or in `training` form."""
    table = json.loads(Path(__file__).with_name("fastvithd.json").read_text(encoding="utf-8"))
    return {name: tuple(shape) for name, shape in table[form].items()}


def language_shapes(
    hidden: int, inner: int, heads: int, kv_heads: int, head: int, layers: int, vocab: int, features: int, bias: bool
) -> dict[str, tuple[int, ...]]:
    """Name -> shape of a Qwen2 of these sizes with its lm_head, and of the projector (`bias`: with biases) before it.

    `head` is the width of one of `heads`, `features` that of the encoder's output.
    """
    queries, keys = heads * head, kv_heads * head
    found: dict[str, tuple[int, ...]] = {
        naming.EMBEDDINGS: (vocab, hidden),
        naming.LANGUAGE + "norm.weight": (hidden,),
        naming.LM_HEAD: (vocab, hidden),
        naming.PROJECTOR + "linear_1.weight": (hidden, features),
        naming.PROJECTOR + "linear_2.weight": (hidden, hidden),
    }
    if bias:
        found |= {f"{naming.PROJECTOR}linear_{number}.bias": (hidden,) for number in (1, 2)}
    layer: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
        "self_attn.o_proj.weight": (hidden, queries),
        "mlp.gate_proj.weight": (inner, hidden),
        "mlp.up_proj.weight": (inner, hidden),
        "mlp.down_proj.weight": (hidden, inner),
    }
    for name, rows in (("q", queries), ("k", keys), ("v", keys)):
        layer |= {f"self_attn.{name}_proj.weight": (rows, hidden), f"self_attn.{name}_proj.bias": (rows,)}
    for number in range(layers):
        found |= {f"{naming.LANGUAGE}layers.{number}.{name}": shape for name, shape in layer.items()}
    return found
