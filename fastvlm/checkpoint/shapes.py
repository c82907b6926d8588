"""The names and shapes of a model's tensors."""

import copy
import itertools
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastvlm.checkpoint import naming
from fastvlm.checkpoint.configuration import ModelConfig, hf_config_of

if TYPE_CHECKING:
    from transformers import FastVlmConfig, FastVlmForConditionalGeneration


# FastViTHD's blocks and channels of each stage, and what of timm's arguments leaves a tower of that kind one.
_LAYERS, _WIDTHS = (2, 12, 24, 4, 2), (96, 192, 384, 768, 1536)
_SAME_KIND = {"inference_mode", "layers", "embed_dims", "layer_scale_init_value", "drop_path_rate", "proj_drop_rate"}
_HEAD = 32  # channels of an attention's head, in the last two stages


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

    For the published vision tower and others of its kind without PyTorch, Transformers and timm, whose imports cost 5 s
    and 0.7 GB. Raises whatever timm raises for widths that don't go together.
    """
    layers, widths = model.vision_args.get("layers", _LAYERS), model.vision_args.get("embed_dims", _WIDTHS)
    if set(model.vision_args) - _SAME_KIND or not _go_together(widths):
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
    tower = tower_shapes("folded" if model.vision_args["inference_mode"] else "training", layers, widths)
    return {naming.VISION + name: shape for name, shape in tower.items()} | rest


def tower_shapes(
    form: str, layers: Sequence[int] = _LAYERS, widths: Sequence[int] = _WIDTHS
) -> dict[str, tuple[int, ...]]:
    """Name in timm -> shape of a FastViTHD with so many blocks and channels a stage (default: the published one),
    `folded` or in `training` form. A stage's blocks are all alike, and its sizes multiples of its channels."""
    table = json.loads(Path(__file__).with_name("fastvithd.json").read_text(encoding="utf-8"))
    tower: dict[str, tuple[int, ...]] = {}
    for name, shape in table[form].items():
        place = re.match(r"stages\.(\d)\.(blocks\.(\d+)\.)?", name)
        stage = int(place[1]) if place else 0 if name.startswith("stem.") else -1
        part = 1 if name.startswith(("stem.", "stages.")) else 8  # behind the stages there is an eighth of their width
        old, new = _WIDTHS[stage] // part, widths[stage] // part
        sizes = tuple(size // old * new if size >= old else size for size in shape)  # smaller ones are kernels
        if place is None or place[2] is None:
            tower[name] = sizes
        elif place[3] == "0":
            rest = name[place.end() :]
            tower |= {f"stages.{stage}.blocks.{block}.{rest}": sizes for block in range(layers[stage])}
    return tower


def _go_together(widths: Sequence[int]) -> bool:
    """Whether a tower can have these channels: each stage a multiple of the one before, and of a head's."""
    multiples = all(after > before and after % before == 0 for before, after in itertools.pairwise(widths))
    return multiples and all(width % _HEAD == 0 for width in widths[-2:])


def language_shapes(
    hidden: int, inner: int, heads: int, kv_heads: int, head: int, layers: int, vocab: int, features: int, bias: bool
) -> dict[str, tuple[int, ...]]:
    """Name -> shape of a Qwen2 of these sizes with its lm_head, and of the projector (`bias`: with biases) before it.

    `head` is the width of one of `heads`, `features` that of the encoder's output.
    """
    queries, keys = heads * head, kv_heads * head
    model: dict[str, tuple[int, ...]] = {
        naming.EMBEDDINGS: (vocab, hidden),
        naming.LANGUAGE + "norm.weight": (hidden,),
        naming.LM_HEAD: (vocab, hidden),
        naming.PROJECTOR + "linear_1.weight": (hidden, features),
        naming.PROJECTOR + "linear_2.weight": (hidden, hidden),
    }
    if bias:
        model |= {f"{naming.PROJECTOR}linear_{number}.bias": (hidden,) for number in (1, 2)}
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
        model |= {f"{naming.LANGUAGE}layers.{number}.{name}": shape for name, shape in layer.items()}
    return model
