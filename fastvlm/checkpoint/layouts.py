"""The small files of the two layouts: configuration, resolution, image strategy, vocabulary, image token."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastvlm.common.documents import Unreadable, load_object, shown
from fastvlm.common.errors import UserError
from fastvlm.common.findings import Finding, Steps, collect
from fastvlm.common.settings import checked, read_settings
from fastvlm.data.prompt import prompt_findings

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
_PROJECTOR_ACT = "projector_hidden_act"


def layout_of(config: dict[str, Any]) -> Steps[str | None]:
    """The layout that config.json's model_type names, or None after a finding about another model."""
    model_type = config.get("model_type")
    if model_type in LAYOUTS:
        return str(model_type)
    yield Finding("model-other", "config.json: model_type", shown(model_type), " or ".join(LAYOUTS))
    return None


def read_config(config: dict[str, Any], layout: str) -> Steps[dict[str, Any]]:
    """config.json's settings, each checked, and against each other; after a finding, no model can be built."""
    config, findings = collect(checked(config, "config.json"))
    yield from findings
    text = text_of(config, layout)
    absent = tuple(key for key in _QWEN2_REQUIRED if key not in text)
    if absent and layout == "llava_qwen2" and not findings:
        yield Finding("setting-missing", "config.json", f"no {', '.join(absent)}", "all sizes of the language model")
    yield from _contradictions(text)
    for key, name in (("hidden_act", text.get("hidden_act")), (_PROJECTOR_ACT, config.get(_PROJECTOR_ACT))):
        if name and not is_activation(name):
            yield Finding("activation-unknown", f"config.json: {key}", shown(name), "an activation of Transformers")
    return config


def _contradictions(text: dict[str, Any]) -> Iterator[Finding]:
    """Contradictions among the language model's settings."""
    hidden, heads, layers = (text.get(key) for key in ("hidden_size", "num_attention_heads", "num_hidden_layers"))
    groups, kinds = text.get("num_key_value_heads", heads), text.get("layer_types")
    rope = text.get("rope_scaling") or text.get("rope_parameters") or {}
    pairs: list[tuple[str, Any, str]] = []
    if hidden and heads and (head := text.get("head_dim") or hidden / heads) % 2:
        pairs.append(("head_dim", f"{head:g}", "an even width (head_dim, or hidden_size / num_attention_heads)"))
    if heads and heads % groups:
        pairs.append(("num_attention_heads", heads, f"a multiple of num_key_value_heads, {groups}"))
    if kinds is not None and layers and len(kinds) != layers:
        pairs.append(("layer_types", f"{len(kinds)} entries", f"num_hidden_layers, {layers}"))
    if "sliding_attention" in (kinds or ()) and not text.get("use_sliding_window"):
        pairs.append(("layer_types", "sliding_attention", "use_sliding_window true with it"))
    if rope.get("type", rope.get("rope_type")) != rope.get("rope_type", rope.get("type")):
        pairs.append(("rope_scaling", f"type {rope['type']} and rope_type {rope['rope_type']}", "one of them"))
    for key, got, expected in pairs:
        yield Finding("config-contradictory", f"config.json: {key}", str(got), expected)


def is_activation(name: str) -> bool:
    """Whether Transformers has an activation of this name."""
    if name in _ACTIVATIONS:
        return True
    from transformers.activations import ACT2FN

    try:
        return ACT2FN[name] is not None
    except Exception:  # a KeyError, or whatever the activation asks for that a name can't give
        return False


