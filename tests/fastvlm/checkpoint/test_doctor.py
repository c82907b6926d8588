"""`python -m fastvlm doctor`: each kind of broken input has its own finding and exit 2; a sound one is described."""

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from edits import edit_config, edit_header, edit_json, edit_tensors
from safetensors.torch import load_file, save_file

from fastvlm.__main__ import build_parser
from fastvlm.common.cli import run
from fastvlm.synthetic.checkpoint import write_checkpoint

ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
INDEX, NORM = "model.safetensors.index.json", "model.norm.weight"
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1\nsize 12345\n"


def main(*arguments: str) -> int:
    return run(build_parser, ["doctor", *arguments])


def rewrite(name: str, change: Callable[[bytes], bytes]) -> Callable[[Path], Any]:
    return lambda folder: (folder / name).write_bytes(change((folder / name).read_bytes()))


def index_with(change: Callable[[dict[str, str]], Any]) -> Callable[[Path], None]:
    def act(folder: Path) -> None:
        index = json.loads((folder / INDEX).read_text())
        change(index["weight_map"])
        (folder / INDEX).write_text(json.dumps(index))

    return act


def header_with(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: edit_header(folder / TWO, lambda header: header[NORM].update(changes))


def value(file: str, name: str, number: float) -> Callable[[Path], None]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name][3] = number

    return lambda folder: edit_tensors(folder, change, file)


def no_index(folder: Path) -> None:
    (folder / INDEX).unlink()
    (folder / TWO).unlink()


def no_whole_set(folder: Path) -> None:
    (folder / INDEX).unlink()
    (folder / TWO).rename(folder / "weights.safetensors")
    (folder / ONE).rename(folder / "more.safetensors")


def only_language(folder: Path) -> None:
    for file in (ONE, TWO):
        save_file({n: t for n, t in load_file(folder / file).items() if "vision_tower" not in n}, folder / file)
    (folder / INDEX).unlink()


