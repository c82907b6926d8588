"""The model's configuration, by config.json's checked settings, under the names of Transformers' classes.

Transformers itself is asked only for what needs its word, a scaled rotary position encoding: it imports PyTorch.
"""

import copy
from collections.abc import Container, Iterator, Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import TYPE_CHECKING, Any

from fastvlm.checkpoint import layouts
from fastvlm.common.findings import Finding, Steps
from fastvlm.common.image_tokens import tokens_per_image
from fastvlm.data.preprocessing import size_in_config

if TYPE_CHECKING:
    from transformers import FastVlmConfig

_POSITIONS = 1 << 31  # a position's number is below
ARCHITECTURE = "fastvit_mci3"  # FastViTHD, by its name in timm
_ROPE_THETA = 10000.0  # Qwen2Config's default


@dataclass(frozen=True)
class TextConfig:
    """Those settings of Qwen2Config that inference uses, with its defaults."""

    vocab_size: int = 151936
    hidden_size: int = 4096
    intermediate_size: int = 22016
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    hidden_act: str = "silu"
    max_position_embeddings: int = 32768
    rms_norm_eps: float = 1e-6
    rope_parameters: Mapping[str, Any] | None = None
    use_sliding_window: bool = False
    sliding_window: int | None = 4096
    max_window_layers: int = 28
    layer_types: tuple[str, ...] | None = None
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None

    @property
    def rope(self) -> Mapping[str, Any]:
        """The rotary position encoding's parameters, `rope_type` and `rope_theta` among them."""
        assert self.rope_parameters is not None
        return self.rope_parameters


@dataclass(frozen=True)
class ModelConfig:
    """The whole model. `vision_args` are timm's arguments of the tower, `vision_width` is that of its output."""

    text: TextConfig
    vision_args: Mapping[str, Any]
    vision_width: int
    image_token_index: int
    image_seq_length: int
    projector_hidden_act: str
    multimodal_projector_bias: bool
    tied: bool


def configuration_of(config: dict[str, Any], layout: str, form: str, tied: bool) -> ModelConfig:
    """The model that checked settings describe, with the form and the tying that the weights have."""
    args = {
        key: tuple(value) if isinstance(value, list) else value
        for key, value in layouts.model_args(config, layout).items()
    }
    given = layouts.text_of(config, layout)
    settings: dict[str, Any] = {field.name: given[field.name] for field in fields(TextConfig) if field.name in given}
    for key, value in settings.items():
        settings[key] = tuple(value) if isinstance(value, list) else value
    text = TextConfig(**settings | {"rope_parameters": _rope(given)})
    pixels = size_in_config(config)
    return ModelConfig(
        text=replace(
            text,
            num_key_value_heads=text.num_key_value_heads or text.num_attention_heads,
            rms_norm_eps=float(text.rms_norm_eps),
        ),
        vision_args=args | {"inference_mode": form == "folded"},
        vision_width=2 * layouts.widths_of(config, layout)[-1],
        image_token_index=config.get("image_token_index", config.get("image_token_id", layouts.TRANSFORMERS_IMAGE_ID)),
        image_seq_length=tokens_per_image(pixels) if pixels else config.get("image_seq_length", 256),
        projector_hidden_act=config.get("projector_hidden_act", "gelu"),
        multimodal_projector_bias=config.get("multimodal_projector_bias", True),
        tied=tied,
    )


def _rope(text: dict[str, Any]) -> dict[str, Any]:
    """The rotary position encoding's parameters under their present names; `type` is what `rope_type` was called."""
    given = text.get("rope_scaling") or text.get("rope_parameters") or {}
    rope = {key: value for key, value in given.items() if key not in ("type", "mrope_section")}
    kind = given.get("type", given.get("rope_type", "default"))
    return rope | {"rope_theta": rope.get("rope_theta", text.get("rope_theta", _ROPE_THETA)), "rope_type": kind}


def hf_config_of(model: ModelConfig) -> "FastVlmConfig":
    """Transformers' configuration of the model. Raises whatever Transformers raises for values it refuses."""
    from transformers import FastVlmConfig, PreTrainedConfig, Qwen2Config

    text: dict[str, Any] = asdict(model.text)
    text = {key: list(value) if isinstance(value, tuple) else value for key, value in text.items()}
    if text["head_dim"] is None:
        del text["head_dim"]
    # what TimmWrapperConfig holds; importing that costs timm, torchvision and 3 s, and only a model needs it
    vision: dict[str, Any] = {
        "architecture": ARCHITECTURE,
        "do_pooling": True,
        "global_pool": "avg",
        "num_labels": 0,
        "hidden_size": model.vision_width,
        "model_args": dict(model.vision_args),
    }
    return FastVlmConfig(
        vision_config=PreTrainedConfig(**vision),
        text_config=Qwen2Config(**text, tie_word_embeddings=model.tied),
        image_token_index=model.image_token_index,
        image_seq_length=model.image_seq_length,
        projector_hidden_act=model.projector_hidden_act,
        multimodal_projector_bias=model.multimodal_projector_bias,
        tie_word_embeddings=model.tied,
    )


def checked_by_transformers(model: ModelConfig) -> Steps[ModelConfig | None]:
    """The model with a scaled rotary position encoding as Transformers completes it; None after a finding if it can't.

    settings.json has checked every other setting as strictly.
    """
    if model.text.rope["rope_type"] == "default":
        return model
    try:
        config = hf_config_of(model)
    except Exception as error:  # Transformers validates with many exception types; all mean an unusable config
        yield Finding("config-unusable", "config.json", reason_of(error), "the description of a FastVLM")
        return None
    text: Any = config.text_config
    yield from _rope_findings(text)
    return replace(model, text=replace(model.text, rope_parameters=copy.deepcopy(text.rope_parameters)))


def reason_of(error: Exception) -> str:
    """An exception of a library on one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def _rope_findings(text: Any) -> Iterator[Finding]:
    """Yield a finding where Transformers can't compute the rotary position encoding that config.json asks for."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    kind = text.rope_parameters["rope_type"]
    try:
        for length in (None, _POSITIONS):  # some have other frequencies for long prompts
            frequencies, factor = ROPE_INIT_FUNCTIONS[kind](text, "cpu", seq_len=length)
            if not (frequencies * factor).isfinite().all():
                raise ValueError("its frequencies are not finite")
    except Exception as error:  # a parameter that is missing, or that the formula can't take
        expected = f"parameters of a rotary position encoding of type {kind}"
        yield Finding("rope-unusable", "config.json: rope_scaling", reason_of(error), expected)


def loader_faults(model: ModelConfig, rope_types: Container[str] = ("default",)) -> list[str]:
    """Settings that Transformers runs and the demo app and the MLX loaders don't: no export of these is right.

    `rope_types`: the rotary position encodings that the loader of the export in question computes.
    """
    text = model.text
    head = text.hidden_size // text.num_attention_heads
    rope = text.rope["rope_type"]
    return [
        f"{what} is {got!r}, expected {expected!r}"
        for what, got, expected in (
            ("rotary position encoding", rope, rope if rope in rope_types else "default"),
            ("sliding-window attention", bool(text.use_sliding_window), False),
            ("activation", text.hidden_act, "silu"),
            ("width of a head", text.head_dim or head, head),
            ("projector's activation", model.projector_hidden_act, "gelu"),
            ("projector's bias", bool(model.multimodal_projector_bias), True),
        )
        if got != expected
    ]
