"""What the small files of the two layouts say: configuration, resolution, image strategy, vocabulary, image token."""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastvlm.common.documents import Fault, checked, read_json, read_settings, shown
from fastvlm.common.errors import UserError
from fastvlm.data.prompt import prompt_fault

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LAYOUTS = ("llava_qwen2", "fast_vlm")
IMAGE_TOKEN = "<image>"
LLAVA_IMAGE_INDEX = -200  # LLaVA code's placeholder, never a real id (llava/constants.py)
TRANSFORMERS_IMAGE_ID = 151646  # FastVlmConfig's default
_IDS = 1 << 31  # a token's id is below
FASTVITHD_WIDTHS = (96, 192, 384, 768, 1536)

# What the LLaVA layout, which keeps the language model's settings at the top level, must say.
_QWEN2_REQUIRED = ("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers", "vocab_size")
# What published checkpoints say: known without Transformers, whose activations are PyTorch's.
_ACTIVATIONS = ("silu", "gelu")


def layout_of(config: dict[str, Any], faults: list[Fault]) -> str | None:
    """The layout that config.json's model_type names, or None and a fault for another model."""
    said = config.get("model_type")
    if said in LAYOUTS:
        return str(said)
    faults.append(Fault(f"another model: config.json says model_type {said!r}, expected {' or '.join(LAYOUTS)}"))
    return None


def read_config(config: dict[str, Any], layout: str, faults: list[Fault]) -> dict[str, Any]:
    """config.json's settings, each checked, and against each other; with a fault, no model can be built."""
    config = checked(config, "config.json", faults)
    text = text_of(config, layout)
    absent = tuple(key for key in _QWEN2_REQUIRED if key not in text)
    if absent and layout == "llava_qwen2" and not faults:
        faults.append(Fault("config.json: missing", absent))
    faults += [Fault(f"config.json: {line}") for line in _contradictions(text)]
    activations = {"hidden_act": text.get("hidden_act"), "projector_hidden_act": config.get("projector_hidden_act")}
    faults += [Fault(line) for key, name in activations.items() if name and (line := _unknown_activation(key, name))]
    return config


def _contradictions(text: dict[str, Any]) -> list[str]:
    """What the language model's settings say against each other."""
    lines = []
    hidden, heads, layers = (text.get(key) for key in ("hidden_size", "num_attention_heads", "num_hidden_layers"))
    groups, kinds = text.get("num_key_value_heads", heads), text.get("layer_types")
    if hidden and heads and (head := text.get("head_dim") or hidden / heads) % 2:
        lines.append(
            f"a head is {head:g} wide (head_dim, or hidden_size / num_attention_heads), expected an even width"
        )
    if heads and heads % groups:
        lines.append(f"num_attention_heads {heads} is not a multiple of num_key_value_heads {groups}")
    if kinds is not None and layers and len(kinds) != layers:
        lines.append(f"layer_types has {len(kinds)} entries for num_hidden_layers {layers}")
    if "sliding_attention" in (kinds or ()) and not text.get("use_sliding_window"):
        lines.append("layer_types has sliding_attention, but use_sliding_window is not true")
    rope = text.get("rope_scaling") or text.get("rope_parameters") or {}
    if rope.get("type", rope.get("rope_type")) != rope.get("rope_type", rope.get("type")):
        lines.append(f"rope_scaling has type {rope['type']} and rope_type {rope['rope_type']}")
    return lines