def check_config(config: dict[str, Any], layout: str, form: str | None) -> Iterator[Finding]:
    """Settings of config.json that this project can't honour (errors) or that the weights contradict (warnings).

    `form` is the weights', None where they couldn't all be read.
    """
    if "quantization_config" in config or "quantization" in config:
        yield Finding("checkpoint-quantized", "config.json", "a quantization entry", "the weights before quantization")
    yield from prompt_findings(config)
    if layout == "llava_qwen2":
        projector = config.get("mm_projector_type", "mlp2x_gelu")
        if projector != "mlp2x_gelu":
            yield Finding("projector-unknown", "config.json: mm_projector_type", shown(projector), "mlp2x_gelu")
        given, width = config.get("mm_hidden_size"), 2 * widths_of(config, layout)[-1]
        if given not in (None, width):
            expected = f"{width}, what the encoder gives"
            yield Finding("config-ignored", "config.json: mm_hidden_size", str(given), expected, severity="warning")
        return
    vision = config.get("vision_config", {})
    architecture = vision.get("architecture", "fastvit_mci3")
    wrapped = vision.get("model_type", "timm_wrapper") == "timm_wrapper"
    if not wrapped or not re.fullmatch(r"fastvit_mci3(\.\w+)?", architecture):
        yield Finding("model-other", "config.json: vision_config", shown(architecture), "timm's fastvit_mci3")
    text = config.get("text_config", {}).get("model_type", "qwen2")
    if text != "qwen2":
        yield Finding("model-other", "config.json: text_config", shown(text), "qwen2")
    folded = model_args(config, layout).get("inference_mode", False)
    if form is not None and folded != (form == "folded"):
        where, got = "config.json: inference_mode", str(folded).lower()
        yield Finding("config-ignored", where, got, f"what the tensors have, the {form} form", severity="warning")


def text_of(config: dict[str, Any], layout: str) -> dict[str, Any]:
    """The language model's settings."""
    return config if layout == "llava_qwen2" else config.get("text_config", {})


def model_args(config: dict[str, Any], layout: str) -> dict[str, Any]:
    """The settings of the vision tower, by timm's names."""
    if layout == "llava_qwen2":
        return dict(config.get("mm_vision_model_args") or {})
    return dict(config.get("vision_config", {}).get("model_args") or {})


def widths_of(config: dict[str, Any], layout: str) -> tuple[int, ...]:
    """Channels of the vision tower's stages; its output has twice the last."""
    return tuple(model_args(config, layout).get("embed_dims") or FASTVITHD_WIDTHS)


def says_tied(config: dict[str, Any], layout: str) -> bool | None:
    """Whether config.json says that the head is tied, None if nothing (Transformers: tied if either level says so)."""
    stated = [config.get("tie_word_embeddings")]
    if layout == "fast_vlm":
        stated.append(text_of(config, layout).get("tie_word_embeddings"))
    known = [bool(value) for value in stated if value is not None]
    return any(known) if known else None


def read_vocabulary(path: Path) -> Steps[dict[str, int]]:
    """Every token and its id, from tokenizer.json or else vocab.json, and the added tokens of the other files; {} after
    a finding."""
    vocabulary, findings = collect(_read_vocabulary(path))
    yield from findings
    return {} if findings else vocabulary


def _read_vocabulary(path: Path) -> Steps[dict[str, int]]:
    tables: dict[str, Any] = {}  # where -> tokens and their ids, or whatever else is there
    main = "tokenizer.json" if (path / "tokenizer.json").is_file() else "vocab.json"
    for name in (main, "added_tokens.json"):
        if (path / name).is_file():
            try:
                tables[name] = load_object(path / name)
            except Unreadable as error:
                yield error.finding(name)
    if (whole := tables.pop("tokenizer.json", None)) is not None:
        model = whole.get("model")
        tables["tokenizer.json: model.vocab"] = model.get("vocab") if isinstance(model, dict) else model
        tables["tokenizer.json: added_tokens"] = whole.get("added_tokens") or []
    absent = [name for name in ("vocab.json", "merges.txt") if not (path / name).is_file()]
    if main == "vocab.json" and absent:
        yield Finding(
            "tokenizer-missing", str(path), f"no {absent[0]}", "tokenizer.json, or vocab.json with merges.txt"
        )
    settings = yield from read_settings(path / "tokenizer_config.json")
    tables["tokenizer_config.json: added_tokens_decoder"] = [
        {
            "content": entry.get("content") if isinstance(entry, dict) else entry,
            "id": int(key) if re.fullmatch("[0-9]{1,10}", key) else key,
        }
        for key, entry in settings.get("added_tokens_decoder", {}).items()
    ]
    ids: dict[str, int] = {}
    for where, tokens in tables.items():
        ids |= yield from _ids(where, tokens)
    return ids


