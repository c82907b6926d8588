"""Parity itself: equal models pass, a perturbed weight anywhere fails and is named, nothing compared never passes."""

import json
import math

import numpy as np
import pytest
from safetensors.numpy import save_file

from benchmarks.parity import compare, pictures, tolerances, verdict
from benchmarks.parity.language import Reading
from fastvlm.common.errors import CheckFailed, UserError
from fastvlm.data import scenes
from tests.benchmarks.conftest import perturb_embedding, perturb_head, perturb_pixels, perturb_projector, perturb_vision


@pytest.fixture
def judge(reference, candidate, shown, operations, sides, compared):
    """Compare the two fakes over the pictures and judge."""

    def run(family="fp16"):
        rows = compared(reference, candidate, shown)
        return verdict.document(rows, operations, family, sides)

    return run


def test_the_same_model_passes_exactly(judge):
    result = judge()
    assert result["passed"] and result["broken"] == [] and result["first_operation"] is None
    assert result["metrics"]["encoder_snr"]["value"] == "inf"
    assert result["metrics"]["prefill_kl"]["value"] == 0
    assert all(row["divergence"] is None and row["reference"] == row["candidate"] for row in result["rows"])
    assert result["pictures"] == {"demo": 4}
    assert list(result["metrics"]) == [name for name in verdict.LABELS if name != "prefill_snr"]
    json.dumps(result, allow_nan=False)


@pytest.mark.parametrize(
    ("perturb", "first"),
    [
        (perturb_pixels, "preprocessing"),
        (perturb_vision, "encoder_snr"),
        (perturb_projector, "merged_snr"),
        (perturb_embedding, "merged_snr"),
        (perturb_head, "prefill_kl"),
    ],
)
def test_one_perturbed_weight_fails_and_names_the_stage(judge, candidate, perturb, first):
    perturb(candidate)
    result = judge()
    assert not result["passed"]
    assert result["broken"][0] == first
    assert verdict.LABELS[first] in result["verdict"]


@pytest.mark.parametrize(
    ("damaged", "stage"),
    [
        (lambda model: model.vision.weight, "vision encoder: features: .* (fake vision)"),
        (lambda model: model.projector.weight, "projector: embeddings of a picture: .* (fake projector)"),
        (lambda model: model.language.embedding, "language model: embeddings of tokens: .* (fake language)"),
        (lambda model: model.language.matrix, "language model: logits at position .*: .* (fake language)"),
    ],
)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_ends_the_comparison_where_it_begins(judge, candidate, damaged, stage, value):
    judge()
    damaged(candidate)[...] = value
    pattern = stage.replace("(", "[(]").replace(")", "[)]: mend it")
    with pytest.raises(CheckFailed, match=pattern):
        judge()


# For each figure a value just out of its tolerance; encoder ones come in through the first row, or the operations.
@pytest.mark.parametrize(
    "metric", [name for name in verdict.LABELS if name not in ("operation_snr", "layer_snr", "prefill_snr")]
)
def test_each_figure_fails_alone(reference, candidate, shown, operations, sides, metric, compared):
    rows = compared(reference, candidate, shown)
    limits = tolerances.for_encoder("float16") | tolerances.for_language("fp16")
    worse = -1e-3 if limits[metric].sense == ">=" else 1e-3
    for row in rows:
        row.figures[metric] = limits[metric].bound + worse
    result = verdict.document(rows, operations, "fp16", sides)
    assert result["broken"] == [metric] and not result["passed"]
    for row in rows:
        row.figures[metric] = math.nan
    assert verdict.document(rows, operations, "fp16", sides)["broken"] == [metric]


def test_the_worst_picture_counts(reference, candidate, shown, operations, sides, compared):
    rows = compared(reference, candidate, shown)
    rows[2].figures["encoder_snr"] = 20.0
    figure = verdict.document(rows, operations, "fp16", sides)["metrics"]["encoder_snr"]
    assert figure["value"] == 20 and figure["worst_row"] == 2 and figure["passed"] is False


