"""What the small files of the two layouts say: configuration, resolution, image strategy, vocabulary, image token."""

import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastvlm.errors import UserError
from fastvlm.files import load_json, read_text
from fastvlm.prompt import prompt_fault
from fastvlm.weights import Fault, read_json

if TYPE_CHECKING:
    from transformers import FastVlmConfig, PreTrainedTokenizerBase

LAYOUTS = ("llava_qwen2", "fast_vlm")
IMAGE_TOKEN = "<image>"
LLAVA_IMAGE_INDEX = -200  # LLaVA code's placeholder, never a real id (llava/constants.py)
TRANSFORMERS_IMAGE_ID = 151646  # FastVlmConfig's default
STRIDE = 64  # pixels per image token, along each side
FASTVITHD_WIDTHS = (96, 192, 384, 768, 1536)

# Fields of Qwen2's configuration that the LLaVA layout keeps at the top level.
_QWEN2_REQUIRED = ("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers", "vocab_size")
_QWEN2_FIELDS = (
    *_QWEN2_REQUIRED, "num_key_value_heads", "hidden_act", "max_position_embeddings", "initializer_range",
    "rms_norm_eps", "rope_theta", "rope_scaling", "rope_parameters", "use_sliding_window", "sliding_window",
    "max_window_layers", "layer_types", "attention_dropout", "bos_token_id", "eos_token_id", "pad_token_id", "head_dim",
)  # fmt: skip

# What may be said about a smaller vision tower: data only, passed to timm's `fastvit_mci3`. The last three only matter
# in training.
_MODEL_ARGS = frozenset({
    "inference_mode", "layers", "embed_dims", "mlp_ratios",
    "layer_scale_init_value", "drop_path_rate", "proj_drop_rate",
})  # fmt: skip


def layout_of(config: dict[str, Any], faults: list[Fault]) -> str | None:
    """The layout that config.json's model_type names, or None and a fault for another model."""
    said = config.get("model_type")
    if said in LAYOUTS:
        return str(said)
    faults.append(Fault(f"another model: config.json says model_type {said!r}, expected {' or '.join(LAYOUTS)}"))
    return None


def check_config(
    config: dict[str, Any], layout: str, form: str | None, faults: list[Fault], warnings: list[str]
) -> None:
    """What config.json says that this project can't honour (faults) or that the weights contradict (warnings).

    `form` is the weights', None where they couldn't all be read.
    """
    if "quantization_config" in config or "quantization" in config:
        faults.append(Fault("a quantized checkpoint: config.json has a quantization entry; give the original weights"))
    if fault := prompt_fault(config):
        faults.append(Fault(f"config.json: {fault}"))
    args = _model_args(config, layout)
    unknown = sorted(set(args) - _MODEL_ARGS)
    if unknown:
        faults.append(Fault("config.json: unknown arguments of the vision tower", tuple(unknown)))
    if layout == "llava_qwen2":
        _check_llava(config, faults, warnings)
        return
    vision = config.get("vision_config") or {}
    architecture = str(vision.get("architecture", "fastvit_mci3"))
    wrapped = vision.get("model_type", "timm_wrapper") == "timm_wrapper"
    if not wrapped or not re.fullmatch(r"fastvit_mci3(\.\w+)?", architecture):
        faults.append(Fault(f"another model: vision tower {architecture!r}, expected timm's fastvit_mci3"))
    text = (config.get("text_config") or {}).get("model_type", "qwen2")
    if text != "qwen2":
        faults.append(Fault(f"another model: language model {text!r}, expected qwen2"))
    said = args.get("inference_mode", False)
    if form is not None and said != (form == "folded"):
        warnings.append(
            f"config.json says inference_mode {str(said).lower()}, but the tensors are in {form} form: {form} used"
        )


def _check_llava(config: dict[str, Any], faults: list[Fault], warnings: list[str]) -> None:
    absent = [key for key in _QWEN2_REQUIRED if not isinstance(config.get(key), int)]
    if absent:
        faults.append(Fault("config.json: missing or not a number", tuple(absent)))
    projector = config.get("mm_projector_type", "mlp2x_gelu")
    if projector != "mlp2x_gelu":
        faults.append(Fault(f"config.json: projector {projector!r}, expected mlp2x_gelu"))
    width = 2 * _widths(config, "llava_qwen2")[-1]
    if config.get("mm_hidden_size", width) != width:
        warnings.append(f"config.json says mm_hidden_size {config['mm_hidden_size']}, but the encoder gives {width}")
    ratio = str(config.get("image_aspect_ratio", "square"))
    if ratio.startswith("anyres"):
        warnings.append(f"config.json says image_aspect_ratio {ratio}: tiles aren't supported, one centre crop is used")