# What is done to a sound checkpoint -> the finding's rule, and where it is.
BROKEN: dict[str, tuple[Callable[[Path], Any], str, str]] = {
    "truncated header": (rewrite(ONE, lambda raw: raw[:1000]), "file-truncated", ONE),
    "truncated data": (rewrite(ONE, lambda raw: raw[:-1000]), "file-truncated", ONE),
    "offsets": (header_with(data_offsets=[10**9, 10**9 + 256]), "header-invalid", TWO),
    "shape": (header_with(shape=[63]), "header-invalid", TWO),
    "length": (rewrite(ONE, lambda raw: struct.pack("<Q", 2**62) + raw[8:]), "file-truncated", ONE),
    "missing shard": (lambda folder: (folder / TWO).unlink(), "shard-missing", ""),
    "index names more": (index_with(lambda names: names.update({"model.layers.7.x": TWO})), "index-wrong", INDEX),
    "index names another file": (index_with(lambda names: names.update({NORM: ONE})), "index-wrong", INDEX),
    "index without a map": (lambda folder: (folder / INDEX).write_text("{}"), "index-wrong", INDEX),
    "neither index nor shard": (no_index, "shard-missing", ""),
    "no whole set": (no_whole_set, "weights-missing", ""),
    "large tokenizer": (
        lambda folder: edit_json(folder / "added_tokens.json", **{"<extra>": 9999}), "tokenizer-size", "tokenizer"
    ),
    "no tokenizer": (lambda folder: (folder / "vocab.json").unlink(), "tokenizer-missing", ""),
    "damaged tokenizer": (
        lambda folder: (folder / "vocab.json").write_text('{"a": "b"}'), "tokenizer-invalid", "vocab.json"
    ),
    "NaN": (
        value(ONE, "model.vision_tower.vision_tower.model.patch_embed.0.reparam_conv.bias", torch.nan),
        "weights-not-finite", "",
    ),
    "infinity": (value(TWO, NORM, torch.inf), "weights-not-finite", ""),
    "weights in LFS": (lambda folder: (folder / ONE).write_bytes(LFS), "git-lfs-pointer", ONE),
    "config in LFS": (lambda folder: (folder / "config.json").write_bytes(LFS), "git-lfs-pointer", "config.json"),
    "other model": (lambda folder: edit_config(folder, model_type="llama"), "model-other", "config.json: model_type"),
    "other tower": (
        lambda folder: edit_config(folder, mm_vision_tower="openai/clip-vit-large-patch14-336"),
        "resolution-missing", "config.json: mm_vision_tower",
    ),
    "an artefact": (lambda folder: (folder / "export.json").write_text("{}"), "folder-is-artefact", ""),
    "not JSON": (
        lambda folder: (folder / "config.json").write_text('{"model_type": '), "not-json", "config.json"
    ),
    "key twice": (
        lambda folder: (folder / "config.json").write_text('{"model_type": "a", "model_type": "b"}'),
        "duplicate-key", "config.json",
    ),
    "quantized by MLX": (
        lambda folder: edit_config(folder, quantization={"bits": 4, "group_size": 64}), "folder-is-mlx-quantized", ""
    ),
    "quantized elsewhere": (
        lambda folder: edit_config(folder, quantization_config={"quant_method": "gptq", "bits": 4}),
        "checkpoint-quantized", "config.json",
    ),
    "integers": (
        lambda folder: edit_tensors(folder, lambda held: {**held, NORM: torch.ones(64, dtype=torch.int8)}, TWO),
        "dtype-unsupported", "weights",
    ),
    "language only": (only_language, "tower-missing", "weights"),
    "config without sizes": (
        lambda folder: edit_json(folder / "config.json", without=["hidden_size"]), "setting-missing", "config.json"
    ),
    "template that fails": (
        lambda folder: edit_json(folder / "tokenizer_config.json", chat_template="{{ raise_exception('no') }}"),
        "chat-template-fails", "chat template",
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("doctor") / "model", layout="llava_qwen2", shards=2)


@pytest.mark.parametrize("name", BROKEN)
def test_each_kind_of_broken_input(sound: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    change, rule, where = BROKEN[name]
    folder = Path(shutil.copytree(sound, tmp_path / "model"))
    change(folder)
    assert main(str(folder)) == 2
    out, err = capsys.readouterr()
    prefix = f"fault: {rule}: {where or folder}: got "
    assert sum(line.startswith(prefix) for line in out.splitlines()) == 1, out
    assert err.splitlines()[-1].startswith(f"error: cannot use checkpoint {folder}: ") and rule not in err
    assert "Traceback" not in err and "\nexport " not in out


def test_every_fault_at_once(sound: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = Path(shutil.copytree(sound, tmp_path / "model"))
    for name in ("truncated header", "offsets", "large tokenizer", "quantized elsewhere"):
        BROKEN[name][0](folder)
    assert main(str(folder), "--json") == 2
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert document["usable"] is False and document["export"] == {}
    assert [fault["rule"] for fault in document["faults"]] == [
        "file-truncated", "header-invalid", "checkpoint-quantized", "tokenizer-size", "image-token"
    ]  # fmt: skip


def test_paths(tmp_path: Path, sound: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "archive.zip").write_bytes(b"PK")
    expected = {
        str(tmp_path / "nowhere"): "path-missing",
        str(tmp_path / "archive.zip"): "path-is-file",
        str(sound.parent): "did you mean its folder model?",
        "https://example.com/model": "path-is-address: https://example.com/model: ",
    }
    for path, words in expected.items():
        assert main(path) == 2
        assert words in capsys.readouterr().out


def test_what_macos_adds_is_no_part_of_a_checkpoint(sound: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(sound, tmp_path / "model"))
    for path in [folder / ".DS_Store", *(folder / f"._{path.name}" for path in sound.iterdir())]:
        path.write_bytes(b"\0\5\x16\7 not what its name says")
    assert main(str(folder)) == 0
    (folder / INDEX).unlink()
    assert main(str(folder)) == 0


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
    folder = Path(shutil.copytree(sound, tmp_path / "model"))
    BROKEN["NaN"][0](folder)
    assert main(str(folder), "--quick") == 0
    assert "not read" in capsys.readouterr().out