def _unknown_activation(key: str, name: str) -> str | None:
    if name in _ACTIVATIONS:
        return None
    from transformers.activations import ACT2FN

    try:
        ACT2FN[name]
    except Exception:  # a KeyError, or whatever the activation asks for that a name can't give
        return f"config.json: {key} is {shown(name)}, which is no activation that Transformers has"
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
    if layout == "llava_qwen2":
        projector = config.get("mm_projector_type", "mlp2x_gelu")
        if projector != "mlp2x_gelu":
            faults.append(Fault(f"config.json: projector {shown(projector)}, expected mlp2x_gelu"))
        width = 2 * widths_of(config, layout)[-1]
        if config.get("mm_hidden_size", width) != width:
            warnings.append(
                f"config.json says mm_hidden_size {config['mm_hidden_size']}, but the encoder gives {width}"
            )
        return
    vision = config.get("vision_config", {})
    architecture = vision.get("architecture", "fastvit_mci3")
    wrapped = vision.get("model_type", "timm_wrapper") == "timm_wrapper"
    if not wrapped or not re.fullmatch(r"fastvit_mci3(\.\w+)?", architecture):
        faults.append(Fault(f"another model: vision tower {shown(architecture)}, expected timm's fastvit_mci3"))
    text = config.get("text_config", {}).get("model_type", "qwen2")
    if text != "qwen2":
        faults.append(Fault(f"another model: language model {shown(text)}, expected qwen2"))
    said = model_args(config, layout).get("inference_mode", False)
    if form is not None and said != (form == "folded"):
        warnings.append(
            f"config.json says inference_mode {str(said).lower()}, but the tensors are in {form} form: {form} used"
        )


def text_of(config: dict[str, Any], layout: str) -> dict[str, Any]:
    """The language model's settings."""
    return config if layout == "llava_qwen2" else config.get("text_config", {})


def model_args(config: dict[str, Any], layout: str) -> dict[str, Any]:
    """What is said of the vision tower, by timm's names."""
    if layout == "llava_qwen2":
        return dict(config.get("mm_vision_model_args") or {})
    return dict(config.get("vision_config", {}).get("model_args") or {})


def widths_of(config: dict[str, Any], layout: str) -> tuple[int, ...]:
    """Channels of the vision tower's stages; its output has twice the last."""
    return tuple(model_args(config, layout).get("embed_dims") or FASTVITHD_WIDTHS)


def says_tied(config: dict[str, Any], layout: str) -> bool | None:
    """What config.json says about tying, None if nothing (Transformers' FastVLM: tied if either level says so)."""
    said = [config.get("tie_word_embeddings")]
    if layout == "fast_vlm":
        said.append(text_of(config, layout).get("tie_word_embeddings"))
    known = [bool(value) for value in said if value is not None]
    return any(known) if known else None


def read_vocabulary(path: Path, faults: list[Fault]) -> dict[str, int]:
    """Every token and its id, from tokenizer.json or else vocab.json, and the added tokens of the other files."""
    own: list[Fault] = []
    ids: dict[str, int] = {}
    if (path / "tokenizer.json").is_file():
        document = read_json(path / "tokenizer.json", own)
        model = document.get("model") if isinstance(document, dict) else None
        if isinstance(model, dict):
            ids |= _ids("tokenizer.json: model.vocab", model.get("vocab"), own)
            ids |= _ids("tokenizer.json: added_tokens", document.get("added_tokens") or [], own)
        elif not own:
            own.append(Fault("tokenizer.json: no model, expected an object with a vocab"))
    elif (path / "vocab.json").is_file():
        ids |= _ids("vocab.json", read_json(path / "vocab.json", own), own)
        if not (path / "merges.txt").is_file():
            own.append(Fault("tokenizer: vocab.json is there, merges.txt isn't"))
    else:
        own.append(Fault(f"no tokenizer: {path} has neither tokenizer.json nor vocab.json with merges.txt"))
    if (path / "added_tokens.json").is_file():
        ids |= _ids("added_tokens.json", read_json(path / "added_tokens.json", own), own)
    settings = read_settings(path / "tokenizer_config.json", own)
    decoder = settings.get("added_tokens_decoder", {})
    entries = [{"content": _content(entry), "id": _number(key)} for key, entry in decoder.items()]
    ids |= _ids("tokenizer_config.json: added_tokens_decoder", entries, own)
    faults += own
    return {} if own else ids