def hf_config_of(config: dict[str, Any], layout: str, form: str, tied: bool) -> "FastVlmConfig":
    """Transformers' configuration for a raw config.json, with the form and the tying that the weights have.

    Raises whatever Transformers raises for values it refuses.
    """
    from transformers import FastVlmConfig, PreTrainedConfig, Qwen2Config

    args = {key: value for key, value in _model_args(config, layout).items() if key in _MODEL_ARGS}
    args = {key: tuple(value) if isinstance(value, list) else value for key, value in args.items()}
    vision: dict[str, Any] = {
        "architecture": "fastvit_mci3",
        "do_pooling": True,
        "global_pool": "avg",
        "num_labels": 0,
        "hidden_size": 2 * _widths(config, layout)[-1],
        "model_args": args | {"inference_mode": form == "folded"},
    }
    text = config if layout == "llava_qwen2" else config.get("text_config") or {}
    fields = {key: text[key] for key in _QWEN2_FIELDS if key in text}
    pixels = image_size_of(config, layout)
    return FastVlmConfig(
        # what TimmWrapperConfig holds; importing that costs timm, torchvision and 3 s, and only a model needs it
        vision_config=PreTrainedConfig(**vision),
        text_config=Qwen2Config(**fields, tie_word_embeddings=tied),
        image_token_index=config.get("image_token_index", config.get("image_token_id", TRANSFORMERS_IMAGE_ID)),
        image_seq_length=(pixels // STRIDE) ** 2 if pixels else config.get("image_seq_length", 256),
        projector_hidden_act=config.get("projector_hidden_act", "gelu"),
        multimodal_projector_bias=config.get("multimodal_projector_bias", True),
        tie_word_embeddings=tied,
    )


def _model_args(config: dict[str, Any], layout: str) -> dict[str, Any]:
    if layout == "llava_qwen2":
        return dict(config.get("mm_vision_model_args") or {})
    return dict((config.get("vision_config") or {}).get("model_args") or {})


def _widths(config: dict[str, Any], layout: str) -> tuple[int, ...]:
    return tuple(_model_args(config, layout).get("embed_dims") or FASTVITHD_WIDTHS)


def says_tied(config: dict[str, Any], layout: str) -> bool | None:
    """What config.json says about tying, None if nothing (Transformers' FastVLM: tied if either level says so)."""
    said = [config.get("tie_word_embeddings")]
    if layout == "fast_vlm":
        said.append((config.get("text_config") or {}).get("tie_word_embeddings"))
    known = [bool(value) for value in said if value is not None]
    return any(known) if known else None


def image_size_of(config: dict[str, Any], layout: str) -> int | None:
    """The resolution in pixels that config.json implies, None if it says nothing usable."""
    if layout == "llava_qwen2":
        suffix = re.fullmatch(r".*mobileclip_l_(\d+)", str(config.get("mm_vision_tower", "")))
        return int(suffix.group(1)) if suffix else None
    tokens = config.get("image_seq_length")
    side = math.isqrt(tokens) if isinstance(tokens, int) and tokens > 0 else 0
    return side * STRIDE if side and side * side == tokens else None


def image_contract(
    path: Path, config: dict[str, Any], layout: str, faults: list[Fault], warnings: list[str]
) -> tuple[int, str]:
    """(resolution in pixels, image strategy) of the checkpoint."""
    said = image_size_of(config, layout)
    if layout == "llava_qwen2":
        size, strategy = said, "pad" if config.get("image_aspect_ratio") == "pad" else "center_crop"
        if said is None:
            tower = config.get("mm_vision_tower")
            faults.append(Fault(f"no resolution: mm_vision_tower is {tower!r}, expected mobileclip_l_<pixels>"))
    else:
        processor = _image_processor(path, faults)
        strategy = "pad" if processor.get("do_pad") else "center_crop"
        size = _processor_size(processor) or said
        if size is None:
            faults.append(
                Fault("no resolution: neither preprocessor_config.json's crop_size nor image_seq_length has it")
            )
        elif said not in (None, size):
            warnings.append(f"image_seq_length means {said} pixels, the image processor says {size}: {size} used")
    if size is not None and (size < STRIDE or size % STRIDE):
        faults.append(Fault(f"resolution {size}: expected a multiple of {STRIDE} pixels"))
    return size or 0, strategy


def _image_processor(path: Path, faults: list[Fault]) -> dict[str, Any]:
    for name in ("preprocessor_config.json", "processor_config.json"):
        document = read_json(path / name, faults) if (path / name).is_file() else None
        if isinstance(document, dict):
            inner = document.get("image_processor")
            document = inner if isinstance(inner, dict) else document
            if "crop_size" in document or "size" in document:
                return document
    return {}


def _processor_size(processor: dict[str, Any]) -> int | None:
    crop = processor.get("crop_size") or processor.get("size")
    if isinstance(crop, dict):
        crop = crop.get("height") or crop.get("shortest_edge")
    return crop if isinstance(crop, int) and crop > 0 else None


def read_vocabulary(path: Path, faults: list[Fault]) -> dict[str, int]:
    """Every token and its id, from tokenizer.json or else vocab.json, and the added tokens of the other files."""
    ids: dict[str, int] = {}
    try:
        if (path / "tokenizer.json").is_file():
            document = read_json(path / "tokenizer.json", faults)
            if document is not None:
                ids |= document["model"]["vocab"]
                ids |= {entry["content"]: entry["id"] for entry in document.get("added_tokens", [])}
        elif (path / "vocab.json").is_file():
            ids |= read_json(path / "vocab.json", faults) or {}
            if not (path / "merges.txt").is_file():
                faults.append(Fault("tokenizer: vocab.json is there, merges.txt isn't"))
        else:
            faults.append(Fault(f"no tokenizer: {path} has neither tokenizer.json nor vocab.json with merges.txt"))
        if (path / "added_tokens.json").is_file():
            ids |= read_json(path / "added_tokens.json", faults) or {}
        if (path / "tokenizer_config.json").is_file():
            document = read_json(path / "tokenizer_config.json", faults) or {}
            ids |= {entry["content"]: int(key) for key, entry in (document.get("added_tokens_decoder") or {}).items()}
        return {str(token): int(number) for token, number in ids.items()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        faults.append(Fault(f"tokenizer: its files aren't what they should be ({type(error).__name__}: {error})"))
        return {}


def image_token(
    config: dict[str, Any], layout: str, ids: dict[str, int], rows: int, faults: list[Fault], warnings: list[str]
) -> int:
    """The id that stands for the image: the one place that decides, and that compares tokenizer and embedding sizes.

    LLaVA layout: the tokenizer's <image> if it has one, else its greatest id + 1, as Apple's export does (LLaVA code
    itself uses -200, which is no id). Transformers layout: config.json's image_token_index, 151646 by default.
    """
    if not ids:
        return 0
    top, own = max(ids.values()), ids.get(IMAGE_TOKEN)
    _check_vocabulary_size(top, rows, faults)
    said = config.get("image_token_index", config.get("image_token_id"))
    if layout == "llava_qwen2":
        chosen = top + 1 if own is None else own
        if said not in (None, chosen, LLAVA_IMAGE_INDEX):
            warnings.append(f"config.json says image_token_index {said}, the tokenizer means {chosen}: {chosen} used")
    else:
        chosen = int(said) if isinstance(said, int) else TRANSFORMERS_IMAGE_ID
        if own is not None and own != chosen:
            faults.append(Fault(f"image token: config.json says {chosen}, the tokenizer has {IMAGE_TOKEN} at {own}"))
        elif own is None and chosen != top + 1:
            faults.append(Fault(f"image token: config.json says {chosen}, the tokenizer has none and ends at {top}"))
    if chosen >= rows:
        faults.append(Fault(f"image token: id {chosen} has no row in the embeddings ({rows} rows)"))
    return chosen


def _check_vocabulary_size(top: int, rows: int, faults: list[Fault]) -> None:
    spare = rows - (top + 1)
    if spare < 0:
        faults.append(Fault(f"wrong tokenizer size: its ids go up to {top}, the embeddings have {rows} rows"))
    elif spare > max(1024, rows // 20):  # published checkpoints pad by 65 to 417 rows
        faults.append(
            Fault(f"wrong tokenizer size: {top + 1} ids for {rows} rows of embeddings; is it another model's?")
        )


def load_tokenizer(path: Path, image_token_id: int) -> "PreTrainedTokenizerBase":
    """The folder's tokenizer with <image> at `image_token_id`; UserError if it can't be had."""
    from transformers import AddedToken, Qwen2Tokenizer

    try:
        tokenizer = Qwen2Tokenizer.from_pretrained(str(path), local_files_only=True)
    except Exception as error:  # Transformers and tokenizers raise anything for damaged files
        raise UserError(f"cannot load the tokenizer of {path}: {' '.join(str(error).split())[:300]}") from error
    if IMAGE_TOKEN not in tokenizer.get_vocab():
        tokenizer.add_tokens([AddedToken(IMAGE_TOKEN, special=True, normalized=False)], special_tokens=True)
    got = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    if got != image_token_id:
        raise UserError(f"tokenizer of {path}: {IMAGE_TOKEN} is at {got}, expected {image_token_id}")
    return tokenizer


def chat_template(path: Path) -> str | None:
    """The chat template of the folder (tokenizer_config.json, chat_template.jinja or chat_template.json), or None."""
    if (path / "chat_template.jinja").is_file():
        return read_text(path / "chat_template.jinja")
    for name in ("tokenizer_config.json", "chat_template.json"):
        if (path / name).is_file():
            said = load_json(path / name).get("chat_template")
            if isinstance(said, str):
                return said
    return None