@pytest.mark.parametrize(("series", "metric"), [("rounding", "operation_snr"), ("layers", "layer_snr")])
def test_the_first_operation_out_of_tolerance_is_named(judge, operations, series, metric):
    for error in operations[series][5:]:
        error["snr_db"] = 12.0
    operations[series][9]["snr_db"] = "-inf"
    result = judge()
    assert result["broken"] == [metric]
    assert result["first_operation"]["name"] == operations[series][5]["name"]
    assert operations[series][5]["name"] in result["verdict"]


def test_layers_that_could_not_be_matched_fail(judge, operations):
    operations |= {"layers": [], "fault": "the program's layers are not the reference's: layer 3"}
    result = judge()
    assert result["broken"] == ["layer_snr"]
    assert result["metrics"]["layer_snr"]["reason"].startswith("the program's layers")


def test_nothing_compared_never_passes(operations, sides, reference, candidate, shown, compared):
    with pytest.raises(CheckFailed, match="nothing was compared"):
        verdict.document([], operations, "fp16", sides)
    rows = compared(reference, candidate, shown[:1])
    with pytest.raises(CheckFailed, match="nothing was compared"):
        verdict.document(rows, operations | {"rounding": []}, "fp16", sides)


def test_shapes_that_differ_are_named(reference, candidate, shown, compared):
    candidate.projector.weight = np.ones((12, 9), np.float32)
    candidate.language.embedding = np.ones((40, 9), np.float32)
    candidate.language.matrix = np.ones((9, 40), np.float32)
    with pytest.raises(
        CheckFailed, match=r"picture 0: merged embeddings: got shape \(1, \d+, 9\), expected \(1, \d+, 8\)"
    ):
        compared(reference, candidate, shown[:1])


def greedy(model, picture):
    return list(model.language.stream(model.embed(picture.question, picture.image), compare.MAX_NEW_TOKENS))


def test_where_answers_part(reference, candidate, shown):
    tokens = greedy(reference, shown[0])
    assert len(tokens) > 3
    other = (tokens[2] + 1) % 36
    forced = [*tokens[:2], other, *tokens[3:]]
    readings = [Reading(np.zeros((1, 1)), ids) for ids in (tokens, forced)]
    readings[0].margin = 0.25
    sides = [(model.language, model.tokenizer) for model in (reference, candidate)]
    parted, decode = compare._divergence(*sides, *readings), reference.tokenizer.decode
    assert parted["position"] == 2 and parted["margin"] == 0.25
    assert parted["common"] == decode(tokens[:2])
    assert parted["reference"] == {"token": decode([tokens[2]]), "rest": decode(tokens[3:])}
    assert parted["candidate"] == {"token": decode([other]), "rest": decode(tokens[3:])}
    readings[1].tokens, readings[0].margin = tokens[:-1], None
    parted = compare._divergence(*sides, *readings)
    assert parted["position"] == len(tokens) - 1
    assert parted["candidate"] == {"token": None, "rest": ""} and parted["margin"] is None
    readings[1].tokens = tokens
    assert compare._divergence(*sides, *readings) is None


def test_answers_that_part_are_both_sides_own(reference, candidate, shown, compared):
    candidate.language.matrix = candidate.language.matrix.copy()
    perturb_head(candidate)
    rows = compared(reference, candidate, shown)
    for row, picture in zip(rows, shown):
        ours, theirs = greedy(reference, picture), greedy(candidate, picture)
        assert row.reference == reference.tokenizer.decode(ours)
        assert row.candidate == candidate.tokenizer.decode(theirs)
        assert row.figures["greedy_tokens"] == (ours == theirs)
    parted = [row for row in rows if row.divergence]
    assert parted and any(row.divergence["margin"] is not None and row.divergence["margin"] > 0 for row in parted)


