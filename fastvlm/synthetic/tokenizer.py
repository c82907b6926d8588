"""For synthetic checkpoints: a real byte-level BPE tokenizer with Qwen's special tokens, in either layout's files."""

import functools
import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from fastvlm.data.preprocessing import processor_files
from fastvlm.data.prompt import CHAT_TEMPLATE

SMALL_SIZE = 509  # bytes and merges of the small vocabulary; Qwen's three special tokens and <image> follow
PUBLISHED_SIZE = 151643  # regular tokens of Qwen2's vocabulary
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
IMAGE = "<image>"

_CORPUS = (
    "system user assistant You are a helpful assistant. What is in the image? Describe the image in one sentence.",
    "There are three red circles, two blue squares and one green triangle in the picture.",
    "The large yellow star is above the small purple ring on the left; the black cross is below it, on the right.",
    "How many shapes are there? Which colour is the shape in the middle? Read the handwritten number: 0123456789.",
    "A photograph shows a person, a street, a car, some trees and the sky on a sunny afternoon near the river.",
    "Please answer the question using a single word or phrase; explain your reasoning briefly, then give the number.",
)


@functools.cache
def _trained() -> tuple[dict[str, int], list[Any]]:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=SMALL_SIZE, min_frequency=1, initial_alphabet=alphabet, show_progress=False, special_tokens=[]
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    if len(model["vocab"]) != SMALL_SIZE:
        raise AssertionError(f"the corpus gives {len(model['vocab'])} tokens, expected {SMALL_SIZE}")
    return model["vocab"], [tuple(pair) for pair in model["merges"]]


def write(folder: Path, layout: str, published_ids: bool, image_size: int) -> None:
    """Write the tokenizer and processor files of `layout` into `folder`.

    With `published_ids` the vocabulary is filled with unreachable tokens so that Qwen's special tokens have their real
    ids (151643...). As in Apple's files, the LLaVA layout has no tokenizer.json and no <image> token.
    """
    vocab, merges = _trained()
    if published_ids:
        vocab = vocab | {f"<unused{number}>": number for number in range(SMALL_SIZE, PUBLISHED_SIZE)}
    special = {token: len(vocab) + number for number, token in enumerate(SPECIAL)}
    if layout == "llava_qwen2":
        _write_llava(folder, vocab, merges, special)
    else:
        special[IMAGE] = len(vocab) + len(SPECIAL)
        _write_transformers(folder, vocab, merges, special, image_size)
    generation = {
        "bos_token_id": special[SPECIAL[0]],
        "eos_token_id": [special[SPECIAL[2]], special[SPECIAL[0]]],
        "pad_token_id": special[SPECIAL[0]],
    }
    _dump(folder / "generation_config.json", generation)


def _write_llava(folder: Path, vocab: dict[str, int], merges: list[Any], special: dict[str, int]) -> None:
    _dump(folder / "vocab.json", vocab, indent=None)
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    _dump(folder / "added_tokens.json", special)
    _dump(folder / "tokenizer_config.json", _tokenizer_config(special))
    names = {"eos_token": SPECIAL[2], "pad_token": SPECIAL[0], "additional_special_tokens": list(SPECIAL[1:])}
    _dump(folder / "special_tokens_map.json", names)


def _write_transformers(
    folder: Path, vocab: dict[str, int], merges: list[Any], special: dict[str, int], image_size: int
) -> None:
    from transformers import AddedToken, Qwen2Tokenizer

    tokenizer = Qwen2Tokenizer(vocab=vocab, merges=merges, eos_token=SPECIAL[2], pad_token=SPECIAL[0])
    for token in sorted(special, key=special.__getitem__):
        tokenizer.add_tokens([AddedToken(token, special=True, normalized=False)], special_tokens=True)
    # Qwen2Tokenizer registers its special tokens in an order of its own: rewrite the ids that the checkpoint promises.
    document = json.loads(tokenizer.backend_tokenizer.to_str())
    for entry in document["added_tokens"]:
        entry["id"] = special[entry["content"]]
    document["added_tokens"].sort(key=lambda entry: entry["id"])
    _dump(folder / "tokenizer.json", document, indent=None)
    _dump(folder / "tokenizer_config.json", _tokenizer_config(special) | {"image_token": IMAGE})
    for name, processor in processor_files(image_size).items():
        _dump(folder / name, processor)


def _tokenizer_config(special: dict[str, int]) -> dict[str, Any]:
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    return {
        "add_prefix_space": False,
        "added_tokens_decoder": {str(number): {"content": token, **flags} for token, number in special.items()},
        "additional_special_tokens": [token for token in special if token != SPECIAL[0]],
        "bos_token": None,
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "eos_token": SPECIAL[2],
        "errors": "replace",
        "model_max_length": 8192,
        "pad_token": SPECIAL[0],
        "padding_side": "right",
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }


def _dump(path: Path, document: Any, indent: int | None = 2) -> None:
    path.write_text(json.dumps(document, indent=indent, ensure_ascii=False) + "\n", encoding="utf-8")