def _ids(where: str, tokens: Any) -> Steps[dict[str, int]]:
    """Token -> id from an object of both, or from a list of {"content": token, "id": id}."""
    pairs: Any = tokens.items() if isinstance(tokens, dict) else None
    if isinstance(tokens, list) and all(isinstance(entry, dict) for entry in tokens):
        pairs = [(entry.get("content"), entry.get("id")) for entry in tokens]
    if pairs is None:
        yield Finding("tokenizer-invalid", where, shown(tokens), "tokens and their ids")
        return {}
    wrong = [
        pair for pair in pairs if not isinstance(pair[0], str) or type(pair[1]) is not int or not 0 <= pair[1] < _IDS
    ]
    if wrong:
        details = tuple(f"{shown(token)} has id {shown(number)}" for token, number in wrong)
        expected = "text with a whole number as its id"
        yield Finding("tokenizer-invalid", where, f"{len(wrong)} other entries", expected, details=details)
        return {}
    return dict(pairs)


def image_token(config: dict[str, Any], layout: str, ids: dict[str, int], rows: int) -> Steps[int]:
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
        got, expected = f"ids up to {top}", f"no more than the {rows} rows of the embeddings"
        yield Finding("tokenizer-size", "tokenizer", got, expected)
    elif spare > max(1024, rows // 20):  # published checkpoints pad by 65 to 417 rows
        got, expected = f"{last + 1} ids", f"{rows}, the rows of the embeddings: the others are not used"
        yield Finding("tokenizer-size", "tokenizer", got, expected, severity="warning")
    given = config.get("image_token_index", config.get("image_token_id"))
    where = "config.json: image_token_index"
    if layout == "llava_qwen2":
        chosen = top + 1 if own is None else own
        if given not in (None, chosen, LLAVA_IMAGE_INDEX):
            expected = f"{chosen}, the tokenizer's, which is used"
            yield Finding("config-ignored", where, str(given), expected, severity="warning")
    else:
        chosen = TRANSFORMERS_IMAGE_ID if given is None else given
        if own is not None and own != chosen:
            yield Finding("image-token", where, str(chosen), f"{own}, where the tokenizer has {IMAGE_TOKEN}")
        elif own is None and chosen != top + 1:
            expected = f"{top + 1}: the tokenizer has no {IMAGE_TOKEN} and ends at {top}"
            yield Finding("image-token", where, str(chosen), expected)
    if chosen > rows:
        yield Finding("image-token", "embeddings", f"{rows} rows", f"one for {IMAGE_TOKEN}, id {chosen}")
    elif chosen == rows:
        got, expected = f"no row for {IMAGE_TOKEN} (id {chosen})", "one: it is added, here and in an export"
        yield Finding("image-token", "embeddings", got, expected, severity="warning")
    return chosen


def load_tokenizer(path: Path, image_token_id: int) -> "PreTrainedTokenizerBase":
    """The folder's tokenizer with <image> at `image_token_id`; UserError if it can't be had."""
    from transformers import AddedToken, Qwen2Tokenizer

    try:
        tokenizer = Qwen2Tokenizer.from_pretrained(str(path), local_files_only=True)
    except Exception as error:  # Transformers and tokenizers raise anything for damaged files
        words = " ".join([str(error), *getattr(error, "__notes__", ())]).split()  # the notes have the key's name
        raise UserError(f"cannot load the tokenizer of {path}: {' '.join(words)[:300]}") from error
    if IMAGE_TOKEN not in tokenizer.get_vocab():
        tokenizer.add_tokens([AddedToken(IMAGE_TOKEN, special=True, normalized=False)], special_tokens=True)
    got = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    if got != image_token_id:
        raise UserError(f"tokenizer of {path}: {IMAGE_TOKEN} is at {got}, expected {image_token_id}")
    return tokenizer
