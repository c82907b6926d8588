"""Whatever the small files and the headers say: a fault with the key's name or a sound model."""

import copy
import itertools
import json
import math
import os
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from transformers.activations import ACT2FN

from fastvlm.checkpoint import layouts, weights
from fastvlm.checkpoint.checkpoint import examine, open_checkpoint
from fastvlm.common.documents import Unreadable
from fastvlm.common.errors import UserError
from fastvlm.common.findings import collect
from fastvlm.model.torch_parts import load_checkpoint
from tests.fastvlm.checkpoint.edits import answers

Make = Callable[..., Path]
VALUES = ["null", "true", "-1", "0", "1", "1.5", "1e999", "NaN", "2147483648", "9223372036854775808", '"x"', '""',
          "[]", "{}", "[0]", "[[1]]", r'"\ud800"']  # fmt: skip
FILES = (
    "config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "tokenizer_config.json",
    "added_tokens.json",
)
# What the synthetic checkpoints don't say, but others do.
MORE = {
    "rope_scaling": {"type": "linear", "factor": 2.0},
    "layer_types": ["full_attention"] * 2,
    "head_dim": 16,
    "quantization_config": None,
}


def places(document: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    for key in document if isinstance(document, dict) else range(min(len(document), 1)):
        yield (*at, key)
        if isinstance(document[key], (dict, list)):
            yield from places(document[key], (*at, key))


def with_value(document: Any, at: tuple[Any, ...], value: str) -> str:
    """The document's JSON with `value`, which need not be one that json.dumps would write, in this place."""
    changed = copy.deepcopy(document)
    inner = changed
    for key in at[:-1]:
        inner = inner[key]
    inner[at[-1]] = "HERE"
    return json.dumps(changed).replace('"HERE"', value)


def linked(source: Path, target: Path, *without: str) -> Path:
    return Path(shutil.copytree(source, target, ignore=shutil.ignore_patterns(*without), copy_function=os.link))


def cases(source: Path) -> Iterator[tuple[str, tuple[Any, ...], str, str]]:
    """Every key of every small file with one of VALUES each: another one for every next key."""
    value = itertools.cycle(VALUES)
    for name in FILES:
        if not (source / name).is_file():
            continue
        document = json.loads((source / name).read_text())
        if name == "config.json":
            document.get("text_config", document).update(MORE)
        for at in places(document):
            chosen = next(value)
            yield name, at, chosen, with_value(document, at, chosen)


@pytest.mark.parametrize("layout", ["llava_qwen2", "fast_vlm"])
def test_any_value_of_any_key_is_refused_or_sound(make_checkpoint: Make, tmp_path: Path, layout: str) -> None:
    """Every third key in each layout, by what all three verbs ask first; other tests load and plan."""
    source, seen = make_checkpoint(layout=layout), set()
    for number, (name, at, value, text) in enumerate(itertools.islice(cases(source), len(layout) % 3, None, 3)):
        folder = linked(source, tmp_path / str(number), name)
        (folder / name).write_text(text)
        try:
            open_checkpoint(folder).tokenizer()
            seen.add(True)
        except UserError as error:
            str(error).encode()
            seen.add(False)
        except Exception as error:
            raise AssertionError(f"{name}: {at} is {value}") from error
    assert seen == {True, False}


def test_embeddings_without_a_row_for_the_image_token(make_checkpoint: Make, tmp_path: Path) -> None:
    """They end with the tokenizer, as after resize_token_embeddings: the same answers as with the row that is there."""
    source = make_checkpoint(layout="llava_qwen2")
    whole = load_file(source / "model.safetensors")
    config = json.loads((source / "config.json").read_text())
    folder = linked(source, tmp_path / "model", "config.json", "model.safetensors", "added_tokens.json")
    (folder / "added_tokens.json").write_text('{"<|endoftext|>": 509, "<|im_start|>": 510, "<|im_end|>": 511}')
    names = ("model.embed_tokens.weight", "lm_head.weight")
    save_file(whole | {name: whole[name][:512].clone() for name in names}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": 512}))
    assert answers(folder) == (True, True)
    checkpoint = open_checkpoint(folder)
    assert checkpoint.image_token_id == 512 and checkpoint.hf_config.text_config.vocab_size == 513
    assert [warning for warning in checkpoint.warnings if warning.startswith("image-token: embeddings")]
    picture = np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)
    short, reference = load_checkpoint(folder), load_checkpoint(source)
    got, expected = (model.logits("What is it?", picture) for model in (short, reference))
    assert got.shape[-1] == 513 and np.array_equal(got[..., :512], expected[..., :512])
    assert np.array_equal(got[..., 512], got[..., 0])
    from model_export.language.llm import export_llm
    from quantization.recipe import load_recipe

    (tmp_path / "llm").mkdir()
    export_llm(checkpoint, load_recipe("fp16"), tmp_path / "llm")
    stored = load_file(tmp_path / "llm/model.safetensors")
    for name in names:
        rows = stored[f"language_model.{name}"]
        assert rows.shape == (513, 64) and torch.equal(rows[512], rows[0])
        assert torch.equal(rows[:512], whole[name][:512].half())


def test_harmless_and_said(make_checkpoint: Make, tmp_path: Path) -> None:
    """A tensor that nothing here uses, shards without their index, and far more rows than tokens."""
    source = make_checkpoint(layout="llava_qwen2")
    tensors = load_file(source / "model.safetensors")
    config = json.loads((source / "config.json").read_text()) | {"vocab_size": 4096}
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = torch.cat([tensors[name], torch.zeros(4096 - 576, 64)])
    tensors["model.image_newline"] = torch.zeros(64)
    folder = linked(source, tmp_path / "model", "config.json", "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    parts = [sorted(tensors)[::2], sorted(tensors)[1::2]]
    for number, part in enumerate(parts, 1):
        save_file({name: tensors[name] for name in part}, folder / f"model-{number:05d}-of-00002.safetensors")
    warnings = open_checkpoint(folder).warnings
    assert [warning.partition(":")[0] for warning in warnings] == ["index-missing", "tensor-ignored", "tokenizer-size"]
    assert answers(folder) == (True, True)
    twice = {name: tensors[name] for name in [*parts[0], parts[1][0]]}
    save_file(twice, folder / "model-00001-of-00002.safetensors")
    with pytest.raises(UserError, match="shards-wrong"):
        open_checkpoint(folder)


def header_with(entry: Any, more: str = "") -> bytes:
    one = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    text = json.dumps({"a": one if entry is None else entry if not isinstance(entry, dict) else one | entry})
    raw = (text[:-1] + more + "}").encode()
    return struct.pack("<Q", len(raw)) + raw + bytes(8)


HEADERS: dict[str, bytes] = {
    "one offset": header_with({"data_offsets": [0]}),
    "three offsets": header_with({"data_offsets": [0, 4, 8]}),
    "infinite offset": header_with({"data_offsets": [0, math.inf]}),
    "float offset": header_with({"data_offsets": [0.0, 8.0]}),
    "true as an offset": header_with({"data_offsets": [False, 8]}),
    "text as an offset": header_with({"data_offsets": ["0", "8"]}),
    "negative size": header_with({"shape": [-2]}),
    "float size": header_with({"shape": [2.0]}),
    "no entry": header_with(5),
    "no dtype": header_with({"dtype": None}),
    "half a surrogate pair": header_with(None, r', "\ud800": {"dtype": "F32", "shape": [0], "data_offsets": [8, 8]}'),
    "a name twice": header_with(None, ', "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}'),
    "a key twice": header_with(None, ', "b": {"dtype": "F32", "dtype": "F32", "shape": [0], "data_offsets": [8, 8]}'),
    "notes that are no text": header_with(None, ', "__metadata__": {"format": 1}'),
    "a surrogate in the notes": header_with(None, r', "__metadata__": {"format": "\ud800"}'),
    "200,000 sizes of 2^62": header_with({"shape": [1 << 62] * 200_000}),
    "a size past any file": header_with({"shape": [1 << 62, 1 << 62]}),
    "a gap": header_with({"shape": [1], "data_offsets": [4, 8]}),
    "UTF-16": (lambda raw: struct.pack("<Q", len(raw)) + raw)("{}".encode("utf-16")),
    "nested deeply": (lambda raw: struct.pack("<Q", len(raw)) + raw)(b'{"a":' * 100_000),
}


@pytest.mark.parametrize("name", HEADERS)
def test_headers_are_refused_at_least_as_strictly_as_by_safetensors(tmp_path: Path, name: str) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(header_with(None))
    assert weights.read_header(file)["a"].shape == (2,)
    file.write_bytes(HEADERS[name])
    with pytest.raises(Unreadable) as caught:
        weights.read_header(file)
    assert len(str(caught.value)) < 400
    if name != "a name twice":  # there the library takes the last
        with pytest.raises((SafetensorError, OverflowError)), safe_open(file, "pt") as opened:
            opened.keys()


@pytest.mark.parametrize("state", [{1: torch.zeros(2)}, {"\ud800": torch.zeros(2)}, {"a": torch.eye(2).to_sparse()}])
def test_bin_files_hold_dense_tensors_by_text(tmp_path: Path, state: dict[Any, torch.Tensor]) -> None:
    torch.save(state, tmp_path / "pytorch_model.bin")
    (finding,) = collect(weights.scan(tmp_path))[1]
    assert (finding.rule, finding.where) == ("state-dict-invalid", "pytorch_model.bin")


def test_an_index_of_many_shards_is_read_once(tmp_path: Path) -> None:
    names = {f"t{number}": f"model-{number:06d}.safetensors" for number in range(20_000)}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    (finding,) = collect(weights.scan(tmp_path))[1]
    assert finding.rule == "shard-missing" and len(finding.details) == 20_000 and len(str(finding)) < 2000


def test_names_cannot_write_on_the_terminal(make_checkpoint: Make, tmp_path: Path) -> None:
    source = make_checkpoint(layout="fast_vlm")
    folder = linked(source, tmp_path / "model", "model.safetensors")
    tensors = load_file(source / "model.safetensors")
    save_file(tensors | {"a\n\x1b[31mb": torch.zeros(2)}, folder / "model.safetensors")
    found = examine(folder)
    assert [fault.details for fault in found.faults] == [(r"a\n\x1b[31mb",)]


def test_activations_that_are_not_looked_up_are_transformers_own() -> None:
    assert all(layouts.is_activation(name) for name in ("gelu", "silu", "relu"))
    assert set(layouts._ACTIVATIONS) <= set(ACT2FN)
    assert not layouts.is_activation("x")
