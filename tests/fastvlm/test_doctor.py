"""`python -m fastvlm doctor`: each kind of broken input has its own line and exit 2; a sound one is described."""

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastvlm.checkpoint import doctor
from fastvlm.common.arguments import Parser
from fastvlm.common.cli import run
from fastvlm.synthetic.checkpoint import write_checkpoint


def main(*arguments: str) -> int:
    def build_parser() -> Parser:
        parser = Parser(prog="test")
        doctor.add_parser(parser.add_subparsers())
        return parser

    return run(build_parser, ["doctor", *arguments])


def edit_header(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    change(header)
    encoded = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(encoded)) + encoded + raw[8 + length :])


def edit_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))


def truncated_header(folder: Path) -> None:
    path = folder / "model-00001-of-00002.safetensors"
    path.write_bytes(path.read_bytes()[:1000])


def truncated_data(folder: Path) -> None:
    path = folder / "model-00001-of-00002.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def lying_offsets(folder: Path) -> None:
    def change(header: dict[str, Any]) -> None:
        entry = header["model.norm.weight"]
        entry["data_offsets"] = [10**9, 10**9 + 256]

    edit_header(folder / "model-00002-of-00002.safetensors", change)


def lying_shape(folder: Path) -> None:
    def change(header: dict[str, Any]) -> None:
        header["model.norm.weight"]["shape"] = [63]

    edit_header(folder / "model-00002-of-00002.safetensors", change)


def lying_length(folder: Path) -> None:
    path = folder / "model-00001-of-00002.safetensors"
    path.write_bytes(struct.pack("<Q", 2**62) + path.read_bytes()[8:])


def missing_shard(folder: Path) -> None:
    (folder / "model-00002-of-00002.safetensors").unlink()


def wrong_index(folder: Path) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["model.layers.7.mlp.up_proj.weight"] = "model-00002-of-00002.safetensors"
    path.write_text(json.dumps(index))


def swapped_index(folder: Path) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["model.norm.weight"] = "model-00001-of-00002.safetensors"
    path.write_text(json.dumps(index))


def index_without_map(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text("{}")


def no_index(folder: Path) -> None:
    (folder / "model.safetensors.index.json").unlink()
    missing_shard(folder)


def no_whole_set(folder: Path) -> None:
    (folder / "model.safetensors.index.json").unlink()
    (folder / "model-00002-of-00002.safetensors").rename(folder / "weights.safetensors")
    (folder / "model-00001-of-00002.safetensors").rename(folder / "more.safetensors")


def large_tokenizer(folder: Path) -> None:
    path = folder / "added_tokens.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"<extra>": 9999}))


def no_tokenizer(folder: Path) -> None:
    (folder / "vocab.json").unlink()


def damaged_tokenizer(folder: Path) -> None:
    (folder / "vocab.json").write_text('{"a": "b"}')


def nan_weights(folder: Path) -> None:
    path = folder / "model-00001-of-00002.safetensors"
    tensors = load_file(path)
    tensors["model.vision_tower.vision_tower.model.patch_embed.0.reparam_conv.bias"][3] = torch.nan
    save_file(tensors, path)


def infinite_weights(folder: Path) -> None:
    path = folder / "model-00002-of-00002.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"][3] = torch.inf
    save_file(tensors, path)


LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1\nsize 12345\n"


def lfs_weights(folder: Path) -> None:
    (folder / "model-00001-of-00002.safetensors").write_text(LFS)


def lfs_config(folder: Path) -> None:
    (folder / "config.json").write_text(LFS)


def other_model(folder: Path) -> None:
    edit_config(folder, model_type="llama")


def other_tower(folder: Path) -> None:
    edit_config(folder, mm_vision_tower="openai/clip-vit-large-patch14-336")


def artefact(folder: Path) -> None:
    (folder / "export.json").write_text("{}")


def not_json(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": ')


def quantized(folder: Path) -> None:
    edit_config(folder, quantization={"bits": 4, "group_size": 64})


def quantized_elsewhere(folder: Path) -> None:
    edit_config(folder, quantization_config={"quant_method": "gptq", "bits": 4})


def integers(folder: Path) -> None:
    path = folder / "model-00002-of-00002.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"] = torch.ones(64, dtype=torch.int8)
    save_file(tensors, path)


def only_language(folder: Path) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    for file in set(index["weight_map"].values()):
        tensors = {n: t for n, t in load_file(folder / file).items() if "vision_tower" not in n}
        save_file(tensors, folder / file)
        kept = set(tensors)
        index["weight_map"] = {n: f for n, f in index["weight_map"].items() if f != file or n in kept}
    path.write_text(json.dumps(index))


