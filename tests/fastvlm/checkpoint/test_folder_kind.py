"""What is given instead of a checkpoint is named with its remedy, before any fault; a sound checkpoint is no kind."""

import json
import shlex
import shutil
from collections.abc import Callable, Collection
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastvlm.checkpoint import folder_kind
from fastvlm.checkpoint.checkpoint import examine, open_checkpoint
from fastvlm.checkpoint.doctor import diagnose
from fastvlm.common.errors import UserError
from tests.fastvlm.checkpoint import broken
from tests.fastvlm.checkpoint.broken import BASE, KINDS
from tests.fastvlm.checkpoint.edits import WEIGHTS, edit_config, edit_tensors


def absent(path: str) -> str:
    return folder_kind.not_a_folder(path).line()


@pytest.fixture
def copy(tmp_path: Path, tiny_llava: Path) -> Path:
    return shutil.copytree(tiny_llava, tmp_path / "given")


@pytest.mark.parametrize(("make", "name", "words"), KINDS, ids=[f"{name} {n}" for n, (_, name, _) in enumerate(KINDS)])
def test_each_kind_is_named(sharded: Path, make: broken.Change, name: str, words: Collection[str]) -> None:
    make(sharded)
    report = diagnose(sharded)
    assert report.kind is not None and report.kind.name == name
    fault, *own = report.faults  # nothing else is said: it would be about weights that nobody read
    assert not own or "adapter" in fault.rule or "lora" in fault.rule or "projector" in fault.rule, own
    assert report.warnings == [] and report.facts == {} and report.document()["kind"] == name
    assert all(word in fault.line() for word in words) and fault.expected == "a checkpoint"
    assert "{" not in fault.line() and "\n" not in fault.line()
    if "adapter of" in fault.line():
        assert report.document()["base"] == BASE
    with pytest.raises(UserError) as error:
        open_checkpoint(sharded)
    assert fault.line() in str(error.value)


def test_every_rule_has_a_maker() -> None:
    rules = {rule["name"] for rule in folder_kind._rules()["kinds"]}
    assert {name for _, name, _ in KINDS} == rules | {"artefact", "artefact-elsewhere"}


@pytest.mark.parametrize("layout", ["llava_qwen2", "fast_vlm"])
def test_a_sound_checkpoint_is_no_kind(make_checkpoint: Callable[..., Path], tmp_path: Path, layout: str) -> None:
    """Also with what training and exports leave beside whole weights."""
    folder = shutil.copytree(make_checkpoint(layout=layout, form="folded"), tmp_path / "given")
    for name in ("zero_to_fp32.py", "latest", "model.onnx", "mm_projector.bin", "trainer_state.json"):
        (folder / name).write_bytes(b"x")
    (folder / "global_step7").mkdir()
    (folder / "fastvithd.mlpackage").mkdir()  # ml-fastvlm's export_vision_encoder.py writes it there
    assert examine(folder).kind is None and open_checkpoint(folder).layout == layout


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "base_model.model.", "module._orig_mod."])
def test_a_wrappers_prefix_is_left_out(copy: Path, tiny_llava: Path, prefix: str) -> None:
    edit_tensors(copy, lambda tensors: {prefix + name: value for name, value in tensors.items()})
    plain, wrapped = open_checkpoint(tiny_llava), open_checkpoint(copy)
    assert any(f"tensor-prefix: weights: got {prefix} " in warning for warning in wrapped.warnings)
    assert wrapped.tensors.keys() == plain.tensors.keys()
    assert all(torch.equal(wrapped.read(name), plain.read(name)) for name in plain.tensors)


def test_a_prefix_of_some_names_is_a_fault(copy: Path) -> None:
    tensors = load_file(copy / WEIGHTS)
    first = next(iter(tensors))
    save_file({f"module.{name}" if name != first else name: tensor for name, tensor in tensors.items()},
              copy / WEIGHTS)  # fmt: skip
    assert any(fault.rule == "tensors-unexpected" for fault in examine(copy).faults)


