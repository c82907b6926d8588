"""Run the original implementation (apple/ml-fastvlm) on the conversations of golden.json and keep what it gives.

Not run by the tests; README.md says when and how. It needs the original's own packages, not this project's.

    python make.py REPOSITORY DEMO_CHECKPOINT LLAVA_CHECKPOINT golden.json
"""

import copy
import json
import sys
import tempfile
import types
from pathlib import Path
from types import SimpleNamespace
from typing import Any

MAX_LENGTH = 8192  # of a tokenizer, where a conversation doesn't say `longest`


def original(repository: Path) -> types.ModuleType:
    """The original's training module, without the models and the trainer that it imports."""
    for name, folder in {"llava": "llava", "llava.train": "llava/train"}.items():
        package = types.ModuleType(name)  # its __init__ would import the whole project
        package.__path__ = [str(repository / folder)]
        sys.modules[name] = package
    sys.modules["llava.model"] = types.ModuleType("llava.model")
    trainer = types.ModuleType("llava.train.llava_trainer")
    trainer.LLaVATrainer = object
    sys.modules["llava.train.llava_trainer"] = trainer
    from llava import conversation
    from llava.train import train_qwen

    conversation.default_conversation = conversation.conv_templates["qwen_2"]  # as --version qwen_2 does
    return train_qwen


def tokenizer_of(checkpoint: Path, length: int) -> Any:
    """The checkpoint's tokenizer as the original's `train` loads it: the slow one, in Python."""
    from transformers import AutoTokenizer

    with tempfile.TemporaryDirectory() as folder:
        if not (checkpoint / "vocab.json").exists():
            checkpoint = slow_files(checkpoint, Path(folder))
        tokenizer = AutoTokenizer.from_pretrained(
            checkpoint, model_max_length=length, padding_side="right", use_fast=False
        )
    if tokenizer.unk_token:
        tokenizer.pad_token = tokenizer.unk_token
    else:
        tokenizer.legacy = False
    return tokenizer


def slow_files(checkpoint: Path, folder: Path) -> Path:
    """The vocabulary of a tokenizer.json in the files that a slow tokenizer reads."""
    document = json.loads((checkpoint / "tokenizer.json").read_text("utf-8"))
    pairs = [pair if isinstance(pair, str) else " ".join(pair) for pair in document["model"]["merges"]]
    added = {str(token.pop("id")): token for token in document["added_tokens"]}
    config = {"tokenizer_class": "Qwen2Tokenizer", "added_tokens_decoder": added, "errors": "replace"}
    config |= {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "unk_token": None, "bos_token": None}
    (folder / "vocab.json").write_text(json.dumps(document["model"]["vocab"]), "utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *pairs]) + "\n", "utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(config), "utf-8")
    return folder


def run(module: types.ModuleType, case: dict[str, Any], tokenizer: Any) -> dict[str, Any]:
    """What the original makes of a conversation: ids and labels before the collator, or the exception."""
    source = copy.deepcopy(case["conversations"])
    conversation = module.conversation_lib.default_conversation
    usual = conversation.system
    if "system" in case:  # the original knows no such turn, but a template has a system line
        conversation.system, source = f"<|im_start|>system\n{case['system']}", source[1:]
    if "with_mark" in case:
        source[0]["value"] = case["with_mark"]
    try:
        sources = [source]
        if case["images"] == 1:  # its dataset can't open several, and calls this only for what it opened
            arguments = SimpleNamespace(is_multimodal=True, mm_use_im_start_end=False)
            sources = module.preprocess_multimodal(sources, arguments)
        result = module.preprocess(sources, tokenizer, has_image=case["images"] > 0)
    except Exception as error:
        return {"raises": f"{type(error).__name__}: {error}"}
    finally:
        conversation.system = usual
    return {"ids": result["input_ids"][0].tolist(), "labels": result["labels"][0].tolist()}


def batch(module: types.ModuleType, results: list[dict[str, Any]], tokenizer: Any) -> dict[str, Any]:
    """What the original's collator makes of results."""
    import torch

    rows = [{"input_ids": torch.tensor(row["ids"]), "labels": torch.tensor(row["labels"])} for row in results]
    filled = module.DataCollatorForSupervisedDataset(tokenizer)(rows)
    return {name: value.long().tolist() for name, value in filled.items()}


def main() -> None:
    """See the module's docstring."""
    repository, *checkpoints, path = map(Path, sys.argv[1:])
    module, document = original(repository), json.loads(path.read_text("utf-8"))
    batches = {}
    for name, checkpoint in zip(("demo", "synthetic"), checkpoints, strict=True):
        for case in document["cases"]:
            tokenizer = tokenizer_of(checkpoint, case.get("longest", MAX_LENGTH))
            case.setdefault("original", {})[name] = run(module, case, tokenizer)
            if "system" in case or "with_mark" in case:
                unchanged = {key: case[key] for key in ("images", "conversations")}
                case.setdefault("original_unchanged", {})[name] = run(module, unchanged, tokenizer)
        found = {case["name"]: case["original"][name] for case in document["cases"]}
        batches[name] = batch(module, [found[row] for row in document["batch"]], tokenizer_of(checkpoint, MAX_LENGTH))
    document["batches"] = batches
    compact = json.JSONEncoder(separators=(",", ":")).encode  # a conversation a line
    lines = ",\n".join(map(compact, document.pop("cases")))
    path.write_text(f'{compact(document)[:-1]},\n"cases":[\n{lines}\n]}}\n', "utf-8")


if __name__ == "__main__":
    main()
