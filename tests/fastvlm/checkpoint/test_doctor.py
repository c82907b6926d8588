"""`fastvlm doctor`: each kind of broken input has its own finding and exit 2; a sound one is described."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from fastvlm.checkpoint.doctor import diagnose
from fastvlm.common import settings
from fastvlm.common.errors import CheckFailed
from tests.fastvlm.checkpoint.broken import BROKEN, INDEX, config
from tests.fastvlm.checkpoint.edits import answers, edit_json

Cli = Callable[..., Any]
DEEP = ("NaN", "infinity")  # what only shows when all weights are read


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("name", BROKEN)
def test_each_kind_of_broken_input_is_named_by_all_who_read_it(sharded: Path, name: str) -> None:
    change, rule, where = BROKEN[name]
    change(sharded)
    report = diagnose(sharded)
    found = [(fault.rule, fault.where) for fault in report.faults]
    assert found.count((rule, where or str(sharded))) == 1 and "tensors-misshapen" not in dict(found)
    assert not (sharded.parent / "written").exists()  # by a pickle
    if name not in (*DEEP, "template that fails"):
        assert answers(sharded) == (False, False)


def test_every_fault_at_once(sharded: Path, cli: Cli) -> None:
    for name in ("truncated header", "offsets", "large tokenizer", "quantized elsewhere"):
        BROKEN[name][0](sharded)
    rules = ["file-truncated", "header-invalid", "checkpoint-quantized", "tokenizer-size", "image-token"]
    answer = cli("doctor", sharded, "--json")
    assert answer.code == 2 and not answer.document["usable"] and answer.document["export"] == {}
    assert [fault["rule"] for fault in answer.document["faults"]] == rules
    answer = cli("doctor", sharded)
    assert answer.code == 2 and "\nexport " not in answer.out
    assert [line.split(": ")[1] for line in answer.out.splitlines() if line.startswith("fault: ")] == rules
    (line,) = answer.err.splitlines()
    assert line.startswith(f"error: cannot use checkpoint {sharded}: ") and "file-truncated" not in line


def test_without_the_table_that_would_fail(sharded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config(rms_norm_eps=-1)(sharded)
    assert answers(sharded) == (False, False)
    monkeypatch.setattr(settings, "_allows", lambda row, value: True)
    with pytest.raises(CheckFailed, match="NaN or infinite"):
        answers(sharded)


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
def test_what_only_transformers_runs_is_usable_and_not_exportable(sharded: Path, changes: dict[str, Any]) -> None:
    config(**changes)(sharded)
    assert answers(sharded) == (True, False)


@pytest.mark.parametrize("layout", ["llava_qwen2", "fast_vlm"])
def test_null_is_absent(make_checkpoint: Callable[..., Path], tmp_path: Path, layout: str) -> None:
    folder = Path(shutil.copytree(make_checkpoint(layout=layout, form="folded"), tmp_path / "model"))
    assert answers(folder) == (True, True) and diagnose(folder).warnings == []
    keys = ("head_dim", "rope_theta", "rope_scaling", "rope_parameters", "sliding_window", "layer_types")
    nulls = dict.fromkeys((*keys, "quantization_config", "image_token_id"))
    edit_json(folder / "config.json", **nulls)
    assert answers(folder) == (True, True)


def test_paths(tmp_path: Path, sound: Path, cli: Cli) -> None:
    (tmp_path / "archive.zip").write_bytes(b"PK")
    expected = {
        tmp_path / "nowhere": "path-missing",
        tmp_path / "archive.zip": "path-is-file",
        sound.parent: "did you mean its folder model?",
        "https://example.com/model": "path-is-address: https://example.com/model: ",
    }
    for path, words in expected.items():
        answer = cli("doctor", path)
        assert answer.code == 2 and words in answer.out


def test_what_macos_adds_is_no_part_of_a_checkpoint(sharded: Path, cli: Cli) -> None:
    for path in [sharded / ".DS_Store", *(sharded / f"._{path.name}" for path in sharded.iterdir())]:
        path.write_bytes(b"\0\5\x16\7 not what its name says")
    assert cli("doctor", sharded).code == 0
    (sharded / INDEX).unlink()
    assert cli("doctor", sharded).code == 0


@pytest.mark.parametrize("layout", ["llava_qwen2", "fast_vlm"])
@pytest.mark.parametrize("form", ["folded", "training"])
def test_a_sound_checkpoint(make_checkpoint: Callable[..., Path], cli: Cli, layout: str, form: str) -> None:
    path = make_checkpoint(layout=layout, form=form)
    answer = cli("doctor", path, "--json")
    document = answer.document
    assert answer.code == 0 and document["usable"] and document["faults"] == document["warnings"] == []
    assert (document["layout"], document["form"], document["dtype"]) == (layout, form, "float32")
    assert document["image_token"] == "<image> = 512" and document["tokenizer"] == "513 tokens for 576 rows"
    assert (document["chat_template"], document["weights"]) == ("Qwen's", "all finite")
    parts = document["parts"]
    assert parts["embeddings"]["parameters"] == parts["lm_head"]["parameters"] == 576 * 64
    assert parts["projector"]["parameters"] == 256 * 64 + 64 + 64 * 64 + 64
    counted = [n for n in load_file(path / "model.safetensors").items() if not n[0].endswith("num_batches_tracked")]
    assert parts["total"]["parameters"] == sum(tensor.numel() for _, tensor in counted)
    assert parts["total"]["megabytes"] == pytest.approx(sum(tensor.nbytes for _, tensor in counted) / 1e6)
    assert document["export"]["command"].startswith(f"fastvlm export --checkpoint {path}")


def test_quick_reads_no_weights(sharded: Path, cli: Cli) -> None:
    BROKEN["NaN"][0](sharded)
    answer = cli("doctor", sharded, "--quick")
    assert answer.code == 0 and "not read" in answer.out


def test_the_folder_is_never_written(sharded: Path) -> None:
    import torch

    from fastvlm.checkpoint.checkpoint import open_checkpoint
    from fastvlm.model.build import build
    from tests.helpers import contents

    def state() -> list[Any]:
        stats = [path.stat() for path in sorted([sharded, *sharded.rglob("*")])]
        return [contents(sharded), [(one.st_mtime_ns, one.st_mode) for one in stats]]

    for path in [*sharded.iterdir(), sharded]:
        path.chmod(path.stat().st_mode & ~0o222)
    before = state()
    model = build(open_checkpoint(sharded))
    diagnose(sharded)
    with torch.no_grad():  # the weights are mapped: changing them in memory must not reach the file
        for parameter in model.parameters():
            parameter.add_(1.0)
    assert state() == before
    sharded.chmod(0o755)
    os.utime(sharded / "config.json")
    assert state() != before