def test_nothing_is_said_of_weights_that_were_not_read(copy: Path) -> None:
    edit_config(copy, dtype="bfloat16")
    (copy / WEIGHTS).write_bytes((copy / WEIGHTS).read_bytes()[:100])
    report = diagnose(copy)
    assert report.faults and report.warnings == [] and report.parts == {}
    assert not any(fault.rule.startswith(("tensors", "dtype")) for fault in report.faults)


@pytest.mark.parametrize("revision", ["", "@main", "@0123abc"])
def test_a_hub_id_is_named_with_its_snapshot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, revision: str, make_checkpoint: Callable[..., Path]
) -> None:
    from huggingface_hub import constants

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    asked = BASE + revision
    for url in ("", "https://huggingface.co/"):
        line = absent(url + asked)
        assert f"path-is-hub-id: {url}{asked}: " in line and f"`fastvlm download {asked}`" in line
    cached = tmp_path / "hub" / "models--apple--FastVLM-0.5B"
    (cached / "snapshots" / "0123abc").mkdir(parents=True)
    (cached / "snapshots" / "0123abc" / "config.json").touch()
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("0123abc")
    assert str(cached / "snapshots" / "0123abc") in absent(asked)
    assert "download" in absent(BASE + "@other")  # another revision isn't there
    (tmp_path / "checkpoints" / BASE).mkdir(parents=True)
    assert f"give checkpoints/{BASE}" in absent(asked)


def test_paths_that_are_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    assert absent("models/absent").startswith("path-missing: models/absent: ")
    assert "fastvlm download fastvlm_0.5b_stage3" in absent("fastvlm_0.5b_stage3")
    for name, words in {
        "a.gguf": "GGUF",
        "a.onnx": "ONNX",
        "a.zip": "unpack",
        "model.safetensors": "the folder",
    }.items():
        (tmp_path / name).write_bytes(b"x")
        assert words in examine(tmp_path / name).faults[0].line()


def test_what_an_adapter_says_of_its_base_is_only_text(copy: Path) -> None:
    broken.adapter_beside_weights(copy)
    for text in ("[" * 100000, "\0", json.dumps({"base_model_name_or_path": 5}), json.dumps(["{base}"])):
        (copy / "adapter_config.json").write_text(text)
        assert examine(copy).kind is not None and examine(copy).kind.base is None  # type: ignore[union-attr]
    (copy / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "{path} " + "x" * 9999}))
    assert len(examine(copy).faults[0].line()) < 1500


def test_what_is_given_instead_of_an_artefact(copy: Path) -> None:
    assert "folder-is-checkpoint: " in str(folder_kind.instead_of_artefact(copy))
    assert "if it is a hub id" in str(folder_kind.instead_of_artefact(Path(BASE)))
    assert folder_kind.instead_of_artefact(copy / "absent") is folder_kind.instead_of_artefact(copy.parent) is None
    edit_config(copy, quantization={})
    assert "folder-is-mlx-quantized: " in str(folder_kind.instead_of_artefact(copy))
    (copy / WEIGHTS).rename(copy / "mmproj.gguf")
    (copy / "config.json").unlink()
    assert "folder-is-gguf: " in str(folder_kind.instead_of_artefact(copy))


def test_a_damaged_file_says_more_than_the_kind_of_the_folder(copy: Path) -> None:
    edit_config(copy, quantization={})
    (copy / WEIGHTS).write_bytes((copy / WEIGHTS).read_bytes()[:-1])
    finding = folder_kind.instead_of_artefact(copy)
    assert finding is not None and (finding.rule, finding.where) == ("file-truncated", str(copy / WEIGHTS))
    (copy / "config.json").write_text("{")
    finding = folder_kind.instead_of_artefact(copy)
    assert finding is not None and (finding.rule, finding.where) == ("not-json", str(copy / "config.json"))


def test_advice_can_be_pasted(copy: Path) -> None:
    """A path that needs quotes has a shell's."""
    odd = copy.rename(copy.parent / 'it\'s "mine"')
    broken.adapter_beside_weights(odd)
    line = examine(odd).faults[0].line()
    command = line.partition("`")[2].partition("`")[0]
    assert shlex.split(command)[:6] == ["fastvlm", "export", "--checkpoint", "BASE", "--adapter", str(odd)]
