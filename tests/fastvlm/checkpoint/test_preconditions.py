"""Whatever the small files and the headers say: a fault with the key's name or a sound model, and one answer to
whether a checkpoint is usable and can be exported from `doctor`, `predict` and `export`."""

import copy
import itertools
import json
import math
import os
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
from fastvlm.checkpoint.doctor import diagnose
from fastvlm.common import settings
from fastvlm.common.documents import Unreadable
from fastvlm.common.errors import CheckFailed, UserError
from fastvlm.common.findings import collect
from fastvlm.model.surface import load_checkpoint
from fastvlm.synthetic.checkpoint import write_checkpoint
from model_export.config import ExportConfig
from model_export.export import plan

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
    target.mkdir()
    for path in source.iterdir():
        if path.name not in without:
            os.link(path, target / path.name)
    return target


def answers(folder: Path, output: Path) -> tuple[bool, bool]:
    """Whether all agree that the checkpoint is usable, and that it can be exported; only UserError may be raised."""
    report = diagnose(folder, deep=False)
    report.text().encode()
    usable, exportable = not report.faults, report.export.get("export", "no").startswith("yes")
    try:
        plan(ExportConfig(checkpoint=folder, output_dir=output))
        exported = True
    except UserError as error:
        exported = False
        str(error).encode()
    try:
        model = load_checkpoint(folder)
        loaded = bool(np.isfinite(model.language.logits(model.language.embed(np.array([[1, 2]])))).all())
    except UserError:
        loaded = False
    assert (usable, exportable) == (loaded, exported), report.faults
    return usable, exportable


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


def test_without_the_table_that_would_fail(
    make_checkpoint: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = linked(make_checkpoint(layout="llava_qwen2"), tmp_path / "model", "config.json")
    config = json.loads((make_checkpoint(layout="llava_qwen2") / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"rms_norm_eps": -1}))
    assert answers(folder, tmp_path / "out") == (False, False)
    monkeypatch.setattr(settings, "_allows", lambda row, value: True)
    with pytest.raises(CheckFailed, match="NaN or infinite"):
        answers(folder, tmp_path / "out")


# What is changed in config.json -> the finding's rule, and the key that it names.
CONFIGS: list[tuple[dict[str, Any], str, str]] = [
    ({"num_hidden_layers": 100_000}, "setting-invalid", "num_hidden_layers"),
    ({"num_attention_heads": 0}, "setting-invalid", "num_attention_heads"),
    ({"num_attention_heads": 3}, "config-contradictory", "head_dim"),
    ({"num_key_value_heads": 3}, "config-contradictory", "num_attention_heads"),
    ({"hidden_act": "x"}, "activation-unknown", "hidden_act"),
    ({"rope_theta": 0}, "setting-invalid", "rope_theta"),
    ({"mm_vision_model_args": {"embed_dims": [0, 16, 32, 64, 128]}}, "setting-invalid",
     "mm_vision_model_args.embed_dims"),
    ({"mm_vision_model_args": {"embed_dims": [8, 16, 32, 64, 127]}}, "config-unusable", ""),
    ({"mm_vision_model_args": {"loops": 1}}, "setting-unknown", "mm_vision_model_args"),
    ({"rope_scaling": {"type": "x"}}, "setting-invalid", "rope_scaling.type"),
    ({"rope_scaling": {"type": "yarn"}}, "config-unusable", ""),
    ({"rope_scaling": {"type": "longrope", "short_factor": [1] * 8, "long_factor": [1, 2]}}, "rope-unusable",
     "rope_scaling"),
    ({"rope_scaling": {"type": "linear", "rope_type": "yarn"}}, "config-contradictory", "rope_scaling"),
    ({"layer_types": ["sliding_attention"] * 2}, "config-contradictory", "layer_types"),
    ({"image_aspect_ratio": "anyres"}, "image-strategy-unknown", "image_aspect_ratio"),
    ({"vision_config": 5}, "setting-invalid", "vision_config"),
    ({"mm_use_im_start_end": True}, "prompt-unsupported", "mm_use_im_start_end"),
    ({"rms_norm_eps": math.nan}, "not-json", ""),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "rule", "key"), CONFIGS, ids=[f"{rule} {key}" for _, rule, key in CONFIGS])
def test_what_is_refused_is_named(
    make_checkpoint: Make, tmp_path: Path, changes: dict[str, Any], rule: str, key: str
) -> None:
    source = make_checkpoint(layout="llava_qwen2")
    folder = linked(source, tmp_path / "model", "config.json")
    (folder / "config.json").write_text(json.dumps(json.loads((source / "config.json").read_text()) | changes))
    found = [(finding.rule, finding.where) for finding in examine(folder).faults]
    assert (rule, f"config.json: {key}" if key else "config.json") in found
    assert "tensors-misshapen" not in dict(found)
    assert answers(folder, tmp_path / "out") == (False, False)


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_scaling": {"type": "linear", "factor": 2.0}},
        {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
        {"use_sliding_window": True, "max_window_layers": 0},
        {"hidden_act": "gelu"},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_what_only_transformers_runs_is_usable_and_not_exportable(
    make_checkpoint: Make, tmp_path: Path, changes: dict[str, Any]
) -> None:
    source = make_checkpoint(layout="llava_qwen2")
    folder = linked(source, tmp_path / "model", "config.json")
    (folder / "config.json").write_text(json.dumps(json.loads((source / "config.json").read_text()) | changes))
    assert answers(folder, tmp_path / "out") == (True, False)


@pytest.mark.parametrize("layout", ["llava_qwen2", "fast_vlm"])
def test_null_is_absent(make_checkpoint: Make, tmp_path: Path, layout: str) -> None:
    source = make_checkpoint(layout=layout)
    folder = linked(source, tmp_path / "model", "config.json")
    config = json.loads((source / "config.json").read_text())
    nulls = dict.fromkeys(
        ("head_dim", "rope_theta", "rope_scaling", "rope_parameters", "sliding_window", "layer_types")
    )
    config.get("text_config", config).update(nulls)
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": None, "image_token_id": None}))
    assert answers(folder, tmp_path / "out") == (True, True)


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
    assert answers(folder, tmp_path / "out") == (True, True)
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
    assert answers(folder, tmp_path / "out") == (True, True)
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
    names = {f"t{number}": f"model-{number:06d}.safetensors" for number in range(100_000)}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    (finding,) = collect(weights.scan(tmp_path))[1]
    assert finding.rule == "shard-missing" and len(finding.details) == 100_000 and len(str(finding)) < 2000


def test_names_cannot_write_on_the_terminal(make_checkpoint: Make, tmp_path: Path) -> None:
    source = make_checkpoint(layout="fast_vlm")
    folder = linked(source, tmp_path / "model", "model.safetensors")
    tensors = load_file(source / "model.safetensors")
    save_file(tensors | {"a\n\x1b[31mb": torch.zeros(2)}, folder / "model.safetensors")
    found = examine(folder)
    assert [fault.details for fault in found.faults] == [(r"a\n\x1b[31mb",)]


def test_synthetic_checkpoints_have_nothing_to_say(tmp_path: Path) -> None:
    for layout in ("llava_qwen2", "fast_vlm"):
        folder = write_checkpoint(tmp_path / layout, layout=layout)
        assert examine(folder).warnings == [] and answers(folder, tmp_path / "out") == (True, True)


def test_activations_that_are_not_looked_up_are_transformers_own() -> None:
    assert all(layouts.is_activation(name) for name in ("gelu", "silu", "relu"))
    assert set(layouts._ACTIVATIONS) <= set(ACT2FN)
    assert not layouts.is_activation("x")
