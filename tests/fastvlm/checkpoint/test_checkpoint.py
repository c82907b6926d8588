"""Reading checkpoints: layouts, forms, files, tying, image token, refusals; the user's folder stays as it was."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from fastvlm.checkpoint import naming
from fastvlm.checkpoint.checkpoint import Checkpoint, examine, open_checkpoint
from fastvlm.common.errors import UserError
from fastvlm.synthetic.checkpoint import write_checkpoint
from tests.fastvlm.checkpoint.edits import edit_json, edit_tensors

Make = Callable[..., Path]


def same_tensors(a: Checkpoint, b: Checkpoint) -> bool:
    return list(sorted(a.tensors)) == sorted(b.tensors) and all(torch.equal(a.read(n), b.read(n)) for n in a.tensors)


@pytest.mark.parametrize("form", ["folded", "training"])
@pytest.mark.parametrize("layout", ["fast_vlm", "llava_qwen2"])
def test_what_it_says_of_itself(make_checkpoint: Make, layout: str, form: str) -> None:
    checkpoint = open_checkpoint(make_checkpoint(layout=layout, form=form))
    assert (checkpoint.layout, checkpoint.form, checkpoint.dtype) == (layout, form, "float32")
    assert checkpoint.image_size == 128
    assert checkpoint.image_strategy == ("pad" if layout == "llava_qwen2" else "center_crop")
    assert (checkpoint.image_token_id, checkpoint.tied, checkpoint.warnings) == (512, False, ())
    tokenizer = checkpoint.tokenizer()
    ids = tokenizer("<|im_start|>a <image>!<|im_end|>")["input_ids"]
    assert ids.count(512) == 1 and (ids[0], ids[-1]) == (510, 511)
    assert tokenizer.decode(ids) == "<|im_start|>a <image>!<|im_end|>"
    assert not list(checkpoint.check_finite())


@pytest.mark.parametrize("form", ["folded", "training"])
def test_the_layouts_hold_the_same_model(make_checkpoint: Make, form: str) -> None:
    llava = open_checkpoint(make_checkpoint(layout="llava_qwen2", form=form))
    assert same_tensors(llava, open_checkpoint(make_checkpoint(layout="fast_vlm", form=form)))
    assert not same_tensors(llava, open_checkpoint(make_checkpoint(layout="fast_vlm", form=form, seed=1)))


def test_names_agree_with_timm(tiny_llava_training: Path) -> None:
    """Oracle: timm's own renaming of Apple's training-form names."""
    from timm.models.fastvit import checkpoint_filter_fn

    prefix = "model.vision_tower.vision_tower.model."
    names = [name for name in load_file(tiny_llava_training / "model.safetensors") if name.startswith(prefix)]
    theirs = checkpoint_filter_fn({name[len(prefix) :]: name for name in names}, None)
    assert len(theirs) == len(names) > 100
    assert {naming.VISION + new: old for new, old in theirs.items()} == {naming.from_llava(n): n for n in names}


@pytest.mark.parametrize("form", ["folded", "training"])
def test_names_round_trip(make_checkpoint: Make, form: str) -> None:
    for name in open_checkpoint(make_checkpoint(layout="fast_vlm", form=form)).tensors:
        assert naming.from_llava(naming.to_llava(name)) == name


def test_names_of_older_transformers(tiny_fast_vlm: Path, tmp_path: Path) -> None:
    old = shutil.copytree(tiny_fast_vlm, tmp_path / "old")

    def rename(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            new = name.removeprefix("model.").replace("language_model.", "language_model.model.", 1)
            tensors["language_model.lm_head.weight" if name == "lm_head.weight" else new] = tensors.pop(name)

    edit_tensors(old, rename)
    assert same_tensors(open_checkpoint(old), open_checkpoint(tiny_fast_vlm))


@pytest.mark.parametrize("kind", ["shards", "bin", "old bin", "bin shards"])
def test_every_kind_of_file(tiny_llava: Path, tmp_path: Path, kind: str) -> None:
    if kind == "shards":
        folder = write_checkpoint(tmp_path / "model", layout="llava_qwen2", shards=3)
        assert len(list(folder.glob("model-0000?-of-00003.safetensors"))) == 3
    else:
        folder = shutil.copytree(tiny_llava, tmp_path / "model")
        tensors = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        names = sorted(tensors)
        parts = {"pytorch_model.bin": names}
        if kind == "bin shards":
            parts = {"pytorch_model-1.bin": names[::2], "pytorch_model-2.bin": names[1::2]}
            index = {"weight_map": {name: file for file, part in parts.items() for name in part}}
            (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
        for file, part in parts.items():
            state = {name: tensors[name] for name in part}
            torch.save(state, folder / file, _use_new_zipfile_serialization=kind != "old bin")
    checkpoint = open_checkpoint(folder)
    assert same_tensors(checkpoint, open_checkpoint(tiny_llava))
    assert len(checkpoint.files) == {"shards": 3, "bin shards": 2}.get(kind, 1)


def test_unused_tensors_are_ignored(tiny_llava: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_llava, tmp_path / "model")
    head = "model.vision_tower.vision_tower.model.head.proj"  # in every published checkpoint
    edit_tensors(folder, lambda tensors: tensors.update({head: torch.zeros(256, 768)}))
    assert same_tensors(open_checkpoint(folder), open_checkpoint(tiny_llava))


@pytest.mark.parametrize("layout", ["fast_vlm", "llava_qwen2"])
@pytest.mark.parametrize("head", ["absent", "same", "different"])
@pytest.mark.parametrize("said", [True, False])
def test_the_weights_decide_the_tie(make_checkpoint: Make, tmp_path: Path, layout: str, head: str, said: bool) -> None:
    folder = shutil.copytree(make_checkpoint(layout=layout, tied=head != "different"), tmp_path / "model")
    if head == "same":
        name = naming.to_llava(naming.EMBEDDINGS) if layout == "llava_qwen2" else naming.EMBEDDINGS
        edit_tensors(folder, lambda tensors: tensors.update({naming.LM_HEAD: tensors[name].clone()}))
    config = json.loads((folder / "config.json").read_text())
    config["tie_word_embeddings"] = said
    if layout == "fast_vlm":
        config["text_config"]["tie_word_embeddings"] = said
    (folder / "config.json").write_text(json.dumps(config))
    checkpoint = open_checkpoint(folder)
    tied = head != "different"
    assert checkpoint.tied == checkpoint.hf_config.tie_word_embeddings == tied
    assert (naming.LM_HEAD in checkpoint.tensors) == (not tied)
    assert (["tie_word_embeddings" in warning for warning in checkpoint.warnings] == [True]) == (said != tied)


def test_the_names_decide_the_form(tiny_fast_vlm: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_fast_vlm, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config["vision_config"]["model_args"]["inference_mode"] = False
    (folder / "config.json").write_text(json.dumps(config))
    checkpoint = open_checkpoint(folder)
    assert checkpoint.form == "folded" and "inference_mode" in checkpoint.warnings[0]


def test_all_wrong_tensors_at_once(tiny_llava: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_llava, tmp_path / "model")

    def break_it(tensors: dict[str, torch.Tensor]) -> None:
        del tensors["model.norm.weight"], tensors["model.mm_projector.2.bias"]
        tensors["model.image_rows"] = torch.zeros(64)
        tensors["model.mm_projector.0.weight"] = torch.zeros(64, 255)

    edit_tensors(folder, break_it)
    assert {finding.rule: finding.details for finding in examine(folder).faults} == {
        "tensors-missing": ("model.language_model.norm.weight", "model.multi_modal_projector.linear_2.bias"),
        "tensors-unexpected": ("model.image_rows",),
        "tensors-misshapen": ("model.multi_modal_projector.linear_1.weight [64, 255], expected [64, 256]",),
    }
    with pytest.raises(UserError, match=r"^[^\n]*tensors-missing[^\n]*tensors-misshapen[^\n]*$"):
        open_checkpoint(folder)


def test_partly_folded_is_refused(tiny_fast_vlm: Path, tiny_fast_vlm_training: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_fast_vlm_training, tmp_path / "model")
    folded = load_file(tiny_fast_vlm / "model.safetensors")

    def fold_one(tensors: dict[str, torch.Tensor]) -> None:
        stem = naming.VISION + "stem.0."
        for name in [name for name in tensors if name.startswith(stem)]:
            del tensors[name]
        tensors.update({name: value for name, value in folded.items() if name.startswith(stem)})

    edit_tensors(folder, fold_one)
    (finding,) = [one for one in examine(folder).faults if one.rule == "tower-partly-folded"]
    assert any("stem.0.reparam_conv" in name for name in finding.details)


def test_image_token_of_the_llava_layout(tiny_llava: Path, tmp_path: Path) -> None:
    own = shutil.copytree(tiny_llava, tmp_path / "own")
    edit_json(own / "added_tokens.json", **{"<image>": 515})
    edit_json(own / "config.json", image_token_index=515)
    assert open_checkpoint(own).image_token_id == 515
    edit_json(own / "config.json", image_token_index=-200)
    assert open_checkpoint(own).warnings == ()
    edit_json(own / "config.json", image_token_index=3)
    assert "image_token_index: got 3, " in open_checkpoint(own).warnings[0]
    edit_json(own / "added_tokens.json", **{"<image>": 577})
    assert [fault.rule for fault in examine(own).faults] == ["image-token"]


def test_image_token_of_the_transformers_layout(tiny_fast_vlm: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_fast_vlm, tmp_path / "model")
    edit_json(folder / "config.json", image_token_index=500)
    assert [(one.rule, one.got) for one in examine(folder).faults] == [("image-token", "500")]


def test_a_config_as_published_on_the_hub(tiny_fast_vlm: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_fast_vlm, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config["vision_config"] |= {
        "architecture": "fastvit_mci3.apple_mclip2_dfndr2b",
        "pretrained_cfg": {"num_classes": 0},
    }
    config["vision_config"] |= {"num_features": 256, "label_names": ["x"], "initializer_range": 0.02}
    config |= {"torch_dtype": "float32", "transformers_version": "4.56.0.dev0"}
    (folder / "config.json").write_text(json.dumps(config))
    assert open_checkpoint(folder).warnings == ()
    for architecture in ("resnet50", "hf-hub:someone/fastvit_mci3"):
        config["vision_config"]["architecture"] = architecture
        (folder / "config.json").write_text(json.dumps(config))
        with pytest.raises(UserError, match="model-other: config"):
            open_checkpoint(folder)


def test_resolution_and_strategy(tiny_llava: Path, tiny_fast_vlm: Path, tmp_path: Path) -> None:
    llava = shutil.copytree(tiny_llava, tmp_path / "llava")
    edit_json(llava / "config.json", mm_vision_tower="mobileclip_l_512", image_aspect_ratio="square")
    checkpoint = open_checkpoint(llava)
    assert (checkpoint.image_size, checkpoint.image_strategy) == (512, "center_crop")
    for tower in ("mobileclip_l_100", "clip-vit"):
        edit_json(llava / "config.json", mm_vision_tower=tower)
        with pytest.raises(UserError, match="resolution"):
            open_checkpoint(llava)
    hub = shutil.copytree(tiny_fast_vlm, tmp_path / "hub")
    edit_json(hub / "preprocessor_config.json", crop_size={"height": 256, "width": 256}, size={"shortest_edge": 256})
    checkpoint = open_checkpoint(hub)
    assert checkpoint.image_size == 256 and "image_seq_length" in checkpoint.warnings[0]


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_damage_is_a_user_error(
    tiny_llava: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Bytes changed in the safetensors header, or the file cut anywhere: UserError or a usable checkpoint, no crash."""
    original = (tiny_llava / "model.safetensors").read_bytes()
    header = 8 + int.from_bytes(original[:8], "little")
    damaged = bytearray(original)
    for _ in range(data.draw(st.integers(0, 3))):
        damaged[data.draw(st.integers(0, header - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.one_of(st.just(len(damaged)), st.integers(0, len(damaged))))
    folder = shutil.copytree(tiny_llava, tmp_path_factory.mktemp("damage") / "model")
    (folder / "model.safetensors").write_bytes(damaged[:cut])
    try:
        checkpoint = open_checkpoint(folder)
    except UserError:
        return
    assert cut == len(damaged)
    for name in checkpoint.tensors:
        checkpoint.read(name)