def test_a_recipe_of_few_bits_has_a_verdict_of_its_own(judge, candidate):
    """Faithful to its recipe is one thing, what the recipe changed another."""
    assert judge("fp16")["recipe"] is judge("int8")["recipe"] is None
    same = judge("int4")["recipe"]
    assert (same["questions"], same["changed"], same["unchanged"], same["kl"], same["top1"]) == (4, 0, True, 0, 1)
    perturb_head(candidate)
    result = judge("int4")
    assert result["passed"] and result["metrics"]["prefill_kl"]["passed"] is None
    recipe, metrics = result["recipe"], result["metrics"]
    assert recipe["changed"] == sum(row["reference"] != row["candidate"] for row in result["rows"]) > 0
    assert not recipe["unchanged"] and recipe["kl"] == metrics["prefill_kl"]["value"] > 0
    assert recipe["top1"] == metrics["prefill_top1"]["value"] < 1
    assert verdict.summary(result)["recipe"] == recipe


def test_models_that_cannot_be_compared_are_refused_at_once(reference, candidate):
    candidate.preprocessor.image_strategy = "center_crop"
    candidate.tokenizer.extra = 2
    with pytest.raises(
        UserError, match="image strategy: checkpoint pad, artefact center_crop; vocabulary: checkpoint 40, "
    ):
        compare._check_comparable(reference, candidate)


def test_summary_keeps_figures_and_runners_only(judge):
    summary = verdict.summary(judge())
    assert summary["passed"] and set(summary["metrics"]) == set(verdict.LABELS) - {"prefill_snr"}
    assert "rows" not in summary and "operations" not in summary
    assert summary["runners"]["candidate"]["vision"] == "fake vision"


# --- which pictures -------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path, shown):
    for name in ("b.png", "a.JPG", ".hidden.png", "notes.txt"):
        shown[0].image.save(tmp_path / name, "PNG")
    return tmp_path


def test_a_stranger_gets_drawn_pictures_and_the_users_own(tmp_path, folder):
    chosen = list(pictures.opened(pictures.choose(tmp_path / "checkpoint", folder, 10)))
    assert [one.source for one in chosen] == ["drawn"] * 4 + ["yours"] * 2
    assert [one.name for one in chosen[4:]] == ["a.JPG", "b.png"]
    assert all(one.truth is None and one.question == pictures.PROMPT for one in chosen)
    assert len(pictures.choose(tmp_path / "checkpoint", folder, 1)) == 2


def test_the_demo_checkpoint_gets_its_questions(monkeypatch):
    monkeypatch.setattr(scenes, "knows_demo", lambda checkpoint: True)
    chosen = list(pictures.opened(pictures.choose(scenes.CHECKPOINT, None, 6)))
    assert [one.source for one in chosen] == ["demo"] * 6
    assert all(one.truth for one in chosen)
    again = list(pictures.opened(pictures.choose(scenes.CHECKPOINT, None, 6)))
    assert [(a.question, a.image.tobytes()) for a in chosen] == [(b.question, b.image.tobytes()) for b in again]


# --- the family of an artefact's weights -----------------------------------------------------------------------------


@pytest.fixture
def family_of(tmp_path):
    """The family of an artefact whose config.json has this quantization."""

    def write(quantization, dtype=np.float16):
        (tmp_path / "config.json").write_text(json.dumps({"quantization": quantization} if quantization else {}))
        save_file({"language_model.model.norm.weight": np.ones(4, dtype)}, tmp_path / "model.safetensors")
        return compare.weight_family(tmp_path)

    return write


@pytest.mark.parametrize(
    ("quantization", "family"),
    [
        (None, "fp16"),
        ({"bits": 8, "group_size": 64}, "int8"),
        ({"bits": 4, "group_size": 64}, "int4"),
        ({"bits": 8, "group_size": 64, "language_model.lm_head": {"bits": 4, "group_size": 64}}, "int4"),
        ({"bits": 4, "group_size": 64, "multi_modal_projector.linear_0": False}, "int4"),
        ({"bits": 4, "group_size": 32, "mode": "mxfp4", "a": {"bits": 6, "group_size": 64}}, "mxfp4"),
        ({"bits": 8, "group_size": 32, "mode": "mxfp8", "a": {"bits": 3, "group_size": 64}}, "int3"),
    ],
)
def test_the_weakest_weights_decide(family_of, quantization, family):
    assert family_of(quantization) == family


def test_a_family_without_tolerances_is_refused(family_of):
    with pytest.raises(UserError, match="int7: no tolerances"):
        family_of({"bits": 7, "group_size": 64})