def _ids(where: str, tokens: Any, faults: list[Fault]) -> dict[str, int]:
    """Token -> id from an object of both, or from a list of {"content": token, "id": id}; a fault for anything else."""
    pairs: Any = tokens.items() if isinstance(tokens, dict) else None
    if isinstance(tokens, list) and all(isinstance(entry, dict) for entry in tokens):
        pairs = [(entry.get("content"), entry.get("id")) for entry in tokens]
    if pairs is None:
        if not faults:
            faults.append(Fault(f"{where} is {shown(tokens)}, expected tokens and their ids"))
        return {}
    wrong = [
        pair for pair in pairs if not isinstance(pair[0], str) or type(pair[1]) is not int or not 0 <= pair[1] < _IDS
    ]
    if wrong:
        details = tuple(f"{shown(token)} has id {shown(number)}" for token, number in wrong)
        faults.append(Fault(f"{where}: {len(wrong)} entries are not text with a whole number as its id", details))
        return {}
    return dict(pairs)


def _content(entry: Any) -> Any:
    return entry.get("content") if isinstance(entry, dict) else entry


def _number(key: str) -> int | str:
    return int(key) if re.fullmatch("[0-9]{1,10}", key) else key


def image_token(
    config: dict[str, Any], layout: str, ids: dict[str, int], rows: int, faults: list[Fault], warnings: list[str]
) -> int:
    """The id that stands for the image: the one place that decides, and that compares tokenizer and embedding sizes.

    LLaVA layout: the tokenizer's <image> if it has one, else its greatest id + 1, as Apple's export does (LLaVA code
    itself uses -200, which is no id). Transformers layout: config.json's image_token_index, 151646 by default.
    It may be `rows`, one past the embeddings: a picture's embeddings take its place, so it needs no values of its own.
    """
    if not ids:
        return 0
    own = ids.get(IMAGE_TOKEN)
    top = max((number for token, number in ids.items() if token != IMAGE_TOKEN), default=0)
    spare, last = rows - (top + 1), top if own is None else max(top, own)
    if spare < 0:
        faults.append(Fault(f"wrong tokenizer size: its ids go up to {top}, the embeddings have {rows} rows"))
    elif spare > max(1024, rows // 20):  # published checkpoints pad by 65 to 417 rows
        warnings.append(f"the tokenizer has {last + 1} ids for {rows} rows of embeddings: the other rows are not used")
    said = config.get("image_token_index", config.get("image_token_id"))
    if layout == "llava_qwen2":
        chosen = top + 1 if own is None else own
        if said not in (None, chosen, LLAVA_IMAGE_INDEX):
            warnings.append(f"config.json says image_token_index {said}, the tokenizer means {chosen}: {chosen} used")
    else:
        chosen = TRANSFORMERS_IMAGE_ID if said is None else said
        if own is not None and own != chosen:
            faults.append(Fault(f"image token: config.json says {chosen}, the tokenizer has {IMAGE_TOKEN} at {own}"))
        elif own is None and chosen != top + 1:
            faults.append(Fault(f"image token: config.json says {chosen}, the tokenizer has none and ends at {top}"))
    if chosen > rows:
        faults.append(Fault(f"image token: id {chosen} has no row in the embeddings ({rows} rows)"))
    elif chosen == rows:
        warnings.append(
            f"the embeddings have no row for {IMAGE_TOKEN} (id {chosen}): one is added, here and in an export"
        )
    return chosen


def load_tokenizer(path: Path, image_token_id: int) -> "PreTrainedTokenizerBase":
    """The folder's tokenizer with <image> at `image_token_id`; UserError if it can't be had."""
    from transformers import AddedToken, Qwen2Tokenizer

    try:
        tokenizer = Qwen2Tokenizer.from_pretrained(str(path), local_files_only=True)
    except Exception as error:  # Transformers and tokenizers raise anything for damaged files
        said = " ".join([str(error), *getattr(error, "__notes__", ())]).split()  # the notes have the key's name
        raise UserError(f"cannot load the tokenizer of {path}: {' '.join(said)[:300]}") from error
    if IMAGE_TOKEN not in tokenizer.get_vocab():
        tokenizer.add_tokens([AddedToken(IMAGE_TOKEN, special=True, normalized=False)], special_tokens=True)
    got = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    if got != image_token_id:
        raise UserError(f"tokenizer of {path}: {IMAGE_TOKEN} is at {got}, expected {image_token_id}")
    return tokenizer
