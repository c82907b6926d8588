"""Parity of a Core AI bundle in Apple's interpreter: a sound one passes, one wrong weight anywhere fails, by stage."""

import html
import json
import shutil
import sys
from pathlib import Path

import pytest

from benchmarks.parity import compare, encoders, tolerances
from fastvlm.common.errors import UserError
from fastvlm.data.scenes import CHECKPOINT
from model_export.artefact import read_manifest, write_manifest
from quantization.coreai.forms import FORMS
from tests.helpers import with_tensors

pytest.importorskip("coreai")
pytestmark = pytest.mark.slow


def test_a_sound_bundle_passes_and_its_page_says_what_was_not_measured(cli, demo_bundle, tmp_path, monkeypatch):
    page = tmp_path / "index.html"
    monkeypatch.setattr(sys, "argv", ["benchmarks", "parity", "--limit", "2"])
    flags = ("--reference", CHECKPOINT, "--candidate", demo_bundle, "--limit", 2, "--output", page, "--json")
    answer = cli("parity", *flags)
    result, text = answer.document, html.unescape(page.read_text())
    assert answer.code == 0 and result["passed"] and result["exact"] == {"questions": 2, "reference": 2, "candidate": 2}
    assert (result["precision"], result["family"], result["recipe"]) == ("float16", "fp16", None)
    assert not {"operation_snr", "layer_snr"} & set(result["metrics"]) and result["first_operation"] is None
    for name in ("encoder_snr", "merged_snr", "prefill_snr"):
        assert 45 < result["metrics"][name]["value"] < 90, "float16 really ran"
    assert set(result["candidate"]["runners"].values()) == {result["candidate"]["runners"]["vision"]}
    assert result["candidate"]["runners"]["vision"].startswith("Core AI (interpreter, CPU")
    assert result["operations"]["absent"] in text and "image embeddings, signal to noise" in text
    assert "MIL executor" not in text and "Error along the encoder" in text and "not the arithmetic of a device" in text


def test_a_real_sizes_bundle_is_compared_briefly_and_says_so(demo_bundle, tmp_path, monkeypatch):
    monkeypatch.setattr(tolerances, "NARROW", 64)
    page = tmp_path / "index.html"
    result = compare.compare(CHECKPOINT, demo_bundle, report=page)
    assert result["passed"] and result["verdict"].endswith("answers were not compared") and result["exact"] is None
    assert {"encoder_snr", "prefill_kl"} <= set(result["metrics"]) and "greedy_answers" not in result["metrics"]
    text = html.unescape(page.read_text())
    assert compare.BRIEF in text and "token for token" not in text
    other = with_tensors(
        CHECKPOINT, tmp_path / "checkpoint", lambda tensors: _scale(tensors, "layers.0.mlp.up_proj", 3.0)
    )
    assert compare.compare(other, demo_bundle)["broken"]


def _scale(tensors, name, factor):
    next(value for key, value in tensors.items() if name in key).mul_(factor)


@pytest.mark.parametrize(
    ("tensor", "change", "first"),
    [
        ("stages.2.blocks.0.mlp.fc1.weight", lambda weight: weight.view(-1)[3].add_(8.0), "encoder_snr"),
        ("multi_modal_projector.linear_2.weight", lambda weight: weight.mul_(1.1), "encoder_snr"),
        ("language_model.layers.0.mlp.down_proj.weight", lambda weight: weight.view(-1)[3].add_(4.0), "prefill_kl"),
        ("language_model.norm.weight", lambda weight: weight.mul_(1.03), "prefill_snr"),
    ],
    ids=["encoder", "scale of the projector", "decoder", "scale of a norm"],
)
def test_one_wrong_weight_or_scale_fails_and_names_the_stage(demo_bundle, tmp_path, tensor, change, first):
    def edit(tensors):
        (name,) = (name for name in tensors if name.endswith(tensor))
        change(tensors[name])

    other = with_tensors(CHECKPOINT, tmp_path / "checkpoint", edit)
    result = compare.compare(other, demo_bundle, limit=1)
    assert not result["passed"] and result["broken"][0] == first
    assert result["metrics"][first]["label"] in result["verdict"]


@pytest.mark.parametrize(
    ("decoder", "embedding", "vision", "family", "precision"),
    [
        ("fp16", "fp16", "fp16", "fp16", "float16"),
        ("int8", "fp16", "fp16", "int8", "float16"),
        ("int4-b32", "palette8", "fp16", "int4", "float16"),
        ("fp16", "fp16", "palette6", "fp16", "compressed"),
        ("palette4-g16", "fp16", "int8", "int4", "compressed"),
    ],
)
def test_the_forms_of_its_weights_decide_which_tolerances_hold(
    demo_bundle, tmp_path, decoder, embedding, vision, family, precision
):
    bundle = with_forms(demo_bundle, tmp_path / "bundle", decoder=decoder, embedding=embedding, vision=vision)
    assert compare.weight_family(bundle) == family
    assert encoders.without_operations(read_manifest(bundle))["precision"] == precision


def test_every_form_has_a_family_and_another_is_refused(demo_bundle, tmp_path):
    assert set(tolerances.COREAI_FAMILIES) == set(FORMS)
    with pytest.raises(UserError, match="weights of family int3-b8: no tolerances for it"):
        compare.weight_family(with_forms(demo_bundle, tmp_path / "bundle", decoder="int3-b8"))


def with_forms(bundle: Path, target: Path, **forms: str) -> Path:
    """A copy whose manifest names another form of some parts."""
    shutil.copytree(bundle, target)
    document = json.loads((target / "export.json").read_text())
    document["llm"]["decisions"] |= {part: [form] for part, form in forms.items()}
    write_manifest(target, document)
    return target