def config_without_sizes(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    del config["hidden_size"]
    (folder / "config.json").write_text(json.dumps(config))


def broken_template(folder: Path) -> None:
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": "{{ raise_exception('no') }}"}))


BROKEN = [
    (truncated_header, "model-00001-of-00002.safetensors: truncated safetensors header"),
    (truncated_data, "model-00001-of-00002.safetensors: truncated data"),
    (lying_offsets, "lying safetensors header: model.norm.weight"),
    (lying_shape, "lying safetensors header: model.norm.weight"),
    (lying_length, "lying safetensors header: it claims"),
    (missing_shard, "missing shard: model-00002-of-00002.safetensors"),
    (wrong_index, "wrong index: model.safetensors.index.json names 1 tensors"),
    (swapped_index, "wrong index: model.safetensors.index.json names 1 tensors"),
    (index_without_map, "wrong index: model.safetensors.index.json has no weight_map"),
    (no_index, "missing shard: model-00002-of-00002.safetensors"),
    (no_whole_set, "no usable weights"),
    (large_tokenizer, "wrong tokenizer size: its ids go up to 9999"),
    (no_tokenizer, "no tokenizer"),
    (damaged_tokenizer, "vocab.json: 1 entries are not text with a whole number as its id"),
    (nan_weights, "NaN or infinite weights in 1 tensors"),
    (infinite_weights, "NaN or infinite weights in 1 tensors"),
    (lfs_weights, "Git-LFS pointer: model-00001-of-00002.safetensors"),
    (lfs_config, "Git-LFS pointer: config.json"),
    (other_model, "another model: config.json says model_type 'llama'"),
    (other_tower, "no resolution"),
    (artefact, "an exported artefact, not a checkpoint"),
    (not_json, "config.json: not JSON"),
    (quantized, "a quantized model in MLX's format"),
    (quantized_elsewhere, "a quantized checkpoint: config.json"),
    (integers, "weights of type int8"),
    (only_language, "no vision tower among the weights"),
    (config_without_sizes, "config.json: missing"),
    (broken_template, "the chat template fails"),
]


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("doctor") / "model", layout="llava_qwen2", shards=2)


@pytest.mark.parametrize(("breakage", "line"), BROKEN, ids=lambda value: getattr(value, "__name__", None))
def test_each_kind_of_broken_input(
    sound: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], breakage: Callable[[Path], None], line: str
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(sound, folder)
    breakage(folder)
    assert main(str(folder)) == 2
    out, err = capsys.readouterr()
    assert sum(text.startswith(f"fault: {line}") or f": {line}" in text for text in out.splitlines()) == 1, out
    assert err.splitlines()[-1].startswith(f"error: cannot use checkpoint {folder}: ")
    assert "Traceback" not in err
    assert "\nexport " not in out


def test_every_fault_at_once(sound: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "model"
    shutil.copytree(sound, folder)
    for breakage in (truncated_header, lying_offsets, large_tokenizer, quantized_elsewhere):
        breakage(folder)
    assert main(str(folder), "--json") == 2
    out, err = capsys.readouterr()
    document = json.loads(out.splitlines()[-1])
    assert document["usable"] is False and document["export"] == {}
    found = " ".join(fault["fault"] for fault in document["faults"])
    for word in ("truncated safetensors header", "lying safetensors header", "wrong tokenizer size", "quantized"):
        assert word in found
    assert "more faults" in err


def test_paths(tmp_path: Path, sound: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "archive.zip").write_bytes(b"PK")
    expected = {
        tmp_path / "nowhere": "path not there",
        tmp_path / "archive.zip": "not a folder",
        sound.parent: "did you mean its folder model?",
    }
    for path, words in expected.items():
        assert main(str(path)) == 2
        assert words in capsys.readouterr().err


@pytest.mark.parametrize("layout", ["llava_qwen2", "fast_vlm"])
@pytest.mark.parametrize("form", ["folded", "training"])
def test_a_sound_checkpoint(
    make_checkpoint: Callable[..., Path], capsys: pytest.CaptureFixture[str], layout: str, form: str
) -> None:
    path = make_checkpoint(layout=layout, form=form)
    assert main(str(path), "--json") == 0
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert document["usable"] and document["faults"] == document["warnings"] == []
    assert (document["layout"], document["form"], document["dtype"]) == (layout, form, "float32")
    assert document["image_token"] == "<image> = 512" and document["tokenizer"] == "513 tokens for 576 rows"
    assert (document["chat_template"], document["weights"]) == ("Qwen's", "all finite")
    parts = document["parts"]
    assert parts["embeddings"]["parameters"] == parts["lm_head"]["parameters"] == 576 * 64
    assert parts["projector"]["parameters"] == 256 * 64 + 64 + 64 * 64 + 64
    counted = [n for n in load_file(path / "model.safetensors").items() if not n[0].endswith("num_batches_tracked")]
    assert parts["total"]["parameters"] == sum(tensor.numel() for _, tensor in counted)
    assert parts["total"]["megabytes"] == pytest.approx(sum(tensor.nbytes for _, tensor in counted) / 1e6)
    assert document["export"]["command"].startswith(f"python -m model_export all --checkpoint {path}")


def test_quick_reads_no_weights(sound: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "model"
    shutil.copytree(sound, folder)
    nan_weights(folder)
    assert main(str(folder), "--quick") == 0
    assert "not read" in capsys.readouterr().out
